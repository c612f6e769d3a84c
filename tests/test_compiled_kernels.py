"""Every Triton kernel, compiled ahead of time for real GPUs on a machine without one, as the launchers would.

    bash tests/run.sh -n 0 -k compiled -s --cache-clear # 7B for sm_80 and sm_90, and what differs at other sizes
    COMPILE_ALL=1 bash tests/run.sh -n 0 -k compiled -s # all of Qwen2.5 0.5B to 14B, also fp32, sm_89 and odd sizes

What has passed is not compiled again until kernels/, this file or the version of Triton changes: each test keeps a
digest of them in pytest's cache (.pytest_cache).

The project's launchers run on tensors of the meta device, under a driver that names a GPU and has none: Triton compiles
what they would launch, with the ptxas of its wheel. So tiles, warps and stages are those of the code. -s prints, for
each binary, registers and bytes of stack of a thread (what is spilled lies there), shared memory of a block, and how
many tensor-core instructions and asynchronous copies it has.
"""

import hashlib
import importlib
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip("triton")
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from engine.block_manager import BLOCK_SIZE
from kernels import linear_logprob, paged_attention, rmsnorm, rope_kv, sampling, swiglu

COMPILE_ALL = os.environ.get("COMPILE_ALL") == "1"
ARCHITECTURES = (80, 89, 90) if COMPILE_ALL else (80, 90)  # A100 and A800, L40S, H100 and H800
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024}  # bytes of a block (CUDA's table of capabilities)
REGISTERS = 65536  # of a multiprocessor, on all of these
MAX_LEN = 7168  # tokens of a sequence of the engine, in the recipes for 7B
TENSOR_CORES = {"linear_logprob._forward_kernel", "linear_logprob._grad_kernel", "paged_attention._split_kernel"}
# fp32 is for tests on a GPU, not for speed: 16 bytes of this one lie on the stack where there are 255 registers
SPILLS_IN_FP32 = {"linear_logprob._forward_kernel"}


@dataclass(frozen=True)
class Shape:
    """Of Qwen2.5: width, MLP, query and key heads, vocabulary."""

    d: int
    f: int
    heads: int
    kv: int
    vocab: int


SHAPES = {
    "0.5b": Shape(896, 4864, 14, 2, 151936),
    "1.5b": Shape(1536, 8960, 12, 2, 151936),
    "7b": Shape(3584, 18944, 28, 4, 152064),
    "14b": Shape(5120, 13824, 40, 8, 152064),
}


class NoGPU:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # compiled kernels are kept by device

    def get_current_stream(self, device):
        return 0


def digest():
    """Digest of all that the compiled code depends on: kernels/, the launches of this file, Triton's version."""
    parts = hashlib.blake2b(triton.__version__.encode(), digest_size=16)
    for file in [*sorted(Path(ROOT, "kernels").glob("*.py")), Path(__file__)]:
        parts.update(file.read_bytes())
    return f"{parts.hexdigest()}, blocks of {BLOCK_SIZE}"


@pytest.fixture
def passed(request):
    """-> a function that a test calls at its end. On the same code the test is skipped from then on."""
    key = f"compiled_kernels/{request.node.name}"
    if request.config.cache.get(key, None) == digest():
        pytest.skip("compiled before, from the same code (pytest --cache-clear compiles again)")
    return lambda: request.config.cache.set(key, digest())


@pytest.fixture
def compile_for(monkeypatch):
    """-> a function (architecture, launch) -> {(kernel, hash): compiled} of what `launch` launches."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets")
    run = JITFunction.run

    def compile_all(architecture, launch):
        found = {}

        def compile_instead(kernel, *args, grid, warmup=False, **options):
            compiled = run(kernel, *args, grid=grid, warmup=True, **options)
            found[f"{kernel.module.rpartition('.')[2]}.{kernel.fn.__name__}", compiled.hash] = compiled

        monkeypatch.setattr(driver, "_active", NoGPU(architecture))
        monkeypatch.setattr(JITFunction, "run", compile_instead)
        launch()
        return found

    return compile_all


# -- the launchers, on meta tensors ------------------------------------------------------------------------------------


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def train(shape, dtype, n_tokens):
    """Forward and backward of the kernels that training runs."""
    x, residual, weight, gate, up, hidden, head = (
        meta(*size, dtype=dtype).requires_grad_()
        for size in (
            (n_tokens, shape.d),
            (n_tokens, shape.d),
            (shape.d,),
            (n_tokens, shape.f),
            (n_tokens, shape.f),
            (n_tokens, shape.d),
            (shape.vocab, shape.d),
        )
    )
    torch.autograd.grad(rmsnorm._RMSNorm.apply(x, None, weight, 1e-6)[0], (x, weight), torch.empty_like(x))
    torch.autograd.grad(rmsnorm._RMSNorm.apply(x, residual, weight, 1e-6), (x, weight), (torch.empty_like(x),) * 2)
    torch.autograd.grad(swiglu._SwiGLU.apply(gate, up), (gate, up), torch.empty_like(up))
    targets = meta(n_tokens, dtype=torch.int64)
    logprobs, _ = linear_logprob._LinearLogprob.apply(hidden, head, targets, 0.9, linear_logprob._Triton)
    torch.autograd.grad(logprobs, (hidden, head), torch.empty_like(logprobs))


def attend(shape, dtype, n_rows):
    dim = shape.d // shape.heads
    caches = [meta(64, BLOCK_SIZE, shape.kv, dim, dtype=dtype) for _ in range(2)]
    table, lengths = meta(n_rows, MAX_LEN // BLOCK_SIZE + 1, dtype=torch.int32), meta(n_rows, dtype=torch.int32)
    q = meta(n_rows, shape.heads, dim, dtype=dtype)
    paged_attention.triton_paged_attention(q, *caches, table, lengths)


def decode(shape, dtype, n_rows):
    """The kernels of a decode step; logits are fp32 in any case."""
    dim = shape.d // shape.heads
    q, k, v = (meta(n_rows, heads, dim, dtype=dtype) for heads in (shape.heads, shape.kv, shape.kv))
    cos, slots = meta(n_rows, 1, dim, dtype=dtype), meta(n_rows, dtype=torch.int64)
    caches = [meta(64, BLOCK_SIZE, shape.kv, dim, dtype=dtype) for _ in range(2)]
    rope_kv.triton_rope_kv(q, k, v, cos, cos, *caches, slots)
    attend(shape, dtype, n_rows)
    settings, seeds = meta(n_rows, dtype=torch.float32), meta(n_rows, dtype=torch.int64)
    sampling.triton_sample(meta(n_rows, shape.vocab, dtype=torch.float32), settings, settings, seeds, seeds)


# -- what came out -----------------------------------------------------------------------------------------------------


def registers_and_stack(compiled, folder):
    """-> registers, bytes of stack of a thread, of the binary that a GPU would load."""
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", folder / "kernel.cubin"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{name}:(\d+)", log)[1]) for name in ("REG", "STACK"))


def check(binaries, architecture, model, dtype, folder):
    for (name, _), compiled in binaries.items():
        ptx, used = compiled.asm["ptx"], compiled.metadata
        registers, stack = registers_and_stack(compiled, folder)
        products = len(re.findall(r"\bmma\.sync|\bwgmma\.mma_async", ptx))
        copies = len(re.findall(r"\bcp\.async\.c[ag]\.shared|\bcp\.async\.bulk", ptx))
        print(
            f"sm_{architecture} {model:4} {str(dtype).removeprefix('torch.'):8} {name:32} {used.num_warps:2} warps "
            f"{registers:3} registers {stack:3} B stack {used.shared / 1024:5.1f} KiB shared {products:3} tensor-core "
            f"products {copies:3} copies",
            flush=True,
        )
        where = f"{name} for {model} in {dtype} on sm_{architecture}"
        assert used.shared <= SHARED_LIMIT[architecture], where
        assert registers * 32 * used.num_warps <= REGISTERS, where
        assert stack == 0 or (dtype == torch.float32 and name in SPILLS_IN_FP32), f"{where}: {stack} bytes spilled"
        if name in TENSOR_CORES:
            assert copies > 0, f"{where}: loads and products do not overlap"
            assert (products > 0) == (dtype != torch.float32), f"{where}: {products} tensor-core products"
            if architecture == 90 and name.startswith("linear_logprob") and dtype != torch.float32:
                assert "wgmma.mma_async" in ptx, where


def all_kernels():
    names = [file.stem for file in Path(ROOT, "kernels").glob("*.py")]
    modules = {name: importlib.import_module(f"kernels.{name}") for name in names}
    functions = [(name, key, value) for name, module in modules.items() for key, value in vars(module).items()]
    return {f"{name}.{key}" for name, key, f in functions if isinstance(f, JITFunction) and key.endswith("_kernel")}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_at_7b(passed, compile_for, architecture, tmp_path):
    def launch():
        train(SHAPES["7b"], torch.bfloat16, 8192)
        decode(SHAPES["7b"], torch.bfloat16, 256)

    binaries = compile_for(architecture, launch)
    assert {name for name, _ in binaries} == all_kernels(), "a kernel that is not launched here"
    check(binaries, architecture, "7b", torch.bfloat16, tmp_path)
    passed()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model, dtype", [("0.5b", torch.bfloat16), ("14b", torch.bfloat16), ("7b", torch.float32)])
def test_paged_attention_compiles_at_other_sizes(passed, compile_for, architecture, model, dtype, tmp_path):
    """Where the size of a head and of its group, or fp32, changes the tiles most."""
    binaries = compile_for(architecture, lambda: attend(SHAPES[model], dtype, 256))
    assert len(binaries) == 2
    check(binaries, architecture, model, dtype, tmp_path)
    passed()


@pytest.mark.slow
@pytest.mark.skipif(not COMPILE_ALL, reason="minutes: COMPILE_ALL=1")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_all_sizes_compile(compile_for, architecture, model, dtype, tmp_path):
    """Also one row, and odd numbers of rows, for which Triton compiles anew."""

    def launch():
        for n_tokens, n_rows in ((8192, 256), (5003, 13), (1, 1)):
            train(SHAPES[model], dtype, n_tokens)
            decode(SHAPES[model], dtype, n_rows)

    check(compile_for(architecture, launch), architecture, model, dtype, tmp_path)
