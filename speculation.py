"""Speculative decoding from a draft: a text that a response will repeat in parts, such as the answer that an edit
rewrites (prompt-lookup decoding, without a second model).

    proposals, counts = propose(rows, width, most)
    owner, place = lay_out(counts)              # the tokens of the step; the model samples one behind each of them
    write_down(rows, proposals, owner, place, tokens, logprobs, stop_ids)

Where the newest tokens of a response stand in its draft, what follows there is proposed: up to DRAFT_TOKENS, which run
through the model behind the newest token in one step. A token is sampled at each of these places, with the random
number that its place has in any case (kernels/sampling.py). As long as the samples are what was proposed, they are what
would have been sampled one by one; the first that differs is the right one as well, and what stands behind it is
dropped. So no response depends on its draft, beyond the rounding of matrix products of other sizes.

rows: the tensors of the engine's rows, of which these are used here: token, the newest, whose keys come with the next
step; position, tokens sampled so far; length, tokens in the cache; ids and logprobs, what was sampled; limit; done;
draft and draft_length. Nothing here reads a number on the host, unless `lay_out` is to fit all.
"""

import torch

DRAFT_TOKENS = 4  # proposed at once: in the edits of the tiny recipe more would mostly be computed in vain


def propose(rows: dict[str, torch.Tensor], width: int, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the newest two tokens of each row in its draft, or the newest one where the two do not stand there.

    width: of the drafts, that of the longest or more; most: tokens to propose, up to DRAFT_TOKENS
    -> int64 [R, DRAFT_TOKENS], how many of them hold: int64 [R].
    """
    draft, length = rows["draft"][:, :width], rows["draft_length"]
    previous = rows["ids"].gather(1, (rows["position"] - 2).clamp(min=0)[:, None])
    found = (draft == rows["token"][:, None]) & (torch.arange(width, device=draft.device) < length[:, None])
    found = found.int()
    found[:, 1:] += found[:, 1:] * (draft[:, :-1] == previous)
    best, at = found.max(1)
    room = (rows["limit"] - rows["position"] - 1) * ~rows["done"]
    counts = (length - 1 - at).minimum(room).clamp(0, most) * (best > 0)
    after = at[:, None] + 1 + torch.arange(DRAFT_TOKENS, device=draft.device)
    return draft.gather(1, after.clamp(max=width - 1)), counts


def lay_out(counts: torch.Tensor, n_extra: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens of a step: the newest one of each row, then the proposals of all rows.

    counts: int64 [R], proposals of each row. n_extra: their number or more; None: their number, read on the host.
    -> of each token its row and its place behind the newest one, int64 [R + n_extra]. Where there are fewer, the row is
    R, the place 0.
    """
    rows, ends = torch.arange(len(counts), device=counts.device), counts.cumsum(0)
    i = torch.arange(int(ends[-1]) if n_extra is None else n_extra, device=counts.device)
    owner = torch.searchsorted(ends, i, right=True)
    place = (i - torch.cat([ends - counts, ends[-1:]])[owner] + 1) * (owner < len(counts))
    return torch.cat([rows, owner]), torch.cat([torch.zeros_like(rows), place])


def ends(
    tokens: torch.Tensor, logprobs: torch.Tensor, n_sampled: torch.Tensor, limit: torch.Tensor, stop_ids: torch.Tensor
) -> torch.Tensor:
    """Whether a response ends with a token, its n_sampled-th (from 1); bool, of the shape of all but stop_ids."""
    return (tokens[..., None] == stop_ids).any(-1) | (n_sampled >= limit) | logprobs.isnan()


def write_down(
    rows: dict[str, torch.Tensor],
    proposals: torch.Tensor,
    owner: torch.Tensor,
    place: torch.Tensor,
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    stop_ids: torch.Tensor,
) -> None:
    """Adds to each row what holds of the tokens that were sampled behind those of `lay_out`: one more than there were
    right proposals, fewer if the response ends among them, none for a row that was done. tokens: int64 [T]; logprobs:
    fp32 [T]."""
    shape = len(proposals), 1 + DRAFT_TOKENS  # a row's tokens behind one another, -1 where there is none
    tokens = torch.full(shape, -1, device=tokens.device).index_put_((owner, place), tokens)
    logprobs = torch.zeros(shape, device=tokens.device).index_put_((owner, place), logprobs)
    positions = rows["position"][:, None] + torch.arange(1 + DRAFT_TOKENS, device=tokens.device)
    ended = ends(tokens, logprobs, positions + 1, rows["limit"][:, None], stop_ids)
    goes_on = (tokens[:, :-1] == proposals) & (tokens[:, 1:] >= 0) & ~ended[:, :-1]
    last = goes_on.long().cumprod(1).sum(1, keepdim=True)  # [R, 1], the place of the last token that holds
    rows["ids"].scatter_(1, positions, tokens)  # nobody reads what is behind the next position
    rows["logprobs"].scatter_(1, positions, logprobs)
    rows["token"].copy_(tokens.gather(1, last)[:, 0].clamp(min=0))  # the empty row may have sampled none
    n_new = (last[:, 0] + 1) * ~rows["done"]
    rows["position"] += n_new
    rows["length"] += n_new * rows["active"]
    rows["done"] |= ended.gather(1, last)[:, 0]
