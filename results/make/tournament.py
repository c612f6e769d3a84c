"""Ways to learn from a critique, on one engine, with one judge: the methods of docs/tournament.md.

They start from SFT policies made as the sweep's are (results/make/sweep.py), and its PPO and CPE are among them. All
have the sweep's learning rate; at R = 0 three seeds also have twice that. These runs were made on another
processor than the sweep's, which rounds differently. Figures and commands are kept in tournament.json.
"""

import numpy as np

from recipes import fork
from results.make import ladder, sweep
from results.make.draw import GREY, RARE_CONTENT, figure_table, markdown_table, new_figure, save_figure, write_page
from results.make.experiments import FLAGS, Experiment
from results.make.figures import training_cost
from runtime.digests import digest_of
from runtime.rows import read_rows

LR = sweep.LR
DPO_LR = 1e-4
SFT_LR = 3e-4  # that of FLAGS["sft"]
RATES = (0.0, 0.3, 0.003)  # the last one on the first FEW seeds, as twice the learning rate at R = 0
FEW = sweep.FEW_SEEDS
LONG = 200  # steps
NO_EDITS = sweep.PLAIN
EDITS = sweep.EDITS
SUCCESSES = "--n-samples 6 --success-reward 4"
METHODS = {  # name: (fork, or None for ppo_cpe.py, and flags)
    **{name: (None, sweep.METHODS[name]) for name in ("ppo", "none")},
    "grpo": ("grpo", NO_EDITS),
    "grpo_edits": ("grpo", f"{EDITS} --edit-loss none"),
    "raft": ("raft", NO_EDITS),
    "raft_edits": ("raft", EDITS),
    "rltf_sd": ("rltf_sd", EDITS),
    "rltf_fm": ("rltf_fm", NO_EDITS),
    "rltf_fm_edits": ("rltf_fm", f"{EDITS} --edit-loss none"),
    "critique_grpo": ("critique_grpo", "--n-samples 5 --edit-rate 0.2 --eps-low 1 --eps-high 1e9"),
    "golf": ("golf", f"{EDITS} --inject-below 4 --edit-loss luffy"),
    "hinted": ("hinted", f"{EDITS} --n-samples 5 --edit-rate 0.4 --hint-steps {ladder.STEPS}"),
    "sdpo": ("sdpo", SUCCESSES),
    "sdpo_edit": ("sdpo", f"{SUCCESSES} --teacher-prompt edit"),
    "srpo": ("srpo", f"{SUCCESSES} --teacher-prompt edit"),
    "released_paper": ("released_paper", ""),
    "ppo_kl": ("kl", f"{NO_EDITS} --kl-beta 0.02"),
    "none_kl": ("kl", f"{EDITS} --edit-loss none --kl-beta 0.02"),
    "ppo_kl_strong": ("kl", f"{NO_EDITS} --kl-beta 0.1"),
    "none_kl_strong": ("kl", f"{EDITS} --edit-loss none --kl-beta 0.1"),
    "ppo_entropy": ("entropy", f"{NO_EDITS} --entropy-bonus 0.01"),
    "ppo_n24": (None, f"{NO_EDITS} --n-samples 24 --prompts-per-step 4 --mini-batch-prompts 2"),
    "ppo_t13": (None, f"{NO_EDITS} --temperature 1.3"),
    "ppo_200": (None, f"{NO_EDITS} --max-steps {LONG}"),
}
QUICK = ("grpo", "raft_edits")
KL = ("ppo_kl", "none_kl", "ppo_kl_strong", "none_kl_strong")
LEFT_OUT = {  # exploration is a question where samples lack the content, over-optimisation where they have it
    0.3: ("ppo_n24", "ppo_t13", "ppo_200", "ppo_entropy", "sdpo", "sdpo_edit", "srpo", "rltf_fm"),
    0.003: ("ppo_t13", "ppo_200", "rltf_fm", "rltf_fm_edits", "sdpo", "sdpo_edit", *KL),
    0.0: ("ppo_kl_strong", "none_kl_strong"),
}
TRAINED_ON_ROLLOUTS = {  # name: (script, rows of recipes/edit_pairs.py), from rollouts of the SFT policy
    "sft_best_original": ("sft.py", "best_original"),
    "sft_best": ("sft.py", "best"),
    "sft_edits": ("sft.py", "gained"),
    "dpo_edits": ("dpo.py", "gained"),
}
LABELS = {
    "sft": "SFT",
    "ppo": "PPO, n = 6",
    "none": "CPE, none",
    "grpo": "GRPO, no edits",
    "grpo_edits": "GRPO, edits with none",
    "raft": "RAFT, no edits",
    "raft_edits": "RAFT, with edits",
    "rltf_sd": "RLTF-SD",
    "rltf_fm": "RLTF-FM",
    "rltf_fm_edits": "RLTF-FM, with edits",
    "critique_grpo": "Critique-GRPO",
    "golf": "GOLF",
    "hinted": "hints that fade",
    "sdpo": "SDPO",
    "sdpo_edit": "SDPO, teacher reads the edit prompt",
    "srpo": "SRPO, teacher reads the edit prompt",
    "released_paper": "the paper as released, all edits",
    "ppo_kl": "PPO, KL .02",
    "none_kl": "CPE, none, KL .02",
    "ppo_kl_strong": "PPO, KL .1",
    "none_kl_strong": "CPE, none, KL .1",
    "ppo_entropy": "PPO, entropy bonus .01",
    "ppo_n24": "PPO, n = 24",
    "ppo_t13": "PPO, temperature 1.3",
    "ppo_200": f"PPO, {LONG} steps",
    "sft_best_original": "SFT on the best of six, no edits",
    "sft_best": "SFT on the best, with edits",
    "sft_edits": "SFT on edits that gained",
    "dpo_edits": "DPO on edits that gained",
}
SECTIONS = {  # by fork: where docs/ has its code; None: without a fork
    "grpo": "forking.md#grpo-instead-of-the-critic",
    "raft": "tournament.md#raft",
    "rltf_sd": "tournament.md#rltf-sd",
    "rltf_fm": "tournament.md#rltf-fm",
    "critique_grpo": "tournament.md#critique-grpo",
    "golf": "tournament.md#golf",
    "hinted": "tournament.md#hints-that-fade",
    "sdpo": "tournament.md#sdpo",
    "srpo": "tournament.md#srpo",
    "released_paper": "tournament.md#the-paper-as-released",
    "kl": "tournament.md#a-kl-term",
    "entropy": "tournament.md#an-entropy-bonus",
    None: "tournament.md#ppo-that-explores",
}
NOTE = (
    "Made by `python results/make/tables.py tournament`. Each name leads to the method's code and its paper. Exact "
    "judge, unseen people's questions, mean ± standard deviation over seeds. For SFT and DPO on rollouts, responses, "
    "tokens and judge calls are those of the rollouts. Seconds are those of two runs side by side, and depend on what "
    "else the machine did. CPE's other losses are in results/sweep/sweep.md."
)

# -- what is trained ---------------------------------------------------------------------------------------------------


def experiments(out: str, seeds: int, quick: bool = False) -> list[Experiment]:
    """All methods at one rate, a seed before the next; at R = 0, then with twice the learning rate; at the next rate.

    quick: one seed and rate, two methods.
    """
    diffs = fork.all_diffs()
    names = [METHODS[name][0] for name in (QUICK if quick else METHODS)]
    wanted = [
        Experiment(
            f"forks/{name}",
            [f"recipes/fork.py {name} --folder {out}/forks/{name}"],
            made_from=digest_of(*diffs_of(name, diffs)),
            always=True,
        )
        for name in sorted(set(filter(None, names)))
    ]
    if quick:
        recipe = ladder.recipe(out, 0, until_checks=True)
        return [*wanted, recipe, *sweep.start_of(out, 0, 0.0), *(train(out, 0, 0.0, name) for name in QUICK)]
    few = range(min(seeds, FEW))
    for rate in RATES:
        for seed in few if rate == RATES[-1] else range(seeds):
            wanted += [ladder.recipe(out, seed)] if rate == RATES[0] else []
            wanted += sweep.start_of(out, seed, rate)
            wanted += [train(out, seed, rate, name) for name in METHODS if name not in LEFT_OUT[rate]]
            wanted += from_rollouts(out, seed, rate)
        for seed in few if rate == 0 else ():
            left_out = ("ppo_200", *LEFT_OUT[rate])
            wanted += [train(out, seed, rate, name, 2) for name in METHODS if name not in left_out]
            wanted += from_rollouts(out, seed, rate, 2)
    return wanted


def diffs_of(name: str, diffs: dict[str, str]) -> list[str]:
    """The diff of a fork, and those that it is applied to."""
    base = fork.base_of(diffs[name])
    return [diffs[name], *(diffs_of(base, diffs) if base in diffs else [])]


def train(out: str, seed: int, rate: float, name: str, times: int = 1) -> Experiment:
    """One run of RL and its evaluation. times: the learning rate, in units of the sweep's."""
    name_of_fork, flags = METHODS[name]
    script = f"{out}/forks/{name_of_fork}/{name_of_fork}.py" if name_of_fork else "ppo_cpe.py"
    faster = f" --lr {times * LR:g}" if times > 1 else ""
    suffix = f"_{times}lr" if times > 1 else ""
    experiment = sweep.train(out, seed, rate, f"{name}{suffix}", f"{flags}{faster}", script=script)
    experiment.needs += [f"forks/{name_of_fork}"] if name_of_fork else []
    return experiment


def from_rollouts(out: str, seed: int, rate: float, times: int = 1) -> list[Experiment]:
    """SFT and DPO on what the judge likes best in rollouts of the SFT policy: those of GRPO before its first update.

    times: their learning rate, in units of the usual one; other than 1: without the rollouts, which are there.
    """
    place = f"seed{seed}/rate{rate:g}"
    wanted = []
    for name, flags in (("rollouts", EDITS), ("rollouts_plain", NO_EDITS)) if times == 1 else ():
        frozen = f"{flags} --critic-warmup-steps {ladder.STEPS}"
        rollouts = sweep.train(out, seed, rate, name, frozen, script=f"{out}/forks/grpo/grpo.py")
        rollouts.commands[-1] = f"recipes/edit_pairs.py {out}/{place}/{name} --out {out}/{place}/{name}/pairs"
        rollouts.needs.append("forks/grpo")
        wanted.append(rollouts)
    for name, (script, rows) in TRAINED_ON_ROLLOUTS.items():
        source = source_of(name)
        lr = DPO_LR if script == "dpo.py" else SFT_LR
        folder = f"{place}/{name}" if times == 1 else f"{place}/{name}_{times}lr"
        command = (
            f"{script} --model {out}/{place}/sft/policy --data {out}/{place}/{source}/pairs/{rows}.jsonl "
            f"--out {out}/{folder} {FLAGS['sft']} --epochs 4 --seed {seed} --lr {times * lr:g}"
        )
        commands = [command, sweep.evaluation(out, seed, f"{out}/{folder}")]
        wanted.append(Experiment(folder, commands, [f"{place}/{source}"]))
    return wanted


def source_of(name: str) -> str:
    """The rollouts that SFT or DPO on rollouts learns from."""
    return "rollouts_plain" if TRAINED_ON_ROLLOUTS[name][1] == "best_original" else "rollouts"


# -- tournament.json ---------------------------------------------------------------------------------------------------


def is_kept(name: str) -> bool:
    parts = sweep.parts_of(name)
    return parts is not None and parts[2] not in ("checks", "rollouts", "rollouts_plain")


def figures_of(out: str, name: str) -> dict:
    """The figures of an experiment, for tournament.json."""
    figures = sweep.figures_of(out, name)
    place, _, method = name.rpartition("/")
    method = method.removesuffix("_2lr")
    if method in TRAINED_ON_ROLLOUTS:
        of_rollouts = training_cost(read_rows(f"{out}/{place}/{source_of(method)}/metrics.jsonl", "metrics"))
        figures |= {name: of_rollouts[name] for name in ("trained", "generated", "judge_calls")}  # what its rows cost
    return figures


# -- the table and the figure ------------------------------------------------------------------------------------------


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes tournament.md and the figure."""
    runs = sweep.by_rate(known)
    rates = sorted(rate for rate in RATES if runs.get((rate, "ppo")))
    sections: dict[str, str | None] = {f"R = {rate:g}": table_of(runs, rate) for rate in rates}
    sections["Steps until half of the samples give the advice"] = sweep.half_table(runs, LABELS, rates)
    sections["Tokens until then, in millions, R = 0"] = tokens_table(runs)
    sections["Score less PPO's"] = sweep.differences(runs, LABELS, rates, "ppo")
    sections["Score less CPE's, none"] = sweep.differences(runs, LABELS, rates, "none")
    sections["Two learning rates, R = 0"] = faster_table(runs)
    better = at_better_rate(runs)
    sections["Score less CPE's, each at its better learning rate"] = sweep.differences(better, LABELS, [0.0], "none")
    write_page(f"{folder}/tournament.md", "Ways to learn from a critique", NOTE, sections)
    draw(runs, rates, folder)


COLUMNS = ("reward", *RARE_CONTENT, "trained", "generated", "judge_calls", "seconds")


def linked(name: str) -> str:
    """The label of a method, which leads to its code."""
    if name == "sft":
        return LABELS[name]
    if name in ("ppo", "none"):
        place = "method.md#21-losses-on-edits---edit-loss-and-which-to-take"
    elif name in TRAINED_ON_ROLLOUTS:
        place = "tournament.md#sft-and-dpo-on-edits"
    else:
        place = SECTIONS[METHODS[name][0]]
    return f"[{LABELS[name]}](../../docs/{place})"


def table_of(runs: sweep.BySeed, rate: float) -> str:
    named = [(name, runs.get((rate, name), {})) for name in LABELS]
    rows = [([linked(name), len(seeds)], list(seeds.values())) for name, seeds in named if seeds]
    return figure_table(["", "seeds"], rows, COLUMNS)


def tokens_table(runs: sweep.BySeed) -> str | None:
    """Generated tokens until half of the samples give the advice, for each seed; "-" where that is never so."""
    rows = []
    for name, label in LABELS.items():
        cells = []
        for _, run in sorted(runs.get((0.0, name), {}).items()):
            if "curve_generated" in run:
                half = sweep.step_of_half(run["curve"])
                cells.append(f"{sum(run['curve_generated'][:half]) / 1e6:.2f}" if half else "-")
        if cells:
            rows.append([label, ", ".join(cells)])
    return markdown_table(["", "tokens of each seed"], rows) if rows else None


def at_both_rates(runs: sweep.BySeed, name: str) -> tuple[dict[int, dict], dict[int, dict]]:
    """A method's runs at R = 0 by seed, at the sweep's learning rate and at twice that, on the seeds that have both."""
    usual = runs.get((0.0, name), {})
    faster = runs.get((0.0, f"{name}_2lr"), {})
    seeds = sorted(set(usual) & set(faster))
    return {seed: usual[seed] for seed in seeds}, {seed: faster[seed] for seed in seeds}


def faster_table(runs: sweep.BySeed) -> str | None:
    """Each method at both learning rates, on the same seeds."""
    rows = []
    for name, label in LABELS.items():
        for times, of_seeds in enumerate(at_both_rates(runs, name), 1):
            if of_seeds:
                curves = [run["curve"] for run in of_seeds.values() if "curve" in run]
                learned = sweep.mean_step_of_half(curves)
                rows.append(([label, f"x {times}", len(of_seeds), learned], list(of_seeds.values())))
    header = ["", "learning rate", "seeds", "step of half"]
    return figure_table(header, rows, ["reward", *RARE_CONTENT]) if rows else None


def at_better_rate(runs: sweep.BySeed) -> sweep.BySeed:
    """The runs at R = 0 of each method that has both learning rates, at the one with the higher mean score."""
    better = {}
    for name in LABELS:
        both = at_both_rates(runs, name)
        if both[0]:
            better[0.0, name] = max(both, key=lambda of: float(np.mean([run["reward"] for run in of.values()])))
    return better


def draw(runs: sweep.BySeed, rates: list[float], folder: str) -> None:
    """A panel per rate: a row per method, best first at R = 0, with a dot per seed and a line at PPO's mean."""
    names = [name for name in LABELS if any(runs.get((rate, name)) for rate in rates)]
    names.sort(key=lambda name: np.mean(sweep.values_of(runs, 0.0, name, "reward") or [-5]))
    figure, axes = new_figure(len(rates))
    figure.set_size_inches(3 + 3 * len(rates), 0.24 * len(names) + 1.2)
    for axis, rate in zip(axes, rates):
        for y, name in enumerate(names):
            xs = sweep.values_of(runs, rate, name, "reward")
            axis.plot(xs, [y] * len(xs), "o", ms=4, color=sweep.SHOWN.get(name, GREY))
        axis.axvline(np.mean(sweep.values_of(runs, rate, "ppo", "reward")), color=sweep.SHOWN["ppo"], lw=0.8, ls=":")
        axis.set_ylim(-0.7, len(names) - 0.3)
        axis.set_yticks(range(len(names)), [LABELS[name] for name in names] if axis is axes[0] else [])
        axis.set(xlabel="exact score", title=f"R = {rate:g}")
        axis.grid(axis="y", color="#eeeeee")
    save_figure(figure, folder, "tournament")
