"""A training run: its folder, phases, metrics and checkpoints. All training scripts share this."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import IO, Any

import torch
from tqdm import tqdm

from model import Transformer
from runtime import checkpoints, model_card, trackers
from runtime.digests import git_hash
from runtime.distributed import Ranks, all_gather, barrier, print0
from runtime.flags import RuntimeArgs, flag, may_change, non_default, record, script_of
from runtime.rows import append_line, step_files, write_rows, write_text
from runtime.signals import end_if_stopped, should_stop, stop_on_signal
from runtime.watch import set_phase, shared


class Run:
    """Opens or continues the run in folder `out`.

        run = Run(args.out, args, ranks, inputs, last_step)
        run.resume(models, optimizers, tokenizer_from, templates)
        for step in run.steps():
            with run.phase("update"):
                ...
            run.log(metrics, headline)
            run.save_if_due()
        run.finish("policy", next_command)

    inputs: {flag or name: digest} of everything that the run reads (runtime/digests.py). A flag that a continuation may
    change is named with its value. last_step: where it ends.
    step: the current step, from 0. seconds: {phase: seconds} of the current step.
    ValueError: the ranks have different flags or inputs, the folder holds a run with others, or another process is
    running in it.
    """

    def __init__(self, out: str, args: RuntimeArgs, ranks: Ranks, inputs: dict[str, str], last_step: int):
        self.out = out
        self.args = args
        self.inputs = inputs
        self.ranks = ranks
        self.last_step = last_step
        self.step = 0
        self.seconds: dict[str, float] = {}
        self.saving: checkpoints.Saving | None = None
        self.staging: dict[str, torch.Tensor] = {}  # host memory of --save-in-background
        self.bar: tqdm | None = None
        if args.push_to_hub:
            model_card.check_hub(args.push_to_hub)
        file = os.path.join(out, "args.json")
        flags_of_run = json.loads(json.dumps(dataclasses.asdict(args)))
        _check_same_on_ranks(flags_of_run, inputs, ranks)
        continued = os.path.isfile(file)
        if not continued and checkpoints.finished(out):
            raise ValueError(
                f"{out} holds checkpoints without args.json, so nothing says which flags and inputs they come from; "
                "choose another --out or remove it"
            )
        if continued:
            _check_unchanged(out, _read_args(file), flags_of_run, args, inputs)
        if ranks.rank == 0:
            os.makedirs(os.path.join(out, "checkpoints"), exist_ok=True)
            _lock(out)
            if continued:
                _remove_unfinished(out)
            content = record(args) | {"inputs": inputs, "git": git_hash(), "script": script_of(args)}
            write_text(file, json.dumps(content, indent=2))
            trackers.open_trackers(out, args)
        barrier(ranks)
        print0(f"output: {out}/ (args.json, metrics.jsonl, checkpoints/)")

    def resume(
        self,
        models: dict[str, Transformer],
        optimizers: Mapping[str, torch.optim.Optimizer],
        tokenizer_from: str,
        templates: dict[str, str],
    ) -> None:
        """Fills models and optimizers from the newest checkpoint, if there is one. Later checkpoints hold the same
        models, with the tokenizer of the folder `tokenizer_from` and the templates."""
        self.models = models
        self.optimizers = optimizers
        self.tokenizer_from = tokenizer_from
        self.templates = templates
        self.first_step = checkpoints.load(self.out, models, optimizers, self.ranks, self.args.offload)
        self.step = self.first_step
        if self.first_step >= self.last_step:
            print0(f"{self.out} is finished already, with {self.first_step} steps")

    def steps(self) -> Iterator[int]:
        """The steps that are left, with a bar on a terminal. SystemExit: stopped by a signal, after a checkpoint."""
        quiet = self.ranks.rank > 0 or not sys.stderr.isatty()
        with stop_on_signal(), tqdm(initial=self.first_step, total=self.last_step, disable=quiet) as self.bar:
            for step in range(self.first_step, self.last_step):
                self.step = step
                self.seconds = {}
                yield step
                self.bar.update()
                if step + 1 < self.last_step:
                    end_if_stopped(step + 1)
        set_phase("what follows the last step")

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures a phase of the step, and tells the other ranks about it (runtime/watch.py)."""
        self.complete_if_written()
        self.show(set_phase(name, self.step + 1))
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started

    def show(self, text: str) -> None:
        """Text at the end of the bar."""
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def log(self, metrics: Mapping[str, Any], headline: Mapping[str, float | None]) -> None:
        """Appends a line to metrics.jsonl and prints one: "step 12/40  reward 3.21  seconds 2.4".

        Figures that a step does not have (None, not finite) are null in the file and left out in the print.
        """
        if self.ranks.rank > 0:
            return
        line: dict[str, Any] = {"step": self.step + 1}
        for name, value in metrics.items():
            line[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        line["bad_steps"] = count_bad_steps(self.out, self.step + 1)
        append_line(os.path.join(self.out, "metrics.jsonl"), json.dumps(line))
        trackers.log_metrics(line)
        known = {name: value for name, value in headline.items() if value is not None and math.isfinite(value)}
        figures = [f"{name} {value:.4g}" for name, value in known.items()]
        tqdm.write("  ".join([f"step {self.step + 1}/{self.last_step}", *figures]))
        sys.stdout.flush()

    def write_rows(self, kind: str, rows: list[dict]) -> None:
        """Writes the rows of all ranks to OUT/KIND/step_NNNNNN.jsonl."""
        rows = all_gather(self.ranks, rows)
        if self.ranks.rank == 0:
            path = os.path.join(self.out, kind, f"step_{self.step + 1:06d}.jsonl")
            write_rows(path, rows)
            trackers.log_rows(kind, self.step + 1, rows, path)

    def save_if_due(self) -> None:
        """Saves every --save-every steps, after the last step, and when a signal has asked any rank to stop."""
        done = self.step + 1
        # asked on every rank after every step, whatever the others say
        is_last = should_stop(self.ranks) or done == self.last_step
        if is_last or done % self.args.save_every == 0:
            self.save(done, self.args.save_in_background and not is_last)
        else:
            self.complete_if_written()

    def save(self, steps_done: int, in_background: bool = False) -> None:
        self.complete_saving()
        if not in_background:
            self.staging.clear()
        self.saving = checkpoints.Saving(
            self.out,
            steps_done,
            self.models,
            self.optimizers,
            self.tokenizer_from,
            self.templates,
            self.args.keep_checkpoints,
            self.ranks,
            self.staging if in_background else None,
        )
        if not in_background:
            self.complete_saving()

    def complete_if_written(self) -> None:
        if self.saving is not None and all(all_gather(self.ranks, [self.saving.is_written()])):
            self.complete_saving()

    def complete_saving(self) -> None:
        """Waits for a checkpoint that is being written."""
        saving = self.saving
        self.saving = None
        if saving is not None:
            saving.complete()

    def release_models(self) -> None:
        """Drops models and optimizers, after the last step, to free their memory."""
        self.models = {}
        self.optimizers = {}

    def stop_if(self, reasons: list[str]) -> None:
        """ValueError on all ranks if any of them has a reason. The steps before this one are saved first."""
        reasons = all_gather(self.ranks, reasons)
        if not reasons:
            return
        self.complete_saving()
        saved = os.path.isdir(os.path.join(self.out, "checkpoints", f"step_{self.step:06d}"))
        if self.step > 0 and not saved:
            self.save(self.step)
        raise shared(ValueError(f"step {self.step + 1}: {reasons[0]}; what is done is saved, the same command goes on"))

    def finish(self, weights: str, next_command: str) -> None:
        """Writes the model card of the last weights, uploads both (--push-to-hub), prints what to run next."""
        out = self.out
        folder = os.path.realpath(os.path.join(out, weights))
        if self.ranks.rank == 0:
            card = model_card.model_card(out, self.args, self.inputs, self.tokenizer_from)
            write_text(os.path.join(folder, "README.md"), card)
            if self.args.push_to_hub:
                print(f"pushed: {model_card.push(folder, self.args.push_to_hub)}")
        print0(f"done: {out}/{weights} (weights), {out}/metrics.jsonl (a line a step), {out}/args.json (flags)")
        print0(f"  look at it: python report.py {out}\n  next:       {next_command}")


def count_bad_steps(out: str, step: int) -> int:
    """Updates left out up to this step; `training.optimizer_step` writes a file for each."""
    return sum(of_step <= step for of_step, _ in step_files(out, "bad_steps", r"\w*"))


# -- the folder --------------------------------------------------------------------------------------------------------


def _check_unchanged(out: str, before: dict, now: dict, args: RuntimeArgs, inputs: dict[str, str]) -> None:
    """ValueError: the run in the folder is another script's, or has other flags or inputs.

    before, now: the flags as JSON has them; before also has what args.json holds beside them.
    """
    elsewhere = "choose another --out or remove it"
    script = script_of(args)
    if before.get("script", script) != script:
        raise ValueError(f"{out} holds a run of {before['script']}, not of {script}; {elsewhere}")
    free = may_change(type(args)) | {"out"}
    gone = sorted(set(before) - set(now) - {"non_default", "inputs", "git", "script"})
    new = [name for name in non_default(args) if name not in free and name not in before]
    if gone or new:
        names = ", ".join(map(flag, gone or new))
        which = "flags that this one does not have" if gone else "no such flags"
        raise ValueError(f"{out} holds a run of another version, with {which} ({names}); {elsewhere}")
    changed = [name for name in now if name not in free and name in before and before[name] != now[name]]
    if changed:
        was = ", ".join(f"{flag(name)} {before[name]} -> {now[name]}" for name in changed)
        raise ValueError(f"{out} holds a run with other flags ({was}); {elsewhere}")
    known = before.get("inputs", {})
    changed = [name for name, digest in inputs.items() if known.get(name, digest) != digest]
    if changed:
        raise ValueError(
            f"{out} holds a run on other inputs: what {', '.join(changed)} names has changed since; {elsewhere}"
        )


def _read_args(file: str) -> dict:
    try:
        with open(file, encoding="utf-8") as f:
            return dict(json.load(f))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file}: not the flags of a run ({error}); remove the folder or choose another --out"
        ) from error


def _check_same_on_ranks(flags_of_run: dict, inputs: dict[str, str], ranks: Ranks) -> None:
    """ValueError: a rank was started with other flags, or reads other data, than rank 0."""
    mine = {
        **{flag(name): value for name, value in flags_of_run.items()},
        **{f"the input {k}": inputs[k] for k in inputs},
    }
    first, *others = all_gather(ranks, [mine])
    for rank, other in enumerate(others, 1):
        different = [
            f"{name} is {first[name]} there and {other[name]} here" for name in first if other[name] != first[name]
        ]
        if different:
            raise shared(ValueError(f"rank {rank} differs from rank 0: {', '.join(different)}; start all ranks alike"))


UNFINISHED = re.compile(r"(args\.json|reference\.json|metrics\.jsonl|[^/]+/step_\d{6,}\w*(\.jsonl)?)\.tmp")


def _remove_unfinished(out: str) -> None:
    """Removes the files that a killed run had begun to write or to remove: only names that a run gives."""
    for path in [*glob.glob(f"{glob.escape(out)}/*.tmp"), *glob.glob(f"{glob.escape(out)}/*/*.tmp")]:
        if os.path.islink(path):
            if os.readlink(path).startswith("checkpoints/"):
                os.unlink(path)
        elif UNFINISHED.fullmatch(os.path.relpath(path, out)):
            if os.path.isdir(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


_locks: dict[str, IO] = {}  # path -> file held open: the lock, which the system releases when the process ends


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
