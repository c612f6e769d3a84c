"""Each kernel beside its torch equivalent, in one table: time, ratio, and the limit measured in the same run.

The limit is the time to move the bytes that the operation must read and write once, at the rate at which this run
copied a large tensor. On a GPU the sizes are those of a 0.5B and a 7B model. On a CPU they are smaller, the functions
run their torch paths, and paged attention is left out, since the engine reads a dense cache there. Sampling differs
from the peer; the others are the same code, and only their fraction of the limit is informative.

    python bench/kernels.py
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# instead of this file's folder, where `kernels` would be this file
sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from bench.common import device_name, seconds_of
from kernels.paged_attention import paged_attention
from kernels.rmsnorm import add_rms_norm
from kernels.rope_kv import apply_rope, rope_kv
from kernels.sampling import sample
from kernels.swiglu import swiglu
from runtime import flags

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32


@dataclass
class Args:
    """There are no flags but --help."""


def seconds(function: Callable[[], object]) -> float:
    if not ON_GPU:
        return seconds_of({"": function}, repeats=5)[""]
    import triton

    # measured by events, with an empty L2 cache before each run
    return triton.testing.do_bench(function, return_mode="median") / 1e3


def copy_rate() -> float:
    """Bytes/s that are read or written by copying a large tensor."""
    large = torch.ones(2**28 if ON_GPU else 2**26, dtype=torch.uint8, device=DEVICE)
    other = torch.empty_like(large)
    return 2 * large.nbytes / seconds(lambda: other.copy_(large))


def row(
    kernel: str, workload: str, ours: Callable[[], object], peer: Callable[[], object], nbytes: int, rate: float
) -> None:
    """nbytes: what the operation must read and write; rate: bytes/s."""
    ours_ms = seconds(ours) * 1e3
    peer_ms = seconds(peer) * 1e3
    limit_ms = nbytes / rate * 1e3
    print(
        f"{kernel:16s} {workload:58s} {ours_ms:9.3f} {peer_ms:9.3f} {peer_ms / ours_ms:6.2f} {limit_ms:9.3f} "
        f"{limit_ms / ours_ms:8.1%}",
        flush=True,
    )


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def bench_attention(n_rows: int, length: int, n_kv: int, group: int, dim: int, rate: float) -> None:
    """Peer: torch's attention on a dense cache of equal lengths, without a block table."""
    n_blocks = n_rows * length // 16
    k_cache = randn(n_blocks, 16, n_kv, dim)
    v_cache = randn(n_blocks, 16, n_kv, dim)
    block_table = torch.randperm(n_blocks, device=DEVICE).int().view(n_rows, -1)
    lengths = torch.full((n_rows,), length, dtype=torch.int32, device=DEVICE)
    q = randn(n_rows, n_kv * group, dim)
    keys = randn(n_rows, n_kv, length, dim)
    values = randn(n_rows, n_kv, length, dim)
    row(
        "paged_attention",
        f"{n_rows} rows x {length} tokens, {n_kv * group} / {n_kv} heads of {dim}; dense SDPA",
        lambda: paged_attention(q, k_cache, v_cache, block_table, lengths),
        lambda: F.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True),
        2 * keys.nbytes + 2 * q.nbytes,
        rate,
    )


def bench_sampling(n_rows: int, vocab_size: int, rate: float) -> None:
    """Peers: sorting the vocabulary, and nothing else; sampling without top-p."""
    logits = torch.randn(n_rows, vocab_size, device=DEVICE) * 4  # as peaked as those of a trained model
    temperature = torch.full((n_rows,), 1.0, device=DEVICE)
    top_p = torch.full((n_rows,), 0.9, device=DEVICE)
    seeds = torch.arange(n_rows, device=DEVICE)
    peers: dict[str, Callable[[], object]] = {
        "torch.sort": lambda: logits.sort(-1, descending=True),
        "top-p 1": lambda: sample(logits, temperature, torch.ones_like(top_p), seeds, seeds),
    }
    for name, peer in peers.items():
        row(
            "sample",
            f"{n_rows} x {vocab_size} fp32, top-p 0.9; {name}",
            lambda: sample(logits, temperature, top_p, seeds, seeds),
            peer,
            logits.nbytes,
            rate,
        )


def bench_layer(n_tokens: int, d: int, f: int, rate: float) -> None:
    """Forward and backward of what a layer computes besides products and attention."""
    x = randn(n_tokens, d).requires_grad_()
    residual = randn(n_tokens, d)
    weight = randn(d).requires_grad_()
    ones = torch.ones_like(x)

    def torch_norm() -> tuple[Tensor, Tensor]:
        total = x + residual
        return F.rms_norm(total, (d,), weight, 1e-6), total

    row(
        "add_rms_norm",
        f"{n_tokens} x {d}; add, F.rms_norm",
        lambda: torch.autograd.grad(add_rms_norm(x, residual, weight, 1e-6), (x, weight), (ones, ones)),
        lambda: torch.autograd.grad(torch_norm(), (x, weight), (ones, ones)),
        8 * x.nbytes,  # backward: reads dy, d(sum) and the sum, writes dx
        rate,
    )
    gate = randn(n_tokens, f).requires_grad_()
    up = randn(n_tokens, f).requires_grad_()
    ones_like_up = torch.ones_like(up)
    row(
        "swiglu",
        f"{n_tokens} x {f}; F.silu, product",
        lambda: torch.autograd.grad(swiglu(gate, up), (gate, up), ones_like_up),
        lambda: torch.autograd.grad(F.silu(gate) * up, (gate, up), ones_like_up),
        8 * up.nbytes,  # backward: reads dy, gate and up, writes two
        rate,
    )


def bench_rope(n_tokens: int, n_heads: int, n_kv: int, dim: int, rate: float) -> None:
    q = randn(n_tokens, n_heads, dim)
    k = randn(n_tokens, n_kv, dim)
    v = randn(n_tokens, n_kv, dim)
    cos = randn(n_tokens, 1, dim)
    sin = randn(n_tokens, 1, dim)
    k_cache = randn(n_tokens // 16, 16, n_kv, dim)
    v_cache = randn(n_tokens // 16, 16, n_kv, dim)
    slots = torch.randperm(n_tokens, device=DEVICE)

    def torch_rope() -> Tensor:
        k_cache.view(-1, n_kv, dim)[slots] = apply_rope(k, cos, sin)
        v_cache.view(-1, n_kv, dim)[slots] = v
        return apply_rope(q, cos, sin)

    row(
        "rope_kv",
        f"{n_tokens} tokens, {n_heads} / {n_kv} heads of {dim}; apply_rope, indexed writes",
        lambda: rope_kv(q, k, v, cos, sin, k_cache, v_cache, slots),
        torch_rope,
        2 * (q.nbytes + 2 * k.nbytes + cos.nbytes),
        rate,
    )


def main() -> None:
    rate = copy_rate()
    print(f"{device_name()}; {DTYPE}; copy rate {rate / 1e9:.1f} GB/s")
    print(
        f"{'kernel':16s} {'workload':58s} {'ours ms':>9s} {'torch ms':>9s} {'ratio':>6s} {'limit ms':>9s} "
        f"{'of limit':>8s}"
    )
    if ON_GPU:
        for shape in ((256, 1024, 2, 7, 64), (256, 1024, 4, 7, 128), (1, 4096, 4, 7, 128)):
            bench_attention(*shape, rate)
        bench_sampling(256, 151936, rate)
        bench_layer(8192, 896, 4864, rate)
        bench_layer(256, 3584, 18944, rate)
        bench_rope(8192, 14, 2, 64, rate)
    else:
        for vocab_size in (49152, 151936):
            bench_sampling(32, vocab_size, rate)
        bench_layer(512, 896, 4864, rate)
        bench_rope(512, 14, 2, 64, rate)


if __name__ == "__main__":
    flags.parse(Args, __doc__)
    main()
