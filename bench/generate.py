"""The generation engine against `transformers`, and against the limits of the machine, in one run.

Workloads: decode at batch 1; 32 ragged requests; n = 4 samples of an 800-token prompt; judgements that share a rubric;
edits that continue their answer; `decode N`: 128 tokens for each of N sequences of 1,024. The peer is `generate` on a
left-padded batch in which each row stops at its own length (`generate` still computes padding and finished rows). Both
sample at temperature 1; ours also records the log-probs.

The limit is the least time that the requests can take at the rates measured in the same run: the products of each
distinct prefix of the prompts once, and for each step of decoding the longer of its products and of reading the weights
once and the keys and values of all running sequences.

    python bench/generate.py                                      # 0.5B shape and the tiny one, on a CPU
    python bench/generate.py --shapes 0.5b 1.5b --workloads ragged "decode 256"     # on a GPU
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too
from runtime import flags


@dataclass
class Args:
    shapes: tuple[Literal["tiny", "0.5b", "1.5b"], ...] = ("tiny", "0.5b")
    """Shapes of the random models."""
    workloads: tuple[str, ...] = ("batch 1", "ragged", "n = 4", "judge", "edit")
    """Which workloads to run."""
    no_peers: bool = False
    """Leave out `transformers`."""
    repeats: flags.Count = 1
    """Measurements of each side after a warm-up. The median is reported."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import functools
import itertools
import random

import torch
import transformers

from bench.common import CONFIGS, device_name, measured_rates, peer_config, random_model, seconds_of
from engine import Engine
from engine.block_manager import BLOCK_SIZE
from model_config import Config
from runtime import roofline
from runtime.distributed import start

Request = tuple[list[int], int, int]  # prompt ids, samples, tokens of each answer


def workload(name: str, vocab_size: int) -> tuple[list[Request], int]:
    """Returns the requests, and how many tokens of each prompt are in the cache before the clock starts."""
    lengths = random.Random(0)

    def ids(n: int, seed: int) -> list[int]:
        return random.Random(seed).choices(range(vocab_size), k=n)

    if name == "batch 1":
        return [(ids(32, 1), 1, 96)], 0
    if name == "ragged":
        return [(ids(lengths.randint(64, 512), i), 1, lengths.randint(16, 256)) for i in range(32)], 0
    if name == "n = 4":
        return [(ids(800, i), 4, 64) for i in range(2)], 0
    if name == "judge":  # rubric, persona and question, four answers each
        return [(ids(600, 1) + ids(200, 2 + i // 4) + ids(100, 10 + i), 1, 64) for i in range(8)], 0
    if name == "edit":  # prompt and answer have been generated before, the critique is new
        return [(ids(460, i), 1, 96) for i in range(8)], 400
    return [(ids(1024, i), 1, 128) for i in range(int(name.removeprefix("decode ")))], 0


def fill_cache(engine: Engine, requests: list[Request], n_cached: int) -> None:
    """Leaves only the first n_cached tokens of each prompt in the cache."""
    engine.reset_prefix_cache()
    if n_cached:
        engine.generate([prompt[:n_cached] for prompt, _, _ in requests], max_new_tokens=1)


def run_ours(engine: Engine, requests: list[Request]) -> None:
    for i, (prompt, n, length) in enumerate(requests):
        engine.submit(prompt, i, n=n, max_new_tokens=length)
    while engine.busy:
        engine.step()
        engine.collect()


def run_generate(model: transformers.Qwen2ForCausalLM, requests: list[Request]) -> None:
    """The static batch of `transformers`. A row stops at its own length, the batch with its longest."""
    rows = [(prompt, length) for prompt, n, length in requests for _ in range(n)]
    longest = max(len(prompt) for prompt, _ in rows)
    ids = torch.tensor([[0] * (longest - len(p)) + p for p, _ in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p, _ in rows], device=model.device)
    ends = torch.tensor([longest + length for _, length in rows], device=model.device)

    def ended(input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        return input_ids.shape[1] >= ends

    model.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        top_k=0,
        eos_token_id=None,
        max_new_tokens=max(length for _, length in rows),
        stopping_criteria=transformers.StoppingCriteriaList([ended]),
    )


def limit_seconds(config: Config, requests: list[Request], n_cached: int, rates: roofline.Rates) -> float:
    """The least seconds that the requests can take, as the docstring of the file says."""
    distinct: set[int] = set()  # hashes of the prefixes
    for prompt, _, _ in requests:
        hashes = itertools.accumulate(prompt, lambda prefix, token: hash((prefix, token)))
        distinct.update(itertools.islice(hashes, n_cached, None))
    seconds = roofline.forward_seconds(config, len(distinct), 0, 0, rates)
    for step in range(max(length for _, _, length in requests)):
        lengths = [len(p) + step for p, n, length in requests for _ in range(n) if step < length]
        n = len(lengths)
        seconds += roofline.decode_seconds(config, n, 1, sum(lengths) / n, n, rates)
    return seconds


def main(args: Args) -> None:
    ranks = start()
    options = dict(device=ranks.device, dtype=ranks.dtype)
    size = 8192 if ranks.device.type == "cuda" else 1024
    rates = measured_rates(torch.randn(size, size, **options), torch.randn(size, size, **options))
    print(
        f"{device_name()}, transformers {transformers.__version__}; measured {rates.bandwidth / 1e9:.0f} GB/s, "
        f"{rates.flops / 1e9:.0f} GFLOP/s"
    )
    print(
        f"{'model':6}{'workload':14}{'tokens':>8}{'ours, s':>10}{'tokens/s':>10}{'generate':>10}{'ratio':>8}"
        f"{'limit, s':>10}{'reached':>9}",
        flush=True,
    )
    for shape, name in itertools.product(args.shapes, args.workloads):
        config = CONFIGS[shape]
        requests, n_cached = workload(name, config.vocab_size)
        n_rows = sum(n for _, n, _ in requests)
        longest = max(len(p) + length for p, _, length in requests)
        model = random_model(config, **options)
        engine = Engine(model, [], longest, n_rows, kv_tokens=(longest + BLOCK_SIZE) * n_rows)
        sides = {"ours": functools.partial(run_ours, engine, requests)}
        if not args.no_peers:
            peer = transformers.Qwen2ForCausalLM(peer_config(config, use_cache=True)).to(**options)
            sides["generate"] = functools.partial(run_generate, peer, requests)
        before = functools.partial(fill_cache, engine, requests, n_cached)
        seconds = seconds_of(sides, args.repeats, before)
        ours = seconds["ours"]
        peer_columns = f"{'-':>10}{'-':>8}"
        if not args.no_peers:
            peer_columns = f"{seconds['generate']:>10.2f}{seconds['generate'] / ours:>7.2f}x"
        limit = limit_seconds(config, requests, n_cached, rates)
        n_tokens = sum(n * length for _, n, length in requests)
        print(
            f"{shape:6}{name:14}{n_tokens:>8}{ours:>10.2f}{n_tokens / ours:>10.0f}{peer_columns}{limit:>10.2f}"
            f"{limit / ours:>9.0%}",
            flush=True,
        )


if __name__ == "__main__":
    flags.run(main, ARGS)
