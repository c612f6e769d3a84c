"""Each kernel beside its torch equivalent, in one table: time, ratio, and the limit measured in the same run.

    python bench/kernels.py     # a GPU: sizes of a 0.5B and a 7B model; a CPU: smaller ones, the torch paths

The limit is the time to move the bytes that the operation must read and write once, at the rate at which this run
copied a large tensor. On a CPU the functions run their torch paths: attention and sampling differ from the peer there;
the others are the same code, and only their fraction of the limit is informative.
"""

import os
import platform
import sys
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import tyro

try:
    import triton
except ImportError:  # a CPU needs the torch code only
    triton = None

# instead of this file's folder, where `kernels` would be this file
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from kernels.paged_attention import paged_attention
from kernels.rmsnorm import add_rms_norm
from kernels.rope_kv import apply_rope, rope_kv
from kernels.sampling import sample
from kernels.swiglu import swiglu


@dataclass
class Args:
    repeats: int = 20
    """Runs per measurement; the fastest counts."""
    seconds: float = 5.0
    """Time limit of a measurement."""


def main(args: Args) -> None:
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)

    def seconds(function):
        function()
        best, start = float("inf"), time.perf_counter()
        for _ in range(args.repeats):
            if on_gpu:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()  # evicts the last run's data from the L2 cache
                begin.record()
                function()
                end.record()
                torch.cuda.synchronize()
                best = min(best, begin.elapsed_time(end) / 1e3)
            else:
                begin = time.perf_counter()
                function()
                best = min(best, time.perf_counter() - begin)
            if time.perf_counter() - start > args.seconds:
                break
        return best

    def randn(*shape):
        return torch.randn(shape, device=device, dtype=dtype)

    flush = torch.empty(2**28 if on_gpu else 2**26, dtype=torch.uint8, device=device)
    other = torch.empty_like(flush)
    rate = 2 * flush.nbytes / seconds(lambda: other.copy_(flush))  # bytes/s, read and written
    name = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, triton {triton.__version__}" if on_gpu else f"torch {torch.__version__}"
    print(f"device {name}; {versions}; {dtype}; copy rate {rate / 1e9:.1f} GB/s")
    print(
        f"{'kernel':16s} {'workload':58s} {'ours ms':>9s} {'torch ms':>9s} {'ratio':>6s} {'limit ms':>9s} "
        f"{'of limit':>8s}"
    )

    def row(kernel, workload, ours, peer, nbytes):
        ours, peer, limit = seconds(ours), seconds(peer), nbytes / rate
        print(
            f"{kernel:16s} {workload:58s} {ours * 1e3:9.3f} {peer * 1e3:9.3f} {peer / ours:6.2f} {limit * 1e3:9.3f} "
            f"{limit / ours:8.1%}",
            flush=True,
        )

    # paged attention; peer: torch's attention on a dense cache of equal lengths, without a block table
    shapes = ((32, 512, 2, 7, 64), (64, 192, 2, 2, 32), (1, 1024, 2, 7, 64))
    if on_gpu:
        shapes = ((256, 1024, 2, 7, 64), (256, 1024, 4, 7, 128), (1, 4096, 4, 7, 128))
    for n_rows, length, n_kv, group, dim in shapes:
        n_blocks = n_rows * length // 16
        k_cache, v_cache = randn(n_blocks, 16, n_kv, dim), randn(n_blocks, 16, n_kv, dim)
        block_table = torch.randperm(n_blocks, device=device).int().view(n_rows, -1)
        lengths = torch.full((n_rows,), length, dtype=torch.int32, device=device)
        q, keys, values = randn(n_rows, n_kv * group, dim), *(randn(n_rows, n_kv, length, dim) for _ in range(2))
        row(
            "paged_attention",
            f"{n_rows} rows x {length} tokens, {n_kv * group} / {n_kv} heads of {dim}; dense SDPA",
            lambda: paged_attention(q, k_cache, v_cache, block_table, lengths),
            lambda: F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True),
            2 * keys.nbytes + 2 * q.nbytes,
        )

    # sampling; peer: sorting the vocabulary (and nothing else), or at top-p 1 softmax and multinomial
    for n_rows, vocab_size in ((256, 151936), (1, 151936)) if on_gpu else ((32, 151936), (1, 151936), (64, 1400)):
        logits = torch.randn(n_rows, vocab_size, device=device) * 3
        settings = [torch.full((n_rows,), x, device=device) for x in (1.0, 0.9)]
        seeds = torch.arange(n_rows, device=device)
        row(
            "sample",
            f"{n_rows} x {vocab_size} fp32, top-p 0.9; torch.sort",
            lambda: sample(logits, *settings, seeds, seeds),
            lambda: logits.sort(-1, descending=True),
            logits.nbytes,
        )
        whole = [settings[0], torch.ones_like(settings[1])]
        row(
            "sample",
            f"{n_rows} x {vocab_size} fp32, top-p 1; softmax, multinomial",
            lambda: sample(logits, *whole, seeds, seeds),
            lambda: torch.multinomial(logits.softmax(-1), 1),
            logits.nbytes,
        )

    for n_tokens, d, f in ((8192, 896, 4864), (256, 3584, 18944)) if on_gpu else ((512, 896, 4864),):
        x, residual, weight = randn(n_tokens, d), randn(n_tokens, d), randn(d)

        def torch_norm(x, residual):
            total = x + residual
            return F.rms_norm(total, (d,), weight, 1e-6), total

        row(
            "add_rms_norm",
            f"{n_tokens} x {d}; add, F.rms_norm",
            lambda: add_rms_norm(x, residual, weight, 1e-6),
            lambda: torch_norm(x, residual),
            4 * x.nbytes,
        )
        gate, up = randn(n_tokens, f), randn(n_tokens, f)
        row(
            "swiglu",
            f"{n_tokens} x {f}; F.silu, product",
            lambda: swiglu(gate, up),
            lambda: F.silu(gate) * up,
            3 * up.nbytes,
        )

        # backward: the norm reads dy, d(sum) and the sum and writes dx; SwiGLU reads dy, gate and up and writes two
        x.requires_grad_(), weight.requires_grad_(), gate.requires_grad_(), up.requires_grad_()
        both, grad = (torch.ones_like(x),) * 2, torch.ones_like(up)
        row(
            "add_rms_norm",
            f"{n_tokens} x {d}, forward + backward",
            lambda: torch.autograd.grad(add_rms_norm(x, residual, weight, 1e-6), (x, weight), both),
            lambda: torch.autograd.grad(torch_norm(x, residual), (x, weight), both),
            8 * x.nbytes,
        )
        row(
            "swiglu",
            f"{n_tokens} x {f}, forward + backward",
            lambda: torch.autograd.grad(swiglu(gate, up), (gate, up), grad),
            lambda: torch.autograd.grad(F.silu(gate) * up, (gate, up), grad),
            8 * up.nbytes,
        )

    for n_tokens, n_heads, n_kv, dim in ((8192, 14, 2, 64), (256, 28, 4, 128)) if on_gpu else ((512, 14, 2, 64),):
        q, k, v = (randn(n_tokens, heads, dim) for heads in (n_heads, n_kv, n_kv))
        cos, sin = randn(n_tokens, 1, dim), randn(n_tokens, 1, dim)
        k_cache, v_cache = (torch.zeros(n_tokens // 16, 16, n_kv, dim, device=device, dtype=dtype) for _ in range(2))
        slots = torch.randperm(n_tokens, device=device)

        def torch_rope():
            k_cache.view(-1, n_kv, dim)[slots] = apply_rope(k, cos, sin)
            v_cache.view(-1, n_kv, dim)[slots] = v
            return apply_rope(q, cos, sin)

        row(
            "rope_kv",
            f"{n_tokens} tokens, {n_heads} / {n_kv} heads of {dim}; apply_rope, indexed writes",
            lambda: rope_kv(q, k, v, cos, sin, k_cache, v_cache, slots),
            torch_rope,
            2 * (q.nbytes + 2 * k.nbytes + cos.nbytes),
        )


if __name__ == "__main__":
    main(tyro.cli(Args))
