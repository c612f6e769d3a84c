"""The seconds that `--plan` would print (runtime/roofline.py), side by side with phases of an RL step on a CPU.

The rates of matrix products and of reading memory are measured in the same run. The step has random responses: prompts
and edits are prefilled and decoded by the engine, and log-probs, values and the update are those of ppo_cpe.py. The
model is wide enough to spend its time in matrix products; the tiny recipe's (width 128) spends it in calls, which a
roofline doesn't model. Seconds are processor time, so that other processes don't add to it while torch runs one thread.

    OMP_NUM_THREADS=1 python bench/plan.py
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a generate.py too

import torch
import tyro

import ppo_cpe
from bench import train
from engine import Engine
from model import Transformer, init_weights
from model_config import Config
from runtime import roofline, training
from runtime.distributed import Ranks, start
from trajectory import Trajectory, balance_prompts

MEAN = 0.75  # mean lengths, as a fraction of the maxima below
LIMIT = 0.3  # relative error at which a phase is marked
PROMPT, RESPONSE, CRITIQUE = 160, 64, 48  # tokens, at most; `train.random_trajectories` draws from half of that


@dataclass
class Args:
    width: int = 512
    """Hidden size; the MLP is four times as wide."""
    layers: int = 4
    """Layers."""
    vocabulary: int = 8192
    """Tokens of the vocabulary."""
    prompts: int = 6
    """Prompts of the step, with four originals and two edits each."""
    repeats: int = 3
    """Measurements. The medians are reported."""


def seconds_of(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def measured_rates(width: int) -> roofline.Rates:
    """Rates of matrix products as large as those of the passes, and of reading memory that no cache holds."""
    a = torch.ones(512, width)
    b = torch.ones(4 * width, width)
    large = torch.ones(2**26)
    products = statistics.median(seconds_of(lambda: torch.nn.functional.linear(a, b)) for _ in range(20))
    reading = statistics.median(seconds_of(large.sum) for _ in range(5))
    return roofline.Rates(2 * a.numel() * len(b) / products, large.nbytes / reading, 4)


def generation(engine: Engine, requests: list[tuple[list[int], int]]) -> tuple[float, float]:
    """Seconds of prefill and of decoding for requests: (prompt ids, tokens of the response). Prompts may be cached."""
    prefill = 0.0

    def timed_prefill(chunks: list) -> None:
        nonlocal prefill
        prefill += seconds_of(lambda: Engine._prefill(engine, chunks))

    engine._prefill = timed_prefill  # type: ignore[method-assign]
    for i, (ids, length) in enumerate(requests):
        engine.submit(ids, i, max_new_tokens=length)
    total = 0.0
    while engine.busy:
        total += seconds_of(engine.step)
        engine.collect()
    return prefill, total - prefill


def measure(
    engine: Engine,
    models: dict[str, Transformer],
    optimizers: dict[str, torch.optim.Optimizer],
    trajectories: list[Trajectory],
    args: ppo_cpe.Args,
    ranks: Ranks,
) -> dict[str, float]:
    """Seconds by phase, with the phases of `roofline.phases`."""
    engine.reset_prefix_cache()
    originals = [t for t in trajectories if t.parent is None]
    edits = [t for t in trajectories if t.parent is not None]
    length = round(MEAN * RESPONSE)  # the same for all: the plan doesn't model waiting for the longest response
    prefill, decode = generation(engine, [(t.prompt.ids, length) for t in originals])
    # edit prompts continue these answers, so that a rollout has them in its cache
    generation(engine, [(t.prompt.ids + t.parent.response_ids, 1) for t in edits if t.parent])
    edit_prefill, edit_decode = generation(engine, [(t.context_ids, length) for t in edits])

    batch = balance_prompts(trajectories, args.mini_batch_prompts, ranks)
    started = time.process_time()
    scores = train.score(batch, models, args, ranks)
    scored = time.process_time()
    train.update(batch, scores, models, optimizers, args, ranks)
    updated = time.process_time()
    return {
        "prefill": prefill + edit_prefill,
        "decode": decode + edit_decode,
        "score": scored - started,
        "update": updated - scored,
    }


def main(args: Args) -> None:
    ranks = start("fp32")
    heads = args.width // 64
    config = Config(args.vocabulary, args.width, 4 * args.width, args.layers, heads, max(1, heads // 4))
    flags = ppo_cpe.Args(prompts_per_step=args.prompts, mini_batch_prompts=args.prompts // 2, temperature=1.0)
    trajectories = train.random_trajectories(args.prompts, PROMPT, RESPONSE, CRITIQUE, args.vocabulary)
    models = {"policy": Transformer(config), "critic": Transformer(config, scalar_head=True)}
    sampler = Transformer(config)
    for model in (*models.values(), sampler):
        init_weights(model, 0)
    optimizers = {name: training.adamw(model, 1e-6, 0.01) for name, model in models.items()}
    engine = Engine(sampler, [], PROMPT + 2 * RESPONSE + CRITIQUE + 1, 6 * args.prompts)

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
    measure(engine, models, optimizers, trajectories, flags, ranks)  # warm-up
    rates: list[roofline.Rates] = []
    measured: list[dict[str, float]] = []
    for _ in range(args.repeats):
        rates.append(measured_rates(args.width))
        measured.append(measure(engine, models, optimizers, trajectories, flags, ranks))
    flops = statistics.median(r.flops for r in rates)
    bandwidth = statistics.median(r.bandwidth for r in rates)
    expected = roofline.phases(work, config, config, None, False, 3, roofline.Rates(flops, bandwidth, 4))
    n_parameters = sum(p.numel() for p in models["policy"].parameters())
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flops / 1e9:.0f} GFLOP/s, "
        f"{bandwidth / 1e9:.0f} GB/s; {n_parameters / 1e6:.0f}M parameters"
    )
    print(f"{'':10}{'expected':>10}{'measured':>10}{'ratio':>8}   seconds of processor time")
    for phase in measured[0]:
        seconds = statistics.median(m[phase] for m in measured)
        ratio = expected[phase] / seconds
        note = "" if abs(ratio - 1) <= LIMIT else f"off by more than {LIMIT:.0%}"
        print(f"{phase:10}{expected[phase]:10.3f}{seconds:10.3f}{ratio:8.2f}   {note}")


if __name__ == "__main__":
    main(tyro.cli(Args))
