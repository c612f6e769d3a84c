"""Attention contexts: which tokens of a packed tensor attend to which. `Transformer.forward` takes one as an argument.

- `Packed`: each token attends to its own sequence. Training and scoring.
- `SharedPrefix`: several sequences share the tokens of their common prefix. Training and scoring.
- The engine has its own: prefill and decoding against a paged KV cache (engine/).
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from kernels.gather_rows import gather_rows
from kernels.rope_kv import apply_rope
from kernels.varlen_attention import varlen_attention


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copies a host tensor to the device. For a GPU it is pinned first, so that the host doesn't wait for the copy."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class AttentionContext(Protocol):
    """Which tokens a token attends to, and where its keys and values are stored."""

    position_ids: Tensor  # int64 [T], for RoPE

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D], before RoPE; cos and sin [T, 1, D] -> [T, Hq, D]."""
        ...


class SeqLens:
    """Lengths of the sequences in a packed tensor, in tokens and in order."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        self.lengths = [int(n) for n in lengths]
        self.max_seqlen = max(self.lengths)
        cu_seqlens = torch.tensor([0] + self.lengths).cumsum(0)  # where each sequence starts; the last entry is T
        self.cu_seqlens = to_device(cu_seqlens.int(), device)


class Packed(SeqLens):
    """Packed sequences: each token attends to its own sequence, up to itself."""

    def __init__(self, lengths: Iterable[int], device: torch.device | str = "cpu"):
        super().__init__(lengths, device)
        self.position_ids = to_device(torch.cat([torch.arange(n) for n in self.lengths]), device)  # [T]
        self.attention_pairs = count_attention_pairs(self, self)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return varlen_attention(apply_rope(q, cos, sin), apply_rope(k, cos, sin), v, self, self)


class SharedPrefix:
    """Packed groups: a prefix, stored once, followed by n suffixes that do not attend to one another.

    groups: (tokens of the prefix, may be 0; tokens of each suffix, at least 1). Positions in every suffix continue from
    the end of the prefix. The queries are P, S1, ..., Sn. The keys of a suffix are those of its prefix and its own, so
    the keys are P, P S1, ..., P Sn.
    """

    def __init__(self, groups: Iterable[tuple[int, list[int]]], device: torch.device | str = "cpu"):
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        positions: list[Tensor] = []
        key_index: list[Tensor] = []
        start = 0
        for prefix, suffixes in groups:
            if len(suffixes) == 1:  # nothing to share: one plain causal sequence
                prefix, suffixes = prefix + suffixes[0], []
            prefix_index = torch.arange(start, start + prefix)
            if prefix:
                query_lengths.append(prefix)
                key_lengths.append(prefix)
            positions.append(torch.arange(prefix))
            key_index.append(prefix_index)
            start += prefix
            for n in suffixes:
                query_lengths.append(n)
                key_lengths.append(prefix + n)
                positions.append(torch.arange(prefix, prefix + n))
                key_index += [prefix_index, torch.arange(start, start + n)]
                start += n
        self.queries = SeqLens(query_lengths, device)
        self.keys = SeqLens(key_lengths, device)
        self.position_ids = to_device(torch.cat(positions), device)  # [T]
        self.key_index = to_device(torch.cat(key_index), device)  # [Tk]
        self.attention_pairs = count_attention_pairs(self.queries, self.keys)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        shape = k.shape[1:]
        k = gather_rows(k.flatten(1), self.key_index).unflatten(1, shape)  # [Tk, Hkv, D]
        v = gather_rows(v.flatten(1), self.key_index).unflatten(1, shape)
        return varlen_attention(q, k, v, self.queries, self.keys)


def count_attention_pairs(queries: SeqLens, keys: SeqLens) -> int:
    """Number of (query, key) pairs that causal attention computes, over all sequences."""
    return sum(q * k - q * (q - 1) // 2 for q, k in zip(queries.lengths, keys.lengths))
