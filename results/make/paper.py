"""The paper's tables in miniature, where samples hold what critiques ask for in 8 to 15 % of cases.

Tables 1 (methods), 2 (reward models and edits), 4 (which edits, and how many) and 6 (accuracy of the judges), and two
that the paper lacks: the loss on edits, and the weights of the three scores. They are drawn from the run folders; a
missing experiment leaves a gap, never a number. Scores are the exact judge's on unseen people's questions.
"""

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes

from evaluation.tables import write_json
from json_files import read_json
from prompts import DIMENSIONS
from results.make.draw import (
    COLUMNS,
    GREY,
    SCORES,
    column,
    difference,
    difference_table,
    figure_table,
    markdown_table,
    new_figure,
    plot_range,
    save_figure,
    search_table,
    sections_text,
    spread,
)
from results.make.experiments import FLAGS, RL_STEPS, Training
from results.make.figures import Curves, Figures, evaluated, exact_curves, held_out_curves
from runtime.rows import read_rows, write_text

METHODS = {
    "base": "base",
    "sft": "SFT",
    "dpo": "DPO",
    "ppo_bt": "PPO, BT, n = 6",
    "ppo_grm": "PPO, GRM, n = 6",
    "cpe": "CPE, GRM, 4 + 2",
}
COLORS = {"ppo_bt": "#b5442e", "ppo_grm": "#2f6db3", "cpe": "#2e8b57"}
MAIN = tuple(COLORS)  # the methods of RL that tables 1 and 2 compare
EDIT_RATES = (0.1, 0.25, 0.5, 0.75, 1.0)
STRATEGIES = ("random", "reward_rank", "conditional", "batch_rank")
LOSSES = ("paper", "unclipped", "tis", "luffy", "none")
BASELINES = ("batch", "original")
# No longer trained: ppo_cpe.py has it as a fork (docs/forking.md). Finished experiments stay in the tables.
SDPO = {"loss_sdpo": "sdpo, n = 6, no edits"}
# These were ahead of PPO with the GRM on the first three seeds. As these chose them, they also run on two more.
FOLLOWED_UP = ("loss_paper_batch", "loss_paper_original", *SDPO)
WEIGHTS = {
    "equal": (0.34, 0.33, 0.33),
    "helpfulness": (0.6, 0.2, 0.2),
    "personalization": (0.2, 0.6, 0.2),
    "naturalness": (0.2, 0.2, 0.6),
}
QUICK = (*MAIN, "loss_paper_batch", "loss_none_batch", "reward_rank_0.5")
MAIN_SEEDS = 5  # of tables 1 and 2
QUICK_STEPS = 15

# Learning rates that each method may choose from, on a seed that no table reports
LRS = dict.fromkeys(MAIN, (2e-5, 5e-5, 1e-4, 2e-4)) | {"dpo": (1e-5, 3e-5, 1e-4, 3e-4)}
SEARCH_SEED = 100
# The best of LRS by the exact score on dev prompts (results/search.md)
LR = {"ppo_bt": 1e-4, "ppo_grm": 5e-5, "cpe": 5e-5, "dpo": 1e-4}

METHOD_COLUMNS = (*SCORES, "win", "lc", "n_tokens", "recites", "claims", "swap")
COST_COLUMNS = (
    *("reward", "in_training", "lc", "n_tokens", "recites"),
    *("trained", "generated", "judge_calls", "minutes"),
)
LOSS_COLUMNS = (
    *("reward", "personalization", "win", "lc", "n_tokens"),
    *("edit/gain", "edit/ratio_low", "edit/weight", "inserted"),
    *("generated", "judge_calls"),
)
NOTE = (
    "Scores by the exact judge on unseen people's questions, win rates against fixed reference answers; mean ± "
    "standard deviation over seeds. Score over training: mean over all steps, of what was sampled. Persona swap: the "
    "score less the score under another person's profile."
)

BySeed = dict[str, dict[int, Figures]]  # by name and seed
CurvesByName = dict[str, list[Curves]]  # a run per seed


# -- what is trained ---------------------------------------------------------------------------------------------------


def grid_name(strategy: str, rate: float) -> str:
    """The experiment of a strategy and an edit rate. CPE's default is random at 0.5; at 1 all strategies are equal."""
    if rate == 1:
        strategy = "random"
    return "cpe" if (strategy, rate) == ("random", 0.5) else f"{strategy}_{rate:g}"


def loss_name(loss: str, baseline: str) -> str:
    """The experiment of a loss on edits and a baseline. CPE's default is unclipped with batch."""
    return "cpe" if (loss, baseline) == ("unclipped", "batch") else f"loss_{loss}_{baseline}"


def variants() -> dict[str, str]:
    """{name: flags of ppo_cpe.py that differ from CPE's defaults}, for every experiment with RL."""
    flags = {"ppo_bt": FLAGS["ppo"], "ppo_grm": FLAGS["ppo"], "cpe": ""}
    for strategy in STRATEGIES:
        for rate in EDIT_RATES:
            flags.setdefault(grid_name(strategy, rate), f"--edit-strategy {strategy} --edit-rate {rate:g}")
    for loss in LOSSES:
        for baseline in BASELINES:
            flags.setdefault(loss_name(loss, baseline), f"--edit-loss {loss} --edit-baseline {baseline}")
    for name, weights in WEIGHTS.items():
        flags[f"weights_{name}"] = "--score-weights " + " ".join(f"{weight:g}" for weight in weights)
    return flags


def training(method: str, seed: int, steps: int = RL_STEPS, tracked: bool = False) -> Training:
    """The training of one of `variants`, or of DPO."""
    if method == "dpo":
        return Training(seed, method, LR[method], script="dpo.py")
    judge = "bt" if method == "ppo_bt" else "grm"
    lr = LR.get(method, LR["cpe"])
    return Training(seed, method, lr, variants()[method], steps, judge=judge, tracked=tracked)


def trainings(seeds: int, quick: bool = False) -> list[Training]:
    """What the main tables need comes first."""
    main_seeds = 1 if quick else max(seeds, MAIN_SEEDS)
    other_seeds = 1 if quick else seeds
    steps = QUICK_STEPS if quick else RL_STEPS
    wanted = []
    for seed in range(main_seeds):
        wanted.append(training("dpo", seed))
        wanted += [training(name, seed, steps=steps, tracked=True) for name in MAIN]
    for seed in range(other_seeds):
        names = [name for name in (QUICK if quick else variants()) if name not in MAIN]
        wanted += [training(name, seed, steps=steps) for name in names]
    for seed in range(other_seeds, main_seeds):
        wanted += [training(name, seed, steps=steps) for name in FOLLOWED_UP if name not in SDPO]
    return wanted


def searched() -> list[Training]:
    """The search for learning rates: another seed, the dev prompts."""
    return [
        replace(training(method, SEARCH_SEED), name=f"{method}_lr{lr:g}", lr=lr, split="dev")
        for method, lrs in LRS.items()
        for lr in lrs
    ]


# -- tables ------------------------------------------------------------------------------------------------------------


def seeds_by_name(finished: list[str]) -> dict[str, list[int]]:
    """["seed0/cpe", ...] -> {"cpe": [0, 1, ...]}"""
    seeds = defaultdict(list)
    for experiment in finished:
        seed, _, name = experiment.partition("/")
        if name:
            seeds[name].append(int(seed.removeprefix("seed")))
    return {name: sorted(numbers) for name, numbers in seeds.items()}


def method_table(labels: dict[str, str], figures: BySeed, columns: Sequence[str]) -> str:
    """A row per experiment; labels: {name: first cell}. Missing experiments are left out."""
    rows = []
    for name, label in labels.items():
        if figures.get(name):
            rows.append(([label, len(figures[name])], list(figures[name].values())))
    return figure_table(["", "seeds"], rows, columns)


def grid_table(figures: BySeed, strategies: Sequence[str], rates: Sequence[float]) -> str:
    """Strategy by rate: the exact scores, then the length-controlled win rates."""
    rows = []
    for name, label in (("reward", "score"), ("lc", "LC, %")):
        for strategy in strategies:
            cells = [column(figures.get(grid_name(strategy, rate), {}).values(), name) for rate in rates]
            rows.append([f"{strategy}, {label}", *cells])
    return markdown_table(["", *(f"r_e = {rate:g}" for rate in rates)], rows)


def seed_table(labels: dict[str, str], figures: BySeed, chosen_on: set[int]) -> str:
    """Exact score, a column per seed. chosen_on: the seeds by which the compared experiments were chosen."""
    scores = {name: {seed: f["reward"] for seed, f in figures.get(name, {}).items()} for name in labels}
    seeds = sorted({seed for by_seed in scores.values() for seed in by_seed})
    rows = []
    for name, label in labels.items():
        by_seed = [f"{scores[name][seed]:.2f}" if seed in scores[name] else "-" for seed in seeds]
        new = [score for seed, score in scores[name].items() if seed not in chosen_on]
        rows.append([label, *by_seed, spread(new), spread(scores[name].values())])
    return markdown_table(["", *(f"seed {seed}" for seed in seeds), "seeds that chose nothing", "all"], rows)


def accuracy_table(out: str, seeds: Sequence[int]) -> str:
    """Table 6: accuracy of the judges on unseen people's pairs. A tie counts as wrong; ties have a column."""
    rows = []
    for pairs, label in (("pairs_eval", "as labelled"), ("pairs_eval_exact", "as the exact judge orders them")):
        for name in ("grm", "bt"):
            results = [read_json(f"{out}/seed{seed}/accuracy/{name}_{pairs}/results.json") for seed in seeds]
            totals = [result["total"] for result in results]
            tiers = ["-", "-", "-"]
            if pairs == "pairs_eval_exact":
                groups = [result["groups"] for result in results]
                tiers = [
                    spread([100 * group[f"exact {tier}"]["accuracy"] for group in groups], 1)
                    for tier in ("easy", "mid", "hard")
                ]
            rows.append(
                [
                    f"{name.upper()}, {label}",
                    *tiers,
                    spread([100 * total["accuracy"] for total in totals], 1),
                    spread([total["ties"] for total in totals], 0),
                    spread([total["without_verdict"] for total in totals], 0),
                    f"{100 * totals[0]['longer_answer']:.1f}",
                    totals[0]["n"] + totals[0]["without_verdict"],
                ]
            )
    return markdown_table(["", "easy", "mid", "hard", "all", "ties", "no verdict", "longer answer wins", "pairs"], rows)


def all_differences(figures: BySeed, losses: dict[str, str]) -> list[dict]:
    """Every comparison of which two seeds are finished."""
    pairs = [("cpe", "ppo_grm"), ("cpe", "sft"), ("ppo_grm", "ppo_bt"), ("ppo_bt", "sft")]
    pairs += [(name, "ppo_grm") for name in FOLLOWED_UP]
    pairs += [("cpe", name) for name in losses if name != "cpe"]
    every = [difference(figures, *pair, name) for pair in pairs for name in ("reward", "lc", "in_training")]
    return [d for d in every if d]


def differences_table(differences: list[dict]) -> str | None:
    rows = []
    for d in differences:
        label = " - ".join(METHODS.get(name, name) for name in d["experiments"])
        rows.append(([label, COLUMNS[d["column"]][0]], d))
    return difference_table(["", "of", "mean"], rows, with_p=True)


def table_sections(figures: BySeed, differences: list[dict], losses: dict[str, str]) -> dict[str, str | None]:
    """{title: table} of what the figures of the experiments show."""
    weights = {"cpe": "0.35, 0.40, 0.25"}
    weights |= {f"weights_{name}": ", ".join(f"{weight:.2f}" for weight in values) for name, values in WEIGHTS.items()}
    # The variants have fewer seeds than the main experiments: CPE stands beside them with these seeds only
    shared = {seed for name, by_seed in figures.items() if name not in (*METHODS, *FOLLOWED_UP) for seed in by_seed}
    on_shared = {name: {s: f for s, f in by_seed.items() if s in shared} for name, by_seed in figures.items()}
    on_more = {seed for name in FOLLOWED_UP for seed in figures.get(name, {})} - shared
    followed = {name: METHODS[name] for name in ("ppo_grm", "cpe")} | {name: losses[name] for name in FOLLOWED_UP}
    main = {name: METHODS[name] for name in MAIN}
    return {
        "Table 1: methods": method_table(METHODS, figures, METHOD_COLUMNS),
        "Table 2: reward models and edits, with their cost": method_table(main, figures, COST_COLUMNS),
        "Differences": differences_table(differences),
        "Table 4: which edits, and how many": grid_table(on_shared, STRATEGIES, EDIT_RATES),
        "The loss on edits": method_table(losses, on_shared, LOSS_COLUMNS),
        "Losses that were ahead of PPO, on further seeds": seed_table(followed, figures, shared) if on_more else None,
        "The weights of the three scores (helpfulness, personalization, naturalness)": method_table(
            weights, on_shared, [*SCORES, "n_tokens", "lc"]
        ),
    }


def loss_labels() -> dict[str, str]:
    return {loss_name(loss, baseline): f"{loss}, {baseline}" for loss in LOSSES for baseline in BASELINES} | SDPO


def no_longer_trained(folder: str) -> BySeed:
    """The figures of SDPO's experiments that the folder's results.json has already."""
    path = f"{folder}/results.json"
    known = read_json(path)["experiments"] if os.path.exists(path) else {}
    return {name: {int(seed): f for seed, f in known[name].items()} for name in SDPO if name in known}


def write_tables(out: str, finished: list[str], folder: str) -> None:
    """Writes tables.md, results.json and all figures of the finished experiments into `folder`."""
    seeds = seeds_by_name(finished)
    figures = {
        name: {seed: evaluated(f"{out}/seed{seed}/{name}") for seed in numbers}
        for name, numbers in seeds.items()
        if name not in ("grm", "bt", "checks", "accuracy")
    }
    curves = {}
    for name in MAIN:
        if name in seeds:
            curves[name] = [exact_curves(f"{out}/seed{seed}/{name}") for seed in seeds[name]]
            for seed, run in zip(seeds[name], curves[name]):
                figures[name][seed]["in_training"] = float(np.mean(run["exact"]))
    if "base" in finished:
        figures["base"] = {0: evaluated(f"{out}/base")}
    figures |= no_longer_trained(folder)
    losses = loss_labels()
    differences = all_differences(figures, losses)
    sections = table_sections(figures, differences, losses)
    if "accuracy" in seeds:
        title = "Table 6: accuracy of the judges, % of pairs of unseen people"
        sections[title] = accuracy_table(out, seeds["accuracy"])
    checks = [read_json(f"{out}/seed{seed}/checks/sanity_checks.json") for seed in seeds.get("checks", [])]
    if checks:
        names = [name for name in checks[0] if name not in ("missed", "nearly")]
        sections["Sanity checks"] = markdown_table(names, [[spread([c[name] for c in checks], 3) for name in names]])
    text = sections_text(sections)
    write_text(f"{folder}/tables.md", f"# The generated world\n\n{NOTE}\n\n{text}\n")
    write_json(f"{folder}/results.json", {"experiments": figures, "differences": differences, "checks": checks})
    if curves:
        training_figures(curves, folder)
        internalisation_figure(out, seeds, folder)
        ledger_figure(out, seeds, folder)
    if "cpe" in curves:
        edit_figure(curves, folder)
    print(f"{text}\n\nwritten: {folder}/ (tables.md, results.json, figures)")


def write_search(out: str, finished: list[str], folder: str) -> None:
    """Writes search.md: every learning rate that was tried."""
    rows = []
    for name, lrs in LRS.items():
        experiments = {lr: f"seed{SEARCH_SEED}/{name}_lr{lr:g}" for lr in lrs}
        by_lr = {lr: evaluated(f"{out}/{e}") for lr, e in experiments.items() if e in finished}
        rows.append((METHODS[name], by_lr))
    note = f"Seed {SEARCH_SEED}, dev prompts, exact score; the same effort for each method."
    table = search_table(rows, {"reward": 2, "lc": 2, "n_tokens": 2})
    text = f"# Learning rates\n\n{note}\n\n{table}"
    write_text(f"{folder}/search.md", text + "\n")
    print(f"{text}\n\nwritten: {folder}/search.md")


# -- figures -----------------------------------------------------------------------------------------------------------


def plot_curves(
    axis: Axes,
    curves: CurvesByName,
    name: str,
    y: str,
    x: str | None = None,
    label: str | None = None,
    color: str | None = None,
    ls: str = "-",
) -> None:
    """One method's y over steps (or over x); nothing where it has no such curve."""
    runs = [run for run in curves.get(name, []) if run[y]]
    if runs:
        xs = None if x is None else np.mean([*zip(*(run[x] for run in curves[name]))], axis=1)
        plot_range(axis, [run[y] for run in runs], color or COLORS[name], xs, label=label or METHODS[name], ls=ls)


def training_figures(curves: CurvesByName, folder: str) -> None:
    """The methods of RL side by side, and each one's reward against the exact judge."""
    panels: dict[str, list[tuple[str, str, str | None, str]]] = {  # file: curve, title, curve of the x axis, its title
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

    figure, axes = new_figure(len(COLORS))
    for axis, name in zip(axes, COLORS):
        plot_curves(axis, curves, name, "exact", label="exact judge")
        plot_curves(axis, curves, name, "own", label="reward of the run", color=GREY, ls="--")
        axis.set(xlabel="step", ylabel="score of originals", title=METHODS[name])
        if name in curves:
            axis.legend(frameon=False)
    save_figure(figure, folder, "reward_against_exact")


def edit_figure(curves: CurvesByName, folder: str) -> None:
    """How much better CPE's edits are than their originals, over training."""
    figure, (gain, fraction) = new_figure(2)
    plot_curves(gain, curves, "cpe", "gain_own", label="by the run's judge", color=GREY, ls="--")
    plot_curves(gain, curves, "cpe", "gain_exact", label="by the exact judge")
    gain.axhline(0, color="black", lw=0.5)
    gain.set(xlabel="step", ylabel="edits less originals")
    gain.legend(frameon=False)
    plot_curves(fraction, curves, "cpe", "improved", label="better")
    plot_curves(fraction, curves, "cpe", "worse", label="worse", color="#b5442e")
    fraction.set(xlabel="step", ylabel="share of edits, %, exact judge", ylim=(0, 100))
    fraction.legend(frameon=False)
    save_figure(figure, folder, "edits")


def internalisation_figure(out: str, seeds: dict[str, list[int]], folder: str) -> None:
    """Whether the policy learns to write by itself what edits supplied: answers and their edits on held-out prompts."""
    figure, (scores, gap) = new_figure(2)
    for name in ("ppo_grm", "cpe"):
        runs = [held_out_curves(f"{out}/seed{seed}/{name}") for seed in seeds.get(name, [])]
        for axis, y, line in ((scores, "answer", "-"), (scores, "edit", "--"), (gap, "gap", "-")):
            ys = [run[y] for run in runs if run[y]]
            if ys:
                label = f"{METHODS[name]}: {y}"
                plot_range(axis, ys, COLORS[name], runs[0]["step"], ls=line, label=label, marker=".")
    scores.set(xlabel="steps trained", ylabel="exact score, held-out prompts")
    scores.legend(frameon=False)
    gap.set(xlabel="steps trained", ylabel="edits less answers")
    gap.axhline(0, color="black", lw=0.5)
    save_figure(figure, folder, "internalisation")


def ledger_figure(out: str, seeds: dict[str, list[int]], folder: str) -> None:
    """What the loss does with tokens that an edit kept and with those that it inserted."""
    figure, axes = new_figure(3)
    for name, loss, color in (("cpe", "unclipped", COLORS["cpe"]), ("loss_paper_batch", "paper", "#8a6bbf")):
        runs = [read_rows(f"{out}/seed{seed}/{name}/metrics.jsonl", "metrics") for seed in seeds.get(name, [])]
        for axis, quantity in zip(axes, ("ratio", "gradient_mass", "clipfrac")):
            for kind, line in (("kept", "-"), ("inserted", "--")):
                if runs:
                    ys = np.array([[step[f"edit/{kind}_{quantity}"] for step in run] for run in runs], dtype=float)
                    xs = np.arange(1, ys.shape[1] + 1)
                    axis.plot(xs, np.nanmean(ys, 0), line, color=color, label=f"{loss}, {kind}")
    for axis, title in zip(axes, ("ratio", "|weight x advantage| per token", "share of tokens without gradient")):
        axis.set(xlabel="step", ylabel=title)
    axes[0].legend(frameon=False)
    save_figure(figure, folder, "ledger")
