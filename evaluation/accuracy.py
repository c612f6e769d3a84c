"""How often a judge prefers the chosen answer of a pair: the numbers and the table of evaluate.py --task
reward-accuracy (docs/evaluation.md 7). No model, no judge.
"""

import numpy as np

from evaluation import tables, winrate


def accuracy(outcomes: np.ndarray, seed: int, persons: list | None = None) -> dict:
    """outcomes: 1 right, 0 wrong, 0.5 a tie, NaN no verdict [n] -> dict; shares in [0, 1] of the rows with a verdict.

    accuracy counts a tie as wrong, with its 95 % interval; ties_half counts it as a half.
    """
    judged = outcomes[~np.isnan(outcomes)]
    right = np.where(np.isnan(outcomes), np.nan, outcomes == 1)
    low, high = winrate.bootstrap_mean(right, seed, persons)
    return dict(
        accuracy=float((judged == 1).mean()) if len(judged) else None,
        low=low,
        high=high,
        ties_half=float(judged.mean()) if len(judged) else None,
        ties=int((judged == 0.5).sum()),
        n=len(judged),
        without_verdict=int(np.isnan(outcomes).sum()),
    )


def longer_wins(pair: dict) -> float:
    """What "the answer with more characters" says: 1 the chosen one, 0 the rejected one, 0.5 neither."""
    return 0.5 + 0.5 * float(np.sign(len(pair["chosen"]) - len(pair["rejected"])))


def accuracy_by_tier(pairs: list[dict], outcomes: np.ndarray, seed: int) -> dict:
    """-> {"groups": {"general hard": ...}, "kinds": {"general": ...}, "total"}, each with the longer answer beside it.

    A kind's (and the total's) `mean_of_tiers` is the plain mean of its groups' accuracies, `accuracy` that by rows:
    published tables mix the two (docs/evaluation.md 7).
    """
    longer = np.array([longer_wins(pair) for pair in pairs])
    labels = [tables.group_of(pair) or "all" for pair in pairs]
    persons = tables.persons_of(pairs)

    def part(rows):
        theirs = persons and [persons[i] for i in rows]
        return accuracy(outcomes[rows], seed, theirs) | dict(longer_answer=float(longer[rows].mean()))

    def mean_of_tiers(groups):
        found = [group["accuracy"] for group in groups]
        return None if None in found else float(np.mean(found))

    def rows_of(names):
        return [i for i, label in enumerate(labels) if label in names]

    groups = {label: part(rows_of([label])) for label in tables.in_order(labels)}
    kinds = {}
    for kind in sorted({pair["kind"] for pair in pairs if pair.get("kind")}):
        names = [label for label in groups if label.split()[0] == kind]
        kinds[kind] = part(rows_of(names)) | dict(mean_of_tiers=mean_of_tiers([groups[n] for n in names]))
    total = part(list(range(len(pairs)))) | dict(mean_of_tiers=mean_of_tiers(groups.values()))
    return dict(
        groups=groups,
        kinds=kinds,
        total=total,
        intervals="rows of one user_id drawn together" if persons else "rows drawn one by one",
    )


def accuracy_table(results: dict) -> str:
    """Markdown."""
    row = tables.markdown_row
    lines = [
        row("pairs", "accuracy %, by rows", "mean of tiers", "ties half", "longer answer %", "ties", "n", "no verdict"),
        row("---", *["--:"] * 7),
    ]
    parts = {**results["groups"], **{f"{k}, all": v for k, v in results["kinds"].items()}, "total": results["total"]}
    for name, p in parts.items():
        shares = [p.get(k) for k in ("mean_of_tiers", "ties_half", "longer_answer")]
        lines.append(
            row(
                name,
                tables.interval_text(p["accuracy"], p["low"], p["high"], 100),
                *("-" if share is None else f"{100 * share:.1f}" for share in shares),
                p["ties"],
                p["n"],
                p["without_verdict"],
            )
        )
    lines += [
        "",
        f"Judge: {results['judge']}. A tie is not right; the longer answer's ties count half; 95 % intervals "
        f"by bootstrap, {results['intervals']}.",
    ]
    if results["position_bias"]:
        bias = results["position_bias"]
        share = tables.interval_text(bias["first_place"], bias["low"], bias["high"], 100)
        lines.append(
            f"The answer shown first is preferred at {share} %; both orders agree on {100 * bias['agree']:.1f} %."
        )
    lines += [f"{n} questions to the judge without a verdict: {kind}." for kind, n in results["failures"].items()]
    return "\n".join(lines) + "\n"
