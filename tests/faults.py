"""Kills and damage on tiny runs of all stages in the generated world; each is then continued.

    bash tests/faults.sh                  # 200 kills and 48 damaged checkpoints; the table in docs/reliability.md
    python tests/faults.py --kills 8      # a few, the table is printed
    python tests/faults.py --only evaluate.py "ppo_cpe.py, LoRA"

Every training run is 4 steps with a checkpoint after each. A kill is SIGKILL, sent by the process to itself: at a
random point of its CPU time, or (one in three) before a random one of the file operations of which writing, linking and
removing checkpoints consists, or journal and tables. Then the same command runs again, and what it leaves must equal an
uninterrupted run's: each file of the last checkpoint by its digest (weights, masters, moments), the metrics but for
clock and memory, the bytes of the rollouts; of annotation and evaluation every row and figure but for the clock. After
each kill the rows that are there must be readable.

Processes are forked from a server that has imported the libraries, so that a run takes a second.
"""

import argparse
import glob
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from conftest import FORKS, ROOT, read_metrics

STEPS, SEED = 4, 0
SIZES = ["--base-rows", "300", "--train-prompts", "40", "--eval-prompts", "8", "--pairs", "40", "--judgements", "40"]
SIZES += ["--eval-pairs", "8", "--vocab-size", "600"]
BASE = ["--hidden-size", "32", "--layers", "1", "--intermediate-size", "64", "--lr", "1e-3", "--seed", str(SEED)]


def stages(world: str, base: str) -> dict[str, tuple[str, list[str]]]:
    """{name: (script, flags)}: one model, one with a scalar head, two models, adapters; and what keeps a journal."""
    size = ["--max-steps", str(STEPS), "--save-every", "1"]
    train = [*size, "--batch-size", "4"]
    pairs = ["--data", f"{world}/pairs.jsonl"]
    scratch = ["--from-scratch", f"{world}/tokenizer", "--data", f"{world}/base_corpus.jsonl", *BASE]
    judge = ["--judge", "data/persona_world.py:judge"]
    ppo = [*size, "--model", base, "--prompts", f"{world}/prompts_train.jsonl", *judge]
    ppo += ["--prompts-per-step", "2", "--mini-batch-prompts", "1", "--n-samples", "2", "--max-new-tokens", "6"]
    ppo += ["--temperature", "1", "--top-p", "1", "--edit-rate", "1", "--lr", "1e-3", "--critic-lr", "1e-3"]
    lora = ["--lora-rank", "4"]
    annotate = ["--prompts", f"{world}/prompts_train.jsonl", "--eval-prompts", f"{world}/prompts_eval.jsonl"]
    annotate += ["--answers-per-model", "2", "--min-gap", "0.6", "--audit-answers", "4"]
    evaluate = ["--model", base, "--baseline", "reference", "--prompts", f"{world}/prompts_eval.jsonl", *judge]
    evaluate += ["--max-new-tokens", "12", "--bootstrap-draws", "20"]
    return {
        "sft.py": ("sft.py", [*train, *scratch]),
        "sft.py, LoRA": ("sft.py", [*train, "--model", base, *pairs, *lora]),
        "train_grm.py": ("train_grm.py", [*train, "--model", base, "--data", f"{world}/judgements.jsonl"]),
        "train_grm.py, bt": ("train_grm.py", [*train, "--model", base, *pairs, "--objective", "bt"]),
        "dpo.py": ("dpo.py", [*train, "--model", base, *pairs]),
        "ppo_cpe.py": ("ppo_cpe.py", ppo),
        "ppo_cpe.py, in background": ("ppo_cpe.py", [*ppo, "--save-in-background"]),
        "ppo_cpe.py, LoRA": ("ppo_cpe.py", [*ppo, *lora]),
        "annotate.py": ("data/annotate.py", annotate),
        "evaluate.py": ("evaluate.py", evaluate),
    }


KEEP_JOURNALS = ("annotate.py", "evaluate.py")  # instead of checkpoints


# -- one process, which may kill itself ----------------------------------------------------------------------------


def kill_at_cpu_time(seconds):
    def wait():
        while time.process_time() < seconds:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink")


def kill_at_operation(number, counted, written):
    """Before that file operation (from 1) on a path with `written` in it; counted[0] is how many there were."""

    def hook(event, operands):
        if event in EVENTS and any(isinstance(o, str) and written in o for o in operands[:2]):
            counted[0] += 1
            if counted[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def as_process(script, flags, log, kill, measured):
    """kill: ("time", CPU seconds), ("operation", number) or None. measured: file for what an unkilled run counted."""
    with open(log, "a") as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    kind, amount = kill or ("", 0)
    counted, begun = [0], time.process_time()
    written = f"{flags[-1]}/" if os.path.basename(script) in KEEP_JOURNALS else "checkpoints/step_"
    kill_at_operation(amount if kind == "operation" else 0, counted, written)
    if kind == "time":
        kill_at_cpu_time(begun + amount)
    sys.argv = [script, *flags]
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")
    if measured:
        with open(measured, "w") as f:
            json.dump(dict(seconds=time.process_time() - begun, operations=counted[0]), f)


def run(script, flags, out, kill=None, measured=None):
    """-> (exit code, what it has written)."""
    log = f"{out}.log"
    if os.path.exists(log):
        os.unlink(log)
    process = FORKS.Process(target=as_process, args=(script, [*flags, "--out", out], log, kill, measured))
    process.start()
    process.join()
    with open(log) as f:
        return process.exitcode, f.read()


# -- what a run leaves ---------------------------------------------------------------------------------------------


def result(out):
    """All that has to be equal."""
    if not os.path.isdir(f"{out}/checkpoints"):
        return tables(out)
    with open(f"{out}/checkpoints/step_{STEPS:06d}/state.json") as f:
        files = json.load(f)["files"]
    rollouts = {}
    for file in sorted(glob.glob(f"{out}/rollouts/*")):
        with open(file, "rb") as f:
            rollouts[os.path.basename(file)] = f.read()
    links = {name: os.readlink(f"{out}/{name}") for name in os.listdir(out) if os.path.islink(f"{out}/{name}")}
    return dict(files=files, metrics=read_metrics(out), rollouts=rollouts, links=links)


def tables(out):
    """{name: content} of what annotate.py or evaluate.py leaves, but for flags, seconds and plots."""
    found = {}
    for file in glob.glob(f"{out}/**", recursive=True):
        name = os.path.relpath(file, out)
        if os.path.isfile(file) and not name.startswith(("journal", "plots")):
            with open(file) as f:
                found[name] = f.read()
            if name.endswith(".json"):
                found[name] = json.loads(found[name], object_hook=without_flags_and_clock)
    return found


def without_flags_and_clock(values):
    return {key: value for key, value in values.items() if key not in ("args", "seconds")}


def check_readable(out):
    """After a kill: nothing breaks a reader."""
    from runtime.rows import json_lines

    for file in glob.glob(f"{out}/**/*.jsonl", recursive=True):
        list(json_lines(file, growing=os.path.basename(file) == "metrics.jsonl" or "/journal/" in file))
    for link in glob.glob(f"{out}/*"):
        if os.path.islink(link):
            assert os.path.isfile(f"{link}/config.json") and glob.glob(f"{link}/*.safetensors"), link


def is_inside(out):
    """Was a checkpoint being written, linked or removed, or a table being written?"""
    finished = sorted(f for f in glob.glob(f"{out}/checkpoints/step_*") if not f.endswith(".tmp"))
    linked = {os.path.basename(os.path.dirname(os.readlink(f))) for f in glob.glob(f"{out}/*") if os.path.islink(f)}
    newest = {os.path.basename(finished[-1])} if finished else set()
    return bool(glob.glob(f"{out}/*/*.tmp") or glob.glob(f"{out}/*.tmp") or linked != newest)


def damage(out, kind, rng):
    """A flipped bit, a cut or a removal in the newest checkpoint -> the file."""
    folder = f"{out}/checkpoints/step_{STEPS:06d}"
    files = [f for f in glob.glob(f"{folder}/**", recursive=True) if os.path.isfile(f) and os.path.getsize(f)]
    # the model card is not read: the end of a run writes it anew
    file = rng.choice(sorted(f for f in files if os.path.basename(f) != "README.md"))
    if kind == "removed":
        os.unlink(file)
    elif kind == "cut":
        os.truncate(file, rng.randrange(os.path.getsize(file)))
    else:
        with open(file, "r+b") as f:
            place = rng.randrange(os.path.getsize(file))
            f.seek(place)
            byte = f.read(1)[0]
            f.seek(place)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
    return os.path.relpath(file, folder)


# -- all of them ---------------------------------------------------------------------------------------------------


def main(n_kills, n_damages, folder, table=None, only=None):
    """-> exit status. only: names of stages; None: all."""
    rng, started = random.Random(SEED), time.monotonic()
    FORKS.set_forkserver_preload(
        [
            "conftest",
            "ppo_cpe",
            "train_grm",
            "sft",
            "dpo",
            "evaluate",
            "data.annotate",
            "data.persona_world",
            "transformers.utils.chat_template_utils",
        ]
    )
    world, base = f"{folder}/world", f"{folder}/base/policy"
    make_world = ("data/persona_world.py", ["--out", world, *SIZES], f"{folder}/log", None, None)
    made = FORKS.Process(target=as_process, args=make_world)
    made.start()
    made.join()
    assert made.exitcode == 0, f"{folder}/log"
    every, expected, cost = stages(world, base), {}, {}
    code, said = run(*every["sft.py"], f"{folder}/base")
    every = {name: every[name] for name in only or every}
    assert code == 0, said
    for name, (script, flags) in every.items():
        code, said = run(script, flags, f"{folder}/whole", measured=f"{folder}/measured.json")
        assert code == 0, said
        expected[name] = result(f"{folder}/whole")
        with open(f"{folder}/measured.json") as f:
            cost[name] = json.load(f)
        print(name, cost[name], flush=True)
        os.rename(f"{folder}/whole", f"{folder}/whole {name}")
    kinds, counts, wrong = list(every), Counter(), []
    faults = [("kill", kinds[i % len(kinds)], i) for i in range(n_kills)]
    damaged = [kind for kind in kinds if kind not in KEEP_JOURNALS]
    faults += [(("flipped", "cut", "removed")[i % 3], damaged[i % len(damaged)], i) for i in range(n_damages)]
    for fault, name, i in faults:
        script, flags = every[name]
        out, where = f"{folder}/run", fault
        shutil.rmtree(out, ignore_errors=True)
        if fault == "kill":
            code = 0
            while code == 0:  # one that was faster than the run that was measured is not killed: again
                shutil.rmtree(out, ignore_errors=True)
                # those at an operation are inside a checkpoint; the random ones fall where they fall
                kill = ("operation", rng.randint(1, cost[name]["operations"]))
                if i // len(kinds) % 3:
                    kill = ("time", rng.uniform(0, cost[name]["seconds"]))
                code, said = run(script, flags, out, kill)
            if code != -signal.SIGKILL:
                wrong.append(f"{name}, {kill}: exit {code}: {said[-500:]}")
            if os.path.isdir(out):
                check_readable(out)
            inside = kill[0] == "operation" or is_inside(out)
            where = "killed while writing" if inside else "killed elsewhere"
        else:
            shutil.copytree(f"{folder}/whole {name}", out, symlinks=True)
            file = damage(out, fault, rng)
            where = f"{fault} file"
        code, said = run(script, flags, out)
        counts[name, where, "faults"] += 1
        problem = f"exit {code}: {said[-500:]}" if code else ""
        if not code and (found := result(out)) != expected[name]:
            problem = "differs in " + ", ".join(k for k in found if found[k] != expected[name][k])
        if fault != "kill" and not problem and (file not in said or "set aside" not in said):
            problem = f"{file} is not named: {said[-500:]}"
        if problem:
            wrong.append(f"{name}, {where}: {problem}")
        else:
            counts[name, where, "equal"] += 1
    return report(counts, wrong, kinds, time.monotonic() - started, table)


def report(counts, wrong, kinds, seconds, table):
    """Prints the table and writes it to a file between its marks -> exit status."""
    wheres = ["killed elsewhere", "killed while writing", "flipped file", "cut file", "removed file"]
    lines = ["| | " + " | ".join(wheres) + " |", "|---" * (len(wheres) + 1) + "|"]
    for name in [*kinds, "all"]:
        cells = []
        for where in wheres:
            n, equal = (
                sum(v for (k, w, what), v in counts.items() if w == where and what == kind and name in (k, "all"))
                for kind in ("faults", "equal")
            )
            cells.append(f"{equal} of {n}" if n else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(f"{text}\n{seconds:.0f} s\n" + "\n".join(wrong), flush=True)
    if table:
        with open(table, encoding="utf-8") as f:
            before, _, rest = f.read().partition("<!-- tests/faults.sh -->\n")
        _, _, after = rest.partition("<!-- end -->\n")
        with open(table, "w", encoding="utf-8") as f:
            f.write(f"{before}<!-- tests/faults.sh -->\n{text}\n<!-- end -->\n{after}")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=48)
    parser.add_argument("--only", nargs="+", help="stages; by default all")
    parser.add_argument("--table", help="file with the marks between which the table goes")
    given = parser.parse_args()
    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a real disk waits 30 times a checkpoint
    with tempfile.TemporaryDirectory(dir=in_memory) as folder:
        sys.exit(main(given.kills, given.damages, folder, given.table, given.only))
