"""Tables and figures from the finished cells of recipes/tables.py: Markdown, results.json, PNG and SVG.

`draw` writes what there is: a cell that is missing leaves a gap, never a number. All scores are the exact judge's on
unseen people's questions, unless a column says otherwise; mean and standard deviation over seeds.
"""

import glob
import json
import os
from collections import defaultdict

import numpy as np
from scipy import stats

from data.persona_world import claims, judge, recites_profile
from evaluation.tables import markdown_row, write_json
from prompts import DIMENSIONS
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
# what the tables compare; recipes/tables.py trains a cell for each
MAIN = tuple(COLORS)
RATES = (0.1, 0.25, 0.5, 0.75, 1.0)
STRATEGIES = ("random", "reward_rank", "conditional", "batch_rank")
RATIOS, BASELINES = ("paper", "unclipped", "tis", "luffy", "none"), ("batch", "original")
# ahead of PPO with the GRM on the seeds of the variants, and so chosen after the fact: on the main cells' further seeds too
FOLLOWED_UP = ("loss_paper_batch", "loss_paper_original", "loss_sdpo")
WEIGHTS = {
    "equal": (0.34, 0.33, 0.33),
    "helpfulness": (0.6, 0.2, 0.2),
    "personalization": (0.2, 0.6, 0.2),
    "naturalness": (0.2, 0.2, 0.6),
}


def grid_cell(strategy, rate):
    """The cell of a strategy at a rate: random at 0.5 is CPE's default; at rate 1 all strategies take every edit."""
    if rate == 1:
        strategy = "random"
    return "cpe" if (strategy, rate) == ("random", 0.5) else f"{strategy}_{rate:g}"


def loss_cell(ratio, baseline):
    return "cpe" if (ratio, baseline) == ("unclipped", "batch") else f"loss_{ratio}_{baseline}"


# -- reading cells -----------------------------------------------------------------------------------------------------


def read_json(path):
    with open(path) as f:
        return json.load(f)


def claims_right(rows):
    """Of what the answers of some rows say of the person, the share that is right, in percent; None: nothing is said."""
    right = [row["persona"].get(attribute) == value for row in rows for attribute, value in claims(row["answer"])]
    return 100 * sum(right) / len(right) if right else None


def evaluated(run):
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
        steps = read_rows(f"{run}/metrics.jsonl", "object")
        for name, key in (("trained", "batch"), ("generated", "generated_tokens"), ("judge_calls", "judge_calls")):
            numbers[name] = sum(step[key] for step in steps)
        for name in (
            "edit/gain",
            "edit/ratio",
            "edit/ratio_low",
            "edit/weight",
            "edit/kept_mass",
            "edit/inserted_mass",
        ):
            known = [step[name] for step in steps if step.get(name) is not None]
            if known:
                numbers[name] = float(np.mean(known))
        kept, inserted = (numbers.get(f"edit/{kind}_mass", 0) for kind in ("kept", "inserted"))
        if inserted:
            numbers["inserted"] = 100 * inserted / (kept + inserted)
    return numbers


def exact_curves(run):
    """{quantity: [steps]} of the originals that were sampled in training, by the exact judge and by that of the run."""
    curves = defaultdict(list)
    steps = read_rows(f"{run}/metrics.jsonl", "object")
    for path, step in zip(sorted(glob.glob(f"{run}/rollouts/step_*.jsonl")), steps, strict=True):
        rows = read_rows(path, "object")
        found = [judge(row["persona"], row["question"], row["answer"]) for row in rows]
        curves["exact"].append(np.mean([j.score() for j in found]))
        for name in DIMENSIONS:
            curves[name].append(np.mean([getattr(j, name) for j in found]))
        curves["own"].append(np.mean([row["reward"] for row in rows]))
        curves["tokens"].append(np.mean([row["n_tokens"] for row in rows]))
        curves["claims"].append(claims_right(rows))
        curves["recites"].append(100 * np.mean([recites_profile(row["persona"], row["answer"]) for row in rows]))
        both = [
            (j.score(), judge(row["persona"], row["question"], row["edit"]["answer"]).score(), row)
            for j, row in zip(found, rows)
            if row.get("edit")
        ]
        if both:
            curves["gain_exact"].append(np.mean([after - before for before, after, _ in both]))
            curves["gain_own"].append(np.mean([row["edit"]["reward"] - row["reward"] for *_, row in both]))
            curves["improved"].append(100 * np.mean([after > before for before, after, _ in both]))
            curves["worse"].append(100 * np.mean([after < before for before, after, _ in both]))
        curves["generated_tokens"].append(step["generated_tokens"])
        curves["judge_calls"].append(step["judge_calls"])
    for name in ("generated_tokens", "judge_calls"):
        curves[name] = np.cumsum(curves[name]) / 1000
    return curves


def held_out_curves(run):
    """The internalisation curve, by the exact judge: {"step", "answer", "edit", "gap"} on prompts that are not trained on."""
    curves = defaultdict(list)
    for path in sorted(glob.glob(f"{run}/held_out/step_*.jsonl")):
        rows = read_rows(path, "object")
        scores = [judge(row["persona"], row["question"], row["answer"]).score() for row in rows]
        edited = [
            (judge(row["persona"], row["question"], row["edit"]["answer"]).score(), before)
            for row, before in zip(rows, scores)
            if row.get("edit")
        ]
        curves["step"].append(int(path[-12:-6]) - 1)  # steps trained before it
        curves["answer"].append(np.mean(scores))
        if edited:
            curves["edit"].append(np.mean([after for after, _ in edited]))
            curves["gap"].append(np.mean([after - before for after, before in edited]))
    return curves


def by_name(finished):
    """["seed0/cpe", ...] -> {"cpe": [0, 1, ...]}"""
    found = defaultdict(list)
    for cell in finished:
        seed, _, name = cell.partition("/")
        if name:
            found[name].append(int(seed.removeprefix("seed")))
    return {name: sorted(seeds) for name, seeds in found.items()}


# -- tables ------------------------------------------------------------------------------------------------------------


def spread(values, digits=2):
    """Mean and standard deviation over seeds, as text."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text


def markdown(header, rows):
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


def method_table(names, numbers, columns):
    """A row a cell: names {cell: label}; numbers {cell: {seed: evaluated(...)}}. Cells that are missing are left out."""
    rows = []
    for name, label in names.items():
        of_seeds = list(numbers.get(name, {}).values())
        if of_seeds:
            rows.append([label, len(of_seeds), *(spread([n.get(c) for n in of_seeds], COLUMNS[c][1]) for c in columns)])
    return markdown(["", "seeds", *(COLUMNS[c][0] for c in columns)], rows)


def grid(numbers, strategies, rates):
    """Strategy x rate: exact score, and the LC win rate below it."""
    rows = []
    for column, label in (("reward", "score"), ("lc", "LC, %")):
        for strategy in strategies:
            cells = []
            for rate in rates:
                of_seeds = numbers.get(grid_cell(strategy, rate), {}).values()
                cells.append(spread([n[column] for n in of_seeds], COLUMNS[column][1]))
            rows.append([f"{strategy}, {label}", *cells])
    return markdown(["", *(f"r_e = {rate:g}" for rate in rates)], rows)


def seed_table(names, numbers, chosen_on):
    """Exact score, a column a seed; the seeds in `chosen_on` had a part in the choice of what is compared."""
    seeds = sorted({s for name in names for s in numbers.get(name, {})})
    rows = []
    for name, label in names.items():
        found = {s: n["reward"] for s, n in numbers.get(name, {}).items()}
        new = [score for s, score in found.items() if s not in chosen_on]
        rows.append(
            [
                label,
                *(f"{found[s]:.2f}" if s in found else "-" for s in seeds),
                spread(new),
                spread(list(found.values())),
            ]
        )
    return markdown(["", *(f"seed {s}" for s in seeds), "seeds that chose nothing", "all"], rows)


def difference(numbers, name, other, column):
    """Paired over seeds: mean, 95 % interval by Student's t, p, seeds. None below two seeds."""
    known = [{s for s, found in numbers.get(cell, {}).items() if column in found} for cell in (name, other)]
    seeds = sorted(known[0] & known[1])
    if len(seeds) < 2:
        return None
    gaps = np.array([numbers[name][s][column] - numbers[other][s][column] for s in seeds])
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    test = stats.ttest_1samp(gaps, 0)
    return dict(
        cells=[name, other],
        column=column,
        mean=float(gaps.mean()),
        low=float(gaps.mean() - half),
        high=float(gaps.mean() + half),
        p=float(test.pvalue),
        seeds=len(gaps),
    )


def difference_table(found):
    rows = [
        [
            " - ".join(METHODS.get(cell, cell) for cell in d["cells"]),
            COLUMNS[d["column"]][0],
            f"{d['mean']:+.2f}",
            f"{d['low']:+.2f} to {d['high']:+.2f}",
            "< 0.001" if d["p"] < 0.001 else f"{d['p']:.3f}",
            d["seeds"],
        ]
        for d in found
    ]
    return markdown(["", "of", "mean", "95 % interval over seeds", "p", "seeds"], rows)


def accuracy_table(out, seeds):
    """Table 6: accuracy of the judges on unseen people's pairs; a tie is wrong, and counted."""
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
    return markdown(["", "easy", "mid", "hard", "all", "ties", "no verdict", "longer answer wins", "pairs"], rows)


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(out, cells, curves, folder):
    """Curves over training of the three RL methods, {cell: [exact_curves]}: mean over seeds and, shaded, their range."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if not curves:
        return

    def plot(axis, names, y, x=None, **style):
        for name in names:
            some = [c[y] for c in curves.get(name, []) if c[y]]
            if some:
                n = min(map(len, some))
                ys = np.array([s[:n] for s in some])
                xs = np.arange(1, n + 1) if x is None else np.mean([c[x][:n] for c in curves[name]], axis=0)
                label = style.get("label") or METHODS[name]
                axis.plot(xs, ys.mean(0), color=style.get("color", COLORS[name]), label=label, ls=style.get("ls", "-"))
                axis.fill_between(xs, ys.min(0), ys.max(0), color=style.get("color", COLORS[name]), alpha=0.15, lw=0)

    def save(figure, name):
        figure.tight_layout()
        for ending in ("png", "svg"):
            figure.savefig(f"{folder}/{name}.{ending}", dpi=110, metadata={"Date": None} if ending == "svg" else None)
        plt.close(figure)

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
        figure, axes = plt.subplots(1, len(wanted), figsize=(4.2 * len(wanted), 3.4))
        for axis, (y, title, x, x_title) in zip(axes, wanted):
            plot(axis, curves, y, x)
            axis.set(xlabel=x_title, ylabel=title)
        axes[0].legend(frameon=False)
        save(figure, file)

    figure, axes = plt.subplots(1, 3, figsize=(12.6, 3.4))  # does the reward mean what it says?
    for axis, name in zip(axes, COLORS):
        plot(axis, [name], "exact", label="exact judge")
        plot(axis, [name], "own", label="reward of the run", color="#777777", ls="--")
        axis.set(xlabel="step", ylabel="score of originals", title=METHODS[name])
        axis.legend(frameon=False)
    save(figure, "reward_against_exact")

    if "cpe" in curves:
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))
        plot(axes[0], ["cpe"], "gain_own", label="by the run's judge", color="#777777", ls="--")
        plot(axes[0], ["cpe"], "gain_exact", label="by the exact judge")
        axes[0].axhline(0, color="black", lw=0.5)
        axes[0].set(xlabel="step", ylabel="edits less originals")
        plot(axes[1], ["cpe"], "improved", label="better")
        plot(axes[1], ["cpe"], "worse", label="worse", color="#b5442e")
        axes[1].set(xlabel="step", ylabel="share of edits, %, exact judge", ylim=(0, 100))
        for axis in axes:
            axis.legend(frameon=False)
        save(figure, "edits")

    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4))  # does the policy come to write what edits supplied?
    for name in ("ppo_grm", "cpe"):
        some = [held_out_curves(f"{out}/seed{s}/{name}") for s in cells.get(name, [])]
        for axis, y, line in ((axes[0], "answer", "-"), (axes[0], "edit", "--"), (axes[1], "gap", "-")):
            ys = np.array([c[y] for c in some if c[y]])
            if len(ys):
                axis.plot(
                    some[0]["step"], ys.mean(0), line, color=COLORS[name], label=f"{METHODS[name]}: {y}", marker="."
                )
                axis.fill_between(some[0]["step"], ys.min(0), ys.max(0), color=COLORS[name], alpha=0.15, lw=0)
    axes[0].set(xlabel="steps trained", ylabel="exact score, held-out prompts")
    axes[1].set(xlabel="steps trained", ylabel="edits less answers")
    axes[1].axhline(0, color="black", lw=0.5)
    axes[0].legend(frameon=False)
    save(figure, "internalisation")

    figure, axes = plt.subplots(1, 3, figsize=(12.6, 3.4))  # the edit ledger
    for name, color in (("cpe", COLORS["cpe"]), ("loss_paper_batch", "#8a6bbf")):
        some = [read_rows(f"{out}/seed{s}/{name}/metrics.jsonl", "object") for s in cells.get(name, [])]
        for axis, what in zip(axes, ("ratio", "mass", "clipfrac")):
            for kind, line in (("kept", "-"), ("inserted", "--")):
                if some:
                    ys = np.array([[step[f"edit/{kind}_{what}"] for step in run] for run in some], dtype=float)
                    label = f"{'unclipped' if name == 'cpe' else 'paper'}, {kind}"
                    axis.plot(np.arange(1, ys.shape[1] + 1), np.nanmean(ys, 0), line, color=color, label=label)
    for axis, title in zip(axes, ("ratio", "|weight x advantage| per token", "share of tokens without gradient")):
        axis.set(xlabel="step", ylabel=title)
    axes[0].legend(frameon=False)
    save(figure, "ledger")


# -- what is written ---------------------------------------------------------------------------------------------------


def draw(out, finished, folder):
    """All tables and figures of the finished cells into `folder`, and onto the terminal."""
    cells = by_name(finished)
    ready = {name: seeds for name, seeds in cells.items() if name not in ("grm", "bt", "gates", "accuracy")}
    numbers = {name: {s: evaluated(f"{out}/seed{s}/{name}") for s in seeds} for name, seeds in ready.items()}
    curves = {name: [exact_curves(f"{out}/seed{s}/{name}") for s in cells[name]] for name in MAIN if cells.get(name)}
    for name, some in curves.items():
        for s, curve in zip(cells[name], some):
            numbers[name][s]["in_training"] = float(np.mean(curve["exact"]))
    if "base" in finished:
        numbers["base"] = {0: evaluated(f"{out}/base")}
    losses = {loss_cell(ratio, baseline): f"{ratio}, {baseline}" for ratio in RATIOS for baseline in BASELINES}
    losses["loss_sdpo"] = "sdpo, n = 6, no edits"
    weights = {"cpe": "0.35, 0.40, 0.25"}
    weights |= {f"weights_{name}": ", ".join(f"{w:.2f}" for w in some) for name, some in WEIGHTS.items()}
    # variants beside one another and CPE: on the seeds of all, of which there are fewer
    seeds = {s for name, of_seeds in numbers.items() if name not in (*METHODS, *FOLLOWED_UP) for s in of_seeds}
    same = {name: {s: found for s, found in of_seeds.items() if s in seeds} for name, of_seeds in numbers.items()}
    further = {s for name in FOLLOWED_UP for s in numbers.get(name, {})} - seeds
    followed = {name: METHODS[name] for name in ("ppo_grm", "cpe")} | {name: losses[name] for name in FOLLOWED_UP}
    pairs = [("cpe", "ppo_grm"), ("cpe", "sft"), ("ppo_grm", "ppo_bt"), ("ppo_bt", "sft")]
    pairs += [(name, "ppo_grm") for name in FOLLOWED_UP]
    pairs += [("cpe", name) for name in losses if name != "cpe"]
    gaps = [
        d for a, b in pairs for column in ("reward", "lc", "in_training") if (d := difference(numbers, a, b, column))
    ]
    gates = [read_json(f"{out}/seed{s}/gates/gates.json") for s in cells.get("gates", [])]
    sections = {
        "Table 1: methods": method_table(
            METHODS, numbers, ["reward", *DIMENSIONS, "win", "lc", "n_tokens", "recites", "claims", "swap"]
        ),
        "Table 2: reward models and edits, with their cost": method_table(
            {name: METHODS[name] for name in MAIN},
            numbers,
            ["reward", "in_training", "lc", "n_tokens", "recites", "trained", "generated", "judge_calls", "minutes"],
        ),
        "Differences": difference_table(gaps) if gaps else None,
        "Table 4: which edits, and how many": grid(same, STRATEGIES, RATES),
        "The loss on edits": method_table(
            losses,
            same,
            [
                "reward",
                "personalization",
                "win",
                "lc",
                "n_tokens",
                "edit/gain",
                "edit/ratio_low",
                "edit/weight",
                "inserted",
                "generated",
                "judge_calls",
            ],
        ),
        "Losses that were ahead of PPO, on further seeds": seed_table(followed, numbers, seeds) if further else None,
        "The weights of the three scores (helpfulness, personalization, naturalness)": method_table(
            weights, same, ["reward", *DIMENSIONS, "n_tokens", "lc"]
        ),
    }
    if cells.get("accuracy"):
        sections["Table 6: accuracy of the judges, % of pairs of unseen people"] = accuracy_table(
            out, cells["accuracy"]
        )
    if gates:
        names = [name for name in gates[0] if name != "missed"]
        sections["Gates"] = markdown(names, [[spread([g[name] for g in gates], 3) for name in names]])
    text = "\n\n".join(f"## {title}\n\n{table}" for title, table in sections.items() if table)
    note = (
        "Scores by the exact judge on unseen people's questions, win rates against fixed reference answers; mean ± standard "
        "deviation over seeds. Score over training: mean over all steps, of what was sampled. Persona swap: the score less the score "
        "under another person's profile."
    )
    write_text(f"{folder}/tables.md", f"# The generated world\n\n{note}\n\n{text}\n")
    write_json(f"{folder}/results.json", dict(cells=numbers, differences=gaps, gates=gates))
    figures(out, cells, curves, folder)
    print(f"{text}\n\nwritten: {folder}/ (tables.md, results.json, figures)")


def search(out, finished, folder, candidates):
    """The search for learning rates, candidates {cell: values}: every value that was tried, the best in bold."""
    done, rows = set(finished), []
    for name, lrs in candidates.items():
        found = {lr: evaluated(f"{out}/seed100/{name}_lr{lr:g}") for lr in lrs if f"seed100/{name}_lr{lr:g}" in done}
        best = max(found, key=lambda lr: found[lr]["reward"], default=None)
        for lr, numbers in found.items():
            mark = "**" if lr == best else ""
            rows.append(
                [METHODS[name], f"{mark}{lr:g}{mark}", *(f"{numbers[c]:.2f}" for c in ("reward", "lc", "n_tokens"))]
            )
    text = "# Learning rates\n\nSeed 100, dev prompts, exact score; the same effort for each method.\n\n" + markdown(
        ["", "lr", "score", "LC win rate, %", "tokens"], rows
    )
    write_text(f"{folder}/search.md", text + "\n")
    print(f"{text}\n\nwritten: {folder}/search.md")
