"""The update half of a PPO step, side by side with the usual composition, in one run.

The peer runs `transformers` models on padded batches, with log-probs as in TRL: full logits, gather, and a log-sum-exp
per sequence.

    python bench/train.py                          # a CPU: log-probs, shared prefixes, a whole update
    python bench/train.py --only logprob --repeats 5

On a GPU the sizes are those of 0.5B and 1.5B models in bf16.

- logprob: time and peak memory, the latter on top of inputs and weights.
- shared: forward and backward for 6 responses of 400 tokens to each prompt of 800. The prompt is computed once
  ("shared") or once per response ("apart"), in passes of at most --tokens-per-pass.
- step: old log-probs, values, and two mini-batches of actor and critic, as in a step of recipes/tiny.sh. The peer
  runs the same responses through `AutoModel...` with padding, with one optimizer step per mini-batch and model.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # not bench/, which has a kernels.py too
from runtime import flags


@dataclass
class Args:
    only: tuple[Literal["logprob", "shared", "step"], ...] = ("logprob", "shared", "step")
    """Which of the three to run."""
    repeats: flags.Count = 3
    """Measurements of each side, alternating. The median is reported."""
    tokens_per_pass: flags.Count = 16384
    """shared: tokens of a forward and backward pass. Activations of the 1.5B model take 3 MiB a token."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import functools
import random
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2ForCausalLM, Qwen2ForSequenceClassification

import ppo_cpe
from bench.common import CONFIGS, device_name, peer_config, random_model, seconds_of, synchronize
from kernels.linear_logprob import linear_logprob
from model import Transformer
from runtime import packing, roofline, training
from runtime.distributed import Ranks, start
from trajectory import Batch, Prompt, Trajectory, balance_prompts

TEMPERATURE = 1.0


# -- the peer: full logits, padding ------------------------------------------------------------------------------------


def selective_log_softmax(logits: Tensor, index: Tensor) -> Tensor:
    """Like TRL's function of that name: log-softmax at one index per position. [B, L, V], [B, L] -> [B, L]

    The log-sum-exp is taken of one sequence at a time, which saves memory.
    """
    selected = logits.gather(-1, index[..., None])[..., 0]
    return selected - torch.stack([torch.logsumexp(row, -1) for row in logits])


def padded(contexts: list[list[int]], responses: list[list[int]], device: torch.device) -> list[Tensor]:
    """Contexts padded on the left, responses on the right -> ids, mask, positions [B, C + R], response mask [B, R]."""
    left = pad_sequence([torch.tensor(ids) for ids in contexts], True, -1, padding_side="left")
    right = pad_sequence([torch.tensor(ids) for ids in responses], True, -1)
    ids = torch.cat([left, right], 1).to(device)
    mask = ids >= 0
    positions = mask.cumsum(1) - 1
    return [ids.clamp(min=0), mask, positions.clamp(min=0), mask[:, left.shape[1] :]]


def peer_logprobs(policy: nn.Module, batch: list[Tensor]) -> Tensor:
    ids, mask, positions, response = batch
    n = response.shape[1]
    logits = policy(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n + 1).logits[:, :-1]
    return selective_log_softmax(logits / TEMPERATURE, ids[:, -n:]).float()


def peer_values(critic: nn.Module, batch: list[Tensor]) -> Tensor:
    ids, mask, positions, response = batch
    hidden = critic.model(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    return critic.score(hidden)[:, -response.shape[1] - 1 : -1, 0].float()


def peer_step(
    models: list[nn.Module],
    optimizers: list[torch.optim.Optimizer],
    trajectories: list[Trajectory],
    n_sequences: int,
    device: torch.device,
) -> None:
    """The work of `ours_step` on padded batches of that many sequences. Edits have the loss of originals."""
    policy, critic = models
    batches = []
    for i in range(0, len(trajectories), n_sequences):
        part = trajectories[i : i + n_sequences]
        responses = [t.response_ids for t in part]
        batch = padded([t.prompt.ids for t in part], responses, device)
        with torch.no_grad():  # an edit was sampled after its edit prompt
            old_logprobs = peer_logprobs(policy, padded([t.context_ids for t in part], responses, device))
            values = peer_values(critic, batch)
        # GAE at gamma = lambda = 1 with the reward on the last token
        returns = torch.tensor([t.reward for t in part], device=device)[:, None].expand_as(values)
        batches.append((batch, old_logprobs, values, returns))
    for mini_batch in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
        n_tokens = sum(batch[-1].sum() for batch, *_ in mini_batch)
        for batch, old_logprobs, values, returns in mini_batch:
            mask = batch[-1]
            logprobs = peer_logprobs(policy, batch)[mask]
            advantages = (returns - values)[mask]
            loss = ppo_cpe.policy_loss(logprobs, old_logprobs[mask], advantages, 0.2, 0.2)
            (loss.sum() / n_tokens).backward()
            loss, _ = ppo_cpe.value_loss(peer_values(critic, batch)[mask], values[mask], returns[mask], 0.5)
            (loss.sum() / n_tokens).backward()
        for model, optimizer in zip(models, optimizers):
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


# -- ours --------------------------------------------------------------------------------------------------------------

Models = dict[str, Transformer]  # policy, critic
Optimizers = dict[str, torch.optim.AdamW]


def score(trajectories: list[Trajectory], models: Models, args: ppo_cpe.Args, ranks: Ranks) -> Batch:
    """Old log-probs, values and advantages."""
    old_logprobs, values, _ = ppo_cpe.score(trajectories, models, args, 0, ranks)
    advantages, returns = ppo_cpe.compute_advantages(trajectories, values, args, ranks)
    return Batch(trajectories, old_logprobs, values, advantages, returns)


def update(batch: Batch, models: Models, optimizers: Optimizers, args: ppo_cpe.Args, ranks: Ranks) -> None:
    run = SimpleNamespace(ranks=ranks, args=args, step=0, out="")  # a run without a folder
    ppo_cpe.update(models, optimizers, batch, args, run)


def ours_step(
    models: Models, optimizers: Optimizers, trajectories: list[Trajectory], args: ppo_cpe.Args, ranks: Ranks
) -> None:
    mine = balance_prompts(trajectories, args.mini_batch_prompts, ranks)
    update(score(mine, models, args, ranks), models, optimizers, args, ranks)


def random_trajectories(n_prompts: int, prompt: int, response: int, critique: int, vocab: int) -> list[Trajectory]:
    """Random trajectories of a step: four originals of each prompt, and edits of two.

    prompt, response, critique: tokens, at most; lengths start at half of that.
    """
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
        for i in range(4):
            original = trajectory(x, i, x.ids, None)
            trajectories.append(original)
            if i < 2:
                context_ids = x.ids + original.response_ids + ids(critique)
                trajectories.append(trajectory(x, i, context_ids, original))
    return trajectories


# -- measuring ---------------------------------------------------------------------------------------------------------


def peak_of(function: Callable[[], object]) -> float:
    """MiB by which memory rises while the function runs. On a CPU: resident memory of the process, on Linux."""
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(field: str) -> float:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) / 1024 for line in f if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets the high-water mark to the memory that is resident now
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def line(work: str, peer: float, ours: float, unit: str = "s") -> None:
    ratio = peer / ours if ours else float("inf")
    print(f"{work:58}{peer:10.3f}{ours:10.3f} {unit:4}{ratio:8.2f} x", flush=True)


def bench_logprob(args: Args, ranks: Ranks) -> None:
    config = CONFIGS["1.5b" if ranks.device.type == "cuda" else "0.5b"]
    n_sequences = 8
    length = 1024 if ranks.device.type == "cuda" else 64
    n_tokens = n_sequences * length
    options = dict(device=ranks.device, dtype=ranks.dtype, requires_grad=True)
    weight = torch.randn(config.vocab_size, config.hidden_size, **options)
    hidden = torch.randn(n_tokens, config.hidden_size, **options)
    targets = torch.randint(config.vocab_size, (n_tokens,), device=ranks.device)

    def peer() -> Tensor:
        logits = F.linear(hidden, weight).view(n_sequences, length, -1)
        return selective_log_softmax(logits, targets.view(n_sequences, length))

    def ours() -> Tensor:
        return linear_logprob(hidden, weight, targets)[0]

    def forward(function: Callable[[], Tensor]) -> None:
        with torch.no_grad():
            function()

    def forward_and_backward(function: Callable[[], Tensor]) -> None:
        torch.autograd.grad(function().float().sum(), (hidden, weight))

    print(f"log-probs, {n_tokens} tokens, V {config.vocab_size}, d {config.hidden_size}")
    # the backward pass computes the logits again
    for name, run, n_products in (("forward", forward, 1), ("forward and backward", forward_and_backward, 4)):
        sides = {"peer": functools.partial(run, peer), "ours": functools.partial(run, ours)}
        # before the timed runs: memory that the C library retains from an earlier run would not show
        peaks = {side: peak_of(function) for side, function in sides.items()}
        times = seconds_of(sides, args.repeats)
        rate = n_products * 2 * n_tokens * weight.numel() / times["ours"] / 1e12
        line(f"  {name}, {rate:.2f} TFLOP/s", times["peer"], times["ours"])
        line(f"  {name}, peak memory", peaks["peer"], peaks["ours"], "MiB")


def shared_and_apart(
    prompts: list[list[int]], responses: list[list[int]], tokens_per_pass: int, ranks: Ranks
) -> tuple[list[packing.Batch], list[packing.Batch]]:
    """Packs passes with shared prefixes, and passes where each response has its own prompt. One prompt a response.

    A pass has at most tokens_per_pass tokens. Without the bound, the activations of a step apart (24 responses of the
    1.5B model) would take 84 GiB.
    """
    micro_batches = packing.packed_micro_batches(prompts, responses, None, tokens_per_pass, ranks)
    shared = [batch for _, batch in micro_batches if batch]
    apart = []
    sizes = [len(prompt) + len(response) for prompt, response in zip(prompts, responses)]
    for part in packing.micro_batches(sizes, tokens_per_pass, ranks):
        sequences = [prompts[i] + responses[i] for i in part]
        loss_masks = [[False] * len(prompts[i]) + [True] * len(responses[i]) for i in part]
        apart.append(packing.pack(sequences, loss_masks, ranks.device))
    return shared, apart


def bench_shared(args: Args, ranks: Ranks) -> None:
    config = CONFIGS["1.5b" if ranks.device.type == "cuda" else "layers"]
    n_prompts = 4 if ranks.device.type == "cuda" else 1
    prompts = []
    responses = []
    for i in range(n_prompts):
        prompts += 6 * [[i + 1] * 800]
        responses += 6 * [[0] * 400]
    shared, apart = shared_and_apart(prompts, responses, args.tokens_per_pass, ranks)
    print(
        f"shared prefixes, {n_prompts} x (800 + 6 x 400) tokens, {config.num_hidden_layers} layers of width "
        f"{config.hidden_size}"
    )
    for name, scalar_head in (("actor", False), ("critic", True)):
        model = random_model(config, ranks.device, ranks.dtype, scalar_head)

        def run(batches: list[packing.Batch]) -> None:
            model.zero_grad()
            for batch in batches:
                training.forward(model, batch, TEMPERATURE).sum().backward()

        def flops(batches: list[packing.Batch]) -> float:
            return sum(roofline.forward_flops(model, batch) for batch in batches)

        times = seconds_of({"apart": lambda: run(apart), "shared": lambda: run(shared)}, args.repeats)
        limit = flops(apart) / flops(shared)
        rate = 3 * flops(shared) / times["shared"] / 1e12
        line(f"  {name} (limit {limit:.2f} x), {rate:.2f} TFLOP/s", times["apart"], times["shared"])


def bench_step(args: Args, ranks: Ranks) -> None:
    # lengths: of prompt, response and critique, at most
    shape, n_prompts, lengths, peer_batches = "tiny", 16, (200, 96, 60), (12, 24, 48)
    if ranks.device.type == "cuda":
        shape, n_prompts, lengths, peer_batches = "0.5b", 64, (1000, 512, 200), (8, 16)
    config = CONFIGS[shape]
    flags = ppo_cpe.Args(
        prompts_per_step=n_prompts,
        mini_batch_prompts=n_prompts // 2,
        tokens_per_microbatch=8192,
        temperature=TEMPERATURE,
    )
    trajectories = random_trajectories(n_prompts, *lengths, config.vocab_size)
    models = {}
    for name in ("policy", "critic"):
        model = random_model(config, ranks.device, torch.float32, scalar_head=name == "critic")
        models[name] = training.shard(model, ranks)
    optimizers = {name: training.adamw(model, 1e-6, 0.01) for name, model in models.items()}
    peers = []
    for peer_class in (Qwen2ForCausalLM, Qwen2ForSequenceClassification):
        peers.append(peer_class(peer_config(config, use_cache=False)).to(ranks.device, ranks.dtype))
    peer_optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01) for model in peers]
    n_tokens = sum(len(t.prompt.ids) + len(t.response_ids) for t in trajectories)
    print(f"a PPO update, {n_prompts} prompts x (4 originals + 2 edits), {n_tokens} tokens, {shape}")
    sides = {"ours": functools.partial(ours_step, models, optimizers, trajectories, flags, ranks)}
    for n in peer_batches:  # the fastest counts, so that the peer doesn't lose by a bad choice
        sides[f"peer, {n} sequences a batch"] = functools.partial(
            peer_step, peers, peer_optimizers, trajectories, n, ranks.device
        )
    times = seconds_of(sides, args.repeats)
    ours = times.pop("ours")
    for name, seconds in times.items():
        line(f"  {name}", seconds, ours)


BENCHMARKS = {"logprob": bench_logprob, "shared": bench_shared, "step": bench_step}


def main(args: Args) -> None:
    ranks = start()
    print(device_name())
    print(f"{'':58}{'peer':>10}{'ours':>10}     {'ratio':>9}")
    for name in args.only:
        BENCHMARKS[name](args, ranks)


if __name__ == "__main__":
    flags.run(main, ARGS)
