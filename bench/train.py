"""The update half of a PPO step against the usual composition: `transformers` models on padded batches, and log-probs
as TRL computes them (full logits, gather, a log-sum-exp per sequence). Both sides are measured in the same run.

    python bench/train.py                          # a CPU: log-probs, shared prefixes, a whole update
    python bench/train.py --device cuda            # a GPU: the same at 0.5B and 1.5B in bf16
    python bench/train.py --only logprob --repeats 5

- logprob: time, and peak memory on top of inputs, weights and (with a backward pass) their gradients.
- shared: forward and backward of 6 responses of 400 tokens to each prompt of 800, with the prompt computed once
  ("shared") or once per response ("apart"), in passes of at most --tokens-per-pass.
- step: old log-probs, values, GAE, two mini-batches of actor and critic, as in a step of recipes/tiny.sh. The peer runs
  the same responses through `AutoModel...` with padding, one optimizer step per mini-batch and model.
"""

import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too

import torch
import torch.nn.functional as F
import tyro
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification

import ppo_cpe
from kernels.linear_logprob import linear_logprob
from model import Transformer, init_weights
from model_config import Config
from runtime import packing, roofline, runs, training
from runtime.distributed import Ranks, start
from runtime.flags import user_errors

SHAPES = {  # vocabulary, width, MLP, layers, heads, key-value heads, tied
    "tiny": (1024, 128, 384, 4, 4, 2, True),
    "layers": (4096, 896, 4864, 2, 14, 2, True),  # two of 0.5B's layers; its head is as large a part as in a 7B
    "0.5b": (151936, 896, 4864, 24, 14, 2, True),
    "1.5b": (151936, 1536, 8960, 28, 12, 2, True),
}


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run; the sizes depend on it."""
    only: tuple[Literal["logprob", "shared", "step"], ...] = ("logprob", "shared", "step")
    """Which of the three to run."""
    repeats: int = 3
    """Measurements of each side, alternating; the median is reported."""
    tokens_per_pass: int = 16384
    """shared: tokens of a forward and backward pass. Activations of the 1.5B model take 3 MiB per token."""


def config_of(shape: str) -> Config:
    vocab, width, mlp, layers, heads, kv_heads, tied = SHAPES[shape]
    return Config(vocab, width, mlp, layers, heads, kv_heads, tie_word_embeddings=tied)


# -- the peer: full logits, padding ------------------------------------------------------------------------------------


def selective_log_softmax(logits: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Like TRL's function of that name: log-softmax at one index per position. [B, L, V], [B, L] -> [B, L]

    One sequence at a time: its log-sum-exp in fp32, its log-softmax in bf16.
    """
    if logits.dtype in (torch.float32, torch.float64):
        selected = logits.gather(-1, index[..., None])[..., 0]
        return selected - torch.stack([torch.logsumexp(row, -1) for row in logits])
    return torch.stack([F.log_softmax(row, -1).gather(-1, i[:, None])[:, 0] for row, i in zip(logits, index)])


def peer_models(config: Config, device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    fields = dict(config.to_dict(), num_labels=1, pad_token_id=0, use_cache=False, attn_implementation="sdpa")
    policy = Qwen2ForCausalLM(Qwen2Config(**fields)).to(device, dtype)
    return policy, Qwen2ForSequenceClassification(Qwen2Config(**fields)).to(device, dtype)


def padded(contexts: list[list[int]], responses: list[list[int]], device: str) -> list[torch.Tensor]:
    """Contexts padded on the left, responses on the right -> ids, mask, positions [B, C + R], response mask [B, R]."""
    longest_context, longest = max(map(len, contexts)), max(map(len, responses))
    ids = torch.zeros(len(contexts), longest_context + longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, (c, r) in enumerate(zip(contexts, responses)):
        ids[row, longest_context - len(c) : longest_context + len(r)] = torch.tensor(c + r)
        mask[row, longest_context - len(c) : longest_context + len(r)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return [x.to(device) for x in (ids, mask, positions, mask[:, longest_context:].bool())]


def peer_logprobs(policy: nn.Module, batch: list[torch.Tensor], temperature: float, with_entropy: bool) -> torch.Tensor:
    ids, mask, positions, response = batch
    n = response.shape[1]
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n + 1).logits[:, :-1]
    logits = logits / temperature
    if with_entropy:  # a metric with its own pass over the logits, as in TRL's PPO
        with torch.no_grad():
            (torch.logsumexp(logits, -1) - (F.softmax(logits, -1) * logits).sum(-1)).mean()
    return selective_log_softmax(logits, ids[:, -n:])


def peer_values(critic: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    ids, mask, positions, response = batch
    hidden = critic.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return critic.score(hidden)[:, -response.shape[1] - 1 : -1, 0]


def peer_step(
    policy: nn.Module,
    critic: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    trajectories: list[ppo_cpe.Trajectory],
    args: ppo_cpe.Args,
    device: str,
    sequences: int,
) -> None:
    """The work of `ours_step` on padded batches of `sequences` sequences."""
    parts = [trajectories[i : i + sequences] for i in range(0, len(trajectories), sequences)]
    values, masks, old = [], [], []
    with torch.no_grad():
        for part in parts:
            under = padded([t.sampled_under for t in part], [t.response_ids for t in part], device)
            old.append(peer_logprobs(policy, under, args.temperature, False).float())
            batch = padded([t.prompt_ids for t in part], [t.response_ids for t in part], device)
            values.append(peer_values(critic, batch).float())
            masks.append(batch[3])
    advantages, returns = [], []
    for part, value, mask in zip(parts, values, masks):
        reward = torch.zeros_like(value)
        for row, t in zip(reward, part):
            row[len(t.response_ids) - 1] = t.reward
        a, r = ppo_cpe.gae(reward.cpu(), value.cpu() * mask.cpu(), mask.cpu().float(), 1.0, 1.0)
        advantages.append(a.to(device))
        returns.append(r.to(device))
    flat = torch.cat([a[m] for a, m in zip(advantages, masks)])
    advantages = [(a - flat.mean()) / (flat.std() + 1e-8) for a in advantages]

    per_mini_batch = len(parts) // 2
    for first in range(0, len(parts), per_mini_batch):
        chosen = range(first, first + per_mini_batch)
        n_tokens = sum(masks[i].sum() for i in chosen)
        for i in chosen:
            part, mask = parts[i], masks[i]
            batch = padded([t.prompt_ids for t in part], [t.response_ids for t in part], device)
            logprobs = peer_logprobs(policy, batch, args.temperature, True).float()
            edit = torch.tensor([t.parent is not None for t in part], device=device)[:, None] & mask
            original = mask & ~edit
            loss, _, _ = ppo_cpe.policy_loss(logprobs[original], old[i][original], advantages[i][original], 0.2, 0.2)
            loss_e, _, _ = ppo_cpe.edit_loss("unclipped", logprobs[edit], old[i][edit], advantages[i][edit], cap=10.0)
            ((loss.sum() + loss_e.sum()) / n_tokens).backward()
            value = peer_values(critic, batch).float()
            v_loss, _ = ppo_cpe.value_loss(value[mask], values[i][mask], returns[i][mask], 0.5)
            (v_loss.sum() / n_tokens).backward()
        for model, optimizer in zip((policy, critic), optimizers):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# -- ours --------------------------------------------------------------------------------------------------------------


def ours_step(
    policy: Transformer,
    critic: Transformer,
    optimizers: dict[str, torch.optim.Optimizer],
    trajectories: list[ppo_cpe.Trajectory],
    args: ppo_cpe.Args,
    ranks: Ranks,
) -> runs.Stats:
    for t in trajectories:
        t.old_logprobs = None
    run = ppo_cpe.Run(args, ranks, None, None)
    batch = packing.share_prompts(trajectories, args.mini_batch_prompts, ranks)
    ppo_cpe.fill_old_logprobs(batch, policy, run)
    responses = [t.response_ids for t in batch]
    values = training.per_token(
        critic, [t.prompt_ids for t in batch], responses, [[True] * len(r) for r in responses], run
    )
    for t, of_t in zip(batch, values):
        t.values = of_t
    ppo_cpe.compute_advantages(batch, run)
    ppo_cpe.update(batch, {"policy": policy, "critic": critic}, optimizers, True, run)
    return run.stats


def made_up(
    n_prompts: int, prompt: int, response: int, critique: int, vocab: int, n: int = 4, edits: int = 2
) -> list[ppo_cpe.Trajectory]:
    """Random trajectories of a step. prompt, response, critique: tokens at most, and at least half as many."""
    rng = random.Random(0)

    def ids(longest):
        return [rng.randrange(vocab) for _ in range(rng.randint(longest // 2, longest))]

    result = []
    for place in range(n_prompts):
        x = ids(prompt)
        for i in range(n):
            y = ids(response)
            t = ppo_cpe.Trajectory(f"p{place}", i, {}, place, x, None, x, y, [-1.0] * len(y), reward=rng.gauss(0, 2))
            result.append(t)
            if i < edits:
                y = ids(response)
                result.append(
                    ppo_cpe.Trajectory(
                        f"p{place}",
                        i,
                        {},
                        place,
                        x,
                        t,
                        x + t.response_ids + ids(critique),
                        y,
                        [-1.0] * len(y),
                        reward=rng.gauss(0, 2),
                    )
                )
    return result


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds_of(sides: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """{name: function} -> {name: median seconds}; a warm-up run of each, then alternating."""
    times = {name: [] for name in sides}
    for i in range(repeats + 1):
        for name, function in sides.items():
            started = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(t) for name, t in times.items()}


def peak_of(function: Callable[[], object], device: str) -> int:
    """Bytes by which memory rises while the function runs (CPU: resident memory of the process, on Linux)."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    def status(field):
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark to what is resident now
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def line(work: str, peer: float, ours: float, target: str, unit: str = "s") -> None:
    ratio = peer / ours if ours else float("inf")
    print(f"{work:58}{peer:10.3f}{ours:10.3f} {unit:4}{ratio:8.2f} x   {target}", flush=True)


def bench_logprob(args: Args, dtype: torch.dtype) -> None:
    shape = "0.5b" if args.device == "cpu" else "1.5b"
    config, (n_sequences, length) = config_of(shape), (8, 64) if args.device == "cpu" else (8, 1024)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.03).to(args.device, dtype)
    hidden = torch.randn(n_sequences * length, config.hidden_size, generator=generator).to(args.device, dtype)
    targets = torch.randint(0, config.vocab_size, (n_sequences * length,), generator=generator).to(args.device)

    def peer(h, w):
        logits = F.linear(h, w).view(n_sequences, length, -1)
        return selective_log_softmax(logits, targets.view(n_sequences, length)).flatten()

    def ours(h, w):
        return linear_logprob(h, w, targets)[0]

    def backward(function):
        def run():
            for x in (hidden, weight):
                x.grad = torch.zeros_like(x) if x.grad is None else x.grad
            function(hidden, weight).float().sum().backward()

        return run

    print(f"log-probs, {n_sequences * length} tokens, V {config.vocab_size}, d {config.hidden_size}")
    for name in ("forward", "forward and backward"):
        grad = name != "forward"
        with torch.set_grad_enabled(grad):
            for x in (hidden, weight):
                x.requires_grad_(grad)
            sides = {"peer": lambda: peer(hidden, weight), "ours": lambda: ours(hidden, weight)}
            sides = {"peer": backward(peer), "ours": backward(ours)} if grad else sides
            # before any other run: memory that the C library retains from an earlier one would not show
            peaks = {side: peak_of(function, args.device) / 2**20 for side, function in sides.items()}
            times = seconds_of(sides, args.repeats, args.device)
            gemms = (4 if grad else 1) * 2 * len(hidden) * weight.numel()  # logits are computed twice
            rate = gemms / times["ours"] / 1e12
            line(f"  {name}, {rate:.2f} TFLOP/s", times["peer"], times["ours"], "time <= 1 x" if not grad else "")
            line(f"  {name}, peak memory", peaks["peer"], peaks["ours"], "memory <= 1/8" if not grad else "", "MiB")
    with torch.no_grad():
        difference = (peer(hidden.float(), weight.float()) - ours(hidden, weight)).abs().max().item()
    print(f"  largest difference of the two sides {difference:.1e}")


def shared_and_apart(
    prompts: list[list[int]], responses: list[list[list[int]]], tokens_per_pass: int, device: str
) -> tuple[list[packing.Batch], list[packing.Batch]]:
    """Passes of at most so many tokens, or one prompt or response: (shared prefixes, each response with its own).

    responses: a list per prompt. Without the bound, the activations of a whole step apart (24 responses of the 1.5B
    model) take 84 GiB.
    """
    sizes = [len(p) + sum(map(len, group)) for p, group in zip(prompts, responses)]
    shared = []
    for part in _consecutive(sizes, tokens_per_pass):
        rows = [(prompts[i], r) for i in part for r in responses[i]]
        shared.append(packing.pack_shared(*zip(*rows), [[True] * len(r) for _, r in rows], device))
    rows = [(p, r) for p, group in zip(prompts, responses) for r in group]
    apart = []
    for part in _consecutive([len(p) + len(r) for p, r in rows], tokens_per_pass):
        chosen = [rows[i] for i in part]
        trained = [[False] * len(p) + [True] * len(r) for p, r in chosen]
        apart.append(packing.pack([p + r for p, r in chosen], trained, device))
    return shared, apart


def _consecutive(sizes, limit):
    """Indices in runs whose sizes sum to at most `limit`; a larger one alone."""
    parts, filled = [], limit
    for i, size in enumerate(sizes):
        if filled + size > limit:
            parts.append([])
            filled = 0
        parts[-1].append(i)
        filled += size
    return parts


def bench_shared(args: Args, dtype: torch.dtype) -> None:
    shape, n_prompts = ("layers", 1) if args.device == "cpu" else ("1.5b", 4)
    config = config_of(shape)
    rng = random.Random(0)
    prompts = [[rng.randrange(config.vocab_size) for _ in range(800)] for _ in range(n_prompts)]
    responses = [[[rng.randrange(config.vocab_size) for _ in range(400)] for _ in range(6)] for _ in prompts]
    shared, apart = shared_and_apart(prompts, responses, args.tokens_per_pass, args.device)
    print(
        f"shared prefixes, {n_prompts} x (800 + 6 x 400) tokens, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}"
    )
    for name, scalar_head in (("actor", False), ("critic", True)):
        model = Transformer(config, scalar_head)
        init_weights(model, 0)
        model.to(args.device, dtype)

        def run(batches):
            model.zero_grad()
            for batch in batches:
                training.forward(model, batch, 1.0).sum().backward()

        def flops(batches):
            return sum(roofline.forward_flops(model, batch) for batch in batches)

        times = seconds_of({"apart": lambda: run(apart), "shared": lambda: run(shared)}, args.repeats, args.device)
        limit = flops(apart) / flops(shared)
        rate = 3 * flops(shared) / times["shared"] / 1e12
        line(f"  {name} (limit {limit:.2f} x), {rate:.2f} TFLOP/s", times["apart"], times["shared"], ">= 1.9 x")


def bench_step(args: Args, ranks: Ranks, dtype: torch.dtype) -> None:
    shape, n_prompts, lengths = ("tiny", 16, (200, 96, 60)) if args.device == "cpu" else ("0.5b", 64, (1000, 512, 200))
    config = config_of(shape)
    flags = ppo_cpe.Args(
        prompts_per_step=n_prompts,
        mini_batch_prompts=n_prompts // 2,
        tokens_per_microbatch=8192,
        temperature=1.0,
        edit_rate=0.5,
    )
    trajectories = made_up(n_prompts, *lengths, config.vocab_size)
    models = {"policy": Transformer(config), "critic": Transformer(config, scalar_head=True)}
    for model in models.values():
        init_weights(model, 0)
        model.to(args.device)
        training.shard(model, ranks)
    optimizers = {name: training.adamw(model, 1e-6, 0.01) for name, model in models.items()}
    peers = peer_models(config, args.device, dtype)
    peer_optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01) for model in peers]
    n_tokens = sum(len(t.prompt_ids) + len(t.response_ids) for t in trajectories)
    print(f"a PPO update, {n_prompts} prompts x (4 originals + 2 edits), {n_tokens} tokens, {shape}")
    sides = {"ours": lambda: ours_step(models["policy"], models["critic"], optimizers, trajectories, flags, ranks)}
    # several batch sizes, of which the fastest counts: the peer shall not lose by a bad choice
    for n in (12, 24, 48) if args.device == "cpu" else (8, 16):
        sides[f"peer, {n} sequences a batch"] = lambda n=n: peer_step(
            *peers, peer_optimizers, trajectories, flags, args.device, n
        )
    times = seconds_of(sides, args.repeats, args.device)
    ours = times.pop("ours")
    for name, seconds in times.items():
        line(f"  {name}", seconds, ours, ">= 2 x" if seconds == min(times.values()) else "")


def main(args: Args) -> None:
    ranks = start("bf16" if args.device == "cuda" else "fp32")
    if ranks.device.type != args.device:
        raise ValueError(f"--device {args.device}: this machine's is {ranks.device.type}")
    dtype = ranks.dtype
    cpu = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(cpu if args.device == "cpu" else torch.cuda.get_device_name())
    print(f"{'':58}{'peer':>10}{'ours':>10}     {'ratio':>9}     target")
    if "logprob" in args.only:
        bench_logprob(args, dtype)
    if "shared" in args.only:
        bench_shared(args, dtype)
    if "step" in args.only:
        bench_step(args, ranks, dtype)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
