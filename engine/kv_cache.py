"""The paged KV cache: which block of it belongs to whom, and attention through it.

The cache of a model is one tensor [layers, 2, blocks, BLOCK, Hkv, D]. A sequence holds a list of blocks, whose slots
hold the keys and values of its tokens in order. Two attention contexts for model.py write into it and read from it:
`Prefill` for chunks of prompts, `Decode` for the newest token of each sequence of a decode step.
On a CPU the running rows are decoded in a copy of their own, without blocks: `DenseRows`.
"""

import gc
import itertools
import os

import torch

from kernels.dense_attention import TILE, dense_attention, length_mask
from kernels.paged_attention import paged_attention
from kernels.rope_kv import apply_rope, rope_kv
from kernels.varlen_attention import varlen_attention
from model import SeqLens, Transformer, to_device

BLOCK = 16  # tokens
# of the free memory, at most, for a cache whose size is not given; on a CPU `DenseRows` may take as much again
KV_SHARE = {"cuda": 0.9, "cpu": 0.25}


class Blocks:
    """Who holds which block of the cache, and which full blocks hold known tokens.

    What a free block holds can be found until it is given out again, the longest unused first. Block 0 is nobody's:
    the padding rows of a CUDA graph write into it.
    """

    def __init__(self, n_blocks: int):
        self.holders = [0] * n_blocks
        self.free = dict.fromkeys(range(1, n_blocks))  # in the order in which they are given out
        self.known = {}  # (name of the block before, the tokens) -> block
        self.key_of, self.name_of = {}, {}  # of a known block; names are never used twice, unlike blocks
        self.names = itertools.count(1)

    def take(self, n: int) -> list[int]:
        """n free blocks, held once."""
        taken = list(itertools.islice(self.free, n))
        assert len(taken) == n, "the caller has to look at `free` first"
        for block in taken:
            del self.free[block]
            self._forget(block)
            self.holders[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.free.pop(block, None)
            self.holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # of a sequence the end is given away before the beginning
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None

    def match(self, ids: list[int]) -> list[int]:
        """The known blocks that hold the beginning of ids."""
        blocks, name = [], 0
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            block = self.known.get((name, tuple(ids[start : start + BLOCK])))
            if block is None:
                break
            blocks.append(block)
            name = self.name_of[block]
        return blocks

    def learn(self, ids: list[int], blocks: list[int]) -> None:
        """Makes the full blocks of a sequence known; ids: the tokens whose keys and values they hold."""
        name = 0
        for block, start in zip(blocks, range(0, len(ids) - BLOCK + 1, BLOCK)):
            key = (name, tuple(ids[start : start + BLOCK]))
            if key not in self.known:
                self._forget(block)
                self.known[key], self.key_of[block], self.name_of[block] = block, key, next(self.names)
            name = self.name_of[self.known[key]]

    def forget_all(self) -> None:
        self.forget(list(self.key_of))

    def forget(self, blocks: list[int]) -> None:
        """What these hold will not be found again."""
        for block in blocks:
            self._forget(block)

    def _forget(self, block):
        if block in self.key_of:
            del self.known[self.key_of.pop(block)], self.name_of[block]


class Prefill:
    """Attention context of chunks: each sequence's new tokens see what the cache holds of it, and one another."""

    def __init__(self, cache: torch.Tensor, chunks: list[tuple[list[int], int, int]], device: torch.device):
        """chunks: (blocks, start, end) a sequence, tokens start..end are new."""
        self.cache, keys, new = cache, [], []
        for blocks, start, end in chunks:
            slots = (torch.tensor(blocks)[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:end]
            keys.append(slots)
            new.append(slots[start:])
        self.queries = SeqLens([len(slots) for slots in new], device)
        self.keys = SeqLens([len(slots) for slots in keys], device)
        self.key_slots, self.new_slots = to_device(torch.cat(keys), device), to_device(torch.cat(new), device)
        self.position_ids = to_device(torch.cat([torch.arange(start, end) for _, start, end in chunks]), device)

    def attend(self, layer, q, k, v, cos, sin):
        keys, values = self.cache[layer].flatten(1, 2)  # [slots, Hkv, D] each
        keys[self.new_slots], values[self.new_slots] = apply_rope(k, cos, sin), v
        q = apply_rope(q, cos, sin)
        return varlen_attention(q, keys[self.key_slots], values[self.key_slots], self.queries, self.keys)


class Decode:
    """Attention context of one new token a sequence, through the block table."""

    def __init__(self, cache: torch.Tensor, block_table: torch.Tensor, lengths: torch.Tensor):
        """block_table: int32 [T, blocks]; lengths: int64 [T], tokens before each new one."""
        self.cache, self.block_table = cache, block_table
        block = block_table.gather(1, (lengths // BLOCK)[:, None])[:, 0].long()
        self.slots = block * BLOCK + lengths % BLOCK
        self.lengths = (lengths + 1).int()

    def attend(self, layer, q, k, v, cos, sin):
        keys, values = self.cache[layer]  # [blocks, BLOCK, Hkv, D] each
        q = rope_kv(q, k, v, cos, sin, keys, values, self.slots)
        return paged_attention(q, keys, values, self.block_table, self.lengths)


class DenseRows:
    """The keys and values of the running rows once more, each row's tokens behind one another: what a CPU decodes in.

    Gathering its blocks for each token would take longer than the attention itself. A row is filled from
    its blocks when it joins (`load`), and its full blocks from it when it leaves (`store`): between the two they are
    behind. It is also the attention context of a step, after `begin`.
    """

    def __init__(self, cache: torch.Tensor, max_rows: int, max_tokens: int):
        """max_tokens: most rows x tokens of the longest row may be, unless it is one row; rows take whole tiles."""
        self.cache, self.max_rows, self.max_tokens = cache, max_rows, max_tokens
        layers, _, _, _, n_kv, dim = cache.shape
        self.data = cache.new_zeros(layers, 2, 0, n_kv, 0, dim)  # [layers, 2, rows, Hkv, capacity, D]

    def fits(self, n_rows: int, longest: int) -> bool:
        return n_rows == 1 or n_rows * longest <= self.max_tokens

    def reserve(self, n_rows: int, longest: int) -> None:
        """Room for rows of that many tokens; as growing copies all, for more of both where max_tokens lets it."""
        layers, two, rows, n_kv, capacity, dim = self.data.shape
        if n_rows <= rows and longest <= capacity:
            return
        wanted = capacity if longest <= capacity else longest * 3 // 2
        wanted = max(longest, min(wanted, self.max_tokens // n_rows))
        wanted = -(-wanted // TILE) * TILE
        wanted_rows = rows if n_rows <= rows else min(n_rows * 2, self.max_rows)
        wanted_rows = max(n_rows, min(wanted_rows, self.max_tokens // wanted))
        old = self.data[:, :, :wanted_rows, :, :wanted]
        self.data = old.new_zeros(layers, two, wanted_rows, n_kv, wanted, dim)  # zeros: what is masked may not be NaN
        self.data[:, :, :rows, :, :capacity] = old

    def load(self, row: int, blocks: list[int], n_tokens: int) -> None:
        """Fills a row with the first tokens of these blocks."""
        found = self.cache[:, :, blocks].flatten(2, 3)[:, :, :n_tokens]  # [layers, 2, tokens, Hkv, D]
        self.data[:, :, row, :, :n_tokens] = found.transpose(2, 3)

    def store(self, row: int, blocks: list[int], start: int) -> None:
        """Fills whole blocks with a row's tokens from `start` on."""
        found = self.data[:, :, row, :, start : start + len(blocks) * BLOCK].transpose(2, 3)
        self.cache[:, :, blocks] = found.unflatten(2, (len(blocks), BLOCK))

    def move(self, to: torch.Tensor, source: torch.Tensor, longest: int) -> None:
        """Copies rows; their tokens are at most `longest`."""
        self.data[:, :, to, :, :longest] = self.data[:, :, source, :, :longest]

    def begin(self, lengths: torch.Tensor, longest: int) -> "DenseRows":
        """A step for the first rows -> itself. lengths: int64 [R], tokens before each new one; longest: maximum."""
        self.reserve(len(lengths), longest + 1)
        dtype, n_kv, capacity = self.data.dtype, self.data.shape[3], self.data.shape[4]
        heads = torch.arange(len(lengths) * n_kv).view(-1, n_kv)  # [R, Hkv], as rows of one matrix
        self.places = (heads * capacity + lengths[:, None]).flatten()  # of the new keys, [R * Hkv]
        self.mask = length_mask(lengths + 1, longest + 1, n_kv, dtype)
        return self

    def attend(self, layer, q, k, v, cos, sin):
        (n_heads, dim), n_kv = q.shape[1:], k.shape[1]
        q, k = apply_rope(torch.cat([q, k], 1), cos, sin).split([n_heads, n_kv], 1)
        for cache, new in zip(self.data[layer], (k, v)):
            cache.view(-1, dim).index_copy_(0, self.places, new.reshape(-1, dim))
        return dense_attention(q, *self.data[layer], self.mask)


def likely_tokens(max_len: int, max_batch: int) -> int:
    """Tokens that max_batch sequences hold when they are on average a quarter of the longest, 800 + 400 tokens of
    2048 + 2048, say; at least one of the longest."""
    return max(max_len, max_len * max_batch // 4)


def kv_tokens_of(model: Transformer, max_len: int, max_batch: int) -> int:
    """The size of a cache for which none is given, if a share of the free memory has room for it: `likely_tokens` on a
    GPU; on a CPU, where memory counts only once it is written, the most that there can be."""
    device, config = next(model.parameters()).device, model.config
    if device.type == "cuda":
        wanted = likely_tokens(max_len, max_batch)
        gc.collect()  # models that were dropped: FSDP's parameters hold one another
        torch.cuda.empty_cache()  # what torch keeps of freed tensors counts as taken
        free, _ = torch.cuda.mem_get_info(device)
    else:
        wanted = max_len * max_batch
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    itemsize = next(model.parameters()).element_size()
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize  # bytes
    return max(max_len, min(wanted, int(KV_SHARE[device.type] * free / per_token)))
