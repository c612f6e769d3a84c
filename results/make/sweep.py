"""When do edits pay? The rate of the content that critiques name, against the method and its loss on edits.

Each seed has the world, base model and GRM of the first command, which the table `ladder` runs in the same folder. The
base's corpus has a topic's last step and the advice only in critiques and in what follows them, never in a plain
answer. Each rate R has its own SFT policy, trained on answers of a world with `--rarity R R`. Two rates differ in the
policy that RL starts from, and in nothing else: judge and prompts are the same.

The tables give the rate that is *measured* in samples of the SFT policy, since SFT on chosen answers raises it above R.
They report how often the final policy says the content without a critique in its context, and the exact judge's score,
on unseen people's questions. All methods train on as many responses, and each has the better of the same two learning
rates, found on a seed that no table reports.

Figures and commands of each experiment are kept in sweep.json: what is there is not run again, so that runs can be
spread over days and machines.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from json_files import read_json
from results.make import ladder
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
    spread,
    write_page,
)
from results.make.experiments import FLAGS, PAIRS_ONLY, Experiment
from results.make.figures import Figures, evaluated

RATES = (0.3, 0.03, 0.003, 0.001, 0.0)
RARE = 0.003
QUICK_RATES = (0.3, 0.0)
STEPS = ladder.STEPS
PLAIN = FLAGS["ppo"]  # no edits, n = 6: as many responses per prompt as 4 originals and 2 edits
METHODS = {  # name: flags of ppo_cpe.py
    "ppo": PLAIN,
    "paper": "--edit-loss paper",
    "released": "--edit-loss released",
    "unclipped": "--edit-loss unclipped",
    "none": "--edit-loss none",
    "novel": "--edit-loss novel",
}
QUICK = ("ppo", "paper", "none", "novel")
OTHER_LOSSES = {  # at the two ends of the diagram
    "tis": "--edit-loss tis",
    "luffy": "--edit-loss luffy",
    "topr": "--edit-loss topr",
    "none_original": "--edit-loss none --edit-baseline original",
}
LABELS = {
    "sft": "SFT",
    "ppo": "PPO, n = 6",
    "paper": "CPE, paper",
    "released": "CPE, released",
    "unclipped": "CPE, unclipped (the default)",
    "none": "CPE, none",
    "novel": "CPE, novel",
    "tis": "CPE, tis",
    "luffy": "CPE, luffy",
    "topr": "CPE, topr",
    "none_original": "CPE, none, baseline original",
}
SHOWN = {"ppo": "#2f6db3", "paper": "#8a6bbf", "none": "#b5442e", "novel": "#2e8b57"}  # others are grey

LRS = (5e-5, 1e-4)
SEARCH_SEED = 100
SEARCHED = (0.3, RARE, 0.0)
LR: dict[float, dict[str, float]] = {  # the better one by the exact score on dev prompts; 5e-5 where none was tried
    0.3: {},
    RARE: {},
    0.0: {},
}
SEARCHED_AT = {0.3: 0.3, 0.03: 0.3, 0.003: RARE, 0.001: RARE, 0.0: 0.0}

CRITICS = ("exact", "wrong50", "vague", "kind", "silent")  # functions of critics.py
QUESTIONS = {  # asked besides the diagram: {name: (rate, method, further flags)}
    **{f"critic_{name}": (0.0, "none", f"--judge results/make/critics.py:{name}") for name in CRITICS},
    "top_p_ppo": (0.03, "ppo", "--top-p 0.9"),
    "top_p_none": (0.03, "none", "--top-p 0.9"),
    "edit_below": (RARE, "none", "--edit-below 4.7"),
    "reward_rank": (0.03, "none", "--edit-strategy reward_rank"),
    "conditional": (0.03, "none", "--edit-strategy conditional"),
    "batch_rank": (0.03, "none", "--edit-strategy batch_rank"),
    "lora_ppo": (RARE, "ppo", "--lora-rank 32 --lr 3e-4"),
    "lora_none": (RARE, "none", "--lora-rank 32 --lr 3e-4"),
}
QUESTION_SEEDS = 3

NOTE = (
    "Made by `python results/make/tables.py sweep`. Columns of the first three tables: the rate measured in samples of "
    "the SFT policy that RL starts from. Mean ± standard deviation over seeds, each with its own world and base model; "
    "sampled at temperature 1 without a critique in the context, on unseen people's questions, by the exact judge."
)

Key = tuple[float, str]  # rate and name of an experiment
BySeed = dict[Key, dict[int, dict]]


# -- what is trained ---------------------------------------------------------------------------------------------------


def experiments(out: str, seeds: int, quick: bool = False) -> list[Experiment]:
    """The diagram of a seed before the next one's; further questions come last. quick: one seed, some methods."""
    if quick:
        return of_seed(out, 0, QUICK_RATES, QUICK)
    wanted = []
    for seed in range(seeds):
        wanted += of_seed(out, seed, RATES, METHODS)
    for seed in range(seeds):
        for rate in (RATES[0], RATES[-1]):
            wanted += [train(out, seed, rate, name, flags, lr_of(rate, name)) for name, flags in OTHER_LOSSES.items()]
    for seed in range(min(seeds, QUESTION_SEEDS)):
        for name, (rate, method, flags) in QUESTIONS.items():
            wanted.append(train(out, seed, rate, name, f"{METHODS[method]} {flags}", lr_of(rate, method)))
    return wanted


def searched(out: str) -> list[Experiment]:
    """Both learning rates on a seed that no table reports, on the dev prompts."""
    wanted = [ladder.recipe(out, SEARCH_SEED, until_checks=True)]
    for rate in SEARCHED:
        wanted += start_of(out, SEARCH_SEED, rate)
        for name, flags in (METHODS | OTHER_LOSSES).items():
            if name in METHODS or rate != RARE:
                wanted += [train(out, SEARCH_SEED, rate, f"{name}_lr{lr:g}", flags, lr, split="dev") for lr in LRS]
    return wanted


def of_seed(out: str, seed: int, rates: Iterable[float], names: Iterable[str]) -> list[Experiment]:
    wanted = [ladder.recipe(out, seed)]
    for rate in rates:
        wanted += start_of(out, seed, rate)
        wanted += [train(out, seed, rate, name, METHODS[name], lr_of(rate, name)) for name in names]
    return wanted


def lr_of(rate: float, name: str) -> float:
    return LR[SEARCHED_AT[rate]].get(name, LRS[0])


def start_of(out: str, seed: int, rate: float) -> list[Experiment]:
    """The SFT policy that RL starts from, and the sanity checks of it."""
    recipe = f"{out}/seed{seed}/recipe"
    place = f"seed{seed}/rate{rate:g}"
    pairs = f"{out}/{place}/world"
    commands = [
        f"data/persona_world.py --out {pairs} --rarity {rate:g} {rate:g} --seed {seed} {PAIRS_ONLY}",
        f"sft.py --model {recipe}/base/policy --data {pairs}/pairs.jsonl --out {out}/{place}/sft {FLAGS['sft']} "
        f"--seed {seed}",
        evaluation(out, seed, f"{out}/{place}/sft", "eval"),
    ]
    checks = (
        f"recipes/sanity_checks.py --world {recipe}/world --policy {out}/{place}/sft/policy "
        f"--grm {recipe}/grm/model --out {out}/{place}/checks --samples 24 --tolerant"
    )
    sft = Experiment(f"{place}/sft", commands, [f"seed{seed}/recipe"])
    return [sft, Experiment(f"{place}/checks", [checks], [sft.name])]


def evaluation(out: str, seed: int, run: str, split: str) -> str:
    return (
        f"evaluate.py --model {run}/policy --baseline reference "
        f"--prompts {out}/seed{seed}/recipe/world/prompts_{split}.jsonl {FLAGS['evaluation']} --n-prompts 0 "
        f"--seed {seed} --bootstrap-draws 100 --out {run}/eval"
    )


def train(out: str, seed: int, rate: float, name: str, flags: str, lr: float, split: str = "eval") -> Experiment:
    """One run of RL and its evaluation. flags: override those before them."""
    recipe = f"{out}/seed{seed}/recipe"
    place = f"seed{seed}/rate{rate:g}"
    run = f"{out}/{place}/{name}"
    command = (
        f"ppo_cpe.py --model {out}/{place}/sft/policy --prompts {recipe}/world/prompts_train.jsonl "
        f"--judge {recipe}/grm/model --out {run} {FLAGS['rl']} --max-steps {STEPS} --seed {seed} --lr {lr:g} {flags}"
    )
    return Experiment(f"{place}/{name}", [command, evaluation(out, seed, run, split)], [f"{place}/sft"])


# -- sweep.json --------------------------------------------------------------------------------------------------------


def parts_of(name: str) -> tuple[int, float, str] | None:
    """ "seed0/rate0.3/ppo" -> (0, 0.3, "ppo"); None for the recipe."""
    match = re.fullmatch(r"seed(\d+)/rate([^/]+)/(\w[^/]*)", name)
    return (int(match[1]), float(match[2]), match[3]) if match else None


def is_kept(name: str) -> bool:
    return parts_of(name) is not None


def figures_of(out: str, name: str) -> dict:
    """The figures of an experiment, for sweep.json."""
    folder = f"{out}/{name}"
    if name.endswith("/checks"):
        return read_json(f"{folder}/sanity_checks.json")
    return evaluated(folder, f"{folder}/eval")


def by_rate(known: dict[str, dict], search: bool) -> BySeed:
    """The figures by rate and name, of the seed of the search or of all others."""
    figures: BySeed = defaultdict(dict)
    for experiment, kept in known.items():
        parts = parts_of(experiment)
        if parts and (parts[0] == SEARCH_SEED) == search:
            seed, rate, name = parts
            figures[rate, name][seed] = {key: value for key, value in kept.items() if key != "commands"}
    return figures


def values_of(figures: BySeed, rate: float, name: str, figure: str) -> list:
    """A figure (or curve) over the seeds that have it."""
    values = [of_seed.get(figure) for _, of_seed in sorted(figures.get((rate, name), {}).items())]
    return [value for value in values if value is not None]


# -- tables ------------------------------------------------------------------------------------------------------------


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes sweep.md and the figures."""
    figures = by_rate(known, search=False)
    sections = {
        "Exact score (ceiling 4.75)": diagram_table(figures, "reward", 1, 2),
        "Gives suitable advice, %": diagram_table(figures, "advice", 100, 1),
        "Answers with a wrong fact, %": diagram_table(figures, "wrong", 100, 1),
        "Steps until half of the samples give the advice": diagram_table(figures, "half", 1, 0),
        "Score less PPO's": differences_from_ppo(figures),
        "All experiments": all_experiments(figures),
        "Further questions": questions_table(figures),
        "Sanity checks, by R": check_table(figures),
    }
    write_page(f"{folder}/sweep.md", "Rarity against the loss on edits", NOTE, sections)
    if figures:
        draw_diagram(figures, folder)
        draw_curves(figures, folder)


def rates_of(figures: BySeed) -> list[float]:
    return [rate for rate in RATES if (rate, "checks") in figures]


def diagram_table(figures: BySeed, figure: str, factor: float, digits: int) -> str:
    """A row per method, a column per rate, headed by what is measured in the SFT policy."""
    rates = rates_of(figures)
    header = ["", *(f"{percent(values_of(figures, rate, 'checks', 'advice'), 3)} %" for rate in rates)]
    rows = []
    for name, label in LABELS.items():
        values = [of_figure(figures, rate, name, figure) for rate in rates]
        if any(values):
            rows.append([label, *(spread(of_rate, digits, factor) for of_rate in values)])
    return markdown_table(header, rows)


def of_figure(figures: BySeed, rate: float, name: str, figure: str) -> list:
    """Values over seeds; `half` is read from the curves, and a seed that never gets there has no value."""
    if figure != "half":
        return values_of(figures, rate, name, figure)
    curves = values_of(figures, rate, name, "curve")
    return [step for step in map(step_of_half, curves) if step is not None]


def step_of_half(curve: list[float]) -> int | None:
    """The first step at which half of the samples give the advice; None if there is none."""
    return next((step for step, value in enumerate(curve, 1) if value >= 0.5), None)


def differences_from_ppo(figures: BySeed) -> str | None:
    """Paired over seeds. p is Holm's, over all comparisons of the table."""
    found = []
    for rate in rates_of(figures):
        for name in LABELS:
            d = difference(figures, (rate, name), (rate, "ppo"), "reward")
            if d and name not in ("sft", "ppo"):
                found.append(([LABELS[name], f"{rate:g}"], d))
    order = sorted(range(len(found)), key=lambda i: found[i][1]["p"])
    smallest = 0.0
    for rank, i in enumerate(order):
        smallest = max(smallest, min(1.0, found[i][1]["p"] * (len(found) - rank)))
        found[i][1]["p"] = smallest
    return difference_table(["", "R", "difference of scores"], found, with_p=True)


def all_experiments(figures: BySeed) -> str:
    rows = []
    for rate in RATES:
        for name, label in LABELS.items():
            of_seeds = figures.get((rate, name))
            if of_seeds:
                rows.append(([label, f"{rate:g}", len(of_seeds)], list(of_seeds.values())))
    return figure_table(["", "R", "seeds"], rows, ["reward", *RARE_CONTENT, "generated", "judge_calls"])


def questions_table(figures: BySeed) -> str | None:
    """Each question beside the method that it varies, on the same seeds."""
    rows = []
    for name, (rate, method, _) in QUESTIONS.items():
        asked = figures.get((rate, name), {})
        if asked:
            varied = [of_seed for seed, of_seed in figures.get((rate, method), {}).items() if seed in asked]
            rows.append(([name, f"{rate:g}", len(asked)], list(asked.values())))
            rows.append(([f"  beside {LABELS[method]}", f"{rate:g}", len(varied)], varied))
    if not rows:
        return None
    return figure_table(["", "R", "seeds"], rows, ["reward", *RARE_CONTENT, "generated", "judge_calls", "update"])


def check_table(figures: BySeed) -> str:
    """The sanity checks' figures by R."""
    rates = rates_of(figures)
    checks = {rate: list(figures[rate, "checks"].values()) for rate in rates}
    names = sorted({name for seeds in checks.values() for of_seed in seeds for name in of_seed} - {"missed", "nearly"})
    rows = [[f"{rate:g}", *(spread([s.get(n) for s in checks[rate]], 4) for n in names)] for rate in rates]
    return markdown_table(["R", *names], rows)


def write_search(known: dict[str, dict], folder: str) -> None:
    """Writes search.md: every learning rate that was tried."""
    figures = by_rate(known, search=True)
    sections: dict[str, str | None] = {}
    for rate in SEARCHED:
        rows: list[tuple[str, dict[float, Figures]]] = []
        for name, label in LABELS.items():
            by_lr = {lr: figures.get((rate, f"{name}_lr{lr:g}")) for lr in LRS}
            rows.append((label, {lr: seeds[SEARCH_SEED] for lr, seeds in by_lr.items() if seeds}))
        sections[f"R = {rate:g}"] = search_table(rows, {"reward": 2, "last_step": 1, "advice": 1, "wrong": 1})
    note = f"Seed {SEARCH_SEED}, dev prompts, exact score, {STEPS} steps: the same two learning rates for each method."
    write_page(f"{folder}/search.md", "Learning rates", note, sections)


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_diagram(figures: BySeed, folder: str) -> None:
    """Score and advice against the rate in samples of the SFT policy; labels on the lines, other losses in grey."""
    rates = rates_of(figures)
    x_of = {rate: max(1e-5, float(np.mean(values_of(figures, rate, "checks", "advice")))) for rate in rates}
    figure, axes = new_figure(2)
    panels = {"reward": ("exact score", 1), "advice": ("gives suitable advice, %", 100)}
    for axis, (quantity, (title, factor)) in zip(axes, panels.items()):
        for name in sorted(METHODS, key=lambda name: name in SHOWN):  # grey lines lie below
            known = sorted((rate for rate in rates if values_of(figures, rate, name, quantity)), key=x_of.__getitem__)
            if not known:
                continue
            color = SHOWN.get(name, GREY)
            xs = [x_of[rate] for rate in known]
            ys = [factor * np.array(values_of(figures, rate, name, quantity)) for rate in known]
            axis.plot(xs, [y.mean() for y in ys], marker=".", color=color, lw=2 if name in SHOWN else 1)
            if name in SHOWN:
                axis.fill_between(xs, [y.min() for y in ys], [y.max() for y in ys], color=color, alpha=0.12, lw=0)
            axis.annotate(name, (xs[-1], ys[-1].mean()), (4, 0), textcoords="offset points", color=color, fontsize=7)
        axis.set(xscale="log", xlabel="samples of SFT with the advice", ylabel=title)
        axis.set_xlim(right=2 * max(x_of.values()))
    save_figure(figure, folder, "sweep")


def draw_curves(figures: BySeed, folder: str) -> None:
    """Samples with suitable advice over training, at each rate."""
    rates = rates_of(figures)
    figure, axes = new_figure(len(rates))
    for axis, rate in zip(np.atleast_1d(axes), rates):
        for name in sorted(METHODS, key=lambda name: name in SHOWN):
            curves = values_of(figures, rate, name, "curve")
            if curves:
                plot_range(axis, [100 * np.array(curve) for curve in curves], SHOWN.get(name, GREY), label=name)
        axis.set(xlabel="step", ylabel="samples with suitable advice, %", title=f"R = {rate:g}")
    np.atleast_1d(axes)[-1].legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "sweep_curves")
