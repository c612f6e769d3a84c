"""The curves of training runs as PNG and SVG."""

import itertools
import os

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reporting.panels import AXES, OTHER

COLUMNS = 4
LINE_STYLES = ("-", "--", ":", "-.", (0, (1, 5)), (0, (5, 5)))  # one for each metric of a panel


def x_values(metrics: dict[str, list], axis: str | None) -> list[float]:
    """Step numbers (axis None), or the running total of a metric such as generated tokens."""
    per_step = metrics.get(axis, []) if axis else [1] * len(metrics.get("step", []))
    return list(itertools.accumulate(x or 0 for x in per_step))


def draw(runs: list[dict], out: str) -> None:
    """Draws the panels of all training runs, one figure for each of AXES: OUT/by_step.png, by_step.svg and so on.

    ValueError: no run has finished a step.
    """
    runs = [run for run in runs if run.get("metrics")]
    panels: dict[str, dict] = {}
    for run in runs:
        for panel in run["panels"]:
            if panel["section"] not in ("Performance", OTHER):
                series = panels.setdefault(panel["title"], panel | {"series": []})["series"]
                series += [named for named in panel["series"] if named not in series]
    if not panels:
        raise ValueError("--figures: expected a training run with at least one step")
    os.makedirs(out, exist_ok=True)
    n_rows = -(-len(panels) // COLUMNS)
    written = []
    for x_title, x_name in AXES.items():
        if x_name and not any(x_name in run["metrics"] for run in runs):
            continue
        figure = Figure(figsize=(4 * COLUMNS, 3 * n_rows))
        axes = figure.subplots(n_rows, COLUMNS, squeeze=False).flatten()
        for axis, panel in zip(axes, panels.values()):
            draw_panel(axis, panel, runs, x_name)
            axis.set_xlabel(x_title)
        for axis in axes[len(panels) :]:
            axis.axis("off")
        lines = [Line2D([], [], color=f"C{i}", label=run["name"]) for i, run in enumerate(runs)]
        figure.legend(handles=lines, loc="lower right", frameon=False)
        figure.tight_layout()
        name = f"by_{x_title.replace(' ', '_')}"
        for ending in ("png", "svg"):
            figure.savefig(os.path.join(out, f"{name}.{ending}"), dpi=100)
        written.append(name)
    print(f"output: {out}/ ({', '.join(written)}; .png and .svg)")


def draw_panel(axis, panel: dict, runs: list[dict], x_name: str | None) -> None:
    """One panel: a colour for each run, a line style for each metric."""
    for i, run in enumerate(runs):
        xs = x_values(run["metrics"], x_name)
        for k, (name, _) in enumerate(panel["series"]):
            points = [(x, y) for x, y in zip(xs, run["metrics"].get(name, [])) if y is not None]
            if points:
                axis.plot(
                    *zip(*points), linestyle=LINE_STYLES[k], color=f"C{i}", marker="." if len(points) < 10 else ""
                )
    labels = ", ".join(label for _, label in panel["series"])
    title = panel["title"] if len(panel["series"]) == 1 else f"{panel['title']}: {labels}"
    axis.set_title(title, fontsize=9)
