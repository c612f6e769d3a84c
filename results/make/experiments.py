"""Experiments in the generated world: their commands, and a runner.

An experiment is one folder under OUT, made by a few commands: a base model, an SFT policy, a run of RL with its
evaluation. `done.json` in the folder has the commands, the settings and the seconds, and OUT/NAME.log has the output.
An experiment whose commands have changed since it ran, or those of what it needs, is an error, so that two settings are
never mixed.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Container
from dataclasses import dataclass, field

from tqdm import tqdm

from json_files import read_json
from runtime.digests import digest_of
from runtime.rows import write_text

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
# Worlds that only serve for their preference pairs
PAIRS_ONLY = "--base-rows 100 --judgements 1 --train-prompts 1 --eval-prompts 1 --eval-pairs 1 --vocab-size 300"


@dataclass
class Experiment:
    name: str  # its folder under OUT
    commands: list[str]  # for the shell, without `python`, or with `env` in front
    needs: list[str] = field(default_factory=list)  # names of other experiments
    made_from: str = ""  # digest of inputs that the commands don't name
    settings: str = ""  # see `set_settings`
    always: bool = False  # made anew at each start: it is quick, and the code that it is made from may have changed


# -- commands ----------------------------------------------------------------------------------------------------------


def world_flags() -> dict[str, str]:
    """{"base": "--epochs 2 ...", ...}: the arrays of recipes/world_flags.sh."""
    with open(os.path.join(ROOT, "recipes/world_flags.sh")) as f:
        arrays = re.findall(r"^([A-Z]+)_FLAGS=\((.*?)\)$", f.read(), re.MULTILINE | re.DOTALL)
    return {stage.lower(): " ".join(words.split()) for stage, words in arrays}


FLAGS = world_flags()


def set_settings(experiments: list[Experiment]) -> None:
    """Sets `settings`, a digest of the flags of all stages, of an experiment's commands, and of all that it needs."""
    by_name = {experiment.name: experiment for experiment in experiments}

    def settings_of(experiment: Experiment) -> str:
        if not experiment.settings:
            needed = [settings_of(by_name[name]) for name in experiment.needs]
            experiment.settings = digest_of(FLAGS, experiment.commands, experiment.made_from, needed)
        return experiment.settings

    for experiment in experiments:
        settings_of(experiment)


def was_made_otherwise(experiment: Experiment, record: dict) -> bool:
    """Whether a record of an experiment, in done.json or a file of figures, has other commands or settings."""
    settings = record.get("settings", experiment.settings)  # records from before settings were kept have none
    return record["commands"] != experiment.commands or settings != experiment.settings


# -- the runner --------------------------------------------------------------------------------------------------------


def is_done(out: str, experiment: Experiment) -> bool:
    """Whether an experiment is finished, and stays so. ValueError: it was run with other commands."""
    folder = f"{out}/{experiment.name}"
    path = f"{folder}/done.json"
    if experiment.always or not os.path.exists(path):
        return False
    if was_made_otherwise(experiment, read_json(path)):
        raise ValueError(
            f"{path}: it was run with other commands or after others; remove the folder {folder} or give another --out"
        )
    return True


def with_python(command: str) -> str:
    """Runs a script with this interpreter; any other command as it is."""
    return command if command.startswith("env ") else f"{shlex.quote(sys.executable)} {command}"


def start(experiment: Experiment, out: str, threads: int) -> subprocess.Popen:
    """Starts the commands, one after the other, in a process group of their own."""
    if experiment.always:
        shutil.rmtree(f"{out}/{experiment.name}", ignore_errors=True)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
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
    done = {"commands": experiment.commands, "settings": experiment.settings, "seconds": round(seconds, 1)}
    write_text(f"{out}/{experiment.name}/done.json", json.dumps(done, indent=2))


def run(experiments: list[Experiment], out: str, jobs: int) -> None:
    """Runs the experiments that are not done, `jobs` at a time; they share the cores equally.

    SIGTERM and SIGINT end the running ones, too.
    ValueError, after all others have run: some failed, or need one that did.
    """
    waiting = {e.name: e for e in experiments if not is_done(out, e)}
    running: dict[str, tuple[Experiment, subprocess.Popen, float]] = {}
    failed: dict[str, str] = {}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)

    def can_start(experiment: Experiment) -> bool:
        if any(need in waiting or need in running for need in experiment.needs):
            return False
        return len(running) < jobs

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quiet = not sys.stderr.isatty()  # a log file gets a line per experiment instead of a bar
    n_done = len(experiments) - len(waiting)
    bar = tqdm(total=len(experiments), initial=n_done, unit="experiment", desc=out, disable=quiet)
    try:
        while waiting or running:
            for experiment in list(waiting.values()):
                if any(need in failed for need in experiment.needs):
                    del waiting[experiment.name]
                    failed[experiment.name] = f"{experiment.name} was left out: it needs one that failed"
                elif can_start(experiment):
                    del waiting[experiment.name]
                    running[experiment.name] = (experiment, start(experiment, out, threads), time.time())
            bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
            for name, (experiment, process, started) in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    seconds = time.time() - started
                    try:
                        finish(experiment, out, process.returncode, seconds)
                    except ValueError as error:
                        failed[name] = str(error)
                        bar.write(failed[name])
                        continue
                    bar.update()
                    bar.write(f"{name}: {seconds:.0f} s, {len(waiting) + len(running)} experiments to go")
    finally:
        for _, process, _ in running.values():
            os.killpg(process.pid, signal.SIGTERM)
        bar.close()
    if failed:
        raise ValueError("\n".join(failed.values()))


# -- figures of finished experiments, in a JSON file -------------------------------------------------------------------


def read_kept(path: str, experiments: list[Experiment]) -> dict[str, dict]:
    """{name: commands, settings and figures}. ValueError: an experiment has other commands or settings now."""
    known = read_json(path) if os.path.exists(path) else {}
    for experiment in experiments:
        name = experiment.name
        if name in known and was_made_otherwise(experiment, known[name]):
            raise ValueError(
                f"{path}: {name} was run with other commands or after others; give another --results, or take it out"
            )
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
