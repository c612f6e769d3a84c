"""Checkpoints of a run. One is complete or absent, its files have digests, and any number of ranks can load it.

    OUT/checkpoints/step_000100/
        NAME/         each model in the compute dtype, as a folder that other tools load; OUT/NAME links to the newest
        train_state/  trainable weights (fp32) and optimizer state: the shards of each rank (safetensors), index.json
        state.json    the step, the commit, and the digest of every file, which is compared before any is read

A checkpoint is written under another name (.tmp), flushed to the disk, then renamed. Older checkpoints are removed
after that. Nothing in it is pickled, so loading one runs no foreign code.
"""

import contextlib
import functools
import glob
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor

from model import Transformer, gathered_weights, write_pretrained
from runtime.digests import git_hash, is_whole, sealed
from runtime.distributed import Ranks, all_gather, barrier, print0
from runtime.offload import move_moments, to_host
from runtime.rows import check_row, json_lines, step_files, sync, write_rows, write_text
from runtime.watch import set_phase, shared
from weights import GIB, write_tensors

PART_BYTES = 2**31  # size of a file of trainer state; host memory holds one such part at a time


# -- trainer state: what each rank holds of each tensor ----------------------------------------------------------------


def _trainable(model):
    """(name, parameter) in the order of the optimizer. Frozen parameters come from the model's folder instead."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _tensors(models, optimizers) -> Iterator[tuple[str, torch.Tensor]]:
    """("policy/model.norm.weight", masters) and ("policy/model.norm.weight/exp_avg", state of its optimizer), ..."""
    for name, model in models.items():
        for parameter_name, parameter in _trainable(model):
            yield f"{name}/{parameter_name}", parameter.detach()
            for kind, value in optimizers[name].state.get(parameter, {}).items():
                yield f"{name}/{parameter_name}/{kind}", value


def _piece(tensor: torch.Tensor, ranks: Ranks) -> tuple[torch.Tensor, int, bool]:
    """This rank's piece of a tensor: (local tensor, its first row in the whole, whether this rank writes it).

    FSDP2 gives the ranks of a copy consecutive rows; the copies of HSDP hold the same.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0, ranks.rank == 0
    first = 0
    writes = True
    for dim, placement in enumerate(tensor.placements):
        place = tensor.device_mesh.get_local_rank(dim)
        size = tensor.device_mesh.size(dim)
        if placement.is_replicate():
            writes &= place == 0
        elif placement.is_shard(0):
            first = min(place * -(-len(tensor) // size), len(tensor))
        else:
            raise ValueError(f"a checkpoint of tensors that are placed as {placement} is not written")
    return tensor.to_local(), first, writes


Part = dict[str, torch.Tensor]
ToHost = Callable[[str, torch.Tensor], torch.Tensor]


def _train_state(models: Mapping, optimizers: Mapping, ranks: Ranks, to_host: ToHost) -> tuple[list[Part], dict]:
    """This rank's shards, a part for each file, and {tensor: [its whole shape, {file: first row of the piece}]}."""
    parts: list[Part] = [{}]
    index: dict[str, list] = {}
    size = 0
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # moments may still be on their way to the host (--offload)
    for key, tensor in _tensors(models, optimizers):
        local, first, writes = _piece(tensor, ranks)
        if not writes or local.numel() == 0:
            continue
        if parts[-1] and size + local.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        size += local.nbytes
        parts[-1][key] = to_host(key, local)
        index[key] = [list(tensor.shape), {_shard_file(ranks, len(parts) - 1): first}]
    return parts, index


def _shard_file(ranks: Ranks, number: int) -> str:
    return f"rank{ranks.rank:05d}_{number:03d}.safetensors"


def _write_parts(folder: str, parts: list[Part], ranks: Ranks) -> None:
    for i, part in enumerate(parts):
        content = {key: local.cpu().contiguous() for key, local in part.items()}
        write_tensors(content, os.path.join(folder, _shard_file(ranks, i)))
        del content  # before the next is made


def _read_train_state(folder: str, models: Mapping, optimizers: Mapping, ranks: Ranks, offloads: bool) -> None:
    """Fills models and optimizers in place, from the pieces of however many ranks.

    offloads: moments go to host memory, those of one model before the next is read.
    """
    with open(os.path.join(folder, "index.json")) as f:
        index = json.load(f)
    with contextlib.ExitStack() as stack:
        names = sorted({name for _, pieces in index.values() for name in pieces})
        files = {name: stack.enter_context(safe_open(os.path.join(folder, name), "pt")) for name in names}

        def fill(key, tensor):
            shape, pieces = index.get(key, (None, {}))
            if shape != list(tensor.shape):
                raise ValueError(f"{folder}: {key} has shape {shape} there, {list(tensor.shape)} in this run")
            local, first, _ = _piece(tensor, ranks)
            filled = 0
            for name, start in pieces.items():
                if not shape:
                    local.copy_(files[name].get_tensor(key))
                    continue
                piece = files[name].get_slice(key)
                low = max(first, start)
                high = min(first + len(local), start + piece.get_shape()[0])
                if low < high:
                    local[low - first : high - first].copy_(piece[low - start : high - start])
                    filled += high - low
            if shape and filled != len(local):
                raise ValueError(f"{folder}: {key} has {filled} of the {len(local)} rows of this rank")
            return tensor

        kinds: defaultdict[tuple[str, str], dict[str, list[int]]] = defaultdict(dict)  # {"exp_avg": its shape, ...}
        for key, (shape, _) in index.items():
            name, parameter_name, *kind = key.split("/")
            if kind:
                kinds[name, parameter_name][kind[0]] = shape
        for name, model in models.items():
            state: dict[int, dict[str, torch.Tensor]] = {}
            for i, (parameter_name, parameter) in enumerate(_trainable(model)):
                fill(f"{name}/{parameter_name}", parameter.detach())
                for kind, shape in kinds[name, parameter_name].items():
                    alike = shape == list(parameter.shape)  # moments; the other is a count of steps
                    value = torch.empty_like(parameter.detach()) if alike else torch.empty(shape)
                    state.setdefault(i, {})[kind] = fill(f"{name}/{parameter_name}/{kind}", value)
            optimizers[name].load_state_dict({**optimizers[name].state_dict(), "state": state})
            del state  # on the device; the optimizer may have its own
            if offloads:
                move_moments(optimizers[name], to_host)


# -- files: on the disk, with digests ----------------------------------------------------------------------------------


def _digest(file: str) -> str:
    with open(file, "rb") as f:
        return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _files(folder: str) -> list[str]:
    """All files below a folder, relative to it."""
    found = [os.path.join(top, name) for top, _, names in os.walk(folder) for name in names]
    return sorted(os.path.relpath(file, folder) for file in found)


def _flush(folder: str, files: list[str]) -> dict[str, str]:
    """Flushes files to the disk and returns their digests."""

    def flush(name):
        sync(os.path.join(folder, name))
        return _digest(os.path.join(folder, name))

    with ThreadPoolExecutor() as pool:  # both let other threads run
        return dict(zip(files, pool.map(flush, files)))


def _damage(folder: str, ranks: Ranks) -> list[str]:
    """Describes the damage of a checkpoint ([]: none). Each rank checks a part of the files; all get the result."""
    mine = ["state.json is damaged or missing"]
    files: dict[str, str] = {}
    try:
        with open(os.path.join(folder, "state.json")) as f:
            state = json.load(f)
        if is_whole(state) and state["step"] == _step(folder):
            files = dict(state["files"])
            mine = []
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        pass  # not such a file

    def check(name: str) -> list[str]:
        try:
            return [] if _digest(os.path.join(folder, name)) == files[name] else [f"{name} is damaged"]
        except FileNotFoundError:
            return [f"{name} is missing"]
        except OSError as error:
            return [f"{name} cannot be read ({error.strerror})"]

    with ThreadPoolExecutor() as pool:
        for found in pool.map(check, sorted(files)[ranks.rank :: ranks.world_size]):
            mine += found
    return sorted(set(all_gather(ranks, mine)))


def _step(folder):
    return int(folder.rpartition("_")[2])


def finished(out: str) -> list[str]:
    """Folders of the finished checkpoints, oldest first."""
    return sorted(f for f in glob.glob(f"{glob.escape(out)}/checkpoints/step_*") if re.search(r"/step_\d{6,}$", f))


# -- a whole checkpoint ------------------------------------------------------------------------------------------------


def _staged(staging: Part, key: str, tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy to pinned host memory, which the next checkpoint overwrites."""
    if key not in staging:
        staging[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return staging[key].copy_(tensor, non_blocking=True)


class Saving:
    """Writes OUT/checkpoints/step_NNNNNN, points OUT/NAME at its models, removes all but the newest `keep`.

        saving = Saving(..., staging)    # copies everything to host memory; a thread writes it
        saving.is_written()              # on this rank
        saving.complete()                # waits, then makes it a checkpoint

    models: {"policy": model, "critic": model, ...}. templates: see `model.save_pretrained`. staging: memory of the
    copies, which the next checkpoint uses again, so complete one before the next begins. None: files are written at
    once, and host memory holds one model or part at a time. Every rank makes these calls. OSError on every rank: one of
    them could not write; what was there before is whole.
    """

    def __init__(
        self,
        out: str,
        step: int,
        models: Mapping[str, Transformer],
        optimizers: Mapping[str, torch.optim.Optimizer],
        tokenizer_from: str,
        templates: dict[str, str],
        keep: int,
        ranks: Ranks,
        staging: Part | None = None,
    ):
        set_phase("checkpoint", step)
        self.out = out
        self.step = step
        self.names = list(models)
        self.keep = keep
        self.ranks = ranks
        self.final = os.path.join(out, "checkpoints", f"step_{step:06d}")
        self.tmp = f"{self.final}.tmp"
        train_state = os.path.join(self.tmp, "train_state")
        jobs: list[Callable[[], Any]] = []  # writing, which the other ranks have no part in

        def write(job: Callable[..., Any], *given: Any) -> None:
            if staging is None:
                self.on_every_rank(lambda: job(*given))
            else:
                jobs.append(functools.partial(job, *given))

        self.on_rank_0(lambda: os.makedirs(train_state))
        for name, model in models.items():
            folder = os.path.join(self.tmp, name)
            if staging is None:
                tensors, adapter = gathered_weights(model, ranks.dtype)
            else:
                prefix = f"{name}, saved as a model: "
                to_host = functools.partial(lambda prefix, key, x: _staged(staging, prefix + key, x), prefix)
                tensors, adapter = gathered_weights(model, ranks.dtype, to_host)
            write(write_pretrained, model, tensors, adapter, folder, tokenizer_from, templates)
            del tensors, adapter  # before the next are gathered
        if staging is None:
            parts, index = _train_state(models, optimizers, ranks, lambda key, x: x)
        else:
            parts, index = _train_state(models, optimizers, ranks, functools.partial(_staged, staging))
        write(_write_parts, train_state, parts, ranks)
        merged: dict[str, list] = {}
        for key, (shape, pieces) in all_gather(ranks, index.items()):
            merged.setdefault(key, [shape, {}])[1].update(pieces)
        if ranks.rank == 0:
            jobs.append(lambda: write_text(os.path.join(train_state, "index.json"), json.dumps(merged)))
        self.written: Future[dict[str, str]] | None = None
        self.jobs = jobs
        if staging is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # the copies
            thread = ThreadPoolExecutor(1)
            self.written = thread.submit(self.write)
            thread.shutdown(wait=False)

    def write(self) -> dict[str, str]:
        """Writes what is left to write -> the digests of this rank's files."""
        for job in self.jobs:
            job()
        return _flush(self.tmp, _written_by(self.ranks.rank, self.tmp))

    def is_written(self) -> bool:
        return self.written is None or self.written.done()

    def complete(self) -> None:
        """Waits until all ranks have written, then gives the checkpoint its name."""
        set_phase("checkpoint", self.step)
        digests = self.on_every_rank(self.write if self.written is None else self.written.result)
        files = dict(sorted(all_gather(self.ranks, digests.items())))
        self.on_rank_0(lambda: self.finish(files))

    def on_every_rank(self, action: Callable[[], Any]) -> Any:
        """Runs an action on every rank. All ranks wait for it, and an I/O error on one of them is raised on all."""
        result = None
        errors = []
        try:
            result = action()
        except (OSError, SafetensorError) as error:
            errors.append(str(error))
        if errors := all_gather(self.ranks, errors):
            if self.ranks.rank == 0:
                shutil.rmtree(self.tmp, ignore_errors=True)  # makes room
            message = (
                f"{self.final} could not be written: {errors[0]}. Earlier checkpoints are whole: make room or mend "
                "the folder, then run the same command again"
            )
            raise shared(OSError(message))
        return result

    def on_rank_0(self, action: Callable[[], Any]) -> None:
        self.on_every_rank(action if self.ranks.rank == 0 else lambda: None)

    def finish(self, files: dict[str, str]) -> None:
        state = {"step": self.step, "git": git_hash(), "world_size": self.ranks.world_size, "files": files}
        write_text(os.path.join(self.tmp, "state.json"), json.dumps(sealed(state)))
        metrics = os.path.join(self.out, "metrics.jsonl")
        if os.path.isfile(metrics):
            sync(metrics)
        for folder, _, _ in os.walk(self.tmp):
            sync(folder)
        os.rename(self.tmp, self.final)
        sync(os.path.dirname(self.final))
        _link_newest(self.out, self.names)
        for old in finished(self.out)[: -self.keep]:
            os.rename(old, f"{old}.tmp")  # so that a half-removed one is not taken for one
            shutil.rmtree(f"{old}.tmp")


def _written_by(rank: int, tmp: str) -> list[str]:
    """Files that this rank wrote: its own shards, and on rank 0 everything else."""
    own = f"train_state/rank{rank:05d}_"
    return [f for f in _files(tmp) if f.startswith(own) or (rank == 0 and not f.startswith("train_state/rank"))]


def _link_newest(out, names):
    """Points out/NAME at the newest checkpoint's models."""
    newest = os.path.basename(finished(out)[-1])
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
    sync(out)


def load(
    out: str,
    models: Mapping[str, Transformer],
    optimizers: Mapping[str, torch.optim.Optimizer],
    ranks: Ranks,
    offloads: bool = False,
) -> int:
    """Fills models and optimizers from the newest intact checkpoint. Returns its step (0: there is none).

    A damaged checkpoint is named and set aside. What the folder has of later steps (metrics, rollouts, lost answers,
    bad steps) is dropped, since they run again. The links to the models are made again, since a run may have been
    killed between writing a checkpoint and its links. ValueError: all checkpoints are damaged.
    """
    started = time.monotonic()
    damaged: dict[str, list[str]] = {}
    newest = None
    for folder in reversed(finished(out)):
        damage = _damage(folder, ranks)
        if not damage:
            newest = folder
            break
        damaged[folder] = damage
    said = "; ".join(f"{folder}: {', '.join(damage[:3])}" for folder, damage in damaged.items())
    if damaged and newest is None:
        raise ValueError(f"no whole checkpoint is left ({said}); choose another --out, or remove {out}/checkpoints")
    if damaged and ranks.rank == 0:
        print(f"warning: damaged and set aside as *.damaged: {said}", file=sys.stderr, flush=True)
        for folder in damaged:
            shutil.rmtree(f"{folder}.damaged", ignore_errors=True)
            os.rename(folder, f"{folder}.damaged")
    step = 0
    if newest is not None:
        step = _step(newest)
        size = sum(os.path.getsize(os.path.join(newest, name)) for name in _files(newest))
        seconds = time.monotonic() - started
        _read_train_state(os.path.join(newest, "train_state"), models, optimizers, ranks, offloads)
        if ranks.rank == 0:
            _link_newest(out, models)
        print0(f"resumed from {newest} ({size / GIB:.2f} GiB, compared with its digests in {seconds:.1f} s)")
    if ranks.rank == 0:
        _drop_later_steps(out, step)
    barrier(ranks)
    return step


def _drop_later_steps(out: str, step: int) -> None:
    metrics = os.path.join(out, "metrics.jsonl")
    if os.path.isfile(metrics):
        lines = list(json_lines(metrics, growing=True))
        for where, row in lines:
            check_row(row, "metrics", where)
        if lines and step == 0:
            print(f"{out} has no checkpoint yet, so its {len(lines)} steps are run again", flush=True)
        write_rows(metrics, [row for _, row in lines if row["step"] <= step])
    for kind in ("rollouts", "lost", "tokens", "held_out", "bad_steps"):
        for of_step, file in step_files(out, kind, r"\w*"):
            if of_step > step:
                os.remove(file)
