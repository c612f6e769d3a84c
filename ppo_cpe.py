"""Stage 3: PPO with critique-post-edit (arXiv 2510.18849, section 4; docs/method.md 1.6).

One step:

1. Rollout. For each of `prompts_per_step` prompts the policy samples `n_samples` originals y_o. The judge writes a
   critique and scores of each; the policy rewrites y_o by the critique, once: y_e; the judge scores y_e. These overlap:
   a critique starts when its answer ends, an edit when its critique arrives.
2. Selection. The batch is all originals and a share `edit_rate` of the edits. An edit is trained *under the original
   prompt*: neither y_o nor the critique is in its context.
3. The critic's values, GAE with the reward on the last token, advantages whitened over all response tokens.
4. Update, in mini-batches of prompts: PPO-clip on originals; on edits one of six losses on
   r = pi_theta(y_e | x) / pi_e(y_e | edit prompt), see `edit_loss`; clipped value loss for the critic.
   `--edit-ratio sdpo` edits nothing: the critique gives the original's own tokens a credit, see `fill_credit`.

`--edit-rate 0` is the PPO baseline (nothing is edited; the paper then samples n = 6). `--judge bt:out/bt/model` is the
Bradley-Terry baseline.

Where this departs from the paper or its code, and why (docs/method.md 2 has the whole table):
- A judgement that does not parse is asked again, then its sample leaves the batch: no score is ever made up.
- The ratio on edits is by default `unclipped` with a cap, which the released results ran with; `paper` is the printed
  clip, under which words that only the critique suggested get no gradient.

    python ppo_cpe.py                                             # one CPU or GPU
    torchrun --nproc_per_node=8 ppo_cpe.py                        # eight GPUs
    python ppo_cpe.py --edit-rate 0 --n-samples 6 --out out/ppo   # the baseline
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from runtime import flags

EDIT_LOSSES = ("paper", "unclipped", "tis", "luffy", "topr", "none")  # see `edit_loss`


@dataclass(kw_only=True)
class Args(flags.Judging, flags.Sampling, flags.Watching, flags.Machine):
    # -- what goes in and out
    model: str = "out/sft/policy"
    """Folder or hub id of the policy at the start."""
    critic: str | None = None
    """Folder that the critic starts from (with its scalar head, if it has one); none: --model, with a head of zero."""
    prompts: str = "out/data/prompts_train.jsonl"
    """Prompt rows."""
    out: str = "out/ppo_cpe"
    """Run folder; the newest weights are OUT/policy and OUT/critic. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File that replaces the prompt that --model was trained with."""
    edit_template: str | None = None
    """File that replaces its request to rewrite an answer."""

    # -- rollout (docs/method.md 1.6a; temperature and top-p as in the released code)
    prompts_per_step: flags.Count = 128
    """Prompts of a step, over all ranks."""
    n_samples: flags.Count = 4
    """Originals per prompt."""
    temperature: flags.Positive = 0.9
    """Of originals and edits, and of every log-prob."""
    top_p: flags.TopP = 0.9
    """Nucleus; recorded log-probs stay those of the full softmax."""
    max_prompt_length: flags.Count = 2048
    """Tokens; longer prompts are left out at the start and counted."""
    max_new_tokens: flags.Count = 2048
    """Tokens of an original or an edit."""
    truncated: Literal["judge", "drop", "floor"] = "judge"
    """A response that hits the limit: scored as it stands | leaves the batch | gets the lowest possible score."""

    # -- edits (docs/method.md 1.6e, 1.7, 1.8 and 2)
    edit_rate: flags.Share = 0.5
    """Share r_e of the edits that joins the batch; 0 is plain PPO."""
    edit_strategy: Literal["random", "reward_rank", "conditional", "batch_rank"] = "random"
    """Over the batch at random | per prompt the best-scored | per prompt the most improved | the best of the batch."""
    edit_below: flags.Finite | None = None
    """Only answers with a lower reward are edited, which saves the tokens of edits that change little; none: all."""
    edit_ratio: Literal[*EDIT_LOSSES, "sdpo"] = "unclipped"
    """The loss on edits: see `edit_loss`. sdpo: nothing is edited, the critique gives each token a credit instead."""
    ratio_cap: flags.Positive | None = None
    """Upper bound of the ratio for unclipped and tis; None: 10 and 2."""
    luffy_gamma: flags.Positive = 0.1
    """gamma of p / (p + gamma)."""
    sdpo_lambda: flags.Share = 0.5
    """With sdpo: lambda A + (1 - lambda) credit; one half leans to neither."""
    edit_baseline: Literal["batch", "original"] = "batch"
    """An edit's advantage: as any other (critic, whitened) | its reward less the mean of its prompt's originals."""

    # -- PPO (docs/method.md 1.6f, g)
    epochs: flags.Positive = 2
    """Passes over the prompts; the last partial step of each is dropped."""
    mini_batch_prompts: flags.Count = 64
    """Prompts per update."""
    ppo_epochs: flags.Count = 1
    """Passes over a step's batch."""
    lr: flags.Positive = 1e-6
    """Policy; constant."""
    critic_lr: flags.Positive = 1e-5
    """Critic; constant."""
    critic_warmup_steps: flags.Natural = 0
    """Steps in which only the critic is trained."""
    eps_low: flags.Share = 0.2
    """Lower clip of the ratio, 1 - eps_low."""
    eps_high: flags.Positive = 0.2
    """Upper clip of the ratio, 1 + eps_high."""
    value_clip: flags.Positive = 0.5
    """Largest step of a value within an update."""
    gamma: flags.Share = 1.0
    """Discount per token."""
    gae_lambda: flags.Share = 1.0
    """GAE; 1 is the whole return less the value."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, of both models."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping, of each model."""
    seed: int = 0
    """Order of the prompts, sampling, selection."""

    save_every: flags.MayChange[flags.Count] = 20
    """Steps between checkpoints; the last step always makes one."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import functools
import math
import random
import time
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import diagnostics
from chat import Chat
from engine import Engine
from judges import JudgeSettings, fingerprint, open_judge, parse_spec, planned_memory
from model import Transformer
from prompts import Judgement, Templates, edit_prompt, load_templates, read_prompts
from runtime import checkpoints, packing, plan, roofline, runs, training
from runtime.distributed import Ranks, all_gather, all_sum, derive_seed, moments, start
from runtime.watch import enter
from weights import resolve


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
    left: str | None = None  # the batch, and why
    audit: dict | None = None  # {"again": reward, "second": reward}
    old_logprobs: torch.Tensor | None = None  # fp32 [n], as all below: pi_old(y | x), pi_e(y_e | edit prompt)
    values: torch.Tensor | None = None
    credit: torch.Tensor | None = None  # sdpo
    advantages: torch.Tensor | None = None
    returns: torch.Tensor | None = None
    trained: torch.Tensor | None = None  # [2, n]: log p in the last update, the weight on its gradient

    @property
    def key(self):
        return (self.prompt_id, self.sample_id, self.parent is not None)


@dataclass
class Run:
    """What every phase of a step needs."""

    args: Args
    ranks: Ranks
    chat: Chat
    templates: Templates
    stats: runs.Stats = field(default_factory=runs.Stats)  # of one step
    step: int = 0


# -- the mathematics: pure functions -----------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
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


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, eps_low: float, eps_high: float):
    """PPO's clipped objective (eq. 7), per token [S] -> loss [S], ratio [S], clipped [S] (bool: no gradient)."""
    ratio = torch.exp(logprobs - old_logprobs)
    pg_loss1 = -ratio * advantages
    pg_loss2 = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    return torch.maximum(pg_loss1, pg_loss2), ratio.detach(), pg_loss2 > pg_loss1


def edit_loss(
    kind, logprobs: Tensor, edit_logprobs: Tensor, advantages: Tensor, eps_low=0.2, eps_high=0.2, cap=None, gamma=0.1
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss on edits per token (docs/method.md 2): p = pi_theta(y_e | x), q = pi_e(y_e | edit prompt), r = p / q.

    kind       loss                                weight on grad log p
    paper      -clip(r, 1-eps_low, 1+eps_high) A   r inside the range, else 0
    unclipped  -min(r, cap) A                      r, 0 above the cap
    tis        -sg(min(r, cap)) A log p            min(r, cap)
    luffy      -A p / (p + gamma)                  gamma p / (p + gamma)^2
    topr       -A log p, times sg(min(r, 1)) if A < 0    1 where A >= 0, else min(r, 1)
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
    elif kind == "topr":  # arXiv 2503.14286: what was bad is unlearned only as far as the policy would say it
        weight = torch.where(advantages < 0, ratio.clamp(max=1), 1.0)
        loss = -weight * advantages * logprobs
    else:
        loss = -advantages * logprobs
        weight = torch.ones_like(ratio)
    return loss, ratio, weight.detach()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss per token [S] -> loss [S], clipped [S] (bool: no gradient)."""
    limited = old_values + (values - old_values).clamp(-clip, clip)
    loss1, loss2 = (values - returns).square(), (limited - returns).square()
    return 0.5 * torch.maximum(loss1, loss2), loss2 > loss1


def select_edits(edits: list[tuple], rate: float, strategy: str, seed: int) -> set[tuple[str, int]]:
    """Which edits join the batch (docs/method.md 1.8).

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


def rollout(prompts: list, engine: Engine, judge, run: Run, step, progress) -> tuple[list[Trajectory], dict[str, list]]:
    """Originals, their judgements, edits and theirs (docs/method.md 1.6a-d), all overlapping.

    prompts: (place, row, prompt ids) of this rank -> judged trajectories (originals and edits), {kind: lost ones}.
    """
    args = run.args
    editing = args.edit_rate > 0 and args.edit_ratio != "sdpo"
    needs_critique = editing or args.edit_ratio == "sdpo"
    sampling = dict(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
    lost = dict(originals=[], edits=[], truncated=[])
    judged, in_engine, in_judge = [], {}, {}  # in_engine: by the key of a submission, and the number of the sample

    for place, row, ids in prompts:
        group = [Trajectory(row["prompt_id"], i, row, place, ids, sampled_under=ids) for i in range(args.n_samples)]
        in_engine.update({(place, i): t for i, t in enumerate(group)})
        seeds = [derive_seed(args.seed, step, row["prompt_id"], i, "original") for i in range(args.n_samples)]
        engine.submit(ids, key=place, n=args.n_samples, seeds=seeds, **sampling)

    while engine.busy or judge.busy:
        engine.step()
        for s in engine.collect():
            t = in_engine.pop((s.key, s.index))
            t.response_ids = s.ids + ([s.stop_id] if s.finish_reason == "stop" else [])
            t.engine_logprobs, t.truncated, t.answer = s.logprobs, s.finish_reason == "length", run.chat.decode(s.ids)
            if t.truncated and args.truncated == "drop":
                lost["truncated"].append(t)
                continue
            in_judge[t.key] = t
            judge.submit(t.key, t.row, t.answer, derive_seed(args.seed, step, *t.key, "judge"))
        for verdict in judge.poll():
            t = in_judge.pop(verdict.key)
            t.judgement, t.reward, t.left = verdict.judgement, verdict.reward, verdict.error
            if verdict.reward is None:
                lost["edits" if t.parent else "originals"].append(t)
                continue
            if t.truncated and args.truncated == "floor":
                t.reward = -5.0 * sum(args.score_weights)
            judged.append(t)
            if needs_critique and t.parent is None and not (t.judgement and t.judgement.critique.strip()):
                raise ValueError(f"--judge {args.judge}: no critique of an answer to prompt {t.prompt_id}")
            if editing and t.parent is None and (args.edit_below is None or t.reward < args.edit_below):
                under = edit_prompt(run.chat, run.templates, t.prompt_ids, t.response_ids, t.judgement.critique)
                edit = Trajectory(t.prompt_id, t.sample_id, t.row, t.place, t.prompt_ids, t, under)
                in_engine[edit.key, 0] = edit
                seed = derive_seed(args.seed, step, t.prompt_id, t.sample_id, "edit")
                engine.submit(under, key=edit.key, seeds=[seed], **sampling)
            progress.set_postfix_str(f"{len(judged)} judged, {len(in_engine)} sampling, {len(in_judge)} at judge")
    judged.sort(key=lambda t: (t.place, t.key))  # not in the order in which a server happened to answer
    return judged, lost


def fill_old_logprobs(batch: list[Trajectory], policy: Transformer, run: Run) -> None:
    """Fills old_logprobs: of an edit pi_e(y_e | edit prompt), of an original pi_old(y_o | x).

    The first mini-batch is trained with the weights that sampled it, so there an original's ratio is 1, and `update`
    takes the log-probs of its own pass. An edit prompt goes on from prompt and y_o: all of this shares the prompt, and
    y_o is scored on the way to its edit.
    """
    unscored = {t.key: t for t in batch if t.parent is None and t.place >= run.args.mini_batch_prompts}
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
    for scored, logprobs in zip(owners, training.per_token(policy, prefixes, suffixes, trained, run)):
        for t, own in zip(scored, logprobs.split([len(t.response_ids) for t in scored])):
            t.old_logprobs = own
            diagnostics.add_gap(t, run.stats)


def fill_credit(batch: list[Trajectory], policy: Transformer, run: Run) -> None:
    """SDPO's credit of each token (arXiv 2601.20802): log pi(y_t | x, critique, y_<t) - log pi(y_t | x, y_<t).

    The critique is said as in an edit prompt, after an empty answer: y_o itself must not be in the context.
    """
    rows = []
    for t in batch:
        told = edit_prompt(run.chat, run.templates, t.prompt_ids, [], t.judgement.critique)[len(t.prompt_ids) :]
        for context in [told, []] if t.old_logprobs is None else [told]:  # under x alone only where not yet known
            trained = [False] * len(context) + [True] * len(t.response_ids)
            rows.append((t.prompt_ids, context + t.response_ids, trained))
    prefixes, suffixes, trained = zip(*rows) if rows else ((), (), ())
    logprobs = iter(training.per_token(policy, prefixes, suffixes, trained, run))
    for t in batch:
        with_critique = next(logprobs)
        t.credit = with_critique - (next(logprobs) if t.old_logprobs is None else t.old_logprobs)
        diagnostics.describe_credit(t, run.stats)


# An edit's advantage against its originals is in units of their spread, but of at least one step between two scores:
# where all originals are scored alike their spread is zero, and a unit of it would make a gradient of any size.
SMALLEST_SPREAD = 0.05


def compute_advantages(batch: list[Trajectory], run: Run) -> None:
    """Fills advantages and returns of every trajectory (docs/method.md 1.6f)."""
    args, ranks = run.args, run.ranks
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
            t.advantages = torch.full_like(t.advantages, edge / max(std, SMALLEST_SPREAD))
        else:
            t.advantages = (t.advantages - mean) / (std + 1e-8)
        if t.credit is not None:  # raw, as the method mixes it
            t.advantages = args.sdpo_lambda * t.advantages + (1 - args.sdpo_lambda) * t.credit


def policy_pass(policy: Transformer, packed: packing.Batch, trajectories: list[Trajectory], run: Run) -> Tensor:
    """One micro-batch -> the sum of its tokens' losses, with the graph."""
    args, stats = run.args, run.stats
    device, cap = packed.input_ids.device, args.ratio_cap or {"unclipped": 10.0, "tis": 2.0}.get(args.edit_ratio)
    logprobs, entropy = policy(
        packed.input_ids, packed.context.position_ids, packed.context, packed.index, packed.targets, args.temperature
    )
    for t, now in zip(trajectories, logprobs.detach().cpu().split(packed.counts)):
        if t.old_logprobs is None:  # these are still the weights that sampled it: the ratio is 1
            t.old_logprobs = now
            diagnostics.add_gap(t, stats)
    old, advantages = (
        torch.cat([getattr(t, name) for t in trajectories]).to(device) for name in ("old_logprobs", "advantages")
    )
    edit = torch.cat([torch.full((n,), t.parent is not None) for t, n in zip(trajectories, packed.counts)]).to(device)
    bounds = (args.eps_low, args.eps_high)
    loss_o, ratio_o, clipped = policy_loss(logprobs[~edit], old[~edit], advantages[~edit], *bounds)
    of_edits = (logprobs[edit], old[edit], advantages[edit])
    loss_e, ratio_e, weight = edit_loss(args.edit_ratio, *of_edits, *bounds, cap, args.luffy_gamma)
    stats.add("policy_loss", torch.cat([loss_o, loss_e]).detach())
    stats.add("entropy", entropy)
    diagnostics.keep_tokens(trajectories, packed.counts, logprobs.detach(), edit, ratio_o, clipped, weight)
    diagnostics.describe_originals(ratio_o, clipped, stats)
    diagnostics.describe_edits(trajectories, logprobs[edit].detach(), ratio_e, weight, advantages[edit], args, stats)
    return loss_o.sum() + loss_e.sum()


def critic_pass(critic: Transformer, packed: packing.Batch, trajectories: list[Trajectory], run: Run) -> Tensor:
    """The same for the critic."""
    values = training.forward(critic, packed, run.args.temperature)
    old_values, returns = (
        torch.cat([getattr(t, name) for t in trajectories]).to(values.device) for name in ("values", "returns")
    )
    loss, clipped = value_loss(values, old_values, returns, run.args.value_clip)
    run.stats.add("value_loss", loss.detach())
    run.stats.add("value_clipfrac", clipped)
    return loss.sum()


def update(batch: list[Trajectory], models: dict, optimizers: dict, train_policy: bool, run: Run) -> None:
    """PPO epochs over mini-batches of prompts (docs/method.md 1.6g); losses are means over the tokens of all ranks.

    One model after the other, so that only one has gradients at a time.
    """
    args, ranks, stats = run.args, run.ranks, run.stats
    n_mini_batches = math.ceil(args.prompts_per_step / args.mini_batch_prompts)
    for i, mini_batch in enumerate(list(range(n_mini_batches)) * args.ppo_epochs, 1):
        mine = [t for t in batch if t.place // args.mini_batch_prompts == mini_batch]
        (n_tokens,) = all_sum(ranks, sum(len(t.response_ids) for t in mine))
        if n_tokens == 0:  # every prompt of it lost its judgements
            continue
        prompts, responses = [t.prompt_ids for t in mine], [t.response_ids for t in mine]
        micro_batches = packing.packed_micro_batches(prompts, responses, None, args.tokens_per_microbatch, ranks)
        passes = [([mine[i] for i in indices], packed) for indices, packed in micro_batches]
        stats.logical_tokens += sum(map(len, prompts + responses))
        stats.computed_tokens += sum(len(packed.input_ids) for _, packed in passes if packed)

        for name, lr, loss_of in (("policy", args.lr, policy_pass), ("critic", args.critic_lr, critic_pass)):
            model = models[name]
            if name == "policy" and not train_policy:
                continue
            stats.recent.clear()
            for trajectories, packed in passes:
                if not trajectories:
                    training.idle_pass(model, run)
                    continue
                stats.flops += roofline.update_flops(model, packed)
                # FSDP averages gradients over the ranks; times world_size makes that the sum
                (loss_of(model, packed, trajectories, run) * ranks.world_size / n_tokens).backward()
            shares = {n: stats.recent[n] / n_tokens for n in ("policy_loss", "value_loss", "original/approx_kl")}
            part = f"_{name}_{i}"  # of the step's updates
            norm = training.optimizer_step(model, optimizers[name], lr, run.step + 1, shares, mine, args, ranks, part)
            stats.add(f"grad_norm_{name}", torch.tensor(norm))


# -- the loop ----------------------------------------------------------------------------------------------------------


def check_flags(args, max_len):
    """What concerns several flags together; the range of each is its type."""
    if args.kv_tokens is not None and args.kv_tokens < max_len:
        raise ValueError(f"--kv-tokens {args.kv_tokens}: expected at least {max_len}, an edit prompt and its response")
    if args.audit_judge and not args.audit_share:
        raise ValueError(f"--audit-judge {args.audit_judge}: expected an --audit-share above 0")
    for name in ("judge", "audit_judge"):
        spec = getattr(args, name)
        if spec and parse_spec(spec)[0].compares:
            raise ValueError(f"{flags.flag(name)} {spec} compares answers; expected a judge that scores one")


def print_plan(args, max_len):
    """--plan: what is trained is named here, so that a fork without a critic plans without one."""
    settings, machine, resident = JudgeSettings.from_args(args), plan.machine_of(args), {}
    for name, spec in (("judge", args.judge), ("audit judge", args.audit_judge)):
        parts = planned_memory(spec, settings, machine) if spec else {}
        resident |= {f"{name}: {part}": size for part, size in parts.items()}
    trained = {"policy": (args.model, False), "critic": (args.critic or args.model, True)}  # folder, scalar head
    sampled = args.n_samples * (2 if args.edit_rate > 0 else 1)
    return plan.rl(args, max_len, trained, resident, sampled, args.n_samples * (1 + args.edit_rate))


def open_models(run: Run) -> tuple[dict[str, Transformer], dict[str, torch.optim.Optimizer]]:
    """Policy and critic, sharded, and their optimizers."""
    args, ranks = run.args, run.ranks
    models = {"policy": training.open_model(args.model, args, ranks)}
    same = None if args.critic else models["policy"]
    models["critic"] = training.open_model(args.critic or args.model, args, ranks, scalar_head=True, other=same)
    lrs = {"policy": args.lr, "critic": args.critic_lr}
    return models, {name: training.adamw(model, lrs[name], args.weight_decay) for name, model in models.items()}


def train_step(batch, models, optimizers, step, tokenizer_from, run, clock):
    """Log-probs, values and advantages of a step's batch, then its update."""
    args, policy = run.args, models["policy"]
    train_policy = step >= args.critic_warmup_steps
    if train_policy:
        fill_old_logprobs(batch, policy, run)
        if args.edit_ratio == "sdpo":
            fill_credit(batch, policy, run)
    prefixes, suffixes = [t.prompt_ids for t in batch], [t.response_ids for t in batch]
    for t, values in zip(batch, training.per_token(models["critic"], prefixes, suffixes, None, run)):
        t.values = values
    compute_advantages(batch, run)
    if step + 1 == args.save_batch:
        diagnostics.save_batch(__file__, step + 1, batch, policy, tokenizer_from, run)
    clock.append(time.perf_counter())
    update(batch, models, optimizers, train_policy, run)
    clock.append(time.perf_counter())


def main(args):
    # an edit's context is prompt, answer and critique
    max_len = args.max_prompt_length + 2 * args.max_new_tokens + args.judge_max_new_tokens + 512
    check_flags(args, max_len)
    if args.plan:
        return print_plan(args, max_len)
    ranks, tokenizer_from = start(args.dtype, args.shard_size, args.timeouts, args.deterministic), resolve(args.model)
    templates = load_templates(tokenizer_from, args.answer_template, args.edit_template)
    run = Run(args, ranks, Chat(tokenizer_from), templates)
    read = functools.partial(read_prompts, chat=run.chat, templates=templates, limit=args.max_prompt_length)
    prompts = read(args.prompts)
    held_out = packing.deal(read(args.eval_data)[: args.eval_n], ranks) if args.eval_data else []
    _, last_step = packing.count_steps(args.epochs, args.max_steps, len(prompts), args.prompts_per_step)
    settings = JudgeSettings.from_args(args)
    judge = open_judge(args.judge, settings, ranks)
    second = open_judge(args.audit_judge, settings, ranks) if args.audit_judge else None
    if (args.edit_rate > 0 or args.edit_ratio == "sdpo") and judge.writes_critiques is False:  # None: not known yet
        raise ValueError(f"--judge {args.judge} writes no critiques, which edits (--edit-rate > 0) and sdpo need")
    inputs = {"--prompts": args.prompts, "--model": tokenizer_from, "--critic": resolve(args.critic or args.model)}
    inputs = {name: runs.input_digest(path) for name, path in inputs.items()}
    inputs["--judge"] = runs.digest_of(fingerprint(args.judge, settings))
    inputs["the templates"] = runs.digest_of(templates.answer, templates.edit)
    runs.open_run(args, ranks, inputs)
    models, optimizers = open_models(run)
    first_step = checkpoints.load(args.out, models, optimizers, ranks)
    sampler = training.open_sampler(args.model, models["policy"], ranks)
    engine = Engine(sampler, run.chat.stop_ids, max_len, args.max_batch, args.kv_tokens)

    state = (models, optimizers, tokenizer_from, templates.texts("answer", "edit"), ranks)
    progress = runs.progress(first_step, last_step, ranks, begins_with="rollout")
    probe = replace(run, args=replace(args, n_samples=1, edit_rate=0))  # is the judge one for these answers?
    probed = rollout(packing.deal(prompts[:8], ranks), engine, judge, probe, "probe", progress)
    diagnostics.check_judge(*probed, judge, args, ranks)
    for step in progress:
        clock = [time.perf_counter()]
        run = replace(run, step=step, stats=runs.Stats())

        # 1. originals, critiques, edits, with the weights as they are now
        rows = packing.batch_indices(len(prompts), args.prompts_per_step, step, args.seed)
        engine.sync_weights(models["policy"])
        gap = training.refresh_gap(engine.model, models["policy"], prompts[rows[0]][1], ranks)
        clock.append(time.perf_counter())
        if args.offload:
            training.to_host(models, optimizers)
        mine = packing.deal([prompts[i] for i in rows], ranks)
        judged, lost = rollout(mine, engine, judge, run, step, progress)
        clock.append(time.perf_counter())
        counts = {f"lost/{name}": len(trajectories) for name, trajectories in lost.items()}
        counts["lost/prompts"] = len(mine) - len({t.place for t in judged})
        counts["judge_calls"], counts["judge_unparsed"] = judge.take_counts()
        diagnostics.audit(judged, judge, second, args, step, run.stats)
        if args.eval_data and step % args.eval_every == 0:
            once = replace(run, args=replace(args, n_samples=1))
            evaluated = rollout(held_out, engine, judge, once, "held out", progress)
            diagnostics.describe_held_out(*evaluated, judge, run.stats)
            runs.write_step(args.out, "held_out", step + 1, diagnostics.rollout_rows(evaluated[0]), ranks)
        judge.take_counts()  # of the diagnostics: not a cost of the training
        clock.append(time.perf_counter())
        if args.offload:  # the moments follow in `optimizer_step`
            for model in models.values():
                model.to(ranks.device)
        diagnostics.end_if_down([judge, second], step, state, args, ranks)

        # 2. all originals and a share of the edits; chosen on every rank alike from the rewards of all
        edits = [(*t.key[:2], t.reward, t.parent.reward) for t in judged if t.parent]
        seed = derive_seed(args.seed, step, "select")
        selected = select_edits(all_gather(ranks, edits), args.edit_rate, args.edit_strategy, seed)
        batch = [t for t in judged if t.parent is None or t.key[:2] in selected]
        batch = packing.share_prompts(batch, args.mini_batch_prompts, ranks)
        (n_batch,) = all_sum(ranks, len(batch))
        if n_batch == 0:
            raise ValueError(f"step {step + 1}: no response is left to train on ({counts}); is --judge a reward model?")
        diagnostics.describe_rollout(judged, lost, selected, run.stats)

        # 3. and 4. log-probs, values and advantages, then the update
        progress.set_postfix_str(enter("update", step + 1))
        train_step(batch, models, optimizers, step, tokenizer_from, run, clock)

        # 5. what happened
        explained = diagnostics.explained_variance(batch, ranks)
        figures = dict(explained_variance=explained, refresh_gap=gap, batch=int(n_batch))
        metrics = diagnostics.step_metrics(step, judged, counts, clock, run, **figures)
        runs.log_metrics(args.out, metrics, ranks)
        diagnostics.write_rollouts(step + 1, judged, lost, selected, batch, run)
        runs.print_step(progress, step + 1, last_step, diagnostics.headline(metrics))
        if checkpoints.due(step + 1, last_step, args, ranks):
            checkpoints.save(args, step + 1, *state)
    runs.print_end(args.out, "policy", f"python evaluate.py --model {args.out}/policy")


if __name__ == "__main__":
    flags.run(main, ARGS)
