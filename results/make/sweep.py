"""When do edits pay? The rate of the content that critiques name, against the method and its loss on edits.

Each seed has the world, base model and GRM of the recipe, which the table `ladder` runs in the same folder. The
base's corpus has a topic's last step and the advice only in critiques and in answers that were rewritten by them. Each
rate R has its own SFT policy, trained on answers of a world with `--rarity R R`. Two rates differ in the
policy that RL starts from, and in nothing else: judge and prompts are the same.

The tables give the rate that is *measured* in samples of the SFT policy, since SFT on chosen answers changes it.
They report how often the final policy says the content without a critique in its context, and the exact judge's score,
on unseen people's questions. All methods have up to six responses a prompt, at the recipe's learning rate; four
of them also at twice that rate.

Figures and commands of each experiment are kept in sweep.json: what is there is not run again, so that runs can be
spread over days and machines.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from json_files import read_json
from recipes import rare_content
from results.make import ladder, subset
from results.make.draw import (
    COLUMNS,
    GREY,
    RARE_CONTENT,
    column,
    difference,
    difference_table,
    figure_table,
    markdown_table,
    new_figure,
    percent,
    plot_range,
    save_figure,
    spread,
    write_page,
)
from results.make.experiments import FLAGS, PAIRS_ONLY, Experiment
from results.make.figures import EDIT_CURVES, edit_curves, evaluated
from runtime.rows import read_rows

RATES = (0.3, 0.03, 0.003, 0.001, 0.0)
MAIN_RATES = (0.3, 0.003, 0.0)  # on all seeds; the others on the first FEW_SEEDS
ENDS = (0.3, 0.0)
FEW_SEEDS = 3
STEPS = ladder.STEPS
LR = 5e-5
PLAIN = FLAGS["ppo"]  # no edits, n = 6: as many responses per prompt as 4 originals and 2 edits
EDITS = "--edit-below 4.7"
METHODS = {  # name: flags of ppo_cpe.py
    "ppo": PLAIN,
    "none": f"{EDITS} --edit-loss none",  # the recipe's
    "paper": f"{EDITS} --edit-loss paper",
    "novel": f"{EDITS} --edit-loss novel",
    "unclipped": f"{EDITS} --edit-loss unclipped",
    "released": f"{EDITS} --edit-loss released",
}
QUICK = ("ppo", "none")
OTHER_LOSSES = {  # at the two ends of the diagram
    "tis": f"{EDITS} --edit-loss tis",
    "luffy": f"{EDITS} --edit-loss luffy",
    "topr": f"{EDITS} --edit-loss topr",
    "none_original": f"{EDITS} --edit-loss none --edit-baseline original",
}
LABELS = {
    "sft": "SFT",
    "ppo": "PPO, n = 6",
    "none": "CPE, none (the recipe)",
    "paper": "CPE, paper",
    "novel": "CPE, novel",
    "unclipped": "CPE, unclipped",
    "released": "CPE, released",
    "tis": "CPE, tis",
    "luffy": "CPE, luffy",
    "topr": "CPE, topr",
    "none_original": "CPE, none, baseline original",
}
SHOWN = {"ppo": "#2f6db3", "none": "#b5442e", "paper": "#8a6bbf"}  # others are grey

CRITICS = ("exact", "wrong50", "vague", "kind", "silent")  # functions of critics.py
REWRITES = (1000, 4000)  # added to the 4,000 answers of SFT, so that edits carry out critiques more often
QUESTIONS = [  # asked besides the diagram: (rate, name, the method that is varied, further flags)
    *((rate, f"{name}_2lr", name, f"--lr {2 * LR:g}") for rate in ENDS for name in ("ppo", "none", "paper", "novel")),
    *((0.0, f"critic_{name}", "none", f"--judge results/make/critics.py:{name}") for name in CRITICS),
    (0.03, "top_p_ppo", "ppo", "--top-p 0.9"),
    (0.03, "top_p_none", "none", "--top-p 0.9"),
    (0.003, "edit_all", "none", "--edit-below 10"),
    (0.03, "reward_rank", "none", "--edit-strategy reward_rank"),
    (0.03, "conditional", "none", "--edit-strategy conditional"),
    (0.03, "batch_rank", "none", "--edit-strategy batch_rank"),
    (0.003, "lora_ppo", "ppo", "--lora-rank 32 --lr 3e-4"),
    (0.003, "lora_none", "none", "--lora-rank 32 --lr 3e-4"),
]

NOTE = (
    "Made by `python results/make/tables.py sweep`. Columns of the first three tables: the rate measured in samples of "
    "the SFT policy that RL starts from. Mean ± standard deviation over seeds, each with its own world and base model; "
    "sampled at temperature 1 without a critique in the context, on unseen people's questions, by the exact judge."
)

Key = tuple[float, str]  # rate and name of an experiment
BySeed = dict[Key, dict[int, dict]]


# -- what is trained ---------------------------------------------------------------------------------------------------


def experiments(out: str, seeds: int, quick: bool = False) -> list[Experiment]:
    """The diagram's main rates, a seed before the next; then all else, on few seeds. quick: one seed, two methods."""
    if quick:
        return [ladder.recipe(out, 0, until_checks=True), *of_rates(out, 0, ENDS, QUICK)]
    few = range(min(seeds, FEW_SEEDS))
    between = [rate for rate in RATES if rate not in MAIN_RATES]
    wanted = []
    for seed in range(seeds):
        wanted += [ladder.recipe(out, seed), *of_rates(out, seed, MAIN_RATES, METHODS)]
    for seed in few:
        for number in REWRITES:
            wanted += start_of(out, seed, 0.0, number)
            wanted.append(train(out, seed, 0.0, "none", METHODS["none"], rewrites=number))
        wanted.append(hold_out_values(out, seed))
    for seed in few:
        wanted += of_rates(out, seed, between, METHODS)
    for seed in few:
        for rate in ENDS:
            wanted += [train(out, seed, rate, name, flags) for name, flags in OTHER_LOSSES.items()]
        for rate, name, method, flags in QUESTIONS:
            wanted.append(train(out, seed, rate, name, f"{METHODS[method]} {flags}"))
    return wanted


def of_rates(out: str, seed: int, rates: Iterable[float], names: Iterable[str]) -> list[Experiment]:
    wanted = []
    for rate in rates:
        wanted += start_of(out, seed, rate)
        wanted += [train(out, seed, rate, name, METHODS[name]) for name in names]
    return wanted


def start_of(out: str, seed: int, rate: float, rewrites: int = 0) -> list[Experiment]:
    """The SFT policy that RL starts from, and the sanity checks of it. rewrites: conversations besides its answers."""
    recipe = f"{out}/seed{seed}/recipe"
    place = f"seed{seed}/rate{rate:g}"
    sft = with_rewrites(f"{place}/sft", rewrites)
    pairs = f"{out}/{sft}_world"
    rows = f"{pairs}/pairs.jsonl"
    commands = [f"data/persona_world.py --out {pairs} --rarity {rate:g} {rate:g} --seed {seed} {PAIRS_ONLY}"]
    if rewrites:
        commands.append(
            f"results/make/subset.py --world {recipe}/world --pairs {rows} --rewrites {rewrites} "
            f"--out {pairs}/mixed.jsonl"
        )
        rows = f"{pairs}/mixed.jsonl"
    commands += [
        f"sft.py --model {recipe}/base/policy --data {rows} --out {out}/{sft} {FLAGS['sft']} --seed {seed}",
        evaluation(out, seed, f"{out}/{sft}"),
    ]
    checks = with_rewrites(f"{place}/checks", rewrites)
    check = (
        f"recipes/sanity_checks.py --world {recipe}/world --policy {out}/{sft}/policy "
        f"--grm {recipe}/grm/model --out {out}/{checks} --samples 24 --tolerant"
    )
    return [Experiment(sft, commands, [f"seed{seed}/recipe"]), Experiment(checks, [check], [sft])]


def with_rewrites(name: str, rewrites: int) -> str:
    return f"{name}_rewrites{rewrites}" if rewrites else name


def evaluation(out: str, seed: int, run: str) -> str:
    return (
        f"evaluate.py --model {run}/policy --baseline reference "
        f"--prompts {out}/seed{seed}/recipe/world/prompts_eval.jsonl {FLAGS['evaluation']} --n-prompts 0 "
        f"--seed {seed} --bootstrap-draws 100 --out {run}/eval"
    )


def train(
    out: str, seed: int, rate: float, name: str, flags: str, rewrites: int = 0, script: str = "ppo_cpe.py"
) -> Experiment:
    """One run of RL and its evaluation. flags: override those before them."""
    recipe = f"{out}/seed{seed}/recipe"
    place = f"seed{seed}/rate{rate:g}"
    name = with_rewrites(f"{place}/{name}", rewrites)
    sft = with_rewrites(f"{place}/sft", rewrites)
    command = (
        f"{script} --model {out}/{sft}/policy --prompts {recipe}/world/prompts_train.jsonl "
        f"--judge {recipe}/grm/model --out {out}/{name} {FLAGS['rl']} --max-steps {STEPS} --seed {seed} --lr {LR:g} "
        f"{flags}"
    )
    return Experiment(name, [command, evaluation(out, seed, f"{out}/{name}")], [sft])


def hold_out_values(out: str, seed: int) -> Experiment:
    """CPE without prompts whose relevant attributes have held-out values: is a rule learned, or are phrases?"""
    prompts = f"{out}/seed{seed}/rate0/kept_prompts.jsonl"
    filtered = f"results/make/subset.py --world {out}/seed{seed}/recipe/world --hold-out-values --out {prompts}"
    experiment = train(out, seed, 0.0, "held_out_values", f"{METHODS['none']} --prompts {prompts}")
    experiment.commands.insert(0, filtered)
    return experiment


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
    if "/checks" in name:
        return read_json(f"{folder}/sanity_checks.json")
    figures = evaluated(folder, f"{folder}/eval") | edit_curves(folder)
    answers = read_rows(f"{folder}/eval/answers_model.jsonl", "object")
    return figures | advice_by_value(answers)


def advice_by_value(answers: list[dict]) -> dict[str, float | None]:
    """The fraction of relevant attributes with suitable advice, for the held-out values and for the others."""
    given: dict[bool, list[bool]] = {True: [], False: []}
    for row in answers:
        for held_out, advised in zip(subset.is_held_out(row), rare_content.advised(row, row["answer"]), strict=True):
            given[held_out].append(advised)
    return {"advice_held_out": rare_content.fraction(given[True]), "advice_kept": rare_content.fraction(given[False])}


def by_rate(known: dict[str, dict]) -> BySeed:
    """The figures by rate and name."""
    figures: BySeed = defaultdict(dict)
    for experiment, kept in known.items():
        parts = parts_of(experiment)
        if parts:
            seed, rate, name = parts
            figures[rate, name][seed] = {
                key: value for key, value in kept.items() if key not in ("commands", "settings")
            }
    return figures


def values_of(figures: BySeed, rate: float, name: str, figure: str) -> list:
    """A figure (or curve) over the seeds that have it."""
    values = [of_seed.get(figure) for _, of_seed in sorted(figures.get((rate, name), {}).items())]
    return [value for value in values if value is not None]


# -- tables ------------------------------------------------------------------------------------------------------------


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes sweep.md and the figures."""
    figures = by_rate(known)
    sections = {
        "Exact score (ceiling 4.75)": diagram_table(figures, "reward", 1, 2),
        "Gives suitable advice, %": diagram_table(figures, "advice", 100, 1),
        "Answers with a wrong fact, %": diagram_table(figures, "wrong", 100, 1),
        "Steps until half of the samples give the advice": half_table(figures, LABELS, rates_of(figures)),
        "Score less PPO's": differences(figures, LABELS, rates_of(figures), "ppo"),
        "All experiments": all_experiments(figures),
        "Take-off": takeoff_table(figures),
        "Better editors": rewrites_table(figures),
        "Values that RL never sees": held_out_table(figures),
        "Further questions": questions_table(figures),
        "Sanity checks, by R": check_table(figures),
    }
    write_page(f"{folder}/sweep.md", "Rarity against the loss on edits", NOTE, sections)
    if figures:
        draw_diagram(figures, folder)
        draw_curves(figures, folder)
        draw_takeoff(figures, folder)


def rates_of(figures: BySeed) -> list[float]:
    return [rate for rate in RATES if (rate, "checks") in figures]


def diagram_table(figures: BySeed, figure: str, factor: float, digits: int) -> str:
    """A row per method, a column per rate, headed by what is measured in the SFT policy."""
    rates = rates_of(figures)
    header = [""]
    for rate in rates:
        header.append(f"{percent(values_of(figures, rate, 'checks', 'advice'), 3)} % (R = {rate:g})")
    rows = []
    for name, label in LABELS.items():
        values = [values_of(figures, rate, name, figure) for rate in rates]
        if any(values):
            rows.append([label, *(spread(of_rate, digits, factor) for of_rate in values)])
    return markdown_table(header, rows)


def half_table(figures: BySeed, labels: dict[str, str], rates: Sequence[float]) -> str:
    """The mean over the seeds that get there, and how many do."""
    rows = []
    for name, label in labels.items():
        cells = []
        for rate in rates:
            cells.append(mean_step_of_half(values_of(figures, rate, name, "curve")))
        if any(cells):
            rows.append([label, *cells])
    return markdown_table(["", *(f"R = {rate:g}" for rate in rates)], rows)


def mean_step_of_half(curves: list[list[float]]) -> str:
    """The mean over the curves that get there, and how many do; "" without curves."""
    steps = [step_of_half(curve) for curve in curves]
    reached = [step for step in steps if step is not None]
    mean = f"{np.mean(reached):.0f} " if reached else ""
    return f"{mean}({len(reached)} of {len(steps)})" if steps else ""


def step_of_half(curve: list[float]) -> int | None:
    """The first step at which half of the samples give the advice; None if there is none."""
    return next((step for step, value in enumerate(curve, 1) if value >= 0.5), None)


def pooled_variance(figures: BySeed, names: Iterable[str], rate: float) -> tuple[float, int]:
    """Variance of a score around the means of its method and its seed, and its degrees of freedom.

    Methods with fewer seeds than PPO are left out. Fewer than two methods or seeds have 0 degrees of freedom.
    """
    seeds = sorted(figures.get((rate, "ppo"), {}))
    of_methods = [figures.get((rate, name), {}) for name in names if name != "sft"]
    scores = np.array([[runs[seed]["reward"] for seed in seeds] for runs in of_methods if set(seeds) <= set(runs)])
    if min(scores.shape) < 2:
        return 0.0, 0
    rest = scores - scores.mean(0) - scores.mean(1, keepdims=True) + scores.mean()
    freedom = (scores.shape[0] - 1) * (scores.shape[1] - 1)
    return float((rest**2).sum() / freedom), freedom


def differences(figures: BySeed, labels: dict[str, str], rates: Sequence[float], reference: str) -> str | None:
    """Scores less those of the reference, paired over seeds. Both p are Holm's, over all comparisons of the table.

    The first is that of the pair alone. Five seeds tell little about its variance, so the second is by
    `pooled_variance`, which takes it to be the same for all methods.
    """
    found = []
    for rate in rates:
        variance, freedom = pooled_variance(figures, labels, rate)
        for name in labels:
            d = difference(figures, (rate, name), (rate, reference), "reward")
            if d and freedom and name not in ("sft", reference):
                error = np.sqrt(2 * variance / d["seeds"])
                d["p_pooled"] = float(2 * stats.t.sf(abs(d["mean"]) / error, freedom)) if error else 1.0
                found.append(([labels[name], f"{rate:g}"], d))
    for key in ("p", "p_pooled"):
        smallest = 0.0
        for rank, (_, d) in enumerate(sorted(found, key=lambda of_pair: of_pair[1][key])):
            smallest = max(smallest, min(1.0, d[key] * (len(found) - rank)))
            d[key] = smallest
    return difference_table(["", "R", "difference of scores"], found, {"p": "p", "p_pooled": "p, variance pooled"})


def all_experiments(figures: BySeed) -> str:
    rows = []
    for rate in RATES:
        for name, label in LABELS.items():
            of_seeds = figures.get((rate, name))
            if of_seeds:
                rows.append(([label, f"{rate:g}", len(of_seeds)], list(of_seeds.values())))
    return figure_table(["", "R", "seeds"], rows, ["reward", *RARE_CONTENT, "generated", "judge_calls"])


def questions_table(figures: BySeed) -> str | None:
    """In brackets: the method that is varied, on the same seeds."""
    names = ["reward", *RARE_CONTENT, "generated", "judge_calls", "update"]
    rows = []
    for rate, name, method, _ in QUESTIONS:
        asked = figures.get((rate, name), {})
        if asked:
            varied = [figures[rate, method][seed] for seed in asked]
            d = difference(figures, (rate, name), (rate, method), "reward")
            interval = f"{d['mean']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})" if d else "-"
            steps = f"{steps_until_half(asked.values())} ({steps_until_half(varied)})"
            cells = [f"{column(asked.values(), figure)} ({column(varied, figure)})" for figure in names]
            rows.append([f"{name} ({method})", f"{rate:g}", len(asked), interval, steps, *cells])
    header = ["experiment (varied)", "R", "seeds", "difference of scores", "steps until half"]
    return markdown_table([*header, *(COLUMNS[figure][0] for figure in names)], rows) if rows else None


def steps_until_half(runs: Iterable[dict]) -> str:
    """The step of half of each seed, as text; "-" where it is not reached."""
    return ", ".join(str(step_of_half(run["curve"]) or "-") for run in runs)


def rewrites_table(figures: BySeed) -> str | None:
    """CPE at R = 0 after SFT with more rewrites: how well the policy edits, how rare the advice still is, and CPE."""
    rows = []
    for number in (0, *REWRITES):
        checks = figures.get((0.0, with_rewrites("checks", number)), {})
        runs = figures.get((0.0, with_rewrites("none", number)), {})
        seeds = sorted(seed for seed in checks if seed in runs and seed < FEW_SEEDS)
        if seeds:
            half = [step_of_half(runs[seed]["curve"]) or f"over {STEPS}" for seed in seeds]
            rows.append(
                [
                    number,
                    len(seeds),
                    percent([checks[seed]["edit_advice"] for seed in seeds]),
                    percent([checks[seed]["advice"] for seed in seeds], 3),
                    spread([runs[seed]["reward"] for seed in seeds]),
                    ", ".join(map(str, half)),
                ]
            )
    header = ["rewrites in SFT", "seeds", "edits carry out advice, %", "samples of SFT with advice, %", "score of CPE"]
    return markdown_table([*header, "steps until half"], rows) if len(rows) > 1 else None


def held_out_table(figures: BySeed) -> str | None:
    """Advice on values that no prompt of RL asks for, beside runs with all prompts."""
    rows = []
    for label, name in (("all values", "none"), ("without the held-out values", "held_out_values"), ("SFT", "sft")):
        of_seeds = figures.get((0.0, name), {})
        seeds = [seed for seed in sorted(of_seeds) if seed in figures.get((0.0, "held_out_values"), {})]
        if seeds:
            cells = [percent([of_seeds[seed][key] for seed in seeds]) for key in ("advice_held_out", "advice_kept")]
            rows.append([label, len(seeds), *cells])
    header = ["prompts of RL", "seeds", "advice on held-out values, %", "on the other values, %"]
    return markdown_table(header, rows) if rows else None


PREDICTORS = {
    "advice in samples, p": lambda p, edits, advice, weight: p,
    "advice in edits": lambda p, edits, advice, weight: edits * advice,
    "p + weight x advice in edits": lambda p, edits, advice, weight: p + edits * advice * weight,
}


def takeoffs(figures: BySeed) -> list[dict]:
    """Each run of the diagram: its predictors, from the first three steps, and the step of half, STEPS + 1 if none."""
    found = []
    for rate in rates_of(figures):
        for name in LABELS:
            for seed, run in figures.get((rate, name), {}).items():
                if "curve" not in run or seed not in figures[rate, "checks"]:
                    continue
                p = figures[rate, "checks"][seed]["advice"]
                start = [mean_of(run[f"curve_{key}"][:3]) if "curve_edits" in run else 0.0 for key in EDIT_CURVES]
                predicted = {label: predict(p, *start) for label, predict in PREDICTORS.items()}
                found.append(dict(rate=rate, name=name, half=step_of_half(run["curve"]) or STEPS + 1, **predicted))
    return found


def mean_of(values: list) -> float:
    """0 where all are None: no step had such a token."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else 0.0


def takeoff_table(figures: BySeed) -> str | None:
    """How well what is known after three steps orders the runs by the step of half: over all rates, and within each."""
    runs = takeoffs(figures)
    parts = {"all": runs, f"R < {RATES[0]:g}": [run for run in runs if run["rate"] < RATES[0]]}
    parts |= {f"R = {rate:g}": [run for run in runs if run["rate"] == rate] for rate in RATES}
    parts = {name: part for name, part in parts.items() if len({run["half"] for run in part}) >= 3}
    rows = []
    for name, part in parts.items():
        halves = [run["half"] for run in part]
        correlations = [stats.spearmanr([-run[label] for run in part], halves).statistic for label in PREDICTORS]
        rows.append([name, len(part), *(f"{x:.2f}" if np.isfinite(x) else "-" for x in correlations)])
    return markdown_table(["rank correlation with an early half", "runs", *PREDICTORS], rows) if rows else None


def check_table(figures: BySeed) -> str:
    """The sanity checks' figures by R."""
    rates = rates_of(figures)
    checks = {rate: list(figures[rate, "checks"].values()) for rate in rates}
    names = sorted({name for seeds in checks.values() for of_seed in seeds for name in of_seed} - {"missed", "nearly"})
    rows = [[f"{rate:g}", *(spread([s.get(n) for s in checks[rate]], 4) for n in names)] for rate in rates]
    return markdown_table(["R", *names], rows)


# -- figures -----------------------------------------------------------------------------------------------------------


def draw_diagram(figures: BySeed, folder: str) -> None:
    """Score and advice against the rate in samples of the SFT policy; labels on the lines, other losses in grey.

    A line joins the rates with FEW_SEEDS or more. Rates on fewer seeds are hollow points.
    """
    rates = rates_of(figures)
    x_of = {rate: max(1e-5, float(np.mean(values_of(figures, rate, "checks", "advice")))) for rate in rates}
    figure, axes = new_figure(2)
    panels = {"reward": ("exact score", 1), "advice": ("gives suitable advice, %", 100)}
    for axis, (quantity, (title, factor)) in zip(axes, panels.items()):
        ends = {}
        for name in sorted(METHODS, key=lambda name: name in SHOWN):  # grey lines lie below
            known = sorted((rate for rate in rates if values_of(figures, rate, name, quantity)), key=x_of.__getitem__)
            if not known:
                continue
            color = SHOWN.get(name, GREY)
            enough = min(FEW_SEEDS, max(len(figures[rate, name]) for rate in known))
            few = [rate for rate in known if len(figures[rate, name]) < enough]
            means = [factor * np.mean(values_of(figures, rate, name, quantity)) for rate in few]
            axis.plot([x_of[rate] for rate in few], means, "o", ms=4, mfc="white", color=color)
            known = [rate for rate in known if rate not in few]
            xs = [x_of[rate] for rate in known]
            ys = [factor * np.array(values_of(figures, rate, name, quantity)) for rate in known]
            axis.plot(xs, [y.mean() for y in ys], marker=".", color=color, lw=2 if name in SHOWN else 1)
            if name in SHOWN:
                axis.fill_between(xs, [y.min() for y in ys], [y.max() for y in ys], color=color, alpha=0.12, lw=0)
            ends[name] = ys[-1].mean()
        axis.set(xscale="log", xlabel="samples of SFT with the advice", ylabel=title)
        label_lines(axis, ends, max(x_of.values()))
    save_figure(figure, folder, "sweep")


def label_lines(axis: Axes, ends: dict[str, float], x: float) -> None:
    """Names to the right of the lines' ends at x, moved apart where they would overlap."""
    low, high = axis.get_ylim()
    gap = 0.045 * (high - low)
    names = sorted(ends, key=ends.__getitem__)
    places: list[float] = []
    for name in names:
        places.append(max(ends[name], places[-1] + gap if places else low))
    highest = high - gap
    for i in reversed(range(len(places))):
        places[i] = min(places[i], highest)
        highest = places[i] - gap
    for name, place in zip(names, places):
        axis.text(1.6 * x, place, name, color=SHOWN.get(name, GREY), fontsize=7, va="center")
    axis.set_xlim(right=8 * x)


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


def draw_takeoff(figures: BySeed, folder: str) -> None:
    """The step of half against the weighted advice of the first steps; runs that never get there lie at the top."""
    figure, axes = new_figure(2)
    for axis, label in zip(axes, ("advice in samples, p", "p + weight x advice in edits")):
        for name in LABELS:
            runs = [run for run in takeoffs(figures) if run["name"] == name]
            if runs:
                xs = [max(1e-5, run[label]) for run in runs]
                axis.plot(xs, [run["half"] for run in runs], "o", ms=4, color=SHOWN.get(name, GREY), label=name)
        axis.set(xscale="log", xlabel=label, ylabel=f"step of half ({STEPS + 1}: none)")
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "takeoff")
