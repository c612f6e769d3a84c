"""From annotations to tables: what evaluate.py writes when all verdicts are there. No model, no judge.

An annotation is a row in AlpacaEval's format: instruction, output_1 (the baseline's), output_2 (the model's),
generator_1, generator_2, annotator, preference (1 baseline, 2 model, null no verdict). Ours hold more, which
AlpacaEval's tool ignores and everything here can do without: prompt_id, user_id, group (such as "general hard"),
shown (P(model) by the order in which the answers were shown), method, failure, missing and truncated (lists of sides).
"""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.figure import Figure

from evaluation import winrate
from prompts import DIMENSIONS
from runtime.rows import write_text

FIELDS = ("instruction", "output_1", "output_2", "generator_1", "generator_2", "preference")
LEADERBOARD = (
    "win_rate",
    "standard_error",
    "mode",
    "avg_length",
    "n_wins",
    "n_wins_base",
    "n_draws",
    "n_total",
    "discrete_win_rate",
    "length_controlled_winrate",
    "lc_standard_error",
)


def write_json(path: str, value) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_annotations(path: str) -> list[dict]:
    """Rows of an annotation file. ValueError: not a JSON list of them, two models in one file, a wrong field."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
        raise ValueError(f"{path}: not JSON ({error}); expected AlpacaEval's annotations, a JSON list") from error
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty JSON list of annotations")
    for i, row in enumerate(rows):
        missing = [field for field in FIELDS if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f'{path}, entry {i}: field "{missing[0]}" is missing; expected {", ".join(FIELDS)}')
        for field in FIELDS[:5]:
            if not isinstance(row[field], str):
                found = json.dumps(row[field])[:80]
                raise ValueError(f'{path}, entry {i}: field "{field}" is {found}, expected a text')
        preference = row["preference"]
        if isinstance(preference, bool) or not isinstance(preference, (int, float, type(None))):
            found = json.dumps(preference)[:80]
            raise ValueError(f'{path}, entry {i}: field "preference" is {found}, expected 1 to 2, 0 or null')
        for field in ("prompt_id", "user_id", "group", "annotator", "method", "failure"):
            if isinstance(row.get(field), (dict, list)):
                found = json.dumps(row[field])[:80]
                raise ValueError(f'{path}, entry {i}: field "{field}" is {found}, expected a text or a number')
    for field in ("generator_1", "generator_2"):
        names = sorted({row[field] for row in rows})
        if len(names) > 1:
            raise ValueError(f'{path}: field "{field}" has {len(names)} values ({names[:3]}), expected one a file')
    return rows


def verdicts_of_annotations(annotations: list[dict]) -> np.ndarray:
    """fp64 [n] in [0, 1], NaN without a verdict."""
    return winrate.verdicts_from_preferences([row["preference"] for row in annotations])


def persons_of(annotations: list[dict]) -> list | None:
    """Labels for intervals that draw a person's rows together; None where rows do not say whose they are."""
    persons = [row.get("user_id") for row in annotations]
    return None if None in persons else persons


def group_of(row: dict) -> str | None:
    """ "general hard" for PersonaFeedback's kinds and tiers; None where rows have neither."""
    return " ".join(row[k] for k in ("kind", "tier") if row.get(k)) or None


def in_order(groups: Iterable[str]) -> list[str]:
    """Distinct labels by kind, then from easy to hard."""
    tiers = {"easy": "1", "mid": "2", "hard": "3"}
    return sorted(set(groups), key=lambda label: [tiers.get(word, word) for word in label.split()])


def mean_and_error(values: Iterable[float | None]) -> dict[str, float | None]:
    """{"mean", "standard_error"} of the values that are not None; None where those are too few."""
    values = [v for v in values if v is not None]
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(np.mean(values)) if values else None, "standard_error": error}


# -- numbers -----------------------------------------------------------------------------------------------------------


def share_won(verdicts: np.ndarray, seed: int, persons: list | None = None) -> dict:
    """Shares in [0, 1] with a 95 % bootstrap interval. Rows without a verdict are left out and counted."""
    low, high = winrate.bootstrap_mean(verdicts, seed, persons)
    y = verdicts[~np.isnan(verdicts)]
    return dict(
        win_rate=float(y.mean()) if len(y) else None,
        low=low,
        high=high,
        wins=int((y > 0.5).sum()),
        ties=int((y == 0.5).sum()),
        losses=int((y < 0.5).sum()),
        left_out=int(np.isnan(verdicts).sum()),
    )


def compare(annotations: list[dict], seed: int, gamed: dict | None = None, draws: int = 1000) -> dict:
    """The numbers of one comparison, as results.json holds them. draws: of the length-controlled rate's bootstrap."""
    verdicts, persons = verdicts_of_annotations(annotations), persons_of(annotations)
    lengths = [len(row["output_2"]) for row in annotations], [len(row["output_1"]) for row in annotations]
    same = annotations[0]["generator_1"] == annotations[0]["generator_2"]
    controlled = {}
    for variant in ("minimal",) if gamed is None else winrate.VARIANTS:
        result = winrate.length_controlled(verdicts, *lengths, variant, gamed, same)
        low, high = winrate.bootstrap_length_controlled(verdicts, *lengths, result, seed, gamed, persons, draws)
        controlled[variant] = result | dict(low=low, high=high)
        predictions = controlled[variant].pop("predictions")
        if variant == "minimal" and predictions is not None:
            for row, prediction in zip(annotations, predictions):
                row["glm_preference"] = float(prediction)
    labels = [row.get("group") for row in annotations]
    groups = {}
    for label in in_order(label for label in labels if label is not None):
        rows = np.array([i for i, other in enumerate(labels) if other == label])
        groups[label] = share_won(verdicts[rows], seed, persons and [persons[i] for i in rows])
    return dict(
        generators=dict(model=annotations[0]["generator_2"], baseline=annotations[0]["generator_1"]),
        annotator=annotations[0].get("annotator"),
        rows=len(annotations),
        intervals="rows of one user_id drawn together" if persons else "rows drawn one by one",
        win_rate=share_won(verdicts, seed, persons),
        length_controlled=controlled,
        groups=groups,
        leaderboard=leaderboard_row(annotations, verdicts, controlled),
        characters=dict(model=float(np.mean(lengths[0])), baseline=float(np.mean(lengths[1]))),
        position_bias=position_bias([row.get("shown") for row in annotations], seed),
        methods=dict(Counter(row["method"] for row in annotations if row.get("method"))),
        failures=dict(Counter(row["failure"] for row in annotations if row.get("failure"))),
        **{
            what: {
                side: [row.get("prompt_id", i) for i, row in enumerate(annotations) if side in row.get(what, ())]
                for side in ("model", "baseline")
            }
            for what in ("missing", "truncated")
        },
    )


def leaderboard_row(annotations: list[dict], verdicts: np.ndarray, controlled: dict[str, dict]) -> dict:
    """AlpacaEval's columns. The length-controlled rate is v1's where there is one, as upstream's."""
    variant = controlled.get("v1") or controlled["minimal"]
    rates = {name: variant[name] for name in ("length_controlled_winrate", "lc_standard_error")}
    average = int(np.mean([len(row["output_2"]) for row in annotations]))
    return winrate.plain(verdicts) | rates | dict(mode="community", avg_length=average)


def position_bias(shown: list[dict | None], seed: int) -> dict | None:
    """What the order of showing does. shown: per row {"baseline_first": P(model), "model_first": P(model)} or None.

    first_place: mean preference for whichever answer was shown first, 0.5 without a bias; agree: share of the rows
    in which the same answer won in both orders. None where no row was asked in both.
    """
    both = [s for s in shown if s and None not in (s.get("baseline_first"), s.get("model_first"))]
    if not both:
        return None
    first = np.array([(1 - s["baseline_first"] + s["model_first"]) / 2 for s in both])
    low, high = winrate.bootstrap_mean(first, seed)
    agree = np.mean([np.sign(s["baseline_first"] - 0.5) == np.sign(s["model_first"] - 0.5) for s in both])
    return dict(first_place=float(first.mean()), low=low, high=high, agree=float(agree), rows=len(both))


def matched(first: list[dict], second: list[dict], fields: tuple[str, ...], paths: tuple[str, str]) -> list[tuple]:
    """Rows of two annotation files with equal `fields`, and equal prompt_id where all rows have one -> pairs of rows.

    ValueError: two rows of one file are equal in these, so that one would count twice or the last of them win.
    """
    if all(row.get("prompt_id") is not None for row in [*first, *second]):
        fields = ("prompt_id", *fields)
    entries = []  # by file: {key: its place}
    for path, rows in zip(paths, (first, second)):
        places = {}
        for i, row in enumerate(rows):
            place = places.setdefault(tuple(row[field] for field in fields), i)
            if place != i:
                raise ValueError(
                    f"{path}, entry {i}: entry {place} has the same {', '.join(fields)}; a comparison of files needs "
                    "each once"
                )
        entries.append(places)
    return [(first[i], second[entries[1][key]]) for key, i in entries[0].items() if key in entries[1]]


def paired(first: list[dict], second: list[dict], seed: int, paths: tuple[str, str]) -> dict:
    """Two models (annotations each, paths: of their files) on the same questions against the same answers
    -> names, winrate.paired_test.
    """
    both = matched(first, second, ("instruction",), paths)
    if any(a["output_1"] != b["output_1"] for a, b in both):
        raise ValueError(
            f"{first[0]['generator_2']} and {second[0]['generator_2']} were compared with different "
            "answers of a baseline: a paired test would mean nothing"
        )
    a, b = (verdicts_of_annotations(rows) for rows in zip(*both)) if both else (np.array([]), np.array([]))
    result = winrate.paired_test(a, b, seed, persons_of([row for row, _ in both]))
    return dict(first=first[0]["generator_2"], second=second[0]["generator_2"], **result)


def judge_kappa(annotations: list[dict], labels: list[dict], paths: tuple[str, str]) -> dict | None:
    """Cohen's kappa of two judges (or a judge and people) over the pairs of answers in both files; None without any."""
    both = matched(annotations, labels, ("instruction", "output_1", "output_2"), paths)
    if not both:
        return None
    a, b = (verdicts_of_annotations(rows) for rows in zip(*both))
    return dict(
        first=annotations[0].get("annotator"),
        second=labels[0].get("annotator"),
        in_one_file_only=len(annotations) + len(labels) - 2 * len(both),
    ) | winrate.cohens_kappa(a, b)


# -- text --------------------------------------------------------------------------------------------------------------


def leaderboard_csv(comparisons: list[dict]) -> str:
    """One row a model, by falling length-controlled win rate; the first column, without a name, is the model."""
    rows = [(c["generators"]["model"], c["leaderboard"]) for c in comparisons]
    rows.sort(key=lambda row: -(row[1]["length_controlled_winrate"] or 0))
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["", *LEADERBOARD])
    for name, row in rows:
        out.writerow([name, *("" if row[column] is None else row[column] for column in LEADERBOARD)])
    return text.getvalue()


def interval_text(value: float | None, low: float | None, high: float | None, scale: float = 1.0) -> str:
    if value is None:
        return "-"
    return f"{scale * value:.1f}" + ("" if low is None else f" ({scale * low:.1f} to {scale * high:.1f})")


def markdown_row(*cells) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def comparison_markdown(comparisons: list[dict], tests: Sequence[dict] = (), kappas: Sequence[dict] = ()) -> str:
    """The tables of a paper: win rates with 95 % intervals, by group, paired tests, kappas, remarks."""
    variants = [v for v in winrate.VARIANTS if any(v in c["length_controlled"] for c in comparisons)]
    lines = [
        markdown_row(
            "model",
            "win rate %",
            *(f"length-controlled %, {v}" for v in variants),
            "characters",
            "wins",
            "draws",
            "losses",
            "no verdict",
        ),
        markdown_row("---", *["--:"] * (6 + len(variants))),
    ]
    for c in comparisons:
        won, cells = c["win_rate"], []
        for variant in variants:
            lc = c["length_controlled"].get(variant)
            cells.append(
                "-"
                if lc is None
                else interval_text(lc["length_controlled_winrate"], lc["low"], lc["high"])
                + (" *" if lc["notes"] else "")
            )
        lines.append(
            markdown_row(
                c["generators"]["model"],
                interval_text(won["win_rate"], won["low"], won["high"], 100),
                *cells,
                f"{c['characters']['model']:.0f}",
                won["wins"],
                won["ties"],
                won["losses"],
                won["left_out"],
            )
        )
    baselines = sorted({(c["generators"]["baseline"], round(c["characters"]["baseline"])) for c in comparisons})
    lines += [
        "",
        "Against "
        + ", ".join(f"{name} ({n} characters)" for name, n in baselines)
        + ", judged by "
        + ", ".join(sorted({str(c["annotator"]) for c in comparisons}))
        + f"; 95 % intervals by bootstrap, {comparisons[0]['intervals']}.",
    ]
    groups = list(dict.fromkeys(g for c in comparisons for g in c["groups"]))
    if groups:
        lines += ["", markdown_row("win rate %", *groups), markdown_row("---", *["--:"] * len(groups))]
        for c in comparisons:
            cells = [c["groups"].get(g) for g in groups]
            lines.append(
                markdown_row(
                    c["generators"]["model"],
                    *("-" if w is None else interval_text(w["win_rate"], w["low"], w["high"], 100) for w in cells),
                )
            )
    if tests:
        lines += [
            "",
            markdown_row("paired", "difference, points", "better", "equal", "worse", "p, permutation", "p, sign"),
            markdown_row("---", *["--:"] * 6),
        ]
        for t in tests:
            p = ["-" if t[name] is None else f"{t[name]:.4f}" for name in ("p_permutation", "p_sign")]
            lines.append(
                markdown_row(
                    f"{t['first']} - {t['second']}",
                    interval_text(t["difference"], t["low"], t["high"], 100),
                    t["better"],
                    t["equal"],
                    t["worse"],
                    *p,
                )
            )
    if kappas:
        lines += [
            "",
            markdown_row("judges", "Cohen's kappa", "agreement %", "rows", "left out"),
            markdown_row("---", *["--:"] * 4),
        ]
        for k in kappas:
            kappa = "undefined" if k["kappa"] is None else f"{k['kappa']:.3f}"
            share = "-" if k["agreement"] is None else f"{100 * k['agreement']:.1f}"
            lines.append(markdown_row(f"{k['first']}, {k['second']}", kappa, share, k["n"], k["left_out"]))
    notes = [line for c in comparisons for line in remarks(c)]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]).rstrip() + "\n"


def remarks(c: dict) -> list[str]:
    """What a reader of the numbers has to know: notes on the fits, the judge's bias, what is missing."""
    name, lines = c["generators"]["model"], []
    for variant, lc in c["length_controlled"].items():
        lines += [f"* {name}, length-controlled ({variant}): {note}" for note in lc["notes"]]
    if c["position_bias"]:
        bias = c["position_bias"]
        share = interval_text(bias["first_place"], bias["low"], bias["high"], 100)
        lines.append(
            f"{name}: the answer shown first is preferred at {share} %; both orders agree on "
            f"{100 * bias['agree']:.1f} % of {bias['rows']} pairs"
        )
    if c["methods"].get("votes"):
        lines.append(f"{name}: {c['methods']['votes']} verdicts are shares of votes, not log-probabilities")
    for kind, count in sorted(c["failures"].items()):
        lines.append(f"{name}: {count} pairs without a verdict: {kind}")
    for what in ("missing", "truncated"):
        for side, ids in c[what].items():
            if ids:
                shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
                lines.append(f"{name}: {len(ids)} answers of the {side} are {what}: {shown}")
    return lines


# -- plots -------------------------------------------------------------------------------------------------------------

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # told apart by colour-blind readers too


def new_plot(size: tuple[float, float]):
    """size: inches -> (figure, axis)."""
    figure = Figure(figsize=size)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def save_plot(figure: Figure, folder: str, name: str) -> None:
    for kind in ("png", "svg"):
        figure.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=150, bbox_inches="tight")


def plot_win_rates(comparisons: list[dict], folder: str) -> None:
    """One line a model and group, with 95 % intervals; the length-controlled rate in a second colour."""
    lines = []  # (label, value, low, high, colour), in percent
    for c in comparisons:
        won = c["win_rate"]
        if won["win_rate"] is None:
            continue
        name = c["generators"]["model"]
        lines.append((f"{name}", *(100 * won[k] for k in ("win_rate", "low", "high")), COLORS[0]))
        for variant, lc in c["length_controlled"].items():
            if lc["low"] is not None:
                lines.append(
                    (f"length-controlled, {variant}", lc["length_controlled_winrate"], lc["low"], lc["high"], COLORS[1])
                )
        for group, share in c["groups"].items():
            if share["win_rate"] is not None:
                lines.append(
                    (
                        f"{group} (n = {share['wins'] + share['ties'] + share['losses']})",
                        *(100 * share[k] for k in ("win_rate", "low", "high")),
                        COLORS[2],
                    )
                )
    if not lines:
        return
    figure, axis = new_plot((6.5, 0.9 + 0.32 * len(lines)))
    for y, (_, value, low, high, color) in enumerate(lines):
        axis.plot([low, high], [y, y], color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(value, y, "o", color=color, markersize=6)
    axis.axvline(50, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axis.set_yticks(range(len(lines)), [line[0] for line in lines])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.set_xlim(-2, 102)  # a marker at either end is whole
    axis.set_xlabel(f"win rate against {comparisons[0]['generators']['baseline']}, %, 95 % interval")
    save_plot(figure, folder, "win_rates")


def plot_lengths(comparisons: list[dict], annotations: list[list[dict]], folder: str) -> None:
    """Mean verdict by how much longer the model's answer is: eight bins of equally many rows, with standard errors."""
    figure, axis = new_plot((6.5, 3.8))
    for c, rows, color in zip(comparisons, annotations, COLORS * len(comparisons)):
        verdicts = verdicts_of_annotations(rows)
        gap = np.array([len(row["output_2"]) - len(row["output_1"]) for row in rows])
        judged = np.flatnonzero(~np.isnan(verdicts))
        order = judged[np.argsort(gap[judged], kind="stable")]
        bins = [b for b in np.array_split(order, min(8, max(1, len(order) // 5))) if len(b)]
        x, y = [gap[b].mean() for b in bins], [100 * verdicts[b].mean() for b in bins]
        error = [100 * verdicts[b].std(ddof=1) / len(b) ** 0.5 if len(b) > 1 else 0 for b in bins]
        axis.errorbar(x, y, yerr=error, fmt="o-", color=color, capsize=2, markersize=4, label=c["generators"]["model"])
    axis.axhline(50, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axis.axvline(0, color="0.6", linewidth=1, linestyle="--", zorder=0)
    axis.set_ylim(-3, 103)
    axis.set_xlabel("characters of the model's answer minus the baseline's")
    axis.set_ylabel("win rate, % ± standard error")
    axis.legend(frameon=False)
    save_plot(figure, folder, "lengths")


def plot_scores(sides: dict[str, dict], folder: str) -> None:
    """Mean score by dimension with standard errors. sides: {name: {dimension: mean_and_error}}; may lack scores."""
    sides = {name: scores for name, scores in sides.items() if all(scores[d]["mean"] is not None for d in DIMENSIONS)}
    if not sides:
        return
    figure, axis = new_plot((6.5, 3.4))
    width = 0.8 / len(sides)
    for i, (name, scores) in enumerate(sides.items()):
        x = np.arange(len(DIMENSIONS)) + (i - (len(sides) - 1) / 2) * width
        errors = [scores[d]["standard_error"] or 0 for d in DIMENSIONS]
        axis.bar(
            x,
            [scores[d]["mean"] for d in DIMENSIONS],
            0.92 * width,
            yerr=errors,
            capsize=3,
            color=COLORS[i % len(COLORS)],
            label=name,
        )
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set_xticks(range(len(DIMENSIONS)), DIMENSIONS)
    axis.set_ylabel("mean score, -5 to 5, ± standard error")
    axis.legend(frameon=False)
    save_plot(figure, folder, "scores")


def write_tables(
    out: str,
    comparisons: list[dict],
    annotations: list[list[dict]],
    tests: Sequence[dict] = (),
    kappas: Sequence[dict] = (),
    sides: dict[str, dict] | None = None,
) -> str:
    """leaderboard.csv, table.md, plots/*.png and *.svg of some comparisons -> the Markdown."""
    folder = os.path.join(out, "plots")
    os.makedirs(folder, exist_ok=True)
    write_text(os.path.join(out, "leaderboard.csv"), leaderboard_csv(comparisons))
    text = comparison_markdown(comparisons, tests, kappas)
    write_text(os.path.join(out, "table.md"), text)
    plot_win_rates(comparisons, folder)
    plot_lengths(comparisons, annotations, folder)
    plot_scores(sides or {}, folder)
    return text
