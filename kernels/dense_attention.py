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

    lengths: int64 [R]; longest: their maximum -> [tiles, R * n_kv, 1, TILE], as many tiles as the longest row needs.
    """
    n_tiles = -(-longest // TILE)
    token = torch.arange(n_tiles * TILE).view(n_tiles, 1, 1, TILE)
    lengths = lengths.repeat_interleave(n_kv).view(-1, 1, 1)
    mask = torch.zeros(n_tiles, len(lengths), 1, TILE, dtype=dtype)
    return mask.masked_fill_(token >= lengths, float("-inf"))


def dense_attention(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """q [R, Hq, D]; keys, values [rows, Hkv, capacity, D], contiguous and without NaN, rows >= R, capacity a multiple
    of TILE and at least tiles * TILE; mask: `length_mask` -> [R, Hq, D]. Not differentiable.

    D is a multiple of 16, or rows may differ in alignment. In bf16 torch chooses products by the size of the batch.
    """
    n_kv, capacity, dim = keys.shape[1:]
    n_tiles, n_heads = mask.shape[:2]  # n_heads: the key heads of all rows
    if n_tiles * n_heads == 1:  # torch would let all threads share a single product: compute it twice
        q, keys, values = (x[:1].repeat(2, *[1] * (x.dim() - 1)) for x in (q, keys, values))
        return dense_attention(q, keys, values, mask.repeat(1, 2, 1, 1))[:1]

    def tiles_of(cache):
        return cache.as_strided((n_tiles, n_heads, TILE, dim), (TILE * dim, capacity * dim, dim, 1))

    # the query heads that share a key head are rows of one matrix, a tile is an element of the batch
    queries = q.reshape(1, n_heads, -1, dim).expand(n_tiles, -1, -1, -1)  # [tiles, R * Hkv, g, D]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        queries, tiles_of(keys), tiles_of(values), attn_mask=mask
    )
    if n_tiles == 1:
        return out.reshape(q.shape)
    lse = lse + mask[..., 0]  # [tiles, R * Hkv, g]; torch gives 0 for a tile without a token
    weights = F.pad(lse.permute(1, 2, 0), (0, -n_tiles % LANES), value=float("-inf")).softmax(-1)
    parts = out * weights[..., :n_tiles].permute(2, 0, 1)[..., None]
    total = parts[0]
    for part in parts[1:]:  # parts.sum(0) would choose an order by the number of tiles
        total += part
    return total.reshape(q.shape).to(q.dtype)
