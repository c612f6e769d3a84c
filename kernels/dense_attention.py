"""Attention of one new token per sequence to its keys and values, on a CPU, where each row's cache is contiguous.

    mask = length_mask(lengths, longest, n_kv, dtype)       # once per step, for all layers
    out = dense_attention(q, keys, values, mask)

A row's result is bitwise independent of the other rows of the batch and of their lengths. One matrix product over all
tokens would not be: MKL splits a sum by its length, which is that of the longest row. So the sum runs over CHUNK tokens
at a time, which MKL does not split, and masked tokens add zeros.
"""

import torch
import torch.nn.functional as F

CHUNK = 192  # tokens that MKL sums without splitting
STEP = 16  # tokens; lengths are multiples of it, since MKL sums those after the last multiple in another order


def length_mask(lengths: torch.Tensor, longest: int, n_kv: int, dtype: torch.dtype) -> torch.Tensor:
    """The additive mask of the scores: 0 for a row's tokens, -inf after them. lengths int64 [R], longest: their maximum
    -> [R * n_kv, 1, L], L: longest, rounded up to a multiple of STEP."""
    token = torch.arange(-(-longest // STEP) * STEP)
    mask = torch.zeros(len(lengths), len(token), dtype=dtype).masked_fill_(token >= lengths[:, None], float("-inf"))
    return mask.repeat_interleave(n_kv, 0)[:, None]


def dense_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [R, Hq, D]; keys, values [rows, Hkv, capacity, D], contiguous, rows >= R, capacity >= L, without NaN; mask:
    `length_mask` -> [R, Hq, D]. Not differentiable.

    In bf16 this is torch's attention, with fp32 sums; its bits do depend on L.
    """
    n_kv, capacity, dim = keys.shape[1:]
    n_tokens = mask.shape[2]
    q = q.reshape(len(mask), -1, dim)  # [R * Hkv, g, D]: the query heads that share a key head are rows of one matrix
    keys, values = (x.view(-1, capacity, dim)[: len(mask), :n_tokens] for x in (keys, values))
    if q.dtype != torch.float32:
        out = F.scaled_dot_product_attention(q[None], keys[None], values[None], attn_mask=mask[None])
        return out.reshape(-1, q.shape[1] * n_kv, dim)
    weights = torch.baddbmm(mask, q, keys.transpose(1, 2), alpha=dim**-0.5).softmax(-1)
    out = torch.bmm(weights[:, :, :CHUNK], values[:, :CHUNK])
    for start in range(CHUNK, n_tokens, CHUNK):
        out.baddbmm_(weights[:, :, start : start + CHUNK], values[:, start : start + CHUNK])
    return out.view(-1, q.shape[1] * n_kv, dim)
