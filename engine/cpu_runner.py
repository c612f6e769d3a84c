"""The runner for CPUs: decodes in a dense copy of the running samples' keys and values."""

from collections.abc import Iterable

import torch
from torch import Tensor

from engine.block_manager import BLOCK_SIZE
from engine.requests import Sequence
from engine.runner import Runner
from kernels.dense_attention import TILE, dense_attention, length_mask
from kernels.rope_kv import apply_rope
from model import Transformer


class DenseCache:
    """Keys and values of the running samples with the tokens of a slot contiguous.

    A CPU decodes from this copy, since gathering the blocks of each sample would take longer than the attention itself.
    A row is loaded from blocks when its sample starts, and its full blocks are stored when it leaves; in between the
    blocks lag behind.
    """

    def __init__(self, cache: Tensor, max_rows: int, max_tokens: int):
        """cache: the paged one. max_tokens: upper limit of rows times tokens of the longest row, for more than one.

        A row takes whole tiles of attention.
        """
        self.cache = cache
        self.max_rows = max_rows
        self.max_tokens = max_tokens
        layers, _, _, _, n_kv, dim = cache.shape
        self.data = cache.new_zeros(layers, 2, 0, n_kv, 0, dim)  # [layers, 2, rows, Hkv, capacity, D]

    def reserve(self, n_rows: int, longest: int) -> None:
        """Makes room for n_rows of `longest` tokens. Growing copies everything, so it takes more than asked for."""
        layers, two, rows, n_kv, capacity, dim = self.data.shape
        if n_rows <= rows and longest <= capacity:
            return
        new_capacity = capacity if longest <= capacity else longest * 3 // 2
        new_capacity = max(longest, min(new_capacity, self.max_tokens // n_rows))
        new_capacity = -(-new_capacity // TILE) * TILE
        new_rows = rows if n_rows <= rows else min(n_rows * 2, self.max_rows)
        new_rows = max(n_rows, min(new_rows, self.max_tokens // new_capacity))
        old = self.data[:, :, :new_rows, :, :new_capacity]
        self.data = old.new_zeros(layers, two, new_rows, n_kv, new_capacity, dim)  # masked values may not be NaN
        self.data[:, :, :rows, :, :capacity] = old

    def load(self, row: int, blocks: list[int], n_tokens: int) -> None:
        """Fills a row with the first n_tokens of these blocks."""
        tokens = self.cache[:, :, blocks].flatten(2, 3)[:, :, :n_tokens]  # [layers, 2, tokens, Hkv, D]
        self.data[:, :, row, :, :n_tokens] = tokens.transpose(2, 3)

    def store(self, row: int, blocks: list[int], start: int) -> None:
        """Fills whole blocks with the tokens of a row from `start` on."""
        tokens = self.data[:, :, row, :, start : start + len(blocks) * BLOCK_SIZE].transpose(2, 3)
        self.cache[:, :, blocks] = tokens.unflatten(2, (len(blocks), BLOCK_SIZE))

    def move(self, source: Tensor, target: Tensor, longest: int) -> None:
        """Copies rows of up to `longest` tokens."""
        self.data[:, :, target, :, :longest] = self.data[:, :, source, :, :longest]


class DenseDecodeContext:
    """Attention context of one new token per sample, in the first rows of a DenseCache."""

    def __init__(self, dense: DenseCache, lengths: Tensor):
        """lengths: int64 [R], tokens before the new one."""
        n_rows = len(lengths)
        longest = int(lengths.max()) + 1
        dense.reserve(n_rows, longest)
        self.data = dense.data
        self.position_ids = lengths
        n_kv, capacity = self.data.shape[3:5]
        heads = torch.arange(n_rows * n_kv).view(n_rows, n_kv)
        # where the new keys and values go in data[layer, 0 or 1].view(-1, D)
        self.new_keys = (heads * capacity + lengths[:, None]).flatten()
        self.mask = length_mask(lengths + 1, longest, n_kv, self.data.dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        n_heads, n_kv, dim = q.shape[1], k.shape[1], q.shape[2]
        q, k = apply_rope(torch.cat([q, k], 1), cos, sin).split([n_heads, n_kv], 1)
        keys, values = self.data[layer]
        keys.view(-1, dim).index_copy_(0, self.new_keys, k.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, self.new_keys, v.reshape(-1, dim))
        return dense_attention(q, keys, values, self.mask)


class CPURunner(Runner):
    """Decodes in a DenseCache that is at most as large as the paged cache."""

    def __init__(self, model: Transformer, stop_ids: Iterable[int], max_len: int, max_batch: int, n_blocks: int):
        super().__init__(model, stop_ids, max_len, max_batch, n_blocks)
        self.max_padded_tokens = (n_blocks - 1) * BLOCK_SIZE
        self.dense = DenseCache(self.cache, max_batch, self.max_padded_tokens)

    def reset(self) -> None:
        super().reset()
        self.dense.data.zero_()

    def start(self, first: int, samples: list[Sequence]) -> None:
        super().start(first, samples)
        n = first + len(samples)
        self.dense.reserve(n, int(self.slots.length[:n].max()) + 1)
        for slot, sample in enumerate(samples, first):
            self.dense.load(slot, sample.blocks, sample.length)

    def decode(self, n: int) -> Tensor:
        lengths = self.slots.length[:n]
        context = DenseDecodeContext(self.dense, lengths)
        logits = self.model(self.slots.token[:n], context.position_ids, context)
        lengths += ~self.slots.done[:n]
        self.sample(slice(0, n), logits)
        return logits

    def leave(self, slot: int, sample: Sequence, n_sampled: int, failed: bool) -> None:
        if failed:
            self.dense.data[:, :, slot] = 0  # masked values may not be NaN
            return
        first = len(sample.prompt_ids) // BLOCK_SIZE  # the prefill has written the blocks before
        n_full = (len(sample.prompt_ids) + n_sampled - 1) // BLOCK_SIZE
        self.dense.store(slot, sample.blocks[first:n_full], first * BLOCK_SIZE)

    def move_cache(self, source: Tensor, target: Tensor) -> None:
        self.dense.move(source, target, int(self.slots.length[target].max()))
