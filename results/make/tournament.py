"""Ways to learn from a critique, on one engine, with one judge: the methods of docs/tournament.md.

They start from the SFT policies of the sweep (results/make/sweep.py) and are compared with its PPO and CPE. All have
the sweep's learning rate, and on seed 0 also twice that. Figures and commands are kept in tournament.json.
"""

import os

import numpy as np

from json_files import read_json
from recipes import fork
from results.make import ladder, sweep
from results.make.draw import GREY, RARE_CONTENT, figure_table, new_figure, save_figure, write_page
from results.make.experiments import FLAGS, Experiment
from runtime.digests import digest_of

LR = sweep.LR
DPO_LR = 1e-4
SEARCHED = 0  # the seed of twice the learning rate
LONG = 200  # steps
NO_EDITS = sweep.PLAIN
EDITS = sweep.EDITS
METHODS = {  # name: (fork, or None for ppo_cpe.py, and flags)
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
    "sdpo_released": ("sdpo_released", "--n-samples 6 --success-reward 4"),
    "sdpo": ("sdpo", "--n-samples 6"),
    "released_paper": ("released_paper", "--judge-temperature 0.9"),
    "ppo_kl": ("kl", f"{NO_EDITS} --kl-beta 0.02"),
    "none_kl": ("kl", f"{EDITS} --edit-loss none --kl-beta 0.02"),
    "ppo_entropy": ("entropy", f"{NO_EDITS} --entropy-bonus 0.01"),
    "ppo_n24": (None, f"{NO_EDITS} --n-samples 24 --prompts-per-step 4 --mini-batch-prompts 2"),
    "ppo_t13": (None, f"{NO_EDITS} --temperature 1.3"),
    "ppo_200": (None, f"{NO_EDITS} --max-steps {LONG}"),
}
QUICK = ("grpo", "raft_edits")
TRAINED_ON_ROLLOUTS = {  # name: (script, rows of recipes/edit_pairs.py), from rollouts of the SFT policy
    "sft_best_original": ("sft.py", "best_original"),
    "sft_best": ("sft.py", "best"),
    "sft_edits": ("sft.py", "gained"),
    "dpo_edits": ("dpo.py", "gained"),
}
LABELS = {
    "ppo": "PPO, n = 6",
    "none": "CPE, none",
    "paper": "CPE, paper",
    "released": "CPE, released",
    "novel": "CPE, novel",
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
    "sdpo_released": "SDPO",
    "sdpo": "token credit",
    "released_paper": "the paper as released",
    "ppo_kl": "PPO, KL .02",
    "none_kl": "CPE, none, KL .02",
    "ppo_entropy": "PPO, entropy bonus .01",
    "ppo_n24": "PPO, n = 24",
    "ppo_t13": "PPO, temperature 1.3",
    "ppo_200": f"PPO, {LONG} steps",
    "sft_best_original": "SFT on the best of six, no edits",
    "sft_best": "SFT on the best, with edits",
    "sft_edits": "SFT on edits that gained",
    "dpo_edits": "DPO on edits that gained",
}
OF_SWEEP = ("ppo", "none", "paper", "released", "novel")
NOTE = (
    "Made by `python results/make/tables.py tournament`; docs/tournament.md has each method's code. Exact judge, "
    "unseen people's questions, mean ± standard deviation over seeds. PPO and CPE are runs of results/sweep/sweep.md."
)

# -- what is trained ---------------------------------------------------------------------------------------------------


def experiments(out: str, seeds: int, quick: bool = False) -> list[Experiment]:
    """All methods at the main rates of the sweep, a seed before the next; then twice the learning rate on one seed.

    quick: one seed and rate, two methods.
    """
    diffs = fork.all_diffs()
    names = [METHODS[name][0] for name in (QUICK if quick else METHODS)]
    wanted = [
        Experiment(
            f"forks/{name}",
            [f"recipes/fork.py {name} --folder {out}/forks"],
            made_from=digest_of(fork.code_of(name, diffs)),
        )
        for name in sorted(set(filter(None, names)))
    ]
    if quick:
        recipe = ladder.recipe(out, 0, until_checks=True)
        return [*wanted, recipe, *sweep.start_of(out, 0, 0.0), *(train(out, 0, 0.0, name) for name in QUICK)]
    for seed in range(seeds):
        wanted.append(ladder.recipe(out, seed))
        for rate in sweep.MAIN_RATES:
            wanted += sweep.start_of(out, seed, rate)
            wanted += [train(out, seed, rate, name) for name in METHODS]
            wanted += from_rollouts(out, seed, rate)
    for rate in sweep.ENDS:
        wanted += [train(out, SEARCHED, rate, name, 2) for name in METHODS]
    return wanted


def train(out: str, seed: int, rate: float, name: str, times: int = 1) -> Experiment:
    """One run of RL and its evaluation. times: the learning rate, in units of the sweep's."""
    name_of_fork, flags = METHODS[name]
    script = f"{out}/forks/{name_of_fork}.py" if name_of_fork else "ppo_cpe.py"
    faster = f" --lr {times * LR:g}" if times > 1 else ""
    suffix = f"_{times}lr" if times > 1 else ""
    experiment = sweep.train(out, seed, rate, f"{name}{suffix}", f"{flags}{faster}", script=script)
    experiment.needs += [f"forks/{name_of_fork}"] if name_of_fork else []
    return experiment


def from_rollouts(out: str, seed: int, rate: float) -> list[Experiment]:
    """SFT and DPO on what the judge likes best in rollouts of the SFT policy, by runs that train only their critic."""
    place = f"seed{seed}/rate{rate:g}"
    wanted = []
    for name, flags in (("rollouts", EDITS), ("rollouts_plain", NO_EDITS)):
        frozen = f"{flags} --critic-warmup-steps {ladder.STEPS}"
        rollouts = sweep.train(out, seed, rate, name, frozen)
        rollouts.commands[-1] = f"recipes/edit_pairs.py {out}/{place}/{name} --out {out}/{place}/{name}/pairs"
        wanted.append(rollouts)
    for name, (script, rows) in TRAINED_ON_ROLLOUTS.items():
        source = "rollouts_plain" if rows == "best_original" else "rollouts"
        run = f"{out}/{place}/{name}"
        command = (
            f"{script} --model {out}/{place}/sft/policy --data {out}/{place}/{source}/pairs/{rows}.jsonl --out {run} "
            f"{FLAGS['sft']} --epochs 4 --seed {seed}" + (f" --lr {DPO_LR:g}" if script == "dpo.py" else "")
        )
        wanted.append(Experiment(f"{place}/{name}", [command, sweep.evaluation(out, seed, run)], [f"{place}/{source}"]))
    return wanted


# -- tournament.json ---------------------------------------------------------------------------------------------------


def is_kept(name: str) -> bool:
    parts = sweep.parts_of(name)
    return parts is not None and parts[2] not in ("sft", "checks", "rollouts", "rollouts_plain")


figures_of = sweep.figures_of


# -- the table and the figure ------------------------------------------------------------------------------------------


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes tournament.md and the figure, with the sweep's PPO and CPE where sweep.json has them."""
    path = f"{folder}/../sweep/sweep.json"
    of_sweep = read_json(path) if os.path.exists(path) else {}
    runs = sweep.by_rate(known)
    runs |= {key: seeds for key, seeds in sweep.by_rate(of_sweep).items() if key[1] in OF_SWEEP}
    sections: dict[str, str | None] = {}
    for rate in sweep.MAIN_RATES:
        sections[f"R = {rate:g}"] = table_of(runs, rate)
    sections["Steps until half of the samples give the advice"] = sweep.half_table(runs, LABELS, sweep.MAIN_RATES)
    sections["Score less PPO's"] = sweep.differences_from_ppo(runs, LABELS, sweep.MAIN_RATES)
    sections[f"Twice the learning rate, seed {SEARCHED}"] = faster_table(runs)
    write_page(f"{folder}/tournament.md", "Ways to learn from a critique", NOTE, sections)
    draw(runs, folder)


COLUMNS = ("reward", *RARE_CONTENT, "trained", "generated", "judge_calls", "seconds")


def table_of(runs: sweep.BySeed, rate: float) -> str:
    named = [(label, runs.get((rate, name), {})) for name, label in LABELS.items()]
    rows = [([label, len(seeds)], list(seeds.values())) for label, seeds in named if seeds]
    return figure_table(["", "seeds"], rows, COLUMNS)


def faster_table(runs: sweep.BySeed) -> str | None:
    """Each method at both learning rates, on the same seed."""
    rows = []
    for rate in sweep.ENDS:
        for name in METHODS:
            faster = runs.get((rate, f"{name}_2lr"), {}).get(SEARCHED)
            usual = runs.get((rate, name), {}).get(SEARCHED)
            if faster and usual:
                rows += [([LABELS[name], f"{rate:g}", f"{lr:g}"], [run]) for lr, run in ((LR, usual), (2 * LR, faster))]
    return figure_table(["", "R", "lr"], rows, ["reward", *RARE_CONTENT]) if rows else None


def draw(runs: sweep.BySeed, folder: str) -> None:
    """A panel per rate: a row per method, best first at R = 0, with a dot per seed and a line at PPO's mean."""
    names = [name for name in LABELS if any(runs.get((rate, name)) for rate in sweep.MAIN_RATES)]
    names.sort(key=lambda name: np.mean(sweep.values_of(runs, 0.0, name, "reward") or [-5]))
    figure, axes = new_figure(len(sweep.MAIN_RATES))
    figure.set_size_inches(12, 0.24 * len(names) + 1.2)
    for axis, rate in zip(axes, sweep.MAIN_RATES):
        for y, name in enumerate(names):
            xs = sweep.values_of(runs, rate, name, "reward")
            axis.plot(xs, [y] * len(xs), "o", ms=4, color=sweep.SHOWN.get(name, GREY))
        ppo = sweep.values_of(runs, rate, "ppo", "reward")
        if ppo:
            axis.axvline(np.mean(ppo), color=sweep.SHOWN["ppo"], lw=0.8, ls=":")
        axis.set_yticks(range(len(names)), [LABELS[name] for name in names] if axis is axes[0] else [])
        axis.set(xlabel="exact score", title=f"R = {rate:g}")
        axis.grid(axis="y", color="#eeeeee")
    save_figure(figure, folder, "tournament")
