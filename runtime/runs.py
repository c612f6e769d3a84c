"""A run folder: flags and inputs, metrics, rows of steps, and checkpoints from which the same command continues."""

import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import importlib
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
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from model import save_pretrained
from runtime.distributed import Ranks, all_gather, all_max, all_sum, barrier, print0
from runtime.flags import flag, may_change
from runtime.rows import write_rows, write_text

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
        content = {**dataclasses.asdict(args), "inputs": inputs, "git": git_hash()}
        write_text(file, json.dumps(content, indent=2))
        _open_trackers(args)
    barrier(ranks)
    print0(f"output: {args.out}/ (args.json, metrics.jsonl, checkpoints/)")


def _read_args(file):
    try:
        with open(file, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}: not the flags of a run ({error}); remove the folder or choose another --out"
        ) from error


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
        self.flops, self.logical_tokens, self.computed_tokens = 0, 0, 0  # of this rank's passes

    def add(self, name: str, values: torch.Tensor) -> None:
        total = self.sums[name]
        total[0] += values.double().sum().item()
        total[1] += values.numel()

    def add_max(self, name: str, values: torch.Tensor) -> None:
        self.largest[name] = max([self.largest[name], *([values.max().item()] if values.numel() else [])])

    def means(self, ranks: Ranks) -> dict[str, float | None]:
        names = sorted(set(all_gather(ranks, self.sums)))  # a rank may have met no edit, say
        totals = all_sum(ranks, *(x for name in names for x in self.sums[name]))
        means = {n: totals[2 * i] / totals[2 * i + 1] if totals[2 * i + 1] else None for i, n in enumerate(names)}
        largest = sorted(set(all_gather(ranks, self.largest)))
        return means | {name: all_max(ranks, self.largest[name]) for name in largest}


def progress(first_step: int, last_step: int, ranks: Ranks) -> tqdm:
    """The steps of a run, with a bar on a terminal; a log file gets a line a step (`print_step`) and no bar."""
    quiet = ranks.rank > 0 or not sys.stderr.isatty()
    return tqdm(range(first_step, last_step), initial=first_step, total=last_step, disable=quiet)


LINE_EVERY = 30  # seconds


@contextlib.contextmanager
def counting(total: int, what: str, quiet: bool = False) -> Iterator[Callable[[], None]]:
    """-> done(), called for each of `total`: a bar on a terminal, in a log file a line now and then and at the end."""
    if quiet or sys.stderr.isatty():
        with tqdm(total=total, desc=what, disable=quiet) as bar:
            yield lambda: bar.update()
        return
    count, started = 0, time.monotonic()
    said = started

    def done():
        nonlocal count, said
        count, now = count + 1, time.monotonic()
        if count == total or now - said > LINE_EVERY:
            said = now
            left = (now - started) / count * (total - count)
            print(f"{what}: {count} of {total}" + (f", {left:.0f} s left" if left else ""), file=sys.stderr, flush=True)

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
        with open(os.path.join(out, "metrics.jsonl"), "a") as f:
            f.write(json.dumps(clean) + "\n")
        known = {k: v for k, v in clean.items() if v is not None}
        for tracker in _trackers:
            tracker.figures(known)


def write_step(out: str, kind: str, step: int, rows: list[dict], ranks: Ranks) -> None:
    """The rows of all ranks as OUT/KIND/step_NNNNNN.jsonl."""
    rows = all_gather(ranks, rows)
    if ranks.rank == 0:
        path = os.path.join(out, kind, f"step_{step:06d}.jsonl")
        write_rows(path, rows)
        for tracker in _trackers:
            tracker.rows(kind, step, rows, path)


def print_end(out: str, weights: str, next_command: str) -> None:
    """The last lines of a stage: where everything lies, and what to run next."""
    print0(f"done: {out}/{weights} (weights), {out}/metrics.jsonl (a line a step), {out}/args.json (flags)")
    print0(f"  look at it: python report.py {out}\n  next:       {next_command}")


# -- Weights & Biases, TensorBoard -------------------------------------------------------------------------------------

_trackers = []  # of this process, which is rank 0


def _optional(package, name, why):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{why} needs the package {package}, which is not installed: pip install {package}") from error


def _open_trackers(args):
    _trackers.clear()
    if args.wandb:
        _trackers.append(_Wandb(_optional("wandb", "wandb", f"--wandb {args.wandb}"), args))
    if args.tensorboard:
        writer = _optional("tensorboard", "torch.utils.tensorboard", "--tensorboard").SummaryWriter
        _trackers.append(_TensorBoard(writer, os.path.join(args.out, "tensorboard")))


class _Wandb:
    """One W&B run a run folder, also after it is continued; each step's rows are a table, and a file beside it."""

    def __init__(self, wandb, args):
        self.wandb, id_file = wandb, os.path.join(args.out, "wandb_id")
        before = None
        if os.path.isfile(id_file):
            with open(id_file) as f:
                before = f.read().strip()
        name = os.path.basename(os.path.normpath(args.out))
        config = dataclasses.asdict(args)
        self.run = wandb.init(project=args.wandb, name=name, id=before, resume="allow", dir=args.out, config=config)
        self.out = args.out
        write_text(id_file, self.run.id + "\n")

    def figures(self, metrics):
        self.run.log(metrics, step=metrics["step"])

    def rows(self, kind, step, rows, path):
        columns = sorted({name for row in rows for name in row})
        cells = [
            [c if isinstance(c, (str, int, float)) else json.dumps(c) for c in map(row.get, columns)] for row in rows
        ]
        self.run.log({kind: self.wandb.Table(columns=columns, data=cells)}, step=step)
        self.run.save(path, base_path=self.out, policy="now")  # the panel shows the newest table: here are all


class _TensorBoard:
    """Scalars, and each step's rows as text."""

    def __init__(self, writer, folder):
        self.open, self.writer = functools.partial(writer, folder), None

    def figures(self, metrics):
        if self.writer is None:  # what a killed run had logged beyond its checkpoint is run again
            self.writer = self.open(purge_step=metrics["step"])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def rows(self, kind, step, rows, path):
        if self.writer is None:
            self.writer = self.open(purge_step=step)
        text = json.dumps(rows, ensure_ascii=False, indent=2)
        self.writer.add_text(kind, "    " + text.replace("\n", "\n    "), step)  # Markdown: code, as it stands


# -- checkpoints -------------------------------------------------------------------------------------------------------


def _train_state(models, optimizers):
    state = {}
    for name, model in models.items():
        state[f"{name}.model"] = get_model_state_dict(model)
        state[f"{name}.optimizer"] = get_optimizer_state_dict(model, optimizers[name])
    return state


def save_checkpoint(
    out: str,
    step: int,
    models: dict[str, torch.nn.Module],
    optimizers: dict[str, torch.optim.Optimizer],
    tokenizer_from: str,
    templates: dict[str, str],
    ranks: Ranks,
    keep: int,
) -> None:
    """Writes out/checkpoints/step_NNNNNN, then points out/NAME at its models; appears whole or not at all.

    models: {"policy": model, "critic": model, ...}. Each is stored twice: as a folder that other tools load, in the
    compute dtype, and with its optimizer as fp32 masters (torch.distributed.checkpoint), from which a run resumes on
    any number of ranks. Only the newest `keep` are kept. templates: see `model.save_pretrained`.
    """
    final = os.path.join(out, "checkpoints", f"step_{step:06d}")
    tmp = f"{final}.tmp"
    if ranks.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        os.makedirs(tmp)
    barrier(ranks)
    for name, model in models.items():
        save_pretrained(model, os.path.join(tmp, name), tokenizer_from, ranks.dtype, templates)
    dcp.save(_train_state(models, optimizers), checkpoint_id=os.path.join(tmp, "train_state"))
    barrier(ranks)
    if ranks.rank == 0:
        with open(os.path.join(tmp, "state.json"), "w") as f:
            json.dump({"step": step, "git": git_hash()}, f)
        os.rename(tmp, final)
        _link_newest(out, models)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    barrier(ranks)


def _link_newest(out, names):
    """Points out/NAME at the newest checkpoint's models."""
    newest = os.path.basename(_checkpoints(out)[-1])
    for name in names:
        link = os.path.join(out, name)
        if os.path.isdir(link) and not os.path.islink(link):  # the run folder was copied with its links followed
            shutil.rmtree(f"{link}.copied", ignore_errors=True)
            os.rename(link, f"{link}.copied")
            print0(f"{link} was a folder, not a link to the newest checkpoint: moved to {link}.copied")
        if os.path.lexists(f"{link}.tmp"):
            os.unlink(f"{link}.tmp")
        os.symlink(os.path.join("checkpoints", newest, name), f"{link}.tmp")
        os.replace(f"{link}.tmp", link)


def _checkpoints(out):
    folder = os.path.join(out, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if n.startswith("step_") and not n.endswith(".tmp"))
    return [os.path.join(folder, n) for n in names]


def load_checkpoint(
    out: str, models: dict[str, torch.nn.Module], optimizers: dict[str, torch.optim.Optimizer], ranks: Ranks
) -> int:
    """Continues from the newest checkpoint: fills models and optimizers in place -> steps done (0: none there).

    Lines of metrics.jsonl from after that checkpoint are dropped: their steps will be run again. The links to its
    models are made again, since a run may have been killed between a checkpoint and its links.
    """
    found = _checkpoints(out)
    step = 0
    if found:
        with open(os.path.join(found[-1], "state.json")) as f:
            step = json.load(f)["step"]
        state = _train_state(models, optimizers)
        dcp.load(state, checkpoint_id=os.path.join(found[-1], "train_state"))
        for name, model in models.items():
            set_model_state_dict(model, state[f"{name}.model"])
            set_optimizer_state_dict(model, optimizers[name], state[f"{name}.optimizer"])
        if ranks.rank == 0:
            _link_newest(out, models)
        print0(f"resumed from {found[-1]}")
    metrics = os.path.join(out, "metrics.jsonl")
    if ranks.rank == 0 and os.path.isfile(metrics):
        with open(metrics) as f:  # a killed run may have left half a line
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(metrics, "".join(lines))
    barrier(ranks)
    return step
