"""The DPO baseline (docs/method.md 1.5): preference pairs straight into the policy, without a reward model.

1. Read preference pairs; y_w is the chosen answer, y_l the rejected one, x the policy's prompt.
2. Before any training the start model scores every answer once; these reference log-probs stay in
   OUT/reference.json, so that memory holds one model and a resumed run has the same ones.
3. Each step draws the next `batch_size` pairs of the epoch's permutation; both answers of a pair
   go through the same pass, which computes their prompt once. With log-probs summed over an
   answer's tokens, the loss of a pair is
       -log sigmoid(margin)
       margin = beta ((log pi(y_w) - log ref(y_w)) - (log pi(y_l) - log ref(y_l)))
   (Rafailov et al. 2023, arXiv 2305.18290, eq. 7) plus `sft_weight` times the mean negative
   log-likelihood of the chosen answer's tokens: a mean within the answer first, then over the
   pairs, so that each pair counts the same in both terms.

beta 0.2, SFT term 0.1 and lr 1e-6 are the released code's. Neither the paper nor its code states epochs, batch or
schedule for it: one epoch, since DPO overfits its pairs early, and batch and schedule as in SFT.
Departure: pairs over the length limit are left out and counted, not cut.

    python dpo.py                                # one CPU or GPU, from out/sft/policy
    torchrun --nproc_per_node=8 dpo.py           # eight GPUs
"""

import os
import sys
from dataclasses import dataclass

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags


@dataclass(kw_only=True)
class Args(flags.RuntimeArgs):
    # -- what goes in and out
    model: str = "out/sft/policy"
    """Folder or hub id of the policy at the start, which is the reference too."""
    data: str = "out/data/pairs.jsonl"
    """Preference pairs."""
    out: str = "out/dpo"
    """Run folder; the newest weights are OUT/policy. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File with another prompt of the policy. Default: the one that --model was trained with."""

    # -- the loss (the released code's values)
    beta: flags.Positive = 0.2
    """Strength of the pull towards the reference."""
    sft_weight: flags.NonNegative = 0.1
    """Weight of the chosen answer's mean negative log-likelihood."""

    # -- optimization
    epochs: flags.Positive = 1
    """Passes over the data; the last partial batch of each is dropped."""
    batch_size: flags.Count = 128
    """Pairs per step, over all ranks."""
    lr: flags.Positive = 1e-6
    """Peak learning rate."""
    warmup_ratio: flags.Fraction = 0.1
    """Fraction of the steps with linear warm-up; cosine decay to zero after it."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, on all parameters."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping."""
    max_length: flags.Count = 8192
    """Tokens of prompt and answer; pairs with a longer one are left out and counted."""
    seed: int = 0
    """Order of the pairs."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import json
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from chat import Chat
from json_files import read_json
from model import Transformer
from prompts import Templates, answer_prompt, load_templates, response_ids
from runtime import packing, plan, training
from runtime.digests import digest_of, input_digest, is_whole, sealed
from runtime.distributed import Ranks, all_gather, all_sum, barrier, derive_seed, start
from runtime.progress import counting
from runtime.rows import read_rows, refuse_held_out, write_text
from runtime.runs import Run
from runtime.watch import set_phase
from weights import load_config, resolve


class Pair(NamedTuple):
    """Ids of a pair's prompt x and of its two answers, and their log-probs under the reference."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference_chosen: float = 0.0
    reference_rejected: float = 0.0


DUMMY_PAIR = Pair([0], [0], [0])  # for a rank that has no pair left; its loss gets weight zero


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of whole answers, fp32 [P] each -> (loss [P], margin [P]); arXiv 2305.18290, eq. 7."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margin), margin


def read_pairs(args: Args, chat: Chat, templates: Templates, max_length: int) -> list[Pair]:
    """The pairs whose answers have at most max_length tokens each with the prompt, without reference log-probs."""
    pairs = []
    for row in read_rows(args.data, "pair"):
        prompt = answer_prompt(chat, templates, row)
        pairs.append(Pair(prompt, response_ids(chat, row["chosen"]), response_ids(chat, row["rejected"])))

    def longest(pair: Pair) -> int:
        return len(pair.prompt) + max(len(pair.chosen), len(pair.rejected))

    return packing.within_length(pairs, longest, max_length, args.data, args.batch_size)


def size(pair: Pair) -> int:
    """Tokens that a pass over a pair computes: its prompt once."""
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


def answer_logprobs(
    model: Transformer, pairs: list[Pair], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, packing.Batch]:
    """One pass -> log-probs of whole answers, chosen [P] and rejected [P], and what was computed."""
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    for pair in pairs or [DUMMY_PAIR]:
        prompts += [pair.prompt, pair.prompt]
        answers += [pair.chosen, pair.rejected]
    batch = packing.pack_shared(prompts, answers, [[True] * len(answer) for answer in answers], device)
    sums = torch.stack([logprobs.sum() for logprobs in training.forward(model, batch).split(batch.counts)])
    return sums[0::2], sums[1::2], batch


@torch.no_grad()
def with_reference(args: Args, model: Transformer, model_digest: str, pairs: list[Pair], ranks: Ranks) -> list[Pair]:
    """The pairs with their log-probs under the start model, which are kept in OUT/reference.json.

    ValueError: that file is damaged, or of other pairs or another model: they changed under an unfinished run.
    """
    file = os.path.join(args.out, "reference.json")
    digest = derive_seed(model_digest, *(derive_seed(*ids) for pair in pairs for ids in pair[:3]))
    if not os.path.isfile(file):
        mine = list(range(ranks.rank, len(pairs), ranks.world_size))
        parts = packing.split(mine, lambda i: size(pairs[i]), args.tokens_per_microbatch, ranks)
        scored: list[tuple[int, float, float]] = []
        with counting(len(parts), "reference", ranks.rank > 0) as done:
            for part in parts:
                set_phase("reference")  # each pass has a time-out of its own
                chosen, rejected, _ = answer_logprobs(model, [pairs[i] for i in part], ranks.device)
                scored += zip(part, chosen.tolist(), rejected.tolist())  # zip leaves out a dummy pair
                done()
        training.reshard(model)  # before a checkpoint is loaded
        scored = sorted(all_gather(ranks, scored))
        if ranks.rank == 0:
            _, chosen_logprobs, rejected_logprobs = zip(*scored)
            content = dict(pairs=digest, chosen=chosen_logprobs, rejected=rejected_logprobs)
            write_text(file, json.dumps(sealed(content)))
        barrier(ranks)
    kept = read_json(file)
    if not is_whole(kept):
        raise ValueError(f"{file}: damaged; remove it, and the same command makes it again from the start model")
    if kept["pairs"] != digest:
        raise ValueError(
            f"{file}: made from other pairs than {args.data} now holds, or by another model than {args.model}; choose "
            "another --out or remove it"
        )
    return [
        pair._replace(reference_chosen=chosen_logprob, reference_rejected=rejected_logprob)
        for pair, chosen_logprob, rejected_logprob in zip(pairs, kept["chosen"], kept["rejected"], strict=True)
    ]


def loss_of(
    args: Args, model: Transformer, pairs: list[Pair], device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor], packing.Batch]:
    """The loss of a micro-batch and what else is measured, summed over its pairs (see `training.forward_backward`)."""
    chosen, rejected, batch = answer_logprobs(model, pairs, device)
    references = torch.tensor([pair[3:] for pair in pairs or [DUMMY_PAIR]], device=device)  # [P, 2]
    preference_loss, margin = dpo_loss(chosen, rejected, references[:, 0], references[:, 1], args.beta)
    sft_loss = -chosen / torch.tensor(batch.counts[0::2], device=device)
    loss = preference_loss + args.sft_weight * sft_loss
    sums = dict(
        sft_loss=sft_loss.sum(),
        margin=margin.sum(),
        accuracy=(margin > 0).sum(),
        chosen_logprob=chosen.sum(),
        rejected_logprob=rejected.sum(),
    )
    return loss.sum(), sums, batch


def main(args: Args) -> None:
    if args.plan:
        return plan.one_model(args, plan.config_of(args.model), sequences=2)
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.model)
    chat = Chat(tokenizer_from)
    templates = load_templates(tokenizer_from, answer_template=args.answer_template)
    refuse_held_out(args.data)
    positions = load_config(tokenizer_from).max_position_embeddings
    pairs = read_pairs(args, chat, templates, min(args.max_length, positions))
    total_steps, last_step = packing.count_steps(args.epochs, args.max_steps, len(pairs), args.batch_size)
    inputs = {
        "--data": input_digest(args.data),
        "--model": input_digest(tokenizer_from),
        "--answer-template": digest_of(templates.answer),
    }
    run = Run(args.out, args, ranks, inputs, last_step)
    model = training.open_model(args.model, args, args.seed, ranks)
    optimizer = training.adamw(model, args.lr, args.weight_decay)
    # before the checkpoint is loaded: here the model is still the reference (B of an adapter is zero)
    pairs = with_reference(args, model, inputs["--model"], pairs, ranks)
    run.resume({"policy": model}, {"policy": optimizer}, tokenizer_from, templates.texts("answer"))

    for step in run.steps():
        with run.phase("update"):
            mine = packing.step_shard(pairs, size, args.batch_size, step, args.seed, ranks)
            (n_tokens,) = all_sum(ranks, sum(size(pair) + len(pair.prompt) for pair in mine))
            parts = packing.split(mine, size, args.tokens_per_microbatch, ranks)
            means, flops = training.forward_backward(partial(loss_of, args), model, parts, args.batch_size, ranks)
            lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
            grad_norm = training.optimizer_step(
                model, optimizer, lr, args.max_grad_norm, {"loss": means["loss"]}, mine, run
            )
        metrics = means | training.update_metrics(run, grad_norm, lr, n_tokens, flops)
        run.log(metrics, {name: metrics[name] for name in ("loss", "accuracy", "margin", "grad_norm", "seconds")})
        run.save_if_due()
    prompts = os.path.join(os.path.dirname(args.data), "prompts_eval.jsonl")
    run.finish("policy", f"python evaluate.py --model {args.out}/policy --prompts {prompts}")


if __name__ == "__main__":
    flags.run(main, ARGS)
