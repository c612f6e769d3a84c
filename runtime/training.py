"""What an update stands on: models, FSDP2, AdamW, the schedule, offloading, and figures of the machine."""

import dataclasses
import json
import math
import os
import resource
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lora import lora_settings, share_base_weights
from model import Transformer, load_pretrained
from runtime import roofline, runs
from runtime.distributed import Ranks, all_gather, all_max, all_sum, barrier, print0
from runtime.packing import EMPTY, Batch, pack, packed_micro_batches
from runtime.rows import write_rows
from weights import GIB


def open_model(
    path: str, args: Any, ranks: Ranks, scalar_head: bool = False, other: Transformer | None = None
) -> Transformer:
    """A model to be trained, sharded: fp32 masters, or with --lora-rank fp32 adapters on weights that are frozen in the
    compute dtype. other: a model of the same folder; one process holds the frozen weights of both once."""
    lora = lora_settings(args.lora_rank, args.lora_alpha, path, args.seed)
    if lora and other and ranks.world_size == 1:
        model = share_base_weights(other)
        if scalar_head:
            model.replace_lm_head()
    else:
        dtype = ranks.dtype if lora else torch.float32
        model = load_pretrained(path, dtype, ranks.device, scalar_head, lambda m: shard(m, ranks), lora)
    model.checkpoint_activations = args.checkpoint_activations
    return model


def open_sampler(path: str, policy: Transformer, ranks: Ranks) -> Transformer:
    """What the engine of a policy computes with: whole on every rank, in the compute dtype. Adapters are applied, not
    merged (why: `pack_weights`; and memory holds no second copy of the base where the policy is not sharded)."""
    if policy.lora and ranks.world_size == 1:
        model = share_base_weights(policy)
    else:
        model = load_pretrained(path, ranks.dtype, ranks.device, lora=policy.lora)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(ranks.dtype)  # adapters: once, instead of in every pass
    return model


def trained(model: Transformer) -> list[torch.nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def shard(model: Transformer, ranks: Ranks) -> Transformer:
    """FSDP2: each layer and the rest are gathered as they are needed; masters fp32, compute in ranks.dtype, fp32 sums.

    The rest (embedding, last norm, LM head) is the root: it is gathered at the start of a pass and kept until its
    backward pass is through, so that the log-probs, which walk over the head in chunks, never gather it again.
    One process in fp32, or with adapters on frozen weights, has nothing to shard or cast and keeps plain parameters.
    """
    if ranks.world_size == 1 and (model.lora or ranks.dtype == torch.float32):
        return model
    policy = MixedPrecisionPolicy(param_dtype=ranks.dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=ranks.mesh, mp_policy=policy)
    if model.scalar_head and ranks.dtype != torch.float32:  # values and rewards: fp32, or they come in steps of 1/32
        wide = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(model.score, mesh=ranks.mesh, mp_policy=wide)
    return fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)


def reshard(model: Transformer) -> None:
    """Frees what passes without a backward pass have left gathered: the root of `shard`."""
    if isinstance(model, FSDPModule):
        model.reshard()


def adamw(model: Transformer, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """ValueError: steps as large as the weights, which would be lost in the first."""
    parameters = trained(model)
    norm = torch.nn.utils.get_total_norm([p.detach() for p in parameters])
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    rms = norm / sum(p.numel() for p in parameters) ** 0.5
    if lr > rms:
        raise ValueError(
            f"learning rate {lr:g}: a step of Adam moves each weight by about that, and weights are about {rms:.2g}"
        )
    fused = next(model.parameters()).is_cuda  # one kernel, without temporary copies of all parameters
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=fused)


def learning_rate(lr: float, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up over a share of the steps, then cosine to zero. step counts from 0."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def move_moments(optimizer: torch.optim.Optimizer, device: torch.device | str) -> None:
    """Adam's moments to host memory or back (--offload)."""
    for state in optimizer.state.values():
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = state[name].to(device)


def to_host(models: dict[str, Transformer], optimizers: dict[str, torch.optim.Optimizer]) -> None:
    """Masters and moments into host memory (--offload); a resumed run's moments have come with its checkpoint. A frozen
    base stays, since the engine may be using it; the adapters on it are small."""
    for name, model in models.items():
        if model.lora is None:
            model.to("cpu")
        move_moments(optimizers[name], "cpu")


# Means beyond these count as not finite: a model that a step has wrecked, whose numbers still exist. A loss is in nats
# per token or pair, a value loss in squared units of the reward, the KL of originals in nats per token.
BOUNDS = {"loss": 1e3, "policy_loss": 1e3, "value_loss": 1e6, "original/approx_kl": 10.0}


def optimizer_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    lr: float,
    step: int,
    figures: dict[str, float],
    batch: list,
    args: Any,
    ranks: Ranks,
    part: str = "",
) -> float:
    """Clips the gradients of all ranks together, updates, clears -> the norm before clipping.

    figures: this rank's share of means that have BOUNDS. batch: this rank's examples. part: which of several updates of
    the step (from 1) this is. With --offload the moments lie in host memory between steps.

    Where the norm or a figure is not finite or out of bounds, the update is left out and the batch written to
    OUT/bad_steps. FloatingPointError: that has happened more than --skip-bad-steps times.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    means = dict(zip(figures, all_sum(ranks, *figures.values())))
    fine = all(math.isfinite(mean) and abs(mean) <= BOUNDS[name] for name, mean in means.items())
    if not (fine and math.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        _leave_out({**means, "grad_norm": norm}, step, batch, args, ranks, part)
        return norm
    for group in optimizer.param_groups:
        group["lr"] = lr
    if args.offload:
        move_moments(optimizer, next(model.parameters()).device)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if args.offload:
        move_moments(optimizer, "cpu")
    return norm


def _leave_out(figures, step, batch, args, ranks, part):
    """Keeps the batch of a bad step -> FloatingPointError if there are too many."""
    text = json.dumps([dataclasses.asdict(e) if dataclasses.is_dataclass(e) else e for e in batch], default=list_of)
    rows = all_gather(ranks, [dict(rank=ranks.rank, example=example) for example in json.loads(text)])
    file = os.path.join(args.out, "bad_steps", f"step_{step:06d}{part}.jsonl")
    if ranks.rank == 0:
        write_rows(file, [{name: str(value) for name, value in figures.items()}, *rows])
    barrier(ranks)
    n_bad = runs.count_bad_steps(args.out, step)
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    message = f"step {step}: {said}: not finite or out of bounds; the update was left out, its batch is in {file}"
    if n_bad > args.skip_bad_steps:
        raise FloatingPointError(
            f"{message}. Look for odd rows in it, try a lower learning rate or --max-grad-norm, or --dtype fp32, or "
            f"go on past it with --skip-bad-steps {n_bad} (the same command continues)"
        )
    print0(f"warning: {message} ({n_bad} of --skip-bad-steps {args.skip_bad_steps})")


def list_of(tensor: torch.Tensor) -> list:
    return tensor.tolist()


# -- passes of a model that is trained, in whole micro-batches --------------------------------------------------------


@torch.no_grad()
def per_token(model: Transformer, prefixes: list, suffixes: list, trained: list | None, run: Any) -> list[torch.Tensor]:
    """Log-probs of each suffix's trained tokens (None: all), or the critic's values before them -> fp32 [L_i] each."""
    results, budget = [None] * len(suffixes), run.args.tokens_per_microbatch
    for indices, batch in packed_micro_batches(prefixes, suffixes, trained, budget, run.ranks):
        if not indices:
            idle_pass(model, run)
            continue
        run.stats.flops += roofline.forward_flops(model, batch)
        for i, result in zip(indices, forward(model, batch, run.args.temperature).cpu().split(batch.counts)):
            results[i] = result
    reshard(model)
    return results


def idle_pass(model: Transformer, run: Any) -> None:
    """What a rank without work runs, since FSDP needs every rank in every pass; adds zero to all gradients."""
    result = forward(model, pack([EMPTY[0]], [EMPTY[1]], run.ranks.device), run.args.temperature)
    if torch.is_grad_enabled():
        (0 * result.sum()).backward()


def forward(model: Transformer, batch: Batch, temperature: float) -> torch.Tensor:
    """Log-probs of the batch's targets [S], or values before them [S]."""
    ids, context = batch.input_ids, batch.context
    if model.scalar_head:
        return model(ids, context.position_ids, context, batch.index)
    return model(ids, context.position_ids, context, batch.index, batch.targets, temperature)[0]


# -- figures of the machine -------------------------------------------------------------------------------------------


def machine_metrics(ranks: Ranks, flops: float, seconds: float, tflops: float | None) -> dict[str, float | None]:
    """mfu: model FLOPs (recomputation not counted) of all ranks in these seconds over their peak, None where unknown.
    peak_memory_gib: the most that a rank has held, of a GPU since the last call, of a CPU process since its start.
    """
    peak = roofline.peak_flops(ranks, tflops)
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
def refresh_gap(own: Transformer, trained: Transformer, ids: list[int], ranks: Ranks) -> float:
    """Largest difference in log-prob of a prompt's tokens between an engine's model and the one whose weights it has
    just taken over, over all ranks: stale or broken weights show before anything is sampled."""
    batch = pack([ids], [[False] + [True] * (len(ids) - 1)], ranks.device)
    ours, theirs = (
        model(batch.input_ids, batch.context.position_ids, batch.context, batch.index, batch.targets)[0]
        for model in (own, trained)
    )
    reshard(trained)
    return all_max(ranks, (ours - theirs).abs().max().item())
