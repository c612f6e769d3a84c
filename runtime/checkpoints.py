"""Checkpoints of a run: they appear whole or not at all, and the same command continues from the newest."""

import json
import os
import shutil

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from model import save_pretrained
from runtime.distributed import Ranks, barrier, print0
from runtime.rows import write_text
from runtime.runs import git_hash


def _train_state(models, optimizers):
    state = {}
    for name, model in models.items():
        state[f"{name}.model"] = get_model_state_dict(model)
        state[f"{name}.optimizer"] = get_optimizer_state_dict(model, optimizers[name])
    return state


def save(
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


def load(
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
