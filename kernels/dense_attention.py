"""Decode attention on a CPU: one new token per sequence against its contiguous keys and values.

    mask = length_mask(lengths, longest, n_kv, dtype)       # once per step, shared by all layers
    out = dense_attention(q, keys, values, mask)

In fp32 the bits of a row do not depend on the other rows of the batch, on any processor. A matrix library may sum a
product in an order that depends on its shape, on the number of threads and on the alignment of its operands; in one
product over all tokens the longest row would set the shape. So tokens are split into tiles of TILE, the last one padded
with masked tokens, and torch's CPU attention computes each pair of a key head and a tile by itself: products of one
shape and a softmax, by one thread, on operands that start at a cache line. The tiles of a row are then merged by their
log-sum-exp, in order; a tile without a token adds zeros.
"""

import torch
import torch.nn.functional as F

# Tokens. torch keeps TILE scores, two sums and the output of a query in one buffer: with 126 + 2 the buffer of each
# thread starts at a cache line (64 bytes). 62 costs more merges, 254 more padding of short sequences.
TILE = 126
# fp32 lanes of the widest CPU vector. A sum over a multiple of it goes lane by lane, so that zeros change nothing.
LANES = 16


def length_mask(lengths: torch.Tensor, longest: int, n_kv: int, dtype: torch.dtype) -> torch.Tensor:
    """Returns the additive mask of the scores: 0 for a row's tokens, -inf after them.

    lengths: int64 [R]; longest: their maximum -> [R * n_kv, 1, L], where L is longest rounded up to a multiple of TILE.
    """
    token = torch.arange(-(-longest // TILE) * TILE)
    mask = torch.zeros(len(lengths), len(token), dtype=dtype).masked_fill_(token >= lengths[:, None], float("-inf"))
    return mask.repeat_interleave(n_kv, 0)[:, None]


def dense_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [R, Hq, D]; keys, values [rows, Hkv, capacity, D], contiguous and without NaN, rows >= R, capacity a multiple
    of TILE and at least L; mask: `length_mask` -> [R, Hq, D]. Not differentiable.

    D is a multiple of 16, or rows may differ in alignment. In bf16 torch chooses products by the size of the batch.
    """
    n_kv, capacity, dim = keys.shape[1:]
    n_heads, n_queries, n_tokens = mask.shape  # n_heads: the key heads of all rows
    n_tiles = n_tokens // TILE
    if n_heads * n_tiles == 1:  # torch would let all threads share a single product: compute it twice
        q, keys, values, mask = (x[:1].repeat(2, *[1] * (x.dim() - 1)) for x in (q, keys, values, mask))
        return dense_attention(q, keys, values, mask)[:1]

    def tiles_of(cache):
        return cache.as_strided((n_tiles, n_heads, TILE, dim), (TILE * dim, capacity * dim, dim, 1))

    # the query heads that share a key head are rows of one matrix, a tile is an element of a batch
    grouped = q.reshape(n_heads, -1, dim)  # [R * Hkv, g, D]
    mask = mask.view(n_heads, n_queries, n_tiles, TILE).permute(2, 0, 1, 3)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        grouped.expand(n_tiles, -1, -1, -1), tiles_of(keys), tiles_of(values), attn_mask=mask
    )
    if n_tiles > 1:
        lse = lse + mask[..., 0]  # torch gives 0 for a tile without a token
        weights = F.pad(lse.permute(1, 2, 0), (0, -n_tiles % LANES), value=float("-inf")).softmax(-1)
        parts = out * weights[..., :n_tiles].permute(2, 0, 1)[..., None]
        out = parts[:1]
        for i in range(1, n_tiles):  # parts.sum(0) would choose an order by the number of tiles
            out += parts[i]
    return out[0].reshape(q.shape).to(q.dtype)
