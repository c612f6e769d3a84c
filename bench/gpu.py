"""The stages of bench/gpu.sh that are no script of their own: what there is, checks with bounds, and the table.

    python bench/gpu.py versions                 # what is installed, and what else the other stages need
    python bench/gpu.py engine                   # the engine on the GPU against the CPU
    python bench/gpu.py attention                # attention of packed sequences against SDPA, unequal lengths
    python bench/gpu.py logprob                  # fused log-probs against full logits, V = 152k, odd sizes
    python bench/gpu.py gaps RUN BOUND           # engine against trainer over the steps of a run of ppo_cpe.py
    python bench/gpu.py updates FILE FILE ...    # tests/update_once.py on different numbers of ranks
    python bench/gpu.py table OUT                # OUT/*.log -> OUT/table.md and a summary line; status 1 if any failed

A check prints `figure: NAME | VALUE | BOUND | met or MISSED`; a missed bound fails its stage, a missed target of a
benchmark does not.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT  # not bench/, which has a kernels.py too

import torch

EMULATED = os.environ.get("EMULATED") == "1"  # tests/on_emulated_gpu.py: small sizes
NEEDED = {  # beside torch: module -> what for
    "triton": "the kernels",
    "pytest": "tests of the kernels and of several ranks",
    "tyro": "flags of every script",
    "pydantic": "ranges of flags",
    "tokenizers": "every stage of the pipeline",
    "safetensors": "every stage of the pipeline",
    "tqdm": "every stage of the pipeline",
    "transformers": "chat templates; the peer of the benchmarks",
    "numpy": "the engine",
    "openai": "evaluate.py and judges on servers, which ppo_cpe.py imports",
}
OPTIONAL = {"flash_attn": "attention, else torch's own"}
# what one H100 should reach: (stage, pattern of a line, its figure, target, least); README, bench/RESULTS.md
TARGETS = (
    ("kernels", r"paged_attention .* ([\d.]+)%$", "of the bandwidth limit, %", 85),
    ("kernels", r"sample .*256 x 151936 .*top-p 0.9; torch.sort +[\d.]+ +[\d.]+ +([\d.]+)", "x torch.sort", 5),
    ("training", r"  forward and backward, ([\d.]+) TFLOP/s", "TFLOP/s of 798 that a product reaches", 0.7 * 798),
    ("training", r"  (?:actor|critic) \(limit.*?([\d.]+) x ", "x unshared", 1.9),
    ("training", r"  actor \(limit.*?, ([\d.]+) TFLOP/s", "TFLOP/s, half of the data sheet's 989", 495),
    ("generation", r"0.5b  decode .* ([\d.]+)%$", "of the limit, %", 55),
    ("generation", r"1.5b  decode .* ([\d.]+)%$", "of the limit, %", 70),
    ("peers", r"(?:0.5b|1.5b)  decode \d+ +\d+ +[\d.]+ +\d+ +[\d.]+ +([\d.]+)x", "x transformers generate", 8),
    ("peers-training", r"  peer, \d+ sequences a batch.*?([\d.]+) x ", "x transformers", 3),
)


def figure(name: str, value: float, bound: float, at_least: bool = False) -> bool:
    """Prints a check's figure -> whether it is met (NaN is not)."""
    met = value >= bound if at_least else value <= bound
    print(f"figure: {name} | {value:.4g} | {'>=' if at_least else '<='} {bound:g} | {'met' if met else 'MISSED'}")
    return met


def versions() -> bool:
    print(f"python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for i in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(i)
        print(f"{device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}")
    missing = []
    for name, why in (NEEDED | OPTIONAL).items():
        if importlib.util.find_spec(name) is None:
            print(f"{name} is missing: {why}")
            missing += [name] if name in NEEDED else []
        else:
            print(f"{name} {importlib.metadata.version(name)}")
    from kernels.varlen_attention import attention_used

    print(attention_used(True))
    if missing:
        print(f"install {' '.join(missing)}, or lay their wheels into a folder and name it: WHEELS=FOLDER")
    return not missing and torch.cuda.is_available()


# -- checks ------------------------------------------------------------------------------------------------------------


def engine() -> bool:
    """Forked, preempted and refreshed samples of a small random model, fp32, with the same seeds on both."""
    from engine import Engine
    from model import Transformer, init_weights
    from model_config import Config

    def model(device, seed):
        made = Transformer(Config(1000, 128, 256, 2, 4, 2))
        init_weights(made, seed, std=0.2)
        return made.to(device)

    n, generator = (12 if EMULATED else 64), torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 80, (n,), generator=generator).tolist()
    prompts = [torch.randint(0, 1000, (length,), generator=generator).tolist() for length in lengths]
    samples, reused = {}, None
    for device in ("cpu", "cuda"):
        small = dict(max_batch=16, kv_tokens=(14 if EMULATED else 32) * 16) if device == "cuda" else {}
        made = Engine(model(torch.device(device, 0), 0), [7], 160, **small)
        first = made.generate(prompts, n=2, max_new_tokens=24, top_p=0.95)
        made.sync_weights(model(torch.device(device, 0), 1))
        again = made.generate(prompts, n=2, max_new_tokens=24)
        samples[device], reused = sum(first + again, []), made
    pairs = list(zip(samples["cpu"], samples["cuda"], strict=True))
    same = [(a, b) for a, b in pairs if a.ids == b.ids]
    gap = max(abs(x - y) for a, b in same for x, y in zip(a.logprobs, b.logprobs))
    sizes = sorted(reused.runner.graphs)
    print(f"{len(pairs)} samples, {reused.scheduler.preemptions} preempted, graphs of {sizes} rows")
    # a draw at the border of two tokens may go the other way, and all that follows it
    checks = [figure("samples as on the CPU, share", len(same) / len(pairs), 0.95, at_least=True)]
    checks.append(figure("engine, largest difference of a log-prob", gap, 1e-3))
    checks.append(figure("engine, preemptions tried", reused.scheduler.preemptions, 1, at_least=True))
    return all(checks)


def attention() -> bool:
    from kernels.varlen_attention import varlen_attention
    from model import SeqLens

    device, checks = torch.device("cuda", 0), []
    torch.manual_seed(0)
    queries, keys = (SeqLens(lengths, device) for lengths in ([1, 5, 17, 128, 77], [1, 5, 64, 128, 300]))
    for heads, kv, dim in ((14, 2, 64), (28, 4, 128)):
        shapes = ((sum(queries.lengths), heads, dim), *2 * ((sum(keys.lengths), kv, dim),))
        q, k, v = (torch.randn(shape).to(device, torch.bfloat16).requires_grad_() for shape in shapes)
        weight = torch.randn(shapes[0]).to(device)
        found = {}
        for dtype in (torch.bfloat16, torch.float32):  # in fp32: SDPA, a segment at a time
            out = varlen_attention(q.to(dtype), k.to(dtype), v.to(dtype), queries, keys).float()
            found[dtype] = out.detach(), *torch.autograd.grad((out * weight).sum(), (q, k, v))
        for name, ours, exact in zip(("output", "dq", "dk", "dv"), found[torch.bfloat16], found[torch.float32]):
            error = ((ours - exact).abs().max() / exact.abs().max()).item()
            # 8 bits, and sums of rounded weights; a key too many or too few is off by 1 / length of the short segments
            checks.append(figure(f"attention, {heads} / {kv} heads of {dim}, {name}: error", error, 0.02))
    return all(checks)


def logprob() -> bool:
    from kernels.linear_logprob import linear_logprob, reference

    device, dtype = torch.device("cuda", 0), torch.bfloat16
    n_tokens, width, vocab = (67, 64, 1519) if EMULATED else (4099, 896, 151936)
    torch.manual_seed(0)
    hidden = torch.randn(n_tokens, width).to(device, dtype).requires_grad_()
    weight = (torch.randn(vocab, width) * 0.05).to(device, dtype).requires_grad_()
    targets, scale = torch.randint(0, vocab, (n_tokens,)).to(device), torch.randn(n_tokens).to(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logprobs, entropy = linear_logprob(hidden, weight, targets, 0.9)
    grads = torch.autograd.grad((logprobs * scale).sum(), (hidden, weight))
    extra = (torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)) / 2**30
    exact, exact_entropy = reference(hidden, weight, targets, 0.9)
    exact_grads = torch.autograd.grad((exact * scale).sum(), (hidden, weight))
    # the logits are exact products of bf16 numbers in fp32; gradients are sums of terms that are rounded to 8 bits
    checks = [figure("log-probs, largest difference", (logprobs - exact).abs().max().item(), 1e-3)]
    checks.append(figure("entropy, largest difference", (entropy - exact_entropy).abs().max().item(), 1e-3))
    for name, ours, wanted in zip(("hidden states", "head"), grads, exact_grads):
        error = ((ours - wanted).abs().max() / wanted.abs().max()).item()
        checks.append(figure(f"log-probs, gradient of the {name}: error", error, 0.02))
    checks.append(figure("log-probs, GiB beyond gradients", extra, 1))
    return all(checks)


def gaps(run: str, bound: str) -> bool:
    import json

    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    checks = [figure(f"{run}, steps", len(lines), 4, at_least=True)]
    for name in ("weight_sync_error", "train_inference_mismatch"):
        largest = max(float("nan") if line[name] is None else line[name] for line in lines)
        checks.append(figure(f"{run}, {name}", largest, float(bound)))
    return all(checks)


def updates(*files: str) -> bool:
    one, *others = (torch.load(file, map_location="cpu", weights_only=True) for file in files)
    checks = []
    for file, other in zip(files[1:], others):
        for model in ("policy", "critic"):
            largest = max(g.abs().max() for g in one[model].values())
            error = max((other[model][key] - g).abs().max() for key, g in one[model].items()) / largest
            checks.append(figure(f"{Path(file).stem} against one rank, gradients of the {model}: error", error, 1e-3))
    return all(checks)


# -- the table ---------------------------------------------------------------------------------------------------------


def table(out: str) -> bool:
    """stages.txt of gpu.sh: a line `NAME STATUS SECONDS` per stage."""
    stages = [line.split() for line in Path(out, "stages.txt").read_text().splitlines()]
    figures = []
    for stage, _, _ in stages:
        log = Path(out, f"{stage}.log").read_text(errors="replace").splitlines()
        figures += [(stage, *line.removeprefix("figure: ").split(" | ")) for line in log if line.startswith("figure: ")]
        for of, pattern, unit, least in TARGETS:
            for line in log if of == stage else ():
                if m := re.match(pattern, line):
                    met = "met" if float(m[1]) >= least else "MISSED"
                    figures.append((stage, " ".join(line.split())[:60], f"{m[1]} {unit}", f">= {least:g}", met))
    words = {"0": "ok", "124": "time limit", "125": "not run: the time is over", "137": "time limit, killed"}
    rows = ["| stage | result | seconds |", "|---|---|--:|"]
    rows += [f"| {name} | {words.get(status, f'failed ({status})')} | {seconds} |" for name, status, seconds in stages]
    rows += ["", "| stage | figure | value | target | |", "|---|---|--:|--:|---|"]
    rows += [f"| {' | '.join(row)} |" for row in figures]
    failed = [name for name, status, _ in stages if status != "0"]
    missed = sum(row[-1] == "MISSED" for row in figures)
    where = "an emulated GPU, whose times mean nothing" if EMULATED else "a GPU"
    summary = (
        f"{len(stages) - len(failed)} of {len(stages)} stages ok on {where}; {missed} of {len(figures)} figures missed"
    )
    summary += f"; failed: {', '.join(failed)}" if failed else ""
    Path(out, "table.md").write_text("\n".join([summary, "", *rows]) + "\n")
    print("\n".join([*rows, "", summary]))
    return not failed


if __name__ == "__main__":
    stages = dict(versions=versions, engine=engine, attention=attention, logprob=logprob, gaps=gaps, updates=updates)
    sys.exit(0 if (stages | {"table": table})[sys.argv[1]](*sys.argv[2:]) else 1)
