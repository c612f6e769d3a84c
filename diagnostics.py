"""What edits, rewards and judges do: functions that the stages call in a line each."""

import dataclasses
import difflib
import math
import os
import random
import re
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch

from chat import Chat
from judges import ask_all
from judges.base import Judge
from model import save_pretrained
from prompts import DIMENSIONS
from runtime import checkpoints, runs, training
from runtime.distributed import Ranks, all_gather, all_sum, derive_seed, moments, print0
from runtime.runs import Stats


def words_of(text: str) -> list[str]:
    """Words of Latin letters and digits; of other scripts, which may have no spaces, single characters."""
    return re.findall(r"[a-z0-9]+|\w", text.casefold())


def leaves(value: Any) -> list[str]:
    """The texts at the ends of any JSON value: the values of a profile, without its keys."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [str(value)]


def recited(persona: Any, answer: str) -> float:
    """Share of the profile's values (any JSON) whose words an answer repeats, in their order."""
    said = f" {' '.join(words_of(answer))} "
    values = [f" {' '.join(words)} " for words in map(words_of, leaves(persona)) if words]
    return sum(value in said for value in values) / len(values) if values else 0.0


def distinct(answers: list[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of some answers (Li et al. 2016): low where answers are all alike."""
    grams = [tuple(words[i : i + n]) for words in map(words_of, answers) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def agreement(labels: Sequence, found: Sequence) -> dict[str, float | None]:
    """How judgements agree with labels: lists of Judgement, in `found` None where none parsed.

    -> judged (number), parsed (share), score_correlation (Pearson, of the weighted score),
    exact_DIMENSION (shares); the last two over the parsed ones, None where they do not exist
    (nothing parsed, no variance).
    """
    pairs = [(label, own) for label, own in zip(labels, found, strict=True) if own is not None]
    result = {"judged": len(labels), "parsed": len(pairs) / len(labels)}
    scores = np.array([[j.score() for j in pair] for pair in pairs]).reshape(-1, 2)  # [N, 2]
    defined = len(pairs) > 1 and bool((scores.std(0) > 0).all())
    result["score_correlation"] = float(np.corrcoef(scores.T)[0, 1]) if defined else None
    for name in DIMENSIONS:
        same = [getattr(label, name) == getattr(own, name) for label, own in pairs]
        result[f"exact_{name}"] = sum(same) / len(same) if same else None
    return result


# -- what a step of ppo_cpe.py is described by (t, judged, ...: its trajectories) --------------------------------------


DISTINCT_OF = 32  # answers, per rank: distinct pairs get rarer with the number of answers that are pooled


def describe_rollout(judged: list, lost: dict, selected: set | None, stats: Stats, prefix: str = "") -> None:
    """Rewards, gains, lengths and scores of originals and edits into stats (docs/metrics.md)."""

    def add(name, value):
        stats.add(prefix + name, torch.tensor(value, dtype=torch.float64))

    def answers_of(kind):  # the first samples of each prompt first: as many whatever the number of samples
        found = [t for t in judged if bool(t.parent) == (kind == "edit")]
        return [t.answer for t in sorted(found, key=lambda t: (t.sample_id, t.place))[:DISTINCT_OF]]

    for kind in ("original", "edit"):
        answers = answers_of(kind)
        if answers:
            add(f"{kind}/distinct_2", distinct(answers, 2))
    for t in lost["originals"] + lost["edits"]:  # whom failed judgements hit
        add("lost/length", len(t.response_ids))
        add("lost/recited", recited(t.row["persona"], t.answer))
    for t in judged:
        kind = "edit" if t.parent else "original"
        add(f"{kind}/reward", t.reward)
        add(f"{kind}/length", len(t.response_ids))
        add(f"{kind}/truncated", t.truncated)
        add(f"{kind}/recited", recited(t.row["persona"], t.answer))
        if t.judgement:
            for name in DIMENSIONS:
                add(f"{kind}/{name}", getattr(t.judgement, name))
        if t.parent:
            add("edit/gain", t.reward - t.parent.reward)
            add("edit/improved", t.reward > t.parent.reward)
            add("edit/worse", t.reward < t.parent.reward)
            add("edit/unchanged", t.answer == t.parent.answer)
            if t.judgement:
                for name in DIMENSIONS:
                    add(f"edit/gain_{name}", getattr(t.judgement, name) - getattr(t.parent.judgement, name))
            if selected is not None:
                add("edit/selected", t.key[:2] in selected)


def rollout_rows(judged: list, selected: Collection = ()) -> list[dict]:
    """One JSON row per original, its edit inside."""
    edit_of = {t.key[:2]: t for t in judged if t.parent}

    def describe(t):
        scores = dataclasses.asdict(t.judgement) if t.judgement else {}
        return dict(answer=t.answer, reward=t.reward, **scores, n_tokens=len(t.response_ids), truncated=t.truncated)

    rows = []
    for t in judged:
        if t.parent is None:
            e = edit_of.get(t.key[:2])
            edit = e and describe(e) | {"selected": e.key[:2] in selected}
            audit = {"audit": t.audit} if t.audit else {}
            rows.append({**t.row, "sample_id": t.sample_id, **describe(t), **audit, "edit": edit})
    return rows


def lost_rows(lost: dict) -> list[dict]:
    """One JSON row per response that left the batch, with `left`, why; of an edit as `edit`, its original outside."""
    rows = []
    for name, trajectories in lost.items():
        for t in trajectories:
            left = "cut off at --max-new-tokens" if name == "truncated" else t.left or "no judgement"
            response = dict(
                answer=t.answer, reward=None, n_tokens=len(t.response_ids), truncated=t.truncated, left=left
            )
            row = {**t.row, "sample_id": t.sample_id}
            rows.append(row | ({"edit": response} if t.parent else {**response, "edit": None}))
    return rows


def keep_tokens(trajectories, counts, logprobs, edit, ratio, clipped, weight):
    """What an update does with each token: fills `trained` of each trajectory with log p and its weight, [2, n].

    logprobs log p [S]; edit: which of these tokens are of edits, bool [S]; ratio, clipped (no gradient) of the others,
    as `policy_loss` gives them; weight on grad log p of the edits' tokens.
    """
    weights = torch.empty_like(logprobs)
    weights[~edit], weights[edit] = ratio.masked_fill(clipped, 0), weight
    for t, both in zip(trajectories, torch.stack([logprobs, weights]).cpu().split(counts, dim=1)):
        t.trained = both


def text_pieces(chat: Chat, ids: list[int]) -> list[str]:
    """The text of each token, together that of all; of several tokens that make up one character the last has it."""
    pieces, since = [], 0
    for i in range(len(ids)):
        text = chat.decode(ids[since : i + 1])
        whole = not text.endswith("\ufffd") or i + 1 - since >= 4 or i + 1 == len(ids)  # UTF-8: at most 4 bytes
        pieces.append(text if whole else "")
        since = i + 1 if whole else since
    return pieces


def token_rows(batch: list, step: int, run: Any) -> list[dict]:
    """What the last update did with the tokens of --log-tokens answers of a step, drawn at random from those whose edit
    is trained (then from the others), and of these edits.

    One row per response: prompt_id, sample_id, edit (bool) and lists over its tokens: text, logp (log p under the
    policy), logq (of what sampled it: pi_old, of an edit pi_e under the edit prompt), weight (on grad log p),
    advantage; of an edit also kept (whether its original has the token).
    """
    trained = [t for t in batch if t.trained is not None]
    rng = random.Random(derive_seed(run.args.seed, step, "tokens", run.ranks.rank))
    edited = {t.key[:2] for t in trained if t.parent}
    originals = [t.key[:2] for t in trained if t.parent is None]
    order = sorted(rng.sample(originals, len(originals)), key=lambda key: key not in edited)
    chosen = order[: math.ceil(run.args.log_tokens / run.ranks.world_size)]
    rows = []
    for t in trained:
        if t.key[:2] in chosen:
            figures = dict(zip(("logp", "weight"), t.trained), logq=t.old_logprobs, advantage=t.advantages)
            row = dict(prompt_id=t.prompt_id, sample_id=t.sample_id, edit=t.parent is not None)
            row |= dict(text=text_pieces(run.chat, t.response_ids))
            row |= {name: [round(x, 4) for x in values.tolist()] for name, values in figures.items()}
            kept = {"kept": kept_tokens(t.parent.response_ids, t.response_ids).tolist()} if t.parent else {}
            rows.append(row | kept)
    return rows


def write_rollouts(step: int, judged: list, lost: dict, selected: Collection, batch: list, run: Any) -> None:
    """A step's OUT/rollouts; OUT/lost where something left the batch; OUT/tokens with --log-tokens."""
    runs.write_step(run.args.out, "rollouts", step, rollout_rows(judged, selected), run.ranks)
    if any(all_gather(run.ranks, lost_rows(lost))):
        runs.write_step(run.args.out, "lost", step, lost_rows(lost), run.ranks)
    if run.args.log_tokens:
        runs.write_step(run.args.out, "tokens", step, token_rows(batch, step, run), run.ranks)


def describe_held_out(judged: list, lost: dict, judge: Judge, stats: Stats) -> None:
    """As `describe_rollout`, of held-out prompts; and what answers lose under another person's profile."""
    describe_rollout(judged, lost, None, stats, "held_out/")
    originals = [t for t in judged if not t.parent]
    swapped = [
        (t, other.row["persona"])
        for t, other in zip(originals, originals[1:] + originals[:1])
        if other.row["persona"] != t.row["persona"]
    ]
    asked = [(t.row | {"persona": persona}, t.answer, derive_seed("swap", *t.key)) for t, persona in swapped]
    for (t, _), verdict in zip(swapped, ask_all(judge, asked)):
        if verdict.reward is not None:
            stats.add("held_out/swap", torch.tensor(t.reward - verdict.reward))


def audit(judged: list, judge: Judge, second: Judge | None, args: Any, step: int, stats: Stats) -> None:
    """A share of the originals judged once more, with another seed, and by a second judge: fills t.audit."""
    if not args.audit_share:
        return
    rng = random.Random(derive_seed(args.seed, step, "audit"))
    chosen = [t for t in judged if not t.parent]
    chosen = rng.sample(chosen, math.ceil(args.audit_share * len(chosen)))
    asked = [(t.row, t.answer, derive_seed(args.seed, step, *t.key, "audit")) for t in chosen]
    again = [verdict.reward for verdict in ask_all(judge, asked)]
    others = [verdict.reward for verdict in ask_all(second, asked)] if second else [None] * len(asked)
    for t, reward, other in zip(chosen, again, others):
        t.audit = dict(again=reward, second=other)
        if reward is not None:
            stats.add("audit/noise", torch.tensor(abs(t.reward - reward)))
        if other is not None:
            stats.add("audit/second", torch.tensor(other))
            stats.add("audit/own", torch.tensor(t.reward))


def add_gap(t: Any, stats: Stats) -> None:
    """Trainer against engine: the same weights, the same tokens; only the order of sums may differ."""
    gap = (t.old_logprobs - torch.tensor(t.engine_logprobs)).abs()
    stats.add("logprob_gap", gap)
    stats.add_max("logprob_gap_max", gap)


def describe_credit(t: Any, stats: Stats) -> None:
    stats.add("sdpo/credit", t.credit)
    stats.add("sdpo/credit_size", t.credit.abs())


def describe_originals(ratio: torch.Tensor, clipped: torch.Tensor, stats: Stats) -> None:
    """What the update did with originals, per token."""
    stats.add("original/ratio", ratio)
    stats.add_max("original/ratio_max", ratio)
    stats.add("original/clipfrac", clipped)
    stats.add("original/approx_kl", ratio - 1 - ratio.log())


BRANCH = 0.1  # log-probs below its log: a token that hardly any sample would have


def kept_tokens(before: list[int], after: list[int]) -> torch.Tensor:
    """Which tokens of an edit were in its original: bool [len(after)], by the longest common stretches (difflib)."""
    kept = torch.zeros(len(after), dtype=torch.bool)
    for _, first, n in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        kept[first : first + n] = True
    return kept


def describe_edits(trajectories, logprobs, ratio, weight, advantages, args, stats):
    """The edit ledger: what the update did with the tokens that an edit kept, and with those that it inserted; of
    these the branches, which the policy would hardly say without the critique (p < BRANCH), also apart.

    logprobs log p, ratio r, weight on grad log p, advantages A: [S], of all tokens of the edits. A token's mass is
    |weight A|, the size of the loss' derivative by its log-prob; the masses are means over all tokens of edits, so that
    those of kept and inserted tokens add up.
    """
    stats.add("edit/ratio", ratio)
    stats.add_max("edit/ratio_max", ratio)
    stats.add("edit/ratio_low", ratio < 1 - args.eps_low)
    stats.add("edit/ratio_high", ratio > 1 + args.eps_high)
    stats.add("edit/weight", weight)
    stats.add("edit/clipfrac", weight == 0)
    edits = [t for t in trajectories if t.parent]
    if edits:
        kept = torch.cat([kept_tokens(t.parent.response_ids, t.response_ids) for t in edits]).to(ratio.device)
        stats.add("edit/kept", kept)
        branch = ~kept & (logprobs < math.log(BRANCH))
        stats.add("edit/branch", branch)
        for kind, tokens in (("kept", kept), ("inserted", ~kept), ("branch", branch)):
            stats.add(f"edit/{kind}_ratio", ratio[tokens])
            stats.add(f"edit/{kind}_weight", weight[tokens])
            stats.add(f"edit/{kind}_clipfrac", weight[tokens] == 0)
            stats.add(f"edit/{kind}_mass", (weight * advantages).abs() * tokens)


def check_judge(judged: list, lost: dict, judge: Judge, args: Any, ranks: Ranks) -> None:
    """Prints what share of a few answers got a judgement at the start of a run. ValueError: none did."""
    if judge.down:
        raise ValueError(judge.down)
    n_judged, n_lost = map(int, all_sum(ranks, len(judged), len(lost["originals"])))
    judge.take_counts()
    judge.forget()  # so that the first step is computed as without this
    if n_lost and not n_judged:
        raise ValueError(f"--judge {args.judge}: not one of {n_lost} answers got a judgement; is it a reward model?")
    print0(f"--judge {args.judge}: {n_judged} of {n_judged + n_lost} answers of the start policy got a judgement")


def end_if_down(judges: list[Judge | None], step: int, state: tuple, args: Any, ranks: Ranks) -> None:
    """ValueError on all ranks if a judge of one of them can give no more judgements: `step` is left to the next start.

    The steps before it are saved first, unless they are. state: what `checkpoints.save` takes behind args and step.
    """
    down = all_gather(ranks, [judge.down for judge in judges if judge and judge.down])
    if down:
        if step > 0 and not os.path.isdir(os.path.join(args.out, "checkpoints", f"step_{step:06d}")):
            checkpoints.save(args, step, *state)
        raise ValueError(f"step {step + 1}: {down[0]}; what is done is saved, the same command goes on")


def warn_of_lost(counts: dict[str, int], step: int) -> None:
    """A line where more than a fifth of a step's responses, of all ranks, leave the batch for want of a judgement."""
    n_lost = counts["lost/originals"] + counts["lost/edits"]
    total = n_lost + counts["judged"]
    if n_lost > 0.2 * total:
        print0(f"warning: step {step}: {n_lost} of {total} responses got no judgement and are not trained")


def explained_variance(batch: list, ranks: Ranks) -> float:
    """Of the returns of all ranks by the critic's values: 1 - var(returns - values) / var(returns)."""
    returns = torch.cat([t.returns for t in batch] or [torch.zeros(0)])
    residual = returns - torch.cat([t.values for t in batch] or [torch.zeros(0)])
    _, spread = moments(ranks, returns)
    _, unexplained = moments(ranks, residual)
    return 1 - unexplained**2 / spread**2 if spread > 0 else float("nan")


def headline(metrics: dict) -> dict[str, float]:
    """The figures of a step that matter, for a line in the log: {label: text}."""
    names = {
        "reward": "original/reward",
        "edit gain": "edit/gain",
        "held out": "held_out/original/reward",
        "tokens": "original/length",
        "entropy": "entropy",
        "kl": "original/approx_kl",
        "unparsed": "judge_unparsed",
    }
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    known = {label: metrics[name] for label, name in names.items() if metrics.get(name) is not None}
    return {**known, "seconds": seconds}


ORDER = (  # of the metrics in a line: by the first of these that a name begins with, as in the table of docs/metrics.md
    (
        "step",
        "original/",
        "edit/",
        "held_out/",
        "audit/",
        "sdpo/",
        "batch",
        "lost/",
        "judge_",
        "policy_loss",
        "value_loss",
    )
    + (
        "entropy",
        "grad_norm_",
        "value_clipfrac",
        "explained_variance",
        "logprob_gap",
        "refresh_gap",
        "generated_tokens",
    )
    + ("trained_tokens", "computed_tokens", "mfu", "peak_memory_gib", "seconds/")
)


def in_order(metrics: dict) -> dict:
    def place(name):
        return next((i for i, start in enumerate(ORDER) if name.startswith(start)), len(ORDER))

    return {name: metrics[name] for name in sorted(metrics, key=place)}


def step_metrics(step: int, judged: list, counts: dict, clock: list[float], run: Any, **figures: float) -> dict:
    """The line of metrics.jsonl. clock: times at the start and after each phase; counts: of this rank."""
    ranks, stats = run.ranks, run.stats
    counts["generated_tokens"] = sum(len(t.response_ids) for t in judged)
    counts |= dict(trained_tokens=stats.logical_tokens, computed_tokens=stats.computed_tokens)
    counts["judged"] = len(judged)
    counts = dict(zip(counts, map(int, all_sum(ranks, *counts.values()))))
    warn_of_lost(counts, step + 1)
    del counts["judged"]  # that is not a metric of its own
    phases = ("refresh", "rollout", "diagnostics", "score", "update")
    seconds = dict(zip(phases, (b - a for a, b in zip(clock, clock[1:]))))
    training_seconds = seconds["score"] + seconds["update"]
    metrics = dict(
        step=step + 1,
        **stats.means(ranks),
        **figures,
        **counts,
        **training.machine_metrics(ranks, stats.flops, training_seconds, run.args.peak_tflops),
        generated_tokens_per_second=counts["generated_tokens"] / seconds["rollout"],
        trained_tokens_per_second=counts["trained_tokens"] / training_seconds,
        **{f"seconds/{k}": round(v, 3) for k, v in seconds.items()},
    )
    return in_order(metrics)


# -- a batch for replay.py ---------------------------------------------------------------------------------------------


def save_batch(script: str, step: int, batch: list, policy: Any, tokenizer_from: str, run: Any) -> None:
    """Keeps a step's batch, ready for the update, and the weights that sampled it: OUT/batch_NNNNNN, for replay.py.

    script: the file whose losses it was made for, which replay.py loads.
    """
    folder = os.path.join(run.args.out, f"batch_{step:06d}")
    batch = all_gather(run.ranks, [dataclasses.asdict(t) for t in batch])
    templates = run.templates.texts("answer", "edit")
    save_pretrained(policy, os.path.join(folder, "policy"), tokenizer_from, torch.float32, templates)
    if run.ranks.rank == 0:
        content = dict(script=os.path.abspath(script), args=dataclasses.asdict(run.args), batch=batch)
        torch.save(content, os.path.join(folder, "batch.pt"))
