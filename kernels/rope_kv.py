"""Rotary embedding of new queries and keys, and writing keys and values to the paged cache, in one pass.

    q = rope_kv(q, k, v, cos, sin, k_cache, v_cache, slots)

In bf16 the Triton kernel rounds products and sums exactly where `apply_rope` does. Training uses `apply_rope`, so the
engine caches the values that a training pass computes.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None


def rope_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """Returns rotated q as a new contiguous tensor [T, Hq, D], and writes rotated k, and v, to the caches.

    q [T, Hq, D], k and v [T, Hkv, D] (rows may be strided, such as slices of one projection), cos and sin [T, 1, D],
    k_cache and v_cache [blocks, block_size, Hkv, D], contiguous, all of one dtype; slots int64 [T]: block * block_size
    + offset, each at most once. (The padding rows of a CUDA graph all write slot 0, which only they read.) Not
    differentiable.
    """
    n_tokens, n_heads, dim = q.shape
    n_kv = k.shape[1]
    assert dim % 2 == 0 and k.shape == v.shape == (n_tokens, n_kv, dim), (q.shape, k.shape, v.shape)
    assert cos.shape == sin.shape == (n_tokens, 1, dim), (cos.shape, sin.shape, q.shape)
    assert k_cache.shape == v_cache.shape and k_cache.shape[2:] == (n_kv, dim), (k_cache.shape, v_cache.shape)
    assert len({x.dtype for x in (q, k, v, cos, sin, k_cache, v_cache)}) == 1, "all tensors but slots have one dtype"
    assert slots.dtype == torch.int64 and slots.shape == (n_tokens,), (slots.dtype, slots.shape)
    assert all(x.is_contiguous() for x in (cos, sin, k_cache, v_cache, slots)), "cos, sin, caches, slots: contiguous"
    assert all(x.stride(2) == 1 and x.stride(1) == dim for x in (q, k, v)), (q.stride(), k.stride(), v.stride())
    if q.is_cuda and triton is not None:
        return triton_rope_kv(q, k, v, cos, sin, k_cache, v_cache, slots)
    return reference(q, k, v, cos, sin, k_cache, v_cache, slots)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [T, H, D] by cos, sin [T, 1, D] in the half-split layout of Hugging Face. Differentiable."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def reference(q, k, v, cos, sin, k_cache, v_cache, slots):
    """In torch, as run on a CPU."""
    k = apply_rope(k, cos, sin)
    for cache, new in ((k_cache, k), (v_cache, v)):
        cache.view(-1, *cache.shape[2:]).index_copy_(0, slots, new)
    return apply_rope(q, cos, sin)


if triton is not None:

    @triton.jit
    def _rotate_heads(x_ptr, out_ptr, offset, out_offset, mask, c1, c2, s1, s2, HALF: tl.constexpr):
        """Rotates the halves [heads, D / 2] at x_ptr + offset into out_ptr + out_offset. Products are rounded to the
        dtype of x."""
        dtype = x_ptr.dtype.element_ty
        first = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(x_ptr + offset + HALF, mask=mask, other=0.0).to(tl.float32)
        new_first = (first * c1).to(dtype).to(tl.float32) - (second * s1).to(dtype).to(tl.float32)
        new_second = (second * c2).to(dtype).to(tl.float32) + (first * s2).to(dtype).to(tl.float32)
        tl.store(out_ptr + out_offset, new_first.to(dtype), mask=mask)
        tl.store(out_ptr + out_offset + HALF, new_second.to(dtype), mask=mask)

    @triton.jit
    def _rope_kv_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        cos_ptr,
        sin_ptr,
        k_cache_ptr,
        v_cache_ptr,
        slots_ptr,
        q_out_ptr,
        q_stride,
        k_stride,
        v_stride,
        HQ: tl.constexpr,
        HKV: tl.constexpr,
        HALF: tl.constexpr,
        TILE_Q: tl.constexpr,
        TILE_KV: tl.constexpr,
        TILE_D: tl.constexpr,
    ):
        """One program per token."""
        token = tl.program_id(0).to(tl.int64)
        D: tl.constexpr = 2 * HALF
        d = tl.arange(0, TILE_D)
        c1 = tl.load(cos_ptr + token * D + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        c2 = tl.load(cos_ptr + token * D + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        s1 = tl.load(sin_ptr + token * D + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        s2 = tl.load(sin_ptr + token * D + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        h = tl.arange(0, TILE_Q)
        offset = h[:, None] * D + d[None, :]
        mask = (h < HQ)[:, None] & (d < HALF)[None, :]
        _rotate_heads(
            q_ptr, q_out_ptr, token * q_stride + offset, token * (HQ * D) + offset, mask, c1, c2, s1, s2, HALF
        )
        slot = tl.load(slots_ptr + token)
        h = tl.arange(0, TILE_KV)
        offset = h[:, None] * D + d[None, :]
        mask = (h < HKV)[:, None] & (d < HALF)[None, :]
        cache_offset = slot * (HKV * D) + offset
        _rotate_heads(k_ptr, k_cache_ptr, token * k_stride + offset, cache_offset, mask, c1, c2, s1, s2, HALF)
        tl.store(
            v_cache_ptr + cache_offset, tl.load(v_ptr + token * v_stride + offset, mask=mask, other=0.0), mask=mask
        )
        tl.store(
            v_cache_ptr + cache_offset + HALF,
            tl.load(v_ptr + token * v_stride + offset + HALF, mask=mask, other=0.0),
            mask=mask,
        )


def triton_rope_kv(q, k, v, cos, sin, k_cache, v_cache, slots):
    n_tokens, n_heads, dim = q.shape
    n_kv = k.shape[1]
    q_out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if n_tokens:
        _rope_kv_kernel[n_tokens,](
            q,
            k,
            v,
            cos,
            sin,
            k_cache,
            v_cache,
            slots,
            q_out,
            q.stride(0),
            k.stride(0),
            v.stride(0),
            HQ=n_heads,
            HKV=n_kv,
            HALF=dim // 2,
            TILE_Q=triton.next_power_of_2(n_heads),
            TILE_KV=triton.next_power_of_2(n_kv),
            TILE_D=triton.next_power_of_2(dim // 2),
            num_warps=4,
        )
    return q_out
