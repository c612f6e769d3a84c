"""kernels/linear_logprob.py against its definition: the torch code of a CPU, the Triton code on a GPU or interpreted.

Triton decides at import whether it interprets, so without a GPU its tests run in a process of their own.
"""

import os
import subprocess
import sys

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from kernels import linear_logprob as fused

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
on_triton = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="no GPU; interpreted in its own process")

if INTERPRETED:
    import interpreter_bf16  # noqa: F401


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="this is that process, or there is a GPU")
def test_under_the_interpreter():
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        "-k",
        "test_triton",
        __file__,
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-5000:] + run.stderr[-2000:]


def case(n_tokens, n_words, width, dtype):
    """Logits of a spread of about 4, first and last word among the targets."""
    generator = torch.Generator().manual_seed(n_tokens)
    hidden = torch.randn(n_tokens, width, generator=generator).to(dtype).to(DEVICE)
    weight = (torch.randn(n_words, width, generator=generator) * 4 / width**0.5).to(dtype).to(DEVICE)
    targets = torch.randint(0, n_words, (n_tokens,), generator=generator).to(DEVICE)
    targets[0], targets[-1] = n_words - 1, 0
    return hidden, weight, targets, torch.randn(n_tokens, generator=generator).to(DEVICE)


def results(function, hidden, weight, targets, upstream, temperature):
    """-> log-probs, entropy, d hidden, d weight, all as fp64."""
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    logprobs, entropy = function(hidden, weight, targets, temperature)
    (logprobs * upstream).sum().backward()
    return [x.double() for x in (logprobs.detach(), entropy, hidden.grad, weight.grad)]


def check(function, n_tokens, n_words, width, dtype, temperature):
    """Against the definition in fp64 on the same (rounded) numbers.

    Log-probs and entropy are differences of sums below 20, so 5e-5 is some 25 fp32 roundings; a word too many or too
    few in the sum shows at 1 / n_words > 1e-3 in at least one row. Gradients in bf16 are rounded to 8 bits where
    d loss / d logits is stored and where the result is: 2 % of the largest; a tile left out is most of it.
    """
    hidden, weight, targets, upstream = case(n_tokens, n_words, width, dtype)
    found = results(function, hidden, weight, targets, upstream, temperature)
    exact = results(fused.reference, hidden.double(), weight.double(), targets, upstream, temperature)
    tight = 1e-12 if dtype == torch.float64 else 5e-5
    for name, ours, theirs in zip(("logprobs", "entropy", "hidden", "weight"), found, exact):
        bound = tight if name in ("logprobs", "entropy") or dtype != torch.bfloat16 else 0.02 * theirs.abs().max()
        assert (ours - theirs).abs().max() < bound, (name, (ours - theirs).abs().max())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile", [(512, 1024), (16, 64), (50, 301), (7, 300)])  # one, even, odd, a last of one
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_torch(monkeypatch, dtype, tile, temperature):
    monkeypatch.setattr(fused, "TILE_TOKENS", tile[0])
    monkeypatch.setattr(fused, "TILE_WORDS", tile[1])
    torch.set_num_threads(1)  # many small products
    function = lambda *a: fused._LinearLogprob.apply(*a, fused._Torch)  # noqa: E731
    check(function, 50, 301, 16, dtype, temperature)


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens, n_words, width, temperature", [(5, 301, 24, 1.0), (131, 530, 70, 0.7)])
def test_triton(monkeypatch, dtype, n_tokens, n_words, width, temperature):
    function = lambda *a: fused._LinearLogprob.apply(*a, fused._Triton)  # noqa: E731
    check(function, n_tokens, n_words, width, dtype, temperature)
    # several splits of several blocks in the forward pass, several slices in the backward pass, a last one of 18 words
    monkeypatch.setattr(fused, "MIN_PROGRAMS", 4)
    monkeypatch.setattr(fused, "SLICE_BYTES", n_tokens * 256 * dtype.itemsize)
    check(function, n_tokens, n_words, width, dtype, temperature)


@on_triton
def test_triton_with_rows_apart():
    """Rows of a wider tensor: strides are not the width."""
    hidden, weight, targets, upstream = case(9, 140, 32, torch.float32)
    wide_hidden, wide_weight = torch.full((9, 50), 9.0), torch.full((140, 41), 9.0)
    wide_hidden[:, :32], wide_weight[:, :32] = hidden.cpu(), weight.cpu()
    apart = wide_hidden.to(DEVICE)[:, :32], wide_weight.to(DEVICE)[:, :32]
    ours = fused._Triton.forward(*apart, targets, 1.0)
    theirs = fused._Triton.forward(hidden, weight, targets, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_without_a_gradient_for_the_head():
    hidden, weight, targets, upstream = case(6, 40, 8, torch.float32)
    hidden.requires_grad_()
    logprobs, entropy = fused.linear_logprob(hidden, weight, targets)
    assert not entropy.requires_grad
    (logprobs * upstream).sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 1000, 5003, 8192, 10**7])
def test_slices_are_whole_blocks(dtype, n_tokens):
    """5,003 tokens left room for 26,827 words: rows that start at odd addresses."""
    pytest.importorskip("triton")
    words = fused._Triton.slice_words(n_tokens, dtype)
    assert words % 128 == 0 and words >= 128
    assert words == 128 or words * n_tokens * dtype.itemsize <= fused.SLICE_BYTES
    assert (words + 128) * n_tokens * dtype.itemsize > fused.SLICE_BYTES


def test_no_logits_are_held(monkeypatch):
    """The largest tensor that either pass makes is a tile, on a GPU a slice of the vocabulary, not [T, V]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(fused, "SLICE_BYTES", 4 * 600 * 256)
    hidden, weight, targets, upstream = case(600, 5000, 8, torch.float32)
    with Largest():
        logprobs, _ = fused.linear_logprob(hidden.requires_grad_(), weight.requires_grad_(), targets)
        (logprobs * upstream).sum().backward()
    # [T, V] would be 12 MB
    assert largest == (fused.SLICE_BYTES if DEVICE == "cuda" else 4 * fused.TILE_TOKENS * fused.TILE_WORDS)
