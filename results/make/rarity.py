"""When do edits pay? The rate of the content that critiques name, against the method and its loss on edits.

One base model, whose corpus has a topic's last step and the advice only in critiques and in what follows them, never in
a plain answer. Each rate R has its own SFT policy, trained on answers of a world with `--rarity R R`. Two rates differ
in the policy that RL starts from, and in nothing else: judge and prompts are the same. Steps and advice are reported
apart, because they are paid and learned differently. A last step is worth two points of helpfulness and is the same
words for everybody; advice depends on the person and is worth less.

The tables give the rate that is *measured* in samples of the SFT policy, since SFT on chosen answers raises it above R.
They report how often the final policy says the content without a critique in its context, and the exact judge's score,
on unseen people's questions. Learning rates are chosen per method, with equal effort, on a seed that no table reports.
Figures and commands of each experiment are kept in rarity.json: what is there is not run again, so that runs can be
spread over days and machines.
"""

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable

import numpy as np

from json_files import read_json
from results.make.draw import (
    GREY,
    RARE_CONTENT,
    difference,
    difference_table,
    figure_table,
    markdown_table,
    new_figure,
    percent,
    plot_range,
    save_figure,
    search_table,
    sections_text,
    spread,
)
from results.make.experiments import FLAGS, RL_STEPS, ROOT, Training
from results.make.figures import LEDGER, Figures
from results.make.paper import LOSSES, loss_name
from runtime.rows import write_text

RATES = (0.3, 0.03, 0.003, 0.0003, 0.0)
RARE = 0.003  # all learning rates are tried here
QUICK_RATES = (0.3, RARE, 0.0)
QUICK_STEPS = 15
PLAIN = FLAGS["ppo"]  # no edits, n = 6
METHODS = {  # name: flags of ppo_cpe.py
    "ppo": PLAIN,
    "paper": "--edit-loss paper",
    "unclipped": "--edit-loss unclipped",
    "tis": "--edit-loss tis",
    "luffy": "--edit-loss luffy",
    "topr": "--edit-loss topr",
    "none": "--edit-loss none",
    "none_original": "--edit-loss none --edit-baseline original",
}
# sdpo is no longer trained (ppo_cpe.py has it as a fork, docs/forking.md): rarity.json keeps its figures
LABELS = {
    "sft": "SFT",
    "ppo": "PPO, n = 6",
    "paper": "CPE, paper",
    "unclipped": "CPE, unclipped",
    "tis": "CPE, tis",
    "luffy": "CPE, luffy",
    "topr": "CPE, topr",
    "none": "CPE, none",
    "none_original": "CPE, none, baseline original",
    "sdpo": "SDPO, n = 6, no edits",
    "ppo_tokens": "PPO, as many generated tokens",
}
COLORS = {
    "ppo": "#2f6db3",
    "paper": "#8a6bbf",
    "unclipped": "#2e8b57",
    "tis": "#7fb069",
    "luffy": "#c9a227",
    "topr": "#d2762b",
    "none": "#b5442e",
    "none_original": "#7a2233",
    "sdpo": GREY,
}
QUICK = ("ppo", "paper", "none")

LRS: tuple[float, ...] = (2e-5, 5e-5, 1e-4)
SEARCH_SEED = 100
# All of LRS are tried at the rate RARE, each method's two best there at two other rates
TWO_BEST: dict[str, tuple[float, ...]] = dict.fromkeys(COLORS, (5e-5, 1e-4)) | {"sdpo": (2e-5, 5e-5)}
TRIED = {RARE: dict.fromkeys(COLORS, LRS), 0.3: TWO_BEST, 0.0: TWO_BEST}
# The best of them by the exact score on dev prompts (results/rarity/search.md)
LR = {
    0.3: dict.fromkeys(COLORS, 5e-5),
    RARE: dict.fromkeys(COLORS, 5e-5) | {"ppo": 1e-4, "unclipped": 1e-4, "none_original": 1e-4, "sdpo": 2e-5},
    0.0: dict.fromkeys(COLORS, 5e-5) | {"none": 1e-4, "none_original": 1e-4},
}
SEARCHED_AT = {0.3: 0.3, 0.03: 0.3, 0.003: RARE, 0.0003: RARE, 0.0: 0.0}  # whose learning rates each of RATES has

# Further questions are asked of the loss `none`, the surest where samples lack what is named (docs/results.md)
CHOSEN = "none"
CRITICS = ("exact", "kind", "vague", "silent", "wrong10", "wrong30", "wrong50")  # functions of critics.py
CRITIC_RATES = (RARE, 0.0)
SAMPLED_RATES = (0.03, RARE)  # for questions about what samples do hold
EDIT_BELOW = 4.7
TOP_P = {"": 1, "_top_p": 0.9}  # suffix of the name: top-p
# What the diagram says of R = 0, once more on seeds that chose nothing
CONFIRM_SEEDS = (101, 102, 103)
CONFIRMED = ("ppo", "unclipped", "none")

NOTE = (
    "Made by `python results/make/tables.py rarity`. Columns of the first three tables: the rate measured in samples "
    "of the SFT policy that RL starts from. Mean ± standard deviation over seeds; sampled at temperature 1 without a "
    "critique in the context, on unseen people's questions, scored by the exact judge. Common: another base model, "
    "in whose world samples of SFT have the last step and the advice in 8 to 15 % of cases; three to five seeds."
)

Key = tuple[float, str]  # rate and name of an experiment
BySeed = dict[Key, dict[int, Figures]]
Comparison = tuple[float, str, str]  # rate, experiment, the one that it is compared with


# -- what is trained ---------------------------------------------------------------------------------------------------


def lr_of(rate: float, name: str) -> float:
    return LR[SEARCHED_AT[rate]][name]


def diagram(seed: int, rates: Iterable[float], names: Iterable[str], steps: int = RL_STEPS) -> list[Training]:
    """The methods at some rates; the rate RARE comes first."""
    return [
        Training(seed, name, lr_of(rate, name), METHODS[name], steps, rate=rate)
        for rate in sorted(rates, key=lambda rate: rate != RARE)
        for name in names
    ]


def questions(seed: int) -> list[Training]:
    """What is asked besides the diagram."""
    ppo_steps = round(RL_STEPS * 1.4)  # edits cost generated tokens: PPO with as many of them
    chosen = METHODS[CHOSEN]
    asked = [(rate, "ppo_tokens", "ppo", f"{PLAIN} --max-steps {ppo_steps}") for rate in RATES]
    for rate in CRITIC_RATES:
        asked += [(rate, f"critic_{c}", CHOSEN, f"{chosen} --judge results/make/critics.py:{c}") for c in CRITICS]
    for rate in SAMPLED_RATES:
        asked += [(rate, f"{name}_top_p", name, f"{METHODS[name]} --top-p 0.9") for name in ("ppo", CHOSEN)]
        asked.append((rate, "edit_below", CHOSEN, f"{chosen} --edit-below {EDIT_BELOW:g}"))
    return [Training(seed, name, lr_of(rate, method), flags, rate=rate) for rate, name, method, flags in asked]


def trainings(seeds: int, quick: bool = False) -> list[Training]:
    """The whole diagram of a seed before the next one's; further questions come last."""
    if quick:
        return diagram(0, QUICK_RATES, QUICK, QUICK_STEPS)
    wanted = []
    for seed in range(seeds):
        wanted += diagram(seed, RATES, METHODS)
    for seed in CONFIRM_SEEDS:
        wanted += diagram(seed, [0.0], CONFIRMED)
    for seed in range(seeds):
        wanted += questions(seed)
    return wanted


def searched() -> list[Training]:
    """The search for learning rates: another seed, the dev prompts."""
    return [
        Training(SEARCH_SEED, f"{name}_lr{lr:g}", lr, METHODS[name], rate=rate, split="dev")
        for rate, lrs in TRIED.items()
        for name in METHODS
        for lr in lrs[name]
    ]


# -- rarity.json -------------------------------------------------------------------------------------------------------


def parts_of(name: str) -> tuple[int, float, str] | None:
    """ "seed0/rate0.3/ppo" -> (0, 0.3, "ppo"); None for an experiment of no rate (world, base, a seed's GRM)."""
    match = re.fullmatch(r"seed(\d+)/rate([^/]+)/(\w[^/]*)", name)
    return (int(match[1]), float(match[2]), match[3]) if match else None


def by_rate(known: dict[str, dict], seeds: Container[int]) -> BySeed:
    """The figures of these seeds, by rate and name."""
    figures: BySeed = defaultdict(dict)
    for experiment, kept in known.items():
        parts = parts_of(experiment)
        if parts and parts[0] in seeds:
            seed, rate, name = parts
            figures[rate, name][seed] = {key: value for key, value in kept.items() if key != "commands"}
    return figures


def values_of(figures: BySeed, rate: float, name: str, figure: str) -> list:
    """A figure (or curve) over the seeds that have it."""
    values = [of_seed.get(figure) for _, of_seed in sorted(figures.get((rate, name), {}).items())]
    return [value for value in values if value is not None]


# -- tables ------------------------------------------------------------------------------------------------------------


def diagram_table(
    figures: BySeed,
    figure: str,
    measured: str,
    text: Callable[[list[float]], str],
    common: dict[str, list[float]] | None = None,
) -> str:
    """A row per method, a column per rate, headed by what is measured in the SFT policy. common: a further column."""
    rates = [rate for rate in RATES if (rate, "checks") in figures]
    header = ["", *(f"{percent(values_of(figures, rate, 'checks', measured), 2)} %" for rate in rates)]
    if common:
        header.append("common (results/tables.md)")
    rows = []
    for name, label in LABELS.items():
        row = [text(values_of(figures, rate, name, figure)) for rate in rates]
        if set(row) == {"-"}:
            continue
        if common:
            row.append(text(common.get(name, [])))
        rows.append([label, *row])
    return markdown_table(header, rows)


def common_scores() -> dict[str, list[float]]:
    """Scores by method of the paper's tables (results/results.json), where the rare content is common: another base
    model, in whose world samples have the last step and the advice in 8 to 15 % of cases."""
    experiments = read_json(os.path.join(ROOT, "results/results.json"))["experiments"]
    names = {"sft": "sft", "ppo": "ppo_grm", "none_original": loss_name("none", "original"), "sdpo": "loss_sdpo"}
    names |= {loss: loss_name(loss, "batch") for loss in LOSSES}
    return {name: [seed["reward"] for seed in experiments[other].values()] for name, other in names.items()}


def comparison_table(figures: BySeed, labels: dict[Key, str], compared: Iterable[Comparison]) -> str | None:
    """Differences of scores, paired over seeds; None where no comparison has two seeds."""
    rows = []
    for rate, name, other in compared:
        d = difference(figures, (rate, name), (rate, other), "reward")
        if d:
            rows.append(([f"{labels[rate, name]} less {labels[rate, other]}", f"{rate:g}"], d))
    return difference_table(["", "R", "difference of scores"], rows)


def question_table(figures: BySeed, labels: dict[Key, str], compared: Iterable[Comparison] = ()) -> str | None:
    """A row per experiment, then the differences that are asked for; None where no experiment is finished."""
    finished = {key: label for key, label in labels.items() if figures.get(key)}
    if not finished:
        return None
    rows = [
        ([label, f"{rate:g}", len(figures[rate, name])], list(figures[rate, name].values()))
        for (rate, name), label in finished.items()
    ]
    table = figure_table(["", "R", "seeds"], rows, ["reward", *RARE_CONTENT, "generated", "judge_calls"])
    differences = comparison_table(figures, labels, compared)
    return f"{table}\n\n{differences}" if differences else table


def novel_token_table(figures: BySeed) -> str | None:
    """What the loss did with edits' tokens."""
    rows = []
    for rate, name in itertools.product(RATES, METHODS):
        if values_of(figures, rate, name, "edit/novel"):
            rows.append(([LABELS[name], f"{rate:g}"], list(figures[rate, name].values())))
    columns = ("novel", "novel_weight", "novel_clipfrac", "inserted_weight", "inserted_clipfrac")
    return figure_table(["", "R"], rows, [f"edit/{name}" for name in columns]) if rows else None


def check_table(figures: BySeed) -> str:
    """The sanity checks' figures by R."""
    checks = {rate: list(figures[rate, "checks"].values()) for rate in RATES if (rate, "checks") in figures}
    names = sorted({name for seeds in checks.values() for of_seed in seeds for name in of_seed} - {"missed", "nearly"})
    rows = [
        [f"{rate:g}", *(spread([s.get(name) for s in seeds], 4) for name in names)] for rate, seeds in checks.items()
    ]
    return markdown_table(["R", *names], rows)


def further_questions(figures: BySeed) -> dict[str, str | None]:
    """{title: table} of what is asked besides the diagram."""
    critics = {(rate, f"critic_{name}"): f"critic: {name}" for rate in CRITIC_RATES for name in CRITICS}
    against_exact = [(rate, name, "critic_exact") for rate, name in critics if name != "critic_exact"]
    sampling = {
        (rate, name + suffix): f"{LABELS[name]}, top-p {p}"
        for rate in SAMPLED_RATES
        for name in ("ppo", CHOSEN)
        for suffix, p in TOP_P.items()
    }
    against_ppo = [(rate, CHOSEN + suffix, "ppo" + suffix) for rate in SAMPLED_RATES for suffix in TOP_P]
    edited: dict[Key, str] = {}
    for rate in SAMPLED_RATES:
        edited |= {(rate, CHOSEN): "all edited", (rate, "edit_below"): f"below {EDIT_BELOW:g}"}
    against_all = [(rate, "edit_below", CHOSEN) for rate in SAMPLED_RATES]
    return {
        "What the loss did with edits' tokens": novel_token_table(figures),
        "The quality of critiques": question_table(figures, critics, against_exact),
        "Top-p": question_table(figures, sampling, against_ppo),
        f"Edits only below a reward of {EDIT_BELOW:g}": question_table(figures, edited, against_all),
    }


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes rarity.md and the figures of the experiments in rarity.json into `folder`."""
    figures = by_rate(known, range(SEARCH_SEED))  # the diagram's seeds are below the search's
    confirmed = by_rate(known, CONFIRM_SEEDS)
    labels = {(rate, name): label for rate in RATES for name, label in LABELS.items()}
    against_ppo = [(rate, name, "ppo") for rate, name in labels if name not in ("sft", "ppo")]
    confirmed_labels = {(0.0, name): LABELS[name] for name in ("sft", *CONFIRMED)}
    confirmed_pairs = [(0.0, name, other) for other, name in itertools.combinations(CONFIRMED, 2)]
    confirmed_title = f"R = 0 on seeds that chose nothing ({', '.join(map(str, CONFIRM_SEEDS))})"
    sections = {
        "Exact score (ceiling 4.75)": diagram_table(figures, "reward", "advice", spread, common_scores()),
        "Says the topic's last step, %": diagram_table(figures, "last_step", "last_step", percent),
        "Gives suitable advice, %": diagram_table(figures, "advice", "advice", percent),
        "Score against PPO with n = 6": comparison_table(figures, labels, against_ppo),
        confirmed_title: question_table(confirmed, confirmed_labels, confirmed_pairs),
        "All experiments": question_table(figures, labels),
        **further_questions(figures),
        "Sanity checks, by R": check_table(figures),
    }
    text = sections_text(sections)
    write_text(f"{folder}/rarity.md", f"# Rarity against the loss on edits\n\n{NOTE}\n\n{text}\n")
    if figures:
        diagram_figure(figures, folder)
        curve_figure(figures, folder)
        novel_token_figure(figures, folder)
    print(f"{text}\n\nwritten: {folder}/ (rarity.md, figures)")


def write_search(known: dict[str, dict], folder: str) -> None:
    """Writes search.md: every learning rate that was tried."""
    figures = by_rate(known, (SEARCH_SEED,))
    sections: dict[str, str | None] = {}
    for rate, lrs in TRIED.items():
        rows = []
        for name in COLORS:
            by_lr = {lr: figures.get((rate, f"{name}_lr{lr:g}")) for lr in lrs[name]}
            rows.append((LABELS[name], {lr: seeds[SEARCH_SEED] for lr, seeds in by_lr.items() if seeds}))
        sections[f"R = {rate:g}"] = search_table(rows, {"reward": 2, "last_step": 1, "advice": 1, "wrong": 1})
    text = sections_text(sections)
    note = (
        f"Seed {SEARCH_SEED}, dev prompts, exact score, {RL_STEPS} steps; the same effort for each method: three "
        f"learning rates at R = {RARE:g}, the two better ones of them at two other rates. An experiment of the diagram "
        "has the best one (bold) of the nearest R."
    )
    write_text(f"{folder}/search.md", f"# Learning rates\n\n{note}\n\n{text}\n")
    print(f"{text}\n\nwritten: {folder}/search.md")


# -- figures -----------------------------------------------------------------------------------------------------------


def diagram_figure(figures: BySeed, folder: str) -> None:
    """Final rates and score against the rate in samples of the SFT policy; a line per method, with its seeds' range.

    The last step has no x axis of its own: however rare it is in the corpus, SFT says it in 1 % of its answers.
    """
    panels = {  # figure: (title, factor, limits)
        "last_step": ("says the last step, %", 100, (0, 100)),
        "advice": ("gives suitable advice, %", 100, (0, 100)),
        "reward": ("exact score", 1, (1, 4.75)),  # SDPO leaves the panel where it fails: the table has it
    }
    n_samples = 6 * 16 * RL_STEPS
    rates = [rate for rate in RATES if (rate, "checks") in figures]
    measured = {rate: float(np.mean(values_of(figures, rate, "checks", "advice"))) for rate in rates}
    x_of = {rate: max(1e-5, value) for rate, value in measured.items()}  # zero has no logarithm: the left edge
    figure, axes = new_figure(len(panels))
    for axis, (quantity, (title, factor, limits)) in zip(axes, panels.items()):
        for name, color in COLORS.items():
            known = [rate for rate in rates if values_of(figures, rate, name, quantity)]
            known.sort(key=lambda rate: x_of[rate])
            if known:
                xs = [x_of[rate] for rate in known]
                ys = [factor * np.array(values_of(figures, rate, name, quantity)) for rate in known]
                axis.plot(xs, [y.mean() for y in ys], marker=".", color=color, label=LABELS[name])
                axis.fill_between(xs, [y.min() for y in ys], [y.max() for y in ys], color=color, alpha=0.1, lw=0)
        axis.axvline(1 / n_samples, color="black", lw=0.5, ls=":")
        axis.text(1 / n_samples, limits[0], " N p = 1", fontsize=7, va="bottom")
        axis.set(xscale="log", xlabel="samples of SFT with the advice (measured)", ylabel=title, ylim=limits)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "rarity")


def curve_figure(figures: BySeed, folder: str) -> None:
    """Samples with suitable advice over training, at three rates."""
    figure, axes = new_figure(len(QUICK_RATES))
    for axis, rate in zip(axes, QUICK_RATES):
        for name, color in COLORS.items():
            curves = values_of(figures, rate, name, "curve")
            if curves:
                plot_range(axis, [100 * np.array(curve) for curve in curves], color, label=LABELS[name])
        axis.set(xlabel="step", ylabel="samples with suitable advice, %", title=f"R = {rate:g}")
    axes[-1].legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "rarity_curves")


def novel_token_figure(figures: BySeed, folder: str) -> None:
    """Ratio, weight and fraction without gradient of edits' novel tokens (lines) and of those that follow (dotted)."""
    figure, axes = new_figure(len(LEDGER))
    for axis, (quantity, title) in zip(axes, LEDGER.items()):
        for name, color in COLORS.items():
            novel = values_of(figures, RARE, name, f"novel_{quantity}")
            followed = values_of(figures, RARE, name, f"followed_{quantity}")
            if novel:
                plot_range(axis, novel, color, label=LABELS[name])
            if followed:
                plot_range(axis, followed, color, ls=":")
        axis.set(xlabel="step", ylabel=title)
        axis.set_title(f"tokens that edits insert, R = {RARE:g}", fontsize=9)
    axes[-1].legend(frameon=False, fontsize=7, loc="center right", title="dotted: not novel", title_fontsize=7)
    save_figure(figure, folder, "rarity_novel_tokens")
