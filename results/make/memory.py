"""What fits on 24, 48 and 80 GB: the table of docs/gpus.md, from `ppo_cpe.py --plan` of every size of Qwen2.5.

CPE with everything that saves memory and leaves the method as it is: activations recomputed, moments and idle models in
host memory (--offload), 8,192 tokens a pass, 32 sequences at a time; prompts and responses of at most 2,048 tokens. The
GRM has the size of the policy; adapters have rank 32. The table says how many GiB remain on each GPU, after those that
are set aside; below zero, how many are lacking.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product

from tqdm import tqdm

from results.make.experiments import ROOT
from runtime.plan import RESERVED_GIB

SIZES = {  # hidden size, layers, heads, key and value heads, MLP, vocabulary, tied embeddings: the hub's config.json
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
}
FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("vocab_size", "tie_word_embeddings"),
)
N_GPUS = (1, 8)
GPU_GB = (24, 48, 80)
FLAGS = ["--plan", "--checkpoint-activations", "--offload", "--tokens-per-microbatch", "8192", "--max-batch", "32"]
TRAINED = {"all weights": [], "LoRA": ["--lora-rank", "32"]}
JUDGES = {"GRM in the same processes": True, "GRM on a server": False}


def write_config(folder: str, size: str) -> None:
    """config.json of a size of Qwen2.5."""
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        **dict(zip(FIELDS, SIZES[size])),
    }
    os.makedirs(folder)
    with open(f"{folder}/config.json", "w") as f:
        json.dump(config, f)


def largest_phase(model: str, n_gpus: int, judge: str, trained: list[str]) -> float:
    """GiB on each GPU in the largest phase of a plan, which does not depend on the GPU's memory."""
    command = [sys.executable, "ppo_cpe.py", "--model", model, "--judge", judge, *FLAGS, *trained]
    command += ["--world-size", str(n_gpus)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    totals = re.search(r"^together((?: +[\d.]+)+)$", output.stdout, re.MULTILINE)
    if not totals:
        raise ValueError(f"{' '.join(command)}: no plan ({output.stderr.strip()[-500:]})")
    return max(map(float, totals[1].split()))


def main() -> None:
    """Prints the table, line by line."""
    header = [f"{n} x {gb} GB" for n, gb in product(N_GPUS, GPU_GB)]
    print("| policy, critic and | trained | " + " | ".join(header) + " |")
    print("|---|---|" + "--:|" * len(header))
    with tempfile.TemporaryDirectory() as folder:
        for size in SIZES:
            write_config(f"{folder}/{size}", size)
        rows = list(product(SIZES, JUDGES, TRAINED))
        for size, where, trained in tqdm(rows, disable=not sys.stderr.isatty()):
            model = f"{folder}/{size}"
            judge = model if JUDGES[where] else "http://localhost:8000/v1"
            needed = [largest_phase(model, n, judge, TRAINED[trained]) for n in N_GPUS]
            room = [f"{gb - RESERVED_GIB - gib:.1f}" for gib in needed for gb in GPU_GB]
            print(f"| {size}, {where} | {trained} | " + " | ".join(room) + " |", flush=True)
