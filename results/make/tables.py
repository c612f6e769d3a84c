"""Makes the tables and figures of results/ and docs/: trains what they need, and draws them.

    python results/make/tables.py ladder                # a ladder of judges; some two hours
    python results/make/tables.py sweep --seeds 5       # when do edits pay? Five hours
                                                        # (rarity, paper and lora: with a judge that checks no claims)
    python results/make/tables.py rarity                # when do edits pay? At most five hours on two CPU cores
    python results/make/tables.py paper                 # the paper's tables in miniature, two and a half hours
    python results/make/tables.py lora                  # LoRA against full fine-tuning, half an hour
    python results/make/tables.py memory                # which model fits on which GPU (docs/gpus.md); minutes, no GPU
    python results/make/tables.py one-step > docs/one-step.md      # one step with real text, of recipes/tiny.sh's run

    python results/make/tables.py rarity --quick        # fewer experiments, one seed, half the steps
    python results/make/tables.py rarity --search       # the learning rates, on another seed and the dev prompts
    python results/make/tables.py rarity --only-draw    # tables and figures of the finished experiments

A finished experiment is not run again, so a command can be stopped and repeated at any time. experiments.py has the
commands, figures.py reads finished runs; ladder.py, paper.py, rarity.py and lora.py say what their tables compare.
"""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from results.make import ladder, lora, memory, one_step, paper, rarity, sweep
from results.make.experiments import Experiment, experiments_of, is_done, missing, read_kept, run, write_kept
from results.make.figures import with_rare_content
from runtime import flags
from runtime.flags import Count


@dataclass
class Args:
    table: tyro.conf.Positional[Literal["ladder", "sweep", "paper", "rarity", "lora", "memory", "one-step"]]
    """What to make: ladder, sweep, paper, rarity, lora, memory or one-step."""

    # -- experiments (ladder, sweep, paper, rarity, lora)
    out: str | None = None
    """Folder of all runs; a quick run uses OUT_quick. Default: out/ladder, out/tables for paper, else out/rarity."""
    results: str | None = None
    """Folder of tables and figures. Default: the one in results/, or OUT/results for a quick run."""
    quick: bool = False
    """One seed, half the RL steps, fewer experiments (paper and rarity)."""
    search: bool = False
    """Run the search for learning rates instead."""
    seeds: Count = 3
    """Seeds of each experiment; the main ones of the paper's tables have five."""
    jobs: Count = 2
    """Experiments that run at the same time; they share the cores equally."""
    only_draw: bool = False
    """Run nothing; draw the finished experiments."""

    # -- one step
    run: str = "out/tiny/cpe"
    """Run folder of ppo_cpe.py with edits and --log-tokens."""
    step: Count = 1
    """Which step; the next one with an edit whose tokens were logged is shown."""


def main(args: Args) -> None:
    if args.table == "memory":
        return memory.main()
    if args.table == "one-step":
        return print(one_step.page(args.run, args.step), end="")
    out = args.out or {"paper": "out/tables", "ladder": "out/ladder", "sweep": "out/ladder"}.get(
        args.table, "out/rarity"
    )
    results = {"paper": "results"}.get(args.table, f"results/{args.table}")
    if args.quick:
        out += "_quick"
        results = f"{out}/results"
    if args.search and args.table == "paper":
        results = f"{out}/results"
    results = args.results or results
    if args.table == "rarity":
        return make_rarity(args, out, results)
    if args.table == "ladder":
        return make_ladder(args, out, results)
    if args.table == "sweep":
        return make_sweep(args, out, results)
    if args.table == "paper":
        trainings = paper.searched() if args.search else paper.trainings(args.seeds, args.quick)
    else:
        trainings = lora.searched() if args.search else lora.trainings(args.seeds)
    experiments = experiments_of(trainings, out)
    if not args.only_draw:
        run(experiments, out, args.jobs)
    finished = [e.name for e in experiments if is_done(out, e)]
    print(f"{len(finished)} of {len(experiments)} experiments are finished")
    if args.table == "lora":
        lora.write_table(out, finished, results, args.search)
    elif args.search:
        paper.write_search(out, finished, results)
    else:
        paper.write_tables(out, finished, results)


def make_rarity(args: Args, out: str, results: str) -> None:
    trainings = rarity.searched() if args.search else rarity.trainings(args.seeds, args.quick)
    path = f"{results}/rarity.json"

    def wanted_in(folder: str) -> list[Experiment]:
        return experiments_of(trainings, folder)

    known = run_missing(args, out, path, wanted_in, rarity.parts_of, lambda name: with_rare_content(f"{out}/{name}"))
    if args.search:
        rarity.write_search(known, results)
    else:
        rarity.write_tables(known, results)


def make_ladder(args: Args, out: str, results: str) -> None:
    def wanted_in(folder: str) -> list[Experiment]:
        return ladder.experiments(shlex.quote(folder), args.quick)

    path = f"{results}/ladder.json"
    known = run_missing(args, out, path, wanted_in, ladder.is_kept, lambda name: ladder.figures_of(out, name))
    ladder.write_tables(known, results)


def make_sweep(args: Args, out: str, results: str) -> None:
    def wanted_in(folder: str) -> list[Experiment]:
        out = shlex.quote(folder)
        return sweep.searched(out) if args.search else sweep.experiments(out, args.seeds, args.quick)

    path = f"{results}/sweep.json"
    known = run_missing(args, out, path, wanted_in, sweep.parts_of, lambda name: sweep.figures_of(out, name))
    if args.search:
        sweep.write_search(known, results)
    else:
        sweep.write_tables(known, results)


def run_missing(
    args: Args,
    out: str,
    path: str,
    wanted_in: Callable[[str], list[Experiment]],
    is_kept: Callable[[str], object],
    figures_of: Callable[[str], dict],
) -> dict[str, dict]:
    """Runs the experiments whose figures the file at `path` lacks, and adds them -> {name: commands and figures}.

    wanted_in(folder): the experiments with their runs in a folder. is_kept(name): whether it has figures to keep.
    """
    wanted = wanted_in(out)
    commands = {e.name: e.commands for e in wanted_in("OUT")}  # as the file has them
    known = read_kept(path, commands)
    try:
        if not args.only_draw:
            run(missing(wanted, known, is_kept), out, args.jobs)
    finally:  # what is finished stays, also where a run was stopped
        for e in wanted:
            if is_kept(e.name) and e.name not in known and is_done(out, e):
                known[e.name] = {"commands": commands[e.name]} | figures_of(e.name)
        write_kept(known, path)
    kept = [name for name in commands if is_kept(name)]
    print(f"{sum(name in known for name in kept)} of {len(kept)} experiments are finished")
    return known


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
