"""Comparisons from annotations: the numbers that evaluate.py writes once all verdicts are there. No model, no judge.

An annotation is a row in AlpacaEval's format: instruction, output_1 (the baseline's), output_2 (the model's),
generator_1, generator_2, annotator, preference (1 baseline, 2 model, null no verdict). Ours have more fields, which
AlpacaEval's tool ignores and this module does not need: prompt_id, user_id, group (such as "general hard"), shown
(P(model) by the order in which the answers were shown), method, failure, missing and truncated (lists of sides).
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from evaluation import winrate
from json_files import read_json_list

TEXTS = ("instruction", "output_1", "output_2", "generator_1", "generator_2")
FIELDS = (*TEXTS, "preference")
LABELS = ("prompt_id", "user_id", "group", "annotator", "method", "failure")
SIDES = ("model", "baseline")


def read_annotations(path: str) -> list[dict]:
    """Reads an annotation file. ValueError: it is not one, a field is wrong, or it holds several models."""
    rows = read_json_list(path, "AlpacaEval's annotations")
    if not rows:
        raise ValueError(f"{path}: expected a non-empty JSON list of annotations")

    def check(i: int, field: str, holds: bool, expected: str) -> None:
        if not holds:
            value = json.dumps(rows[i][field])[:80]
            raise ValueError(f'{path}, entry {i}: field "{field}" is {value}, expected {expected}')

    for i, row in enumerate(rows):
        for field in FIELDS:
            if not isinstance(row, dict) or field not in row:
                raise ValueError(f'{path}, entry {i}: field "{field}" is missing; expected {", ".join(FIELDS)}')
        for field in TEXTS:
            check(i, field, isinstance(row[field], str), "a text")
        preference = row["preference"]
        is_number = isinstance(preference, int | float | None) and not isinstance(preference, bool)
        check(i, "preference", is_number, "1 to 2, 0 or null")
        for field in LABELS:
            check(i, field, not isinstance(row.get(field), dict | list), "a text or a number")
    for field in ("generator_1", "generator_2"):
        names = sorted({row[field] for row in rows})
        if len(names) > 1:
            raise ValueError(f'{path}: field "{field}" has {len(names)} values ({names[:3]}), expected one a file')
    return rows


# -- rows --------------------------------------------------------------------------------------------------------------


def verdicts_of(annotations: list[dict]) -> np.ndarray:
    """Verdicts in [0, 1], NaN where there is none: fp64 [n]."""
    return winrate.verdicts_from_preferences([row["preference"] for row in annotations])


def persons_of(rows: list[dict]) -> list | None:
    """The user_id of each row, so that a bootstrap draws a person's rows together; None where one has none."""
    persons = [row.get("user_id") for row in rows]
    return None if None in persons else persons


def interval_method(persons: list | None) -> str:
    return "rows of one user_id drawn together" if persons else "rows drawn one by one"


def group_of(row: dict) -> str | None:
    """PersonaFeedback's kind and tier, such as "general hard"; None where a row has neither."""
    return " ".join(row[k] for k in ("kind", "tier") if row.get(k)) or None


def rows_by_group(labels: Sequence[str | None]) -> dict[str, list[int]]:
    """{label: row indices}, by kind and then from easy to hard. Rows without a label are left out."""
    tiers = {"easy": "1", "mid": "2", "hard": "3"}
    groups: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        if label is not None:
            groups.setdefault(label, []).append(i)
    return {
        label: groups[label]
        for label in sorted(groups, key=lambda label: [tiers.get(word, word) for word in label.split()])
    }


def mean_and_error(values: Iterable[float | None]) -> dict[str, float | None]:
    """{"mean", "standard_error"} of the values that exist; None where these are too few."""
    numbers = [v for v in values if v is not None]
    error = float(np.std(numbers, ddof=1) / len(numbers) ** 0.5) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)) if numbers else None, "standard_error": error}


# -- numbers -----------------------------------------------------------------------------------------------------------


def win_rate(verdicts: np.ndarray, seed: int, persons: list | None = None) -> dict:
    """The win rate in [0, 1] with a 95 % bootstrap interval, and counts. Rows without a verdict are left out."""
    y = verdicts[~np.isnan(verdicts)]
    return winrate.mean_and_interval(verdicts, seed, persons, "win_rate") | dict(
        wins=int((y > 0.5).sum()),
        ties=int((y == 0.5).sum()),
        losses=int((y < 0.5).sum()),
        left_out=len(verdicts) - len(y),
    )


def characters_of(annotations: list[dict], side: str, field: str) -> np.ndarray:
    """The length of each answer of a side, NaN where it is missing: fp64 [n]."""
    lengths = [np.nan if side in row.get("missing", ()) else len(row[field]) for row in annotations]
    return np.array(lengths, dtype=np.float64)


def compare(annotations: list[dict], seed: int, gamed: dict | None = None, draws: int = 1000) -> dict:
    """The numbers of one comparison, as results.json holds them. Adds `glm_preference` to the annotations.

    draws: bootstrap draws of the length-controlled rate.
    """
    verdicts = verdicts_of(annotations)
    persons = persons_of(annotations)
    lengths = (characters_of(annotations, "model", "output_2"), characters_of(annotations, "baseline", "output_1"))
    model = annotations[0]["generator_2"]
    baseline = annotations[0]["generator_1"]
    is_baseline = model == baseline and all(row["output_1"] == row["output_2"] for row in annotations)
    controlled = {}
    for variant in ("minimal",) if gamed is None else winrate.VARIANTS:
        result = winrate.length_controlled(verdicts, *lengths, variant, gamed, same=is_baseline)
        predictions = result.pop("predictions")
        if variant == "minimal" and predictions is not None:
            for row, prediction in zip(annotations, predictions):
                row["glm_preference"] = float(prediction)
        low, high = winrate.bootstrap_length_controlled(verdicts, *lengths, result, seed, gamed, persons, draws)
        controlled[variant] = result | dict(low=low, high=high)
    characters = {side: mean_and_error(n[~np.isnan(n)])["mean"] for side, n in zip(SIDES, lengths)}
    groups = {}
    for label, rows in rows_by_group([row.get("group") for row in annotations]).items():
        groups[label] = win_rate(verdicts[rows], seed, persons and [persons[i] for i in rows])
    ids: dict[str, dict[str, list]] = {field: {side: [] for side in SIDES} for field in ("missing", "truncated")}
    for field, of_side in ids.items():
        for i, row in enumerate(annotations):
            for side in SIDES:
                if side in row.get(field, ()):
                    of_side[side].append(row.get("prompt_id", i))
    return dict(
        generators=dict(model=model, baseline=baseline),
        annotator=annotations[0].get("annotator"),
        rows=len(annotations),
        intervals=interval_method(persons),
        win_rate=win_rate(verdicts, seed, persons),
        length_controlled=controlled,
        groups=groups,
        leaderboard=leaderboard_row(verdicts, characters["model"], controlled),
        characters=characters,
        position_bias=position_bias([row.get("shown") for row in annotations], seed, persons),
        methods=dict(Counter(row["method"] for row in annotations if row.get("method"))),
        failures=dict(Counter(row["failure"] for row in annotations if row.get("failure"))),
        **ids,
    )


def leaderboard_row(verdicts: np.ndarray, length: float | None, controlled: dict[str, dict]) -> dict:
    """AlpacaEval's columns. The length-controlled rate is v1's where there is one, as upstream.

    length: mean characters of the answers.
    """
    variant = controlled.get("v1") or controlled["minimal"]
    rates = {name: variant[name] for name in ("length_controlled_winrate", "lc_standard_error")}
    return winrate.plain(verdicts) | rates | dict(mode="community", avg_length=None if length is None else int(length))


def position_bias(shown: Sequence[dict | None], seed: int, persons: list | None) -> dict | None:
    """The effect of the order in which answers are shown; None where no row was asked in both orders.

    shown: for each row {"baseline_first": P(model), "model_first": P(model)} or None.

    Returns:
        first_place: mean preference for the answer shown first, 0.5 without a bias, with its interval; agree: fraction
        of rows in which the same answer won in both orders; rows
    """
    asked = enumerate(shown)
    of_row = {i: s for i, s in asked if s and None not in (s.get("baseline_first"), s.get("model_first"))}
    if not of_row:
        return None
    both = of_row.values()
    persons = persons and [persons[i] for i in of_row]
    baseline_first = np.array([s["baseline_first"] for s in both], dtype=np.float64)
    model_first = np.array([s["model_first"] for s in both], dtype=np.float64)
    first = (1 - baseline_first + model_first) / 2
    agree = np.mean(np.sign(baseline_first - 0.5) == np.sign(model_first - 0.5))
    return winrate.mean_and_interval(first, seed, persons, "first_place") | dict(agree=float(agree), rows=len(both))


# -- two files ---------------------------------------------------------------------------------------------------------


def matched(
    first: list[dict], second: list[dict], fields: tuple[str, ...], paths: tuple[str, str]
) -> tuple[list[dict], list[dict]]:
    """Rows of two annotation files with equal `fields`, and equal prompt_id where all rows have one, side by side.

    ValueError: two rows of one file are equal in these fields, so one of them would count twice.
    """
    if all(row.get("prompt_id") is not None for row in [*first, *second]):
        fields = ("prompt_id", *fields)
    indices = []  # of each file: {key: index}
    for path, rows in zip(paths, (first, second)):
        index_of: dict[tuple, int] = {}
        for i, row in enumerate(rows):
            earlier = index_of.setdefault(tuple(row[field] for field in fields), i)
            if earlier != i:
                raise ValueError(
                    f"{path}, entry {i}: entry {earlier} has the same {', '.join(fields)}; a comparison of files needs "
                    "each once"
                )
        indices.append(index_of)
    keys = [key for key in indices[0] if key in indices[1]]
    return [first[indices[0][key]] for key in keys], [second[indices[1][key]] for key in keys]


def paired(first: list[dict], second: list[dict], seed: int, paths: tuple[str, str]) -> dict | None:
    """Tests two models on the questions in both files, against the same baseline answers; None without any.

    None, too, if the files have different baselines, such as one model against SFT and against PPO. ValueError: the
    answers differ, but both baselines have one name.

    Returns:
        names, in_one_file_only (rows), and what winrate.paired_test returns
    """
    a, b = matched(first, second, ("instruction",), paths)
    if not a:
        return None
    both = [(x, y) for x, y in zip(a, b) if "baseline" not in [*x.get("missing", ()), *y.get("missing", ())]]
    if any(x["output_1"] != y["output_1"] for x, y in both):
        if first[0]["generator_1"] != second[0]["generator_1"]:
            return None
        raise ValueError(
            f"{first[0]['generator_2']} and {second[0]['generator_2']} were compared with different answers of a "
            "baseline: a paired test would mean nothing"
        )
    result = winrate.paired_test(verdicts_of(a), verdicts_of(b), seed, persons_of(a))
    return dict(
        first=first[0]["generator_2"],
        second=second[0]["generator_2"],
        in_one_file_only=len(first) + len(second) - 2 * len(a),
        **result,
    )


def judge_kappa(annotations: list[dict], labels: list[dict], paths: tuple[str, str]) -> dict | None:
    """Cohen's kappa of two judges, or a judge and people, over the pairs of answers in both files; None without any."""
    a, b = matched(annotations, labels, ("instruction", "output_1", "output_2"), paths)
    if not a:
        return None
    return dict(
        first=annotations[0].get("annotator"),
        second=labels[0].get("annotator"),
        in_one_file_only=len(annotations) + len(labels) - 2 * len(a),
        **winrate.cohens_kappa(verdicts_of(a), verdicts_of(b)),
    )
