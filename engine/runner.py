"""Shared by the CPU and GPU runners: the paged KV cache, prefill, and sampling into slots."""

from collections.abc import Iterable

import torch
from torch import Tensor

from attention import SeqLens, to_device
from engine.block_manager import BLOCK_SIZE
from engine.requests import Sequence
from engine.scheduler import Chunk, NewBlock
from kernels.rope_kv import apply_rope
from kernels.sampling import sample
from kernels.varlen_attention import varlen_attention
from model import Transformer


class PrefillContext:
    """Attention context of chunks: each new token attends to what the cache holds of its sequence, up to itself."""

    def __init__(self, cache: Tensor, chunks: list[Chunk]):
        self.cache = cache
        device = cache.device
        key_slots = []
        new_slots = []
        for sequence, start, end in chunks:
            blocks = torch.tensor(sequence.blocks + sequence.tail_blocks[:1])
            slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:end]
            key_slots.append(slots)
            new_slots.append(slots[start:])
        self.queries = SeqLens([len(slots) for slots in new_slots], device)
        self.keys = SeqLens([len(slots) for slots in key_slots], device)
        self.key_slots = to_device(torch.cat(key_slots), device)
        self.new_slots = to_device(torch.cat(new_slots), device)
        self.position_ids = to_device(torch.cat([torch.arange(start, end) for _, start, end in chunks]), device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        keys, values = self.cache[layer].flatten(1, 2)  # [blocks * BLOCK_SIZE, Hkv, D] each
        keys[self.new_slots] = apply_rope(k, cos, sin)
        values[self.new_slots] = v
        q = apply_rope(q, cos, sin)
        return varlen_attention(q, keys[self.key_slots], values[self.key_slots], self.queries, self.keys)


class Slots:
    """State of the running samples on the device, a row each. Rows that are not in use pad CUDA graphs."""

    def __init__(self, n_slots: int, max_len: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(n_slots, *shape, dtype=dtype, device=device)

        self.token = zeros()  # the newest id; its keys and values are computed in the next step
        self.length = zeros()  # tokens in the cache
        self.position = zeros()  # tokens sampled so far
        self.max_new_tokens = zeros()
        self.temperature = zeros(dtype=torch.float32)
        self.top_p = zeros(dtype=torch.float32)
        self.seed = zeros()
        self.done = zeros(dtype=torch.bool)  # ended, or not in use: neither length nor position grows
        self.block_table = zeros(-(-max_len // BLOCK_SIZE) + 1, dtype=torch.int32)
        self.ids = zeros(max_len + 1)  # sampled ids; the id that a row draws after its end goes behind them
        self.logprobs = zeros(max_len + 1, dtype=torch.float32)

    def tensors(self) -> dict[str, Tensor]:
        return vars(self)

    def clear(self, slots: slice) -> None:
        """Makes rows unused: they write into block 0."""
        self.length[slots] = 0
        self.block_table[slots] = 0
        self.done[slots] = True


def sample_or_nan(logits: Tensor, temperature: Tensor, top_p: Tensor, seed: Tensor, position: Tensor):
    """`kernels.sampling.sample`, with NaN as the log-prob of rows whose logits are not finite, as its kernel has it."""
    try:
        return sample(logits, temperature, top_p, seed, position)
    except FloatingPointError:
        scaled = logits.float() / torch.where(temperature == 0, 1.0, temperature)[:, None]
        failed = torch.softmax(scaled, -1)[:, 0].isnan()
        tokens, logprobs = sample(logits.masked_fill(failed[:, None], 0), temperature, top_p, seed, position)
        return tokens, logprobs.masked_fill(failed, float("nan"))


class Runner:
    """Holds the KV cache and the slots of one device, and computes what the scheduler asks for."""

    steps_per_poll = 1  # decode steps between two looks at what has ended
    max_padded_tokens: int | None = None  # see Scheduler

    def __init__(self, model: Transformer, stop_ids: Iterable[int], max_len: int, max_batch: int, n_blocks: int):
        weight = next(model.parameters())
        config = model.config
        self.model = model
        self.device = weight.device
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.int64, device=self.device)
        shape = (config.num_hidden_layers, 2, n_blocks, BLOCK_SIZE, config.num_key_value_heads, config.head_dim)
        self.cache = torch.empty(shape, dtype=weight.dtype, device=self.device)  # keys and values
        self.slots = Slots(max_batch, max_len, self.device)

    def reset(self) -> None:
        """Empties all slots."""
        for tensor in self.slots.tensors().values():
            tensor.zero_()
        self.slots.clear(slice(None))

    def release_cache(self) -> None:
        """Frees the KV cache until `restore_cache`, on a GPU. On a CPU all stays."""

    def restore_cache(self) -> None: ...

    def prefill(self, chunks: list[Chunk], n_finished: int) -> Tensor:
        """Computes the keys and values of chunks. Returns the logits after the first n_finished of them, [n, V]."""
        ids = [i for sequence, start, end in chunks for i in sequence.ids[start:end]]
        context = PrefillContext(self.cache, chunks)
        last = (context.queries.cu_seqlens[1:].long() - 1)[:n_finished]
        return self.model(to_device(torch.tensor(ids), self.device), context.position_ids, context, index=last)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """copies: (source, target)."""
        if copies:
            source, target = to_device(torch.tensor(copies).T.contiguous(), self.device)
            self.cache[:, :, target] = self.cache[:, :, source]

    def start(self, first: int, samples: list[Sequence]) -> None:
        """Fills the slots from `first` on; a preempted sample continues behind its response."""
        slots = slice(first, first + len(samples))
        table = torch.zeros(len(samples), self.slots.block_table.shape[1], dtype=torch.int32)
        for row, s in zip(table, samples):
            row[: len(s.blocks)] = torch.tensor(s.blocks)
        values = {
            "length": [s.length for s in samples],
            "position": [len(s.response) for s in samples],
            "max_new_tokens": [s.params.max_new_tokens for s in samples],
            "temperature": [s.params.temperature for s in samples],
            "top_p": [s.params.top_p for s in samples],
            "seed": [s.seeds[0] for s in samples],
            "done": [False] * len(samples),
            "block_table": table,
        }
        tensors = self.slots.tensors()
        for name, value in values.items():
            host = torch.as_tensor(value).to(tensors[name].dtype)
            tensors[name][slots] = to_device(host, self.device)
        for slot, s in enumerate(samples, first):
            if s.response:
                self.slots.ids[slot, : len(s.response)] = torch.tensor(s.response, device=self.device)
                self.slots.logprobs[slot, : len(s.response)] = torch.tensor(s.logprobs, device=self.device)

    def sample(self, slots: slice, logits: Tensor) -> None:
        """Draws the next token of each slot from logits [n, V] and appends it, unless the slot is done.

        On an engine that ranks share, logits are those of this rank's part of the vocabulary.
        """
        s = self.slots
        done = s.done[slots]
        position = s.position[slots]
        settings = s.temperature[slots], s.top_p[slots], s.seed[slots], position
        if self.model.part is None:
            tokens, logprobs = sample_or_nan(logits, *settings)
        else:
            tokens, logprobs = self.model.part.draw(sample_or_nan, logits, *settings)
        s.ids[slots].scatter_(1, position[:, None], tokens[:, None])
        s.logprobs[slots].scatter_(1, position[:, None], logprobs[:, None])
        s.token[slots] = tokens
        position += ~done
        stopped = (tokens[:, None] == self.stop_ids).any(-1)
        done |= stopped | (position >= s.max_new_tokens[slots]) | logprobs.isnan()

    def add_blocks(self, new_blocks: list[NewBlock]) -> None:
        if new_blocks:  # in one copy, which the host doesn't wait for
            slot, column, block = to_device(torch.tensor(new_blocks).T.contiguous(), self.device)
            self.slots.block_table[slot, column] = block.int()

    def decode(self, n: int) -> Tensor:
        """One more token for each of the first n slots. Returns the logits that they were drawn from, [n, V]."""
        raise NotImplementedError

    def ended(self, n: int) -> list[int]:
        """Returns which of the first n slots are done. On a GPU this waits for all steps so far."""
        return self.slots.done[:n].cpu().nonzero()[:, 0].tolist()

    def response(self, slot: int) -> tuple[list[int], list[float]]:
        """The ids and log-probs that a slot has sampled so far."""
        n = int(self.slots.position[slot])
        return self.slots.ids[slot, :n].tolist(), self.slots.logprobs[slot, :n].tolist()

    def leave(self, slot: int, sample: Sequence, n_sampled: int, failed: bool) -> None:
        """Called before a slot is freed, while it still has its blocks."""

    def move(self, moves: list[tuple[int, int]], n_left: int, n_before: int) -> None:
        """Moves slots, as (source, target), and clears those from n_left to n_before."""
        if moves:
            source, target = to_device(torch.tensor(moves).T.contiguous(), self.device)
            for tensor in self.slots.tensors().values():
                tensor[target] = tensor[source]
            self.move_cache(source, target)
        self.slots.clear(slice(n_left, n_before))

    def move_cache(self, source: Tensor, target: Tensor) -> None:
        """For a cache with a row per slot."""
