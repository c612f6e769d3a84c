"""Each kernel against its definition: the torch code that a CPU runs, and the Triton code on a GPU or interpreted.

Triton decides at import whether it interprets, and the other tests may have imported it before. Where there is no GPU,
the tests of Triton code (`test_triton_*`) are therefore skipped here, and run in a process of their own by
`test_kernels_under_the_interpreter`.
"""

import importlib.util
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kernels import dense_attention as dense
from kernels import paged_attention as paged
from kernels import rmsnorm, rope_kv, sampling, swiglu
from kernels.rope_kv import apply_rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="interpreted in a process of its own")
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


if INTERPRETED:
    import interpreter_bf16  # noqa: F401


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-k", "test_triton", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]


def randn(*shape, seed=0, dtype=torch.float32, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype).to(DEVICE)


# -- paged attention ---------------------------------------------------------------------------------------------------


def paged_case(lengths, group, dim, dtype, n_kv=2, block_size=16, max_blocks=9):
    """A cache in which every slot that no row may read is NaN; the blocks in random order."""
    n_blocks = len(lengths) * max_blocks
    order = torch.randperm(n_blocks, generator=torch.Generator().manual_seed(1)).view(len(lengths), max_blocks)
    caches = [torch.full((n_blocks, block_size, n_kv, dim), math.nan) for _ in range(2)]
    rows = []
    for r, length in enumerate(lengths):
        rows.append([randn(length, n_kv, dim, seed=10 * r + i).cpu().to(dtype).float() for i in range(2)])
        for cache, row in zip(caches, rows[-1]):
            slots = order[r, torch.arange(length) // block_size] * block_size + torch.arange(length) % block_size
            cache.view(-1, n_kv, dim)[slots] = row
    q = randn(len(lengths), group * n_kv, dim, seed=99, dtype=dtype)
    want = []
    for r, (keys, values) in enumerate(rows):
        heads = q[r].cpu().double().view(n_kv, group, dim)
        weights = torch.softmax(torch.einsum("hgd,lhd->hgl", heads, keys.double()) / dim**0.5, -1)
        want.append(torch.einsum("hgl,lhd->hgd", weights, values.double()).reshape(-1, dim))
    tensors = (*(c.to(dtype) for c in caches), order.int(), torch.tensor(lengths, dtype=torch.int32))
    return (q, *(x.to(DEVICE) for x in tensors)), torch.stack(want).to(DEVICE)


def check_attention(attention, arguments, want):
    out = attention(*arguments)
    # fp32: a few roundings of values below 4; bf16: weights and result are rounded to 8 bits, the values' mean is below
    # 1. A token too many would be NaN; one too few is an error of the order of 1 / length, 0.007 at the longest row.
    tolerance = 2e-6 if out.dtype == torch.float32 else 0.01
    assert out.shape == arguments[0].shape and out.dtype == arguments[0].dtype
    assert (out.double() - want).abs().max() < tolerance


LENGTHS = [1, 15, 16, 17, 0, 144, 33]


@dtypes
@pytest.mark.parametrize("group, dim", [(1, 64), (7, 32), (2, 128)])
def test_paged_attention(group, dim, dtype):
    arguments, want = paged_case(LENGTHS, group, dim, dtype)
    check_attention(paged.reference, arguments, want)
    equal, want = paged_case([48, 48], group, dim, dtype)
    check_attention(paged.paged_attention, equal, want)


@on_triton
@dtypes
@pytest.mark.parametrize("group, dim, split", [(1, 64, 256), (7, 32, 64), (2, 128, 64), (3, 80, 128)])
def test_triton_paged_attention(group, dim, split, dtype, monkeypatch):
    monkeypatch.setattr(paged, "SPLIT_TOKENS", split)
    arguments, want = paged_case(LENGTHS, group, dim, dtype)
    check_attention(paged.triton_paged_attention, arguments, want)
    # a row's bits do not depend on the rows beside it
    together = paged.triton_paged_attention(*arguments)
    q, k_cache, v_cache, block_table, lengths = arguments
    alone = paged.triton_paged_attention(q[5:6], k_cache, v_cache, block_table[5:6], lengths[5:6])
    assert torch.equal(alone[0], together[5])
    monkeypatch.setattr(paged, "PROGRAMS", 1)  # a program computes all splits of its row
    assert torch.equal(paged.triton_paged_attention(*arguments), together)


@on_triton
def test_triton_paged_attention_has_a_bounded_number_of_splits(monkeypatch):
    monkeypatch.setattr(paged, "SPLIT_TOKENS", 64)
    monkeypatch.setattr(paged, "MAX_SPLITS", 2)
    arguments, want = paged_case([300, 129, 5], 2, 64, torch.float32, max_blocks=20)
    check_attention(paged.triton_paged_attention, arguments, want)


def test_paged_attention_refuses_what_it_cannot_read():
    (q, k_cache, v_cache, block_table, lengths), _ = paged_case([3], 2, 32, torch.float32)
    for changed in (
        (q.bfloat16(), k_cache, v_cache, block_table, lengths),
        (q, k_cache, v_cache, block_table.long(), lengths),
        (q[:, :3], k_cache, v_cache, block_table, lengths),
        (q, k_cache.transpose(1, 2), v_cache.transpose(1, 2), block_table, lengths),
    ):
        with pytest.raises(AssertionError):
            paged.paged_attention(*changed)


# -- dense attention, of a CPU -----------------------------------------------------------------------------------------


GROUPS = pytest.mark.parametrize("group, dim", [(1, 64), (2, 32), (7, 64), (4, 16), (6, 128)])


def dense_case(lengths, group, dim, dtype, n_kv=2, n_tiles=6):
    """Rows with that many tiles of room, of which the first `lengths` tokens are theirs; what is behind is large."""
    q = torch.cat([randn(1, group * n_kv, dim, seed=n, dtype=dtype) for n in lengths])
    caches = []
    for i in (1, 2):
        rest = randn(n_kv, n_tiles * dense.TILE, dim, scale=100.0)
        rows = [torch.cat([randn(n_kv, n, dim, seed=10 * n + i), rest[:, n:]], 1) for n in lengths]
        caches.append(torch.stack(rows).to(dtype))
    return q, *caches, dense.length_mask(torch.tensor(lengths), max(lengths), n_kv, dtype)


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
@dtypes
@GROUPS
def test_dense_attention(group, dim, dtype):
    lengths = [1, 15, 16, 17, 200, 33, 391]
    q, keys, values, mask = dense_case(lengths, group, dim, dtype)
    want = []
    for row, n, k, v in zip(q.double(), lengths, keys.double(), values.double()):
        scores = torch.einsum("hgd,hld->hgl", row.view(2, group, dim), k[:, :n]) / dim**0.5
        want.append(torch.einsum("hgl,hld->hgd", scores.softmax(-1), v[:, :n]).reshape(-1, dim))
    check_attention(dense.dense_attention, (q, keys, values, mask), torch.stack(want))


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)  # as in conftest.py


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
@GROUPS
@pytest.mark.parametrize("n_kv", [1, 2])
def test_dense_attention_has_the_same_bits_beside_other_rows(group, dim, n_kv, two_threads):
    for length in (5, 100, 126, 127, 333, 513):
        alone = dense.dense_attention(*dense_case([length], group, dim, torch.float32, n_kv))
        for others in ([3], [length + 1], [length + 100] * 7, [700, 600]):
            together = dense.dense_attention(*dense_case([*others, length], group, dim, torch.float32, n_kv))
            assert torch.equal(alone[0], together[-1]), (length, others)


@pytest.mark.skipif(DEVICE != "cpu", reason="of a CPU")
def test_dense_attention_has_the_same_bits_beside_more_tiles_than_a_vector_has_lanes():
    alone = dense.dense_attention(*dense_case([300], 2, 32, torch.float32))
    together = dense.dense_attention(*dense_case([2100, 300], 2, 32, torch.float32, n_tiles=17))
    assert torch.equal(alone[0], together[1])


# -- RoPE and the write to the cache -----------------------------------------------------------------------------------


def rope_case(rope, n_tokens, heads, n_kv, dim, dtype):
    qkv = randn(n_tokens, (heads + 2 * n_kv) * dim, dtype=dtype)  # one projection: q, k and v are strided slices
    q, k, v = (x.view(n_tokens, -1, dim) for x in qkv.split([heads * dim, n_kv * dim, n_kv * dim], 1))
    angles = randn(n_tokens, 1, dim, seed=1, scale=3.0)  # the halves differ, unlike in a model: each has to be read
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    caches = [randn(40, 16, n_kv, dim, seed=2 + i, dtype=dtype) for i in range(2)]
    slots = torch.randperm(640, generator=torch.Generator().manual_seed(3))[:n_tokens].to(DEVICE)
    want_q, want_k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
    want = [c.clone() for c in caches]
    for cache, new in zip(want, (want_k, v)):
        cache.view(-1, n_kv, dim)[slots] = new
    before = qkv.clone()
    out = rope(q, k, v, cos, sin, *caches, slots)
    # bf16: the same bits. fp32 on a GPU: a product and a sum may be one rounding (FMA) instead of two.
    tolerance = 0 if dtype == torch.bfloat16 else 1e-6
    assert out.is_contiguous() and (out.float() - want_q.float()).abs().max() <= tolerance
    assert (caches[0].float() - want[0].float()).abs().max() <= tolerance
    assert torch.equal(caches[1], want[1]) and torch.equal(qkv, before)


ROPE_SHAPES = pytest.mark.parametrize(
    "n_tokens, heads, n_kv, dim", [(1, 14, 2, 64), (3, 4, 4, 32), (257, 6, 3, 24), (9, 7, 1, 128)]
)


@dtypes
@ROPE_SHAPES
def test_rope_kv(n_tokens, heads, n_kv, dim, dtype):
    rope_case(rope_kv.rope_kv, n_tokens, heads, n_kv, dim, dtype)


@on_triton
@dtypes
@ROPE_SHAPES
def test_triton_rope_kv(n_tokens, heads, n_kv, dim, dtype):
    rope_case(rope_kv.triton_rope_kv, n_tokens, heads, n_kv, dim, dtype)


# -- RMSNorm and SwiGLU ------------------------------------------------------------------------------------------------


def check_rounded_once(got, want, dtype):
    """want is fp64. Rounding once is at most half a unit in the last place: 2^-9 of a bf16; twice that is allowed."""
    assert got.dtype == dtype
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    # sums over d cancel: a small result has the absolute error of its terms, which are of order 1 here, in fp32
    assert ((got.double() - want).abs() <= bound * want.abs() + 4e-6).all()


def gradients(function, inputs, grads):
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return outputs, torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(grads, outputs)])


ROWS_AND_WIDTHS = pytest.mark.parametrize("n_rows, width", [(1, 896), (3, 576), (257, 64), (5, 7)])


@on_triton
@dtypes
@ROWS_AND_WIDTHS
def test_triton_rms_norm(n_rows, width, dtype):
    x, residual, g1, g2 = (randn(n_rows, width, seed=i, dtype=dtype) for i in range(4))
    weight = (1 + 0.3 * randn(width, seed=5)).to(dtype)

    def torch_norm(x, weight):
        return F.rms_norm(x, (width,), weight, 1e-5)

    def norm(x, weight):
        return rmsnorm._RMSNorm.apply(x, None, weight, 1e-5)[0]

    def add_norm(x, residual, weight):
        return rmsnorm._RMSNorm.apply(x, residual, weight, 1e-5)

    (out,), grads = gradients(norm, (x, weight), (g1,))
    (exact,), exact_grads = gradients(torch_norm, (x.double(), weight.double()), (g1,))
    check_rounded_once(out, exact, dtype)
    if dtype == torch.bfloat16:  # the rounding points of torch
        assert (out != torch_norm(x, weight)).float().mean() < 0.01
    check_rounded_once(grads[0], exact_grads[0], dtype)
    # dW sums a term of order 1 for each row in fp32, and is rounded once
    bound = (2.0**-8 if dtype == torch.bfloat16 else 2e-6) * exact_grads[1].abs() + 1e-6 * (4 + n_rows**0.5)
    assert ((grads[1].double() - exact_grads[1]).abs() <= bound).all()

    (out, total), grads = gradients(add_norm, (x, residual, weight), (g1, g2))
    assert torch.equal(total, x + residual)
    (exact,), exact_grads = gradients(torch_norm, (total.double(), weight.double()), (g1,))
    check_rounded_once(out, exact, dtype)
    for grad in grads[:2]:
        check_rounded_once(grad, exact_grads[0] + g2.double(), dtype)
    # only the sum is used, or only the norm
    _, grads = gradients(lambda *inputs: add_norm(*inputs)[0], (x, residual, weight), (g1,))
    check_rounded_once(grads[1], exact_grads[0], dtype)
    some = x.detach().requires_grad_()
    add_norm(some, residual, weight)[1].backward(g2)
    assert torch.equal(some.grad, g2)


@on_triton
def test_triton_norm_and_swiglu_of_strided_rows():
    wide = randn(3, 200)
    x, weight = wide[:, 50:150], 1 + 0.3 * randn(100, seed=1)
    out, _ = rmsnorm._RMSNorm.apply(x, None, weight, 1e-5)
    assert (out - F.rms_norm(x, (100,), weight, 1e-5)).abs().max() < 2e-6
    grad = gradients(lambda x: rmsnorm._RMSNorm.apply(x, None, weight, 1e-5)[0], (x,), (randn(3, 100, seed=2),))[1][0]
    want = gradients(lambda x: F.rms_norm(x, (100,), weight, 1e-5), (x,), (randn(3, 100, seed=2),))[1][0]
    assert (grad - want).abs().max() < 4e-6
    gate, up = wide.chunk(2, 1)
    assert (swiglu._SwiGLU.apply(gate, up) - F.silu(gate) * up).abs().max() < 2e-6


@dtypes
def test_norm_and_swiglu_on_a_cpu_are_torch(dtype):
    x, residual, weight = (randn(3, 20, seed=i, dtype=dtype).cpu() for i in range(3))
    assert torch.equal(rmsnorm.rms_norm(x, weight[0], 1e-6), F.rms_norm(x, (20,), weight[0], 1e-6))
    normed, total = rmsnorm.add_rms_norm(x, residual, weight[0], 1e-6)
    assert torch.equal(total, x + residual) and torch.equal(normed, F.rms_norm(x + residual, (20,), weight[0], 1e-6))
    assert torch.equal(swiglu.swiglu(x, residual), F.silu(x) * residual)


@on_triton
@dtypes
@pytest.mark.parametrize("n_rows, width", [(1, 4864), (3, 1536), (257, 48)])
def test_triton_swiglu(n_rows, width, dtype):
    gate, up, grad = (randn(n_rows, width, seed=i, dtype=dtype, scale=2.0) for i in range(3))
    (out,), grads = gradients(swiglu._SwiGLU.apply, (gate, up), (grad,))
    _, exact_grads = gradients(lambda g, u: F.silu(g) * u, (gate.double(), up.double()), (grad,))
    want = F.silu(gate) * up
    if dtype == torch.bfloat16:  # two roundings, in the same places
        assert (out != want).float().mean() < 0.01
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-6
    assert ((out - want).abs().float() <= bound * want.abs().float() + 1e-6).all()
    for got, exact in zip(grads, exact_grads):
        check_rounded_once(got, exact, dtype)


# -- sampling ----------------------------------------------------------------------------------------------------------


def by_definition(logits, temperature, top_p, seeds, positions):
    """The same with a sort, in fp64, row by row."""
    tokens, logprobs = [], []
    points = sampling.uniform(seeds, positions).tolist()
    for z, t, mass, u in zip(logits.double(), temperature.tolist(), top_p.tolist(), points):
        p = torch.softmax(z / (t or 1), -1)
        ranked = p.sort(descending=True).values
        threshold = ranked[min(int((ranked.cumsum(0) < mass).sum()), len(p) - 1)] if mass < 1 else 0
        cumulative = torch.where(p >= threshold, p, 0).cumsum(0)
        tokens.append(int(z.argmax()) if t == 0 else int((cumulative <= u * cumulative[-1]).sum()))
        logprobs.append(float(p[tokens[-1]].log()))
    return torch.tensor(tokens), torch.tensor(logprobs)


def sampling_case(n_rows, vocab_size, dtype=torch.float32):
    i = torch.arange(n_rows)
    logits = randn(n_rows, vocab_size, seed=vocab_size, scale=3.0, dtype=dtype)
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.5])[i % 4]
    top_p = torch.tensor([0.9, 1.0, 0.3, 1e-6, 0.99, 0.5, 0.99999])[i % 7]
    return logits, *(x.to(DEVICE) for x in (temperature, top_p, 1000 + 7 * i, i * i))


def check_sample(sample, case):
    tokens, logprobs = sample(*case)
    want_tokens, want_logprobs = by_definition(*(x.cpu() for x in case))
    assert tokens.dtype == torch.int64 and logprobs.dtype == torch.float32
    # a rounding of the cumulative sum moves a token with a chance of 1e-6 or so: none of these seeds does
    assert tokens.tolist() == want_tokens.tolist()
    assert (logprobs.cpu() - want_logprobs).abs().max() < 1e-5


@dtypes
@pytest.mark.parametrize("vocab_size", [2, 511, 1400, 4096, 20011])
def test_sample(vocab_size, dtype):
    check_sample(sampling.sample, sampling_case(29, vocab_size, dtype))


@on_triton
@dtypes
@pytest.mark.parametrize("n_rows, vocab_size, chunk", [(8, 600, 256), (1, 2500, 1024), (7, 256, 256), (2, 3, 64)])
def test_triton_sample(n_rows, vocab_size, chunk, dtype, monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", chunk)
    check_sample(sampling.triton_sample, sampling_case(n_rows, vocab_size, dtype))


@on_triton
@pytest.mark.parametrize("temperature, top_p", [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9)])
def test_triton_sample_of_what_is_no_number(temperature, top_p, monkeypatch):
    """The log-prob is NaN, by which the engine knows; other rows are as they were."""
    monkeypatch.setattr(sampling, "CHUNK", 64)
    for value in (math.nan, math.inf):
        for spoilt in (slice(7, 8), slice(70, 71), slice(64, 128), slice(0, 200)):
            logits = torch.zeros(2, 200, device=DEVICE)
            logits[0, spoilt] = value
            settings = [torch.full((2,), x, device=DEVICE) for x in (temperature, top_p)]
            seeds = torch.arange(2, device=DEVICE)
            tokens, logprobs = sampling.triton_sample(logits, *settings, seeds, seeds)
            assert logprobs.isnan().tolist() == [True, False] and tokens.min() >= 0 and tokens.max() < 200


@on_triton
def test_triton_sample_ties_and_masked_logits(monkeypatch):
    monkeypatch.setattr(sampling, "CHUNK", 64)
    logits = torch.full((12, 140), -math.inf, device=DEVICE, dtype=torch.bfloat16)  # a whole chunk holds nothing
    logits[:, [70, 71, 139]] = torch.tensor([-2.0, -2.0, -2.5], device=DEVICE, dtype=torch.bfloat16)
    seeds = torch.arange(12, device=DEVICE)
    settings = [torch.full((12,), x, device=DEVICE) for x in (1.0, 0.2)]
    tokens, logprobs = sampling.triton_sample(logits, *settings, seeds, torch.zeros_like(seeds))
    assert set(tokens.tolist()) == {70, 71}  # both of the equals, though one alone holds 0.2
    assert (logprobs + math.log(2 + math.exp(-0.5))).abs().max() < 1e-6
    settings[1].fill_(1.0)
    tokens, _ = sampling.triton_sample(logits, *settings, seeds, torch.zeros_like(seeds))
    assert set(tokens.tolist()) == {70, 71, 139}


@pytest.mark.parametrize("vocab_size", [1400, 30000])
@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 8.0])
def test_the_nucleus_is_exact(vocab_size, scale):
    top_p = torch.tensor([1e-7, 0.1, 0.5, 0.9, 0.999, 0.99999, 1.0])
    probs = torch.softmax(randn(7, vocab_size, seed=3, scale=scale).cpu(), -1)
    nucleus = sampling.nucleus_of(probs, top_p)
    for p, kept, wanted in zip(probs.double(), nucleus.double(), top_p.double()):
        assert torch.equal(kept, torch.where(kept > 0, p, 0))
        t = kept[kept > 0].min()
        assert torch.equal(kept > 0, p >= t)
        if wanted < 1:
            assert kept.sum() >= wanted - 1e-12 and p[p > t].sum() < wanted + 1e-12


def draw(probs, n, temperature=1.0, top_p=1.0):
    """n tokens of one distribution (seeds 0..n-1), and their log-probs."""
    logits = torch.tensor(probs).log().repeat(n, 1)
    settings = torch.full((n,), temperature), torch.full((n,), top_p)
    return sampling.sample(logits, *settings, torch.arange(n), torch.zeros(n, dtype=torch.int64))


def test_nucleus_by_hand():
    probs = [0.15, 0.5, 0.05, 0.3]
    for top_p, kept in (
        (0.49, {1}),
        (0.51, {1, 3}),
        (0.79, {1, 3}),
        (0.81, {0, 1, 3}),
        (0.94, {0, 1, 3}),
        (0.96, {0, 1, 2, 3}),
    ):
        tokens, logprobs = draw(probs, 400, top_p=top_p)
        assert set(tokens.tolist()) == kept, top_p
        # of the full softmax, not renormalised over the nucleus
        assert (logprobs - torch.tensor(probs).log()[tokens]).abs().max() < 1e-6


def test_ties_stay_together_and_a_tiny_top_p_is_greedy():
    tokens, _ = draw([0.05, 0.3, 0.3, 0.05, 0.3], 200, top_p=0.1)
    assert set(tokens.tolist()) == {1, 2, 4}
    tokens, _ = draw([0.1, 0.45, 0.45 + 1e-4], 200, top_p=1e-9)
    assert set(tokens.tolist()) == {2}


def test_temperature_zero():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [0.0, 1.0, 2.0, 5.0]])
    for temperature in (torch.zeros(2), torch.tensor([0.0, 1.0])):
        tokens, logprobs = sampling.sample(logits, temperature, torch.ones(2), torch.arange(2), torch.arange(2))
        assert tokens[0] == 1  # the first of the equals
        assert logprobs[0] == pytest.approx(3 - math.log(1 + 2 * math.exp(3) + math.exp(1)), abs=1e-6)


def test_distribution():
    probs, n = [0.4, 0.02, 0.25, 0.08, 0.25], 20000
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (1.0, 0.9)):
        expected = torch.tensor(probs, dtype=torch.float64) ** (1 / temperature)
        if top_p == 0.9:
            expected[[1, 3]] = 0  # 0.4 + 0.25 + 0.25 hold the mass
        expected = n * expected / expected.sum()
        counts = torch.bincount(draw(probs, n, temperature, top_p)[0], minlength=5)
        assert (counts[expected == 0] == 0).all()
        chi_square = ((counts - expected) ** 2 / expected)[expected > 0].sum()
        assert chi_square < 23.5  # exceeded with a chance of 1e-4 at four degrees of freedom


def test_uniform_is_splitmix64():
    # the published generator's first outputs for the states 0 and 1234567
    seeds, positions = torch.tensor([0, *[1234567] * 4]), torch.tensor([0, 0, 1, 2, 3])
    outputs = (0xE220A8397B1DCDAF, 6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431)
    assert sampling.uniform(seeds, positions).tolist() == [(x >> 11) * 2.0**-53 for x in outputs]


@pytest.mark.parametrize("vocab_size", [1400, 5000])
def test_a_row_does_not_depend_on_the_batch(vocab_size, monkeypatch):
    case = sampling_case(23, vocab_size)
    tokens, logprobs = sampling.sample(*case)
    monkeypatch.setattr(sampling, "CPU_CHUNK", 3 * vocab_size)
    for rows in (slice(0, 23), slice(5, 6), slice(11, 18), slice(22, 23)):
        alone = sampling.sample(*(x[rows] for x in case))
        assert torch.equal(alone[0], tokens[rows])
        # a probability has the same bits, but its log may come from a vector's body or from its tail: one rounding each
        torch.testing.assert_close(alone[1], logprobs[rows], atol=0, rtol=2.4e-7)


def test_logits_that_are_no_numbers():
    for vocab_size in (10, 5000):
        logits = torch.zeros(3, vocab_size)
        logits[1, 7] = math.nan
        with pytest.raises(FloatingPointError, match="NaN"):
            sampling.sample(logits, torch.ones(3), torch.full((3,), 0.9), torch.arange(3), torch.arange(3))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_kernels_inside_a_cuda_graph():
    arguments, _ = paged_case(LENGTHS, 7, 64, torch.bfloat16)
    case = sampling_case(7, 20011)

    def step():
        return paged.paged_attention(*arguments), *sampling.sample(*case)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    arguments[-1].copy_(torch.tensor([0, 3, 100, 0, 1, 16, 2], dtype=torch.int32))
    case[0].copy_(case[0].flip(0))
    case[2].fill_(0.8)
    graph.replay()
    for replayed, eager in zip(captured, step()):
        torch.testing.assert_close(replayed, eager, atol=0, rtol=0, equal_nan=True)
