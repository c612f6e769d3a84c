"""Stage 3: PPO with critique-post-edit (arXiv 2510.18849, section 4; METHOD 1.6). One step:

1. Rollout. For each of `prompts_per_step` prompts the policy samples `n_samples` originals y_o. The judge writes a
   critique and scores of each; the policy rewrites y_o by the critique, once: y_e; the judge scores y_e. These overlap:
   a critique starts when its answer ends, an edit when its critique arrives.
2. Selection. The batch is all originals and a share `edit_rate` of the edits. An edit is trained *under the original
   prompt*: neither y_o nor the critique is in its context.
3. The critic's values, GAE with the reward on the last token, advantages whitened over all response tokens.
4. Update, in mini-batches of prompts: PPO-clip on originals; on edits one of five losses on
   r = pi_theta(y_e | x) / pi_e(y_e | edit prompt), see `edit_loss`; clipped value loss for the critic.
   `--edit-ratio sdpo` edits nothing: the critique gives the original's own tokens a credit, see `fill_credit`.

`--edit-rate 0` is the PPO baseline (nothing is edited; the paper then samples n = 6). `--judge bt:out/bt/model` is the
Bradley-Terry baseline.

Where this departs from the paper or its code, and why (METHOD 2 has the whole table):
- A judgement that does not parse is asked again, then its sample leaves the batch: no score is ever made up.
- Both log-probs of the ratio on edits are full-softmax values at the sampling temperature from the same forward pass.
- The ratio on edits is by default `unclipped` with a cap, which the released results ran with; `paper` is the printed
  clip, under which words that only the critique suggested get no gradient.
- Sampling with top-p 0.9 (as released) draws from a slightly narrower distribution than the log-probs describe.

    python ppo_cpe.py                                             # one CPU or GPU
    torchrun --nproc_per_node=8 ppo_cpe.py                        # eight GPUs
    python ppo_cpe.py --edit-rate 0 --n-samples 6 --out out/ppo   # the baseline
"""

import itertools
import math
import random
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import tyro
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import diagnostics
from generate import Engine
from judges import JudgeSettings, open_judge, parse_spec, planned_memory
from model import load_pretrained, resolve
from prompts import SCORE_WEIGHTS, Chat, Judgement, answer_prompt, edit_prompt, load_templates
from runtime import packing, plan, runs, training
from runtime.distributed import all_gather, all_sum, derive_seed, moments, print0, start
from runtime.flags import user_errors
from runtime.rows import read_rows

EDIT_LOSSES = ("paper", "unclipped", "tis", "luffy", "none")  # see `edit_loss`


@dataclass
class Args:
    # -- what goes in and out
    policy: str = "out/sft/policy"
    """Folder or hub id of the start policy."""
    critic: str | None = None
    """Folder that the critic starts from (its scalar head too, if it has one); None: the start policy, head zero."""
    judge: str = "out/grm/model"
    """PATH of a generative reward model | http(s)://... | bt:PATH | world | FILE.py:FUNCTION (judges.py)."""
    prompts: str = "out/data/prompts_train.jsonl"
    """Prompt rows."""
    out: str = "out/ppo_cpe"
    """Run folder; the newest weights are OUT/policy and OUT/critic. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File that replaces the built-in prompt of the policy, and of a Bradley-Terry judge."""
    edit_template: str | None = None
    """File that replaces the built-in request to rewrite."""
    grm_template: str | None = None
    """File that replaces the built-in rubric of the judge."""

    # -- rollout (METHOD 1.6a; temperature and top-p as in the released code)
    prompts_per_step: int = 128
    """Prompts of a step, over all ranks."""
    n_samples: int = 4
    """Originals per prompt."""
    temperature: float = 0.9
    """Of originals and edits, and of every log-prob."""
    top_p: float = 0.9
    """Nucleus; recorded log-probs stay those of the full softmax."""
    max_prompt_length: int = 2048
    """Tokens; prompts over it are left out at the start and counted."""
    max_response_length: int = 2048
    """Tokens of an original or an edit."""
    truncated: Literal["judge", "drop", "floor"] = "judge"
    """A response that hits the limit: scored as it stands | leaves the batch | gets the lowest possible score."""

    # -- judge
    score_weights: tuple[float, float, float] = SCORE_WEIGHTS
    """Of helpfulness, personalization, naturalness in the reward (METHOD 1.4)."""
    judge_temperature: float = 0.9
    """Of the critique and scores."""
    judge_attempts: int = 3
    """Times an unparsable judgement is asked for before its sample leaves the batch."""
    max_judgement_length: int = 512
    """Tokens of a judgement; what is cut off does not parse."""

    # -- edits (METHOD 1.6e, 1.7, 1.8 and section 2)
    edit_rate: float = 0.5
    """Share r_e of the edits that joins the batch; 0 is plain PPO."""
    edit_strategy: Literal["random", "reward_rank", "conditional", "batch_rank"] = "random"
    """Over the batch at random | per prompt the best-scored | per prompt the most improved | the best of the batch."""
    edit_ratio: Literal[*EDIT_LOSSES, "sdpo"] = "unclipped"
    """The loss on edits: see `edit_loss`. sdpo: nothing is edited, the critique gives each token a credit instead."""
    ratio_cap: float | None = None
    """Upper bound of the ratio for unclipped and tis; None: 10 and 2."""
    luffy_gamma: float = 0.1
    """gamma of p / (p + gamma)."""
    sdpo_lambda: float = 0.5
    """With sdpo: lambda A + (1 - lambda) credit; one half leans to neither."""
    edit_baseline: Literal["batch", "original"] = "batch"
    """An edit's advantage: as any other (critic, whitened) | its reward less the mean of its prompt's originals."""

    # -- PPO (METHOD 1.6f, g)
    epochs: float = 2
    """Passes over the prompts."""
    mini_batch_prompts: int = 64
    """Prompts per update."""
    ppo_epochs: int = 1
    """Passes over a step's batch."""
    lr: float = 1e-6
    """Policy; constant."""
    critic_lr: float = 1e-5
    """Critic; constant."""
    critic_warmup_steps: int = 0
    """Steps in which only the critic is trained."""
    eps_low: float = 0.2
    """Lower clip of the ratio, 1 - eps_low."""
    eps_high: float = 0.2
    """Upper clip of the ratio, 1 + eps_high."""
    value_clip: float = 0.5
    """Largest step of a value within an update."""
    gamma: float = 1.0
    """Discount per token."""
    gae_lambda: float = 1.0
    """GAE; 1 is the whole return less the value."""
    weight_decay: float = 0.01
    """AdamW's, of both models."""
    max_grad_norm: float = 1.0
    """Gradient clipping, of each model."""
    seed: int = 0
    """Order of the prompts, sampling, selection."""

    # -- diagnostics, which change nothing in the training (README, "Metrics of a PPO step")
    eval_prompts: str | None = None
    """Rows that are not trained on: how answers, edits and their gap develop there goes into held_out/*."""
    eval_every: int = 10
    """Steps from one such look to the next; the first is at step 1, before any training."""
    eval_n: int = 64
    """Prompts of a look: the file's first."""
    audit_share: float = 0.0
    """Share of the originals that the judge scores a second time, with another seed."""
    audit_judge: str | None = None
    """Another judge (as --judge) that scores these too."""
    save_batch: int | None = None
    """Step whose batch and weights are kept in OUT/batch_*, for `python diagnostics.py --replay`."""

    # -- the machine
    tokens_per_microbatch: int = 16384
    """Tokens per forward pass and rank."""
    max_batch: int = 256
    """Sequences that are generated at once, per rank."""
    kv_tokens: int | None = None
    """Tokens in the policy's KV cache, per rank; None: by max_batch and what memory is free."""
    checkpoint_activations: bool = False
    """Recompute layers in the backward pass: less memory, a third more time."""
    dtype: str = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""
    shard_size: int | None = None
    """Ranks that share one copy of a model (HSDP; the GPUs of a node, say); None: all."""
    offload: bool = False
    """Keep Adam moments, and while responses are sampled the trained models, in host memory."""
    peak_tflops: float | None = None
    """A device's peak in the compute dtype, for the metric mfu; None: from a table of known GPUs."""
    plan: bool = False
    """Print what the run will hold in memory, and whether it fits, and exit; needs no GPU and no weights."""
    world_size: int | None = None
    """For --plan: number of ranks; None: as started."""
    gpu_gib: float = 80
    """For --plan: memory of a GPU in GiB; 0: the plan is for CPU processes."""
    max_steps: int | None = None
    """Stop early."""
    save_every: int = 20
    """Steps between checkpoints; the last step always makes one."""
    keep_checkpoints: int = 1
    """Older ones are removed."""


@dataclass
class Trajectory:
    """One response and all that belongs to it; what a step needs is looked up here, never by position."""

    prompt_id: str
    sample_id: int
    row: dict
    place: int  # of the prompt in the step's batch: decides its mini-batch
    prompt_ids: list[int]  # x: what it is trained under
    parent: "Trajectory | None" = None  # of an edit: its original
    sampled_under: list[int] = field(default_factory=list)  # x, or the edit prompt
    response_ids: list[int] = field(default_factory=list)  # with its stop token
    engine_logprobs: list[float] = field(default_factory=list)
    answer: str = ""
    truncated: bool = False
    judgement: Judgement | None = None
    reward: float | None = None
    audit: dict | None = None  # {"again": reward, "second": reward}
    # filled before the update, fp32 [len(response_ids)] each
    old_logprobs: torch.Tensor | None = None  # pi_old(y | x); of an edit pi_e(y_e | edit prompt)
    values: torch.Tensor | None = None
    credit: torch.Tensor | None = None  # sdpo
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None

    @property
    def key(self):
        return (self.prompt_id, self.sample_id, self.parent is not None)


# -- the mathematics: pure functions -----------------------------------------------------------------------------------


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman 2016, eq. 16), right-padded.

    rewards, values, mask: [N, L]; values[:, t] is that of the state before token t; after the last token it is 0.
    -> advantages [N, L], returns [N, L] (advantages + values); zero where mask is.
    """
    advantages = torch.zeros_like(values)
    following, next_value = torch.zeros(len(values)), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, eps_low, eps_high):
    """PPO's clipped objective (eq. 7), per token [S] -> loss [S], ratio [S], clipped [S] (bool: no gradient)."""
    ratio = torch.exp(logprobs - old_logprobs)
    pg_loss1 = -ratio * advantages
    pg_loss2 = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    return torch.maximum(pg_loss1, pg_loss2), ratio.detach(), pg_loss2 > pg_loss1


def edit_loss(kind, logprobs, edit_logprobs, advantages, eps_low=0.2, eps_high=0.2, cap=None, gamma=0.1):
    """The loss on edits per token (METHOD 2), with p = pi_theta(y_e | x), q = pi_e(y_e | edit prompt), r = p / q.

    kind       loss                                weight on grad log p
    paper      -clip(r, 1-eps_low, 1+eps_high) A   r inside the range, else 0
    unclipped  -min(r, cap) A                      r, 0 above the cap
    tis        -sg(min(r, cap)) A log p            min(r, cap)
    luffy      -A p / (p + gamma)                  gamma p / (p + gamma)^2
    none       -A log p                            1

    logprobs = log p, edit_logprobs = log q, advantages: [S] -> loss [S], r [S], weight [S] (both detached). To try
    another loss, add it here and to EDIT_LOSSES.
    """
    log_ratio = logprobs - edit_logprobs
    ratio = log_ratio.detach().exp()
    if kind == "paper":
        low, high = math.log(1 - eps_low), math.log(1 + eps_high)
        loss = -log_ratio.clamp(low, high).exp() * advantages
        weight = torch.where((log_ratio >= low) & (log_ratio <= high), ratio, 0.0)
    elif kind == "unclipped":
        # the minimum is taken of the logs: the exponential of an outlier would be infinite, its gradient not a number
        loss = -log_ratio.clamp(max=math.log(cap)).exp() * advantages
        weight = torch.where(ratio <= cap, ratio, 0.0)
    elif kind == "tis":
        weight = ratio.clamp(max=cap)
        loss = -weight * advantages * logprobs
    elif kind == "luffy":
        p = logprobs.exp()
        loss = -advantages * p / (p + gamma)
        weight = gamma * p / (p + gamma) ** 2
    else:
        loss = -advantages * logprobs
        weight = torch.ones_like(ratio)
    return loss, ratio, weight.detach()


def value_loss(values, old_values, returns, clip):
    """Clipped value loss per token [S] -> loss [S], clipped [S] (bool: no gradient)."""
    limited = old_values + (values - old_values).clamp(-clip, clip)
    loss1, loss2 = (values - returns).square(), (limited - returns).square()
    return 0.5 * torch.maximum(loss1, loss2), loss2 > loss1


def select_edits(edits, rate, strategy, seed):
    """Which edits join the batch (METHOD 1.8).

    edits: (prompt_id, sample_id, reward, reward of its original) of the whole batch -> set of (prompt_id, sample_id).
    A share `rate` of a prompt's edits need not be a whole number: it is rounded up or down at random, so that the
    mean is right. The result does not depend on the order of `edits`.
    """
    edits = sorted(edits)
    rng = random.Random(seed)
    if strategy in ("random", "batch_rank"):
        rng.shuffle(edits)  # equal rewards in random order
        if strategy == "batch_rank":
            edits.sort(key=lambda e: -e[2])
        return {e[:2] for e in edits[: round(rate * len(edits))]}
    of_prompt = defaultdict(list)
    for edit in edits:
        of_prompt[edit[0]].append(edit)
    chosen = set()
    for group in of_prompt.values():
        rng.shuffle(group)
        group.sort(key=lambda e: -e[2] if strategy == "reward_rank" else e[3] - e[2])
        chosen |= {e[:2] for e in group[: int(rate * len(group) + rng.random())]}
    return chosen


# -- the phases of a step ----------------------------------------------------------------------------------------------


def rollout(prompts, engine, judge, chat, templates, args, step, progress):
    """Originals, their judgements, edits and theirs (METHOD 1.6a-d), all overlapping.

    prompts: (place, row, prompt ids) of this rank -> judged trajectories (originals and edits), {kind: lost ones}.
    """
    editing = args.edit_rate > 0 and args.edit_ratio != "sdpo"
    needs_critique = editing or args.edit_ratio == "sdpo"
    lost = dict(originals=[], edits=[], truncated=[])
    judged, in_engine, in_judge = [], {}, {}

    def sample(trajectory):
        kind = "edit" if trajectory.parent else "original"
        seed = derive_seed(args.seed, step, trajectory.prompt_id, trajectory.sample_id, kind)
        in_engine[trajectory.key, 0] = trajectory
        engine.submit(
            trajectory.sampled_under,
            key=trajectory.key,
            seeds=[seed],
            max_new_tokens=args.max_response_length,
            temperature=args.temperature,
            top_p=args.top_p,
        )

    for place, row, ids in prompts:
        group = [Trajectory(row["prompt_id"], i, row, place, ids, sampled_under=ids) for i in range(args.n_samples)]
        in_engine.update({(place, i): t for i, t in enumerate(group)})
        seeds = [derive_seed(args.seed, step, row["prompt_id"], i, "original") for i in range(args.n_samples)]
        engine.submit(
            ids,
            key=place,
            n=args.n_samples,
            seeds=seeds,
            max_new_tokens=args.max_response_length,
            temperature=args.temperature,
            top_p=args.top_p,
        )

    while engine.busy or judge.busy:
        engine.step()
        for s in engine.collect():
            t = in_engine.pop((s.key, s.index))
            t.response_ids = s.ids + ([s.stop_id] if s.finish_reason == "stop" else [])
            t.engine_logprobs, t.truncated, t.answer = s.logprobs, s.finish_reason == "length", chat.decode(s.ids)
            if t.truncated and args.truncated == "drop":
                lost["truncated"].append(t)
                continue
            in_judge[t.key] = t
            judge.submit(t.key, t.row, t.answer, derive_seed(args.seed, step, *t.key, "judge"))
        for verdict in judge.poll():
            t = in_judge.pop(verdict.key)
            if verdict.reward is None:
                lost["edits" if t.parent else "originals"].append(t)
                continue
            t.judgement, t.reward = verdict.judgement, verdict.reward
            if t.truncated and args.truncated == "floor":
                t.reward = -5.0 * sum(args.score_weights)
            judged.append(t)
            if needs_critique and t.parent is None and not (t.judgement and t.judgement.critique.strip()):
                raise ValueError(
                    f'--judge {args.judge}: no critique of an answer to prompt "{t.prompt_id}", which edits '
                    "(--edit-rate > 0) and sdpo need"
                )
            if editing and t.parent is None:
                under = edit_prompt(chat, templates, t.prompt_ids, t.response_ids, t.judgement.critique)
                sample(Trajectory(t.prompt_id, t.sample_id, t.row, t.place, t.prompt_ids, t, under))
            progress.set_postfix_str(
                f"rollout: {len(judged)} judged, {len(in_engine)} sampling, {len(in_judge)} at judge"
            )
    return judged, lost


def share_out(trajectories, args, ranks):
    """Deals whole prompts out to the ranks anew, evenly by tokens in each mini-batch -> this rank's, by place.

    Responses differ in length, and every rank waits for the one that has most to compute.
    """
    batch = sorted(all_gather(ranks, trajectories), key=lambda t: (t.place, t.key))
    prompts = [list(group) for _, group in itertools.groupby(batch, key=lambda t: t.place)]
    mine = []
    for _, groups in itertools.groupby(prompts, key=lambda group: group[0].place // args.mini_batch_prompts):
        groups = list(groups)
        sizes = [len(group[0].prompt_ids) + sum(len(t.response_ids) for t in group) for group in groups]
        for i in packing.balance(sizes, ranks.world_size)[ranks.rank]:
            mine += groups[i]
    return mine


def fill_old_logprobs(batch, policy, args, ranks, stats):
    """Fills old_logprobs: of an edit pi_e(y_e | edit prompt), of an original pi_old(y_o | x).

    The first mini-batch is trained with the weights that sampled it, so there an original's ratio is 1, and `update`
    takes the log-probs of its own pass. An edit prompt goes on from prompt and y_o: all of this shares the prompt, and
    y_o is scored on the way to its edit.
    """
    unscored = {t.key: t for t in batch if t.parent is None and t.place >= args.mini_batch_prompts}
    rows = []  # prefix, suffix, which of its tokens are scored, whose they are
    for t in sorted(batch, key=lambda t: (t.place, t.parent is None)):  # of each prompt the edits first
        suffix, scored, owners = [], [], [t]
        if t.parent is not None:
            suffix, y_o = t.sampled_under[len(t.prompt_ids) :], t.parent.response_ids
            scored = [False] * len(suffix)
            if t.parent.key in unscored and suffix[: len(y_o)] == y_o:
                scored[: len(y_o)] = [True] * len(y_o)
                owners = [unscored.pop(t.parent.key), t]
        elif unscored.pop(t.key, None) is None:
            continue
        rows.append((t.prompt_ids, suffix + t.response_ids, scored + [True] * len(t.response_ids), owners))
    prefixes, suffixes, trained, owners = zip(*rows) if rows else ((), (), (), ())
    for ts, logprobs in zip(owners, per_token(policy, prefixes, suffixes, trained, args, ranks, stats)):
        for t, t.old_logprobs in zip(ts, logprobs.split([len(t.response_ids) for t in ts])):
            diagnostics.add_gap(t, stats)


def fill_credit(batch, policy, chat, templates, args, ranks, stats):
    """SDPO's credit of each token (METHOD 5, arXiv 2601.20802): log pi(y_t | x, critique, y_<t) - log pi(y_t | x, y_<t).

    The critique is said as in an edit prompt, after an empty answer: y_o itself must not be in the context.
    """
    rows = []
    for t in batch:
        told = edit_prompt(chat, templates, t.prompt_ids, [], t.judgement.critique)[len(t.prompt_ids) :]
        for context in [told, []] if t.old_logprobs is None else [told]:  # under x alone only where not yet known
            trained = [False] * len(context) + [True] * len(t.response_ids)
            rows.append((t.prompt_ids, context + t.response_ids, trained))
    prefixes, suffixes, trained = zip(*rows) if rows else ((), (), ())
    logprobs = iter(per_token(policy, prefixes, suffixes, trained, args, ranks, stats))
    for t in batch:
        with_critique = next(logprobs)
        t.credit = with_critique - (next(logprobs) if t.old_logprobs is None else t.old_logprobs)
        diagnostics.describe_credit(t, stats)


@torch.no_grad()
def per_token(model, prefixes, suffixes, trained, args, ranks, stats):
    """Log-probs of the trained tokens of each suffix (None: all), or the critic's values before them -> list of fp32 [L_i]."""
    results = [None] * len(suffixes)
    for indices, batch in packing.packed_micro_batches(prefixes, suffixes, trained, args.tokens_per_microbatch, ranks):
        if not indices:
            idle_pass(model, args, ranks)
            continue
        stats.flops += training.forward_flops(model, batch)
        for i, result in zip(indices, forward(model, batch, args.temperature).cpu().split(batch.counts)):
            results[i] = result
    training.reshard(model)
    return results


def idle_pass(model, args, ranks):
    """What a rank without work runs, since FSDP needs every rank in every pass; adds zero to all gradients."""
    result = forward(model, packing.pack([packing.EMPTY[0]], [packing.EMPTY[1]], ranks.device), args.temperature)
    if torch.is_grad_enabled():
        (0 * result.sum()).backward()


def forward(model, batch, temperature):
    """Log-probs of the batch's targets [S], or values before them [S]."""
    ids, context = batch.input_ids, batch.context
    if model.scalar_head:
        return model(ids, context.position_ids, context, batch.index)
    return model(ids, context.position_ids, context, batch.index, batch.targets, temperature)[0]


def compute_advantages(batch, args, ranks):
    """Fills advantages and returns of every trajectory (METHOD 1.6f) -> explained variance of the values."""
    if batch:
        values = pad_sequence([t.values for t in batch], batch_first=True)  # [N, L]
        mask = pad_sequence([torch.ones(len(t.response_ids)) for t in batch], batch_first=True)
        rewards = torch.zeros_like(values)
        for i, t in enumerate(batch):
            rewards[i, len(t.response_ids) - 1] = t.reward
        advantages, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
        for i, t in enumerate(batch):
            n = len(t.response_ids)
            t.advantages, t.returns = advantages[i, :n], returns[i, :n]

    against_originals = args.edit_baseline == "original"
    group = defaultdict(list)
    for t in batch:
        if t.parent is None:
            group[t.place].append(t.reward)
    whitened = [t for t in batch if t.parent is None or not against_originals]
    mean, std = moments(ranks, torch.cat([t.advantages for t in whitened] or [torch.zeros(0)]))
    for t in batch:
        if t.parent is not None and against_originals:
            # in units of the same spread, but not moved by the batch's mean
            edge = t.reward - sum(group[t.place]) / len(group[t.place])
            t.advantages = torch.full_like(t.advantages, edge / (std + 1e-8))
        else:
            t.advantages = (t.advantages - mean) / (std + 1e-8)
        if t.credit is not None:  # raw, as the method mixes it
            t.advantages = args.sdpo_lambda * t.advantages + (1 - args.sdpo_lambda) * t.credit

    all_returns = torch.cat([t.returns for t in batch] or [torch.zeros(0)])
    residual = all_returns - torch.cat([t.values for t in batch] or [torch.zeros(0)])
    _, spread = moments(ranks, all_returns)
    _, unexplained = moments(ranks, residual)
    return 1 - unexplained**2 / spread**2 if spread > 0 else float("nan")


def policy_pass(policy, packed, trajectories, args, stats):
    """One micro-batch -> the sum of its tokens' losses, with the graph."""
    device, cap = packed.input_ids.device, args.ratio_cap or {"unclipped": 10.0, "tis": 2.0}.get(args.edit_ratio)
    logprobs, entropy = policy(
        packed.input_ids, packed.context.position_ids, packed.context, packed.index, packed.targets, args.temperature
    )
    for t, now in zip(trajectories, logprobs.detach().cpu().split(packed.counts)):
        if t.old_logprobs is None:  # these are still the weights that sampled it: the ratio is 1
            t.old_logprobs = now
            diagnostics.add_gap(t, stats)
    old_logprobs, advantages = (
        torch.cat([getattr(t, name) for t in trajectories]).to(device) for name in ("old_logprobs", "advantages")
    )
    edit = torch.cat([torch.full((n,), t.parent is not None) for t, n in zip(trajectories, packed.counts)]).to(device)
    loss_o, ratio_o, clipped = policy_loss(
        logprobs[~edit], old_logprobs[~edit], advantages[~edit], args.eps_low, args.eps_high
    )
    loss_e, ratio_e, weight = edit_loss(
        args.edit_ratio,
        logprobs[edit],
        old_logprobs[edit],
        advantages[edit],
        args.eps_low,
        args.eps_high,
        cap,
        args.luffy_gamma,
    )
    stats.add("policy_loss", torch.cat([loss_o, loss_e]).detach())
    stats.add("entropy", entropy)
    diagnostics.describe_originals(ratio_o, clipped, stats)
    diagnostics.describe_edits([t for t in trajectories if t.parent], ratio_e, weight, advantages[edit], args, stats)
    return loss_o.sum() + loss_e.sum()


def critic_pass(critic, packed, trajectories, args, stats):
    """The same for the critic."""
    values = forward(critic, packed, args.temperature)
    old_values, returns = (
        torch.cat([getattr(t, name) for t in trajectories]).to(values.device) for name in ("values", "returns")
    )
    loss, clipped = value_loss(values, old_values, returns, args.value_clip)
    stats.add("value_loss", loss.detach())
    stats.add("value_clipfrac", clipped)
    return loss.sum()


def update(batch, policy, critic, optimizers, train_policy, args, ranks, stats):
    """PPO epochs over mini-batches of prompts (METHOD 1.6g); losses are means over the tokens of all ranks.

    One model after the other, so that only one has gradients at a time.
    """
    n_mini_batches = math.ceil(args.prompts_per_step / args.mini_batch_prompts)
    for mini_batch in list(range(n_mini_batches)) * args.ppo_epochs:
        mine = [t for t in batch if t.place // args.mini_batch_prompts == mini_batch]
        (n_tokens,) = all_sum(ranks, sum(len(t.response_ids) for t in mine))
        if n_tokens == 0:  # every prompt of it lost its judgements
            continue
        prompts, responses = [t.prompt_ids for t in mine], [t.response_ids for t in mine]
        micro_batches = packing.packed_micro_batches(prompts, responses, None, args.tokens_per_microbatch, ranks)
        passes = [([mine[i] for i in indices], packed) for indices, packed in micro_batches]
        stats.logical_tokens += sum(map(len, prompts + responses))
        stats.computed_tokens += sum(len(packed.input_ids) for _, packed in passes if packed)

        for name, model, lr, loss_of in (
            ("policy", policy, args.lr, policy_pass),
            ("critic", critic, args.critic_lr, critic_pass),
        ):
            if name == "policy" and not train_policy:
                continue
            for some, packed in passes:
                if not some:
                    idle_pass(model, args, ranks)
                    continue
                stats.flops += 3 * training.forward_flops(model, packed)  # the backward pass costs two forward ones
                # FSDP averages gradients over the ranks; times world_size makes that the sum
                (loss_of(model, packed, some, args, stats) * ranks.world_size / n_tokens).backward()
            norm = training.optimizer_step(model, optimizers[name], lr, args.max_grad_norm, args.offload)
            stats.add(f"grad_norm_{name}", torch.tensor(norm))


# -- the loop ----------------------------------------------------------------------------------------------------------


def read_prompts(path, args, chat, templates):
    """(row, prompt ids) of every prompt within the length limit."""
    rows = read_rows(path, "prompt")
    prompts = [(row, answer_prompt(chat, templates, row)) for row in rows]
    kept = [(row, ids) for row, ids in prompts if len(ids) <= args.max_prompt_length]
    print0(
        f"{len(kept)} prompts from {path}; {len(prompts) - len(kept)} left out "
        f"(over --max-prompt-length {args.max_prompt_length} tokens)"
    )
    return kept


def main(args):
    # an edit's context is prompt, answer and critique
    max_len = args.max_prompt_length + 2 * args.max_response_length + args.max_judgement_length + 512
    judge_settings = JudgeSettings(
        weights=args.score_weights,
        attempts=args.judge_attempts,
        temperature=args.judge_temperature,
        max_new_tokens=args.max_judgement_length,
        answer_template=args.answer_template,
        grm_template=args.grm_template,
        max_batch=args.max_batch,
    )
    judge_specs = {"judge": args.judge} | ({"audit judge": args.audit_judge} if args.audit_judge else {})
    for name, spec in judge_specs.items():
        if parse_spec(spec)[0].compares:
            raise ValueError(f"--{name.replace(' ', '-')} {spec} compares answers; expected a judge that scores one")
    if args.plan:
        machine, resident = plan.machine_of(args), {}
        for name, spec in judge_specs.items():
            parts = planned_memory(spec, judge_settings, machine)
            resident |= {f"{name}: {part}": size for part, size in parts.items()}
        return plan.ppo(args, max_len, resident)
    ranks = start(args.dtype, args.shard_size)
    for flag in ("edit_rate", "sdpo_lambda", "audit_share"):
        if not 0 <= getattr(args, flag) <= 1:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected a share from 0 to 1")
    if args.kv_tokens is not None and args.kv_tokens < max_len:
        raise ValueError(f"--kv-tokens {args.kv_tokens}: expected at least {max_len}, an edit prompt and its response")
    if args.eval_every < 1 or args.eval_n < 1:
        raise ValueError(f"--eval-every {args.eval_every} --eval-n {args.eval_n}: expected 1 or more")
    if args.audit_judge and not args.audit_share:
        raise ValueError(f"--audit-judge {args.audit_judge}: expected an --audit-share above 0")
    tokenizer_from = resolve(args.policy)
    chat = Chat(tokenizer_from)
    templates = load_templates(tokenizer_from, args.answer_template, args.edit_template)
    prompts = read_prompts(args.prompts, args, chat, templates)
    if len(prompts) < args.prompts_per_step:
        raise ValueError(
            f"{args.prompts}: {len(prompts)} usable prompts, fewer than --prompts-per-step {args.prompts_per_step}"
        )
    held_out = read_prompts(args.eval_prompts, args, chat, templates)[: args.eval_n] if args.eval_prompts else []
    held_out = [(place, *prompt) for place, prompt in enumerate(held_out)][ranks.rank :: ranks.world_size]
    total_steps = int(args.epochs * (len(prompts) // args.prompts_per_step))
    judge = open_judge(args.judge, judge_settings, ranks)
    second = open_judge(args.audit_judge, judge_settings, ranks) if args.audit_judge else None
    # None: not known before its first verdict, see `rollout`
    if (args.edit_rate > 0 or args.edit_ratio == "sdpo") and judge.writes_critiques is False:
        raise ValueError(f"--judge {args.judge} writes no critiques, which edits (--edit-rate > 0) and sdpo need")

    runs.open_run(args, ranks)
    policy = load_pretrained(args.policy, torch.float32, ranks.device, shard=lambda m: training.shard(m, ranks))
    critic = load_pretrained(
        args.critic or args.policy,
        torch.float32,
        ranks.device,
        scalar_head=True,
        shard=lambda m: training.shard(m, ranks),
    )
    policy.checkpoint_activations = critic.checkpoint_activations = args.checkpoint_activations
    models = {"policy": policy, "critic": critic}
    optimizers = {
        "policy": training.adamw(policy, args.lr, args.weight_decay),
        "critic": training.adamw(critic, args.critic_lr, args.weight_decay),
    }
    first_step = runs.load_checkpoint(args.out, models, optimizers, ranks)
    last_step = min(total_steps, args.max_steps or total_steps)
    # the engine's own copy, whole on every rank, in the compute dtype
    sampler = load_pretrained(args.policy, ranks.dtype, ranks.device)
    engine = Engine(sampler, chat.stop_ids, max_len, args.max_batch, args.kv_tokens)

    progress = tqdm(range(first_step, last_step), initial=first_step, total=last_step, disable=ranks.rank > 0)
    for step in progress:
        clock = [time.perf_counter()]
        stats = runs.Stats()

        # 1. originals, critiques, edits, with the weights as they are now
        rows = packing.batch_indices(len(prompts), args.prompts_per_step, step, args.seed)
        engine.refresh(policy)
        gap = training.refresh_gap(engine.model, policy, prompts[rows[0]][1], ranks)
        clock.append(time.perf_counter())
        if args.offload:
            training.to_host(models, optimizers)
        mine = [(place, *prompts[i]) for place, i in enumerate(rows)][ranks.rank :: ranks.world_size]
        judged, lost = rollout(mine, engine, judge, chat, templates, args, step, progress)
        clock.append(time.perf_counter())
        counts = {f"lost/{name}": len(some) for name, some in lost.items()}
        counts["judge_calls"], counts["judge_unparsed"] = judge.take_counts()
        diagnostics.audit(judged, judge, second, args, step, stats)
        if args.eval_prompts and step % args.eval_every == 0:
            seen = rollout(held_out, engine, judge, chat, templates, replace(args, n_samples=1), "held out", progress)
            diagnostics.describe_held_out(*seen, judge, stats)
            runs.write_step(args.out, "held_out", step + 1, diagnostics.rollout_rows(seen[0]), ranks)
        judge.take_counts()  # of these: not a cost of the training
        clock.append(time.perf_counter())
        if args.offload:  # the moments follow in `optimizer_step`
            for model in models.values():
                model.to(ranks.device)

        # 2. all originals and a share of the edits; chosen on every rank alike from the rewards of all
        edits = [(*t.key[:2], t.reward, t.parent.reward) for t in judged if t.parent]
        seed = derive_seed(args.seed, step, "select")
        selected = select_edits(all_gather(ranks, edits), args.edit_rate, args.edit_strategy, seed)
        batch = share_out([t for t in judged if t.parent is None or t.key[:2] in selected], args, ranks)
        (n_batch,) = all_sum(ranks, len(batch))
        if n_batch == 0:
            raise ValueError(
                f"step {step + 1}: no response is left to train on (on this rank: {counts}); is --judge "
                f"{args.judge} a reward model for these answers?"
            )
        diagnostics.describe_rollout(judged, lost, selected, stats)

        # 3. log-probs and values before the update, advantages
        progress.set_postfix_str("log-probs and values")
        train_policy = step >= args.critic_warmup_steps
        if train_policy:
            fill_old_logprobs(batch, policy, args, ranks, stats)
            if args.edit_ratio == "sdpo":
                fill_credit(batch, policy, chat, templates, args, ranks, stats)
        prefixes, suffixes = [t.prompt_ids for t in batch], [t.response_ids for t in batch]
        values = per_token(critic, prefixes, suffixes, None, args, ranks, stats)
        for t, of_t in zip(batch, values):
            t.values = of_t
        explained_variance = compute_advantages(batch, args, ranks)
        if step + 1 == args.save_batch:
            diagnostics.save_batch(args, step + 1, batch, policy, tokenizer_from, ranks)
        clock.append(time.perf_counter())

        # 4. the update
        progress.set_postfix_str("update")
        update(batch, policy, critic, optimizers, train_policy, args, ranks, stats)
        clock.append(time.perf_counter())

        # 5. what happened
        counts["lost/prompts"] = len(mine) - len({t.place for t in judged})
        counts["generated_tokens"] = sum(len(t.response_ids) for t in judged)
        counts |= dict(trained_tokens=stats.logical_tokens, computed_tokens=stats.computed_tokens)
        counts = dict(zip(counts, map(int, all_sum(ranks, *counts.values()))))
        phases = ("refresh", "rollout", "diagnostics", "score", "update")
        seconds = dict(zip(phases, (b - a for a, b in zip(clock, clock[1:]))))
        training_seconds = seconds["score"] + seconds["update"]
        runs.log_metrics(
            args.out,
            dict(
                step=step + 1,
                **stats.means(ranks),
                explained_variance=explained_variance,
                refresh_gap=gap,
                batch=int(n_batch),
                **counts,
                **training.machine_metrics(ranks, stats.flops, training_seconds, args.peak_tflops),
                generated_tokens_per_second=counts["generated_tokens"] / seconds["rollout"],
                trained_tokens_per_second=counts["trained_tokens"] / training_seconds,
                **{f"seconds/{k}": round(v, 3) for k, v in seconds.items()},
            ),
            ranks,
        )
        runs.write_step(args.out, "rollouts", step + 1, diagnostics.rollout_rows(judged, selected), ranks)
        if (step + 1) % args.save_every == 0 or step + 1 == last_step:
            runs.save_checkpoint(
                args.out,
                step + 1,
                models,
                optimizers,
                tokenizer_from,
                ranks,
                args.keep_checkpoints,
                templates.texts("answer", "edit"),
            )
    print0(f"weights: {args.out}/policy (and critic)")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
