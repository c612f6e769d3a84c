"""Stage 3: PPO with critique-post-edit (arXiv 2510.18849, section 4; docs/method.md 1.6).

One step:

1. Rollout. The policy samples `n_samples` originals y_o for each of `prompts_per_step` prompts. The judge writes a
   critique and scores of each. The policy rewrites a fraction `edit_rate` of them once by their critiques, unless there
   is nothing to fix, and the judge scores these edits y_e. The phases overlap: a critique starts when its answer ends,
   an edit starts when its critique arrives.
2. Selection. The batch holds all originals and the selected edits. Strategies that rank edits edit every original that
   has something to fix, and keep the best edits. An edit is trained *under the original prompt*: neither y_o nor the
   critique is in its context.
3. Values of the critic, and GAE with the reward on the last token. Advantages are whitened over all response tokens.
4. Update, in mini-batches of prompts. Originals get PPO's clipped loss on pi_theta(y_o | x) / pi_old(y_o | x).
   Edits get a loss on the ratio r = pi_theta(y_e | x) / pi_e(y_e | edit prompt), see `edit_loss`. The mean is over the
   tokens of originals and edits together. The critic gets a clipped value loss.

pi_old is the policy that sampled the step. pi_e is the same policy, given x, y_o and the critique: the edit prompt.

`--edit-rate 0` is the PPO baseline: nothing is edited, and the paper samples n = 6. With
`--judge bt:out/bt/model` as well, it is the Bradley-Terry baseline.

Departures from the paper and its code (docs/method.md 2 has the whole table):
- A judgement that does not parse is asked for again. If it still fails, the response is left out. No score is made up.
- The default loss on edits is `unclipped`, the released code's without its bias, with a cap. With `paper`, the clip as
  printed, words that only the critique suggested have r near 0 and get no gradient. Which to take: docs/method.md 2.1.

    python ppo_cpe.py                                             # one CPU or GPU
    torchrun --nproc_per_node=8 ppo_cpe.py                        # eight GPUs
    python ppo_cpe.py --edit-rate 0 --n-samples 6 --out out/ppo   # the baseline
"""

import os
import sys
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags

EditLoss = Literal["paper", "released", "unclipped", "tis", "luffy", "topr", "none", "novel"]  # see `edit_loss`
EditStrategy = Literal["random", "reward_rank", "conditional", "batch_rank"]  # see `select_edits`
EDIT_LOSSES = get_args(EditLoss)


@dataclass(kw_only=True)
class Args(flags.JudgeArgs, flags.EngineArgs, flags.DiagnosticArgs, flags.RuntimeArgs):
    # -- inputs and output
    model: str = "out/sft/policy"
    """Folder or hub id of the initial policy."""
    critic: str | None = None
    """Folder that the critic starts from, with its scalar head if it has one. Default: --model with a head of zeros."""
    prompts: str = "out/data/prompts_train.jsonl"
    """Prompt rows."""
    out: str = "out/ppo_cpe"
    """Run folder; the newest weights are OUT/policy and OUT/critic. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File with another prompt. Default: the one that --model was trained with."""
    edit_template: str | None = None
    """File with another request to rewrite an answer. Default: the one that --model was trained with."""

    # -- rollout (docs/method.md 1.6a; temperature and top-p as in the released code)
    prompts_per_step: flags.Count = 128
    """Prompts in a step, over all ranks."""
    n_samples: flags.Count = 4
    """Originals per prompt."""
    temperature: flags.Positive = 0.9
    """Sampling temperature of originals and edits; all log-probs are taken at it."""
    top_p: flags.TopP = 0.9
    """Nucleus; recorded log-probs stay those of the full softmax."""
    max_prompt_length: flags.Count = 2048
    """Tokens; longer prompts are left out and counted. So are those that leave too few positions for
    --max-new-tokens."""
    max_new_tokens: flags.Count = 2048
    """Tokens of an original or an edit."""
    tensor_parallel: flags.MayChange[flags.Count] = 1
    """Number of neighbouring ranks that sample and judge as one engine, each with a part of every layer
    (docs/gpus.md). --max-batch and --kv-tokens then hold for an engine, not for a rank."""
    release_cache: flags.MayChange[bool] = False
    """Free the engines' KV caches on a GPU while models are trained. CUDA graphs are captured anew in each step."""
    truncated: Literal["judge", "drop", "min_score"] = "judge"
    """A response that hits the limit is scored as it stands | leaves the batch | gets the judge's lowest reward."""

    # -- edits (docs/method.md 1.6e, 1.7, 1.8 and 2)
    edit_rate: flags.Fraction = 0.5
    """Edits in the batch as a fraction r_e of the originals; 0 is plain PPO."""
    edit_strategy: EditStrategy = "random"
    """Edits of originals drawn in advance | highest reward per prompt | largest gain per prompt | highest reward in the
    batch. All but the first edit every original that has something to fix."""
    edit_below: flags.Finite | None = None
    """Edit only answers with a lower reward, which saves edits that change little. Default: all answers."""
    edit_loss: EditLoss = "unclipped"
    """The loss on edits (`edit_loss`). Which one to take: docs/method.md 2.1."""
    ratio_cap: flags.Positive | None = None
    """Upper bound of the ratio. Default: 10 in unclipped, 2 in tis, none in released."""
    luffy_gamma: flags.Positive = 0.1
    """gamma of p / (p + gamma) in luffy."""
    edit_baseline: Literal["batch", "original"] = "batch"
    """Advantage of an edit: like any response's (critic, whitened) | reward less the mean of its prompt's originals."""

    # -- PPO (docs/method.md 1.6f, g)
    epochs: flags.Positive = 2
    """Passes over the prompts; the last partial batch of each is dropped."""
    mini_batch_prompts: flags.Count = 64
    """Prompts per update."""
    ppo_epochs: flags.Count = 1
    """Passes over the batch of a step."""
    lr: flags.Positive = 1e-6
    """Learning rate of the policy; constant."""
    critic_lr: flags.Positive = 1e-5
    """Learning rate of the critic; constant."""
    critic_warmup_steps: flags.Natural = 0
    """Steps in which only the critic is trained."""
    eps_low: flags.Fraction = 0.2
    """Lower clip of the ratio, 1 - eps_low."""
    eps_high: flags.Positive = 0.2
    """Upper clip of the ratio, 1 + eps_high."""
    value_clip: flags.Positive = 0.5
    """Clip range of the value loss, around the values at the start of the step."""
    gamma: flags.Fraction = 1.0
    """Discount per token."""
    gae_lambda: flags.Fraction = 1.0
    """lambda of GAE; 1 is the whole return less the value."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, for both models."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping of each model."""
    seed: int = 0
    """Order of the prompts, sampling, selection."""

    save_every: flags.MayChange[flags.Count] = 20
    """Steps between checkpoints; the last step always makes one."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import functools
import math
import random
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import diagnostics
from attention import to_device
from chat import Chat
from engine import Engine, Sample
from judges import Judge, JudgeSettings, fingerprint, open_judge, parse_spec, planned_memory
from model import Transformer
from prompts import Templates, edit_prompt, load_templates, read_prompts
from runtime import packing, plan, roofline, training
from runtime.digests import digest_of, input_digest
from runtime.distributed import Ranks, all_gather, all_sum, derive_seed, moments, start
from runtime.rows import refuse_held_out
from runtime.runs import Run
from trajectory import (
    TRUNCATED,
    Arrays,
    Batch,
    Dropped,
    Prompt,
    Request,
    Response,
    Rollout,
    TokenArrays,
    Trajectory,
    UpdateRecord,
    ValueArrays,
    arrays_on_cpu,
    balance_prompts,
)
from weights import resolve

# -- the mathematics: pure functions -----------------------------------------------------------------------------------


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (Schulman 2016, eq. 16) on right-padded sequences.

    rewards, values, mask: [N, L]. values[:, t] is the value of the state before token t; after the last token it is 0.
    Returns advantages [N, L] and returns [N, L] (advantages + values), zero where mask is zero.
    """
    advantages = torch.zeros_like(values)
    next_advantage = torch.zeros(len(values))
    next_value = torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = next_advantage
    return advantages, (advantages + values) * mask


def policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> Tensor:
    """PPO's clipped loss per token (Schulman 2017, eq. 7). All inputs and the result are [S]."""
    ratio = torch.exp(logprobs - old_logprobs)
    pg_loss1 = -ratio * advantages
    pg_loss2 = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
    return torch.maximum(pg_loss1, pg_loss2)


RATIO_CAPS = {"unclipped": 10.0, "tis": 2.0}  # bounds against outliers, where --ratio-cap gives none
NOVEL_RATIO = 0.01  # a ratio below which the policy would hardly ever sample the token


def edit_loss(
    kind: str,
    logprobs: Tensor,
    edit_logprobs: Tensor,
    advantages: Tensor,
    *,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    cap: float | None = None,
    gamma: float = 0.1,
) -> Tensor:
    """The loss on edits per token (paper, section 4.2.2; docs/method.md 2.1).

    p = pi_theta(y_e | x), q = pi_e(y_e | edit prompt), r = p / q.

    kind       loss                                         weight: the gradient is -weight A grad log p
    paper      -clip(r, 1-eps_low, 1+eps_high) A            r inside the range, else 0
    released   -A p / (q + 1e-6)                            p / (q + 1e-6)
    unclipped  -min(r, cap) A                               r, 0 above the cap
    tis        -sg(min(r, cap)) A log p                     min(r, cap)
    luffy      -A p / (p + gamma)                           gamma p / (p + gamma)^2
    topr       -A log p, times sg(min(r, 1)) if A < 0       1 where A >= 0, else min(r, 1)
    none       -A log p                                     1
    novel      none where A > 0 and r < 0.01, else paper    1 where A > 0 and r < 0.01, else as paper

    sg stops the gradient. logprobs is log p, edit_logprobs is log q; all inputs and the result are [S], over the tokens
    of edits. ValueError: unknown kind. To try another loss, add a branch here and its name to EditLoss. It has to treat
    each token by itself, so that `gradient_weight` can find its weight for metrics and replay.py.
    """
    log_ratio = logprobs - edit_logprobs
    ratio = log_ratio.detach().exp()
    cap = cap or RATIO_CAPS.get(kind, math.inf)
    # upper bounds in log space: the exponential of an outlier would be infinite and its gradient NaN
    clipped_ratio = log_ratio.clamp(max=math.log(1 + eps_high)).exp().clamp(min=1 - eps_low)
    if kind == "paper":
        return -clipped_ratio * advantages
    if kind == "released":
        log_ratio = logprobs - edit_logprobs.logaddexp(edit_logprobs.new_tensor(math.log(1e-6)))
        return -log_ratio.clamp(max=math.log(cap)).exp() * advantages
    if kind == "unclipped":
        return -log_ratio.clamp(max=math.log(cap)).exp() * advantages
    if kind == "tis":
        return -ratio.clamp(max=cap) * advantages * logprobs
    if kind == "luffy":
        p = logprobs.exp()
        return -advantages * p / (p + gamma)
    if kind == "topr":  # arXiv 2503.14286: a bad edit is unlearned only as far as the policy would say it
        return -torch.where(advantages < 0, ratio.clamp(max=1), 1.0) * advantages * logprobs
    if kind == "novel":  # good edits teach whole what the policy would hardly sample; the rest is as in paper
        is_novel = (ratio < NOVEL_RATIO) & (advantages > 0)
        return -torch.where(is_novel, logprobs, clipped_ratio) * advantages
    if kind == "none":
        return -advantages * logprobs
    raise ValueError(f"edit loss {kind!r}: expected one of {', '.join(EDIT_LOSSES)}")


def token_losses(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, is_edit: Tensor, args: Args) -> Tensor:
    """The loss of each token [S]: `policy_loss` on originals, `edit_loss` where is_edit (bool [S])."""
    # each loss sees all tokens; with a ratio of 1 on those of the other kind, nothing overflows there
    same = logprobs.detach()
    of_originals = policy_loss(
        logprobs, torch.where(is_edit, same, old_logprobs), advantages, args.eps_low, args.eps_high
    )
    of_edits = edit_loss(
        args.edit_loss,
        logprobs,
        torch.where(is_edit, old_logprobs, same),  # log pi_e(y_e | edit prompt)
        advantages,
        eps_low=args.eps_low,
        eps_high=args.eps_high,
        cap=args.ratio_cap,
        gamma=args.luffy_gamma,
    )
    return torch.where(is_edit, of_edits, of_originals)


def gradient_weight(loss_of: Callable[[Tensor, Tensor], Tensor], logprobs: Tensor, advantages: Tensor) -> Tensor:
    """A diagnostic: how much each token counts in a loss, whose gradient is -weight * advantage * grad log p. fp32 [S].

    loss_of: (logprobs, advantages) -> loss [S]. The weight is 1 for a plain policy gradient and 0 for a clipped token.
    A zero advantage is taken as 1.
    """
    logprobs = logprobs.detach().requires_grad_()
    advantages = torch.where(advantages == 0, 1.0, advantages)
    (gradient,) = torch.autograd.grad(loss_of(logprobs, advantages).sum(), logprobs)
    return -gradient / advantages


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Clipped value loss per token (docs/method.md 1.6g). All inputs [S].

    Returns the loss [S] and clipped, a bool [S]: no gradient.
    """
    clipped_values = old_values + (values - old_values).clamp(-clip, clip)
    loss1 = (values - returns).square()
    loss2 = (clipped_values - returns).square()
    clipped = ((values - old_values).abs() > clip) & (loss2 > loss1)
    return 0.5 * torch.maximum(loss1, loss2), clipped


class EditReward(NamedTuple):
    """The rewards that an edit is selected by; prompt_id and sample_id are those of its original."""

    prompt_id: str
    sample_id: int
    reward: float
    original_reward: float

    @property
    def gain(self) -> float:
        return self.reward - self.original_reward


def select_edits(edits: list[EditReward], rate: float, strategy: str, seed: int) -> set[tuple[str, int]]:
    """Chooses the edits that join the batch: a fraction `rate` of them (paper, section 4.2.1; docs/method.md 1.8).

    random        all, since `draw_edited` chose at random which to make
    batch_rank    those with the highest reward in the batch (paper, Appendix E)
    reward_rank   for each prompt, those with the highest reward
    conditional   for each prompt, those that gained most over their originals

    edits: all edits that were made, on all ranks, in any order. Returns the selected (prompt_id, sample_id). For a
    prompt, `rate` times its edits may not be a whole number; it is then rounded up or down at random, so that the mean
    is right. ValueError: unknown strategy. To try another rule, add a branch here and its name to EditStrategy. Unless
    it is `random`, every original with something to fix is edited (`draw_edited`, `should_edit`).
    """
    edits = sorted(edits)  # every rank draws alike
    rng = random.Random(seed)
    chosen = []
    if strategy == "random":
        chosen = edits
    elif strategy == "batch_rank":
        rng.shuffle(edits)  # ties between equal rewards are broken at random
        edits.sort(key=lambda edit: -edit.reward)
        chosen = edits[: round(rate * len(edits))]
    elif strategy in ("reward_rank", "conditional"):
        edits_of_prompt = defaultdict(list)
        for edit in edits:
            edits_of_prompt[edit.prompt_id].append(edit)
        for group in edits_of_prompt.values():
            rng.shuffle(group)  # ties, as above
            if strategy == "reward_rank":
                group.sort(key=lambda edit: -edit.reward)
            else:
                group.sort(key=lambda edit: -edit.gain)
            chosen += group[: int(rate * len(group) + rng.random())]
    else:
        raise ValueError(f"edit strategy {strategy!r}: expected one of {', '.join(get_args(EditStrategy))}")
    return {(edit.prompt_id, edit.sample_id) for edit in chosen}


SMALLEST_SPREAD = 0.05  # the smallest difference of two scores


def compute_advantages(
    trajectories: list[Trajectory], values: list[Tensor], args: Args, ranks: Ranks
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of each token (docs/method.md 1.6f) from the critic's values: fp32 [L_i] per trajectory.

    With --edit-baseline original, the advantage of an edit is its reward relative to its prompt's originals.
    """
    raw: list[Tensor] = []
    returns: list[Tensor] = []
    if trajectories:
        lengths = [len(v) for v in values]
        padded = pad_sequence(values, batch_first=True)  # [N, L]
        mask = pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
        rewards = torch.zeros_like(padded)
        for i, t in enumerate(trajectories):
            rewards[i, lengths[i] - 1] = t.reward  # on the last token
        padded_advantages, padded_returns = gae(rewards, padded, mask, args.gamma, args.gae_lambda)
        raw = [row[:n] for row, n in zip(padded_advantages, lengths)]
        returns = [row[:n] for row, n in zip(padded_returns, lengths)]

    relative = [args.edit_baseline == "original" and t.parent is not None for t in trajectories]
    to_whiten = [advantage for advantage, is_relative in zip(raw, relative) if not is_relative]
    mean, std = moments(ranks, torch.cat(to_whiten or [torch.zeros(0)]))
    original_rewards = defaultdict(list)  # a rank has all responses of a prompt
    for t in trajectories:
        if t.parent is None:
            original_rewards[t.prompt.index].append(t.reward)
    advantages = []
    for t, advantage, is_relative in zip(trajectories, raw, relative):
        if is_relative:
            baseline = sum(original_rewards[t.prompt.index]) / len(original_rewards[t.prompt.index])
            # Divided by the standard deviation of the originals' advantages; their mean is not subtracted. Originals
            # that are all scored alike have no spread, and dividing by it would give a gradient of any size.
            relative_reward = (t.reward - baseline) / max(std, SMALLEST_SPREAD)
            advantages.append(torch.full_like(advantage, relative_reward))
        else:
            advantages.append((advantage - mean) / (std + 1e-8))
    return advantages, returns


# -- the phases of a step ----------------------------------------------------------------------------------------------


def rollout(
    prompts: list[Prompt],
    args: Args,
    step: int | str,
    *,
    engine: Engine,
    judge: Judge,
    chat: Chat,
    templates: Templates,
    show: Callable[[str], None],
) -> Rollout:
    """Samples and judges the originals of some prompts, then their edits (docs/method.md 1.6a-d).

    Judging overlaps sampling, except with a judge in this process. The two models would share its device and halve each
    other's batches, so they take turns: the judge runs only while the engine has nothing to do, and the engine only
    while the judge has nothing to do.

    step: part of every seed. show: is told of the progress.
    """
    submit = functools.partial(
        engine.submit, max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p
    )
    judged: list[Trajectory] = []
    dropped: list[Dropped] = []
    in_engine: dict[tuple, Request] = {}  # by (prompt index, sample) of an original, (key, 0) of an edit
    in_judge: dict[tuple, Response] = {}
    edited: set[tuple[str, int]] = set()

    for prompt in prompts:
        edited |= draw_edited(prompt, args, step)
        seeds = []
        for i in range(args.n_samples):
            in_engine[prompt.index, i] = Request(prompt=prompt, sample_id=i, context_ids=prompt.ids)
            seeds.append(derive_seed(args.seed, step, prompt.row["prompt_id"], i, "original"))
        submit(prompt.ids, key=prompt.index, n=args.n_samples, seeds=seeds)

    sampling = judging = True
    while engine.busy or judge.busy:
        if judge.in_process:
            sampling = engine.busy if sampling else not judge.busy
            judging = not sampling
        if sampling:
            engine.step()
        for sample in engine.collect():
            response = response_of(in_engine.pop((sample.key, sample.index)), sample, chat)
            if response.truncated and args.truncated == "drop":
                dropped.append(Dropped(**vars(response), drop_reason=TRUNCATED))
                continue
            in_judge[response.key] = response
            seed = derive_seed(args.seed, step, *response.key, "judge")
            judge.submit(response.key, response.prompt.row, response.answer, seed)
        for verdict in judge.poll() if judging else ():
            response = in_judge.pop(verdict.key)
            if verdict.reward is None:
                dropped.append(Dropped(**vars(response), drop_reason=verdict.error or "no judgement"))
                continue
            t = Trajectory(**vars(response), reward=verdict.reward, judgement=verdict.judgement)
            if t.truncated and args.truncated == "min_score":
                assert judge.lowest_reward is not None  # check_judge_suits
                t.reward = judge.lowest_reward
            judged.append(t)
            if t.parent is None and t.key[:2] in edited and should_edit(t, args):
                context_ids = edit_prompt(chat, templates, t.prompt.ids, t.response_ids, t.critique)
                edit = Request(prompt=t.prompt, sample_id=t.sample_id, parent=t, context_ids=context_ids)
                if len(context_ids) + args.max_new_tokens > engine.max_len:  # a critique may be of any length
                    dropped.append(never_sampled(edit, f"an edit prompt of {len(context_ids)} tokens"))
                    continue
                in_engine[edit.key, 0] = edit
                submit(context_ids, key=edit.key, seeds=[derive_seed(args.seed, step, *edit.key[:2], "edit")])
        show(f"{len(judged)} judged, {len(in_engine)} sampling, {len(in_judge)} at judge")
    judged.sort(key=lambda t: (t.prompt.index, t.key))  # whatever the order in which a server happened to answer
    return Rollout(len(prompts), judged, dropped, judge.take_counts())


def draw_edited(prompt: Prompt, args: Args, step: int | str) -> set[tuple[str, int]]:
    """The (prompt_id, sample_id) of the originals of a prompt that are to be edited.

    With the strategy `random` they are drawn beforehand, so that no edit is made and then left out. The number is
    rounded up or down at random, so that its mean is right.
    """
    rng = random.Random(derive_seed(args.seed, step, prompt.row["prompt_id"], "edited"))
    if args.edit_rate == 0:
        n = 0
    elif args.edit_strategy == "random":
        n = int(args.edit_rate * args.n_samples + rng.random())
    else:
        n = args.n_samples
    return {(prompt.row["prompt_id"], i) for i in rng.sample(range(args.n_samples), n)}


def should_edit(original: Trajectory, args: Args) -> bool:
    """Whether there is something to fix."""
    if original.judgement is None or original.judgement.nothing_to_fix:
        return False
    return args.edit_below is None or original.reward < args.edit_below


def response_of(request: Request, sample: Sample, chat: Chat) -> Response:
    """A sample of the engine as a response. Its ids include the stop token, which is trained like any other."""
    return Response(
        **vars(request),
        response_ids=sample.response_ids,
        engine_logprobs=sample.logprobs,
        answer=chat.decode(sample.ids),
        truncated=sample.finish_reason == "length",
    )


def never_sampled(request: Request, reason: str) -> Dropped:
    empty = Response(**vars(request), response_ids=[], engine_logprobs=[], answer="", truncated=False)
    return Dropped(**vars(empty), drop_reason=reason)


def select(rollout: Rollout, args: Args, step: int, ranks: Ranks) -> tuple[list[Trajectory], set[tuple[str, int]]]:
    """The step's batch: all originals and the selected edits.

    Returns this rank's trajectories (whole prompts, balanced over the ranks) and the (prompt_id, sample_id) of all
    selected edits. Every rank makes the same selection, from the rewards of all.
    """
    edits = [EditReward(*t.key[:2], t.reward, t.parent.reward) for t in rollout.judged if t.parent]
    seed = derive_seed(args.seed, step, "select")
    selected = select_edits(all_gather(ranks, edits), args.edit_rate, args.edit_strategy, seed)
    trajectories = [t for t in rollout.judged if t.parent is None or t.key[:2] in selected]
    return balance_prompts(trajectories, args.mini_batch_prompts, ranks), selected


def score(
    trajectories: list[Trajectory], models: dict[str, Transformer], args: Args, step: int, ranks: Ranks
) -> tuple[list[Tensor | None], list[Tensor], float]:
    """Old log-probs and values of the response tokens, [L_i] per trajectory, and the FLOPs.

    Old log-probs are None where none are needed: see `old_policy_logprobs`, and while only the critic is trained.
    """
    old_logprobs: list[Tensor | None] = [None] * len(trajectories)
    policy_flops = 0.0
    if step >= args.critic_warmup_steps:
        old_logprobs, policy_flops = old_policy_logprobs(trajectories, models["policy"], args, ranks)
    values, critic_flops = critic_values(trajectories, models["critic"], args, ranks)
    return old_logprobs, values, policy_flops + critic_flops


def old_policy_logprobs(
    trajectories: list[Trajectory], policy: Transformer, args: Args, ranks: Ranks
) -> tuple[list[Tensor | None], float]:
    """Behaviour log-probs by the trainer's own forward pass: pi_old(y_o | x), and for edits pi_e(y_e | edit prompt).

    Returns fp32 [L_i] per trajectory and the FLOPs. With one PPO epoch, originals of the first mini-batch have None:
    the policy has not changed since it sampled them, so their ratio is 1.

    An edit prompt continues prompt and y_o, so y_o is scored in the same pass, on the way to its edit.
    """
    first = args.mini_batch_prompts if args.ppo_epochs == 1 else 0
    pending = {t.key: i for i, t in enumerate(trajectories) if t.parent is not None or t.prompt.index >= first}
    prefixes: list[list[int]] = []
    suffixes: list[list[int]] = []
    masks: list[list[bool]] = []  # which tokens of a suffix are scored
    owners: list[list[int]] = []  # indices of the trajectories that these tokens belong to, in order
    for t in sorted(trajectories, key=lambda t: (t.prompt.index, t.parent is None)):  # the edits of a prompt come first
        if t.key not in pending:
            continue
        between = t.context_ids[len(t.prompt.ids) :]  # y_o, critique and request of an edit; empty for an original
        mask = [False] * len(between)
        scored = [pending.pop(t.key)]
        if t.parent is not None and t.parent.key in pending:
            y_o = t.parent.response_ids
            if between[: len(y_o)] == y_o:  # unless edit_prompt had to encode y_o anew or ends it otherwise
                mask[: len(y_o)] = [True] * len(y_o)
                scored.insert(0, pending.pop(t.parent.key))
        prefixes.append(t.prompt.ids)
        suffixes.append(between + t.response_ids)
        masks.append(mask + [True] * len(t.response_ids))
        owners.append(scored)
    rows, flops = training.per_token(
        policy, prefixes, suffixes, masks, args.temperature, args.tokens_per_microbatch, ranks
    )
    logprobs: list[Tensor | None] = [None] * len(trajectories)
    for scored, row in zip(owners, rows):
        lengths = [len(trajectories[i].response_ids) for i in scored]
        for i, part in zip(scored, row.split(lengths)):
            logprobs[i] = part
    return logprobs, flops


def critic_values(
    trajectories: list[Trajectory], critic: Transformer, args: Args, ranks: Ranks
) -> tuple[list[Tensor], float]:
    """The critic's value before each response token: fp32 [L_i] per trajectory, and the FLOPs."""
    prefixes = [t.prompt.ids for t in trajectories]
    suffixes = [t.response_ids for t in trajectories]
    return training.per_token(critic, prefixes, suffixes, None, args.temperature, args.tokens_per_microbatch, ranks)


def policy_pass(policy: Transformer, packed: packing.Batch, batch: Batch, args: Args) -> tuple[Tensor, TokenArrays]:
    """A micro-batch of the policy: returns the sum of its token losses, a scalar with the graph, and arrays [S] of what
    the update does with each token.
    """
    context = packed.context
    logprobs, entropy = policy(
        packed.input_ids, context.position_ids, context, packed.index, packed.targets, args.temperature
    )
    current = logprobs.detach()
    device = current.device
    is_known = [given is not None for given in batch.old_logprobs]  # else sampled with the same weights
    known = [torch.zeros(n) if given is None else given for given, n in zip(batch.old_logprobs, packed.counts)]
    of_known = packing.per_token_flags(is_known, packed.counts, device)
    old_logprobs = torch.where(of_known, to_device(torch.cat(known), device), current)
    advantages = to_device(torch.cat(batch.advantages), device)
    is_edit = packing.per_token_flags([t.parent is not None for t in batch.trajectories], packed.counts, device)

    def loss_of(logprobs: Tensor, advantages: Tensor) -> Tensor:
        return token_losses(logprobs, old_logprobs, advantages, is_edit, args)

    loss = loss_of(logprobs, advantages)
    arrays = TokenArrays(
        trajectories=batch.trajectories,
        counts=packed.counts,
        is_edit=is_edit,
        logprobs=current,
        old_logprobs=old_logprobs,
        advantages=advantages,
        entropy=entropy,
        loss=loss.detach(),
        weight=gradient_weight(loss_of, current, advantages),
    )
    return loss.sum(), arrays


def critic_pass(critic: Transformer, packed: packing.Batch, batch: Batch, args: Args) -> tuple[Tensor, ValueArrays]:
    """A micro-batch of the critic: the sum of its token losses, a scalar with the graph, and arrays [S]."""
    values = training.forward(critic, packed, args.temperature)
    old_values = to_device(torch.cat(batch.values), values.device)
    returns = to_device(torch.cat(batch.returns), values.device)
    loss, clipped = value_loss(values, old_values, returns, args.value_clip)
    return loss.sum(), ValueArrays(loss=loss.detach(), clipped=clipped)


def backward(
    model: Transformer,
    one_pass: Callable[[Transformer, packing.Batch, Batch, Args], tuple[Tensor, Arrays]],
    micro_batches: list[tuple[list[int], packing.Batch | None]],
    batch: Batch,
    n_tokens: int,
    args: Args,
    ranks: Ranks,
) -> tuple[list[Arrays], float]:
    """Gradients of the mean loss over the n_tokens of all ranks. Returns the arrays of each pass, and the FLOPs."""
    arrays = []
    flops = 0.0
    for indices, packed in micro_batches:
        if packed is None:  # other ranks have more to compute, and FSDP needs every rank in each pass
            training.idle_pass(model, args.temperature, ranks)
            continue
        loss, of_tokens = one_pass(model, packed, batch.take(indices), args)
        # FSDP averages gradients over the ranks; times world_size makes that the sum
        (loss * ranks.world_size / n_tokens).backward()
        arrays.append(of_tokens)
        flops += roofline.update_flops(model, packed)
    # copied after the last pass, because a copy to the CPU waits for the GPU
    return [arrays_on_cpu(of_tokens) for of_tokens in arrays], flops


def update(
    models: dict[str, Transformer], optimizers: dict[str, torch.optim.AdamW], batch: Batch, args: Args, run: Run
) -> UpdateRecord:
    """PPO epochs over mini-batches of prompts (docs/method.md 1.6g). A loss is the mean over the tokens of all ranks.

    One model after the other, so that only one has gradients at a time. The policy is left alone in
    --critic-warmup-steps.
    """
    ranks = run.ranks
    record = UpdateRecord()
    n_mini_batches = math.ceil(args.prompts_per_step / args.mini_batch_prompts)
    for number, mini_batch in enumerate(list(range(n_mini_batches)) * args.ppo_epochs, 1):
        prompt_indices = range(mini_batch * args.mini_batch_prompts, (mini_batch + 1) * args.mini_batch_prompts)
        mine = batch.take(i for i, t in enumerate(batch.trajectories) if t.prompt.index in prompt_indices)
        # an edit follows the original prompt, too: y_o and critique are not in the context that is trained
        prompts = [t.prompt.ids for t in mine.trajectories]
        responses = [t.response_ids for t in mine.trajectories]
        n_tokens = int(all_sum(ranks, sum(map(len, responses)))[0])
        if n_tokens == 0:  # every prompt of it lost its judgements
            continue
        micro_batches = list(packing.packed_micro_batches(prompts, responses, None, args.tokens_per_microbatch, ranks))
        record.logical_tokens += sum(map(len, prompts + responses))
        record.computed_tokens += sum(len(packed.input_ids) for _, packed in micro_batches if packed)

        step = functools.partial(
            training.optimizer_step, max_grad_norm=args.max_grad_norm, examples=mine.rows(), run=run
        )
        if run.step >= args.critic_warmup_steps:
            tokens, flops = backward(models["policy"], policy_pass, micro_batches, mine, n_tokens, args, ranks)
            losses, kls = [arrays.loss for arrays in tokens], [arrays.approx_kl() for arrays in tokens]
            loss, kl, n_kl = all_sum(ranks, sum_of(losses), sum_of(kls), sum(map(len, kls)))
            means = {"policy_loss": loss / n_tokens, "original/approx_kl": kl / max(1, n_kl)}
            norm = step(models["policy"], optimizers["policy"], args.lr, means=means, part=f"_policy_{number}")
            record.grad_norms["policy"].append(norm)
            record.policy += tokens
            record.flops += flops
        values, flops = backward(models["critic"], critic_pass, micro_batches, mine, n_tokens, args, ranks)
        (loss,) = all_sum(ranks, sum_of([arrays.loss for arrays in values]))
        means = {"value_loss": loss / n_tokens}
        norm = step(models["critic"], optimizers["critic"], args.critic_lr, means=means, part=f"_critic_{number}")
        record.grad_norms["critic"].append(norm)
        record.critic += values
        record.flops += flops
    return record


def sum_of(tensors: list[Tensor]) -> float:
    return sum(x.double().sum().item() for x in tensors)


# -- the loop ----------------------------------------------------------------------------------------------------------


def longest_sequence(args: Args, positions: int) -> int:
    """Tokens of an edit prompt and its edit: prompt, answer, critique, edit, and 512 for the template. At most as many
    as the policy has positions."""
    return min(args.max_prompt_length + 2 * args.max_new_tokens + args.judge_max_new_tokens + 512, positions)


def judge_settings(args: Args) -> JudgeSettings:
    """Settings of the judges. Their engine holds the longest prompt, response and judgement, and 2,048 tokens more."""
    longest = args.max_prompt_length + args.max_new_tokens + args.judge_max_new_tokens + 2048
    return JudgeSettings.from_args(
        args,
        answer_template=args.answer_template,
        max_batch=args.max_batch,
        max_len=max(JudgeSettings.max_len, longest),
    )


def check_flags(args: Args, max_len: int) -> None:
    """Checks what concerns several flags together; the range of each is in its type."""
    if args.max_new_tokens >= max_len:
        raise ValueError(f"--max-new-tokens {args.max_new_tokens}: expected fewer than the {max_len} of {args.model}")
    if args.kv_tokens is not None and args.kv_tokens < max_len:
        raise ValueError(f"--kv-tokens {args.kv_tokens}: expected at least {max_len}, an edit prompt and its response")
    if args.audit_judge and not args.audit_share:
        raise ValueError(f"--audit-judge {args.audit_judge}: expected an --audit-share above 0")
    if args.save_batch and args.save_batch <= args.critic_warmup_steps:
        raise ValueError(f"--save-batch {args.save_batch}: expected more than --critic-warmup-steps")
    for flag, spec in (("--judge", args.judge), ("--audit-judge", args.audit_judge)):
        if spec and parse_spec(spec)[0].compares:
            raise ValueError(f"{flag} {spec} compares answers; expected a judge that scores one")


def check_judge_suits(judge: Judge, args: Args) -> None:
    """ValueError: the flags need what this judge does not give."""
    if args.edit_rate > 0 and judge.writes_critiques is False:  # None: not known yet
        raise ValueError(
            f"--judge {args.judge} writes no critiques, which edits (--edit-rate > 0) need; "
            "--edit-rate 0 trains without edits"
        )
    if args.truncated == "min_score" and judge.lowest_reward is None:
        raise ValueError(f"--judge {args.judge} has no lowest reward, which --truncated min_score would give")


def print_plan(args: Args, max_len: int) -> None:
    """--plan. The trained models are named here, so that a fork without a critic plans without one."""
    machine = plan.machine_of(args)
    if machine.device == "cpu":  # where a cache takes memory only once it is written
        args = replace(args, max_batch=plan.sequences_at_once(args, machine))
    settings = judge_settings(args)
    resident: dict[str, int] = {}
    for name, spec in (("judge", args.judge), ("audit judge", args.audit_judge)):
        parts = planned_memory(spec, settings, machine) if spec else {}
        resident |= {f"{name}: {part}": size for part, size in parts.items()}
    trained = {"policy": (args.model, False), "critic": (args.critic or args.model, True)}  # folder, scalar head
    made = args.edit_rate if args.edit_strategy == "random" else math.ceil(args.edit_rate)  # edits per original
    plan.rl(args, max_len, trained, resident, args.n_samples * (1 + made), args.n_samples * (1 + args.edit_rate))


def open_models(args: Args, ranks: Ranks) -> tuple[dict[str, Transformer], dict[str, torch.optim.AdamW]]:
    """Policy and critic, sharded, and their optimizers."""
    policy = training.open_model(args.model, args, args.seed, ranks)
    base = None if args.critic else policy  # the critic may share its frozen weights
    critic = training.open_model(args.critic or args.model, args, args.seed, ranks, scalar_head=True, other=base)
    optimizers = {
        "policy": training.adamw(policy, args.lr, args.weight_decay),
        "critic": training.adamw(critic, args.critic_lr, args.weight_decay),
    }
    return {"policy": policy, "critic": critic}, optimizers


def main(args: Args) -> None:
    max_len = longest_sequence(args, plan.config_of(args.model).max_position_embeddings)
    check_flags(args, max_len)
    if args.plan:
        return print_plan(args, max_len)
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic, args.tensor_parallel)
    folder = resolve(args.model)
    chat = Chat(folder)
    templates = load_templates(folder, args.answer_template, args.edit_template)
    limit = min(args.max_prompt_length, max_len - args.max_new_tokens)
    read = functools.partial(read_prompts, chat=chat, templates=templates, limit=limit)
    prompts = read(args.prompts)  # (row, token ids) of each
    refuse_held_out(args.prompts, args.eval_data)
    held_out_prompts = shard(read(args.eval_data)[: args.eval_n], ranks) if args.eval_data else []
    _, last_step = packing.count_steps(args.epochs, args.max_steps, len(prompts), args.prompts_per_step)
    if args.save_batch and args.save_batch > last_step:
        raise ValueError(f"--save-batch {args.save_batch}: expected at most {last_step}, the steps of this run")
    settings = judge_settings(args)
    judge = open_judge(args.judge, settings, ranks)
    second_judge = open_judge(args.audit_judge, settings, ranks) if args.audit_judge else None
    check_judge_suits(judge, args)
    model_digest = input_digest(folder)
    inputs = {
        "--prompts": input_digest(args.prompts),
        "--model": model_digest,
        "--critic": input_digest(resolve(args.critic)) if args.critic else model_digest,
        "--judge": digest_of(fingerprint(args.judge, settings)),
        "the templates": digest_of(templates.answer, templates.edit),
    }
    # these two flags may change, what a file of theirs holds may not
    if args.eval_data:
        inputs[f"--eval-data {args.eval_data}"] = input_digest(args.eval_data)
    if args.audit_judge:
        inputs[f"--audit-judge {args.audit_judge}"] = digest_of(fingerprint(args.audit_judge, settings))
    run = Run(args.out, args, ranks, inputs, last_step)
    models, optimizers = open_models(args, ranks)
    run.resume(models, optimizers, folder, templates.texts("answer", "edit"))
    policy = models["policy"]
    engine = Engine(
        training.open_sampler(args.model, policy, ranks), chat.stop_ids, max_len, args.max_batch, args.kv_tokens
    )
    sample_and_judge = functools.partial(
        rollout, engine=engine, judge=judge, chat=chat, templates=templates, show=run.show
    )
    if run.first_step < last_step:  # a few answers first: does this judge give judgements at all?
        once = replace(args, n_samples=1, edit_rate=0)
        probe = sample_and_judge(shard(prompts[:8], ranks), once, "probe").of_leader(ranks)
        diagnostics.check_judge(probe, judge, args.judge, args.edit_rate > 0, ranks)

    for step in run.steps():
        step_prompts = [prompts[i] for i in packing.batch_indices(len(prompts), args.prompts_per_step, step, args.seed)]
        with run.phase("sync_weights"):
            engine.sync_weights(policy)
            sync_error = training.weight_sync_error(engine.model, policy, step_prompts[0][1], ranks)
            for asked in filter(None, (judge, second_judge)):
                asked.forget()  # or its prefix cache would grow until it fills the KV cache

        with training.offloaded(models, optimizers, ranks.device, args.offload):
            with run.phase("rollout"):  # sample, judge, edit, judge
                responses = sample_and_judge(shard(step_prompts, ranks), args, step)
            with run.phase("diagnostics"):  # these change nothing in the training
                held_out = None
                if args.eval_data and step % args.eval_every == 0:
                    once = replace(args, n_samples=1, edit_rate=math.ceil(args.edit_rate))
                    held_out = sample_and_judge(held_out_prompts, once, "held out")
                checks = diagnostics.ask_again(
                    responses, held_out, judge, second_judge, args.audit_share, args.seed, step, ranks
                )
            if args.release_cache:
                engine.release_cache()
                for asked in filter(None, (judge, second_judge)):
                    asked.release_cache()
        run.stop_if([j.down for j in (judge, second_judge) if j and j.down])
        responses = responses.of_leader(ranks)
        checks = checks.of_leader(ranks)

        trajectories, selected = select(responses, args, step, ranks)
        diagnostics.check_batch(trajectories, responses.dropped, run)
        with run.phase("score"):
            old_logprobs, values, scoring_flops = score(trajectories, models, args, step, ranks)
            advantages, returns = compute_advantages(trajectories, values, args, ranks)
            batch = Batch(trajectories, old_logprobs, values, advantages, returns)
        if step + 1 == args.save_batch:
            diagnostics.save_batch(__file__, batch, run)
        with run.phase("update"):
            record = update(models, optimizers, batch, args, run)
            record.flops += scoring_flops

        clip = (args.eps_low, args.eps_high)
        metrics = diagnostics.step_metrics(responses, selected, checks, batch, record, sync_error, clip, run)
        diagnostics.write_rollouts(responses, selected, checks, record, chat, args.log_tokens, args.seed, run)
        run.log(metrics, diagnostics.headline(metrics))
        run.save_if_due()
    unseen = os.path.join(os.path.dirname(args.prompts), "prompts_eval.jsonl")
    run.finish("policy", f"python evaluate.py --model {args.out}/policy --prompts {unseen} --judge {args.judge}")


def shard(rows: list[tuple[dict, list[int]]], ranks: Ranks) -> list[Prompt]:
    """The prompts of a batch that this rank's engine samples for, each with its index in the whole batch."""
    prompts = [Prompt(index=i, row=row, ids=ids) for i, (row, ids) in enumerate(rows)]
    n_engines = ranks.world_size // ranks.ranks_per_engine
    return prompts[ranks.rank // ranks.ranks_per_engine :: n_engines]


if __name__ == "__main__":
    flags.run(main, ARGS)
