"""Experiments in the generated world: their commands, and a runner.

An experiment is one folder under OUT, made by a few commands: a base model, an SFT policy, a run of RL with its
evaluation. `done.json` in the folder has the commands and the seconds, and OUT/NAME.log has the output. An experiment
whose commands have changed since it ran is an error, so that two settings are never mixed.

The tables say which policies they train (`Training`); `experiments_of` adds what these need. All of them start from one
base model, as the paper starts from one public model. Each seed has its own GRM, Bradley-Terry model and SFT policy.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field

from tqdm import tqdm

from json_files import read_json
from runtime.rows import write_text

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
EXACT_JUDGE = "data/persona_world.py:judge"
RL_STEPS = 30
# Worlds that only serve for their preference pairs
PAIRS_ONLY = "--base-rows 100 --judgements 1 --train-prompts 1 --eval-prompts 1 --eval-pairs 1 --vocab-size 300"


@dataclass
class Experiment:
    name: str  # its folder under OUT
    commands: list[str]  # for the shell, without `python`, or with `env` in front
    needs: list[str] = field(default_factory=list)  # names of other experiments
    alone: bool = False  # runs by itself, on all cores


@dataclass
class Training:
    """A policy trained by ppo_cpe.py or dpo.py, from the SFT policy of its seed (and rate)."""

    seed: int
    name: str
    lr: float
    flags: str = ""  # further flags; they override those before them
    steps: int = RL_STEPS
    script: str = "ppo_cpe.py"
    judge: str = "grm"  # or bt
    rate: float | None = None  # of rare content in the SFT policy's data; None: the world's default
    split: str = "eval"  # prompts of its evaluation: eval or dev
    tracked: bool = False  # evaluated during training too, and under other personas


# -- commands ----------------------------------------------------------------------------------------------------------


def world_flags() -> dict[str, str]:
    """{"base": "--epochs 2 ...", ...}: the arrays of recipes/world_flags.sh."""
    with open(os.path.join(ROOT, "recipes/world_flags.sh")) as f:
        arrays = re.findall(r"^([A-Z]+)_FLAGS=\((.*?)\)$", f.read(), re.MULTILINE | re.DOTALL)
    return {stage.lower(): " ".join(words.split()) for stage, words in arrays}


FLAGS = world_flags()

# Below, `out` is quoted for the shell already, so that the folder may have a space in its name.


def evaluation(out: str, run: str, seed: int, split: str = "eval") -> str:
    """Answers to unseen people's questions, scored by the exact judge and compared with the fixed references."""
    return (
        f"evaluate.py --model {run}/policy --baseline reference --prompts {out}/world/prompts_{split}.jsonl "
        f"{FLAGS['evaluation']} --n-prompts 0 --seed {seed} --bootstrap-draws 100 --out {run}/eval"
    )


def persona_swap(out: str, run: str, seed: int) -> str:
    """The answers of `evaluation`, judged under their own and under another person's profile."""
    return (
        f"evaluate.py --task persona-swap --answers {run}/eval/answers_model.jsonl "
        f"--prompts {out}/world/prompts_eval.jsonl --judge {EXACT_JUDGE} --n-prompts 0 --seed {seed} --out {run}/swap"
    )


def shared_models(out: str, seed: int, rate: float | None) -> list[Experiment]:
    """World and base model, and one seed's GRM and BT."""
    world = f"{out}/world"
    here = f"{out}/seed{seed}"
    rarity = "" if rate is None else " --rarity 0 0"
    train_base = (
        f"sft.py --from-scratch {world}/tokenizer --data {world}/base_corpus.jsonl --out {out}/base {FLAGS['base']}"
    )
    train_grm = (
        f"train_grm.py --model {out}/base/policy --data {world}/judgements.jsonl --out {here}/grm {FLAGS['grm']} "
        f"--seed {seed}"
    )
    train_bt = (
        f"train_grm.py --objective bt --model {out}/base/policy --data {world}/pairs.jsonl --out {here}/bt "
        f"{FLAGS['bt']} --seed {seed}"
    )
    base_commands = [train_base, evaluation(out, f"{out}/base", 0)] if rate is None else [train_base]
    experiments = [
        Experiment("world", [f"data/persona_world.py --out {world}{rarity}"]),
        Experiment("base", base_commands, ["world"], alone=True),
        Experiment(f"seed{seed}/grm", [train_grm], ["base"]),
    ]
    if rate is None:
        experiments.append(Experiment(f"seed{seed}/bt", [train_bt], ["base"]))
        experiments.append(judge_accuracy(out, seed))
    return experiments


def judge_accuracy(out: str, seed: int) -> Experiment:
    """How often GRM and BT order unseen pairs as they are labelled, and as the exact judge does."""
    here = f"{out}/seed{seed}"
    commands = []
    for name, judge in (("grm", f"{here}/grm/model"), ("bt", f"bt:{here}/bt/model")):
        for pairs in ("pairs_eval", "pairs_eval_exact"):
            commands.append(
                f"evaluate.py --task reward-accuracy --prompts {out}/world/{pairs}.jsonl --judge {judge} --n-prompts 0 "
                f"--judge-max-new-tokens 96 --out {here}/accuracy/{name}_{pairs}"
            )
    return Experiment(f"seed{seed}/accuracy", commands, [f"seed{seed}/grm", f"seed{seed}/bt"])


def sft_policy(out: str, seed: int, rate: float | None) -> list[Experiment]:
    """The SFT policy of a seed (and rate) with its evaluation, and the sanity checks of it and the GRM."""
    name = f"seed{seed}" if rate is None else f"seed{seed}/rate{rate:g}"
    here = f"{out}/{name}"
    experiments = []
    pairs = "world"
    check_flags = ""
    more_commands = [persona_swap(out, f"{here}/sft", seed)]
    if rate is not None:
        pairs = f"rate{rate:g}"
        check_flags = " --samples 12 --tolerant"
        more_commands = []
        write_pairs = f"data/persona_world.py --out {out}/{pairs} --rarity {rate:g} {rate:g} {PAIRS_ONLY}"
        experiments.append(Experiment(pairs, [write_pairs]))
    train = (
        f"sft.py --model {out}/base/policy --data {out}/{pairs}/pairs.jsonl --out {here}/sft {FLAGS['sft']} "
        f"--seed {seed}"
    )
    checks = (
        f"recipes/sanity_checks.py --world {out}/world --policy {here}/sft/policy --grm {out}/seed{seed}/grm/model "
        f"--out {here}/checks{check_flags}"
    )
    sft_commands = [train, evaluation(out, f"{here}/sft", seed), *more_commands]
    experiments.append(Experiment(f"{name}/sft", sft_commands, ["base", pairs]))
    experiments.append(Experiment(f"{name}/checks", [checks], [f"seed{seed}/grm", f"{name}/sft"]))
    return experiments


def trained_policy(out: str, training: Training) -> Experiment:
    """One run of dpo.py or ppo_cpe.py, and its evaluation."""
    seed = training.seed
    world = f"{out}/world"
    place = f"seed{seed}" if training.rate is None else f"seed{seed}/rate{training.rate:g}"
    run = f"{out}/{place}/{training.name}"
    needs = [f"{place}/checks"]
    if training.script == "dpo.py":
        train = (
            f"dpo.py --model {out}/{place}/sft/policy --data {world}/pairs.jsonl --out {run} {FLAGS['dpo']} "
            f"--lr {training.lr:g} --seed {seed}"
        )
    else:
        judge = f"{out}/seed{seed}/grm/model"
        if training.judge == "bt":
            judge = f"bt:{out}/seed{seed}/bt/model"
            needs.append(f"seed{seed}/bt")
        train = (
            f"ppo_cpe.py --model {out}/{place}/sft/policy --prompts {world}/prompts_train.jsonl --judge {judge} "
            f"--out {run} {FLAGS['rl']} --max-steps {training.steps} --seed {seed} --lr {training.lr:g} "
            f"{training.flags}"
        ).strip()
    commands = [train, evaluation(out, run, seed, training.split)]
    if training.tracked:  # what the figures over training need, and a batch for replays
        commands[0] += f" --eval-data {world}/prompts_dev.jsonl --eval-every 7 --eval-n 48"
        commands[0] += f" --save-batch {training.steps // 2}"
        commands.append(persona_swap(out, run, seed))
    return Experiment(f"{place}/{training.name}", commands, needs)


def experiments_of(trainings: Iterable[Training], out: str) -> list[Experiment]:
    """The trainings and all that they need, each once, in an order in which they can run."""
    out = shlex.quote(out)
    experiments = {}
    for training in trainings:
        needed = shared_models(out, training.seed, training.rate) + sft_policy(out, training.seed, training.rate)
        for experiment in [*needed, trained_policy(out, training)]:
            experiments[experiment.name] = experiment
    return list(experiments.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def is_done(out: str, experiment: Experiment) -> bool:
    """Whether an experiment is finished. ValueError: it was run with other commands."""
    folder = f"{out}/{experiment.name}"
    path = f"{folder}/done.json"
    if not os.path.exists(path):
        return False
    with open(path) as f:
        commands = json.load(f)["commands"]
    if commands != experiment.commands:
        raise ValueError(f"{path}: it was run with other commands; remove the folder {folder} or give another --out")
    return True


def with_python(command: str) -> str:
    """Runs a script with this interpreter; any other command as it is."""
    return command if command.startswith("env ") else f"{shlex.quote(sys.executable)} {command}"


def start(experiment: Experiment, out: str, threads: int) -> subprocess.Popen:
    """Starts the commands, one after the other, in a process group of their own."""
    environment = dict(os.environ)
    if not experiment.alone:
        environment["OMP_NUM_THREADS"] = str(threads)
    os.makedirs(f"{out}/{experiment.name}", exist_ok=True)
    commands = " && ".join(map(with_python, experiment.commands))
    with open(f"{out}/{experiment.name}.log", "w") as log:
        return subprocess.Popen(
            ["bash", "-c", commands], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def finish(experiment: Experiment, out: str, returncode: int, seconds: float) -> None:
    """Writes done.json. ValueError: the commands failed."""
    if returncode:
        with open(f"{out}/{experiment.name}.log") as f:
            lines = f.read().replace("\r", "\n").splitlines()
        tail = "\n".join(lines[-8:])
        raise ValueError(f"{experiment.name} failed ({out}/{experiment.name}.log):\n{tail}")
    done = {"commands": experiment.commands, "seconds": round(seconds, 1)}
    write_text(f"{out}/{experiment.name}/done.json", json.dumps(done, indent=2))


def run(experiments: list[Experiment], out: str, jobs: int) -> None:
    """Runs the experiments that are not done, `jobs` at a time; they share the cores equally.

    ValueError: one failed. Those that were running beside it are stopped.
    """
    waiting = {e.name: e for e in experiments if not is_done(out, e)}
    running: dict[str, tuple[Experiment, subprocess.Popen, float]] = {}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    def can_start(experiment: Experiment) -> bool:
        if any(need in waiting or need in running for need in experiment.needs):
            return False
        if not running:
            return True
        some_alone = experiment.alone or any(other.alone for other, _, _ in running.values())
        return not some_alone and len(running) < jobs

    quiet = not sys.stderr.isatty()  # a log file gets a line per experiment instead of a bar
    n_done = len(experiments) - len(waiting)
    bar = tqdm(total=len(experiments), initial=n_done, unit="experiment", desc=out, disable=quiet)
    try:
        while waiting or running:
            for experiment in list(waiting.values()):
                if can_start(experiment):
                    del waiting[experiment.name]
                    running[experiment.name] = (experiment, start(experiment, out, threads), time.time())
            bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
            for name, (experiment, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    seconds = time.time() - started
                    finish(experiment, out, process.returncode, seconds)
                    bar.update()
                    bar.write(f"{name}: {seconds:.0f} s, {len(waiting) + len(running)} experiments to go")
    finally:
        for _, process, _ in running.values():
            os.killpg(process.pid, 15)
        bar.close()


# -- figures of finished experiments, in a JSON file -------------------------------------------------------------------


def read_kept(path: str, commands: dict[str, list[str]]) -> dict[str, dict]:
    """{name: commands and figures}. ValueError: an experiment has other commands now."""
    known = read_json(path) if os.path.exists(path) else {}
    for name, figures in known.items():
        if name in commands and commands[name] != figures["commands"]:
            raise ValueError(f"{path}: {name} was run with other commands; give another --results, or take it out")
    return known


def write_kept(known: dict[str, dict], path: str) -> None:
    """A line per experiment."""
    lines = [f"{json.dumps(name)}: {json.dumps(figures)}" for name, figures in known.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def missing(wanted: list[Experiment], known: Container[str], is_kept: Callable[[str], object]) -> list[Experiment]:
    """The experiments without figures, and those that they need. is_kept: whether a name has figures to keep."""
    by_name = {experiment.name: experiment for experiment in wanted}
    needed = set()

    def need(name: str) -> None:
        if name not in needed:
            needed.add(name)
            for other in by_name[name].needs:
                need(other)

    for experiment in wanted:
        if is_kept(experiment.name) and experiment.name not in known:
            need(experiment.name)
    return [experiment for experiment in wanted if experiment.name in needed]
