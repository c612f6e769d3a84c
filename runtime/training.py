"""Shared by all training scripts: FSDP2, AdamW, learning rate, offloading, forward passes, and machine metrics."""

import contextlib
import json
import math
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from lora import lora_settings, share_base_weights
from model import Transformer, load_pretrained
from runtime import roofline
from runtime.distributed import Ranks, all_gather, all_max, all_sum, barrier, print0
from runtime.flags import RuntimeArgs
from runtime.offload import from_host, host_copy, move_moments, to_host, wait_for_host_copies
from runtime.packing import DUMMY, Batch, pack, packed_micro_batches
from runtime.rows import write_rows
from runtime.runs import Run, count_bad_steps
from runtime.watch import shared
from weights import GIB, full_tensor

E = TypeVar("E")


def open_model(
    path: str, args: RuntimeArgs, seed: int, ranks: Ranks, scalar_head: bool = False, other: Transformer | None = None
) -> Transformer:
    """Opens a model for training, sharded: fp32 master weights, or with --lora-rank fp32 adapters on frozen weights in
    the compute dtype. other: a model from the same folder; a single process then shares the frozen weights of both."""
    lora = lora_settings(args.lora_rank, args.lora_alpha, path, seed)
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
    """Opens the engine's copy of a policy in the compute dtype, whole or this rank's part of it.

    Adapters are applied, not merged, so that an unsharded policy and its engine share one copy of the base in memory.
    Only on a CPU in fp32 they are merged (`pack_weights`).
    """
    if policy.lora and ranks.world_size == 1:
        model = share_base_weights(policy)
    else:
        model = load_pretrained(path, ranks.dtype, ranks.device, lora=policy.lora, engine_ranks=ranks.engine_ranks)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(ranks.dtype)  # adapters: once, instead of in every pass
    return model


def trainable(model: Transformer) -> list[torch.nn.Parameter]:
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
        fp32 = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(model.score, mesh=ranks.mesh, mp_policy=fp32)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy, reshard_after_forward=False)
    return model


def reshard(model: Transformer) -> None:
    """Frees the root of `shard`, which passes without a backward pass leave gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def adamw(model: Transformer, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW on the trainable parameters. ValueError: the learning rate is as large as the weights, which the first step
    would destroy."""
    parameters = trainable(model)
    norm = full_tensor(torch.nn.utils.get_total_norm([p.detach() for p in parameters])).item()
    rms = norm / sum(p.numel() for p in parameters) ** 0.5
    if lr > rms:
        raise ValueError(
            f"learning rate {lr:g}: a step of Adam moves each weight by about that, and weights are about {rms:.2g}"
        )
    fused = next(model.parameters()).is_cuda  # one kernel, without temporary copies of all parameters
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=weight_decay, fused=fused)


def learning_rate(lr: float, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Linear warm-up over a fraction of the steps, then cosine decay to zero. step counts from 0."""
    warmup = math.ceil(warmup_ratio * total_steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


@contextlib.contextmanager
def offloaded(
    models: Mapping[str, Transformer],
    optimizers: Mapping[str, torch.optim.Optimizer],
    device: torch.device,
    enabled: bool,
) -> Iterator[None]:
    """Keeps master weights and Adam moments in host memory while responses are sampled (--offload).

    The moments stay there until `optimizer_step` needs them. A frozen base stays on the device, since the engine may be
    using it; the adapters on it are small.
    """
    away = [model for model in models.values() if model.lora is None and enabled and device.type == "cuda"]
    if enabled:
        for optimizer in optimizers.values():
            move_moments(optimizer, to_host)
    for model in away:
        reshard(model)
        for parameter in model.parameters():
            to_host(parameter, "weight", parameter)
    wait_for_host_copies()  # FSDP may read a shard on the host, to pad it
    for model in away:
        model._apply(lambda parameter: host_copy(parameter, "weight").detach())  # `to`, for FSDP as well
    yield
    for model in away:
        model._apply(lambda parameter: from_host(parameter, device))


# Sanity bounds on the means of a step. Outside them the model has diverged, although its numbers are still finite.
# Losses are in nats per token or pair, the value loss in squared units of the reward, the KL in nats per token.
BOUNDS = {"loss": 1e3, "policy_loss": 1e3, "value_loss": 1e6, "original/approx_kl": 10.0}


def optimizer_step(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    lr: float,
    max_grad_norm: float,
    means: Mapping[str, float],
    examples: Sequence,
    run: Run,
    part: str = "",
) -> float:
    """Clips the gradients over all ranks, updates, clears them. Returns the norm before clipping.

    means: over all ranks, of figures that have BOUNDS. examples: what this rank trained on. part: names the update
    where a step has several. With --offload the moments are in host memory between steps.

    If the norm or a mean is not finite or out of bounds, the update is left out and its examples are written to
    OUT/bad_steps. FloatingPointError: that has happened more than --skip-bad-steps times.
    """
    norm = full_tensor(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)).item()
    is_finite = math.isfinite(norm)
    for name, mean in means.items():
        is_finite = is_finite and math.isfinite(mean) and abs(mean) <= BOUNDS[name]
    if not is_finite:
        optimizer.zero_grad(set_to_none=True)
        skip_bad_step({**means, "grad_norm": norm}, examples, run, part)
        return norm
    for group in optimizer.param_groups:
        group["lr"] = lr
    if run.args.offload:
        device = next(model.parameters()).device
        move_moments(optimizer, lambda parameter, name, moment: from_host(moment, device))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if run.args.offload:
        move_moments(optimizer, to_host)
    return norm


def skip_bad_step(figures: Mapping[str, float], examples: Sequence, run: Run, part: str) -> None:
    """Writes the examples of a bad step of all ranks. FloatingPointError: too many steps were bad."""
    step = run.step + 1
    limit = run.args.skip_bad_steps
    plain = json.loads(json.dumps(examples, default=lambda x: x.tolist() if isinstance(x, torch.Tensor) else vars(x)))
    rows = all_gather(run.ranks, [dict(rank=run.ranks.rank, example=example) for example in plain])
    file = os.path.join(run.out, "bad_steps", f"step_{step:06d}{part}.jsonl")
    if run.ranks.rank == 0:
        write_rows(file, [{name: str(value) for name, value in figures.items()}, *rows])
    barrier(run.ranks)
    n_bad = count_bad_steps(run.out, step)
    described = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    message = f"step {step}: {described}: not finite or out of bounds; the update was left out, its batch is in {file}"
    if n_bad > limit:
        run.complete_saving()
        advice = (
            "Look for odd rows in it, try a lower learning rate or --max-grad-norm, or --dtype fp32, or go on past it "
            f"with --skip-bad-steps {n_bad} (the same command continues)"
        )
        raise shared(FloatingPointError(f"{message}. {advice}"))
    print0(f"warning: {message} ({n_bad} of --skip-bad-steps {limit})")


# -- forward passes ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def per_token(
    model: Transformer,
    prefixes: list[list[int]],
    suffixes: list[list[int]],
    masks: list[list[bool]] | None,
    temperature: float,
    tokens_per_microbatch: int,
    ranks: Ranks,
) -> tuple[list[torch.Tensor], float]:
    """Log-probs of suffix tokens after their prefix; from a model with a scalar head, the values before them.

    masks: which tokens of each suffix (None: all). Returns fp32 [L_i] per suffix, and the FLOPs of the passes.
    """
    results: list[torch.Tensor] = [torch.zeros(0)] * len(suffixes)
    flops = 0.0
    for indices, batch in packed_micro_batches(prefixes, suffixes, masks, tokens_per_microbatch, ranks):
        if batch is None:
            idle_pass(model, temperature, ranks)
            continue
        flops += roofline.forward_flops(model, batch)
        for i, result in zip(indices, forward(model, batch, temperature).cpu().split(batch.counts)):
            results[i] = result
    reshard(model)
    return results, flops


def idle_pass(model: Transformer, temperature: float, ranks: Ranks) -> None:
    """The pass of a rank without work, since FSDP needs every rank in every pass. It adds zero to all gradients."""
    result = forward(model, pack([DUMMY[0]], [DUMMY[1]], ranks.device), temperature)
    if torch.is_grad_enabled():
        (0 * result.sum()).backward()


def forward(model: Transformer, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs of the batch's targets [S], or from a scalar head the values before them [S]."""
    context = batch.context
    if model.scalar_head:
        return model(batch.input_ids, context.position_ids, context, batch.index)
    logprobs, _ = model(batch.input_ids, context.position_ids, context, batch.index, batch.targets, temperature)
    return logprobs


def nll(
    model: Transformer, examples: Sequence[tuple[Sequence[int], Sequence[int]]], device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor], Batch]:
    """Negative log-likelihood of the learned tokens, summed, for `forward_backward`.

    examples: (ids, which of them are learned) of each sequence.
    """
    ids, loss_masks = zip(*examples or [DUMMY])
    batch = pack(ids, loss_masks, device)
    return -forward(model, batch).sum(), {}, batch


def forward_backward(
    loss_of: Callable[[Transformer, list[E], torch.device], tuple[torch.Tensor, dict[str, torch.Tensor], Batch]],
    model: Transformer,
    parts: list[list[E]],
    count: float,
    ranks: Ranks,
    train: bool = True,
) -> tuple[dict[str, float], float]:
    """A pass over each of this rank's micro-batches, followed by its backward pass if `train`.

    loss_of: the summed loss of a micro-batch with its graph, {name: another sum}, and what was computed. It computes a
    dummy for an empty micro-batch, which counts zero.
    count: the loss is a mean over so many tokens or pairs, those of all ranks and micro-batches.

    Returns {"loss": mean, name: mean} over all ranks, and this rank's FLOPs.
    """
    totals: dict[str, float] = {}
    flops = 0.0
    for part in parts:
        with torch.set_grad_enabled(train):
            loss, sums, batch = loss_of(model, part, ranks.device)
        weight = float(len(part) > 0)
        if train:  # FSDP averages gradients over the ranks; times world_size makes that the sum
            (loss * weight * ranks.world_size / count).backward()
        flops += roofline.update_flops(model, batch) if train else roofline.forward_flops(model, batch)
        for name, value in {"loss": loss, **sums}.items():
            totals[name] = totals.get(name, 0.0) + weight * value.item()
    reshard(model)  # passes without gradients leave the root gathered, which has no optimizer state
    return {name: total / count for name, total in zip(totals, all_sum(ranks, *totals.values()))}, flops


# -- figures of the machine -------------------------------------------------------------------------------------------


def update_metrics(run: Run, grad_norm: float, lr: float, n_tokens: float, flops: float) -> dict[str, float | None]:
    """Metrics of every update besides its losses. n_tokens: of all ranks; flops: of this one."""
    seconds = run.seconds["update"]
    return dict(
        grad_norm=grad_norm,
        lr=lr,
        tokens=int(n_tokens),
        seconds=seconds,
        tokens_per_second=n_tokens / seconds,
        **machine_metrics(run.ranks, flops, seconds, run.args.peak_tflops),
    )


def machine_metrics(ranks: Ranks, flops: float, seconds: float, tflops: float | None) -> dict[str, float | None]:
    """mfu: model FLOPs (recomputation not counted) of all ranks in these seconds over their peak, None where unknown.
    peak_memory_gib: the most that a rank has held, of a GPU since the last call, of a CPU process since its start.
    """
    peak = roofline.peak_flops(ranks, tflops)
    (all_flops,) = all_sum(ranks, flops)
    if ranks.device.type == "cuda":
        held = torch.cuda.max_memory_allocated(ranks.device)
        torch.cuda.reset_peak_memory_stats(ranks.device)
    else:
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return dict(
        mfu=all_flops / (seconds * peak * ranks.world_size) if peak else None,
        peak_memory_gib=round(all_max(ranks, held) / GIB, 3),
    )


SYNC_TOKENS = 256  # their logits take 150 MiB with a vocabulary of 152,000


@torch.no_grad()
def weight_sync_error(engine_model: Transformer, policy: Transformer, ids: list[int], ranks: Ranks) -> float:
    """Largest difference in log-prob between the engine's model and the policy that it was just synced from, over the
    first tokens of a prompt and all ranks. Stale or broken weights show before anything is sampled."""
    ids = ids[:SYNC_TOKENS]
    batch = pack([ids], [[False] + [True] * (len(ids) - 1)], ranks.device)
    if engine_model.part is None:
        logprobs = forward(engine_model, batch)
    else:
        logits = engine_model(batch.input_ids, batch.context.position_ids, batch.context, batch.index)
        logits = engine_model.part.whole_logits(logits)
        assert batch.targets is not None
        logprobs = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    difference = logprobs - forward(policy, batch)
    reshard(policy)
    return all_max(ranks, difference.abs().max().item())
