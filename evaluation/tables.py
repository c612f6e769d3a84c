"""Tables of evaluations as Markdown and CSV, and the files that evaluate.py writes."""

import csv
import io
import json
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evaluation import plots, winrate
from runtime.rows import write_text

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


def write_json(path: str, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def number_text(value: float | None, digits: int = 1, scale: float = 1.0) -> str:
    return "-" if value is None else f"{scale * value:.{digits}f}"


def spread(values: Iterable[float | None], digits: int = 2, factor: float = 1) -> str:
    """Text of the mean ± standard deviation over seeds; "-" without values."""
    known = [factor * value for value in values if value is not None]
    if not known:
        return "-"
    text = f"{round(np.mean(known), digits) + 0.0:.{digits}f}"  # no minus sign before a zero
    return f"{text} ± {np.std(known, ddof=1):.{digits}f}" if len(known) > 1 else text


def interval_text(
    value: float | None, low: float | None, high: float | None, scale: float = 1.0, digits: int = 1
) -> str:
    text = number_text(value, digits, scale)
    if value is None or low is None:
        return text
    return f"{text} ({number_text(low, digits, scale)} to {number_text(high, digits, scale)})"


def percent_text(rate: dict | None, name: str = "win_rate") -> str:
    """A rate in [0, 1] with its interval, in percent."""
    return "-" if rate is None else interval_text(rate[name], rate["low"], rate["high"], 100)


def markdown_row(*cells: Any) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> list[str]:
    """Lines of a table; the first column is left-aligned, the others are right-aligned."""
    rule = "|---" + "|--:" * (len(header) - 1) + "|"
    return [markdown_row(*header), rule, *(markdown_row(*row) for row in rows)]


def write_results(out: str, results: dict, args: dict, table: str, other_files: str) -> None:
    """Writes results.json (with the flags) and table.md, and prints the table. other_files: written before."""
    write_json(os.path.join(out, "results.json"), results | {"args": args})
    write_text(os.path.join(out, "table.md"), table)
    print(f"{table}\nwritten: {out}/ ({other_files}, results.json, table.md)")


def leaderboard_csv(comparisons: list[dict]) -> str:
    """One row a model, by falling length-controlled win rate; the first column, without a name, is the model."""
    rows = [(c["generators"]["model"], c["leaderboard"]) for c in comparisons]
    rows.sort(key=lambda row: -(row[1]["length_controlled_winrate"] or 0))
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    out.writerow(["", *LEADERBOARD])
    for name, row in rows:
        out.writerow([name, *(row[column] for column in LEADERBOARD)])  # None is written as an empty field
    return text.getvalue()


def position_text(bias: dict) -> str:
    first = percent_text(bias, "first_place")
    return f"the answer shown first is preferred at {first} %; both orders agree on {100 * bias['agree']:.1f} %"


def comparison_markdown(comparisons: list[dict], tests: Sequence[dict] = (), kappas: Sequence[dict] = ()) -> str:
    """The tables of a paper: win rates with 95 % intervals, by group, paired tests, kappas, remarks."""
    variants = [v for v in winrate.VARIANTS if any(v in c["length_controlled"] for c in comparisons)]
    rows = []
    for c in comparisons:
        controlled = []
        for lc in (c["length_controlled"].get(variant) for variant in variants):
            if lc is None:
                controlled.append("-")
                continue
            text = interval_text(lc["length_controlled_winrate"], lc["low"], lc["high"])
            controlled.append(text + (" *" if lc["notes"] else ""))
        rate = c["win_rate"]
        counts = [rate[name] for name in ("wins", "ties", "losses", "left_out")]
        characters = number_text(c["characters"]["model"], 0)
        rows.append([c["generators"]["model"], percent_text(rate), *controlled, characters, *counts])
    header = ["model", "win rate %", *(f"length-controlled %, {v}" for v in variants), "characters"]
    lines = markdown_table([*header, "wins", "draws", "losses", "no verdict"], rows)

    baselines = sorted(
        {(c["generators"]["baseline"], number_text(c["characters"]["baseline"], 0)) for c in comparisons}
    )
    against = ", ".join(f"{name} ({n} characters)" for name, n in baselines)
    judges = ", ".join(sorted({str(c["annotator"]) for c in comparisons}))
    intervals = " or ".join(dict.fromkeys(c["intervals"] for c in comparisons))
    lines += ["", f"Against {against}, judged by {judges}; 95 % intervals by bootstrap, {intervals}."]

    groups = list(dict.fromkeys(g for c in comparisons for g in c["groups"]))
    if groups:
        rows = [[c["generators"]["model"], *(percent_text(c["groups"].get(g)) for g in groups)] for c in comparisons]
        lines += ["", *markdown_table(["win rate %", *groups], rows)]
    if tests:
        rows = []
        for t in tests:
            p_values = [number_text(t[name], 4) for name in ("p_permutation", "p_sign")]
            counts = [t[name] for name in ("better", "equal", "worse")]
            rows.append([f"{t['first']} - {t['second']}", percent_text(t, "difference"), *counts, *p_values])
        header = ["paired", "difference, points", "better", "equal", "worse", "p, permutation", "p, sign"]
        lines += ["", *markdown_table(header, rows)]
    if kappas:
        rows = []
        for k in kappas:
            kappa = "undefined" if k["kappa"] is None else f"{k['kappa']:.3f}"
            agreement = number_text(k["agreement"], scale=100)
            rows.append([f"{k['first']}, {k['second']}", kappa, agreement, k["n"], k["left_out"]])
        lines += ["", *markdown_table(["judges", "Cohen's kappa", "agreement %", "rows", "left out"], rows)]
    lines += ["", *(f"- {remark}" for c in comparisons for remark in remarks(c))]
    return "\n".join(lines).rstrip() + "\n"


def remarks(comparison: dict) -> list[str]:
    """Notes that a reader of the numbers needs: on the fits, on the judge's bias, on missing answers."""
    name = comparison["generators"]["model"]
    lines = []
    for variant, lc in comparison["length_controlled"].items():
        lines += [f"* {name}, length-controlled ({variant}): {note}" for note in lc["notes"]]
    if comparison["position_bias"]:
        bias = comparison["position_bias"]
        lines.append(f"{name}: {position_text(bias)} of {bias['rows']} pairs")
    if comparison["methods"].get("votes"):
        lines.append(f"{name}: {comparison['methods']['votes']} verdicts are fractions of votes, not probabilities")
    for kind, count in sorted(comparison["failures"].items()):
        lines.append(f"{name}: {count} pairs without a verdict: {kind}")
    for field in ("missing", "truncated"):
        for side, ids in comparison[field].items():
            if ids:
                listed = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
                lines.append(f"{name}: {len(ids)} answers of the {side} are {field}: {listed}")
    return lines


def write_tables(
    out: str,
    comparisons: list[dict],
    annotations: list[list[dict]],
    tests: Sequence[dict] = (),
    kappas: Sequence[dict] = (),
    sides: dict[str, dict] | None = None,
) -> str:
    """Writes leaderboard.csv, table.md and plots/*.png and *.svg -> the Markdown.

    sides: {name: {dimension: mean_and_error}}, for the plot of mean scores.
    """
    write_text(os.path.join(out, "leaderboard.csv"), leaderboard_csv(comparisons))
    text = comparison_markdown(comparisons, tests, kappas)
    write_text(os.path.join(out, "table.md"), text)
    folder = os.path.join(out, "plots")
    os.makedirs(folder, exist_ok=True)
    plots.win_rates(comparisons, folder)
    plots.lengths(comparisons, annotations, folder)
    plots.scores(sides or {}, folder)
    return text
