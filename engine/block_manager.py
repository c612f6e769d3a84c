"""Blocks of the paged KV cache: reference counts, and full blocks found again by their tokens. Host only."""

import itertools
from collections.abc import Iterable

BLOCK_SIZE = 16  # tokens


class BlockManager:
    """Allocates blocks and keeps the prefix cache.

    A free block keeps its tokens, and `lookup` finds them, until it is allocated again; the block that has been free
    for longest goes first. Block 0 is never allocated: padding slots of a CUDA graph write into it.
    """

    def __init__(self, n_blocks: int):
        self.ref_count = [0] * n_blocks
        self.free = dict.fromkeys(range(1, n_blocks))  # an ordered set, the next to be allocated first
        # A cached block is known by its tokens and the prefix id of the block before it, which stands for all tokens up
        # to there. Prefix ids are never used twice, unlike blocks.
        self.prefix_cache: dict[tuple[int, tuple[int, ...]], int] = {}  # (prefix id, tokens) -> block
        self.cache_key: dict[int, tuple[int, tuple[int, ...]]] = {}  # block -> its key in prefix_cache
        self.prefix_id: dict[int, int] = {}  # block -> prefix id of its last token
        self.new_ids = itertools.count(1)

    def allocate(self, n: int) -> list[int]:
        """Returns n free blocks with a reference count of 1. The caller checks that there are as many."""
        blocks = list(itertools.islice(self.free, n))
        assert len(blocks) == n, f"{n} blocks wanted, {len(blocks)} free"
        self.evict(blocks)
        for block in blocks:
            del self.free[block]
            self.ref_count[block] = 1
        return blocks

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.free.pop(block, None)
            self.ref_count[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):  # the end of a sequence is reused before its beginning
            self.ref_count[block] -= 1
            if self.ref_count[block] == 0:
                self.free[block] = None

    def lookup(self, ids: list[int]) -> list[int]:
        """Returns the cached blocks that hold the beginning of `ids`."""
        blocks = []
        prefix_id = 0
        for start in range(0, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE):
            block = self.prefix_cache.get((prefix_id, tuple(ids[start : start + BLOCK_SIZE])))
            if block is None:
                break
            blocks.append(block)
            prefix_id = self.prefix_id[block]
        return blocks

    def cache_prefix(self, ids: list[int], blocks: list[int]) -> None:
        """Adds the full blocks of a sequence to the prefix cache; `ids` are the tokens that the blocks hold."""
        prefix_id = 0
        for block, start in zip(blocks, range(0, len(ids) - BLOCK_SIZE + 1, BLOCK_SIZE)):
            key = (prefix_id, tuple(ids[start : start + BLOCK_SIZE]))
            if key not in self.prefix_cache:
                self.evict([block])
                self.prefix_cache[key] = block
                self.cache_key[block] = key
                self.prefix_id[block] = next(self.new_ids)
            prefix_id = self.prefix_id[self.prefix_cache[key]]

    def evict(self, blocks: Iterable[int]) -> None:
        """Removes blocks from the prefix cache."""
        for block in blocks:
            if block in self.cache_key:
                del self.prefix_cache[self.cache_key.pop(block)]
                del self.prefix_id[block]

    def evict_all(self) -> None:
        """Empties the prefix cache. Low blocks go first from then on, so that memory once touched is used again."""
        self.evict(list(self.cache_key))
        self.free = dict.fromkeys(sorted(self.free))
