"""Metrics and rows that describe a PPO step, and checks of the judge; ppo_cpe.py calls them in a line each.

Nothing here changes what is trained. docs/metrics.md explains every name.
"""

import dataclasses
import difflib
import json
import math
import os
import random
from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from chat import Chat
from judges import Judge, ask_all
from model import save_pretrained
from prompts import DIMENSIONS, Judgement, has_control_text, words_of
from runtime import training
from runtime.digests import input_digest, sealed
from runtime.distributed import Ranks, all_gather, all_max, all_sum, derive_seed, moments, print0
from runtime.rows import write_text
from runtime.runs import Run
from trajectory import Batch, Checks, Dropped, Rollout, TokenArrays, Trajectory, UpdateRecord
from weights import write_tensors


class Means:
    """Sums and counts of figures by name, for their means over all micro-batches and ranks."""

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
        self.largest: dict[str, float] = defaultdict(lambda: -math.inf)

    def add(self, name: str, values: Tensor | float) -> None:
        """values: any number of figures; bool counts as 0 or 1."""
        values = torch.as_tensor(values, dtype=torch.float64)
        total = self.sums[name]
        total[0] += values.sum().item()
        total[1] += values.numel()

    def add_max(self, name: str, values: Tensor) -> None:
        if values.numel():
            self.largest[name] = max(self.largest[name], values.max().item())
        else:
            self.largest[name] = self.largest[name]  # named on every rank

    def over_ranks(self, ranks: Ranks) -> dict[str, float | None]:
        """{name: mean or maximum over all ranks}; None where nothing was added. Every rank calls it."""
        names = sorted(set(all_gather(ranks, self.sums)))  # a rank may have had no edit, for example
        totals = all_sum(ranks, *(x for name in names for x in self.sums[name]))
        result: dict[str, float | None] = {}
        for i, name in enumerate(names):
            total, count = totals[2 * i : 2 * i + 2]
            result[name] = total / count if count else None
        for name in sorted(set(all_gather(ranks, self.largest))):
            result[name] = all_max(ranks, self.largest[name])
        return result


# -- answers -----------------------------------------------------------------------------------------------------------


def leaves(value: Any) -> list[str]:
    """The leaf values of any JSON value as text: the values of a profile, without its keys."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [str(value)]


def recited(persona: Any, answer: str) -> float | None:
    """Fraction of the values of a profile (any JSON) whose words an answer repeats, in their order.

    None for a profile in plain words, which has no values.
    """
    if isinstance(persona, str):
        return None
    said = f" {' '.join(words_of(answer))} "
    values = [f" {' '.join(words)} " for words in map(words_of, leaves(persona)) if words]
    return sum(value in said for value in values) / len(values) if values else 0.0


def distinct(answers: list[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams of the answers (Li et al. 2016); low where answers are all alike."""
    grams = [tuple(words[i : i + n]) for words in map(words_of, answers) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def agreement(labels: Sequence[Judgement], found: Sequence[Judgement | None]) -> dict[str, float | None]:
    """Agreement of judgements with labels, two lists of Judgement; in `found`, None stands for one that did not parse.

    Returns judged (number), parsed (fraction), score_correlation (Pearson, of the weighted score) and exact_DIMENSION
    (fractions). The last two are over the parsed ones, None where they do not exist (nothing parsed, no variance).
    """
    pairs = [(label, own) for label, own in zip(labels, found, strict=True) if own is not None]
    result: dict[str, float | None] = {"judged": len(labels), "parsed": len(pairs) / len(labels)}
    scores = np.array([[j.score() for j in pair] for pair in pairs]).reshape(-1, 2)  # [N, 2]
    defined = len(pairs) > 1 and bool((scores.std(0) > 0).all())
    result["score_correlation"] = float(np.corrcoef(scores.T)[0, 1]) if defined else None
    for name in DIMENSIONS:
        same = [getattr(label, name) == getattr(own, name) for label, own in pairs]
        result[f"exact_{name}"] = sum(same) / len(same) if same else None
    return result


# -- the metrics of a step ---------------------------------------------------------------------------------------------


DISTINCT_OF = 32  # answers, per rank: distinct pairs get rarer with the number of answers that are pooled


def describe_rollout(
    means: Means, rollout: Rollout, selected: set[tuple[str, int]] | None = None, prefix: str = ""
) -> None:
    """Adds rewards, gains, lengths and scores of originals and edits."""

    def add(name: str, value: float | None) -> None:
        if value is not None:
            means.add(prefix + name, value)

    edited = {(t.prompt.index, t.sample_id) for t in rollout.judged if t.parent}
    for kind in ("original", "edit"):
        of_kind = [t for t in rollout.judged if (t.parent is not None) == (kind == "edit")]
        # the first samples of each prompt first, so that as many count whatever the number of samples
        of_kind.sort(key=lambda t: (t.sample_id, t.prompt.index))
        answers = [t.answer for t in of_kind[:DISTINCT_OF]]
        if answers:
            add(f"{kind}/distinct_2", distinct(answers, 2))
    for d in rollout.dropped:  # are the responses without a judgement longer, or worse?
        if d.kind != "truncated" and d.response_ids:
            add("lost/length", len(d.response_ids))
            add("lost/recited", recited(d.prompt.row["persona"], d.answer))
    for t in rollout.judged:
        kind = "edit" if t.parent else "original"
        add(f"{kind}/reward", t.reward)
        add(f"{kind}/length", len(t.response_ids))
        add(f"{kind}/truncated", t.truncated)
        add(f"{kind}/control_text", has_control_text(t.answer))
        add(f"{kind}/recited", recited(t.prompt.row["persona"], t.answer))
        for name, score in scores_of(t.judgement).items():
            add(f"{kind}/{name}", score)
        if t.parent is None:
            add("original/edited", (t.prompt.index, t.sample_id) in edited)
            continue
        add("edit/gain", t.reward - t.parent.reward)
        add("edit/improved", t.reward > t.parent.reward)
        add("edit/worse", t.reward < t.parent.reward)
        add("edit/unchanged", t.answer == t.parent.answer)
        before = scores_of(t.parent.judgement)
        for name, score in scores_of(t.judgement).items():
            add(f"edit/gain_{name}", score - before[name])
        if selected is not None:
            add("edit/selected", t.key[:2] in selected)


def scores_of(judgement: Judgement | None) -> dict[str, int]:
    return {name: getattr(judgement, name) for name in DIMENSIONS} if judgement else {}


def describe_audits(means: Means, rollout: Rollout, audits: dict[tuple, dict[str, float | None]]) -> None:
    """Adds the noise of the judge, and how it compares with a second one."""
    reward = {t.key: t.reward for t in rollout.judged}
    for key, audit in audits.items():
        if audit["again"] is not None:
            means.add("audit/noise", abs(reward[key] - audit["again"]))
        if audit["second"] is not None:
            means.add("audit/second", audit["second"])
            means.add("audit/own", reward[key])


NOVEL_PROBABILITY = 0.1  # a token with a lower probability under the policy is one that hardly any sample would have


def kept_tokens(before: list[int], after: list[int]) -> Tensor:
    """Which tokens of an edit were in its original: bool [len(after)], by the longest common stretches (difflib)."""
    kept = torch.zeros(len(after), dtype=torch.bool)
    for _, first, n in difflib.SequenceMatcher(None, before, after, autojunk=False).get_matching_blocks():
        kept[first : first + n] = True
    return kept


def named_tokens(edit: Trajectory, original: Trajectory) -> Tensor:
    """Which tokens of an edit are in its critique (or the request around it), but not in its original: bool [L]."""
    told = set(edit.context_ids[len(edit.prompt.ids) :]) - set(original.response_ids)
    return torch.tensor([token in told for token in edit.response_ids], dtype=torch.bool)


def describe_update(means: Means, record: UpdateRecord, eps_low: float, eps_high: float) -> None:
    """Adds losses, ratios and clipped fractions per token, and the ledger of edits."""
    for tokens in record.policy:
        means.add("policy_loss", tokens.loss)
        means.add("entropy", tokens.entropy)
        original = ~tokens.is_edit
        means.add("original/ratio", tokens.ratio[original])
        means.add_max("original/ratio_max", tokens.ratio[original])
        means.add("original/clipfrac", tokens.weight[original] == 0)
        means.add("original/approx_kl", tokens.approx_kl())
        describe_edits(means, tokens, eps_low, eps_high)
    for values in record.critic:
        means.add("value_loss", values.loss)
        means.add("value_clipfrac", values.clipped)
    for name, norms in record.grad_norms.items():
        for norm in norms:
            means.add(f"grad_norm_{name}", norm)
    # the same weights and the same tokens in trainer and engine: only the order of sums may differ
    for t, old_logprobs in last_arrays(record, "old_logprobs"):
        mismatch = (old_logprobs - torch.tensor(t.engine_logprobs)).abs()
        means.add("train_inference_mismatch", mismatch)
        means.add_max("train_inference_mismatch_max", mismatch)


def describe_edits(means: Means, tokens: TokenArrays, eps_low: float, eps_high: float) -> None:
    """The ledger of edits: what the update did with tokens that an edit kept, and with those that it inserted.

    Novel tokens are also counted apart: inserted ones that the critique names and the policy would hardly say without
    it (p < NOVEL_PROBABILITY). What an edit inserts besides them is mostly the chance of sampling.
    The gradient mass of a token is |weight A|, the size of the derivative of the loss by its log-prob. It is averaged
    over all tokens of edits, so that the masses of kept and inserted tokens add up.
    """
    ratio = tokens.ratio[tokens.is_edit]
    weight = tokens.weight[tokens.is_edit]
    means.add("edit/ratio", ratio)
    means.add_max("edit/ratio_max", ratio)
    means.add("edit/ratio_low", ratio < 1 - eps_low)
    means.add("edit/ratio_high", ratio > 1 + eps_high)
    means.add("edit/weight", weight)
    means.add("edit/clipfrac", weight == 0)
    edits = [(t, t.parent) for t in tokens.trajectories if t.parent]
    if not edits:
        return
    kept = torch.cat([kept_tokens(original.response_ids, t.response_ids) for t, original in edits])
    named = torch.cat([named_tokens(t, original) for t, original in edits])
    novel = ~kept & named & (tokens.logprobs[tokens.is_edit] < math.log(NOVEL_PROBABILITY))
    mass = (weight * tokens.advantages[tokens.is_edit]).abs()
    means.add("edit/kept", kept)
    means.add("edit/novel", novel)
    for kind, chosen in (("kept", kept), ("inserted", ~kept), ("novel", novel)):
        means.add(f"edit/{kind}_ratio", ratio[chosen])
        means.add(f"edit/{kind}_weight", weight[chosen])
        means.add(f"edit/{kind}_clipfrac", weight[chosen] == 0)
        means.add(f"edit/{kind}_gradient_mass", mass * chosen)


def last_arrays(record: UpdateRecord, name: str) -> list[tuple[Trajectory, Tensor]]:
    """(trajectory, its array [L_i]) of the last pass that each trajectory was in."""
    last: dict[tuple, tuple[Trajectory, Tensor]] = {}
    for tokens in record.policy:
        for t, own in zip(tokens.trajectories, getattr(tokens, name).split(tokens.counts)):
            last[t.key] = (t, own)
    return list(last.values())


def explained_variance(returns: list[Tensor], values: list[Tensor], ranks: Ranks) -> float:
    """The fraction of the returns' variance that the values explain: 1 - var(returns - values) / var(returns)."""
    all_returns = torch.cat(returns or [torch.zeros(0)])
    residual = all_returns - torch.cat(values or [torch.zeros(0)])
    _, spread = moments(ranks, all_returns)
    _, unexplained = moments(ranks, residual)
    return 1 - unexplained**2 / spread**2 if spread > 1e-4 else float("nan")  # below: all rewards are equal


def step_metrics(
    rollout: Rollout,
    selected: set[tuple[str, int]],
    checks: Checks,
    batch: Batch,
    update: UpdateRecord,
    sync_error: float,
    clip: tuple[float, float],
    run: Run,
) -> dict[str, Any]:
    """The line of metrics.jsonl of a step, over all ranks. Warns where many responses are dropped.

    clip: eps_low, eps_high.
    """
    ranks = run.ranks
    means = Means()
    describe_rollout(means, rollout, selected)
    describe_audits(means, rollout, checks.audits)
    if checks.held_out:
        describe_rollout(means, checks.held_out, prefix="held_out/")
    for difference in checks.swapped:
        means.add("held_out/swap", difference)
    describe_update(means, update, *clip)

    counts = lost_counts(rollout.dropped)
    counts["lost/prompts"] = rollout.n_prompts - len({t.prompt.index for t in rollout.judged})
    if checks.held_out:
        counts["held_out/lost"] = len(checks.held_out.dropped)
    counts["judge_calls"], counts["judge_unparsed"] = rollout.judge_counts
    counts["generated_tokens"] = sum(len(t.response_ids) for t in [*rollout.judged, *rollout.dropped])
    counts["trained_tokens"] = update.logical_tokens
    counts["computed_tokens"] = update.computed_tokens
    counts["batch"] = len(batch.trajectories)
    counts["judged"] = len(rollout.judged)
    counts = dict(zip(counts, map(int, all_sum(ranks, *counts.values()))))
    warn_of_lost(counts, run.step + 1)
    del counts["judged"]  # not a metric of its own

    seconds = {name: all_max(ranks, value) for name, value in run.seconds.items()}  # others wait for the slowest
    training_seconds = seconds["score"] + seconds["update"]
    metrics = {
        **means.over_ranks(ranks),
        **counts,
        **training.machine_metrics(ranks, update.flops, training_seconds, run.args.peak_tflops),
        "explained_variance": explained_variance(batch.returns, batch.values, ranks),
        "weight_sync_error": sync_error,
        "generated_tokens_per_second": counts["generated_tokens"] / seconds["rollout"],
        "trained_tokens_per_second": counts["trained_tokens"] / training_seconds,
        **{f"seconds/{name}": round(value, 3) for name, value in seconds.items()},
    }
    warn_of_no_gradient(metrics, run.step + 1)
    return metrics


def headline(metrics: dict[str, Any]) -> dict[str, float | None]:
    """The figures that matter, for a line in the log: {label: figure}."""
    names = {
        "reward": "original/reward",
        "edit gain": "edit/gain",
        "held out": "held_out/original/reward",
        "tokens": "original/length",
        "entropy": "entropy",
        "kl": "original/approx_kl",
        "unparsed": "judge_unparsed",
    }
    shown = {label: metrics.get(name) for label, name in names.items()}
    shown["seconds"] = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return shown


def lost_counts(dropped: list[Dropped]) -> dict[str, int]:
    counts = {f"lost/{kind}": 0 for kind in ("originals", "edits", "truncated")}
    for d in dropped:
        counts[f"lost/{d.kind}"] += 1
    return counts


def warn_of_lost(counts: dict[str, int], step: int) -> None:
    """Prints a line where more than a fifth of a step's responses leave the batch for want of a judgement."""
    n_lost = counts["lost/originals"] + counts["lost/edits"]
    total = n_lost + counts["judged"]
    if n_lost > 0.2 * total:
        print0(f"warning: step {step}: {n_lost} of {total} responses got no judgement and are not trained")


def warn_of_no_gradient(metrics: dict[str, Any], step: int) -> None:
    """Prints a line where a loss on edits trains nothing."""
    if metrics.get("edit/clipfrac") == 1:
        print0(f"warning: step {step}: no token of an edit has a gradient; does the loss depend on logprobs?")


# -- diagnostics that ask the judge ------------------------------------------------------------------------------------


def ask_again(
    rollout: Rollout,
    held_out: Rollout | None,
    judge: Judge,
    second: Judge | None,
    fraction: float,
    seed: int,
    step: int,
    ranks: Ranks,
) -> Checks:
    """Audits a fraction of the originals, and judges held-out answers under other personas."""
    audits = audit(rollout.judged, judge, second, fraction, seed, step, ranks)
    swapped = swap_personas(held_out, judge, ranks) if held_out else []
    judge.take_counts()  # no cost of the training
    return Checks(audits, held_out, swapped)


def was_replaced(t: Trajectory, judge: Judge) -> bool:
    """Whether the reward is the judge's lowest because the response was cut off (--truncated min_score)."""
    return t.truncated and t.reward == judge.lowest_reward


def audit(
    judged: list[Trajectory], judge: Judge, second: Judge | None, fraction: float, seed: int, step: int, ranks: Ranks
) -> dict[tuple, dict[str, float | None]]:
    """Judges a fraction of all ranks' originals once more, with another seed, and by a second judge.

    Originals with a replaced reward (--truncated min_score) are left out.

    Returns {key: {"again": reward, "second": reward}}, None where no judgement came or there is no second judge.
    """
    if not fraction:
        return {}
    rng = random.Random(derive_seed(seed, step, "audit"))
    originals = [t for t in judged if not t.parent and not was_replaced(t, judge)]
    keys = sorted(set(all_gather(ranks, [t.key for t in originals])))  # ranks of one engine have the same
    drawn = set(rng.sample(keys, math.ceil(fraction * len(keys))))
    chosen = [t for t in originals if t.key in drawn]
    asked = [(t.prompt.row, t.answer, derive_seed(seed, step, *t.key, "audit")) for t in chosen]
    again = [verdict.reward for verdict in ask_all(judge, asked)]
    others = [verdict.reward for verdict in ask_all(second, asked)] if second else [None] * len(asked)
    return {t.key: {"again": own, "second": other} for t, own, other in zip(chosen, again, others)}


def swap_personas(held_out: Rollout, judge: Judge, ranks: Ranks) -> list[float]:
    """The reward that held-out answers lose when they are judged under the next prompt's persona."""
    originals = [t for t in held_out.judged if not t.parent and not was_replaced(t, judge)]
    persona_of = dict(all_gather(ranks, [(t.prompt.index, t.prompt.row["persona"]) for t in originals]))
    indices = sorted(persona_of)
    next_of = dict(zip(indices, indices[1:] + indices[:1]))
    swapped = []
    for t in originals:
        persona = persona_of[next_of[t.prompt.index]]
        if persona != t.prompt.row["persona"]:
            swapped.append((t, persona))
    asked = [(t.prompt.row | {"persona": persona}, t.answer, derive_seed("swap", *t.key)) for t, persona in swapped]
    verdicts = ask_all(judge, asked)
    return [t.reward - v.reward for (t, _), v in zip(swapped, verdicts) if v.reward is not None]


def check_judge(probe: Rollout, judge: Judge, spec: str, editing: bool, ranks: Ranks) -> None:
    """Prints how many of a few answers got a judgement at the start of a run. ValueError: none did, or none of the
    critiques that edits need says anything."""
    if judge.down:
        raise ValueError(judge.down)
    reasons = all_gather(ranks, [d.drop_reason for d in probe.dropped if d.kind == "originals"])
    n_critiques = sum(bool(t.critique.strip()) for t in probe.judged)
    n_judged, n_critiques = map(int, all_sum(ranks, len(probe.judged), n_critiques))
    judge.forget()  # so that the first step is computed as without this
    if reasons and not n_judged:
        raise ValueError(
            f"--judge {spec}: not one of {len(reasons)} answers got a judgement; is it a reward model? "
            f"The first: {reasons[0]}"
        )
    if editing and n_judged and not n_critiques and judge.writes_critiques is not True:
        raise ValueError(
            f"--judge {spec}: no critique of {n_judged} answers, which edits (--edit-rate > 0) need; "
            "--edit-rate 0 trains without edits"
        )
    print0(f"--judge {spec}: {n_judged} of {n_judged + len(reasons)} answers of the start policy got a judgement")


def check_batch(batch: list[Trajectory], dropped: list[Dropped], run: Run) -> None:
    """ValueError: no response of any rank is left to train on. The steps before this one are saved first."""
    counts = lost_counts(dropped)
    n_batch, *totals = map(int, all_sum(run.ranks, len(batch), *counts.values()))
    if n_batch == 0:
        lost = dict(zip(counts, totals))
        reasons = all_gather(run.ranks, [d.drop_reason for d in dropped][:1])
        run.stop_if([f"no response is left to train on ({lost}); is --judge a reward model? The first: {reasons[0]}"])


# -- rows in the run folder --------------------------------------------------------------------------------------------


def rollout_rows(
    judged: list[Trajectory], selected: Collection[tuple[str, int]] = (), audits: dict[tuple, dict] | None = None
) -> list[dict]:
    """One JSON row per original, with its edit inside."""
    edit_of = {t.key[:2]: t for t in judged if t.parent}

    def describe(t: Trajectory) -> dict:
        scores = dataclasses.asdict(t.judgement) if t.judgement else {}
        return dict(answer=t.answer, reward=t.reward, **scores, n_tokens=len(t.response_ids), truncated=t.truncated)

    rows = []
    for t in judged:
        if t.parent is not None:
            continue
        edit = edit_of.get(t.key[:2])
        row = {**t.prompt.row, "sample_id": t.sample_id, **describe(t)}
        if audits and t.key in audits:
            row["audit"] = audits[t.key]
        row["edit"] = describe(edit) | {"selected": edit.key[:2] in selected} if edit else None
        rows.append(row)
    return rows


def dropped_rows(dropped: list[Dropped]) -> list[dict]:
    """One JSON row per response that left the batch, with the reason; an edit stands inside, as in `rollout_rows`."""
    rows = []
    for kind in ("originals", "edits", "truncated"):
        for d in dropped:
            if d.kind != kind:
                continue
            response = dict(
                answer=d.answer,
                reward=None,
                n_tokens=len(d.response_ids),
                truncated=d.truncated,
                drop_reason=d.drop_reason,
            )
            row = {**d.prompt.row, "sample_id": d.sample_id}
            rows.append(row | ({"edit": response} if d.parent else {**response, "edit": None}))
    return rows


def text_pieces(chat: Chat, ids: list[int]) -> list[str]:
    """The text of each token, which together make the whole; of a character's several tokens the last has it."""
    pieces = []
    first = 0
    for i in range(len(ids)):
        text = chat.decode(ids[first : i + 1])
        whole = not text.endswith("\ufffd") or i + 1 - first >= 4 or i + 1 == len(ids)  # UTF-8: at most 4 bytes
        pieces.append(text if whole else "")
        if whole:
            first = i + 1
    return pieces


def token_rows(record: UpdateRecord, chat: Chat, n: int, seed: int, step: int, ranks: Ranks) -> list[dict]:
    """Rows on the tokens of n answers of a step (over all ranks) and of their trained edits, by the last training pass.

    The answers are drawn at random, those with a trained edit first. One row per response: prompt_id, sample_id, edit
    (bool) and lists over its tokens: text, logp (log p under the policy), logq (of what sampled it: pi_old, or pi_e
    under the edit prompt), weight (on grad log p), advantage, and for an edit kept (its original has the token).
    """
    names = {"logp": "logprobs", "weight": "weight", "logq": "old_logprobs", "advantage": "advantages"}
    arrays = {short: {t.key: own for t, own in last_arrays(record, name)} for short, name in names.items()}
    trained = sorted((t for t, _ in last_arrays(record, "logprobs")), key=lambda t: (t.prompt.index, t.key))
    edited = {t.key[:2] for t in trained if t.parent}
    answers = [(t.key[:2], t.key[:2] in edited) for t in trained if t.parent is None]
    order = sorted(all_gather(ranks, answers))
    random.Random(derive_seed(seed, step, "tokens")).shuffle(order)
    order.sort(key=lambda answer: not answer[1])
    chosen = {key for key, _ in order[:n]}
    rows = []
    for t in trained:
        if t.key[:2] not in chosen:
            continue
        row = dict(prompt_id=t.key[0], sample_id=t.sample_id, edit=t.parent is not None)
        row["text"] = text_pieces(chat, t.response_ids)
        for short, of_key in arrays.items():
            values = of_key[t.key].tolist()  # of an update that was left out they may be NaN
            row[short] = [round(x, 4) if math.isfinite(x) else None for x in values]
        if t.parent:
            row["kept"] = kept_tokens(t.parent.response_ids, t.response_ids).tolist()
        rows.append(row)
    return rows


def write_rollouts(
    rollout: Rollout,
    selected: set[tuple[str, int]],
    checks: Checks,
    update: UpdateRecord,
    chat: Chat,
    log_tokens: int,
    seed: int,
    run: Run,
) -> None:
    """Writes OUT/rollouts, and where there is something OUT/held_out, OUT/lost (dropped responses) and OUT/tokens."""
    run.write_rows("rollouts", rollout_rows(rollout.judged, selected, checks.audits))
    lost = dropped_rows(rollout.dropped)
    if any(all_gather(run.ranks, lost)):
        run.write_rows("lost", lost)
    if checks.held_out:
        run.write_rows("held_out", rollout_rows(checks.held_out.judged) + dropped_rows(checks.held_out.dropped))
    if log_tokens:
        run.write_rows("tokens", token_rows(update, chat, log_tokens, seed, run.step + 1, run.ranks))


# -- a batch for replay.py ---------------------------------------------------------------------------------------------


def batch_digests(folder: str) -> dict[str, str]:
    """Digests of the files beside batch.json, which holds them."""
    return {name: input_digest(os.path.join(folder, name)) for name in ("batch.safetensors", "policy")}


def save_batch(script: str, batch: Batch, run: Run) -> None:
    """Keeps a step's batch, ready for the update, and the weights that sampled it: OUT/batch_NNNNNN, for replay.py.

    script: the file whose losses it was made for. batch.json is written last, so that a batch with it is whole.
    """
    folder = os.path.join(run.out, f"batch_{run.step + 1:06d}")
    columns = dict(vars(batch), trajectories=[dataclasses.asdict(t) for t in batch.trajectories])
    rows = all_gather(run.ranks, [dict(zip(columns, row)) for row in zip(*columns.values(), strict=True)])
    policy = run.models["policy"]
    save_pretrained(policy, os.path.join(folder, "policy"), run.tokenizer_from, torch.float32, run.templates)
    if run.ranks.rank == 0:
        trajectories = [row.pop("trajectories") for row in rows]
        named = {f"{name}.{i}": x for i, row in enumerate(rows) for name, x in row.items() if x is not None}
        # a fork's tensors may be views, or the same under two names
        tensors = {name: x.clone(memory_format=torch.contiguous_format) for name, x in named.items()}
        write_tensors(tensors, os.path.join(folder, "batch.safetensors"))
        content = dict(script=os.path.abspath(script), args=dataclasses.asdict(run.args), trajectories=trajectories)
        content["digests"] = batch_digests(folder)
        write_text(os.path.join(folder, "batch.json"), json.dumps(sealed(content)))
