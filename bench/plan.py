"""The seconds that `--plan` would print (runtime/roofline.py), side by side with phases of an RL step on a CPU.

The rates of matrix products and of reading memory are measured in the same run. The step has random responses: prompts
and edits are prefilled and decoded by the engine, and log-probs, values and the update are those of ppo_cpe.py. The
model is wide enough to spend its time in matrix products; the tiny recipe's (width 128) spends it in calls, which a
roofline doesn't model. Seconds are processor time, so that other processes don't add to it while torch runs one thread.

    OMP_NUM_THREADS=1 python bench/plan.py
"""

import os
import sys
from dataclasses import dataclass

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a generate.py too
from runtime import flags


@dataclass
class Args:
    width: flags.Count = 512
    """Hidden size; the MLP is four times as wide."""
    layers: flags.Count = 4
    """Layers."""
    prompts: flags.Count = 6
    """Prompts of the step, with four originals and two edits each."""
    repeats: flags.Count = 3
    """Measurements. The medians are reported."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import statistics
from time import process_time

import torch

import ppo_cpe
from bench import train
from bench.common import device_name, measured_rates, random_model
from engine import Engine
from model_config import Config
from runtime import roofline, training
from runtime.distributed import Ranks, start
from trajectory import Trajectory, balance_prompts

MEAN = 0.75  # mean lengths, as a fraction of the maxima below
PROMPT, RESPONSE, CRITIQUE = 160, 64, 48  # tokens, at most; `train.random_trajectories` draws from half of that


def generation(engine: Engine, prompts: list[list[int]], length: int) -> tuple[float, float]:
    """Seconds of prefill and of decoding for one response of that many tokens to each prompt. Prompts may be cached."""
    prefill = 0.0

    def timed_prefill(chunks: list) -> None:
        nonlocal prefill
        started = process_time()
        Engine._prefill(engine, chunks)
        prefill += process_time() - started

    engine._prefill = timed_prefill
    started = process_time()
    engine.generate(prompts, max_new_tokens=length)
    return prefill, process_time() - started - prefill


def measure(
    engine: Engine,
    models: train.Models,
    optimizers: train.Optimizers,
    trajectories: list[Trajectory],
    args: ppo_cpe.Args,
    ranks: Ranks,
) -> dict[str, float]:
    """Seconds by phase, with the phases of `roofline.phases`."""
    engine.reset_prefix_cache()
    edits = [t for t in trajectories if t.parent]
    length = round(MEAN * RESPONSE)  # the same for all: the plan doesn't model waiting for the longest response
    prefill, decode = generation(engine, [t.prompt.ids for t in trajectories if t.parent is None], length)
    # edit prompts continue these answers, so that a rollout has them in its cache
    generation(engine, [t.prompt.ids + t.parent.response_ids for t in edits], 1)
    edit_prefill, edit_decode = generation(engine, [t.context_ids for t in edits], length)

    mine = balance_prompts(trajectories, args.mini_batch_prompts, ranks)
    started = process_time()
    batch = train.score(mine, models, args, ranks)
    scored = process_time()
    train.update(batch, models, optimizers, args, ranks)
    updated = process_time()
    return {
        "prefill": prefill + edit_prefill,
        "decode": decode + edit_decode,
        "score": scored - started,
        "update": updated - scored,
    }


def main(args: Args) -> None:
    ranks = start("fp32")
    heads = args.width // 64
    config = Config(8192, args.width, 4 * args.width, args.layers, heads, max(1, heads // 4))
    step_args = ppo_cpe.Args(prompts_per_step=args.prompts, mini_batch_prompts=args.prompts // 2, temperature=1.0)
    trajectories = train.random_trajectories(args.prompts, PROMPT, RESPONSE, CRITIQUE, config.vocab_size)
    models = {
        "policy": random_model(config, "cpu", torch.float32),
        "critic": random_model(config, "cpu", torch.float32, scalar_head=True),
    }
    sampler = random_model(config, "cpu", torch.float32)
    optimizers = {name: training.adamw(model, 1e-6, 0.01) for name, model in models.items()}
    engine = Engine(sampler, [], PROMPT + 2 * RESPONSE + CRITIQUE + 1, 6 * args.prompts)

    # products as large as those of the passes
    rates = measured_rates(torch.ones(512, args.width), torch.ones(4 * args.width, args.width), process_time)
    measured = []
    for _ in range(1 + args.repeats):
        measured.append(measure(engine, models, optimizers, trajectories, step_args, ranks))
    work = roofline.Work(
        prompts=args.prompts,
        originals=4,
        edits=2,
        trained=6,
        prompt_tokens=MEAN * PROMPT,
        response_tokens=MEAN * RESPONSE,
        critique_tokens=MEAN * CRITIQUE - roofline.REQUEST_TOKENS,
        max_batch=6 * args.prompts,
    )
    expected = roofline.phases(work, config, config, None, False, 3, rates)
    print(f"{device_name()}, {rates.flops / 1e9:.0f} GFLOP/s, {rates.bandwidth / 1e9:.0f} GB/s")
    print(f"{'':10}{'expected':>10}{'measured':>10}{'ratio':>8}   seconds of processor time")
    for phase in measured[0]:
        seconds = statistics.median(m[phase] for m in measured[1:])  # the first is a warm-up
        print(f"{phase:10}{expected[phase]:10.3f}{seconds:10.3f}{expected[phase] / seconds:8.2f}")


if __name__ == "__main__":
    flags.run(main, ARGS)
