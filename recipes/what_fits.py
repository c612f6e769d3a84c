"""What fits on 24, 48 and 80 GB: the table of docs/gpus.md, from `ppo_cpe.py --plan` of every size of Qwen2.5.

    python recipes/what_fits.py        # some minutes; needs no GPU and no weights

CPE with all that saves memory and leaves the method as it is: activations recomputed, moments and idle models in host
memory (--offload), 8,192 tokens a pass, 32 sequences at a time; prompts and responses of at most 2,048 tokens. The GRM
has the size of the policy. A cell is the room left on each GPU in GiB, after 3 that are set aside, or what is lacking.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from itertools import product

from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = {  # hidden size, layers, heads, key and value heads, MLP, vocabulary, tied embeddings: the hub's config.json
    "0.5B": (896, 24, 14, 2, 4864, 151936, True),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, True),
    "3B": (2048, 36, 16, 2, 11008, 151936, True),
    "7B": (3584, 28, 28, 4, 18944, 152064, False),
    "14B": (5120, 48, 40, 8, 13824, 152064, False),
}
NAMES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
MACHINES = ((1, 24), (1, 48), (1, 80), (8, 24), (8, 48), (8, 80))  # GPUs, GiB of each
FLAGS = ["--plan", "--checkpoint-activations", "--offload", "--tokens-per-microbatch", "8192", "--max-batch", "32"]


def write_config(folder: str, size: str) -> None:
    values = dict(zip((*NAMES, "vocab_size", "tie_word_embeddings"), SIZES[size]))
    config = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], rms_norm_eps=1e-6, rope_theta=1e6, **values)
    os.makedirs(folder)
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump(config, f)


def room(folder: str, n_gpus: int, gib: int, in_process: bool) -> str:
    """The last line of a plan as a cell: "7.1", or "-12.3" where so many GiB are lacking."""
    judge = folder if in_process else "http://localhost:8000/v1"
    command = [sys.executable, "ppo_cpe.py", "--model", folder, "--judge", judge, *FLAGS]
    command += ["--world-size", str(n_gpus), "--gpu-gib", str(gib)]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = re.search(r"^fits: (yes|NO), ([\d.]+) GiB", output.stdout, re.MULTILINE)
    if not found:
        raise ValueError(f"{' '.join(command)}: no plan ({output.stderr.strip()[-500:]})")
    return found[2] if found[1] == "yes" else f"-{found[2]}"


def main() -> None:
    print("| policy, critic and | " + " | ".join(f"{n} x {gib} GB" for n, gib in MACHINES) + " |")
    print("|---|" + "--:|" * len(MACHINES))
    with tempfile.TemporaryDirectory() as folder:
        for size, in_process in tqdm(list(product(SIZES, (True, False))), disable=not sys.stderr.isatty()):
            path = os.path.join(folder, size)
            if not os.path.isdir(path):
                write_config(path, size)
            cells = [room(path, n, gib, in_process) for n, gib in MACHINES]
            where = "GRM in the same processes" if in_process else "GRM on a server"
            print(f"| {size}, {where} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
