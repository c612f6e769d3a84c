"""Runs a script's main in this process and prints how far its memory rose above where it stood before, in bytes.

peak_of.py sft.py FLAGS ...
"""

import importlib
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import tyro
from transformers import AutoTokenizer  # noqa: F401 - what chat.Chat would load later


def status(field):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


if __name__ == "__main__":
    module = importlib.import_module(sys.argv[1].removesuffix(".py"))
    args = tyro.cli(module.Args, args=sys.argv[2:])
    before = status("VmRSS")
    module.main(args)
    print(f"peak {status('VmHWM') - before}")
