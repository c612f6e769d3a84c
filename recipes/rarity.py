"""When do edits pay? How rare the content is that critiques name, against the method and its loss on edits.

    bash recipes/tables.sh --rarity              # this file: all cells, 3 seeds; at most five hours on two CPU cores
    bash recipes/tables.sh --rarity --quick      # three methods at three rates, one seed, half the steps
    bash recipes/tables.sh --rarity --search     # the learning rates, on another seed and the dev prompts
    bash recipes/tables.sh --rarity --only-draw  # tables and figures of the finished cells, no run

One base model, whose corpus has a topic's last step and the advice only in critiques and in what follows them, never in
a plain answer. Each rate R then has its own SFT, on chosen answers of a world with `--rarity R R`, so that all that
differs between two rates is the policy that RL starts from; judge and prompts are the same. Steps and advice are the
two strata, reported apart: they are paid and learned differently (a last step is worth two points of helpfulness and
is the same words for everybody; advice depends on the person and is worth less).

Figures use the rate that is *measured* in samples of the SFT policy (recipes/gates.py), not R: SFT on chosen answers
raises it. What is reported is the rate at which the final policy says the content with no critique in its context, and
the exact judge's score, on unseen people's questions. Learning rates are chosen per method, with equal effort, on a
seed that no table reports. A cell's folder is OUT/seedN/rateR/NAME; its figures go into RESULTS/rarity.json. A cell
that is finished there or in OUT is not run again, so that runs can be spread over days and machines; with another
`--results` all of them are run anew.
"""

import itertools
import json
import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Container, Iterable
from dataclasses import dataclass

import numpy as np

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from recipes import cells, draw
from recipes.cells import FLAGS, Cell
from recipes.rates import rates
from runtime import flags
from runtime.rows import read_rows, step_files, write_text


@dataclass
class Args:
    out: str = "out/rarity"
    """Folder of all runs; a quick run uses OUT_quick."""
    results: str | None = None
    """Folder of rarity.json, tables and figures; None: results/rarity, or OUT/results for a quick run."""
    quick: bool = False
    """One seed, half the RL steps, fewer cells."""
    search: bool = False
    """Run the search for learning rates instead: seed 100, the dev prompts."""
    seeds: int = 3
    """Seeds of every cell."""
    jobs: int = 2
    """Cells that run at the same time; they share the cores equally."""
    only_draw: bool = False
    """Run nothing; make tables and figures from the finished cells."""


RATES = (0.3, 0.03, 0.003, 0.0003, 0.0)
RARE, STEPS, QUICK_STEPS = 0.003, 30, 15  # where all learning rates are searched, and questions asked
PLAIN = FLAGS["ppo"]  # no edits, n = 6
METHODS = {  # name: (label, flags of ppo_cpe.py)
    "ppo": ("PPO, n = 6", PLAIN),
    "paper": ("CPE, paper", "--edit-ratio paper"),
    "unclipped": ("CPE, unclipped", "--edit-ratio unclipped"),
    "tis": ("CPE, tis", "--edit-ratio tis"),
    "luffy": ("CPE, luffy", "--edit-ratio luffy"),
    "topr": ("CPE, topr", "--edit-ratio topr"),
    "none": ("CPE, none", "--edit-ratio none"),
    "none_original": ("CPE, none, baseline original", "--edit-ratio none --edit-baseline original"),
    "sdpo": ("SDPO, n = 6, no edits", "--edit-ratio sdpo --n-samples 6"),
}
COLORS = dict(
    zip(METHODS, ("#2f6db3", "#8a6bbf", "#2e8b57", "#7fb069", "#c9a227", "#d2762b", "#b5442e", "#7a2233", draw.GREY))
)
LRS, SEARCH_SEED = (2e-5, 5e-5, 1e-4), 100
# All of LRS are tried at the rate RARE, each method's two best there at two other rates.
TRIED = {RARE: dict.fromkeys(METHODS, LRS)}
TRIED |= dict.fromkeys((0.3, 0.0), dict.fromkeys(METHODS, (5e-5, 1e-4)) | dict(sdpo=(2e-5, 5e-5)))
# The best of them by the exact score on dev prompts (results/rarity/search.md)
LR = {
    0.3: dict.fromkeys(METHODS, 5e-5),
    RARE: dict.fromkeys(METHODS, 5e-5) | dict(ppo=1e-4, unclipped=1e-4, none_original=1e-4, sdpo=2e-5),
    0.0: dict.fromkeys(METHODS, 5e-5) | dict(none=1e-4, none_original=1e-4),
}
SEARCHED_AT = {0.3: 0.3, 0.03: 0.3, 0.003: RARE, 0.0003: RARE, 0.0: 0.0}  # whose learning rates each of RATES has
CHOSEN = "none"  # the loss of the questions below: the surest where samples lack what is named (docs/results.md)
# What the diagram says of R = 0, once more on seeds that chose nothing
CONFIRM_SEEDS, CONFIRMED = (101, 102, 103), ("ppo", "unclipped", "none")
CRITICS = ("exact", "kind", "vague", "silent", "wrong10", "wrong30", "wrong50")
CRITIC_RATES, SAMPLED_RATES = (RARE, 0.0), (0.03, RARE)  # where questions are asked: of critics; of what samples hold
EDIT_BELOW = 4.7
QUICK = ("ppo", "paper", CHOSEN)


def lr_of(rate: float, name: str) -> float:
    return LR[SEARCHED_AT[rate]][name]


def questions() -> dict[tuple[float, str], tuple[str, str]]:
    """{(rate, name of the cell): (method whose learning rate it has, further flags)} of what is not in the diagram."""
    found = {}
    for rate in RATES:  # edits cost generated tokens: PPO with as many of them
        found[rate, "ppo_tokens"] = ("ppo", f"{PLAIN} --max-steps {round(STEPS * 1.4)}")
    for rate in CRITIC_RATES:
        for name in CRITICS:
            found[rate, f"critic_{name}"] = (CHOSEN, f"{METHODS[CHOSEN][1]} --judge recipes/critics.py:{name}")
    for rate in SAMPLED_RATES:
        for name in ("ppo", CHOSEN):
            found[rate, f"{name}_top_p"] = (name, f"{METHODS[name][1]} --top-p 0.9")
        found[rate, "edit_below"] = (CHOSEN, f"{METHODS[CHOSEN][1]} --edit-below {EDIT_BELOW:g}")
    return found


# -- cells -------------------------------------------------------------------------------------------------------------


def preparation(out: str, seed: int, wanted: tuple[float, ...]) -> list[Cell]:
    """The world and base, one seed's GRM, and per rate its world, SFT policy and measured rate."""
    world, here = f"{out}/world", f"{out}/seed{seed}"
    base = f"sft.py --from-scratch {world}/tokenizer --data {world}/base_corpus.jsonl --out {out}/base {FLAGS['base']}"
    grm = f"--model {out}/base/policy --data {world}/judgements.jsonl --out {here}/grm {FLAGS['grm']} --seed {seed}"
    found = [
        Cell("world", [f"data/persona_world.py --out {world} --rarity 0 0"]),
        Cell("base", [base], ["world"], alone=True),
        Cell(f"seed{seed}/grm", [f"train_grm.py {grm}"], ["base"]),
    ]
    for rate in wanted:
        pairs, run = f"{out}/rate{rate:g}", f"{here}/rate{rate:g}"
        few = "--base-rows 100 --judgements 1 --train-prompts 1 --eval-prompts 1 --eval-pairs 1 --vocab-size 300"
        sft = f"--model {out}/base/policy --data {pairs}/pairs.jsonl --out {run}/sft {FLAGS['sft']} --seed {seed}"
        gates = f"--world {world} --policy {run}/sft/policy --grm {here}/grm/model --out {run}/gates --samples 12"
        found += [
            Cell(f"rate{rate:g}", [f"data/persona_world.py --out {pairs} --rarity {rate:g} {rate:g} {few}"]),
            Cell(
                f"seed{seed}/rate{rate:g}/sft",
                [f"sft.py {sft}", cells.evaluation(out, f"{run}/sft", seed)],
                ["base", f"rate{rate:g}"],
            ),
            Cell(
                f"seed{seed}/rate{rate:g}/gates",
                [f"recipes/gates.py {gates} --tolerant"],
                [f"seed{seed}/grm", f"seed{seed}/rate{rate:g}/sft"],
            ),
        ]
    return found


def rl_cell(out: str, seed: int, rate: float, name: str, lr: float, further: str, steps: int, split="eval") -> Cell:
    """One run of ppo_cpe.py and its evaluation. further: flags that override those before them."""
    world, here = f"{out}/world", f"{out}/seed{seed}/rate{rate:g}"
    train = (
        f"ppo_cpe.py --model {here}/sft/policy --prompts {world}/prompts_train.jsonl "
        f"--judge {out}/seed{seed}/grm/model --out {here}/{name} {FLAGS['rl']} --max-steps {steps} "
        f"--seed {seed} --lr {lr:g} {further}"
    )
    evaluation = cells.evaluation(out, f"{here}/{name}", seed, f"prompts_{split}")
    return Cell(f"seed{seed}/rate{rate:g}/{name}", [train, evaluation], [f"seed{seed}/rate{rate:g}/gates"])


def cells_of(args: Args, out: str) -> list[Cell]:
    """Every cell to run, the whole diagram of a seed before the next one's; the further questions come last."""
    out, found = shlex.quote(out), {}

    def add(new: list[Cell]):
        found.update((cell.name, cell) for cell in new)

    if args.search:
        add(preparation(out, SEARCH_SEED, tuple(TRIED)))
        for rate, lrs in TRIED.items():
            for name in METHODS:
                for lr in lrs[name]:
                    cell = f"{name}_lr{lr:g}"
                    add([rl_cell(out, SEARCH_SEED, rate, cell, lr, METHODS[name][1], STEPS, "dev")])
        return list(found.values())
    wanted, steps = ((0.3, RARE, 0.0), QUICK_STEPS) if args.quick else (RATES, STEPS)
    diagram = [(seed, wanted, QUICK if args.quick else METHODS) for seed in range(1 if args.quick else args.seeds)]
    confirmation = [(seed, (0.0,), CONFIRMED) for seed in (() if args.quick else CONFIRM_SEEDS)]
    for seed, some_rates, names in diagram + confirmation:
        add(preparation(out, seed, some_rates))
        for rate in sorted(some_rates, key=lambda rate: rate != RARE):
            for name in names:
                add([rl_cell(out, seed, rate, name, lr_of(rate, name), METHODS[name][1], steps)])
    for seed in range(0 if args.quick else args.seeds):
        for (rate, name), (like, further) in questions().items():
            add([rl_cell(out, seed, rate, name, lr_of(rate, like), further, steps)])
    return list(found.values())


# -- tables and figures ------------------------------------------------------------------------------------------------

LEDGER = {"ratio": "r = p / q", "weight": "weight on grad log p", "clipfrac": "without gradient, share"}
Found = dict[tuple[float, str], dict[int, draw.Quantities]]  # by rate and cell, then seed
Gates = dict[float, dict[int, dict]]  # by rate and seed


def figures_of(run: str) -> dict:
    """What is kept of one finished cell, the gates' or a trained model's; rewards as the exact judge gives them."""
    if os.path.exists(f"{run}/gates.json"):
        return draw.read_json(f"{run}/gates.json")
    sampled = [rates(read_rows(path, "object"))["advice"] for _, path in step_files(run, "rollouts")]
    found = draw.evaluated(run) | rates(read_rows(f"{run}/eval/answers_model.jsonl", "object")) | {"curve": sampled}
    return found | (edit_curves(run) if os.path.isdir(f"{run}/rollouts") else {})


def edit_curves(run: str) -> dict[str, list[float | None]]:
    """{"branch_ratio", "followed_ratio", ...}: step by step, what the loss did with the tokens that an edit inserted:
    its branches (p < .1), and apart the others, which follow from them. None at a step without such tokens; empty for
    a run without edits."""
    curves = defaultdict(list)
    for step in read_rows(f"{run}/metrics.jsonl", "metrics"):
        branches = step.get("edit/branch", 0)  # shares of the edits' tokens
        others = 1 - step.get("edit/kept", 1) - branches
        for quantity in LEDGER:
            branch, inserted = (step.get(f"edit/{kind}_{quantity}") for kind in ("branch", "inserted"))
            followed = None
            if others > 1e-6:
                followed = ((branches + others) * inserted - branches * (branch or 0)) / others
            for kind, value in (("branch", branch), ("followed", followed)):
                curves[f"{kind}_{quantity}"].append(None if value is None else float(f"{value:.4g}"))
    return {name: values for name, values in curves.items() if any(value is not None for value in values)}


def parts_of(cell: str) -> tuple[int, float, str] | None:
    """-> seed, rate, name; None for a cell of no rate (world, base, a seed's GRM)."""
    found = re.fullmatch(r"seed(\d+)/rate([^/]+)/(\w[^/]*)", cell)
    return (int(found[1]), float(found[2]), found[3]) if found else None


def read_results(folder: str, commands: dict[str, list[str]]) -> dict[str, dict]:
    """{cell: its commands and figures} of rarity.json. ValueError: a cell has other commands now."""
    path = f"{folder}/rarity.json"
    known = draw.read_json(path) if os.path.exists(path) else {}
    for cell, found in known.items():
        if cell in commands and commands[cell] != found["commands"]:
            raise ValueError(f"{path}: {cell} was run with other commands; give another --results, or take it out")
    return known


def missing(wanted: list[Cell], known: dict[str, dict]) -> list[Cell]:
    """The cells without figures, and what they stand on."""
    cells, needed = {cell.name: cell for cell in wanted}, set()

    def need(name: str):
        if name not in needed:
            needed.add(name)
            for other in cells[name].needs:
                need(other)

    for cell in wanted:
        if parts_of(cell.name) and cell.name not in known:
            need(cell.name)
    return [cell for cell in wanted if cell.name in needed]


def by_rate(known: dict[str, dict], seeds: Container[int]) -> tuple[Found, Gates]:
    """-> figures of the trained cells of these seeds, and the gates'."""
    found, gates = defaultdict(dict), defaultdict(dict)
    for cell, kept in known.items():
        seed, rate, name = parts_of(cell)
        if seed in seeds:
            to = gates[rate] if name == "gates" else found[rate, name]
            to[seed] = {key: value for key, value in kept.items() if key != "commands"}
    return found, gates


def percent(values, digits=1) -> str:
    return draw.spread([None if v is None else 100 * v for v in values], digits)


def of(found: Found, rate: float, name: str, quantity: str) -> list[float]:
    values = [numbers.get(quantity) for _, numbers in sorted(found.get((rate, name), {}).items())]
    return [v for v in values if v is not None]


LABELS = {
    "sft": "SFT",
    **{name: label for name, (label, _) in METHODS.items()},
    "ppo_tokens": "PPO, as many generated tokens",
}


def diagram_table(found: Found, quantity: str, measured: dict[float, list[float]], text, common=None) -> str:
    """A row per method, a column per rate. common: values of a further column, by method."""
    shown = [rate for rate in RATES if rate in measured]
    header = ["", *(f"{percent(measured[rate], 2)} %" for rate in shown)]
    header += ["common (results/tables.md)"] if common else []
    rows = []
    for name, label in LABELS.items():
        row = [text(of(found, rate, name, quantity)) for rate in shown]
        if set(row) != {"-"}:
            rows.append([label, *row, *([text(common.get(name, []))] if common else [])])
    return draw.markdown_table(header, rows)


def common_scores() -> dict[str, list[float]]:
    """By method the scores of recipes/cells.py over its seeds: another base model, in whose world samples have the last
    step and the advice in 8 to 15 % of cases."""
    cells = draw.read_json(os.path.join(os.path.dirname(HERE), "results/results.json"))["cells"]
    names = {"sft": "sft", "ppo": "ppo_grm", "none_original": draw.loss_cell("none", "original"), "sdpo": "loss_sdpo"}
    names |= {ratio: draw.loss_cell(ratio, "batch") for ratio in draw.RATIOS}
    return {name: [seed["reward"] for seed in cells[cell].values()] for name, cell in names.items()}


Labels = dict[tuple[float, str], str]  # by rate and cell


def difference_table(found: Found, labels: Labels, compared: Iterable[tuple[float, str, str]]) -> str | None:
    """compared: rate, cell, other. Scores paired over seeds, 95 % interval by Student's t; None without two seeds."""
    rows = []
    for rate, name, other in compared:
        numbers = {cell: seeds for (r, cell), seeds in found.items() if r == rate}
        d = draw.difference(numbers, name, other, "reward")
        if d:
            label = f"{labels[rate, name]} less {labels[rate, other]}"
            rows.append([label, f"{rate:g}", *draw.with_interval(d), d["seeds"]])
    header = ("", "R", "difference of scores", "95 % interval over seeds", "seeds")
    return draw.markdown_table(header, rows) if rows else None


def question_table(found: Found, labels: Labels, compared: Iterable[tuple[float, str, str]] = ()) -> str:
    """A row per cell, then the differences that are asked for."""
    rows = []
    for (rate, name), label in labels.items():
        if found.get((rate, name)):
            row = [label, f"{rate:g}", len(found[rate, name]), draw.spread(of(found, rate, name, "reward"))]
            row += [percent(of(found, rate, name, key)) for key in ("last_step", "advice", "advice_right", "wrong")]
            row += [draw.spread(of(found, rate, name, key), 0) for key in ("generated", "judge_calls")]
            rows.append(row)
    header = ("", "R", "seeds", "score", "last step, %", "advice, %", "advice right, %", "wrong fact, %")
    table = draw.markdown_table([*header, "generated tokens", "judge calls"], rows)
    differences = difference_table(found, labels, compared)
    return table + (f"\n\n{differences}" if differences else "")


def branch_table(found: Found) -> str:
    rows = []
    for rate in RATES:
        for name, (label, _) in METHODS.items():
            if of(found, rate, name, "edit/branch"):
                row = [label, f"{rate:g}", percent(of(found, rate, name, "edit/branch"))]
                for kind in ("branch", "inserted"):
                    row += [draw.spread(of(found, rate, name, f"edit/{kind}_weight"), 3)]
                    row += [percent(of(found, rate, name, f"edit/{kind}_clipfrac"))]
                rows.append(row)
    header = ("", "R", "branches, % of edit tokens", "weight on a branch", "without gradient, %")
    return draw.markdown_table([*header, "weight on inserted", "without gradient, %"], rows)


def diagram_figure(found: Found, measured: dict[float, list[float]], samples: int, folder: str) -> None:
    """Final rates and score against the rate at the start; a line per method with its range over seeds.

    measured: by R, how often samples of SFT give the advice, over seeds. The last step has no axis of its own: however
    rare it is in the corpus, SFT says it in 1 % of its answers.
    """
    panels = {
        "last_step": ("says the last step, %", 100, (0, 100)),
        "advice": ("gives suitable advice, %", 100, (0, 100)),
        "reward": ("exact score", 1, (1, 4.75)),  # SDPO leaves the panel where it fails: the table has it
    }
    figure, axes = draw.new_figure(len(panels))
    floor = 1e-5  # a rate of zero has no logarithm: it stands at the left edge
    at = {rate: max(floor, float(np.mean(values))) for rate, values in measured.items() if rate in RATES}
    for axis, (quantity, (title, scale, limits)) in zip(axes, panels.items()):
        for name, (label, _) in METHODS.items():
            known = sorted((rate for rate in at if of(found, rate, name, quantity)), key=at.get)
            if known:
                ys = [scale * np.array(of(found, rate, name, quantity)) for rate in known]
                xs = [at[rate] for rate in known]
                axis.plot(xs, [v.mean() for v in ys], marker=".", color=COLORS[name], label=label)
                axis.fill_between(xs, [v.min() for v in ys], [v.max() for v in ys], color=COLORS[name], alpha=0.1, lw=0)
        axis.axvline(1 / samples, color="black", lw=0.5, ls=":")
        axis.text(1 / samples, limits[0], " N p = 1", fontsize=7, va="bottom")
        axis.set(xscale="log", xlabel="samples of SFT with the advice (measured)", ylabel=title, ylim=limits)
    axes[0].legend(frameon=False, fontsize=7)
    draw.save_figure(figure, folder, "rarity")


def curve_figure(found: Found, folder: str) -> None:
    """What is sampled in training, step by step, at three rates: the share with suitable advice."""
    shown = (0.3, RARE, 0.0)
    figure, axes = draw.new_figure(len(shown))
    for axis, rate in zip(axes, shown):
        for name, (label, _) in METHODS.items():
            curves = of(found, rate, name, "curve")
            if curves:
                ys = [100 * np.array(curve) for curve in curves]
                draw.plot_range(axis, ys, COLORS[name], label=label)
        axis.set(xlabel="step", ylabel="samples with suitable advice, %", title=f"R = {rate:g}")
    axes[-1].legend(frameon=False, fontsize=7)
    draw.save_figure(figure, folder, "rarity_curves")


def branch_figure(found: Found, folder: str) -> None:
    """Ratio, weight and share without gradient of edits' branches (lines) and of what follows from them (dotted)."""
    figure, axes = draw.new_figure(len(LEDGER))
    for axis, (quantity, title) in zip(axes, LEDGER.items()):
        for name, (label, _) in METHODS.items():
            for kind, style in (("branch", dict(label=label)), ("followed", dict(ls=":"))):
                curves = of(found, RARE, name, f"{kind}_{quantity}")
                if curves:
                    draw.plot_range(axis, curves, COLORS[name], **style)
        axis.set(xlabel="step", ylabel=title)
        axis.set_title(f"tokens that edits insert, R = {RARE:g}", fontsize=9)
    axes[-1].legend(frameon=False, fontsize=7, loc="center right", title="dotted: no branch", title_fontsize=7)
    draw.save_figure(figure, folder, "rarity_branches")


def write_results(known: dict[str, dict], folder: str) -> None:
    """rarity.md and the figures of the cells in rarity.json into `folder`."""
    found, gates = by_rate(known, range(SEARCH_SEED))  # the diagram's seeds are below the search's
    confirmed, _ = by_rate(known, CONFIRM_SEEDS)
    names = ("last_step", "advice")
    measured = {key: {rate: [g[key] for g in seeds.values()] for rate, seeds in gates.items()} for key in names}
    said = {(rate, name): label for rate in RATES for name, label in LABELS.items()}
    sections = {
        "Exact score (ceiling 4.75)": diagram_table(found, "reward", measured["advice"], draw.spread, common_scores()),
        "Says the topic's last step, %": diagram_table(found, "last_step", measured["last_step"], percent),
        "Gives suitable advice, %": diagram_table(found, "advice", measured["advice"], percent),
    }
    against_ppo = difference_table(found, said, ((r, name, "ppo") for r, name in said if name not in ("sft", "ppo")))
    if against_ppo:
        sections["Score against PPO with n = 6"] = against_ppo
    if confirmed:
        pairs = [(0.0, name, other) for other, name in itertools.combinations(CONFIRMED, 2)]
        sections[f"R = 0 on seeds that chose nothing ({', '.join(map(str, CONFIRM_SEEDS))})"] = question_table(
            confirmed, {(0.0, name): LABELS[name] for name in ("sft", *CONFIRMED)}, pairs
        )
    sections["All cells"] = question_table(found, said)
    asked = {"What the loss did with edits' tokens": branch_table(found)}
    asked["The quality of critiques"] = question_table(
        found,
        {(r, f"critic_{name}"): f"critic: {name}" for r in CRITIC_RATES for name in CRITICS},
        [(r, f"critic_{name}", "critic_exact") for r in CRITIC_RATES for name in CRITICS if name != "exact"],
    )
    top_p = {"": 1, "_top_p": 0.9}
    asked["Top-p"] = question_table(
        found,
        {
            (r, name + cell): f"{METHODS[name][0]}, top-p {p}"
            for r in SAMPLED_RATES
            for name in ("ppo", CHOSEN)
            for cell, p in top_p.items()
        },
        [(r, CHOSEN + cell, "ppo" + cell) for r in SAMPLED_RATES for cell in top_p],
    )
    edited = {CHOSEN: "all edited", "edit_below": f"below {EDIT_BELOW:g}"}
    asked[f"Edits only below a reward of {EDIT_BELOW:g}"] = question_table(
        found,
        {(r, cell): text for r in SAMPLED_RATES for cell, text in edited.items()},
        [(r, "edit_below", CHOSEN) for r in SAMPLED_RATES],
    )
    sections |= {title: table for title, table in asked.items() if table.count("\n") > 1}
    known = sorted({key for seeds in gates.values() for g in seeds.values() for key in g} - {"missed", "nearly"})
    lines = [
        [f"{rate:g}", *(draw.spread([g.get(k) for g in gates[rate].values()], 4) for k in known)]
        for rate in RATES
        if rate in gates
    ]
    sections["Gates, by R"] = draw.markdown_table(["R", *known], lines)
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items())
    note = (
        "Made by `bash recipes/tables.sh --rarity`. Columns of the first three tables: the rate measured in samples of "
        "the SFT policy that RL starts from. Mean ± standard deviation over seeds; sampled at temperature 1 without a "
        "critique in the context, on unseen people's questions, scored by the exact judge. Common: another base model, "
        "in whose world samples of SFT have the last step and the advice in 8 to 15 % of cases; three to five seeds."
    )
    write_text(f"{folder}/rarity.md", f"# Rarity against the loss on edits\n\n{note}\n\n{text}\n")
    if found:
        diagram_figure(found, measured["advice"], samples=6 * 16 * STEPS, folder=folder)
        curve_figure(found, folder)
        branch_figure(found, folder)
    print(f"{text}\n\nwritten: {folder}/ (rarity.md, figures)")


def write_search(known: dict[str, dict], folder: str) -> None:
    """search.md: every learning rate that was tried, each method's best in bold."""
    found, _ = by_rate(known, (SEARCH_SEED,))
    sections = []
    for rate, lrs in TRIED.items():
        rows = []
        for name, (label, _) in METHODS.items():
            scores = {lr: of(found, rate, f"{name}_lr{lr:g}", "reward") for lr in lrs[name]}
            scores = {lr: score for lr, score in scores.items() if score}
            for lr, score in scores.items():
                mark, cell = "**" if lr == max(scores, key=scores.get) else "", (rate, f"{name}_lr{lr:g}")
                shown = [percent(of(found, *cell, key)) for key in ("last_step", "advice", "wrong")]
                rows.append([label, f"{mark}{lr:g}{mark}", draw.spread(score), *shown])
        table = draw.markdown_table(["", "lr", "score", "last step, %", "advice, %", "wrong fact, %"], rows)
        sections.append(f"## R = {rate:g}\n\n{table}")
    text = "\n\n".join(sections)
    note = (
        f"Seed {SEARCH_SEED}, dev prompts, exact score, {STEPS} steps; the same effort for each method: three learning "
        f"rates at R = {RARE:g}, the two better ones of them at two other rates. A cell of the diagram has the best "
        "one (bold) of the nearest R."
    )
    write_text(f"{folder}/search.md", f"# Learning rates\n\n{note}\n\n{text}\n")
    print(f"{text}\n\nwritten: {folder}/search.md")


def main(args: Args) -> None:
    out = f"{args.out}_quick" if args.quick else args.out
    folder = args.results or (f"{out}/results" if args.quick else "results/rarity")
    wanted = cells_of(args, out)
    commands = {cell.name: cell.commands for cell in cells_of(args, "OUT")}
    known = read_results(folder, commands)
    try:
        if not args.only_draw:
            cells.run(missing(wanted, known), out, args.jobs)
    finally:  # a run that is stopped keeps the figures of what it finished
        new = [c.name for c in wanted if parts_of(c.name) and c.name not in known and cells.is_done(out, c)]
        known |= {name: dict(commands=commands[name]) | figures_of(f"{out}/{name}") for name in new}
        lines = [f"{json.dumps(name)}: {json.dumps(kept)}" for name, kept in known.items()]  # a line a cell
        write_text(f"{folder}/rarity.json", "{\n" + ",\n".join(lines) + "\n}\n")
    counted = [name in known for name in commands if parts_of(name)]
    print(f"{sum(counted)} of {len(counted)} cells are finished")
    (write_search if args.search else write_results)(known, folder)


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
