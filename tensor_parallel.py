"""Tensor parallelism (Megatron-LM, arXiv 1909.08053): several ranks compute as one engine.

A rank has some heads of each attention layer and some columns of each MLP. The outputs of both are summed over the
ranks, so the residual stream is the same on all. Embedding, norms and LM head are held whole by each, but it computes
the logits of a part of the vocabulary only.

All ranks of an engine run the same scheduler on the same requests. A token is drawn by one rank and sent to the others,
so that they never disagree.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from model_config import Config


@dataclass(frozen=True)
class EngineRanks:
    """The ranks that share an engine, with this one's place among them."""

    group: dist.ProcessGroup | None  # None: for a plan
    rank: int
    size: int

    def gather(self, value: Any) -> list:
        """The value of each rank."""
        values = [None] * self.size
        dist.all_gather_object(values, value, self.group)
        return values

    def gather_tensors(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of each rank, all of one shape."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(tensors, tensor, group=self.group)
        return tensors

    def from_first(self, value: Any) -> Any:
        """The value of the first rank."""
        values = [value]
        dist.broadcast_object_list(values, group=self.group, group_src=0, device=torch.device("cpu"))
        return values[0]


def part_of(n: int, rank: int, size: int) -> slice:
    """A rank's part of n things. Parts differ in size by one at most."""
    return slice(n * rank // size, n * (rank + 1) // size)


class ModelPart:
    """This rank's part of a model. config: that of the part, with its numbers of heads and columns."""

    def __init__(self, config: Config, ranks: EngineRanks):
        """ValueError: the key-value heads can't be distributed."""
        n_kv = config.num_key_value_heads
        queries_per_kv = config.num_attention_heads // n_kv
        copies = max(1, ranks.size // n_kv)  # ranks that have the same key-value head, and each a part of its queries
        if n_kv * copies % ranks.size or copies > queries_per_kv:
            raise ValueError(
                f"--tensor-parallel {ranks.size}: the model has {config.num_attention_heads} heads and {n_kv} "
                f"key-value heads; expected a divisor of {n_kv}, or a multiple up to {config.num_attention_heads}"
            )
        self.ranks = ranks
        self.kv_heads = part_of(n_kv, ranks.rank // copies, ranks.size // copies)
        queries = range(self.kv_heads.start * queries_per_kv, self.kv_heads.stop * queries_per_kv)
        queries = queries[part_of(len(queries), ranks.rank % copies, copies)]
        self.heads = slice(queries.start, queries.stop)
        self.columns = part_of(config.intermediate_size, ranks.rank, ranks.size)
        vocabularies = [part_of(config.vocab_size, rank, ranks.size) for rank in range(ranks.size)]
        self.vocabulary = vocabularies[ranks.rank]  # the ids whose logits this rank computes
        self.widths = [ids.stop - ids.start for ids in vocabularies]  # of all ranks
        self.config = replace(
            config,
            num_attention_heads=len(queries),
            num_key_value_heads=self.kv_heads.stop - self.kv_heads.start,
            intermediate_size=self.columns.stop - self.columns.start,
        )

    def of(self, name: str, full: Tensor) -> Tensor:
        """This rank's part of a parameter of the whole model."""
        *_, module, kind = name.split(".")
        heads = self.kv_heads if module in ("k_proj", "v_proj") else self.heads
        rows = slice(heads.start * self.config.head_dim, heads.stop * self.config.head_dim)
        if module in ("gate_proj", "up_proj", "down_proj"):
            rows = self.columns
        if module in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") and kind != "lora_A":
            return full[rows]
        if module in ("o_proj", "down_proj"):
            if kind in ("weight", "lora_A"):
                return full[:, rows]
            if kind == "bias" and self.ranks.rank > 0:  # counts once in the sum
                return torch.zeros_like(full)
        return full

    def sum_outputs(self, model: nn.Module) -> None:
        """Sums what attention and MLP add to the residual stream over the ranks, whenever the model runs."""

        def add_up(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            dist.all_reduce(output, group=self.ranks.group)

        for name, module in model.named_modules():
            if name.endswith(("o_proj", "down_proj")):
                module.register_forward_hook(add_up)

    def whole_logits(self, logits: Tensor) -> Tensor:
        """All logits [n, V] on each rank, from those of its own part of the vocabulary."""
        padded = F.pad(logits, (0, max(self.widths) - logits.shape[1]))
        parts = self.ranks.gather_tensors(padded)
        return torch.cat([part[:, :width] for part, width in zip(parts, self.widths)], 1)

    def draw(self, sample: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, *settings: Tensor) -> Any:
        """sample(logits, *settings) -> (tokens, log-probs), each [n]. Each rank draws for some of the rows.

        logits: [n, V / ranks], of this rank's part of the vocabulary. settings: [n] each.
        """
        size = self.ranks.size
        n, width = logits.shape
        n_mine = -(-n // size)
        sent = F.pad(logits, (0, 0, 0, n_mine * size - n))
        sizes = [n_mine * width for width in self.widths]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent.flatten(), sizes, [n_mine * width] * size, group=self.ranks.group)
        mine = torch.cat([part.view(n_mine, -1) for part in received.split(sizes)], 1)  # [n_mine, V]
        rows = slice(n_mine * self.ranks.rank, n_mine * (self.ranks.rank + 1))
        drawn = sample(mine, *(F.pad(values, (0, n_mine * size - n), value=1)[rows] for values in settings))
        return [torch.cat(self.ranks.gather_tensors(values))[:n] for values in drawn]
