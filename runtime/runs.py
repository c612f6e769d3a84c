"""A run folder: flags, metrics, rows of steps, and checkpoints from which the same command continues."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
from collections import defaultdict

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from model import save_pretrained
from runtime.distributed import all_gather, all_max, all_sum, barrier, print0
from runtime.rows import write_rows, write_text

# Flags that may differ between the start of a run and its continuation: what a step computes stays the same.
FREE_FLAGS = (
    "max_steps",
    "save_every",
    "keep_checkpoints",
    "tokens_per_microbatch",
    "checkpoint_activations",
    "out",
    "shard_size",
    "offload",
    "peak_tflops",
    "plan",
    "world_size",
    "gpu_gib",
    "eval_prompts",
    "eval_every",
    "eval_n",
    "audit_share",
    "audit_judge",
    "save_batch",
    "kv_tokens",
)


def open_run(args, ranks):
    """Makes or reopens the folder args.out; ValueError where it holds a run with other flags. Prints where output goes."""
    flags = dataclasses.asdict(args)
    file = os.path.join(args.out, "args.json")
    if os.path.isfile(file):
        with open(file) as f:
            before = json.load(f)
        now = json.loads(json.dumps(flags))
        changed = [k for k in now if k not in FREE_FLAGS and before.get(k) != now[k]]
        if changed:
            was = ", ".join(f"--{k.replace('_', '-')} {before.get(k)} -> {now[k]}" for k in changed)
            raise ValueError(f"{args.out} holds a run with other flags ({was}); choose another --out or remove it")
    if ranks.rank == 0:
        os.makedirs(os.path.join(args.out, "checkpoints"), exist_ok=True)
        write_text(file, json.dumps({**flags, "git": git_hash()}, indent=2))
    barrier(ranks)
    print0(f"output: {args.out}/ (args.json, metrics.jsonl, checkpoints/)")


def git_hash():
    """The commit of this code, with + where files differ from it; "unknown" outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return run.stdout.strip() or "unknown"


class Stats:
    """Sums and counts of per-token figures by name, for means over all micro-batches and ranks."""

    def __init__(self):
        self.sums, self.largest = defaultdict(lambda: [0.0, 0]), defaultdict(lambda: -math.inf)
        self.flops, self.logical_tokens, self.computed_tokens = 0, 0, 0  # of this rank's passes

    def add(self, name, values):
        total = self.sums[name]
        total[0] += values.double().sum().item()
        total[1] += values.numel()

    def add_max(self, name, values):
        self.largest[name] = max([self.largest[name], *([values.max().item()] if values.numel() else [])])

    def means(self, ranks):
        names = sorted(set(all_gather(ranks, self.sums)))  # a rank may have met no edit, say
        totals = all_sum(ranks, *(x for name in names for x in self.sums[name]))
        means = {n: totals[2 * i] / totals[2 * i + 1] if totals[2 * i + 1] else None for i, n in enumerate(names)}
        largest = sorted(set(all_gather(ranks, self.largest)))
        return means | {name: all_max(ranks, self.largest[name]) for name in largest}


# -- what a step leaves behind ----------------------------------------------------------------------------------------


def log_metrics(out, metrics, ranks):
    """Appends one line to metrics.jsonl; numbers that do not exist in a step (no edit in it, say) are null."""
    if ranks.rank == 0:
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(os.path.join(out, "metrics.jsonl"), "a") as f:
            f.write(json.dumps(clean) + "\n")


def write_step(out, kind, step, rows, ranks):
    """The rows of all ranks as OUT/KIND/step_NNNNNN.jsonl."""
    rows = all_gather(ranks, rows)
    if ranks.rank == 0:
        write_rows(os.path.join(out, kind, f"step_{step:06d}.jsonl"), rows)


# -- checkpoints ------------------------------------------------------------------------------------------------------


def _train_state(models, optimizers):
    state = {}
    for name, model in models.items():
        state[f"{name}.model"] = get_model_state_dict(model)
        state[f"{name}.optimizer"] = get_optimizer_state_dict(model, optimizers[name])
    return state


def save_checkpoint(out, step, models, optimizers, tokenizer_from, ranks, keep, templates):
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
        for name in models:
            link = os.path.join(out, name)
            if os.path.lexists(f"{link}.tmp"):
                os.unlink(f"{link}.tmp")
            os.symlink(os.path.join("checkpoints", f"step_{step:06d}", name), f"{link}.tmp")
            os.replace(f"{link}.tmp", link)
        for old in _checkpoints(out)[:-keep]:
            shutil.rmtree(old)
    barrier(ranks)


def _checkpoints(out):
    folder = os.path.join(out, "checkpoints")
    names = sorted(n for n in os.listdir(folder) if n.startswith("step_") and not n.endswith(".tmp"))
    return [os.path.join(folder, n) for n in names]


def load_checkpoint(out, models, optimizers, ranks):
    """Continues from the newest checkpoint: fills models and optimizers in place -> steps done (0: none there).

    Lines of metrics.jsonl from after that checkpoint are dropped: their steps will be run again.
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
        print0(f"resumed from {found[-1]}")
    metrics = os.path.join(out, "metrics.jsonl")
    if ranks.rank == 0 and os.path.isfile(metrics):
        with open(metrics) as f:  # a killed run may have left half a line
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_text(metrics, "".join(lines))
    barrier(ranks)
    return step
