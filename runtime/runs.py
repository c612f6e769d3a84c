"""A run folder: flags and inputs, metrics, and rows of steps. Its checkpoints are in checkpoints.py."""

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime import trackers
from runtime.distributed import Ranks, all_gather, all_max, all_sum, barrier, print0
from runtime.flags import flag, may_change
from runtime.rows import append_line, write_rows, write_text
from runtime.watch import end_if_stopped, enter, stop_on_signal, watch_ranks

# -- opening -----------------------------------------------------------------------------------------------------------

WHOLE_BYTES = 2**26  # up to this size a file's digest is of all its bytes
SAMPLED_PARTS, PART_BYTES = 256, 2**16  # of a larger one (weights), of so many parts, spread evenly, and its size


def file_digest(path: str) -> str:
    """Of a file's content; of a large one of parts of it, so that shards of a large model take seconds, not minutes."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with open(path, "rb") as f:
        if size <= WHOLE_BYTES:
            digest.update(f.read())
        else:
            for i in range(SAMPLED_PARTS):
                f.seek((size - PART_BYTES) * i // (SAMPLED_PARTS - 1))
                digest.update(f.read(PART_BYTES))
    return digest.hexdigest()


def digest_of(*parts: Any) -> str:
    """Of anything that JSON holds."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def input_digest(path: str) -> str:
    """Of a file, or of a model's folder: its weights, config and tokenizer."""
    if os.path.isfile(path):
        return file_digest(path)
    names = ("*.safetensors", "config.json", "tokenizer.json")
    files = sorted(file for name in names for file in glob.glob(os.path.join(path, name)))
    return digest_of(*(part for file in files for part in (os.path.basename(file), file_digest(file))))


def open_run(args: Any, ranks: Ranks, inputs: dict[str, str]) -> None:
    """Makes or reopens the folder args.out and prints where output goes.

    inputs: {flag or what it is: digest} of all that the run reads (`input_digest`, `digest_of`).
    ValueError: the folder holds a run with other flags or inputs, or another process is running in it.
    """
    file = os.path.join(args.out, "args.json")
    if os.path.isfile(file):
        before = _read_args(file)
        now = json.loads(json.dumps(dataclasses.asdict(args)))
        free = may_change(type(args)) | {"out"}
        changed = [name for name in now if name not in free and name in before and before[name] != now[name]]
        if changed:
            was = ", ".join(f"{flag(name)} {before[name]} -> {now[name]}" for name in changed)
            raise ValueError(f"{args.out} holds a run with other flags ({was}); choose another --out or remove it")
        known = before.get("inputs", {})
        changed = [name for name, digest in inputs.items() if known.get(name, digest) != digest]
        if changed:
            raise ValueError(
                f"{args.out} holds a run on other inputs: what {', '.join(changed)} names has changed since; choose "
                "another --out or remove it"
            )
    if ranks.rank == 0:
        os.makedirs(os.path.join(args.out, "checkpoints"), exist_ok=True)
        _lock(args.out)
        _remove_unfinished(args.out)
        content = {**dataclasses.asdict(args), "inputs": inputs, "git": git_hash()}
        write_text(file, json.dumps(content, indent=2))
        trackers.open_trackers(args)
    barrier(ranks)
    watch_ranks(ranks, args.timeouts)
    print0(f"output: {args.out}/ (args.json, metrics.jsonl, checkpoints/)")


def _read_args(file):
    try:
        with open(file, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}: not the flags of a run ({error}); remove the folder or choose another --out"
        ) from error


def _remove_unfinished(out):
    """What a run that was killed had begun to write or to remove."""
    for path in [*glob.glob(f"{glob.escape(out)}/*.tmp"), *glob.glob(f"{glob.escape(out)}/*/*.tmp")]:
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


_locks = {}  # files that this process holds open, which are its locks; a process that ends gives them up


def _lock(out):
    path = os.path.join(out, "lock.json")
    if path in _locks:
        return
    lock = open(path, "a+")  # noqa: SIM115  held as long as the process runs
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.seek(0)
        raise ValueError(
            f"{out}: another run is writing there ({lock.read().strip()}); choose another --out"
        ) from error
    lock.truncate(0)
    lock.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    lock.flush()
    _locks[path] = lock


def git_hash() -> str:
    """The commit of this code, with + where files differ from it; "unknown" outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    command = ["git", "describe", "--always", "--dirty=+", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


# -- what a step leaves behind -----------------------------------------------------------------------------------------


class Stats:
    """Sums and counts of per-token figures by name, for means over all micro-batches and ranks."""

    def __init__(self):
        self.sums, self.largest = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: -math.inf)
        self.recent = defaultdict(float)  # sums since the caller has last cleared them
        self.flops, self.logical_tokens, self.computed_tokens = 0, 0, 0  # of this rank's passes

    def add(self, name: str, values: torch.Tensor) -> None:
        total, added = self.sums[name], values.double().sum().item()
        total[0] += added
        total[1] += values.numel()
        self.recent[name] += added

    def add_max(self, name: str, values: torch.Tensor) -> None:
        self.largest[name] = max([self.largest[name], *([values.max().item()] if values.numel() else [])])

    def means(self, ranks: Ranks) -> dict[str, float | None]:
        names = sorted(set(all_gather(ranks, self.sums)))  # a rank may have met no edit, say
        totals = all_sum(ranks, *(x for name in names for x in self.sums[name]))
        means = {n: totals[2 * i] / totals[2 * i + 1] if totals[2 * i + 1] else None for i, n in enumerate(names)}
        largest = sorted(set(all_gather(ranks, self.largest)))
        return means | {name: all_max(ranks, self.largest[name]) for name in largest}


def progress(first_step: int, last_step: int, ranks: Ranks, begins_with: str = "update") -> tqdm:
    """The steps of a run, with a bar on a terminal; a log file gets a line a step (`print_step`) and no bar.

    begins_with: the phase that a step begins with (`watch.enter`). SystemExit after the checkpoint of a step (see
    `checkpoints.due`) in which a signal has asked the run to stop.
    """

    def steps():
        with stop_on_signal():
            for step in range(first_step, last_step):
                enter(begins_with, step + 1)
                yield step
                if step + 1 < last_step:
                    end_if_stopped(step + 1)
        enter("what follows the last step")

    quiet = ranks.rank > 0 or not sys.stderr.isatty()
    return tqdm(steps(), initial=first_step, total=last_step, disable=quiet)


LINE_EVERY = 30  # seconds


@contextlib.contextmanager
def counting(
    total: int, what: str, quiet: bool = False, figures: Callable[[], str] = str
) -> Iterator[Callable[[], None]]:
    """-> done(), called for each of `total`: a bar on a terminal, in a log file a line now and then and at the end.

    figures() -> text that the line or bar ends with.
    """
    if quiet or sys.stderr.isatty():
        with tqdm(total=total, desc=what, disable=quiet) as bar:

            def advance():
                bar.set_postfix_str(figures(), refresh=False)
                bar.update()

            yield advance
        return
    count, started = 0, time.monotonic()
    said = started

    def done():
        nonlocal count, said
        count, now = count + 1, time.monotonic()
        if count == total or now - said > LINE_EVERY:
            said = now
            left = (now - started) / count * (total - count)
            parts = [f"{what}: {count} of {total}", figures(), f"{left:.0f} s left" if left else ""]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    yield done


def print_step(bar: tqdm, step: int, last_step: int, figures: dict[str, float | None]) -> None:
    """One readable line a step: "step 12/40  reward 3.21  seconds 2.4"."""
    known = {name: value for name, value in figures.items() if value is not None}
    text = "  ".join(f"{name} {value:.4g}" for name, value in known.items())
    if not dist.is_initialized() or dist.get_rank() == 0:
        bar.write(f"step {step}/{last_step}  {text}")
        sys.stdout.flush()


def log_metrics(out: str, metrics: dict, ranks: Ranks) -> None:
    """Appends one line to metrics.jsonl; numbers that do not exist in a step (no edit in it, say) are null."""
    if ranks.rank == 0:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        clean["bad_steps"] = count_bad_steps(out, metrics["step"])
        append_line(os.path.join(out, "metrics.jsonl"), json.dumps(clean))
        known = {k: v for k, v in clean.items() if v is not None}
        for tracker in trackers.opened:
            tracker.figures(known)


def count_bad_steps(out: str, step: int) -> int:
    """Updates that were left out up to this step, of which `training.optimizer_step` keeps a file each."""
    files = glob.glob(f"{glob.escape(out)}/bad_steps/step_*.jsonl")
    return sum(os.path.basename(file)[:11] <= f"step_{step:06d}" for file in files)


def write_step(out: str, kind: str, step: int, rows: list[dict], ranks: Ranks) -> None:
    """The rows of all ranks as OUT/KIND/step_NNNNNN.jsonl."""
    rows = all_gather(ranks, rows)
    if ranks.rank == 0:
        path = os.path.join(out, kind, f"step_{step:06d}.jsonl")
        write_rows(path, rows)
        for tracker in trackers.opened:
            tracker.rows(kind, step, rows, path)


def print_end(out: str, weights: str, next_command: str) -> None:
    """The last lines of a stage: where everything lies, and what to run next."""
    print0(f"done: {out}/{weights} (weights), {out}/metrics.jsonl (a line a step), {out}/args.json (flags)")
    print0(f"  look at it: python report.py {out}\n  next:       {next_command}")
