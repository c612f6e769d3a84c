"""Plots of evaluations, as PNG and SVG."""

import os
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluation.annotations import verdicts_of
from runtime.rows import DIMENSIONS

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # distinct for colour-blind readers
GUIDE: dict[str, Any] = dict(color="0.6", linewidth=1, linestyle="--", zorder=0)


def new_plot(width: float, height: float) -> tuple[Figure, Axes]:
    """width, height: inches."""
    figure = Figure(figsize=(width, height))
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def save_plot(figure: Figure, folder: str, name: str) -> None:
    for kind in ("png", "svg"):
        figure.savefig(os.path.join(folder, f"{name}.{kind}"), dpi=150, bbox_inches="tight")


def win_rates(comparisons: list[dict], folder: str) -> None:
    """One line a model and group, with its 95 % interval; length-controlled rates in a second colour."""
    labels = []
    points = []  # (value, [low, high] or [], color), in percent

    def add(label: str, rate: dict, name: str, scale: int, color: str) -> None:
        if rate[name] is not None:
            labels.append(label)
            interval = [scale * rate[k] for k in ("low", "high") if rate[k] is not None]
            points.append((scale * rate[name], interval, color))

    for c in comparisons:
        if c["win_rate"]["win_rate"] is None:
            continue
        add(c["generators"]["model"], c["win_rate"], "win_rate", 100, COLORS[0])
        for variant, lc in c["length_controlled"].items():
            add(
                f"length-controlled, {variant}" + " *" * bool(lc["notes"]),
                lc,
                "length_controlled_winrate",
                1,
                COLORS[1],
            )
        for group, rate in c["groups"].items():
            n = rate["wins"] + rate["ties"] + rate["losses"]
            add(f"{group} (n = {n})", rate, "win_rate", 100, COLORS[2])
    if not points:
        return
    figure, axis = new_plot(6.5, 0.9 + 0.32 * len(points))
    for y, (value, interval, color) in enumerate(points):
        axis.plot(interval, [y] * len(interval), color=color, linewidth=2, solid_capstyle="butt")
        axis.plot(value, y, "o", color=color, markersize=6)
    axis.axvline(50, **GUIDE)
    axis.set_yticks(range(len(points)), labels)
    axis.set_ylim(len(points) - 0.5, -0.5)
    axis.set_xlim(-2, 102)  # shows whole markers at either end
    baselines = {c["generators"]["baseline"] for c in comparisons}
    baseline = baselines.pop() if len(baselines) == 1 else "the baseline"
    axis.set_xlabel(f"win rate against {baseline}, %, 95 % interval")
    save_plot(figure, folder, "win_rates")


def lengths(comparisons: list[dict], annotations: list[list[dict]], folder: str) -> None:
    """Mean verdict by the difference of lengths: eight bins of equally many rows, with standard errors."""
    figure, axis = new_plot(6.5, 3.8)
    for k, (c, rows) in enumerate(zip(comparisons, annotations)):
        verdicts = verdicts_of(rows)
        difference = np.array([len(row["output_2"]) - len(row["output_1"]) for row in rows])
        judged = np.flatnonzero(~np.isnan(verdicts))
        order = judged[np.argsort(difference[judged], kind="stable")]
        bins = [b for b in np.array_split(order, min(8, max(1, len(order) // 5))) if len(b)]
        axis.errorbar(
            [difference[b].mean() for b in bins],
            [100 * verdicts[b].mean() for b in bins],
            yerr=[100 * verdicts[b].std(ddof=1) / len(b) ** 0.5 if len(b) > 1 else 0 for b in bins],
            fmt="o-",
            color=COLORS[k % len(COLORS)],
            capsize=2,
            markersize=4,
            label=c["generators"]["model"],
        )
    axis.axhline(50, **GUIDE)
    axis.axvline(0, **GUIDE)
    axis.set_ylim(-3, 103)
    axis.set_xlabel("characters of the model's answer minus the baseline's")
    axis.set_ylabel("win rate, % ± standard error")
    axis.legend(frameon=False)
    save_plot(figure, folder, "lengths")


def scores(sides: dict[str, dict], folder: str) -> None:
    """Mean score by dimension with standard errors. Sides without scores are left out."""
    sides = {name: side for name, side in sides.items() if all(side[d]["mean"] is not None for d in DIMENSIONS)}
    if not sides:
        return
    figure, axis = new_plot(6.5, 3.4)
    width = 0.8 / len(sides)
    for i, (name, side) in enumerate(sides.items()):
        axis.bar(
            np.arange(len(DIMENSIONS)) + (i - (len(sides) - 1) / 2) * width,
            [side[d]["mean"] for d in DIMENSIONS],
            0.92 * width,
            yerr=[side[d]["standard_error"] or 0 for d in DIMENSIONS],
            capsize=3,
            color=COLORS[i % len(COLORS)],
            label=name,
        )
    axis.axhline(0, color="0.3", linewidth=1)
    axis.set_xticks(range(len(DIMENSIONS)), DIMENSIONS)
    axis.set_ylabel("mean score, -5 to 5, ± standard error")
    axis.legend(frameon=False)
    save_plot(figure, folder, "scores")
