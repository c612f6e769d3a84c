"""LoRA against full fine-tuning in the generated world: score, rate of rare content, seconds a step.

    python recipes/lora.py --search     # learning rates of the adapters, on another seed and the dev prompts
    python recipes/lora.py              # three seeds; the cells of full training are rarity.py's
    python recipes/lora.py --only-draw  # the table of the finished cells

PPO and CPE from the same SFT policies, at a rate of rare content at which edits matter (recipes/rarity.py). In OUT of
recipes/rarity.py its world, base, SFT policies, GRMs and cells of full training are taken over where they are done:
the commands are the same. Seconds are means over the steps of a run; with two jobs beside one another each has half of
the cores, whichever way it trains.
"""

import os
import shlex
import sys
from dataclasses import dataclass

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from recipes import cells, draw, rarity
from recipes.cells import Cell
from runtime import flags
from runtime.rows import read_rows, write_text


@dataclass
class Args:
    out: str = "out/rarity"
    """Folder of all runs."""
    results: str = "results/lora"
    """Folder of the table."""
    search: bool = False
    """Run the search for learning rates instead: seed 100, the dev prompts."""
    seeds: flags.Count = 3
    """Seeds of every cell."""
    steps: flags.Count = rarity.STEPS
    """RL steps of a run."""
    jobs: flags.Count = 2
    """Cells that run at the same time; they share the cores equally."""
    only_draw: bool = False
    """Run nothing; make the table from the finished cells."""


RATE = rarity.RARE
METHODS = ("ppo", "unclipped")  # of rarity.METHODS; unclipped is CPE with its default loss
RANKS = (4, 32)  # of a model of width 128
LRS = (1e-4, 3e-4, 1e-3)  # full training's is 1e-4 (rarity.LR)
LR = dict(ppo=1e-3, unclipped=3e-4)  # the best of them (results/lora/search.md)


def lora_cell(out: str, seed: int, method: str, rank: int, lr: float, steps: int, name: str, split="eval") -> Cell:
    further = f"{rarity.METHODS[method][1]} --lora-rank {rank}"
    return rarity.rl_cell(out, seed, RATE, name, lr, further, steps, split)


def cells_of(args: Args) -> list[Cell]:
    out = shlex.quote(args.out)
    if args.search:
        found = rarity.preparation(out, rarity.SEARCH_SEED, (RATE,))
        for method in METHODS:
            for lr in LRS:
                name = f"{method}_lora{RANKS[-1]}_lr{lr:g}"
                found.append(lora_cell(out, rarity.SEARCH_SEED, method, RANKS[-1], lr, args.steps, name, "dev"))
        return found
    found = []
    for seed in range(args.seeds):
        found += rarity.preparation(out, seed, (RATE,))
        for method in METHODS:
            lr, further = rarity.lr_of(RATE, method), rarity.METHODS[method][1]
            found.append(rarity.rl_cell(out, seed, RATE, method, lr, further, args.steps))
            for rank in RANKS:
                found.append(lora_cell(out, seed, method, rank, LR[method], args.steps, f"{method}_lora{rank}"))
    return list({cell.name: cell for cell in found}.values())


def figures(run: str) -> draw.Quantities:
    """Score, rates of rare content, and seconds of a step by phase, of a finished cell."""
    found = rarity.figures_of(run)
    steps = read_rows(f"{run}/metrics.jsonl", "metrics")
    for phase in ("rollout", "score", "update"):
        found[phase] = sum(step[f"seconds/{phase}"] for step in steps) / len(steps)
    return found


def table(out: str, finished: list[str]) -> str:
    """A row per way of training; mean ± standard deviation over seeds."""
    runs = {}
    for cell in finished:
        name = cell.split("/")[-1]
        if name.startswith(METHODS):
            runs.setdefault(name, []).append(figures(f"{out}/{cell}"))
    rows = []
    for name, found in sorted(runs.items()):
        method, _, trained = name.partition("_")
        row = [rarity.METHODS[method][0], trained or "all weights", len(found)]
        row.append(draw.spread([f["reward"] for f in found]))
        row += [rarity.percent([f[key] for f in found]) for key in ("last_step", "advice", "wrong")]
        row += [draw.spread([f[phase] for f in found], 1) for phase in ("rollout", "score", "update")]
        rows.append(row)
    header = ("", "trained", "seeds", "score", "last step, %", "advice, %", "wrong fact, %")
    return draw.markdown_table([*header, "rollout, s", "score, s", "update, s"], rows)


def main(args: Args) -> None:
    wanted = cells_of(args)
    if not args.only_draw:
        cells.run(wanted, args.out, args.jobs)
    finished = [cell.name for cell in wanted if cells.is_done(args.out, cell)]
    print(f"{len(finished)} of {len(wanted)} cells are finished")
    name = "search" if args.search else "lora"
    lrs = ", ".join(
        f"{rarity.METHODS[m][0]} {rarity.lr_of(RATE, m):g} (all weights) and {LR[m]:g} (adapters)" for m in METHODS
    )
    note = (
        f"Made by `python recipes/lora.py{' --search' if args.search else ''}`: rate of rare content R = {RATE:g}, "
        f"{args.steps} steps, exact judge. "
        + (f"Seed {rarity.SEARCH_SEED}, dev prompts. " if args.search else f"Learning rates: {lrs}. ")
        + "Seconds of a step: means."
    )
    text = table(args.out, finished)
    write_text(f"{args.results}/{name}.md", f"# LoRA against full fine-tuning\n\n{note}\n\n{text}\n")
    print(f"{text}\n\nwritten: {args.results}/{name}.md")


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
