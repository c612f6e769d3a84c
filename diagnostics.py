"""What edits, rewards and judges do: pure functions, which the stages call in a line each."""

import dataclasses
import re

import numpy as np
import torch

from prompts import DIMENSIONS


def words_of(text):
    """Words of Latin letters and digits; of other scripts, which may have no spaces, single characters."""
    return re.findall(r"[a-z0-9]+|\w", text.casefold())


def leaves(value):
    """The texts at the ends of any JSON value: the values of a profile, without its keys."""
    if isinstance(value, dict):
        return [leaf for v in value.values() for leaf in leaves(v)]
    if isinstance(value, list):
        return [leaf for v in value for leaf in leaves(v)]
    return [str(value)]


def recited(persona, answer):
    """Share of the profile's values (any JSON) whose words an answer repeats, in their order."""
    said = f" {' '.join(words_of(answer))} "
    values = [f" {' '.join(words)} " for words in map(words_of, leaves(persona)) if words]
    return sum(value in said for value in values) / len(values) if values else 0.0


def distinct(answers, n):
    """Distinct n-grams of words over all n-grams of some answers (Li et al. 2016): low where answers are all alike."""
    grams = [tuple(words[i : i + n]) for words in map(words_of, answers) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def agreement(labels, found):
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


def describe_rollout(judged, selected, stats):
    """Rewards, gains, lengths and scores of originals and edits into stats (METRICS in the README)."""
    def add(name, value):
        stats.add(name, torch.tensor(value, dtype=torch.float64))

    for kind, answers in (("original", [t.answer for t in judged if not t.parent]),
                          ("edit", [t.answer for t in judged if t.parent])):
        if answers:
            add(f"{kind}/distinct_2", distinct(answers, 2))
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
            add("edit/selected", t.key[:2] in selected)


def rollout_rows(judged, selected):
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
            rows.append({**t.row, "sample_id": t.sample_id, **describe(t), "edit": edit})
    return rows
