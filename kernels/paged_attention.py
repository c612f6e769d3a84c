"""Attention of one new token per sequence to its keys and values in a paged cache (decoding).

    out = paged_attention(q, k_cache, v_cache, block_table, lengths)

The Triton kernel splits a row's tokens over programs (split-K), because at batch 1 one program per head would leave
most of a GPU idle. In a large batch a program computes several splits. The size of a split depends on the width of the
block table only, and the order of its sums is fixed, so a row's result does not depend on the other rows of the batch.
Splits are merged by their log-sum-exp. Query heads that share a key head are rows of one tile, so that each key is read
once for all of them.

On a CPU decoding uses dense_attention.py; the torch code here is the definition of what the kernel computes.
"""

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs the torch code only
    triton = None

SPLIT_TOKENS = 256  # tokens per program, or more where a row would have over MAX_SPLITS splits
MAX_SPLITS = 32
PROGRAMS = 4096  # at most, unless there are more rows times key heads: some six waves on an H100
# Bytes of keys per iteration, by element size. With as many of values and two stages in flight this fits any shared
# memory. In fp32, without tensor cores, twice as much spills registers at D = 128 on sm_90.
TILE_BYTES = {2: 16384, 4: 8192}


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Row r of q attends to the first lengths[r] tokens of its blocks. Not differentiable.

    q [R, Hq, D]; k_cache, v_cache [blocks, block_size, Hkv, D], contiguous, of q's dtype (bf16, fp16, fp32), Hq a
    multiple of Hkv; block_table int32 [R, max_blocks], any valid block past a row's end; lengths int32 [R], at most
    max_blocks * block_size -> [R, Hq, D]. A row of length 0 gives zeros. Sums are fp32.
    """
    n_heads, dim = q.shape[1:]
    assert k_cache.is_contiguous() and v_cache.is_contiguous(), (k_cache.stride(), v_cache.stride())
    assert k_cache.shape == v_cache.shape, (k_cache.shape, v_cache.shape)
    assert q.dtype == k_cache.dtype == v_cache.dtype, (q.dtype, k_cache.dtype, v_cache.dtype)
    assert k_cache.shape[3] == dim and n_heads % k_cache.shape[2] == 0, (q.shape, k_cache.shape)
    assert q.stride(2) == 1 and q.stride(1) == dim, q.stride()
    assert block_table.dtype == lengths.dtype == torch.int32, (block_table.dtype, lengths.dtype)
    assert block_table.stride(1) == 1 and lengths.is_contiguous(), (block_table.stride(), lengths.stride())
    if q.is_cuda and triton is not None:
        return triton_paged_attention(q, k_cache, v_cache, block_table, lengths)
    return reference(q, k_cache, v_cache, block_table, lengths)


def reference(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Reference in torch. The cache past a row's end may hold NaN; it is replaced by 0, since 0 * NaN is NaN."""
    n_kv, dim = k_cache.shape[2:]
    keys, values = (cache[block_table.long()].flatten(1, 2).float() for cache in (k_cache, v_cache))  # [R, L, Hkv, D]
    valid = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]  # [R, L]
    keys, values = (x.masked_fill(~valid[:, :, None, None], 0).transpose(1, 2) for x in (keys, values))
    grouped = q.unflatten(1, (n_kv, -1)).float()  # [R, Hkv, g, D]
    scores = (grouped @ keys.mT * dim**-0.5).masked_fill(~valid[:, None, None], float("-inf"))
    out = (scores.softmax(-1) @ values).to(q.dtype).view(q.shape)
    return out.masked_fill((lengths == 0)[:, None, None], 0)


if triton is not None:

    @triton.jit
    def _split_kernel(
        q_ptr,
        k_cache_ptr,
        v_cache_ptr,
        block_table_ptr,
        lengths_ptr,
        partial_ptr,
        lse_ptr,
        q_stride,
        table_stride,
        scale,
        n_splits,
        split_tokens,
        BLOCK_SIZE: tl.constexpr,
        HKV: tl.constexpr,
        G: tl.constexpr,
        D: tl.constexpr,
        TILE_G: tl.constexpr,
        TILE_D: tl.constexpr,
        TILE_N: tl.constexpr,
    ):
        """Program (row, key head, n): the splits n, n + programs, and so on. Stores of each, for all query heads of the
        key head, the normalized output and the base-2 log-sum-exp."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        length = tl.load(lengths_ptr + row)
        g = tl.arange(0, TILE_G)
        d = tl.arange(0, TILE_D)
        heads = head * G + g
        mask = (g < G)[:, None] & (d < D)[None, :]
        query = tl.load(q_ptr + row * q_stride + heads[:, None] * D + d[None, :], mask=mask, other=0.0)
        for split in range(tl.program_id(2), tl.cdiv(length, split_tokens), tl.num_programs(2)):
            start = split * split_tokens
            end = tl.minimum(start + split_tokens, length)
            row_max = tl.full([TILE_G], float("-inf"), tl.float32)
            total = tl.zeros([TILE_G], tl.float32)
            acc = tl.zeros([TILE_G, TILE_D], tl.float32)
            for first in range(start, end, TILE_N):
                token = first + tl.arange(0, TILE_N)
                valid = token < end
                block = tl.load(block_table_ptr + row * table_stride + token // BLOCK_SIZE, mask=valid, other=0).to(
                    tl.int64
                )
                slot = (block * BLOCK_SIZE + token % BLOCK_SIZE) * (HKV * D) + head * D
                kv_offset = slot[:, None] + d[None, :]
                kv_mask = valid[:, None] & (d < D)[None, :]
                keys = tl.load(k_cache_ptr + kv_offset, mask=kv_mask, other=0.0)
                values = tl.load(v_cache_ptr + kv_offset, mask=kv_mask, other=0.0)
                scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale  # [G, N]
                scores = tl.where(valid[None, :], scores, float("-inf"))
                new_max = tl.maximum(row_max, tl.max(scores, 1))
                weights = tl.exp2(scores - new_max[:, None])
                rescale = tl.exp2(row_max - new_max)
                total = total * rescale + tl.sum(weights, 1)
                acc = acc * rescale[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
                row_max = new_max
            offset = (row * (HKV * G) + heads) * n_splits + split  # [G]
            tl.store(partial_ptr + offset[:, None] * D + d[None, :], acc / total[:, None], mask=mask)
            tl.store(lse_ptr + offset, row_max + tl.log2(total), mask=g < G)

    @triton.jit
    def _merge_kernel(
        partial_ptr,
        lse_ptr,
        lengths_ptr,
        out_ptr,
        n_splits,
        split_tokens,
        HQ: tl.constexpr,
        D: tl.constexpr,
        TILE_S: tl.constexpr,
        TILE_D: tl.constexpr,
    ):
        """Program (row, query head): average of the splits, weighted by exp(log-sum-exp)."""
        row = tl.program_id(0).to(tl.int64)
        head = tl.program_id(1)
        s = tl.arange(0, TILE_S)
        d = tl.arange(0, TILE_D)
        used = s < tl.cdiv(tl.load(lengths_ptr + row), split_tokens)  # the others were never written
        offset = (row * HQ + head) * n_splits + s
        logs = tl.load(lse_ptr + offset, mask=used, other=float("-inf"))
        row_max = tl.max(logs, 0)
        weights = tl.where(used, tl.exp2(logs - tl.where(row_max == float("-inf"), 0.0, row_max)), 0.0)
        parts = tl.load(
            partial_ptr + offset[:, None] * D + d[None, :], mask=used[:, None] & (d < D)[None, :], other=0.0
        )
        total = tl.sum(weights, 0)
        merged = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0, 1.0, total)  # length 0: zeros
        tl.store(out_ptr + (row * HQ + head) * D + d, merged.to(out_ptr.dtype.element_ty), mask=d < D)


def triton_paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    n_rows, n_heads, dim = q.shape
    _, block_size, n_kv, _ = k_cache.shape
    tile_d = max(16, triton.next_power_of_2(dim))
    tile_n = max(16, TILE_BYTES[q.element_size()] // (tile_d * q.element_size()))
    capacity = block_table.shape[1] * block_size
    split_tokens = max(SPLIT_TOKENS, triton.cdiv(triton.cdiv(capacity, MAX_SPLITS), tile_n) * tile_n)
    n_splits = triton.cdiv(capacity, split_tokens)
    group = n_heads // n_kv
    partial = torch.empty(n_rows, n_heads, n_splits, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(n_rows, n_heads, n_splits, dtype=torch.float32, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    scale = dim**-0.5 * 1.4426950408889634  # log2(e): the kernel works with powers of two
    # the table is as wide as the longest possible sequence, so most rows need few of their splits
    n_programs = min(n_splits, triton.cdiv(PROGRAMS, n_rows * n_kv))
    _split_kernel[n_rows, n_kv, n_programs](
        q,
        k_cache,
        v_cache,
        block_table,
        lengths,
        partial,
        lse,
        q.stride(0),
        block_table.stride(0),
        scale,
        n_splits,
        split_tokens,
        BLOCK_SIZE=block_size,
        HKV=n_kv,
        G=group,
        D=dim,
        TILE_G=max(16, triton.next_power_of_2(group)),
        TILE_D=tile_d,
        TILE_N=tile_n,
        num_warps=4,
        num_stages=2,
    )
    _merge_kernel[n_rows, n_heads](
        partial,
        lse,
        lengths,
        out,
        n_splits,
        split_tokens,
        HQ=n_heads,
        D=dim,
        TILE_S=triton.next_power_of_2(n_splits),
        TILE_D=tile_d,
        num_warps=4,
    )
    return out
