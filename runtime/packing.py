"""From rows to batches: the rows of a step, their shards on the ranks, and packing within a token budget."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from attention import Packed, SharedPrefix, to_device
from runtime.distributed import Ranks, all_max, derive_seed, print0

Masked = tuple[list[int], list[bool]]  # ids of a sequence, and which of them are learned
E = TypeVar("E")


def count_steps(epochs: float, max_steps: int | None, n_rows: int, batch_size: int) -> tuple[int, int]:
    """Returns the steps of the whole run, which a schedule spans, and the last step to run (--max-steps).

    ValueError: the rows do not make one step.
    """
    total = int(epochs * (n_rows // batch_size))
    if total < 1:
        smaller = "; set a smaller --batch-size (ppo_cpe.py: --prompts-per-step)" if n_rows < batch_size else ""
        raise ValueError(f"--epochs {epochs:g}: {n_rows} rows make less than one step of {batch_size}{smaller}")
    return total, min(total, max_steps or total)


def batch_indices(n_rows: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Row indices of a step's batch: each epoch is a new permutation, whose last partial batch is dropped."""
    per_epoch = n_rows // batch_size
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(derive_seed("order", seed, epoch)))
    return order[position * batch_size : (position + 1) * batch_size].tolist()


def within_length(
    examples: list[E], longest: Callable[[E], int], max_length: int, path: str, batch_size: int = 1
) -> list[E]:
    """Examples of at most max_length tokens; prints how many are left out. ValueError: too few are left.

    longest: tokens of an example's longest sequence. max_length: the lower of --max-length and the model's positions.
    """
    kept = [example for example in examples if longest(example) <= max_length]
    n_left_out = len(examples) - len(kept)
    limit = f"{max_length} tokens, the lower of --max-length and the model's positions"
    print0(f"{len(kept)} rows from {path}; {n_left_out} left out (over {limit})")
    if not kept:
        raise ValueError(f"{path}: no row is within {limit}")
    if len(kept) < batch_size:
        raise ValueError(f"{path}: {len(kept)} usable rows, fewer than --batch-size {batch_size}")
    return kept


def step_shard(
    examples: list[E], size: Callable[[E], int], batch_size: int, step: int, seed: int, ranks: Ranks
) -> list[E]:
    """This rank's examples of a step, balanced by size (tokens of an example)."""
    batch = [examples[i] for i in batch_indices(len(examples), batch_size, step, seed)]
    return shard(batch, [size(example) for example in batch], ranks)


def split(examples: list[E], size: Callable[[E], int], tokens_per_microbatch: int, ranks: Ranks) -> list[list[E]]:
    """`micro_batches` of examples."""
    parts = micro_batches([size(example) for example in examples], tokens_per_microbatch, ranks)
    return [[examples[i] for i in part] for part in parts]


@dataclass
class Batch:
    """Packed tokens and the S positions that are trained: `index[i]` is where `targets[i]` is predicted."""

    input_ids: torch.Tensor  # [T]
    context: Packed | SharedPrefix
    index: torch.Tensor  # [S]
    targets: torch.Tensor | None  # [S]; None where values are computed, not log-probs
    counts: list[int]  # trained tokens of each sequence (of each suffix), in order; their sum is S


def pack(sequences: Sequence[list[int]], loss_masks: Sequence[list[bool]], device: torch.device | str) -> Batch:
    """Packs sequences of ids. loss_masks: which tokens of each sequence are targets.

    The first token of a sequence cannot be a target: nothing predicts it.
    """
    flat_ids = torch.tensor([i for ids in sequences for i in ids])
    target_positions = torch.tensor([t for mask in loss_masks for t in mask]).nonzero().squeeze(1)
    return Batch(
        input_ids=flat_ids.to(device),
        context=Packed([len(ids) for ids in sequences], device),
        index=(target_positions - 1).to(device),
        targets=flat_ids[target_positions].to(device),
        counts=[sum(mask) for mask in loss_masks],
    )


def pack_shared(
    prefixes: Sequence[list[int]],
    suffixes: Sequence[list[int]],
    loss_masks: Sequence[list[bool]],
    device: torch.device | str,
) -> Batch:
    """Packs sequences of a prefix and a suffix. Neighbours with the same prefix compute it once.

    loss_masks: which tokens of each suffix are targets.
    """
    input_ids: list[int] = []
    index: list[int] = []
    targets: list[int] = []
    groups: list[tuple[int, list[int]]] = []  # length of a prefix, lengths of its suffixes
    for i, (prefix, suffix, mask) in enumerate(zip(prefixes, suffixes, loss_masks, strict=True)):
        if i == 0 or prefix != prefixes[i - 1]:
            groups.append((len(prefix), []))
            input_ids += prefix
            last = len(input_ids) - 1  # predicts the first token of every suffix
        groups[-1][1].append(len(suffix))
        predicted_at = [last, *range(len(input_ids), len(input_ids) + len(suffix) - 1)]
        index += itertools.compress(predicted_at, mask)
        targets += itertools.compress(suffix, mask)
        input_ids += suffix
    return Batch(
        input_ids=torch.tensor(input_ids, device=device),
        context=SharedPrefix(groups, device),
        index=torch.tensor(index, device=device),
        targets=torch.tensor(targets, device=device),
        counts=[sum(mask) for mask in loss_masks],
    )


def balance(sizes: list[int], n_bins: int) -> list[list[int]]:
    """Indices of `sizes` in bins of nearly equal sums: the largest first, each into the emptiest bin (LPT rule)."""
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    totals = [0] * n_bins
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = totals.index(min(totals))
        bins[emptiest].append(i)
        totals[emptiest] += sizes[i]
    return [sorted(b) for b in bins]


def shard(rows: list, sizes: list[int], ranks: Ranks) -> list:
    """This rank's shard of a step's rows, balanced by size, since every rank waits for the one with most tokens."""
    return [rows[i] for i in balance(sizes, ranks.world_size)[ranks.rank]]


def per_token_flags(flags: list[bool], counts: list[int], device: torch.device) -> torch.Tensor:
    """Repeats the flag of each sequence for its tokens: bool [sum(counts)]."""
    return to_device(torch.repeat_interleave(torch.tensor(flags), torch.tensor(counts)), device)


def micro_batches(sizes: list[int], tokens_per_microbatch: int, ranks: Ranks) -> list[list[int]]:
    """Splits 0..n-1 into nearly equal parts of at most that many tokens (a larger item gets its own): lists of indices.

    Under FSDP every rank must run the same number of passes, so all ranks make as many parts as the one that needs
    most. Parts at the end may be empty; the caller then runs `DUMMY` with weight zero.
    """
    parts: list[list[int]] = []
    tokens_left: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):  # first fit, largest first
        fitting = [part for part, left in enumerate(tokens_left) if sizes[i] <= left]
        if not fitting:
            parts.append([])
            tokens_left.append(tokens_per_microbatch)
        part = fitting[0] if fitting else len(parts) - 1
        parts[part].append(i)
        tokens_left[part] -= sizes[i]
    n_parts = int(all_max(ranks, len(parts)))
    even = balance(sizes, n_parts)
    if all(len(part) <= 1 or sum(sizes[i] for i in part) <= tokens_per_microbatch for part in even):
        parts = even
    parts += [[] for _ in range(n_parts - len(parts))]
    return sorted((sorted(part) for part in parts), key=lambda part: (not part, part))


def shared_micro_batches(
    prefixes: Sequence[list[int]], suffixes: Sequence[list[int]], tokens_per_microbatch: int, ranks: Ranks
) -> list[list[int]]:
    """`micro_batches` of sequences with a prefix and a suffix: neighbours with the same prefix stay together.

    A group over the budget is cut, and its prefix is computed once in each part.
    """
    groups: list[list[int]] = []
    sizes: list[int] = []
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        if i == 0 or prefix != prefixes[i - 1] or sizes[-1] + len(suffix) > tokens_per_microbatch:
            groups.append([])
            sizes.append(len(prefix))
        groups[-1].append(i)
        sizes[-1] += len(suffix)
    parts = micro_batches(sizes, tokens_per_microbatch, ranks)
    return [[i for group in part for i in groups[group]] for part in parts]


def packed_micro_batches(
    prefixes: Sequence[list[int]],
    suffixes: Sequence[list[int]],
    loss_masks: Sequence[list[bool]] | None,
    tokens_per_microbatch: int,
    ranks: Ranks,
) -> Iterator[tuple[list[int], Batch | None]]:
    """Packs `shared_micro_batches` one after the other: yields (indices, Batch), and ([], None) for an empty one.

    loss_masks: as in `pack_shared`; None: all tokens of every suffix.
    """
    if loss_masks is None:
        loss_masks = [[True] * len(suffix) for suffix in suffixes]
    for indices in shared_micro_batches(prefixes, suffixes, tokens_per_microbatch, ranks):
        if not indices:
            yield [], None
            continue
        part_prefixes = [prefixes[i] for i in indices]
        part_suffixes = [suffixes[i] for i in indices]
        part_masks = [loss_masks[i] for i in indices]
        yield indices, pack_shared(part_prefixes, part_suffixes, part_masks, ranks.device)


DUMMY: Masked = ([0, 0], [False, True])  # stands for an empty micro-batch; its loss gets weight zero
