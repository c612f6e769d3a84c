"""What must not diverge between the stage scripts: start-up, rows, packing, FSDP, checkpoints, logs.

Every random draw of a run is a function of (seed, step, prompt, sample), so no generator has a state to save: a
resumed run draws what the uninterrupted one would have drawn, on any number of processes.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import resource
import shutil
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import GIB, Packed, SharedPrefix, save_pretrained

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# -- start-up ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """This process among all: `device` and compute `dtype` are what models and batches live in."""

    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    mesh: Any  # a DeviceMesh over all ranks: (ranks,), or (copies, ranks of a copy) under --shard-size


@contextlib.contextmanager
def user_errors():
    """What a user can mend (a flag, a file, a row) ends in one line and exit status 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}\n(TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)


def start(dtype="auto", shard_size=None):
    """Joins the process group of torchrun, or makes one of a single process.

    dtype: auto | fp32 | bf16. shard_size: ranks that share one copy of a model (HSDP), None: all. ValueError: it does
    not divide the number of ranks.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if shard_size is not None and (shard_size < 1 or world_size % shard_size):
        raise ValueError(f"--shard-size {shard_size}: expected a divisor of the number of ranks, {world_size}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "WORLD_SIZE" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if shard_size in (None, world_size):
        mesh = init_device_mesh(device.type, (world_size,))
    else:  # neighbouring ranks share a copy: with the GPUs of a node as shard size, only gradients leave the node
        mesh = init_device_mesh(
            device.type, (world_size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
        )
    dtype = DTYPES["bf16" if cuda else "fp32"] if dtype == "auto" else DTYPES[dtype]
    return Ranks(rank, world_size, device, dtype, mesh)


def print0(*values):
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(*values, flush=True)


def all_sum(ranks, *numbers):
    """Each number summed over all ranks, in fp64."""
    total = torch.tensor(numbers, dtype=torch.float64)
    if ranks.world_size > 1:
        total = total.to(ranks.device)
        dist.all_reduce(total)
    return total.tolist()


def all_max(ranks, number):
    largest = torch.tensor(number, dtype=torch.float64, device=ranks.device)
    if ranks.world_size > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.item()


def all_gather(ranks, rows):
    """The lists of all ranks, joined in rank order."""
    if ranks.world_size == 1:
        return list(rows)
    gathered = [None] * ranks.world_size
    dist.all_gather_object(gathered, list(rows))
    return [row for part in gathered for row in part]


def derive_seed(*parts):
    """A 62-bit seed that is a function of its parts alone (Python's own hash differs between processes)."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def batch_indices(n_rows, batch_size, step, seed):
    """Row indices of a step's batch: each epoch is a new permutation; a remainder below a batch is left out."""
    per_epoch = n_rows // batch_size
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(n_rows, generator=torch.Generator().manual_seed(derive_seed("order", seed, epoch)))
    return order[place * batch_size : (place + 1) * batch_size].tolist()


# -- rows --------------------------------------------------------------------------------------------------------------

_PROMPT = {"prompt_id": "text", "persona": "persona", "question": "text"}
ROW_FIELDS = {
    "prompt": _PROMPT,
    "pair": {**_PROMPT, "chosen": "text", "rejected": "text"},
    "answer": {**_PROMPT, "answer": "string"},
    "judgement": {
        **_PROMPT,
        "answer": "text",
        "critique": "text",
        "helpfulness": "score",
        "personalization": "score",
        "naturalness": "score",
    },
    "messages": {"messages": "messages"},
    "object": {},
}


def _roles_alternate(messages):
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        return False
    return all(m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in messages)


CHECKS = {
    "text": ("a non-empty string", lambda v: isinstance(v, str) and bool(v.strip())),
    "string": ("a string", lambda v: isinstance(v, str)),
    "persona": ("a non-empty JSON object or string", lambda v: isinstance(v, (dict, str)) and bool(v)),
    "score": ("an integer from -5 to 5", lambda v: type(v) is int and -5 <= v <= 5),
    "messages": ('a list of {"role": "system" | "user" | "assistant", "content": text}', _roles_alternate),
}


def check_row(row, kind, where):
    """ValueError naming the place, the field and what was expected, unless `row` is a row of that kind."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object ({kind} row), found {type(row).__name__}")
    for field, check in ROW_FIELDS[kind].items():
        expected, holds = CHECKS[check]
        if field not in row:
            raise ValueError(f'{where}: field "{field}" is missing, expected {expected} ({kind} row)')
        if not holds(row[field]):
            raise ValueError(f'{where}: field "{field}" is {json.dumps(row[field])[:80]}, expected {expected}')


def read_rows(path, kind):
    """All rows of a JSON-lines file, checked before any work is done.

    kind: prompt | pair | answer | judgement | messages | object (any JSON object). ValueError: file:line, field,
    what was expected. Read with `json`, not into Arrow: personas are free objects, and a table would give every
    persona the keys of all the others.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; expected JSON lines ({kind} rows)")
    rows, line_of = [], {}
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error})") from error
            check_row(row, kind, where)
            if kind == "prompt" and line_of.setdefault(row["prompt_id"], number) != number:
                raise ValueError(
                    f'{where}: prompt_id "{row["prompt_id"]}" stands on line {line_of[row["prompt_id"]]} too'
                )
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty, expected {kind} rows")
    return rows


def write_rows(path, rows):
    """JSON lines; see `write_text`."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_text(path, text):
    """The file appears whole or not at all."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        f.write(text)
    os.replace(f"{path}.tmp", path)


# -- batches -----------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Packed tokens and the S positions that are trained: `index[i]` is where `targets[i]` is predicted."""

    input_ids: torch.Tensor  # [T]
    context: Packed | SharedPrefix
    index: torch.Tensor  # [S]
    targets: torch.Tensor  # [S]
    counts: list[int]  # trained tokens of each sequence (of each suffix), in order; their sum is S


def pack(sequences, trained, device):
    """sequences: lists of ids; trained: per sequence a list of bools, which of its tokens are targets -> Batch.

    The first token of a sequence cannot be a target: nothing predicts it.
    """
    input_ids = torch.tensor([i for ids in sequences for i in ids])
    targets_at = torch.tensor([t for flags in trained for t in flags]).nonzero().squeeze(1)
    input_ids, index, targets = (t.to(device) for t in (input_ids, targets_at - 1, input_ids[targets_at]))
    return Batch(input_ids, Packed([len(s) for s in sequences], device), index, targets, [sum(f) for f in trained])


def pack_shared(prefixes, suffixes, trained, device):
    """Sequences that begin alike, packed so that neighbours with the same prefix compute it once -> Batch.

    prefixes, suffixes: lists of ids, one each per sequence; trained: per sequence which of the suffix are targets.
    """
    input_ids, index, targets, groups = [], [], [], []
    for i, (prefix, suffix, flags) in enumerate(zip(prefixes, suffixes, trained, strict=True)):
        if i == 0 or prefix != prefixes[i - 1]:
            groups.append((len(prefix), []))
            input_ids += prefix
            last = len(input_ids) - 1  # predicts the first token of every suffix
        groups[-1][1].append(len(suffix))
        places = [last, *range(len(input_ids), len(input_ids) + len(suffix) - 1)]
        index += itertools.compress(places, flags)
        targets += itertools.compress(suffix, flags)
        input_ids += suffix
    input_ids, index, targets = (torch.tensor(x, device=device) for x in (input_ids, index, targets))
    return Batch(input_ids, SharedPrefix(groups, device), index, targets, [sum(f) for f in trained])


def balance(sizes, n_bins):
    """Indices of `sizes` in bins of nearly equal sums: the largest first, each into the emptiest bin (LPT rule)."""
    bins, filled = [[] for _ in range(n_bins)], [0] * n_bins
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        emptiest = filled.index(min(filled))
        bins[emptiest].append(i)
        filled[emptiest] += sizes[i]
    return [sorted(b) for b in bins]


def share(rows, sizes, ranks):
    """This rank's part of a step's rows, dealt out evenly by size: every rank waits for the one with most tokens."""
    return [rows[i] for i in balance(sizes, ranks.world_size)[ranks.rank]]


def micro_batches(sizes, tokens_per_microbatch, ranks):
    """Splits 0..n-1 into nearly equal parts of at most that many tokens (a larger one gets its own): lists of indices.

    Under FSDP every rank must run the same number of passes: all ranks make as many parts as the one that needs most.
    Some may stay empty, at the end; for these the caller runs `EMPTY` with weight zero.
    """
    parts, room = [], []  # first fit, largest first: never over the budget
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fits = next((b for b, left in enumerate(room) if sizes[i] <= left), None)
        if fits is None:
            parts.append([])
            room.append(tokens_per_microbatch)
            fits = -1
        parts[fits].append(i)
        room[fits] -= sizes[i]
    most = int(all_max(ranks, len(parts)))
    even = balance(sizes, most)
    if all(len(b) <= 1 or sum(sizes[i] for i in b) <= tokens_per_microbatch for b in even):
        parts = even
    return sorted((sorted(b) for b in parts + [[]] * (most - len(parts))), key=lambda b: (not b, b))


def shared_micro_batches(prefixes, suffixes, tokens_per_microbatch, ranks):
    """The same for sequences of a prefix and a suffix: those with the same prefix (neighbours) stay together.

    A group that is over the budget is cut, and its prefix computed once in each part.
    """
    groups, sizes = [], []
    for i, (prefix, suffix) in enumerate(zip(prefixes, suffixes, strict=True)):
        if i == 0 or prefix != prefixes[i - 1] or sizes[-1] + len(suffix) > tokens_per_microbatch:
            groups.append([])
            sizes.append(len(prefix))
        groups[-1].append(i)
        sizes[-1] += len(suffix)
    parts = micro_batches(sizes, tokens_per_microbatch, ranks)
    return [[i for g in part for i in groups[g]] for part in parts]


def packed_micro_batches(prefixes, suffixes, trained, tokens_per_microbatch, ranks):
    """`shared_micro_batches`, packed one after the other: yields (indices, Batch), for an empty one ([], None).

    trained: as in `pack_shared`; None: the whole of every suffix.
    """
    if trained is None:
        trained = [[True] * len(suffix) for suffix in suffixes]
    for indices in shared_micro_batches(prefixes, suffixes, tokens_per_microbatch, ranks):
        chosen = ([rows[i] for i in indices] for rows in (prefixes, suffixes, trained))
        yield indices, pack_shared(*chosen, ranks.device) if indices else None


EMPTY = ([0, 0], [False, True])  # a sequence that stands in for an empty micro-batch; its loss gets weight zero


# -- training ----------------------------------------------------------------------------------------------------------


def shard(model, ranks):
    """FSDP2: each layer and the rest are gathered as they are needed; masters fp32, compute in ranks.dtype, fp32 sums.

    The rest (embedding, last norm, LM head) is the root: it is gathered at the start of a pass and kept until its
    backward pass is through, so that the log-probs, which walk over the head in chunks, never gather it again.
    One process in fp32 has nothing to shard or cast and keeps plain parameters.
    """
    if ranks.world_size == 1 and ranks.dtype == torch.float32:
        return model
    policy = MixedPrecisionPolicy(param_dtype=ranks.dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    return fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)


def reshard(model):
    """Frees what passes without a backward pass have left gathered: the root of `shard`."""
    if isinstance(model, FSDPModule):
        model.reshard()


def adamw(model, lr, weight_decay):
    fused = next(model.parameters()).is_cuda  # one kernel, without temporary copies of all parameters
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=fused
    )


def learning_rate(lr, step, total_steps, warmup_ratio):
    """Linear warm-up over a share of the steps, then cosine to zero. step counts from 0."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def move_moments(optimizer, device):
    """Adam's moments to host memory or back (--offload)."""
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(device)


def to_host(models, optimizers):
    """Masters and moments into host memory (--offload); a resumed run's moments have come with its checkpoint."""
    for name, model in models.items():
        model.to("cpu")
        move_moments(optimizers[name], "cpu")


def optimizer_step(model, optimizer, lr, max_grad_norm, offload=False):
    """Clips the gradients of all ranks together, updates, clears -> the norm before clipping.

    offload: between steps the moments lie in host memory. FloatingPointError where the norm is not finite: a run that
    goes on with such weights only hides the cause.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    if not math.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm}; the weights were left as they were")
    for group in optimizer.param_groups:
        group["lr"] = lr
    if offload:
        move_moments(optimizer, next(model.parameters()).device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if offload:
        move_moments(optimizer, "cpu")
    return norm


# -- the machine -------------------------------------------------------------------------------------------------------

# Dense bf16 FLOP/s of data sheets, by a part of the device's name.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "A100": 312, "A800": 312, "L40S": 362}


def peak_flops(ranks, tflops):
    """FLOP/s of one device in the compute dtype: --peak-tflops, else from the table, else None (nothing is guessed)."""
    if tflops is not None:
        return tflops * 1e12
    if ranks.device.type != "cuda" or ranks.dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(ranks.device)
    return next((known * 1e12 for part, known in PEAK_TFLOPS.items() if part in name), None)


def forward_flops(model, batch):
    """FLOPs of a forward pass over a Batch: two per weight and token, four d per pair of query and key and layer."""
    c = model.config
    d, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    weights = 2 * d * d + 2 * d * kv + 3 * d * c.intermediate_size  # of a layer's matrices
    layers = c.num_hidden_layers * (2 * weights * len(batch.input_ids) + 4 * d * batch.context.pairs)
    return layers + 2 * d * (1 if model.scalar_head else c.vocab_size) * len(batch.index)


def machine_metrics(ranks, flops, seconds, tflops):
    """mfu: model FLOPs (recomputation not counted) of all ranks in these seconds over their peak, None where unknown.
    peak_memory_gib: the most that a rank has held, of a GPU since the last call, of a CPU process since its start.
    """
    peak = peak_flops(ranks, tflops)
    (flops,) = all_sum(ranks, flops)
    if ranks.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(ranks.device)
        torch.cuda.reset_peak_memory_stats(ranks.device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return dict(
        mfu=flops / (seconds * peak * ranks.world_size) if peak else None,
        peak_memory_gib=round(all_max(ranks, held) / GIB, 3),
    )


@torch.no_grad()
def refresh_gap(own, trained, ids, ranks):
    """Largest difference in log-prob of a prompt's tokens between an engine's model and the one whose weights it has
    just taken over, over all ranks: stale or broken weights show before anything is sampled."""
    batch = pack([ids], [[False] + [True] * (len(ids) - 1)], ranks.device)
    ours, theirs = (
        model(batch.input_ids, batch.context.position_ids, batch.context, batch.index, batch.targets)[0]
        for model in (own, trained)
    )
    reshard(trained)
    return all_max(ranks, (ours - theirs).abs().max().item())


# -- a run folder ------------------------------------------------------------------------------------------------------

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


def barrier(ranks):
    if ranks.world_size > 1:
        dist.barrier()


def moments(ranks, values):
    """Mean and standard deviation of fp32 [S] over all ranks (numbers). S may be 0 on a rank, not on all."""
    x = values.double()
    n, total, square = all_sum(ranks, len(x), x.sum().item(), x.square().sum().item())
    mean = total / n
    return mean, max(square / n - mean**2, 0.0) ** 0.5


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


def _train_state(models, optimizers):
    state = {}
    for name, model in models.items():
        state[f"{name}.model"] = get_model_state_dict(model)
        state[f"{name}.optimizer"] = get_optimizer_state_dict(model, optimizers[name])
    return state


def save_checkpoint(out, step, models, optimizers, tokenizer_from, ranks, keep):
    """Writes out/checkpoints/step_NNNNNN, then points out/NAME at its models; appears whole or not at all.

    models: {"policy": model, "critic": model, ...}. Each is stored twice: as a folder that other tools load, in the
    compute dtype, and with its optimizer as fp32 masters (torch.distributed.checkpoint), from which a run resumes on
    any number of ranks. Only the newest `keep` are kept.
    """
    final = os.path.join(out, "checkpoints", f"step_{step:06d}")
    tmp = f"{final}.tmp"
    if ranks.rank == 0:
        shutil.rmtree(tmp, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        os.makedirs(tmp)
    barrier(ranks)
    for name, model in models.items():
        save_pretrained(model, os.path.join(tmp, name), tokenizer_from, ranks.dtype)
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
