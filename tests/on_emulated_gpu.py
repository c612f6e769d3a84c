"""Runs a script on the emulated GPU: python tests/on_emulated_gpu.py SCRIPT FLAGS"""

import os
import runpy
import sys

import emulated_gpu

if __name__ == "__main__":
    sys.path.insert(0, emulated_gpu.ROOT)
    emulated_gpu.install()  # with the project's kernels: bench/ has a kernels.py too
    sys.argv = sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
