"""Weights & Biases and TensorBoard: metrics and rollouts of a run go there too (--wandb, --tensorboard).

The run does not depend on them: an error in one of them is printed, and the run goes on.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kernels.varlen_attention import say_once
from runtime.flags import RuntimeArgs
from runtime.rows import write_text

opened: list["_Wandb | _TensorBoard"] = []  # of this process, which is rank 0


def open_trackers(out: str, args: RuntimeArgs) -> None:
    """Opens what --wandb and --tensorboard name. ValueError: the package is not installed."""
    opened.clear()
    if args.wandb:
        wandb = _optional("wandb", "wandb", f"--wandb {args.wandb}")
        with _no_error_ends_the_run("--wandb"):
            opened.append(_Wandb(wandb, out, args))
    if args.tensorboard:
        tensorboard = _optional("tensorboard", "torch.utils.tensorboard", "--tensorboard")
        opened.append(_TensorBoard(tensorboard, os.path.join(out, "tensorboard")))


def log_metrics(metrics: dict[str, Any]) -> None:
    """metrics: one line of metrics.jsonl. Figures that the step does not have are left out."""
    for tracker in opened:
        with _no_error_ends_the_run(tracker.flag):
            tracker.log_metrics({name: value for name, value in metrics.items() if value is not None})


def log_rows(kind: str, step: int, rows: list[dict], path: str) -> None:
    """The rows of a step, which the file `path` holds."""
    for tracker in opened:
        with _no_error_ends_the_run(tracker.flag):
            tracker.log_rows(kind, step, rows, path)


@contextlib.contextmanager
def _no_error_ends_the_run(flag: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind: it comes from a library, a network or a disk
        say_once(f"warning: {flag} failed ({type(error).__name__}: {error}); the run goes on")


def _optional(package: str, name: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(
            f"{flag} needs the package {package}, which is not installed: pip install {package}"
        ) from error


class _Wandb:
    """One W&B run a run folder, also after it is continued; each step's rows are a table, and a file beside it."""

    flag = "--wandb"

    def __init__(self, wandb: Any, out: str, args: RuntimeArgs):
        self.wandb = wandb
        id_file = os.path.join(out, "wandb_id")
        before = None
        if os.path.isfile(id_file):
            with open(id_file) as f:
                before = f.read().strip()
        name = os.path.basename(os.path.normpath(out))
        config = dataclasses.asdict(args)
        self.run = wandb.init(project=args.wandb, name=name, id=before, resume="allow", dir=out, config=config)
        self.out = out
        write_text(id_file, self.run.id + "\n")
        # its own steps may not go back, and steps that a killed run had logged run again
        self.run.define_metric("*", step_metric="step")

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        self.run.log(metrics)

    def log_rows(self, kind: str, step: int, rows: list[dict], path: str) -> None:
        columns = sorted({name for row in rows for name in row})
        cells = []
        for row in rows:
            values = [row.get(name) for name in columns]
            cells.append([json.dumps(value) if isinstance(value, (dict, list)) else value for value in values])
        # a field may be a number in one row and text in another
        table = self.wandb.Table(columns=columns, data=cells, allow_mixed_types=True)
        self.run.log({kind: table, "step": step})
        self.run.save(path, base_path=self.out, policy="now")  # the panel shows the newest table: here are all


class _TensorBoard:
    """Scalars, and each step's rows as text."""

    flag = "--tensorboard"

    def __init__(self, tensorboard: Any, folder: str):
        self.open = functools.partial(tensorboard.SummaryWriter, folder)
        self.writer: Any = None

    def log_metrics(self, metrics: dict[str, Any]) -> None:
        self.open_at(metrics["step"])
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, metrics["step"])
        self.writer.flush()

    def log_rows(self, kind: str, step: int, rows: list[dict], path: str) -> None:
        self.open_at(step)
        text = json.dumps(rows, ensure_ascii=False, indent=2)
        self.writer.add_text(kind, "    " + text.replace("\n", "\n    "), step)  # Markdown: code, as it stands

    def open_at(self, step: int) -> None:
        """Opens the writer at its first use. What a killed run had logged from this step on is run again."""
        if self.writer is None:
            self.writer = self.open(purge_step=step)
