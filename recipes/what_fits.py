"""What fits on 24, 48 and 80 GB: the table of docs/gpus.md, from `ppo_cpe.py --plan` of every size of Qwen2.5.

    python recipes/what_fits.py        # some minutes; needs no GPU and no weights

CPE with all that saves memory and leaves the method as it is: activations recomputed, moments and idle models in host
memory (--offload), 8,192 tokens a pass, 32 sequences at a time; prompts and responses of at most 2,048 tokens. The GRM
has the size of the policy. A cell is the room left on each GPU in GiB, after those that are set aside, or what is
lacking.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from runtime import flags


@dataclass
class Args:
    lora_rank: flags.Count = 32
    """Of the adapters."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the import below, which takes seconds

from runtime.plan import RESERVED_GIB

SIZES = {  # hidden size, layers, heads, key and value heads, MLP, vocabulary, tied embeddings: the hub's config.json
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
GPUS, GIB = (1, 8), (24, 48, 80)  # how many, and the memory of each
FLAGS = ["--plan", "--checkpoint-activations", "--offload", "--tokens-per-microbatch", "8192", "--max-batch", "32"]


def write_config(folder: str, size: str) -> None:
    values = dict(zip((*NAMES, "vocab_size", "tie_word_embeddings"), SIZES[size]))
    config = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], rms_norm_eps=1e-6, rope_theta=1e6, **values)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)


def needed(folder: str, n_gpus: int, in_process: bool, flags: list[str]) -> float:
    """GiB of the largest phase of a plan on each GPU, which does not depend on its memory."""
    judge = folder if in_process else "http://localhost:8000/v1"
    command = [sys.executable, "ppo_cpe.py", "--model", folder, "--judge", judge, *FLAGS, *flags]
    command += ["--world-size", str(n_gpus)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^together((?: +[\d.]+)+)$", output.stdout, re.MULTILINE)
    if not found:
        raise ValueError(f"{' '.join(command)}: no plan ({output.stderr.strip()[-500:]})")
    return max(map(float, found[1].split()))


def main(args: Args) -> None:
    ways = {"all weights": [], "LoRA": ["--lora-rank", str(args.lora_rank)]}
    header = [f"{n} x {gib} GB" for n, gib in product(GPUS, GIB)]
    print("| policy, critic and | trained | " + " | ".join(header) + " |")
    print("|---|---|" + "--:|" * len(header))
    rows = list(product(SIZES, (True, False), ways))
    with tempfile.TemporaryDirectory() as folder:
        for size, in_process, trained in tqdm(rows, disable=not sys.stderr.isatty()):
            path = os.path.join(folder, size)
            if not os.path.isdir(path):
                write_config(path, size)
            sizes = [needed(path, n, in_process, ways[trained]) for n in GPUS]
            cells = [f"{gib - RESERVED_GIB - size:.1f}" for size in sizes for gib in GIB]
            where = "GRM in the same processes" if in_process else "GRM on a server"
            print(f"| {size}, {where} | {trained} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    flags.run(main, ARGS)
