"""Makes the tables and figures of results/ and docs/: trains what they need, and draws them.

    python results/make/tables.py rarity                # when do edits pay? At most five hours on two CPU cores
    python results/make/tables.py paper                 # the paper's tables in miniature, two and a half hours
    python results/make/tables.py lora                  # LoRA against full fine-tuning, half an hour
    python results/make/tables.py memory                # which model fits on which GPU (docs/gpus.md); minutes, no GPU
    python results/make/tables.py one-step > docs/one-step.md      # one step with real text, of recipes/tiny.sh's run

    python results/make/tables.py rarity --quick        # fewer experiments, one seed, half the steps
    python results/make/tables.py rarity --search       # the learning rates, on another seed and the dev prompts
    python results/make/tables.py rarity --only-draw    # tables and figures of the finished experiments

A finished experiment is not run again, so a command can be stopped and repeated at any time. experiments.py has the
commands, figures.py reads finished runs; paper.py, rarity.py and lora.py say what their tables compare.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
from results.make import lora, memory, one_step, paper, rarity
from results.make.experiments import experiments_of, is_done, run
from results.make.figures import with_rare_content
from runtime import flags
from runtime.flags import Count


@dataclass
class Args:
    table: tyro.conf.Positional[Literal["paper", "rarity", "lora", "memory", "one-step"]]
    """What to make: paper, rarity, lora, memory or one-step."""

    # -- experiments (paper, rarity, lora)
    out: str | None = None
    """Folder of all runs; none: out/tables for paper, else out/rarity. A quick run uses OUT_quick."""
    results: str | None = None
    """Folder of tables and figures; none: the one in results/, or OUT/results for a quick run."""
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
    out = args.out or {"paper": "out/tables"}.get(args.table, "out/rarity")
    results = {"paper": "results", "rarity": "results/rarity", "lora": "results/lora"}[args.table]
    if args.quick:
        out += "_quick"
        results = f"{out}/results"
    if args.search and args.table == "paper":
        results = f"{out}/results"
    results = args.results or results
    if args.table == "rarity":
        return make_rarity(args, out, results)
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
    """Figures of finished experiments go into rarity.json, from which tables are drawn."""
    trainings = rarity.searched() if args.search else rarity.trainings(args.seeds, args.quick)
    experiments = experiments_of(trainings, out)
    commands = {e.name: e.commands for e in experiments_of(trainings, "OUT")}  # as rarity.json has them
    known = rarity.read_results(results, commands)
    try:
        if not args.only_draw:
            run(rarity.missing(experiments, known), out, args.jobs)
    finally:  # a run that is stopped keeps the figures of what it finished
        for e in experiments:
            if rarity.parts_of(e.name) and e.name not in known and is_done(out, e):
                known[e.name] = {"commands": commands[e.name]} | with_rare_content(f"{out}/{e.name}")
        rarity.write_results(known, results)
    wanted = [name for name in commands if rarity.parts_of(name)]
    print(f"{sum(name in known for name in wanted)} of {len(wanted)} experiments are finished")
    if args.search:
        rarity.write_search(known, results)
    else:
        rarity.write_tables(known, results)


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
