"""Trains and evaluates the cells (one trained model each) of the paper's tables in the generated world, two at a time.

One base model is pretrained, once, as the paper starts from one public model. Each seed then has its own SFT, GRM and
BT models and, on top of them, its RL runs. The exact judge scores all of them on the same questions of unseen people,
against the prompts' fixed reference answers. Before any RL, recipes/gates.py checks that the SFT policy reads profiles
and that the GRM judges well; where it finds otherwise the run stops, because a comparison would mean little.

    bash recipes/tables.sh                 # this file, in the project's environment

The tables are 1 (methods), 2 (reward models, edits), 4 (which edits, how many), 6 (accuracy of the judges), and two
that the paper lacks: the loss on edits, the weights of the three scores. recipes/draw.py says what they compare and
makes them from the finished cells; recipes/world_flags.sh has the flags that all runs of a stage share.

A cell's folder is OUT/seedN/NAME: the run itself, `eval/`, and `done.json` with the commands and seconds; its output is
in OUT/seedN/NAME.log. A cell whose commands have changed since it was run is an error: two settings are never mixed.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from recipes import draw
from runtime import flags
from runtime.rows import write_text


@dataclass
class Args:
    out: str = "out/tables"
    """Folder of all runs; a quick run uses OUT_quick."""
    results: str | None = None
    """Folder of tables and figures; None: `results`, or OUT/results for a quick run or a search."""
    quick: bool = False
    """One seed, half the RL steps, fewer cells."""
    search: bool = False
    """Run the search for learning rates (draw.LRS) instead: seed 100, the dev prompts."""
    seeds: int = 3
    """Seeds of every cell."""
    main_seeds: int = 5
    """Seeds of the cells of tables 1 and 2."""
    jobs: int = 2
    """Cells that run at the same time; they share the cores equally."""
    only_draw: bool = False
    """Run nothing; make tables and figures from the finished cells."""


# The best of draw.LRS by the exact score on dev prompts, found by `bash recipes/tables.sh --search` (results/search.md)
LR = {"ppo_bt": 1e-4, "ppo_grm": 5e-5, "cpe": 5e-5, "dpo": 1e-4}
QUICK = (*draw.MAIN, "loss_paper_batch", "loss_none_batch", "reward_rank_0.5")


@dataclass
class Cell:
    name: str  # its folder under OUT
    commands: list[str]  # for the shell, without `python`
    needs: list[str] = field(default_factory=list)
    alone: bool = False  # runs by itself, on all cores


# -- the commands ------------------------------------------------------------------------------------------------------


def world_flags() -> dict[str, str]:
    """{"base": "--epochs 2 ...", ...}: the arrays of recipes/world_flags.sh."""
    with open(os.path.join(HERE, "world_flags.sh")) as f:
        arrays = re.findall(r"^([A-Z]+)_FLAGS=\((.*?)\)$", f.read(), re.MULTILINE | re.DOTALL)
    return {stage.lower(): " ".join(words.split()) for stage, words in arrays}


FLAGS = world_flags()


def variants() -> dict[str, str]:
    """{cell name: flags of ppo_cpe.py that differ from CPE's defaults}, for every RL cell."""
    found = {"ppo_bt": FLAGS["ppo"], "ppo_grm": FLAGS["ppo"], "cpe": ""}
    for strategy in draw.STRATEGIES:
        for rate in draw.RATES:
            found.setdefault(draw.grid_cell(strategy, rate), f"--edit-strategy {strategy} --edit-rate {rate:g}")
    for ratio in draw.RATIOS:
        for baseline in draw.BASELINES:
            found.setdefault(draw.loss_cell(ratio, baseline), f"--edit-ratio {ratio} --edit-baseline {baseline}")
    found["loss_sdpo"] = "--edit-ratio sdpo --n-samples 6"
    for name, weights in draw.WEIGHTS.items():
        found[f"weights_{name}"] = "--score-weights " + " ".join(f"{w:g}" for w in weights)
    return found


# In what follows `out` is already quoted for the shell, so that a folder may have a space in its name.


def preparation(out: str, seed: int) -> list[Cell]:
    """World and base, and one seed's SFT, GRM, BT, gates and accuracy of the judges."""
    world, base, here = f"{out}/world", f"{out}/base", f"{out}/seed{seed}"

    def accuracy(name, judge, pairs):
        return (
            f"evaluate.py --task reward-accuracy --prompts {world}/{pairs}.jsonl --judge {judge} --n-prompts 0 "
            f"--judge-max-new-tokens 96 --out {here}/accuracy/{name}_{pairs}"
        )

    train_base = (
        f"sft.py --from-scratch {world}/tokenizer --data {world}/base_corpus.jsonl --out {base} {FLAGS['base']}"
    )
    train_sft = f"sft.py --model {base}/policy --data {world}/pairs.jsonl --out {here}/sft {FLAGS['sft']} --seed {seed}"
    train_grm = (
        f"train_grm.py --model {base}/policy --data {world}/judgements.jsonl --out {here}/grm {FLAGS['grm']} "
        f"--seed {seed}"
    )
    train_bt = (
        f"train_grm.py --objective bt --model {base}/policy --data {world}/pairs.jsonl --out {here}/bt {FLAGS['bt']} "
        f"--seed {seed}"
    )
    gates = f"recipes/gates.py --world {world} --policy {here}/sft/policy --grm {here}/grm/model --out {here}/gates"
    judges = (("grm", f"{here}/grm/model"), ("bt", f"bt:{here}/bt/model"))
    return [
        Cell("world", [f"data/persona_world.py --out {world}"]),
        Cell("base", [train_base, evaluation(out, base, 0)], ["world"], alone=True),
        Cell(
            f"seed{seed}/sft",
            [train_sft, evaluation(out, f"{here}/sft", seed), swap(out, f"{here}/sft", seed)],
            ["base"],
        ),
        Cell(f"seed{seed}/grm", [train_grm], ["base"]),
        Cell(f"seed{seed}/bt", [train_bt], ["base"]),
        Cell(f"seed{seed}/gates", [gates], [f"seed{seed}/sft", f"seed{seed}/grm"]),
        Cell(
            f"seed{seed}/accuracy",
            [accuracy(name, judge, pairs) for name, judge in judges for pairs in ("pairs_eval", "pairs_eval_exact")],
            [f"seed{seed}/grm", f"seed{seed}/bt"],
        ),
    ]


def evaluation(out: str, run: str, seed: int, prompts: str = "prompts_eval") -> str:
    """The exact judge on answers to unseen people's questions, against the fixed references."""
    return (
        f"evaluate.py --model {run}/policy --baseline reference --prompts {out}/world/{prompts}.jsonl "
        f"{FLAGS['evaluation']} --n-prompts 0 --seed {seed} --bootstrap-draws 100 --out {run}/eval"
    )


def swap(out: str, run: str, seed: int) -> str:
    """The answers of `evaluation` under their own and another person's profile."""
    return (
        f"evaluate.py --task persona-swap --answers {run}/eval/answers_model.jsonl "
        f"--prompts {out}/world/prompts_eval.jsonl --judge world --n-prompts 0 --seed {seed} --out {run}/swap"
    )


def dpo_cell(out: str, seed: int, name: str = "dpo", lr: float | None = None, prompts: str = "prompts_eval") -> Cell:
    """One run of dpo.py and its evaluation."""
    here = f"{out}/seed{seed}"
    train = (
        f"dpo.py --model {here}/sft/policy --data {out}/world/pairs.jsonl --out {here}/{name} {FLAGS['dpo']} "
        f"--lr {lr or LR['dpo']:g} --seed {seed}"
    )
    return Cell(f"seed{seed}/{name}", [train, evaluation(out, f"{here}/{name}", seed, prompts)], [f"seed{seed}/gates"])


def rl_cell(
    out: str,
    seed: int,
    name: str,
    flags: str,
    steps: int,
    folder: str | None = None,
    lr: float | None = None,
    prompts: str = "prompts_eval",
) -> Cell:
    """One run of ppo_cpe.py and its evaluation. folder: of the run, if it is not called `name`."""
    world, here, folder = f"{out}/world", f"{out}/seed{seed}", folder or name
    run = f"{here}/{folder}"
    judge = f"bt:{here}/bt/model" if name == "ppo_bt" else f"{here}/grm/model"
    train = (
        f"ppo_cpe.py --model {here}/sft/policy --prompts {world}/prompts_train.jsonl --judge {judge} --out {run} "
        f"{FLAGS['rl']} --max-steps {steps} --seed {seed} --lr {lr or LR.get(name, LR['cpe']):g} {flags}"
    ).strip()
    if name in draw.MAIN and lr is None:  # what the figures need, and a batch for replays
        train += f" --eval-data {world}/prompts_dev.jsonl --eval-every 7 --eval-n 48 --save-batch {steps // 2}"
        commands = [train, evaluation(out, run, seed, prompts), swap(out, run, seed)]
    else:
        commands = [train, evaluation(out, run, seed, prompts)]
    return Cell(f"seed{seed}/{folder}", commands, [f"seed{seed}/gates", f"seed{seed}/bt"])


def cells_of(args: Args, out: str) -> list[Cell]:
    """Every cell to run, without repeats, in order: what the main tables need comes first."""
    out, flags, cells = shlex.quote(out), variants(), {}

    def add(new: Iterable[Cell]):
        cells.update((cell.name, cell) for cell in new)

    if args.search:
        seed, steps, prompts = draw.SEARCH_SEED, 30, "prompts_dev"
        add(preparation(out, seed))
        for name, lrs in draw.LRS.items():
            for lr in lrs:
                folder = f"{name}_lr{lr:g}"
                if name == "dpo":
                    add([dpo_cell(out, seed, folder, lr, prompts)])
                else:
                    add([rl_cell(out, seed, name, flags[name], steps, folder, lr, prompts)])
        return list(cells.values())
    n_main, n_other, steps = (1, 1, 15) if args.quick else (args.main_seeds, args.seeds, 30)
    for seed in range(max(n_main, n_other)):
        add(preparation(out, seed))
    for seed in range(n_main):
        add([dpo_cell(out, seed), *(rl_cell(out, seed, name, flags[name], steps) for name in draw.MAIN)])
    for seed in range(n_other):
        wanted = QUICK if args.quick else flags
        add(rl_cell(out, seed, name, flags[name], steps) for name in flags if name in wanted)
    for seed in range(n_other, n_main):
        add(rl_cell(out, seed, name, flags[name], steps) for name in draw.FOLLOWED_UP)
    return list(cells.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def is_done(out: str, cell: Cell) -> bool:
    """ValueError: the cell was run with other commands."""
    path = f"{out}/{cell.name}/done.json"
    if not os.path.exists(path):
        return False
    with open(path) as f:
        if json.load(f)["commands"] != cell.commands:
            raise ValueError(
                f"{path}: this cell was run with other commands; remove the folder {out}/{cell.name} or give another "
                "--out"
            )
    return True


def run(cells: list[Cell], out: str, jobs: int) -> None:
    """Runs the cells that are not done, `jobs` at a time.

    ValueError: a cell failed. The cells that were running beside it are stopped.
    """
    todo = {cell.name: cell for cell in cells if not is_done(out, cell)}
    running = {}  # name: (cell, process, when it started)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    quiet = not sys.stderr.isatty()  # a log file gets a line a cell
    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), unit="cell", desc=out, disable=quiet)
    try:
        while todo or running:
            for name, cell in list(todo.items()):
                ready = not any(need in todo or need in running for need in cell.needs)
                shared = not cell.alone and not any(other.alone for other, *_ in running.values())
                if ready and (not running or shared and len(running) < jobs):
                    environment = os.environ if cell.alone else os.environ | {"OMP_NUM_THREADS": threads}
                    os.makedirs(f"{out}/{name}", exist_ok=True)
                    with open(f"{out}/{name}.log", "w") as log:
                        shell = " && ".join(f"{shlex.quote(sys.executable)} {command}" for command in cell.commands)
                        process = subprocess.Popen(
                            ["bash", "-c", shell], stdout=log, stderr=log, env=environment, start_new_session=True
                        )
                    running[name] = (todo.pop(name), process, time.time())
                    bar.set_postfix_str(", ".join(running))
            time.sleep(0.2)
            for name, (cell, process, started) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    with open(f"{out}/{name}.log") as f:
                        tail = "\n".join(f.read().replace("\r", "\n").splitlines()[-8:])
                    raise ValueError(f"{name} failed ({out}/{name}.log):\n{tail}")
                done = dict(commands=cell.commands, seconds=round(time.time() - started, 1))
                write_text(f"{out}/{name}/done.json", json.dumps(done, indent=2))
                bar.update()
                bar.set_postfix_str(", ".join(running))
                bar.write(f"{name}: {done['seconds']:.0f} s, {len(todo) + len(running)} cells to go")
    finally:
        for _, process, _ in running.values():
            os.killpg(process.pid, 15)
        bar.close()


def main(args: Args) -> None:
    out = f"{args.out}_quick" if args.quick else args.out
    cells = cells_of(args, out)
    if not args.only_draw:
        run(cells, out, args.jobs)
    finished = [cell.name for cell in cells if is_done(out, cell)]
    print(f"{len(finished)} of {len(cells)} cells are finished")
    folder = args.results or (f"{out}/results" if args.quick or args.search else "results")
    if args.search:
        draw.write_search(out, finished, folder)
    else:
        draw.write_tables(out, finished, folder)


if __name__ == "__main__":
    with flags.user_errors():
        main(flags.parse(Args, __doc__))
