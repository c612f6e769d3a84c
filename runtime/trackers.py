"""Weights & Biases and TensorBoard: metrics and rollouts of a run go there too (--wandb, --tensorboard)."""

import dataclasses
import functools
import importlib
import json
import os

from runtime.flags import RuntimeArgs
from runtime.rows import write_text

opened: list[
    "_Wandb | _TensorBoard"
] = []  # of this process, which is rank 0; `runs` gives each every step's metrics and rows


def _optional(package, name, why):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"{why} needs the package {package}, which is not installed: pip install {package}") from error


def open_trackers(out: str, args: RuntimeArgs) -> None:
    """Opens what --wandb and --tensorboard name. ValueError: the package is not installed."""
    opened.clear()
    if args.wandb:
        opened.append(_Wandb(_optional("wandb", "wandb", f"--wandb {args.wandb}"), out, args))
    if args.tensorboard:
        writer = _optional("tensorboard", "torch.utils.tensorboard", "--tensorboard").SummaryWriter
        opened.append(_TensorBoard(writer, os.path.join(out, "tensorboard")))


class _Wandb:
    """One W&B run a run folder, also after it is continued; each step's rows are a table, and a file beside it."""

    def __init__(self, wandb, out, args):
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
