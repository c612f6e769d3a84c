"""The cells of the paper's tables in the generated world, and a runner that trains and evaluates them, two at a time.

One base model is pretrained once, as the paper starts from one public model. Each seed then has its own SFT, GRM and BT
model and, on top of these, its RL runs; all judged by the exact judge on the same questions of unseen people, against
the prompts' fixed reference answers. Before any RL a gate (recipes/gates.py) checks that the SFT policy reads profiles
and that the GRM judges well; below it nothing is compared.

    bash recipes/tables.sh                 # this file, in the project's environment

Tables: 1 (methods), 2 (reward models, edits), 4 (which edits, how many), 6 (accuracy of the judges), and two that the
paper lacks: the loss on edits, the weights of the three scores. recipes/results.py draws them from the finished cells.

A cell's folder is OUT/seedN/NAME: the run itself, `eval/`, and `done.json` with the commands and seconds; its output is
in OUT/seedN/NAME.log. A cell whose commands have changed since stops the runner, rather than mixing two settings.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field

import tyro
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from recipes import results
from runtime.flags import user_errors
from runtime.rows import write_text


@dataclass
class Args:
    out: str = "out/tables"
    """Folder of all runs; a quick run goes to OUT_quick."""
    results: str | None = None
    """Folder of tables and figures; None: results, of a quick run or a search OUT/results."""
    quick: bool = False
    """One seed, half the RL steps, fewer cells."""
    search: bool = False
    """The search for learning rates (LRS) instead: seed 100, the dev prompts."""
    seeds: int = 3
    """Seeds of every cell."""
    main_seeds: int = 5
    """Seeds of the cells of tables 1 and 2."""
    jobs: int = 2
    """Cells at a time; the cores are shared out among them."""
    only_draw: bool = False
    """Tables and figures from the cells that are finished, and no run."""


# The best of LRS by the exact score on dev prompts, as `bash recipes/tables.sh --search` found them (results/search.md)
LR = {"ppo_bt": 1e-4, "ppo_grm": 5e-5, "cpe": 5e-5, "dpo": 1e-4}
LRS = dict.fromkeys(results.MAIN, (2e-05, 5e-05, 0.0001, 0.0002)) | {"dpo": (1e-5, 3e-5, 1e-4, 3e-4)}


def variants():
    """{cell name: flags of ppo_cpe.py that differ from CPE's defaults}, for every RL cell."""
    found = {"ppo_bt": "--edit-rate 0 --n-samples 6", "ppo_grm": "--edit-rate 0 --n-samples 6", "cpe": ""}
    for strategy in results.STRATEGIES:
        for rate in results.RATES:
            found.setdefault(results.grid_cell(strategy, rate), f"--edit-strategy {strategy} --edit-rate {rate:g}")
    for ratio in results.RATIOS:
        for baseline in results.BASELINES:
            found.setdefault(results.loss_cell(ratio, baseline), f"--edit-ratio {ratio} --edit-baseline {baseline}")
    found["loss_sdpo"] = "--edit-ratio sdpo --n-samples 6"
    for name, weights in results.WEIGHTS.items():
        found[f"weights_{name}"] = "--score-weights " + " ".join(f"{w:g}" for w in weights)
    return found


QUICK = (*results.MAIN, "loss_paper_batch", "loss_none_batch", "reward_rank_0.5")


@dataclass
class Cell:
    name: str  # its folder under OUT
    commands: list[str]
    needs: list[str] = field(default_factory=list)
    alone: bool = False  # takes all cores


# -- what is run -------------------------------------------------------------------------------------------------------


def preparation(out, seed):
    """World, base, and one seed's SFT, GRM, BT, gate and judge accuracy."""
    world, base, here = f"{out}/world", f"{out}/base", f"{out}/seed{seed}"
    answer, grm = f"--answer-template {world}/templates/answer.txt", f"--grm-template {world}/templates/grm.txt"
    training = f"--batch-size 64 --tokens-per-microbatch 8192 --seed {seed}"

    def accuracy(judge, pairs, name):
        return (
            f"evaluate.py --task reward-accuracy --prompts {world}/{pairs}.jsonl --judge {judge} --n-prompts 0 {answer} {grm} "
            f"--max-judgement-length 96 --out {here}/{name}"
        )

    return [
        Cell("world", [f"data/persona_world.py --output {world}"]),
        Cell(
            "base",
            [
                f"sft.py --from-scratch {world}/tokenizer --data {world}/base_corpus.jsonl --out {base} --epochs 2 --layers 3 "
                "--batch-size 64 --lr 3e-3 --warmup-ratio 0.05 --tokens-per-microbatch 8192",
                evaluation(out, base, 0),
            ],
            ["world"],
            alone=True,
        ),
        Cell(
            f"seed{seed}/sft",
            [
                f"sft.py --model {base}/policy --data {world}/pairs.jsonl {answer} --out {here}/sft "
                f"--epochs 1 --lr 3e-4 {training}",
                evaluation(out, f"{here}/sft", seed),
                swap(out, f"{here}/sft", seed),
            ],
            ["base"],
        ),
        Cell(
            f"seed{seed}/grm",
            [
                f"train_grm.py --model {base}/policy --data {world}/judgements.jsonl {grm} --out {here}/grm "
                f"--epochs 2 --lr 1e-3 {training}"
            ],
            ["base"],
        ),
        Cell(
            f"seed{seed}/bt",
            [
                f"train_grm.py --objective bt --model {base}/policy --data {world}/pairs.jsonl {answer} "
                f"--out {here}/bt --epochs 1 --lr 3e-4 {training}"
            ],
            ["base"],
        ),
        Cell(
            f"seed{seed}/gates",
            [f"recipes/gates.py --world {world} --policy {here}/sft/policy --grm {here}/grm/model --out {here}/gates"],
            [f"seed{seed}/sft", f"seed{seed}/grm"],
        ),
        Cell(
            f"seed{seed}/accuracy",
            [
                accuracy(judge, pairs, f"accuracy/{name}_{pairs}")
                for name, judge in (("grm", f"{here}/grm/model"), ("bt", f"bt:{here}/bt/model"))
                for pairs in ("pairs_eval", "pairs_eval_exact")
            ],
            [f"seed{seed}/grm", f"seed{seed}/bt"],
        ),
    ]


def evaluation(out, run, seed, prompts="prompts_eval"):
    """The exact judge on answers to new people's questions, against fixed references."""
    world = f"{out}/world"
    return (
        f"evaluate.py --model {run}/policy --baseline reference --prompts {world}/{prompts}.jsonl --judge world "
        f"--answer-template {world}/templates/answer.txt --n-prompts 0 --max-new-tokens 96 --temperature 1 --top-p 1 "
        f"--seed {seed} --bootstrap-draws 100 --out {run}/eval"
    )


def swap(out, run, seed):
    """The answers of `evaluation` under their own and another person's profile."""
    return (
        f"evaluate.py --task persona-swap --answers {run}/eval/answers_model.jsonl --prompts {out}/world/prompts_eval.jsonl "
        f"--judge world --n-prompts 0 --seed {seed} --out {run}/swap"
    )


def dpo_cell(out, seed, name="dpo", lr=None, prompts="prompts_eval"):
    world, here = f"{out}/world", f"{out}/seed{seed}"
    run = f"{here}/{name}"
    train = (
        f"dpo.py --model {here}/sft/policy --data {world}/pairs.jsonl --answer-template {world}/templates/answer.txt --out {run} "
        f"--epochs 1 --batch-size 64 --lr {lr or LR['dpo']:g} --tokens-per-microbatch 8192 --seed {seed}"
    )
    return Cell(f"seed{seed}/{name}", [train, evaluation(out, run, seed, prompts)], [f"seed{seed}/gates"])


def rl_cell(out, seed, name, flags, steps, folder=None, lr=None, prompts="prompts_eval"):
    """One run of ppo_cpe.py and its evaluation. n = 6 without edits against n = 4 and two edits of four (METHOD 1.9)."""
    world, here = f"{out}/world", f"{out}/seed{seed}"
    run = f"{here}/{folder or name}"
    judge = f"bt:{here}/bt/model" if name == "ppo_bt" else f"{here}/grm/model"
    templates = " ".join(f"--{t}-template {world}/templates/{t}.txt" for t in ("answer", "edit", "grm"))
    train = (
        f"ppo_cpe.py --policy {here}/sft/policy --prompts {world}/prompts_train.jsonl --judge {judge} {templates} --out {run} "
        f"--prompts-per-step 16 --mini-batch-prompts 8 --max-response-length 96 --max-judgement-length 96 --temperature 1 "
        f"--top-p 1 --critic-lr 2e-3 --tokens-per-microbatch 8192 --max-steps {steps} --seed {seed} "
        f"--lr {lr or LR.get(name, LR['cpe']):g} {flags}"
    )
    commands = [train.strip(), evaluation(out, run, seed, prompts)]
    if name in results.MAIN and lr is None:  # what diagnostics.py draws, and the batch for its --replay
        commands[0] += f" --eval-prompts {world}/prompts_dev.jsonl --eval-every 7 --eval-n 48 --save-batch {steps // 2}"
        commands.append(swap(out, run, seed))
    return Cell(f"seed{seed}/{folder or name}", commands, [f"seed{seed}/gates", f"seed{seed}/bt"])


def cells_of(args, out):
    """Every cell to run, in order: what the main tables need first. Names are unique."""
    flags, cells = variants(), {}

    def add(some):
        cells.update((cell.name, cell) for cell in some)

    if args.search:
        add(preparation(out, 100))
        for name, lrs in LRS.items():
            for lr in lrs:
                folder = f"{name}_lr{lr:g}"
                add(
                    [
                        dpo_cell(out, 100, folder, lr, "prompts_dev")
                        if name == "dpo"
                        else rl_cell(out, 100, name, flags[name], 30, folder, lr, "prompts_dev")
                    ]
                )
        return list(cells.values())
    n_main, n_other, steps = (1, 1, 15) if args.quick else (args.main_seeds, args.seeds, 30)
    for seed in range(max(n_main, n_other)):
        add(preparation(out, seed))
    for seed in range(n_main):
        add([dpo_cell(out, seed), *(rl_cell(out, seed, name, flags[name], steps) for name in results.MAIN)])
    for seed in range(n_other):
        add(rl_cell(out, seed, name, f, steps) for name, f in flags.items() if not args.quick or name in QUICK)
    for seed in range(n_other, n_main):
        add(rl_cell(out, seed, name, flags[name], steps) for name in results.FOLLOWED_UP)
    return list(cells.values())


# -- the runner --------------------------------------------------------------------------------------------------------


def is_done(out, cell):
    """ValueError: it was run with other commands."""
    path = f"{out}/{cell.name}/done.json"
    if not os.path.exists(path):
        return False
    with open(path) as f:
        if json.load(f)["commands"] != cell.commands:
            raise ValueError(
                f"{path}: this cell was run with other commands; remove the folder {out}/{cell.name} or give another --out"
            )
    return True


def run(cells, out, jobs):
    """Runs what is not done, `jobs` at a time. ValueError: a cell failed; those that ran beside it are stopped too."""
    todo = {cell.name: cell for cell in cells if not is_done(out, cell)}
    running = {}  # name: (cell, process, when it started)
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    bar = tqdm(total=len(cells), initial=len(cells) - len(todo), unit="cell", desc=out)
    try:
        while todo or running:
            for name, cell in list(todo.items()):
                ready = not any(need in todo or need in running for need in cell.needs)
                shared = not cell.alone and not any(c.alone for c, *_ in running.values())
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
    finally:
        for _, process, _ in running.values():
            os.killpg(process.pid, 15)
        bar.close()


def main(args):
    out = f"{args.out}_quick" if args.quick else args.out
    cells = cells_of(args, out)
    if not args.only_draw:
        run(cells, out, args.jobs)
    finished = [cell.name for cell in cells if is_done(out, cell)]
    print(f"{len(finished)} of {len(cells)} cells are finished")
    folder = args.results or (f"{out}/results" if args.quick or args.search else "results")
    if args.search:
        results.search(out, finished, folder, LRS)
    else:
        results.draw(out, finished, folder)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
