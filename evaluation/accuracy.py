"""How often a judge prefers the chosen answer of a pair: numbers and table of `evaluate.py --task reward-accuracy`
(docs/evaluation.md 7). No model, no judge.
"""

import numpy as np

from evaluation import winrate
from evaluation.annotations import group_of, interval_method, persons_of, rows_by_group
from evaluation.tables import markdown_table, number_text, percent_text, position_text


def accuracy(outcomes: np.ndarray, seed: int, persons: list | None = None) -> dict:
    """Accuracy over the pairs with a verdict, in [0, 1], with its 95 % interval. A tie counts as wrong.

    outcomes: 1 right, 0 wrong, 0.5 a tie, NaN no verdict, [n]. `ties_half` is the accuracy with ties as a half.
    """
    judged = outcomes[~np.isnan(outcomes)]
    right = np.where(np.isnan(outcomes), np.nan, outcomes == 1)
    return winrate.mean_and_interval(right, seed, persons, "accuracy") | dict(
        ties_half=float(judged.mean()) if len(judged) else None,
        ties=int((judged == 0.5).sum()),
        n=len(judged),
        without_verdict=len(outcomes) - len(judged),
    )


def longer_wins(pair: dict) -> float:
    """The outcome of the rule "the answer with more characters is better": 1 right, 0 wrong, 0.5 a tie."""
    return 0.5 + 0.5 * float(np.sign(len(pair["chosen"]) - len(pair["rejected"])))


def accuracy_by_tier(pairs: list[dict], outcomes: np.ndarray, seed: int) -> dict:
    """Accuracy by tier and kind, each with the accuracy of the longer answer beside it.

    Published tables mix two averages (docs/evaluation.md 7). For a kind and for the total, `mean_of_tiers` is the plain
    mean of the tiers' accuracies, and `accuracy` is over rows.

    Returns:
        {"groups": {"general hard": ...}, "kinds": {"general": ...}, "total": ..., "intervals": how they were drawn}
    """
    longer = np.array([longer_wins(pair) for pair in pairs])
    persons = persons_of(pairs)
    rows_of = rows_by_group([group_of(pair) or "all" for pair in pairs])

    def part(rows: list[int]) -> dict:
        result = accuracy(outcomes[rows], seed, persons and [persons[i] for i in rows])
        judged = longer[rows][~np.isnan(outcomes[rows])]  # the same pairs as the judge's
        return result | dict(longer_answer=float(judged.mean()) if len(judged) else None)

    groups = {label: part(rows) for label, rows in rows_of.items()}

    def over(labels: list[str]) -> dict:
        of_tiers = [groups[label]["accuracy"] for label in labels]
        mean = None if None in of_tiers else float(np.mean(of_tiers))
        return part(sorted(i for label in labels for i in rows_of[label])) | dict(mean_of_tiers=mean)

    labels_of: dict[str, list[str]] = {}  # of each kind
    for label, of_label in rows_of.items():
        if kind := pairs[of_label[0]].get("kind"):
            labels_of.setdefault(kind, []).append(label)
    return dict(
        groups=groups,
        kinds={kind: over(labels_of[kind]) for kind in sorted(labels_of)},
        total=over(list(groups)),
        intervals=interval_method(persons),
    )


def accuracy_table(results: dict) -> str:
    """Markdown."""
    groups = results["groups"]  # a kind without tiers is one of them
    kinds = {f"{kind}, all": part for kind, part in results["kinds"].items() if kind not in groups}
    parts = {**groups, **kinds, "total": results["total"]}
    rows = []
    for name, p in parts.items():
        rates = [number_text(p.get(k), scale=100) for k in ("mean_of_tiers", "ties_half", "longer_answer")]
        rows.append([name, percent_text(p, "accuracy"), *rates, p["ties"], p["n"], p["without_verdict"]])
    header = ["pairs", "accuracy %, by rows", "mean of tiers", "ties half", "longer answer %"]
    lines = [
        *markdown_table([*header, "ties", "n", "no verdict"], rows),
        "",
        f"Judge: {results['judge']}. A tie is not right; ties of the longer answer count half; 95 % intervals by "
        f"bootstrap, {results['intervals']}.",
    ]
    if results["position_bias"]:
        text = position_text(results["position_bias"])
        lines.append(f"{text[0].upper()}{text[1:]}.")
    lines += [f"{n} questions to the judge without a verdict: {kind}." for kind, n in results["failures"].items()]
    return "\n".join(lines) + "\n"
