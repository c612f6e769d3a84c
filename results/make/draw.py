"""Markdown tables and panels of curves, of the figures of experiments over seeds."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

from evaluation import tables
from evaluation.tables import spread
from results.make.figures import Figures
from runtime.rows import write_text

COLUMNS = {  # figure: (heading, digits, factor)
    "reward": ("score", 2, 1),
    "n_tokens": ("tokens", 1, 1),
    "recites": ("recites, %", 1, 1),
    "generated": ("generated tokens", 0, 1),
    "judge_calls": ("judge calls", 0, 1),
    "last_step": ("last step, %", 1, 100),
    "advice": ("advice, %", 1, 100),
    "advice_right": ("advice right, %", 1, 100),
    "wrong": ("wrong fact, %", 1, 100),
    "update": ("update, s", 1, 1),
    "trained": ("responses", 0, 1),
    "seconds": ("seconds", 0, 1),
}
RARE_CONTENT = ("last_step", "advice", "advice_right", "wrong")
GREY = "#777777"


# -- tables ------------------------------------------------------------------------------------------------------------


def percent(values: Iterable[float | None], digits: int = 1) -> str:
    return spread(values, digits, 100)


def column(figures: Iterable[Figures], name: str) -> str:
    """One cell: a figure of one experiment over its seeds."""
    _, digits, factor = COLUMNS[name]
    return spread([figure.get(name) for figure in figures], digits, factor)


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    return "\n".join(tables.markdown_table(header, rows))


def figure_table(header: Sequence[str], rows: Iterable[tuple[Sequence, list[Figures]]], names: Sequence[str]) -> str:
    """rows: the first cells (under `header`) and the figures of each seed. names: the columns, of COLUMNS."""
    cells = [[*first, *(column(figures, name) for name in names)] for first, figures in rows]
    return markdown_table([*header, *(COLUMNS[name][0] for name in names)], cells)


def difference(experiments: dict, name, other, figure: str) -> dict | None:
    """`name` less `other`, paired over seeds: mean, 95 % interval by Student's t, p, number of seeds.

    experiments: {name: {seed: figures}}. None with fewer than two seeds.
    """
    first = experiments.get(name, {})
    second = experiments.get(other, {})
    seeds = sorted(seed for seed in first if seed in second and figure in first[seed] and figure in second[seed])
    if len(seeds) < 2:
        return None
    differences = np.array([first[seed][figure] - second[seed][figure] for seed in seeds])
    test = stats.ttest_1samp(differences, 0)
    low, high = test.confidence_interval(0.95)
    return {
        "experiments": [name, other],
        "column": figure,
        "mean": float(differences.mean()),
        "low": float(low),
        "high": float(high),
        "p": float(test.pvalue),
        "seeds": len(seeds),
    }


def difference_table(
    header: Sequence[str], rows: Iterable[tuple[Sequence, dict]], p_values: Mapping[str, str] = {}
) -> str | None:
    """rows: the first cells (under `header`, whose last heading is that of the mean) and a `difference`.

    p_values: {key of a difference: heading}.
    """
    cells = []
    for first, d in rows:
        ps = ["< 0.001" if d[key] < 0.001 else f"{d[key]:.3f}" for key in p_values]
        interval = f"{d['low']:+.2f} to {d['high']:+.2f}"
        cells.append([*first, f"{d['mean']:+.2f}", interval, *ps, d["seeds"]])
    columns = [*header, "95 % interval over seeds", *p_values.values(), "seeds"]
    return markdown_table(columns, cells) if cells else None


def write_page(path: str, title: str, note: str, sections: dict[str, str | None]) -> None:
    """Writes and prints the tables of {title: table}; a section without a table is left out."""
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items() if table)
    write_text(path, f"# {title}\n\n{note}\n\n{text}\n")
    print(f"{text}\n\nwritten: {path} (figures are beside it)")


# -- figures -----------------------------------------------------------------------------------------------------------


def new_figure(n: int) -> tuple[Figure, Sequence[Axes]]:
    """n panels in a row."""
    figure = Figure(figsize=(4.2 * n, 3.4))
    return figure, figure.subplots(1, n, squeeze=False)[0]


def save_figure(figure: Figure, folder: str, name: str) -> None:
    figure.tight_layout()
    figure.savefig(f"{folder}/{name}.png", dpi=110)
    with rc_context({"svg.hashsalt": name}):  # reproducible ids: the same figure is the same file
        figure.savefig(f"{folder}/{name}.svg", metadata={"Date": None})


def plot_range(axis: Axes, curves: Sequence, color: str, **style) -> None:
    """Mean over seeds and, shaded, their range.

    curves: one per seed, a value a step, cut to the shortest; a None in one is a gap.
    """
    n = min(map(len, curves))
    ys = np.array([curve[:n] for curve in curves], dtype=float)
    steps = np.arange(1, n + 1)
    axis.plot(steps, ys.mean(0), color=color, **style)
    axis.fill_between(steps, ys.min(0), ys.max(0), color=color, alpha=0.15, lw=0)
