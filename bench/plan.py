"""The seconds that `--plan` would print (runtime/roofline.py) against real phases of an RL step, on a CPU.

Rates of matrix products and of reading are measured in the same run, then the phases of a step with made-up responses:
prompts and edits are prefilled and decoded by the engine; log-probs, values and the update are those of ppo_cpe.py. The
model is wide enough for its time to lie in matrix products: that of the tiny recipe (width 128) is bound by calls, of
which a roofline knows nothing. Seconds are of processor time, which other processes do not add to, as long as torch
runs one thread.

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
from runtime import packing, roofline, training
from runtime.distributed import start

MEAN = 0.75  # lengths over their limits below
LIMIT = 0.3  # of the measured time: how far off a phase may be
PROMPT, RESPONSE, CRITIQUE = 160, 64, 48  # tokens at most; `train.made_up` draws from half of that on


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
    """Measurements, of which the medians are reported."""


def seconds_of(function: Callable[[], object]) -> float:
    started = time.process_time()
    function()
    return time.process_time() - started


def measured_rates(width: int) -> roofline.Rates:
    """Of products of the size that the passes have, and of reading what no cache holds."""
    a, b = torch.ones(512, width), torch.ones(4 * width, width)
    large = torch.ones(2**26)
    products = statistics.median(seconds_of(lambda: torch.nn.functional.linear(a, b)) for _ in range(20))
    reading = statistics.median(seconds_of(large.sum) for _ in range(5))
    return roofline.Rates(2 * a.numel() * len(b) / products, large.nbytes / reading, 4)


def generation(engine: Engine, requests: list[tuple[list[int], int]]) -> tuple[float, float]:
    """(prompt ids, tokens of the response) each -> seconds of prefill and of decoding; prompts may be known in part."""
    spent = {"_prefill": 0.0, "_decode": 0.0}
    for name in spent:

        def timed(*inputs, name=name):
            started = time.process_time()
            getattr(Engine, name)(engine, *inputs)
            spent[name] += time.process_time() - started

        setattr(engine, name, timed)
    for i, (ids, length) in enumerate(requests):
        engine.submit(ids, i, max_new_tokens=length)
    while engine.busy:
        engine.step()
        engine.collect()
    return spent["_prefill"], spent["_decode"]


def measure(engine: Engine, models: dict, optimizers: dict, trajectories: list, args, ranks) -> dict[str, float]:
    """{phase: seconds}, the phases of `roofline.phases`."""
    engine.reset_prefix_cache()
    originals, edits = ([t for t in trajectories if (t.parent is None) == first] for first in (True, False))
    length = round(MEAN * RESPONSE)  # the plan knows of no longest response, for which a batch would wait
    first = generation(engine, [(t.prompt_ids, length) for t in originals])
    generation(engine, [(t.parent.sampled_under + t.parent.response_ids, 1) for t in edits])  # known, as in a rollout
    second = generation(engine, [(t.sampled_under, length) for t in edits])
    run = ppo_cpe.Run(args, ranks, None, None)
    for t in trajectories:
        t.old_logprobs = None
    batch = packing.share_prompts(trajectories, args.mini_batch_prompts, ranks)

    def score():
        ppo_cpe.fill_old_logprobs(batch, models["policy"], run)
        prefixes, suffixes = [t.prompt_ids for t in batch], [t.response_ids for t in batch]
        for t, values in zip(batch, training.per_token(models["critic"], prefixes, suffixes, None, run)):
            t.values = values

    scored = seconds_of(score)
    ppo_cpe.compute_advantages(batch, run)
    updated = seconds_of(lambda: ppo_cpe.update(batch, models, optimizers, True, run))
    return dict(prefill=first[0] + second[0], decode=first[1] + second[1], score=scored, update=updated)


def main(args: Args) -> None:
    ranks = start("fp32")
    heads = args.width // 64
    config = Config(args.vocabulary, args.width, 4 * args.width, args.layers, heads, max(1, heads // 4))
    flags = ppo_cpe.Args(prompts_per_step=args.prompts, mini_batch_prompts=args.prompts // 2, temperature=1.0)
    trajectories = train.made_up(args.prompts, PROMPT, RESPONSE, CRITIQUE, args.vocabulary)
    models = {
        "policy": Transformer(config),
        "critic": Transformer(config, scalar_head=True),
        "engine": Transformer(config),
    }
    for model in models.values():
        init_weights(model, 0)
    optimizers = {name: training.adamw(models[name], 1e-6, 0.01) for name in ("policy", "critic")}
    engine = Engine(models["engine"], [], PROMPT + 2 * RESPONSE + CRITIQUE + 1, 6 * args.prompts)

    work = roofline.Work(
        prompts=args.prompts,
        originals=4,
        edits=2,
        trained=6,
        prompt_tokens=MEAN * PROMPT,
        response_tokens=MEAN * RESPONSE,
        critique_tokens=MEAN * CRITIQUE - roofline.REQUEST_TOKENS,
        max_batch=engine.max_batch,
    )
    measure(engine, models, optimizers, trajectories, flags, ranks)  # warm-up
    rates, measured = [], []
    for _ in range(args.repeats):
        rates.append(measured_rates(args.width))
        measured.append(measure(engine, models, optimizers, trajectories, flags, ranks))
    flops, bandwidth = (statistics.median(getattr(r, name) for r in rates) for name in ("flops", "bandwidth"))
    expected = roofline.phases(work, config, config, None, False, 3, roofline.Rates(flops, bandwidth, 4))
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flops / 1e9:.0f} GFLOP/s, "
        f"{bandwidth / 1e9:.0f} GB/s; {sum(p.numel() for p in models['policy'].parameters()) / 1e6:.0f}M parameters"
    )
    print(f"{'':10}{'expected':>10}{'measured':>10}{'ratio':>8}   seconds of processor time")
    for phase in measured[0]:
        seconds = statistics.median(found[phase] for found in measured)
        ratio = expected[phase] / seconds
        verdict = "" if abs(ratio - 1) <= LIMIT else f"off by more than {LIMIT:.0%}"
        print(f"{phase:10}{expected[phase]:10.3f}{seconds:10.3f}{ratio:8.2f}   {verdict}")


if __name__ == "__main__":
    main(tyro.cli(Args))
