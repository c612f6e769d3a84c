"""A ladder of judges: what must a judge write so that a policy which is trained under it learns no false claims?

The recipe (recipes/tiny.sh) on five seeds, each with its own world and base model, and on three of them further
judges (JUDGES). Each judge is measured against the exact judge, then PPO and, where the judge writes critiques, CPE are
trained under it from the same SFT policy with the flags of the recipe.

Figures and commands of each experiment are kept in ladder.json: what is there is not run again, so that runs can be
spread over days and machines.
"""

from collections import defaultdict

import numpy as np

from data.persona_world import judge as exact_judge
from json_files import read_json
from results.make.draw import (
    GREY,
    difference,
    difference_table,
    figure_table,
    markdown_table,
    new_figure,
    plot_range,
    save_figure,
    spread,
    write_page,
)
from results.make.experiments import FLAGS, Experiment
from results.make.figures import evaluated, exact_curves
from runtime.rows import read_rows, step_files

RECIPE_SEEDS = 5
LADDER_SEEDS = 3
STEPS = 40  # of RL, as in the recipe
LAST_STEPS = 5  # of RL, whose samples show how a judge does late in training
GRM_STEPS = 310  # as in the recipe
REFRESH_STEPS = 78

JUDGES = {  # name: what it writes
    "bt": "a number (Bradley-Terry)",
    "bt_exact": "a number (Bradley-Terry); exact labels",
    "scores": "scores",
    "critique": "critique, scores",
    "checked_scores": "checks, scores",
    "checks": "checks, critique, scores (the recipe's)",
    "refreshed": "critique, scores; trained again on its policies' answers",
    "small": "checks, critique, scores; two layers instead of three",
}
SHORT = {  # in the figure
    "bt": "Bradley-Terry",
    "bt_exact": "Bradley-Terry, unbiased",
    "refreshed": "critique, scores; refreshed",
    "checks": "checks, critique, scores",
    "small": "checks, critique, scores; two layers",
}
OF_RECIPE = {  # judge: {method: run of the recipe}
    "bt": {"ppo": "ppo_bt"},
    "checks": {"ppo": "ppo_grm", "cpe": "cpe"},
}
WITHOUT = {"scores": ("checks", "critique"), "critique": ("checks",), "checked_scores": ("critique",)}
CRITICS = ("critique", "refreshed", "checks", "small")  # the judges that CPE can have
METHODS = {  # as in the recipe
    "ppo": FLAGS["ppo"],
    "cpe": "--edit-loss none --edit-below 4.7",
}
LABELS = {"ppo": "PPO", "cpe": "CPE"}
COLORS = {"ppo": "#2f6db3", "cpe": "#b5442e"}
CURVES_OF = {"ppo_bt": "PPO (BT)", "ppo_grm": "PPO (GRM)", "cpe": "CPE"}  # runs of the recipe
CURVES = {  # figures of each step's samples: (title, factor)
    "tokens": ("tokens of an answer", 1),
    "recites": ("answers that recite the profile, %", 1),
    "wrong": ("answers with a wrong fact, %", 100),
    "advice": ("suitable advice, %", 100),
    "exact": ("exact score; dotted: the run's own reward", 1),
}
SHOWN = ("reward", "wrong", "advice", "last_step", "recites", "n_tokens", "generated", "judge_calls")

NOTE = (
    "Made by `python results/make/tables.py ladder`. Mean ± standard deviation over seeds, each with its own world and "
    "base model. Scores are the exact judge's on 200 questions of unseen people. Last: the last five steps of RL."
)

Figures = dict[str, dict[int, dict]]  # {"checks/cpe": {seed: figures}}


# -- what is trained ---------------------------------------------------------------------------------------------------


def experiments(out: str, quick: bool = False) -> list[Experiment]:
    """The recipe on all seeds, then one judge after the other, each on all seeds of the ladder. quick: one seed."""
    wanted = [recipe(out, seed) for seed in range(1 if quick else RECIPE_SEEDS)]
    for name in JUDGES:
        for seed in range(1 if quick else LADDER_SEEDS):
            wanted += of_judge(out, seed, name)
    return wanted


def recipe(out: str, seed: int, until_checks: bool = False) -> Experiment:
    """The recipe. until_checks: no further than the models that RL starts from."""
    folder = f"{out}/seed{seed}/recipe"
    until = "UNTIL=checks " if until_checks else ""
    return Experiment(f"seed{seed}/recipe", [f"env SEED={seed} OUT={folder} {until}bash recipes/tiny.sh"])


def judge_of(out: str, seed: int, name: str) -> str:
    """The --judge of a rung."""
    here = f"{out}/seed{seed}"
    if name == "bt":
        return f"bt:{here}/recipe/bt/model"
    if name == "bt_exact":
        return f"bt:{here}/bt_exact/grm/model"
    return f"{here}/recipe/grm/model" if name == "checks" else f"{here}/{name}/grm/model"


def of_judge(out: str, seed: int, name: str) -> list[Experiment]:
    """A judge, what is measured of it, and the policies that are trained under it."""
    wanted = []
    needs = [f"seed{seed}/recipe"]
    if name not in OF_RECIPE:
        wanted.append(train_judge(out, seed, name))
        needs = [f"seed{seed}/{name}/grm"]
    measure = (
        f"results/make/agreement.py --world {out}/seed{seed}/recipe/world --judge {judge_of(out, seed, name)} "
        f"--out {out}/seed{seed}/{name}/agreement"
    )
    wanted.append(Experiment(f"seed{seed}/{name}/agreement", [measure], needs))
    if name not in OF_RECIPE:
        methods = METHODS if name in CRITICS else ["ppo"]
        wanted += [train_policy(out, seed, name, method, needs) for method in methods]
    return wanted


def train_judge(out: str, seed: int, name: str) -> Experiment:
    """A GRM on other judgements, from another base model, or trained once more."""
    recipe_folder = f"{out}/seed{seed}/recipe"
    here = f"{out}/seed{seed}/{name}"
    world = f"{recipe_folder}/world"
    rows = f"{here}/judgements.jsonl"
    base = f"{recipe_folder}/base/policy"
    grm_flags = f"{FLAGS['grm']} --max-steps {GRM_STEPS}"
    needs = [f"seed{seed}/recipe"]
    commands = []
    objective = ""
    if name == "bt_exact":
        rows = f"{here}/pairs.jsonl"
        objective = "--objective bt "
        grm_flags = FLAGS["bt"]
        commands.append(f"results/make/judgements.py --world {world} --exact-pairs --out {rows}")
    elif name in WITHOUT:
        commands.append(f"results/make/judgements.py --world {world} --without {' '.join(WITHOUT[name])} --out {rows}")
    elif name == "refreshed":
        before = f"{out}/seed{seed}/critique"
        base = f"{before}/grm/model"
        grm_flags = f"{FLAGS['grm']} --max-steps {REFRESH_STEPS}"
        needs = [f"seed{seed}/critique/ppo", f"seed{seed}/critique/cpe"]
        commands.append(
            f"results/make/judgements.py --world {world} --rollouts {before}/ppo {before}/cpe --without checks "
            f"--out {rows}"
        )
    else:
        rows = f"{world}/judgements.jsonl"
        base = f"{here}/base/policy"
        commands.append(
            f"sft.py --from-scratch {world}/tokenizer --data {world}/base_corpus.jsonl --out {here}/base "
            f"{FLAGS['base']} --layers 2 --seed {seed}"
        )
    commands.append(f"train_grm.py {objective}--model {base} --data {rows} --out {here}/grm {grm_flags} --seed {seed}")
    return Experiment(f"seed{seed}/{name}/grm", commands, needs)


def train_policy(out: str, seed: int, name: str, method: str, needs: list[str]) -> Experiment:
    """PPO or CPE under a judge, with the recipe's flags, and its evaluation."""
    recipe_folder = f"{out}/seed{seed}/recipe"
    run = f"{out}/seed{seed}/{name}/{method}"
    train = (
        f"ppo_cpe.py --model {recipe_folder}/sft/policy --prompts {recipe_folder}/world/prompts_train.jsonl "
        f"{FLAGS['rl']} --lr 5e-5 --max-steps {STEPS} --seed {seed} --judge {judge_of(out, seed, name)} "
        f"{METHODS[method]} --out {run}"
    )
    evaluate = (
        f"evaluate.py --model {run}/policy --baseline {recipe_folder}/sft/policy "
        f"--prompts {recipe_folder}/world/prompts_eval.jsonl --n-prompts 200 {FLAGS['evaluation']} --seed {seed} "
        f"--out {run}/eval"
    )
    return Experiment(f"seed{seed}/{name}/{method}", [train, evaluate], needs)


# -- figures of a finished experiment ----------------------------------------------------------------------------------


def is_kept(name: str) -> bool:
    return not name.endswith("/grm")


def figures_of(out: str, name: str) -> dict:
    """The figures of an experiment, for ladder.json."""
    folder = f"{out}/{name}"
    kind = name.split("/")[-1]
    if kind == "recipe":
        figures = {"checks": read_json(f"{folder}/checks/sanity_checks.json")}
        figures["minutes"] = read_json(f"{folder}/done.json")["seconds"] / 60
        for run in ("base", "sft", *CURVES_OF):
            figures[run] = policy_figures(f"{folder}/{run}", f"{folder}/eval/{run}")
        for run in CURVES_OF:
            figures[run]["curves"] = exact_curves(f"{folder}/{run}")
        return figures
    if kind == "agreement":
        return read_json(f"{folder}/agreement.json")
    return policy_figures(folder, f"{folder}/eval")


def policy_figures(run: str, evaluation: str) -> dict:
    """Figures of a policy; for RL also how its judge does late in training."""
    figures = evaluated(run, evaluation)
    rollouts = [path for _, path in step_files(run, "rollouts")]
    if rollouts:
        rows = [row for path in rollouts[-LAST_STEPS:] for row in read_rows(path, "object")]
        rewards = np.array([[row["reward"], exact_judge(row, row["answer"]).score()] for row in rows])
        if (rewards.std(0) > 0).all():
            figures["late_correlation"] = float(np.corrcoef(rewards.T)[0, 1])
        figures["late_excess"] = float((rewards[:, 0] - rewards[:, 1]).mean())
    return figures


def by_run(known: dict[str, dict]) -> Figures:
    """Figures by judge and method ("checks/cpe", "checks/agreement", "sft") and seed."""
    runs: Figures = defaultdict(dict)
    for name, figures in known.items():
        seed, _, rest = name.partition("/")
        number = int(seed.removeprefix("seed"))
        if rest != "recipe":
            runs[rest][number] = figures
            continue
        runs["recipe"][number] = figures
        for run in ("base", "sft"):
            runs[run][number] = figures[run]
        for judge, methods in OF_RECIPE.items():
            for method, run in methods.items():
                runs[f"{judge}/{method}"][number] = figures[run]
    return runs


# -- tables and the figure ---------------------------------------------------------------------------------------------


def write_tables(known: dict[str, dict], folder: str) -> None:
    """Writes ladder.md and the figure."""
    runs = by_run(known)
    draw(runs, folder)
    draw_hacking(runs, folder)
    sections = {
        "The recipe on five seeds": recipe_table(runs),
        "Differences of scores": differences(runs),
        "Sanity checks": checks_table(runs),
        "Judges against the exact judge": judge_table(runs),
        "Policies trained under them": policy_table(runs),
    }
    write_page(f"{folder}/ladder.md", "A ladder of judges", NOTE, sections)


def first_seeds(figures: dict[int, dict]) -> list[dict]:
    """Figures of the ladder's seeds; the recipe has more."""
    return [figures[seed] for seed in sorted(figures) if seed < LADDER_SEEDS]


def recipe_table(runs: Figures) -> str:
    """A row per policy of the recipe."""
    names = {"sft": "SFT", "bt/ppo": "PPO (BT)", "checks/ppo": "PPO (GRM)", "checks/cpe": "CPE"}
    rows = []
    for name, label in names.items():
        figures = [runs[name][seed] for seed in sorted(runs[name])]
        rows.append(([label, len(figures)], figures))
    return figure_table(["", "seeds"], rows, SHOWN)


COMPARED = {  # label: two runs, on the seeds that both have
    "CPE less PPO": ("checks/cpe", "checks/ppo"),
    "PPO (GRM) less PPO (BT)": ("checks/ppo", "bt/ppo"),
    "PPO: Bradley-Terry, exact labels less biased ones": ("bt_exact/ppo", "bt/ppo"),
    "PPO: checks, critique, scores less scores alone": ("checks/ppo", "scores/ppo"),
    "PPO: checks, critique, scores less critique, scores": ("checks/ppo", "critique/ppo"),
    "CPE: checks, critique, scores less critique, scores": ("checks/cpe", "critique/cpe"),
    "CPE less PPO, critique, scores": ("critique/cpe", "critique/ppo"),
    "CPE: refreshed less not refreshed": ("refreshed/cpe", "critique/cpe"),
    "CPE: two layers less three": ("small/cpe", "checks/cpe"),
}


def differences(runs: Figures) -> str | None:
    rows = []
    for label, (one, other) in COMPARED.items():
        score = difference(runs, one, other, "reward")
        wrong = difference(runs, one, other, "wrong")
        if score and wrong:
            interval = f"{100 * wrong['mean']:+.1f} ({100 * wrong['low']:+.1f} to {100 * wrong['high']:+.1f})"
            rows.append(([label, interval], score))
    return difference_table(["", "wrong facts, % (95 % interval)", "score"], rows)


def checks_table(runs: Figures) -> str:
    """Sanity checks by seed."""
    of_seed = {seed: figures["checks"] for seed, figures in sorted(runs["recipe"].items())}
    names = sorted({name for checks in of_seed.values() for name in checks} - {"missed", "nearly"})
    rows = [[name, *(spread([checks[name]], 3) for checks in of_seed.values())] for name in names]
    return markdown_table(["", *(f"seed {seed}" for seed in of_seed)], rows)


def judge_table(runs: Figures) -> str:
    rows = []
    for name, label in JUDGES.items():
        agreement = first_seeds(runs[f"{name}/agreement"])
        late = first_seeds(runs[f"{name}/ppo"])
        if agreement:
            cells = [spread([figures[key] for figures in agreement], 2) for key in ("own", "other")]
            sees = "-" if name.startswith("bt") else spread([figures["sees_other"] for figures in agreement], 2)
            excess = "-" if name.startswith("bt") else spread([figures["late_excess"] for figures in late], 2)
            cells += [sees, spread([figures.get("late_correlation") for figures in late], 2), excess]
            rows.append([label, len(agreement), *cells])
    header = ["the judge writes", "seeds", "correlation, own profile", "other profile", "sees other profile"]
    return markdown_table([*header, "correlation late in PPO", "reward less exact score, late"], rows)


def policy_table(runs: Figures) -> str:
    rows = []
    for name, label in JUDGES.items():
        for method in METHODS:
            figures = first_seeds(runs[f"{name}/{method}"])
            if figures:
                rows.append(([label, LABELS[method], len(figures)], figures))
    return figure_table(["the judge writes", "method", "seeds"], rows, SHOWN)


def draw(runs: Figures, folder: str) -> None:
    """A row per judge: correlation with the exact score, then score and wrong facts after RL; a dot per seed."""
    figure, axes = new_figure(3)
    figure.set_size_inches(12, 3.6)
    names = list(JUDGES)[::-1]
    for y, name in enumerate(names):
        for shift, key, color, label in ((0.15, "own", GREY, "own profile"), (-0.15, "other", "black", "another's")):
            xs = [figures[key] for figures in first_seeds(runs[f"{name}/agreement"])]
            axes[0].plot(xs, [y + shift] * len(xs), "o", color=color, ms=4, label=label if y == 0 else None)
        for axis, key, factor in ((axes[1], "reward", 1), (axes[2], "wrong", 100)):
            for shift, method in ((0.15, "ppo"), (-0.15, "cpe")):
                xs = [factor * figures[key] for figures in first_seeds(runs[f"{name}/{method}"])]
                shown = LABELS[method] if name == "checks" else None
                axis.plot(xs, [y + shift] * len(xs), "o", color=COLORS[method], ms=4, label=shown)
    sft = first_seeds(runs["sft"])
    for axis, key, factor in ((axes[1], "reward", 1), (axes[2], "wrong", 100)):
        axis.axvline(factor * np.mean([figures[key] for figures in sft]), color=GREY, lw=0.8, ls=":", label="SFT")
        axis.set_yticks(range(len(names)), [])
    axes[0].set_yticks(range(len(names)), [SHORT.get(name, JUDGES[name]) for name in names])
    axes[0].set(xlabel="correlation with the exact score", title="the judge, before RL")
    axes[1].set(xlabel="exact score of the policy", title="after RL")
    axes[2].set(xlabel="answers with a wrong fact, %", title="after RL")
    for axis in axes:
        axis.grid(axis="y", color="#eeeeee")
        axis.legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "ladder")


def draw_hacking(runs: Figures, folder: str) -> None:
    """Samples of the recipe's policies over training: the mean over seeds, and their range as a band."""
    figure, axes = new_figure(len(CURVES))
    figure.set_size_inches(3.5 * len(CURVES), 3.4)
    colors = {"ppo_bt": "#c9a227", "ppo_grm": COLORS["ppo"], "cpe": COLORS["cpe"]}
    of_seeds = [runs["recipe"][seed] for seed in sorted(runs["recipe"])]
    own_scale = axes[-1].twinx()
    for run, label in CURVES_OF.items():
        for axis, (name, (title, factor)) in zip(axes, CURVES.items()):
            curves = [factor * np.array(recipe[run]["curves"][name]) for recipe in of_seeds]
            plot_range(axis, curves, colors[run], label=label)
            axis.set(xlabel="step")
            axis.set_title(title, fontsize=9)
        own = np.mean([recipe[run]["curves"]["own"] for recipe in of_seeds], 0)
        scale = own_scale if run == "ppo_bt" else axes[-1]  # a Bradley-Terry reward has a scale of its own
        scale.plot(range(1, len(own) + 1), own, color=colors[run], ls=":")
    own_scale.set_ylabel("reward of PPO (BT)", fontsize=8, color=colors["ppo_bt"])
    own_scale.tick_params(labelsize=7)
    axes[0].legend(frameon=False, fontsize=7)
    save_figure(figure, folder, "hacking")
