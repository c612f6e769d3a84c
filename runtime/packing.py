"""From rows to batches: the rows of a step, their shards on the ranks, and packing within a token budget."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model import Packed, SharedPrefix
from runtime.distributed import Ranks, all_gather, all_max, derive_seed
from trajectory import Trajectory


def count_steps(epochs: float, max_steps: int | None, n_rows: int, batch_size: int) -> tuple[int, int]:
    """-> steps of the whole run, which a schedule spans; the last one that is run (--max-steps).

    ValueError: not one step.
    """
    total = int(epochs * (n_rows // batch_size))
    if total < 1:
        raise ValueError(f"--epochs {epochs:g}: {n_rows} rows make less than one step of {batch_size}")
    return total, min(total, max_steps or total)


def batch_indices(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row indices of a step's batch: each epoch is a new permutation, whose last partial batch is dropped."""
    per_epoch = n_rows // batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(derive_seed("order", seed, epoch)))
    return order[place * batch_size : (place + 1) * batch_size].tolist()


@dataclass
class Batch:
    """Packed tokens and the S positions that are trained: `index[i]` is where `targets[i]` is predicted."""

    input_ids: torch.Tensor  # [T]
    context: Packed | SharedPrefix
    index: torch.Tensor  # [S]
    targets: torch.Tensor  # [S]
    counts: list[int]  # trained tokens of each sequence (of each suffix), in order; their sum is S


def pack(sequences: list[list[int]], trained: list[list[bool]], device: torch.device | str) -> Batch:
    """sequences: lists of ids; trained: per sequence a list of bools, which of its tokens are targets -> Batch.

    The first token of a sequence cannot be a target: nothing predicts it.
    """
    input_ids = torch.tensor([i for ids in sequences for i in ids])
    targets_at = torch.tensor([t for flags in trained for t in flags]).nonzero().squeeze(1)
    input_ids, index, targets = (t.to(device) for t in (input_ids, targets_at - 1, input_ids[targets_at]))
    return Batch(input_ids, Packed([len(s) for s in sequences], device), index, targets, [sum(f) for f in trained])


def pack_shared(prefixes: list, suffixes: list, trained: list, device: torch.device | str) -> Batch:
    """Sequences that begin alike, packed so that neighbours with the same prefix compute it once -> Batch.

    prefixes, suffixes: lists of ids, one each per sequence; trained: per sequence which of the suffix are targets.
    """
    input_ids, index, targets, groups = [], [], [], []
    for i, (prefix, suffix, flags) in enumerate(zip(prefixes, suffixes, trained, strict=True)):
        if i == 0 or prefix != prefixes[i - 1]:
            groups.append((len(prefix), []))
            input_ids += prefix
            last = len(input_ids) - 1  # predicts the first token of every suffix
        groups[-1][1].append(len(suffix))
        places = [last, *range(len(input_ids), len(input_ids) + len(suffix) - 1)]
        index += itertools.compress(places, flags)
        targets += itertools.compress(suffix, flags)
        input_ids += suffix
    input_ids, index, targets = (torch.tensor(x, device=device) for x in (input_ids, index, targets))
    return Batch(input_ids, SharedPrefix(groups, device), index, targets, [sum(f) for f in trained])


def balance(sizes: list[int], n_bins: int) -> list[list[int]]:
    """Indices of `sizes` in bins of nearly equal sums: the largest first, each into the emptiest bin (LPT rule)."""
    bins, filled = [[] for _ in range(n_bins)], [0] * n_bins
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = filled.index(min(filled))
        bins[emptiest].append(i)
        filled[emptiest] += sizes[i]
    return [sorted(b) for b in bins]


def shard(rows: list, sizes: list[int], ranks: Ranks) -> list:
    """This rank's shard of a step's rows, balanced by size, since every rank waits for the one with most tokens."""
    return [rows[i] for i in balance(sizes, ranks.world_size)[ranks.rank]]


def balance_prompts(trajectories: list[Trajectory], prompts_per_mini_batch: int, ranks: Ranks) -> list[Trajectory]:
    """Distributes whole prompts over the ranks, balanced by tokens within each mini-batch.

    Responses differ in length, and every rank waits for the one that has most to compute. Returns this rank's
    trajectories, ordered by prompt.
    """
    batch = sorted(all_gather(ranks, trajectories), key=lambda t: (t.prompt.index, t.key))
    groups = [list(group) for _, group in itertools.groupby(batch, key=lambda t: t.prompt.index)]
    mine: list[Trajectory] = []
    for _, mini_batch in itertools.groupby(groups, key=lambda group: group[0].prompt.index // prompts_per_mini_batch):
        prompts = list(mini_batch)
        sizes = [len(group[0].prompt.ids) + sum(len(t.response_ids) for t in group) for group in prompts]
        for i in balance(sizes, ranks.world_size)[ranks.rank]:
            mine += prompts[i]
    return mine


def per_token_flags(flags: list[bool], counts: list[int], device: torch.device) -> torch.Tensor:
    """Repeats the flag of each sequence for its tokens: bool [sum(counts)]."""
    return torch.repeat_interleave(torch.tensor(flags), torch.tensor(counts)).to(device)


def micro_batches(sizes: list[int], tokens_per_microbatch: int, ranks: Ranks) -> list[list[int]]:
    """Splits 0..n-1 into nearly equal parts of at most that many tokens (a larger one gets its own): lists of indices.

    Under FSDP every rank must run the same number of passes: all ranks make as many parts as the one that needs most.
    Some may stay empty, at the end; for these the caller runs `DUMMY` with weight zero.
    """
    parts, room = [], []  # first fit, largest first: never over the budget
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = next((b for b, left in enumerate(room) if sizes[i] <= left), None)
        if fits is None:
            parts.append([])
            room.append(tokens_per_microbatch)
            fits = -1
        parts[fits].append(i)
        room[fits] -= sizes[i]
    most = int(all_max(ranks, len(parts)))
    even = balance(sizes, most)
    if all(len(b) <= 1 or sum(sizes[i] for i in b) <= tokens_per_microbatch for b in even):
        parts = even
    return sorted((sorted(b) for b in parts + [[]] * (most - len(parts))), key=lambda b: (not b, b))


def shared_micro_batches(prefixes: list, suffixes: list, tokens_per_microbatch: int, ranks: Ranks) -> list[list[int]]:
    """The same for sequences of a prefix and a suffix: those with the same prefix (neighbours) stay together.

    A group that is over the budget is cut, and its prefix computed once in each part.
    """
    groups, sizes = [], []
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        if i == 0 or prefix != prefixes[i - 1] or sizes[-1] + len(suffix) > tokens_per_microbatch:
            groups.append([])
            sizes.append(len(prefix))
        groups[-1].append(i)
        sizes[-1] += len(suffix)
    parts = micro_batches(sizes, tokens_per_microbatch, ranks)
    return [[i for g in part for i in groups[g]] for part in parts]


def packed_micro_batches(
    prefixes: list, suffixes: list, trained: list | None, tokens_per_microbatch: int, ranks: Ranks
) -> Iterator[tuple[list[int], Batch | None]]:
    """`shared_micro_batches`, packed one after the other: yields (indices, Batch), for an empty one ([], None).

    trained: as in `pack_shared`; None: the whole of every suffix.
    """
    if trained is None:
        trained = [[True] * len(suffix) for suffix in suffixes]
    for indices in shared_micro_batches(prefixes, suffixes, tokens_per_microbatch, ranks):
        chosen = ([rows[i] for i in indices] for rows in (prefixes, suffixes, trained))
        yield indices, pack_shared(*chosen, ranks.device) if indices else None


DUMMY = ([0, 0], [False, True])  # stands for an empty micro-batch; its loss gets weight zero
