"""Stages of bench/gpu.sh that are not scripts of their own: an inventory, checks with bounds, and the final table.

A check prints `figure: NAME | VALUE | BOUND | met or MISSED`. A missed bound fails its stage.

    python bench/gpu.py versions                      # what is installed, and what the other stages need besides
    python bench/gpu.py engine                        # the engine on the GPU against the CPU
    python bench/gpu.py attention                     # attention of packed sequences against SDPA, unequal lengths
    python bench/gpu.py logprob                       # fused log-probs against full logits, V = 152k, odd sizes
    python bench/gpu.py mismatches RUN BOUND          # engine against trainer over the steps of a run of ppo_cpe.py
    python bench/gpu.py updates FILE FILE ...         # tests/update_once.py on different numbers of ranks
    python bench/gpu.py table OUT                     # OUT/*.log -> OUT/table.md and a summary; status 1 if any failed
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT  # not bench/, which has a kernels.py too

if TYPE_CHECKING:  # imported where it is needed: stages that read logs take no seconds then
    import torch

EMULATED = os.environ.get("EMULATED") == "1"  # tests/on_emulated_gpu.py: small sizes
NEEDED = [
    "triton",
    "pytest",
    "hypothesis",
    "tyro",
    "pydantic",
    "tokenizers",
    "safetensors",
    "tqdm",
    "transformers",
    "numpy",
    "psutil",
    "httpx2",
    "jinja2",
]
# Figures of the benchmarks for the table: (stage, pattern of a line with the figure, unit)
BENCHMARKS = (
    ("kernels", r"paged_attention .* ([\d.]+)%$", "% of the bandwidth limit"),
    ("kernels", r"sample .*256 x 151936 .*top-p 0.9; torch.sort +[\d.]+ +[\d.]+ +([\d.]+)", "x torch.sort"),
    ("training", r"  forward and backward, ([\d.]+) TFLOP/s", "TFLOP/s"),
    ("training", r"  (?:actor|critic) \(limit.*?([\d.]+) x *$", "x unshared"),
    ("training", r"  actor \(limit.*?, ([\d.]+) TFLOP/s", "TFLOP/s"),
    ("generation", r"(?:0.5b|1.5b)  decode .* ([\d.]+)%$", "% of the limit"),
    ("peers", r"(?:0.5b|1.5b)  decode \d+ +\d+ +[\d.]+ +\d+ +[\d.]+ +([\d.]+)x", "x transformers generate"),
    ("peers-training", r"  peer, \d+ sequences a batch.*?([\d.]+) x", "x transformers"),
)
# what `timeout` and gpu.sh return
STATUS = {"0": "ok", "124": "time limit", "125": "not run: the time is over", "137": "time limit, killed"}


def figure(name: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Prints the figure of a check. Returns whether it meets the bound, which NaN doesn't."""
    met = value >= bound if at_least else value <= bound
    print(f"figure: {name} | {value:.4g} | {'>=' if at_least else '<='} {bound:g} | {'met' if met else 'MISSED'}")
    return met


def highest(values: Iterable[float | torch.Tensor]) -> float:
    """The highest value, NaN if one is NaN: Python's max may pass over it. ValueError: there are none."""
    import numpy as np

    return float(np.max([float(value) for value in values]))


def versions() -> bool:
    import torch

    from kernels.varlen_attention import attention_used

    print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    for name in NEEDED:
        print(name, "is missing" if name in missing else importlib.metadata.version(name))
    print(attention_used(True))
    compiler = next(filter(shutil.which, [os.environ.get("CC", "gcc"), "gcc", "clang"]), None)
    header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
    can_build = compiler is not None and os.path.exists(header)
    print(f"C compiler {compiler}, {header}{'' if can_build else ': Triton needs both, to build its launcher'}")
    if missing:
        print(f"install {' '.join(missing)}, or lay their wheels into a folder and name it: WHEELS=FOLDER")
    return not missing and can_build and torch.cuda.is_available()


# -- checks ------------------------------------------------------------------------------------------------------------


def engine() -> bool:
    """Samples of a small fp32 model with the same seeds on GPU and CPU: forked, preempted, after a weight sync."""
    from engine import Engine
    from model import Transformer, init_weights
    from model_config import Config

    def model(device: str, seed: int) -> Transformer:
        made = Transformer(Config(1000, 128, 256, 2, 4, 2))
        init_weights(made, seed, std=0.2)
        return made.to(device)

    rng = random.Random(0)
    prompts = [rng.choices(range(1000), k=rng.randint(1, 79)) for _ in range(12 if EMULATED else 64)]
    # a cache so small that samples are preempted
    on_gpu = Engine(model("cuda", 0), [7], 160, max_batch=16, kv_tokens=(14 if EMULATED else 32) * 16)
    samples = []
    for made, device in ((Engine(model("cpu", 0), [7], 160), "cpu"), (on_gpu, "cuda")):
        groups = made.generate(prompts, n=2, max_new_tokens=24, top_p=0.95)
        made.sync_weights(model(device, 1))
        groups += made.generate(prompts, n=2, max_new_tokens=24)
        samples.append([sample for group in groups for sample in group])
    pairs = list(zip(*samples, strict=True))
    equal = [(a, b) for a, b in pairs if a.ids == b.ids]
    difference = highest(abs(x - y) for a, b in equal for x, y in zip(a.logprobs, b.logprobs))
    preemptions = on_gpu.scheduler.preemptions
    print(f"{len(pairs)} samples, {preemptions} preempted, graphs of {sorted(on_gpu.runner.graphs)} rows")
    # a draw at the border of two tokens may go the other way, and then all tokens after it differ
    checks = [
        figure("samples as on the CPU, fraction", len(equal) / len(pairs), 0.95, at_least=True),
        figure("engine, largest difference of a log-prob", difference, 1e-3),
        figure("engine, preemptions tried", preemptions, 1, at_least=True),
    ]
    return all(checks)


def random_bf16(*shape: int) -> torch.Tensor:
    import torch

    return torch.randn(shape).to("cuda", torch.bfloat16).requires_grad_()


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours - exact).abs().max() / exact.abs().max()).item()


def attention() -> bool:
    """Output and gradients in bf16 against fp32, where SDPA computes one sequence at a time."""
    import torch

    from attention import SeqLens
    from kernels.varlen_attention import varlen_attention

    torch.manual_seed(0)
    queries = SeqLens([1, 5, 17, 128, 77], "cuda")
    keys = SeqLens([1, 5, 64, 128, 300], "cuda")
    checks = []
    for heads, kv_heads, dim in ((14, 2, 64), (28, 4, 128)):
        q = random_bf16(sum(queries.lengths), heads, dim)
        k = random_bf16(sum(keys.lengths), kv_heads, dim)
        v = random_bf16(sum(keys.lengths), kv_heads, dim)
        weight = torch.randn(q.shape).to("cuda")
        results = {}
        for dtype in (torch.bfloat16, torch.float32):
            out = varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), queries, keys).float()
            results[dtype] = (out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v)))
        for name, ours, exact in zip(("output", "dq", "dk", "dv"), results[torch.bfloat16], results[torch.float32]):
            error = relative_error(ours, exact)
            # bf16 has 8 bits, and sums have rounded weights. One key too many or too few would be an error of
            # 1 / length in the short sequences.
            checks.append(figure(f"attention, {heads} / {kv_heads} heads of {dim}, {name}: error", error, 0.02))
    return all(checks)


def logprob() -> bool:
    import torch

    from kernels.linear_logprob import linear_logprob, reference

    n_tokens, width, vocab = (67, 64, 1519) if EMULATED else (4099, 896, 151936)
    torch.manual_seed(0)
    hidden = random_bf16(n_tokens, width)
    weight = random_bf16(vocab, width)
    targets = torch.randint(0, vocab, (n_tokens,)).to("cuda")
    scale = torch.randn(n_tokens).to("cuda")
    temperature = 20.0  # logits of a spread of 1.5
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, entropy = linear_logprob(hidden, weight, targets, temperature)
    grads = torch.autograd.grad((logprobs * scale).sum(), (hidden, weight))
    extra = (torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)) / 2**30
    exact, exact_entropy = reference(hidden, weight, targets, temperature)
    exact_grads = torch.autograd.grad((exact * scale).sum(), (hidden, weight))
    # logits are exact products of bf16 numbers in fp32; gradients are sums of terms that are rounded to 8 bits
    checks = [
        figure("log-probs, largest difference", (logprobs - exact).abs().max().item(), 1e-3),
        figure("entropy, largest difference", (entropy - exact_entropy).abs().max().item(), 1e-3),
    ]
    for name, ours, expected in zip(("hidden states", "head"), grads, exact_grads):
        checks.append(figure(f"log-probs, gradient of the {name}: error", relative_error(ours, expected), 0.02))
    checks.append(figure("log-probs, GiB beyond gradients", extra, 1))
    return all(checks)


def mismatches(run: str, bound: str) -> bool:
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    checks = [figure(f"{run}, steps", len(lines), 4, at_least=True)]
    for name in ("weight_sync_error", "train_inference_mismatch"):
        largest = highest(float("nan") if line[name] is None else line[name] for line in lines)
        checks.append(figure(f"{run}, {name}", largest, float(bound)))
    return all(checks)


def updates(*files: str) -> bool:
    import torch

    one, *others = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    checks = []
    for file, other in zip(files[1:], others):
        for model in ("policy", "critic"):
            largest = highest(g.abs().max() for g in one[model].values())
            error = highest((other[model][key] - g).abs().max() for key, g in one[model].items()) / largest
            checks.append(figure(f"{Path(file).stem} against one rank, gradients of the {model}: error", error, 1e-3))
    return all(checks)


# -- the table ---------------------------------------------------------------------------------------------------------


def table(out: str) -> bool:
    """Writes OUT/table.md from the logs and OUT/stages.txt, which has a line `NAME STATUS SECONDS` for each stage."""
    stages = [line.split() for line in Path(out, "stages.txt").read_text().splitlines()]
    figures = []  # stage, figure, value, bound, met
    for stage, _, _ in stages:
        for line in Path(out, f"{stage}.log").read_text(errors="replace").splitlines():
            if line.startswith("figure: "):
                figures.append((stage, *line.removeprefix("figure: ").split(" | ")))
            for benchmark, pattern, unit in BENCHMARKS:
                match = re.match(pattern, line) if benchmark == stage else None
                if match:
                    figures.append((stage, " ".join(line.split())[:60], f"{match[1]} {unit}", "", ""))
    rows = ["| stage | result | seconds |", "|---|---|--:|"]
    for name, status, seconds in stages:
        rows.append(f"| {name} | {STATUS.get(status, f'failed ({status})')} | {seconds} |")
    rows += ["", "| stage | figure | value | bound | |", "|---|---|--:|--:|---|"]
    rows += [f"| {' | '.join(row)} |" for row in figures]
    failed = [name for name, status, _ in stages if status != "0"]
    n_checks = sum(row[-1] != "" for row in figures)
    n_missed = sum(row[-1] == "MISSED" for row in figures)
    where = "an emulated GPU, whose times mean nothing" if EMULATED else "a GPU"
    summary = f"{len(stages) - len(failed)} of {len(stages)} stages ok on {where}; "
    summary += f"{n_missed} of {n_checks} bounds missed"
    if failed:
        summary += f"; failed: {', '.join(failed)}"
    Path(out, "table.md").write_text("\n".join([summary, "", *rows]) + "\n")
    print("\n".join([*rows, "", summary]))
    return not failed


STAGES: dict[str, Callable[..., bool]] = {
    "versions": versions,
    "engine": engine,
    "attention": attention,
    "logprob": logprob,
    "mismatches": mismatches,
    "updates": updates,
    "table": table,
}

if __name__ == "__main__":
    description, _, examples = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("arguments", nargs="*", help="files, folders and bounds, as below")
    args = parser.parse_args()
    sys.exit(0 if STAGES[args.stage](*args.arguments) else 1)
