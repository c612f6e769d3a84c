"""The update half of a PPO step, side by side with the usual composition, in one run.

The peer runs `transformers` models on padded batches, with log-probs as in TRL: full logits, gather, and a log-sum-exp
per sequence.

    python bench/train.py                          # a CPU: log-probs, shared prefixes, a whole update
    python bench/train.py --device cuda            # a GPU: the same at 0.5B and 1.5B in bf16
    python bench/train.py --only logprob --repeats 5

- logprob: time and peak memory, the latter on top of inputs, weights and (with a backward pass) their gradients.
- shared: forward and backward for 6 responses of 400 tokens to each prompt of 800. The prompt is computed once
  ("shared") or once per response ("apart"), in passes of at most --tokens-per-pass.
- step: old log-probs, values, GAE, and two mini-batches of actor and critic, as in a step of recipes/tiny.sh. The peer
  runs the same responses through `AutoModel...` with padding, with one optimizer step per mini-batch and model.
"""

import functools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
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
from runtime import packing, roofline, training
from runtime.distributed import Ranks, start
from runtime.flags import user_errors
from trajectory import Batch, Prompt, Trajectory, UpdateRecord, balance_prompts

SHAPES = {  # vocabulary, width, MLP, layers, heads, key-value heads; the LM head is tied
    "tiny": (1024, 128, 384, 4, 4, 2),
    "layers": (4096, 896, 4864, 2, 14, 2),  # two layers of the 0.5B model, with the head's fraction of a 7B model
    "0.5b": (151936, 896, 4864, 24, 14, 2),
    "1.5b": (151936, 1536, 8960, 28, 12, 2),
}


@dataclass
class Args:
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to run. The sizes depend on it."""
    only: tuple[Literal["logprob", "shared", "step"], ...] = ("logprob", "shared", "step")
    """Which of the three to run."""
    repeats: int = 3
    """Measurements of each side, alternating. The median is reported."""
    tokens_per_pass: int = 16384
    """shared: tokens of a forward and backward pass. Activations of the 1.5B model take 3 MiB a token."""


def config_of(shape: str) -> Config:
    return Config(*SHAPES[shape], tie_word_embeddings=True)


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
    trajectories: list[Trajectory],
    args: ppo_cpe.Args,
    device: str,
    sequences: int,
) -> None:
    """The work of `ours_step` on padded batches of `sequences` sequences."""
    parts = [trajectories[i : i + sequences] for i in range(0, len(trajectories), sequences)]
    batches = [padded([t.prompt.ids for t in part], [t.response_ids for t in part], device) for part in parts]
    masks = [batch[3] for batch in batches]
    values: list[torch.Tensor] = []
    old_logprobs: list[torch.Tensor] = []
    with torch.no_grad():
        for part, batch in zip(parts, batches):
            as_sampled = padded([t.context_ids for t in part], [t.response_ids for t in part], device)
            old_logprobs.append(peer_logprobs(policy, as_sampled, args.temperature, False).float())
            values.append(peer_values(critic, batch).float())
    advantages: list[torch.Tensor] = []
    returns: list[torch.Tensor] = []
    for part, value, mask in zip(parts, values, masks):
        reward = torch.zeros_like(value)
        for row, t in zip(reward, part):
            row[len(t.response_ids) - 1] = t.reward
        a, r = ppo_cpe.gae(reward.cpu(), value.cpu() * mask.cpu(), mask.cpu().float(), 1.0, 1.0)
        advantages.append(a.to(device))
        returns.append(r.to(device))
    flat = torch.cat([a[mask] for a, mask in zip(advantages, masks)])
    advantages = [(a - flat.mean()) / (flat.std() + 1e-8) for a in advantages]

    per_mini_batch = len(parts) // 2
    for first in range(0, len(parts), per_mini_batch):
        mini_batch = range(first, first + per_mini_batch)
        n_tokens = sum(masks[i].sum() for i in mini_batch)
        for i in mini_batch:
            mask = masks[i]
            # padded again in every mini-batch, as a collator does
            batch = padded([t.prompt.ids for t in parts[i]], [t.response_ids for t in parts[i]], device)
            logprobs = peer_logprobs(policy, batch, args.temperature, True).float()
            edit = torch.tensor([t.parent is not None for t in parts[i]], device=device)[:, None] & mask
            original = mask & ~edit
            loss = ppo_cpe.policy_loss(logprobs[original], old_logprobs[i][original], advantages[i][original], 0.2, 0.2)
            loss_e = ppo_cpe.edit_loss("unclipped", logprobs[edit], old_logprobs[i][edit], advantages[i][edit])
            ((loss.sum() + loss_e.sum()) / n_tokens).backward()
            value = peer_values(critic, batch).float()
            v_loss, _ = ppo_cpe.value_loss(value[mask], values[i][mask], returns[i][mask], 0.5)
            (v_loss.sum() / n_tokens).backward()
        for model, optimizer in zip((policy, critic), optimizers):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# -- ours --------------------------------------------------------------------------------------------------------------


def score(trajectories: list[Trajectory], models: dict[str, Transformer], args: ppo_cpe.Args, ranks: Ranks) -> Batch:
    """Old log-probs, values and advantages."""
    old_logprobs, values, _ = ppo_cpe.score(trajectories, models, args, 0, ranks)
    advantages, returns = ppo_cpe.compute_advantages(trajectories, values, args, ranks)
    return Batch(trajectories, old_logprobs, values, advantages, returns)


def update(
    batch: Batch,
    models: dict[str, Transformer],
    optimizers: dict[str, torch.optim.Optimizer],
    args: ppo_cpe.Args,
    ranks: Ranks,
) -> UpdateRecord:
    run = SimpleNamespace(ranks=ranks, args=args, step=0, out="")  # a run without a folder
    return ppo_cpe.update(models, optimizers, batch, args, run)


def ours_step(
    models: dict[str, Transformer],
    optimizers: dict[str, torch.optim.Optimizer],
    trajectories: list[Trajectory],
    args: ppo_cpe.Args,
    ranks: Ranks,
) -> UpdateRecord:
    mine = balance_prompts(trajectories, args.mini_batch_prompts, ranks)
    return update(score(mine, models, args, ranks), models, optimizers, args, ranks)


def random_trajectories(
    n_prompts: int, prompt: int, response: int, critique: int, vocab: int, n: int = 4, edits: int = 2
) -> list[Trajectory]:
    """Random trajectories of a step. prompt, response, critique: tokens, at most; lengths start at half of that."""
    rng = random.Random(0)

    def ids(longest: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(longest // 2, longest))]

    def trajectory(prompt: Prompt, i: int, context_ids: list[int], parent: Trajectory | None) -> Trajectory:
        response_ids = ids(response)
        return Trajectory(
            prompt=prompt,
            sample_id=i,
            parent=parent,
            context_ids=context_ids,
            response_ids=response_ids,
            engine_logprobs=[-1.0] * len(response_ids),
            answer="",
            truncated=False,
            reward=rng.gauss(0, 2),
            judgement=None,
        )

    trajectories = []
    for index in range(n_prompts):
        x = Prompt(index=index, row={"prompt_id": f"p{index}"}, ids=ids(prompt))
        for i in range(n):
            original = trajectory(x, i, x.ids, None)
            trajectories.append(original)
            if i < edits:
                context_ids = x.ids + original.response_ids + ids(critique)
                trajectories.append(trajectory(x, i, context_ids, original))
    return trajectories


# -- measuring ---------------------------------------------------------------------------------------------------------


def seconds_of(sides: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Median seconds of each side: a warm-up run of each, then `repeats` runs in turns."""
    times: dict[str, list[float]] = {name: [] for name in sides}
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
    """Bytes by which memory rises while the function runs. On a CPU: resident memory of the process, on Linux."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark to the memory that is resident now
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def line(work: str, peer: float, ours: float, unit: str = "s") -> None:
    ratio = peer / ours if ours else float("inf")
    print(f"{work:58}{peer:10.3f}{ours:10.3f} {unit:4}{ratio:8.2f} x", flush=True)


def bench_logprob(args: Args, dtype: torch.dtype) -> None:
    config = config_of("0.5b" if args.device == "cpu" else "1.5b")
    n_sequences = 8
    length = 64 if args.device == "cpu" else 1024
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(config.vocab_size, config.hidden_size, generator=generator) * 0.03).to(args.device, dtype)
    hidden = torch.randn(n_sequences * length, config.hidden_size, generator=generator).to(args.device, dtype)
    targets = torch.randint(0, config.vocab_size, (n_sequences * length,), generator=generator).to(args.device)

    def peer(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        logits = F.linear(h, w).view(n_sequences, length, -1)
        return selective_log_softmax(logits, targets.view(n_sequences, length)).flatten()

    def ours(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return linear_logprob(h, w, targets)[0]

    def forward_and_backward(function: Callable) -> None:
        for x in (hidden, weight):
            x.grad = torch.zeros_like(x) if x.grad is None else x.grad
        function(hidden, weight).float().sum().backward()

    print(f"log-probs, {n_sequences * length} tokens, V {config.vocab_size}, d {config.hidden_size}")
    for name in ("forward", "forward and backward"):
        trains = name == "forward and backward"
        sides: dict[str, Callable[[], object]] = {}
        for side, function in (("peer", peer), ("ours", ours)):
            if trains:
                sides[side] = functools.partial(forward_and_backward, function)
            else:
                sides[side] = functools.partial(function, hidden, weight)
        with torch.set_grad_enabled(trains):
            hidden.requires_grad_(trains)
            weight.requires_grad_(trains)
            # before the timed runs: memory that the C library retains from an earlier run would not show
            peaks = {side: peak_of(function, args.device) / 2**20 for side, function in sides.items()}
            times = seconds_of(sides, args.repeats, args.device)
        products = 4 if trains else 1  # the backward pass computes the logits again
        rate = products * 2 * len(hidden) * weight.numel() / times["ours"] / 1e12
        line(f"  {name}, {rate:.2f} TFLOP/s", times["peer"], times["ours"])
        line(f"  {name}, peak memory", peaks["peer"], peaks["ours"], "MiB")
    with torch.no_grad():
        difference = (peer(hidden.float(), weight.float()) - ours(hidden, weight)).abs().max().item()
    print(f"  largest difference of the two sides {difference:.1e}")


def shared_and_apart(
    prompts: list[list[int]], responses: list[list[list[int]]], tokens_per_pass: int, device: str
) -> tuple[list[packing.Batch], list[packing.Batch]]:
    """Packs passes with shared prefixes, and passes where each response has its own prompt.

    responses: [prompt][response][token]. A pass has at most tokens_per_pass tokens, or one prompt or response. Without
    the bound, the activations of a step apart (24 responses of the 1.5B model) would take 84 GiB.
    """
    sizes = [len(prompt) + sum(map(len, group)) for prompt, group in zip(prompts, responses)]
    shared = []
    for part in _consecutive(sizes, tokens_per_pass):
        prefixes = [prompts[i] for i in part for _ in responses[i]]
        suffixes = [response for i in part for response in responses[i]]
        shared.append(packing.pack_shared(prefixes, suffixes, [[True] * len(r) for r in suffixes], device))
    pairs = [(prompt, response) for prompt, group in zip(prompts, responses) for response in group]
    apart = []
    for part in _consecutive([len(p) + len(r) for p, r in pairs], tokens_per_pass):
        sequences = [pairs[i][0] + pairs[i][1] for i in part]
        loss_masks = [[False] * len(pairs[i][0]) + [True] * len(pairs[i][1]) for i in part]
        apart.append(packing.pack(sequences, loss_masks, device))
    return shared, apart


def _consecutive(sizes: list[int], limit: int) -> list[list[int]]:
    """Consecutive indices whose sizes sum to at most `limit`; a larger one alone."""
    parts: list[list[int]] = []
    total = limit
    for i, size in enumerate(sizes):
        if total + size > limit:
            parts.append([])
            total = 0
        parts[-1].append(i)
        total += size
    return parts


def bench_shared(args: Args, dtype: torch.dtype) -> None:
    config = config_of("layers" if args.device == "cpu" else "1.5b")
    n_prompts = 1 if args.device == "cpu" else 4
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

        def run(batches: list[packing.Batch]) -> None:
            model.zero_grad()
            for batch in batches:
                training.forward(model, batch, 1.0).sum().backward()

        def flops(batches: list[packing.Batch]) -> float:
            return sum(roofline.forward_flops(model, batch) for batch in batches)

        times = seconds_of({"apart": lambda: run(apart), "shared": lambda: run(shared)}, args.repeats, args.device)
        limit = flops(apart) / flops(shared)
        rate = 3 * flops(shared) / times["shared"] / 1e12
        line(f"  {name} (limit {limit:.2f} x), {rate:.2f} TFLOP/s", times["apart"], times["shared"])


def bench_step(args: Args, ranks: Ranks, dtype: torch.dtype) -> None:
    shape = "tiny" if args.device == "cpu" else "0.5b"
    n_prompts = 16 if args.device == "cpu" else 64
    lengths = (200, 96, 60) if args.device == "cpu" else (1000, 512, 200)  # of prompt, response and critique, at most
    peer_batches = (12, 24, 48) if args.device == "cpu" else (8, 16)
    config = config_of(shape)
    flags = ppo_cpe.Args(
        prompts_per_step=n_prompts,
        mini_batch_prompts=n_prompts // 2,
        tokens_per_microbatch=8192,
        temperature=1.0,
        edit_rate=0.5,
    )
    trajectories = random_trajectories(n_prompts, *lengths, config.vocab_size)
    models = {"policy": Transformer(config), "critic": Transformer(config, scalar_head=True)}
    for model in models.values():
        init_weights(model, 0)
        model.to(args.device)
        training.shard(model, ranks)
    optimizers = {name: training.adamw(model, 1e-6, 0.01) for name, model in models.items()}
    peers = peer_models(config, args.device, dtype)
    peer_optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01) for model in peers]
    n_tokens = sum(len(t.prompt.ids) + len(t.response_ids) for t in trajectories)
    print(f"a PPO update, {n_prompts} prompts x (4 originals + 2 edits), {n_tokens} tokens, {shape}")
    sides: dict[str, Callable[[], object]] = {
        "ours": functools.partial(ours_step, models, optimizers, trajectories, flags, ranks)
    }
    for n in peer_batches:  # the fastest counts, so that the peer doesn't lose by a bad choice
        sides[f"peer, {n} sequences a batch"] = functools.partial(
            peer_step, *peers, peer_optimizers, trajectories, flags, args.device, n
        )
    times = seconds_of(sides, args.repeats, args.device)
    ours = times.pop("ours")
    for name, seconds in times.items():
        line(f"  {name}", seconds, ours)


def main(args: Args) -> None:
    ranks = start("bf16" if args.device == "cuda" else "fp32")
    if ranks.device.type != args.device:
        raise ValueError(f"--device {args.device}: this machine's is {ranks.device.type}")
    if args.device == "cpu":
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    else:
        print(torch.cuda.get_device_name())
    print(f"{'':58}{'peer':>10}{'ours':>10}     {'ratio':>9}")
    if "logprob" in args.only:
        bench_logprob(args, ranks.dtype)
    if "shared" in args.only:
        bench_shared(args, ranks.dtype)
    if "step" in args.only:
        bench_step(args, ranks, ranks.dtype)


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
