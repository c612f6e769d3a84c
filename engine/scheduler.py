"""Decides what each step of the engine computes: admission, prefill in chunks, preemption. Host only, no tensors."""

import itertools
from collections import deque
from collections.abc import Collection, Hashable
from dataclasses import replace
from typing import NamedTuple

from engine.block_manager import BLOCK_SIZE, BlockManager
from engine.requests import SamplingParams, Sequence

SAMPLES_AT_ONCE = 16  # of a prompt, which start together
PREFILL_TOKENS = 4096  # per step, so that a long queue of prompts does not hold up running samples


class Chunk(NamedTuple):
    """Tokens start..end of a sequence, to be prefilled in this step."""

    sequence: Sequence
    start: int
    end: int


class NewBlock(NamedTuple):
    """A block for the sample in a slot, which goes into this column of the block table."""

    slot: int
    column: int
    block: int


class Scheduler:
    """Sequences wait, are prefilled, and run as one sample a slot.

    max_slots: samples that run at once. max_padded_tokens: upper limit of slots times tokens of the longest sample,
    for a runner that pads its samples to one length (None: no limit).
    """

    def __init__(self, n_blocks: int, max_slots: int, max_padded_tokens: int | None = None):
        self.blocks = BlockManager(n_blocks)
        self.max_slots = max_slots
        self.max_padded_tokens = max_padded_tokens
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None  # admitted, some of its chunks are still to come
        self.running: list[Sequence] = []  # the sample in each slot
        self.admissions = itertools.count()
        self.computed_tokens = 0  # prompt tokens that were prefilled
        self.reused_tokens = 0  # prompt tokens that the prefix cache had
        self.preemptions = 0

    def add(self, prompt_ids: list[int], key: Hashable, seeds: list[int], params: SamplingParams) -> None:
        """Queues a sample for each seed. ValueError: one sample alone would not fit into the cache."""
        n_blocks = len(self.blocks.ref_count) - 1
        n_tokens = len(prompt_ids) + params.max_new_tokens
        needed = -(-n_tokens // BLOCK_SIZE)
        if needed > n_blocks:
            raise ValueError(
                f"a prompt of {len(prompt_ids)} tokens and a response of up to {params.max_new_tokens} need {needed} "
                f"blocks of {BLOCK_SIZE} tokens; the whole cache has {n_blocks} (its size: kv_tokens)"
            )
        # Samples of a prompt start together: a few, so that they soon find free slots, and never more than fit.
        at_once = min(SAMPLES_AT_ONCE, self.max_slots, n_blocks - len(prompt_ids) // BLOCK_SIZE)
        if self.max_padded_tokens is not None:
            at_once = min(at_once, self.max_padded_tokens // (len(prompt_ids) + 1))
        at_once = max(1, at_once)
        for first in range(0, len(seeds), at_once):
            self.waiting.append(Sequence(key, first, list(prompt_ids), seeds[first : first + at_once], params))

    # -- prefill ---------------------------------------------------------------------------------------------------

    def schedule_prefill(self) -> list[Chunk]:
        """Returns what this step prefills. Only the last chunk may leave its sequence unfinished."""
        chunks = []
        budget = PREFILL_TOKENS
        n_slots = len(self.running)
        longest = self._longest()
        while budget > 0:
            sequence = self.prefilling or self._admit(n_slots, longest)
            if sequence is None:
                break
            ids = sequence.ids
            chunk = Chunk(sequence, sequence.computed, min(len(ids), sequence.computed + budget))
            sequence.computed = chunk.end
            # Cached already now: the next sequence of this very pass can read what this one writes in each layer.
            self.blocks.cache_prefix(ids[: chunk.end], sequence.blocks)
            chunks.append(chunk)
            budget -= chunk.end - chunk.start
            self.computed_tokens += chunk.end - chunk.start
            n_slots += len(sequence.seeds)
            longest = max(longest, len(ids) + 1)
            self.prefilling = sequence if chunk.end < len(ids) else None
        return chunks

    def _admit(self, n_slots: int, longest: int) -> Sequence | None:
        """Gives the next waiting sequence its blocks; None if it has to wait. n_slots, longest: of those before it."""
        if not self.waiting:
            return None
        sequence = self.waiting[0]
        ids = sequence.ids
        n_samples = len(sequence.seeds)
        if n_slots + n_samples > self.max_slots or not self._fits(n_slots + n_samples, max(longest, len(ids) + 1)):
            return None
        cached = self.blocks.lookup(ids[:-1])  # the last token is always computed, for its logits
        n_new = len(ids) // BLOCK_SIZE - len(cached)
        n_free = len(self.blocks.free) - sum(block in self.blocks.free for block in cached)
        spare = n_slots // 4  # for running samples to grow into; without it the newcomer would soon be preempted
        if n_new + n_samples + spare > n_free:
            return None
        self.blocks.share(cached)
        sequence.blocks = cached + self.blocks.allocate(n_new)
        sequence.tail_blocks = self.blocks.allocate(n_samples)
        sequence.computed = len(cached) * BLOCK_SIZE
        sequence.admission = next(self.admissions)
        self.reused_tokens += sequence.computed
        return self.waiting.popleft()

    def fork(self, prefilled: list[Sequence]) -> list[tuple[int, int]]:
        """Puts each sample of prefilled sequences into a slot. Samples share the full blocks of their prompt.

        Returns (source, target) of the blocks to be copied: the last one of a prompt, where it is not full.
        """
        copies = []
        for sequence in prefilled:
            first_tail = sequence.tail_blocks[0]
            if len(sequence.ids) % BLOCK_SIZE:
                copies += [(first_tail, tail) for tail in sequence.tail_blocks[1:]]
            self.blocks.share(sequence.blocks * (len(sequence.seeds) - 1))
            for i, (seed, tail) in enumerate(zip(sequence.seeds, sequence.tail_blocks)):
                sample = replace(
                    sequence,
                    index=sequence.index + i,
                    seeds=[seed],
                    top_logprobs=list(sequence.top_logprobs),
                    blocks=[*sequence.blocks, tail],
                    tail_blocks=[],
                    n_sampled=len(sequence.response) + 1,  # its next token comes from the logits of the prefill
                )
                self.running.append(sample)
        return copies

    # -- decode ----------------------------------------------------------------------------------------------------

    def schedule_decode(self) -> list[NewBlock] | None:
        """Gives each running sample room for one token more. None: not enough room, something has to go first."""
        full = [slot for slot, sample in enumerate(self.running) if sample.length == sample.allocated_tokens]
        if len(full) > len(self.blocks.free) or not self._fits(len(self.running), self._longest()):
            return None
        new_blocks = []
        for slot, block in zip(full, self.blocks.allocate(len(full))):
            new_blocks.append(NewBlock(slot, len(self.running[slot].blocks), block))
            self.running[slot].blocks.append(block)
        return new_blocks

    def youngest(self) -> int:
        """Returns the slot of the sample that was admitted last, the first to be preempted."""
        return max(range(len(self.running)), key=lambda slot: self.running[slot].admission)

    def requeue(self, sequence: Sequence) -> None:
        """Preempts a sequence that no longer has a slot: it is next in turn, and will be computed again."""
        self._free_blocks(sequence)
        self.waiting.appendleft(sequence)
        self.preemptions += 1

    def requeue_prefilling(self) -> bool:
        """Preempts the sequence that is being prefilled, if there is one; none is younger."""
        if self.prefilling is None:
            return False
        self.requeue(self.prefilling)
        self.prefilling = None
        return True

    def remove(self, responses: dict[int, list[int]], failed: Collection[int] = ()) -> list[tuple[int, int]]:
        """Frees slots; the last slots move into the holes. responses: {slot: ids that its sample has drawn}.

        The blocks stay in the prefix cache, except those of `failed` slots, which may hold NaN.
        Returns the moves as (source slot, target slot).
        """
        for slot, response in responses.items():
            sample = self.running[slot]
            if slot in failed:
                self.blocks.evict(sample.blocks)
            else:
                self.blocks.cache_prefix((sample.prompt_ids + response)[:-1], sample.blocks)  # see Sequence.length
            self._free_blocks(sample)
        n_left = len(self.running) - len(responses)
        holes = [slot for slot in responses if slot < n_left]
        sources = [slot for slot in range(n_left, len(self.running)) if slot not in responses]
        for source, hole in zip(sources, holes):
            self.running[hole] = self.running[source]
        del self.running[n_left:]
        return list(zip(sources, holes))

    def cancel(self, key: Hashable) -> list[int]:
        """Drops what waits or is prefilled under a key. Returns the slots of its running samples, still to be freed."""
        self.waiting = deque(sequence for sequence in self.waiting if sequence.key != key)
        if self.prefilling is not None and self.prefilling.key == key:
            self._free_blocks(self.prefilling)
            self.prefilling = None
        return [slot for slot, sample in enumerate(self.running) if sample.key == key]

    def _free_blocks(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.blocks + sequence.tail_blocks)
        sequence.blocks = []
        sequence.tail_blocks = []
        sequence.computed = 0

    def _longest(self) -> int:
        """Tokens of the longest running sample after the next step."""
        return 1 + max((sample.length for sample in self.running), default=0)

    def _fits(self, n_slots: int, longest: int) -> bool:
        return n_slots <= 1 or self.max_padded_tokens is None or n_slots * longest <= self.max_padded_tokens
