"""Makes the tables and figures of results/ and docs/: trains what they need, and draws them.

    python results/make/tables.py ladder                # the recipe on five seeds, a ladder of judges; two hours
    python results/make/tables.py sweep                 # when do edits pay? Five to seven hours on two CPU cores
    python results/make/tables.py tournament            # every way to learn from a critique; some nine hours
    python results/make/tables.py memory                # which model fits on which GPU (docs/gpus.md); minutes, no GPU
    python results/make/tables.py one-step > docs/one-step.md      # one step with real text, of recipes/tiny.sh's run
    python results/make/tables.py edits --seeds 4 > results/sweep/edits.md    # do edits follow critiques? After sweep

    python results/make/tables.py sweep --quick         # one seed, fewer experiments: a quarter of an hour
    python results/make/tables.py sweep --only-draw     # tables and figures of the finished experiments

A finished experiment is not run again, so a command can be stopped and repeated at any time. ladder.py, sweep.py and
tournament.py have the experiments, figures.py reads finished runs.
"""

import os
import shlex
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Literal

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from results.make import followed, ladder, memory, one_step, sweep, tournament
from results.make.experiments import Experiment, is_done, missing, read_kept, run, set_settings, write_kept
from runtime import flags
from runtime.flags import Count


@dataclass
class Args:
    table: tyro.conf.Positional[Literal["ladder", "sweep", "tournament", "memory", "one-step", "edits"]]
    """The table to make: ladder, sweep, tournament, memory, one-step or edits."""

    # -- experiments (ladder, sweep, tournament)
    out: str = "out/ladder"
    """Folder of all runs, which these tables share; a quick run uses OUT_quick/TABLE."""
    results: str | None = None
    """Folder of tables and figures. Default: results/TABLE, or OUT_quick/results/TABLE for a quick run."""
    quick: bool = False
    """One seed, fewer experiments."""
    seeds: Count = 5
    """Seeds of the sweep, the tournament and the edits."""
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
    if args.table == "edits":
        return print(followed.page(args.out, args.seeds), end="")
    if args.table == "one-step":
        return print(one_step.page(args.run, args.step), end="")
    out, folder = args.out, "results"
    if args.quick:  # a folder for each table, since their recipes differ
        out, folder = f"{args.out}_quick/{args.table}", f"{args.out}_quick/results"
    results = args.results or f"{folder}/{args.table}"
    table = {"ladder": ladder, "sweep": sweep, "tournament": tournament}[args.table]
    known = run_missing(args, table, out, f"{results}/{args.table}.json")
    table.write_tables(known, results)


def wanted_in(args: Args, folder: str) -> list[Experiment]:
    """The experiments, with their runs in a folder."""
    out = shlex.quote(folder)
    if args.table == "ladder":
        return ladder.experiments(out, args.quick)
    if args.table == "tournament":
        return tournament.experiments(out, args.seeds, args.quick)
    return sweep.experiments(out, args.seeds, args.quick)


def run_missing(args: Args, table: ModuleType, out: str, path: str) -> dict[str, dict]:
    """Runs the experiments whose figures the file at `path` lacks, and adds them -> {name: commands and figures}."""
    named = wanted_in(args, "OUT")  # with the commands as the file has them
    set_settings(named)
    known = read_kept(path, named)
    wanted = wanted_in(args, out)
    for e, of_file in zip(wanted, named, strict=True):
        e.settings = of_file.settings
    try:
        if not args.only_draw:
            run(missing(wanted, known, table.is_kept), out, args.jobs)
    finally:  # what is finished stays, also where a run was stopped
        for e, of_file in zip(wanted, named):
            if table.is_kept(e.name) and e.name not in known and is_done(out, e):
                made = {"commands": of_file.commands, "settings": e.settings}
                known[e.name] = made | table.figures_of(out, e.name)
        write_kept(known, path)
    kept = [e.name for e in named if table.is_kept(e.name)]
    print(f"{sum(name in known for name in kept)} of {len(kept)} experiments are finished")
    return known


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
