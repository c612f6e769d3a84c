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
    """File that replaces the built-in prompt of the policy."""

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

import torch
import torch.nn.functional as F

from chat import Chat
from model import Transformer
from prompts import Templates, answer_prompt, load_templates, response_ids
from runtime import packing, plan, roofline, training
from runtime.digests import digest_of, input_digest
from runtime.distributed import Ranks, all_gather, all_sum, barrier, derive_seed, print0, start
from runtime.progress import counting
from runtime.rows import read_rows, refuse_held_out, write_text
from runtime.runs import Run
from runtime.watch import set_phase
from weights import resolve


def dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta):
    """Log-probs of whole answers, fp32 [P] each -> (loss [P], margin [P]); DPO eq. 7."""
    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -F.logsigmoid(margin), margin


def read_pairs(args: Args, chat: Chat, templates: Templates) -> list[tuple[list[int], list[int], list[int]]]:
    """Per pair the ids of (prompt, chosen, rejected)."""
    pairs = []
    for row in read_rows(args.data, "pair"):
        prompt = answer_prompt(chat, templates, row)
        pairs.append((prompt, response_ids(chat, row["chosen"]), response_ids(chat, row["rejected"])))
    kept = [
        (prompt, y_w, y_l) for prompt, y_w, y_l in pairs if len(prompt) + max(len(y_w), len(y_l)) <= args.max_length
    ]
    print0(
        f"{len(kept)} pairs from {args.data}; {len(pairs) - len(kept)} left out "
        f"(over --max-length {args.max_length} tokens)"
    )
    if len(kept) < args.batch_size:
        raise ValueError(f"{args.data}: {len(kept)} usable pairs, fewer than --batch-size {args.batch_size}")
    return kept


Pair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen, rejected
DUMMY_PAIR: Pair = ([0], [0], [0])  # for a rank that has no pair left; its loss gets weight zero


def pair_size(pair: Pair) -> int:
    return sum(map(len, pair))


def pair_micro_batches(args: Args, pairs: list[Pair], ranks: Ranks) -> list[list[int]]:
    """Indices into `pairs` by token budget; both answers of a pair stay together."""
    return packing.micro_batches([pair_size(p) for p in pairs], args.tokens_per_microbatch, ranks)


def pair_batch(pairs: list[Pair], device: torch.device) -> packing.Batch:
    """Sequences lie as chosen, rejected, chosen, rejected, ... behind the prompt of each pair."""
    prompts = [prompt for prompt, _, _ in pairs for _ in range(2)]
    answers = [answer for _, *both in pairs for answer in both]
    return packing.pack_shared(prompts, answers, [[True] * len(a) for a in answers], device)


def pair_logprobs(model: Transformer, batch: packing.Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """One pass -> log-probs of whole answers, chosen [P] and rejected [P]."""
    sums = torch.stack([part.sum() for part in training.forward(model, batch).split(batch.counts)])
    return sums[0::2], sums[1::2]


@torch.no_grad()
def reference_logprobs(
    args: Args, model: Transformer, pairs: list[Pair], ranks: Ranks
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs under the start model, fp32: chosen [N], rejected [N]; kept in OUT/reference.json.

    ValueError where that file is of other pairs: the data changed under an unfinished run.
    """
    file = os.path.join(args.out, "reference.json")
    digest = derive_seed(*(derive_seed(*ids) for pair in pairs for ids in pair))
    if not os.path.isfile(file):
        mine = pairs[ranks.rank :: ranks.world_size]
        scored: list[tuple[int, float, float]] = []
        passes = pair_micro_batches(args, mine, ranks)
        with counting(len(passes), "reference", ranks.rank > 0) as done:
            for indices in passes:
                set_phase("reference")  # each pass has a time-out of its own
                part = [mine[i] for i in indices] or [DUMMY_PAIR]
                chosen, rejected = pair_logprobs(model, pair_batch(part, ranks.device))
                positions = [i * ranks.world_size + ranks.rank for i in indices]
                scored += zip(positions, chosen.tolist(), rejected.tolist())  # zip leaves out a dummy pair
                done()
        scored = sorted(all_gather(ranks, scored))
        if ranks.rank == 0:
            _, chosen_logprobs, rejected_logprobs = zip(*scored)
            content = dict(pairs=digest, chosen=chosen_logprobs, rejected=rejected_logprobs)
            write_text(file, json.dumps(content))
        barrier(ranks)
    with open(file) as f:
        content = json.load(f)
    if content["pairs"] != digest:
        raise ValueError(f"{file}: made from other pairs than {args.data} now holds; choose another --out or remove it")
    return torch.tensor(content["chosen"]), torch.tensor(content["rejected"])


def forward_backward(
    args: Args,
    model: Transformer,
    pairs: list[Pair],
    reference: tuple[torch.Tensor, torch.Tensor],
    mine: list[int],
    ranks: Ranks,
) -> tuple[dict[str, float], int, float]:
    """Passes over this rank's pairs (`mine` indexes all pairs) -> means over the batch, tokens, this rank's FLOPs."""
    reference_chosen, reference_rejected = reference
    names = ("loss", "sft_loss", "margin", "accuracy", "chosen_logprob", "rejected_logprob")
    totals = torch.zeros(len(names))
    flops = 0.0
    for indices in pair_micro_batches(args, [pairs[i] for i in mine], ranks):
        weight = float(len(indices) > 0)
        chosen_pairs = [mine[k] for k in indices]
        batch = pair_batch([pairs[i] for i in chosen_pairs] or [DUMMY_PAIR], ranks.device)
        flops += roofline.update_flops(model, batch)
        chosen, rejected = pair_logprobs(model, batch)
        preference_loss, margin = dpo_loss(
            chosen,
            rejected,
            reference_chosen[chosen_pairs or [0]].to(ranks.device),
            reference_rejected[chosen_pairs or [0]].to(ranks.device),
            args.beta,
        )
        sft_loss = -chosen / torch.tensor(batch.counts[0::2], device=ranks.device)
        loss = preference_loss + args.sft_weight * sft_loss
        # FSDP averages gradients over the ranks; times world_size makes that the sum
        (loss.sum() * weight * ranks.world_size / args.batch_size).backward()
        values = (loss, sft_loss, margin, (margin > 0).float(), chosen, rejected)
        totals += weight * torch.stack([v.detach().sum() for v in values]).cpu()
    n_tokens = 0
    for i in mine:
        prompt, y_w, y_l = pairs[i]
        n_tokens += 2 * len(prompt) + len(y_w) + len(y_l)
    *sums, token_count = all_sum(ranks, *totals.tolist(), n_tokens)
    return {name: total / args.batch_size for name, total in zip(names, sums)}, int(token_count), flops


def main(args: Args) -> None:
    if args.plan:
        return plan.one_model(args, plan.config_of(args.model))
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.model)
    chat = Chat(tokenizer_from)
    templates = load_templates(tokenizer_from, answer_template=args.answer_template)
    pairs = read_pairs(args, chat, templates)
    refuse_held_out(args.data)
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
    reference = reference_logprobs(args, model, pairs, ranks)
    run.resume({"policy": model}, {"policy": optimizer}, tokenizer_from, templates.texts("answer"))

    for step in run.steps():
        with run.phase("update"):
            indices = packing.batch_indices(len(pairs), args.batch_size, step, args.seed)
            mine = packing.shard(indices, [pair_size(pairs[i]) for i in indices], ranks)
            means, n_tokens, flops = forward_backward(args, model, pairs, reference, mine, ranks)
            lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
            part = {"loss": means["loss"] / ranks.world_size}  # the mean is over all ranks already
            examples = [pairs[i] for i in mine]
            grad_norm = training.optimizer_step(model, optimizer, lr, args.max_grad_norm, part, examples, run)
        seconds = run.seconds["update"]
        metrics = dict(
            **means,
            grad_norm=grad_norm,
            lr=lr,
            tokens=n_tokens,
            seconds=seconds,
            tokens_per_second=n_tokens / seconds,
            **training.machine_metrics(ranks, flops, seconds, args.peak_tflops),
        )
        headline = {name: metrics[name] for name in ("loss", "accuracy", "margin", "grad_norm", "seconds")}
        run.log(metrics, headline)
        run.save_if_due()
    run.finish("policy", f"python evaluate.py --model {args.out}/policy")


if __name__ == "__main__":
    flags.run(main, ARGS)
