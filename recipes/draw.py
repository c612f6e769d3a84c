"""All tables and figures of the recipes, from finished runs: Markdown, results.json, PNG and SVG.

    python recipes/draw.py cells --out out/tables --results results       # recipes/cells.py's tables and figures
    python recipes/draw.py search --out out/tables --results results      # its search for learning rates
    python recipes/draw.py tiny --runs "SFT=out/tiny/eval/sft" "CPE=out/tiny/eval/cpe" --edits-of out/tiny/cpe

The first two draw whatever is finished under OUT; `bash recipes/tables.sh --only-draw` also checks that it was run with
the present commands. A missing cell leaves a gap, never a number. Scores are the exact judge's on unseen people's
questions, unless a column says otherwise, with mean and standard deviation over seeds. The third is the table at the
end of recipes/tiny.sh.
"""

import glob
import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import tyro
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.persona_world import claims, judge, recites_profile
from evaluation.tables import markdown_row, write_json
from prompts import DIMENSIONS
from recipes.rates import rates
from runtime.flags import user_errors
from runtime.rows import read_rows, step_files, write_text


@dataclass
class Cells:
    """Tables and figures of the finished cells of recipes/cells.py."""

    out: str = "out/tables"
    """Folder of the runs."""
    results: str = "results"
    """Folder of tables and figures."""


@dataclass
class Search:
    """The search for learning rates: every value that was tried."""

    out: str = "out/tables"
    """Folder of the runs."""
    results: str = "results"
    """Folder of search.md."""


@dataclass
class Tiny:
    """The closing table of recipes/tiny.sh, on the terminal."""

    runs: list[str]
    """NAME=FOLDER of a finished evaluate.py, one line of the table each."""
    edits_of: str | None = None
    """Run folder of ppo_cpe.py in the generated world: its edits against their originals, by the exact judge too."""
    gates: str | None = None
    """Folder of recipes/gates.py: a gate that was nearly or not met is said below the table."""


# -- what the tables compare; recipes/cells.py trains a cell for each --------------------------------------------------

METHODS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "ppo_bt": "PPO, BT, n = 6",
    "ppo_grm": "PPO, GRM, n = 6",
    "cpe": "CPE, GRM, 4 + 2",
}
COLORS = {"ppo_bt": "#b5442e", "ppo_grm": "#2f6db3", "cpe": "#2e8b57"}
GREY = "#777777"
MAIN = tuple(COLORS)
RATES = (0.1, 0.25, 0.5, 0.75, 1.0)
STRATEGIES = ("random", "reward_rank", "conditional", "batch_rank")
RATIOS, BASELINES = ("paper", "unclipped", "tis", "luffy", "none"), ("batch", "original")
# These were ahead of PPO with the GRM on the seeds of the variants. As that chose them, they also run on further seeds.
FOLLOWED_UP = ("loss_paper_batch", "loss_paper_original", "loss_sdpo")
WEIGHTS = {
    "equal": (0.34, 0.33, 0.33),
    "helpfulness": (0.6, 0.2, 0.2),
    "personalization": (0.2, 0.6, 0.2),
    "naturalness": (0.2, 0.2, 0.6),
}
# The search for learning rates: the values that each method may choose from, on a seed that no table reports
LRS = dict.fromkeys(MAIN, (2e-5, 5e-5, 1e-4, 2e-4)) | {"dpo": (1e-5, 3e-5, 1e-4, 3e-4)}
SEARCH_SEED = 100

Quantities = dict[str, float | None]  # of one finished cell
Numbers = dict[str, dict[int, Quantities]]  # cell name, seed
Curves = dict[str, Sequence[float]]  # of one run: quantity, a value per step


def grid_cell(strategy: str, rate: float) -> str:
    """The cell of a strategy at a rate. random at 0.5 is CPE's default; at rate 1 all strategies take every edit."""
    if rate == 1:
        strategy = "random"
    return "cpe" if (strategy, rate) == ("random", 0.5) else f"{strategy}_{rate:g}"


def loss_cell(ratio: str, baseline: str) -> str:
    return "cpe" if (ratio, baseline) == ("unclipped", "batch") else f"loss_{ratio}_{baseline}"


# -- reading cells -----------------------------------------------------------------------------------------------------


def read_json(path: str) -> dict:
    with open(path) as f:
        return json.load(f)


def finished_cells(out: str) -> list[str]:
    """["world", "base", "seed0/sft", ...]: the cells under a folder of runs that have a done.json."""
    found = glob.glob("*/done.json", root_dir=out) + glob.glob("seed*/*/done.json", root_dir=out)
    return sorted(os.path.dirname(path) for path in found)


def seeds_by_name(finished: Iterable[str]) -> dict[str, list[int]]:
    """["seed0/cpe", ...] -> {"cpe": [0, 1, ...]}"""
    found = defaultdict(list)
    for cell in finished:
        seed, _, name = cell.partition("/")
        if name:
            found[name].append(int(seed.removeprefix("seed")))
    return {name: sorted(seeds) for name, seeds in found.items()}


def exact_score(row: dict, answer: str) -> float:
    return judge(row, answer).score()


def claims_right(rows: list[dict]) -> float | None:
    """Of the claims about the person in the rows' answers, the share that is right, in percent; None without claims."""
    right = [row["persona"].get(attribute) == value for row in rows for attribute, value in claims(row["answer"])]
    return 100 * sum(right) / len(right) if right else None


EDIT_FIGURES = (  # of metrics.jsonl, edit/*
    *("gain", "ratio", "ratio_low", "weight", "kept_mass", "inserted_mass", "inserted_weight", "inserted_clipfrac"),
    *("branch", "branch_ratio", "branch_weight", "branch_clipfrac"),
)


def evaluated(run: str) -> Quantities:
    """{quantity: number} of a finished cell: exact scores, rates in percent, cost of the run."""
    found = read_json(f"{run}/eval/results.json")
    numbers = {name: found["model"][name]["mean"] for name in ("reward", *DIMENSIONS, "n_tokens")}
    numbers["recites"] = 100 * found["model"]["recites_profile"]["mean"]
    numbers["claims"] = claims_right(read_rows(f"{run}/eval/answers_model.jsonl", "object"))
    numbers["win"] = 100 * found["win_rate"]["win_rate"]
    numbers["lc"] = found["length_controlled"]["minimal"]["length_controlled_winrate"]
    if os.path.exists(f"{run}/swap/results.json"):
        numbers["swap"] = read_json(f"{run}/swap/results.json")["difference"]["reward"]["difference"]
    numbers["minutes"] = read_json(f"{run}/done.json")["seconds"] / 60
    if os.path.isdir(f"{run}/rollouts"):
        steps = read_rows(f"{run}/metrics.jsonl", "metrics")
        for name, key in (("trained", "batch"), ("generated", "generated_tokens"), ("judge_calls", "judge_calls")):
            numbers[name] = sum(step[key] for step in steps)
        for key in EDIT_FIGURES:
            known = [step[f"edit/{key}"] for step in steps if step.get(f"edit/{key}") is not None]
            if known:
                numbers[f"edit/{key}"] = float(np.mean(known))
        kept, inserted = (numbers.get(f"edit/{kind}_mass", 0) for kind in ("kept", "inserted"))
        if inserted:
            numbers["inserted"] = 100 * inserted / (kept + inserted)
    return numbers


def exact_curves(run: str) -> Curves:
    """What the policy sampled in training, step by step, by the exact judge and (`own`) by the judge of the run."""
    curves = defaultdict(list)
    steps = read_rows(f"{run}/metrics.jsonl", "metrics")
    for (_, path), step in zip(step_files(run, "rollouts"), steps, strict=True):
        rows = read_rows(path, "object")
        judged = [judge(row, row["answer"]) for row in rows]
        curves["exact"].append(np.mean([j.score() for j in judged]))
        for name in DIMENSIONS:
            curves[name].append(np.mean([getattr(j, name) for j in judged]))
        curves["own"].append(np.mean([row["reward"] for row in rows]))
        curves["tokens"].append(np.mean([row["n_tokens"] for row in rows]))
        curves["claims"].append(claims_right(rows))
        curves["recites"].append(100 * np.mean([recites_profile(row["persona"], row["answer"]) for row in rows]))
        edited = [
            (j.score(), exact_score(row, row["edit"]["answer"]), row) for j, row in zip(judged, rows) if row.get("edit")
        ]
        if edited:
            curves["gain_exact"].append(np.mean([after - before for before, after, _ in edited]))
            curves["gain_own"].append(np.mean([row["edit"]["reward"] - row["reward"] for *_, row in edited]))
            curves["improved"].append(100 * np.mean([after > before for before, after, _ in edited]))
            curves["worse"].append(100 * np.mean([after < before for before, after, _ in edited]))
        curves["generated_tokens"].append(step["generated_tokens"])
        curves["judge_calls"].append(step["judge_calls"])
    for name in ("generated_tokens", "judge_calls"):
        curves[name] = np.cumsum(curves[name]) / 1000
    return curves


def held_out_curves(run: str) -> Curves:
    """{"step", "answer", "edit", "gap"}: exact scores over training on prompts that are not trained on."""
    curves = defaultdict(list)
    for step, path in step_files(run, "held_out"):
        rows = read_rows(path, "object")
        scores = [exact_score(row, row["answer"]) for row in rows]
        edited = [
            (exact_score(row, row["edit"]["answer"]), before) for row, before in zip(rows, scores) if row.get("edit")
        ]
        curves["step"].append(step - 1)  # steps trained before it
        curves["answer"].append(np.mean(scores))
        if edited:
            curves["edit"].append(np.mean([after for after, _ in edited]))
            curves["gap"].append(np.mean([after - before for after, before in edited]))
    return curves


# -- tables ------------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float | None], digits: int = 2) -> str:
    """Mean and standard deviation over seeds, as text."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def markdown_table(header: Sequence, rows: Iterable[Sequence]) -> str:
    lines = [markdown_row(*header), "|---" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join(lines + [markdown_row(*row) for row in rows])


COLUMNS = {  # quantity: (heading, digits)
    "reward": ("score", 2),
    "helpfulness": ("helpful", 2),
    "personalization": ("personal", 2),
    "naturalness": ("natural", 2),
    "win": ("win rate, %", 1),
    "lc": ("LC win rate, %", 1),
    "n_tokens": ("tokens", 1),
    "recites": ("recites, %", 1),
    "claims": ("claims right, %", 1),
    "swap": ("persona swap", 2),
    "in_training": ("score over training", 2),
    "trained": ("trained samples", 0),
    "generated": ("generated tokens", 0),
    "judge_calls": ("judge calls", 0),
    "edit/gain": ("gain of edits", 2),
    "edit/ratio_low": ("ratio low, share", 3),
    "edit/weight": ("weight", 2),
    "inserted": ("mass on inserted, %", 1),
    "minutes": ("minutes", 1),
}
METHOD_COLUMNS = ("reward", *DIMENSIONS, "win", "lc", "n_tokens", "recites", "claims", "swap")
COST_COLUMNS = (
    *("reward", "in_training", "lc", "n_tokens", "recites"),
    *("trained", "generated", "judge_calls", "minutes"),
)
LOSS_COLUMNS = (
    *("reward", "personalization", "win", "lc", "n_tokens"),
    *("edit/gain", "edit/ratio_low", "edit/weight", "inserted"),
    *("generated", "judge_calls"),
)


def method_table(labels: dict[str, str], numbers: Numbers, columns: Sequence[str]) -> str:
    """A row per cell; labels: {cell: first column}. Missing cells are left out."""
    rows = []
    for name, label in labels.items():
        of_seeds = list(numbers.get(name, {}).values())
        if of_seeds:
            rows.append([label, len(of_seeds), *(spread([n.get(c) for n in of_seeds], COLUMNS[c][1]) for c in columns)])
    return markdown_table(["", "seeds", *(COLUMNS[c][0] for c in columns)], rows)


def grid(numbers: Numbers, strategies: Sequence[str], rates: Sequence[float]) -> str:
    """Strategy x rate: the exact scores, then the LC win rates."""
    rows = []
    for column, label in (("reward", "score"), ("lc", "LC, %")):
        for strategy in strategies:
            row = [f"{strategy}, {label}"]
            for rate in rates:
                of_seeds = numbers.get(grid_cell(strategy, rate), {}).values()
                row.append(spread([n[column] for n in of_seeds], COLUMNS[column][1]))
            rows.append(row)
    return markdown_table(["", *(f"r_e = {rate:g}" for rate in rates)], rows)


def seed_table(labels: dict[str, str], numbers: Numbers, chosen_on: set[int]) -> str:
    """Exact score, a column per seed. chosen_on: the seeds by which it was chosen what is compared here."""
    seeds = sorted({s for name in labels for s in numbers.get(name, {})})
    rows = []
    for name, label in labels.items():
        scores = {s: n["reward"] for s, n in numbers.get(name, {}).items()}
        new = [score for s, score in scores.items() if s not in chosen_on]
        of_seeds = [f"{scores[s]:.2f}" if s in scores else "-" for s in seeds]
        rows.append([label, *of_seeds, spread(new), spread(scores.values())])
    return markdown_table(["", *(f"seed {s}" for s in seeds), "seeds that chose nothing", "all"], rows)


def difference(numbers: Numbers, name: str, other: str, column: str) -> dict | None:
    """Paired over seeds: mean, 95 % interval by Student's t, p, number of seeds. None with fewer than two seeds."""
    known = [{s for s, found in numbers.get(cell, {}).items() if column in found} for cell in (name, other)]
    seeds = sorted(known[0] & known[1])
    if len(seeds) < 2:
        return None
    gaps = np.array([numbers[name][s][column] - numbers[other][s][column] for s in seeds])
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return dict(
        cells=[name, other],
        column=column,
        mean=float(gaps.mean()),
        low=float(gaps.mean() - half),
        high=float(gaps.mean() + half),
        p=float(stats.ttest_1samp(gaps, 0).pvalue),
        seeds=len(gaps),
    )


def with_interval(d: dict) -> list[str]:
    """A `difference` as two columns: mean, 95 % interval."""
    return [f"{d['mean']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}"]


def difference_table(differences: list[dict]) -> str:
    rows = [
        [
            " - ".join(METHODS.get(cell, cell) for cell in d["cells"]),
            COLUMNS[d["column"]][0],
            *with_interval(d),
            "< 0.001" if d["p"] < 0.001 else f"{d['p']:.3f}",
            d["seeds"],
        ]
        for d in differences
    ]
    return markdown_table(["", "of", "mean", "95 % interval over seeds", "p", "seeds"], rows)


def accuracy_table(out: str, seeds: Sequence[int]) -> str:
    """Table 6: accuracy of the judges on unseen people's pairs. A tie counts as wrong; ties have a column."""
    rows = []
    for pairs, label in (("pairs_eval", "as labelled"), ("pairs_eval_exact", "as the exact judge orders them")):
        for name in ("grm", "bt"):
            found = [read_json(f"{out}/seed{s}/accuracy/{name}_{pairs}/results.json") for s in seeds]
            tiers = [
                spread([100 * f["groups"][f"exact {tier}"]["accuracy"] for f in found], 1) if "exact" in pairs else "-"
                for tier in ("easy", "mid", "hard")
            ]
            totals = [f["total"] for f in found]
            rows.append(
                [
                    f"{name.upper()}, {label}",
                    *tiers,
                    spread([100 * t["accuracy"] for t in totals], 1),
                    spread([t["ties"] for t in totals], 0),
                    spread([t["without_verdict"] for t in totals], 0),
                    f"{100 * totals[0]['longer_answer']:.1f}",
                    totals[0]["n"] + totals[0]["without_verdict"],
                ]
            )
    return markdown_table(["", "easy", "mid", "hard", "all", "ties", "no verdict", "longer answer wins", "pairs"], rows)


# -- figures -----------------------------------------------------------------------------------------------------------


def new_figure(n: int) -> tuple[Figure, Sequence[Axes]]:
    """n panels beside one another."""
    figure = Figure(figsize=(4.2 * n, 3.4))
    return figure, figure.subplots(1, n)


def save_figure(figure: Figure, folder: str, name: str) -> None:
    figure.tight_layout()
    figure.savefig(f"{folder}/{name}.png", dpi=110)
    with rc_context({"svg.hashsalt": name}):  # the same figure is the same file: its ids are not random
        figure.savefig(f"{folder}/{name}.svg", metadata={"Date": None})


def plot_range(axis: Axes, ys: Sequence[Sequence], color: str, xs: Sequence[float] | None = None, **style) -> None:
    """Mean over seeds and, shaded, their range. ys: a curve per seed, cut to the shortest; a None in one is a gap.
    xs: where their points are; None: at steps from 1 on."""
    n = min(map(len, ys))
    ys = np.array([y[:n] for y in ys], dtype=float)
    xs = np.arange(1, n + 1) if xs is None else xs[:n]
    axis.plot(xs, ys.mean(0), color=color, **style)
    axis.fill_between(xs, ys.min(0), ys.max(0), color=color, alpha=0.15, lw=0)


def plot_curves(
    axis: Axes, curves: dict[str, list[Curves]], name: str, y: str, x: str | None = None, label=None, color=None, ls="-"
) -> None:
    """One method's y over steps (or over x); nothing where it has no such curve."""
    runs = [run for run in curves.get(name, []) if run[y]]
    if runs:
        xs = None if x is None else np.mean([*zip(*(run[x] for run in curves[name]))], axis=1)
        plot_range(axis, [run[y] for run in runs], color or COLORS[name], xs, label=label or METHODS[name], ls=ls)


def training_figures(curves: dict[str, list[Curves]], folder: str) -> None:
    """The RL methods beside one another, and each one's reward against the exact judge."""
    panels = {
        "score": [
            ("exact", "exact judge's score", None, "step"),
            ("exact", "exact judge's score", "generated_tokens", "generated tokens, thousands"),
            ("exact", "exact judge's score", "judge_calls", "judge calls, thousands"),
        ],
        "hacking": [
            ("tokens", "length, tokens", None, "step"),
            ("recites", "recites the profile, %", None, "step"),
            ("claims", "claims of the person that are right, %", None, "step"),
            ("personalization", "personalization, exact", None, "step"),
        ],
        "dimensions": [(name, f"{name}, exact", None, "step") for name in DIMENSIONS],
    }
    for file, wanted in panels.items():
        figure, axes = new_figure(len(wanted))
        for axis, (y, title, x, x_title) in zip(axes, wanted):
            for name in curves:
                plot_curves(axis, curves, name, y, x)
            axis.set(xlabel=x_title, ylabel=title)
        axes[0].legend(frameon=False)
        save_figure(figure, folder, file)

    figure, axes = new_figure(3)
    for axis, name in zip(axes, COLORS):
        plot_curves(axis, curves, name, "exact", label="exact judge")
        plot_curves(axis, curves, name, "own", label="reward of the run", color=GREY, ls="--")
        axis.set(xlabel="step", ylabel="score of originals", title=METHODS[name])
        if name in curves:
            axis.legend(frameon=False)
    save_figure(figure, folder, "reward_against_exact")


def edit_figure(curves: dict[str, list[Curves]], folder: str) -> None:
    """What CPE's edits are worth over training."""
    figure, axes = new_figure(2)
    plot_curves(axes[0], curves, "cpe", "gain_own", label="by the run's judge", color=GREY, ls="--")
    plot_curves(axes[0], curves, "cpe", "gain_exact", label="by the exact judge")
    axes[0].axhline(0, color="black", lw=0.5)
    axes[0].set(xlabel="step", ylabel="edits less originals")
    plot_curves(axes[1], curves, "cpe", "improved", label="better")
    plot_curves(axes[1], curves, "cpe", "worse", label="worse", color="#b5442e")
    axes[1].set(xlabel="step", ylabel="share of edits, %, exact judge", ylim=(0, 100))
    for axis in axes:
        axis.legend(frameon=False)
    save_figure(figure, folder, "edits")


def internalisation_figure(out: str, seeds: dict[str, list[int]], folder: str) -> None:
    """Does the policy learn to write by itself what edits supplied? Answers and their edits on held-out prompts."""
    figure, axes = new_figure(2)
    for name in ("ppo_grm", "cpe"):
        runs = [held_out_curves(f"{out}/seed{s}/{name}") for s in seeds.get(name, [])]
        for axis, y, line in ((axes[0], "answer", "-"), (axes[0], "edit", "--"), (axes[1], "gap", "-")):
            ys = np.array([run[y] for run in runs if run[y]])
            if len(ys):
                label = f"{METHODS[name]}: {y}"
                plot_range(axis, ys, COLORS[name], runs[0]["step"], ls=line, label=label, marker=".")
    axes[0].set(xlabel="steps trained", ylabel="exact score, held-out prompts")
    axes[1].set(xlabel="steps trained", ylabel="edits less answers")
    axes[1].axhline(0, color="black", lw=0.5)
    axes[0].legend(frameon=False)
    save_figure(figure, folder, "internalisation")


def ledger_figure(out: str, seeds: dict[str, list[int]], folder: str) -> None:
    """The edit ledger: what the loss does with tokens that an edit kept and with those that it inserted."""
    figure, axes = new_figure(3)
    for name, ratio, color in (("cpe", "unclipped", COLORS["cpe"]), ("loss_paper_batch", "paper", "#8a6bbf")):
        runs = [read_rows(f"{out}/seed{s}/{name}/metrics.jsonl", "metrics") for s in seeds.get(name, [])]
        for axis, what in zip(axes, ("ratio", "mass", "clipfrac")):
            for kind, line in (("kept", "-"), ("inserted", "--")):
                if runs:
                    ys = np.array([[step[f"edit/{kind}_{what}"] for step in run] for run in runs], dtype=float)
                    xs = np.arange(1, ys.shape[1] + 1)
                    axis.plot(xs, np.nanmean(ys, 0), line, color=color, label=f"{ratio}, {kind}")
    for axis, title in zip(axes, ("ratio", "|weight x advantage| per token", "share of tokens without gradient")):
        axis.set(xlabel="step", ylabel=title)
    axes[0].legend(frameon=False)
    save_figure(figure, folder, "ledger")


# -- what is written ---------------------------------------------------------------------------------------------------

NOTE = (
    "Scores by the exact judge on unseen people's questions, win rates against fixed reference answers; mean ± "
    "standard deviation over seeds. Score over training: mean over all steps, of what was sampled. Persona swap: the "
    "score less the score under another person's profile."
)


def write_tables(out: str, finished: Iterable[str], folder: str) -> None:
    """tables.md, results.json and all figures of the finished cells into `folder`; the tables onto the terminal too."""
    finished = list(finished)
    seeds = seeds_by_name(finished)
    trained = {name: s for name, s in seeds.items() if name not in ("grm", "bt", "gates", "accuracy")}
    numbers = {name: {s: evaluated(f"{out}/seed{s}/{name}") for s in of_name} for name, of_name in trained.items()}
    curves = {name: [exact_curves(f"{out}/seed{s}/{name}") for s in seeds[name]] for name in MAIN if seeds.get(name)}
    for name, of_seeds in curves.items():
        for s, curve in zip(seeds[name], of_seeds):
            numbers[name][s]["in_training"] = float(np.mean(curve["exact"]))
    if "base" in finished:
        numbers["base"] = {0: evaluated(f"{out}/base")}
    gates = [read_json(f"{out}/seed{s}/gates/gates.json") for s in seeds.get("gates", [])]

    losses = {loss_cell(ratio, baseline): f"{ratio}, {baseline}" for ratio in RATIOS for baseline in BASELINES}
    losses["loss_sdpo"] = "sdpo, n = 6, no edits"
    weights = {"cpe": "0.35, 0.40, 0.25"}
    weights |= {f"weights_{name}": ", ".join(f"{w:.2f}" for w in values) for name, values in WEIGHTS.items()}
    # the variants have fewer seeds than the main cells: CPE stands beside them with these seeds only
    shared = {s for name, of_seeds in numbers.items() if name not in (*METHODS, *FOLLOWED_UP) for s in of_seeds}
    same = {name: {s: found for s, found in of_seeds.items() if s in shared} for name, of_seeds in numbers.items()}
    further = {s for name in FOLLOWED_UP for s in numbers.get(name, {})} - shared
    followed = {name: METHODS[name] for name in ("ppo_grm", "cpe")} | {name: losses[name] for name in FOLLOWED_UP}
    pairs = [("cpe", "ppo_grm"), ("cpe", "sft"), ("ppo_grm", "ppo_bt"), ("ppo_bt", "sft")]
    pairs += [(name, "ppo_grm") for name in FOLLOWED_UP]
    pairs += [("cpe", name) for name in losses if name != "cpe"]
    found = [difference(numbers, a, b, column) for a, b in pairs for column in ("reward", "lc", "in_training")]
    differences = [d for d in found if d]

    sections = {
        "Table 1: methods": method_table(METHODS, numbers, METHOD_COLUMNS),
        "Table 2: reward models and edits, with their cost": method_table(
            {name: METHODS[name] for name in MAIN}, numbers, COST_COLUMNS
        ),
        "Differences": difference_table(differences) if differences else None,
        "Table 4: which edits, and how many": grid(same, STRATEGIES, RATES),
        "The loss on edits": method_table(losses, same, LOSS_COLUMNS),
        "Losses that were ahead of PPO, on further seeds": seed_table(followed, numbers, shared) if further else None,
        "The weights of the three scores (helpfulness, personalization, naturalness)": method_table(
            weights, same, ["reward", *DIMENSIONS, "n_tokens", "lc"]
        ),
    }
    if seeds.get("accuracy"):
        title = "Table 6: accuracy of the judges, % of pairs of unseen people"
        sections[title] = accuracy_table(out, seeds["accuracy"])
    if gates:
        names = [name for name in gates[0] if name != "missed"]
        sections["Gates"] = markdown_table(names, [[spread([g[name] for g in gates], 3) for name in names]])
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items() if table)
    write_text(f"{folder}/tables.md", f"# The generated world\n\n{NOTE}\n\n{text}\n")
    write_json(f"{folder}/results.json", dict(cells=numbers, differences=differences, gates=gates))
    if curves:
        training_figures(curves, folder)
        internalisation_figure(out, seeds, folder)
        ledger_figure(out, seeds, folder)
    if "cpe" in curves:
        edit_figure(curves, folder)
    print(f"{text}\n\nwritten: {folder}/ (tables.md, results.json, figures)")


def write_search(out: str, finished: Iterable[str], folder: str) -> None:
    """search.md: every learning rate that was tried, each method's best in bold."""
    done, rows = set(finished), []
    for name, lrs in LRS.items():
        cells = {lr: f"seed{SEARCH_SEED}/{name}_lr{lr:g}" for lr in lrs}
        found = {lr: evaluated(f"{out}/{cell}") for lr, cell in cells.items() if cell in done}
        best = max(found, key=lambda lr: found[lr]["reward"], default=None)
        for lr, numbers in found.items():
            mark = "**" if lr == best else ""
            values = [f"{numbers[c]:.2f}" for c in ("reward", "lc", "n_tokens")]
            rows.append([METHODS[name], f"{mark}{lr:g}{mark}", *values])
    note = f"Seed {SEARCH_SEED}, dev prompts, exact score; the same effort for each method."
    table = markdown_table(["", "lr", "score", "LC win rate, %", "tokens"], rows)
    text = f"# Learning rates\n\n{note}\n\n{table}"
    write_text(f"{folder}/search.md", text + "\n")
    print(f"{text}\n\nwritten: {folder}/search.md")


# -- the closing table of recipes/tiny.sh ------------------------------------------------------------------------------

TINY_COLUMNS = {  # quantity: (heading, by what it is multiplied)
    "reward": ("score", 1),
    "last_step": ("last step, %", 100),
    "advice": ("advice, %", 100),
    "wrong": ("wrong fact, %", 100),
    "recites_profile": ("recites, %", 100),
    "n_tokens": ("tokens", 1),
}


def tiny_table(runs: Iterable[str]) -> list[str]:
    """Lines of text, one per run. runs: NAME=FOLDER of a finished evaluate.py."""
    lines = [f"{'':12}" + "".join(f"{title:>15}" for title, _ in TINY_COLUMNS.values()) + f"{'win rate, %':>22}"]
    for run in runs:
        name, _, folder = run.partition("=")
        results = read_json(os.path.join(folder, "results.json"))
        said, cells = rates(read_rows(os.path.join(folder, "answers_model.jsonl"), "object")), []
        for column, (_, scale) in TINY_COLUMNS.items():
            if column in said:
                cells.append(f"{scale * said[column]:.1f}")
            else:
                mean, error = (scale * results["model"][column][k] for k in ("mean", "standard_error"))
                cells.append(f"{mean:.2f} ± {error:.2f}")
        rate = "{:.1f} ({:.1f} to {:.1f})".format(*(100 * results["win_rate"][k] for k in ("win_rate", "low", "high")))
        lines.append(f"{name:12}" + "".join(f"{cell:>15}" for cell in cells) + f"{rate:>22}")
    return [
        *lines,
        "score: by the exact judge, -5 to 4.75, mean ± standard error over the questions; last step, advice: how often",
        "answers say what critiques ask for and answers of the corpus lack; win rate: against SFT, 95 % interval",
    ]


def tiny_gates(folder: str) -> list[str]:
    """Lines of text: which gates were not met, if any."""
    found = read_json(os.path.join(folder, "gates.json"))
    return [
        f"gate {name}: {found[name]} (recipes/gates.py), so these models are weaker than is asked for"
        for name in found["missed"] + found["nearly"]
    ]


def tiny_edits(folder: str) -> list[str]:
    """Lines of text: gain of edits over originals by the run's judge and by the exact one, for parts of the run."""
    files = [path for _, path in step_files(folder, "rollouts")]
    third = len(files) // 3
    parts = {"first third": files[:third], "last third": files[len(files) - third :], "all": files}
    titles = f"{'run judge':>12}{'exact judge':>14}{'better, %':>12}{'worse, %':>12}{'edits':>8}"
    lines = [f"{'edits less originals':22}" + titles]
    for part, paths in parts.items():
        rows = [row for path in paths for row in read_rows(path, "object") if row["edit"]]
        own = [row["edit"]["reward"] - row["reward"] for row in rows]
        exact = [exact_score(row, row["edit"]["answer"]) - exact_score(row, row["answer"]) for row in rows]
        if rows:
            better, worse = (100 * sum(gains) / len(rows) for gains in ((e > 0 for e in exact), (e < 0 for e in exact)))
            lines.append(
                f"{part:22}{sum(own) / len(rows):>+12.2f}{sum(exact) / len(rows):>+14.2f}"
                f"{better:>12.0f}{worse:>12.0f}{len(rows):>8}"
            )
    return lines


def main(args: Cells | Search | Tiny) -> None:
    if isinstance(args, Tiny):
        edits = ["", *tiny_edits(args.edits_of)] if args.edits_of else []
        print("\n".join(tiny_table(args.runs) + (tiny_gates(args.gates) if args.gates else []) + edits))
        return
    finished = finished_cells(args.out)
    if not finished:
        raise ValueError(f"{args.out}: no finished cell of recipes/cells.py")
    if isinstance(args, Search):
        write_search(args.out, finished, args.results)
    else:
        write_tables(args.out, [c for c in finished if not c.startswith(f"seed{SEARCH_SEED}/")], args.results)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Cells | Search | Tiny))
