"""Stage 2: the generative reward model (docs/method.md 1.4), or the Bradley-Terry baseline (docs/method.md 1.5).

`--objective grm` (default): a language model that is given rubric, persona, question and answer
learns to write a critique and three integer scores.
1. Read judgements; the input is the judge's prompt, the target the judgement as text.
2. Plain supervised fine-tuning: mean negative log-likelihood over the target tokens of all ranks.
3. At the end, with --eval-data: the model judges held-out answers; how many of its judgements
   parse, and how they agree with the labels, is printed and kept in OUT/held_out.json.

`--objective bt`: the same trunk with a scalar head, r(x, y) at the last token of prompt and answer.
1. Read preference pairs; both answers of a pair go through the same micro-batch.
2. The loss is -log sigmoid(r(x, chosen) - r(x, rejected)), mean over the pairs of all ranks.

Where the two differ in a default, `DEFAULTS` has both values. For the GRM they are the released
code's (batch and weight decay, which it does not state, are those of SFT). For BT the paper
gives none: one epoch at 1e-5, since reward models overfit from the second epoch on and Llama 2
(arXiv 2307.09288, 3.2.2) trained its own so; the cut-off is that of SFT, whose prompt BT reads.
Departure: rows over the length limit are left out and counted, not cut.

    python train_grm.py --model Qwen/Qwen2.5-0.5B-Instruct         # one CPU or GPU
    torchrun --nproc_per_node=8 train_grm.py                       # eight GPUs
    torchrun --nproc_per_node=8 train_grm.py --objective bt        # the BT baseline
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags

DEFAULTS = {
    "grm": dict(data="out/data/judgements.jsonl", out="out/grm", lr=4e-5, epochs=2.0, max_length=16384),
    "bt": dict(data="out/data/pairs.jsonl", out="out/bt", lr=1e-5, epochs=1.0, max_length=8192),
}


@dataclass(kw_only=True)
class Args(flags.RuntimeArgs):
    # -- what goes in and out (None: the value of the objective, see DEFAULTS)
    objective: Literal["grm", "bt"] = "grm"
    """grm: write critique and scores. bt: scalar head on pairs."""
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the model that is fine-tuned."""
    data: str | None = None
    """Judgements (grm) or pairs (bt)."""
    out: str | None = None
    """Run folder; the newest weights are OUT/model. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File that replaces the policy's prompt (bt reads it)."""
    grm_template: str | None = None
    """File that replaces the judge's prompt (grm reads it)."""

    # -- optimization
    epochs: flags.Positive | None = None
    """Passes over the data; the last partial batch of each is dropped."""
    batch_size: flags.Count = 128
    """Judgements or pairs per step, over all ranks."""
    lr: flags.Positive | None = None
    """Peak learning rate."""
    warmup_ratio: flags.Fraction = 0.1
    """Fraction of the steps with linear warm-up; cosine decay to zero after it."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, on all parameters."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping."""
    max_length: flags.Count | None = None
    """Tokens of prompt and answer; longer rows are left out and counted."""
    seed: int = 0
    """Order of the rows."""

    # -- held-out rows
    eval_data: flags.MayChange[str | None] = None
    """Rows like those of --data that are not trained on."""
    eval_every: flags.MayChange[flags.Count] = 100
    """Evaluation interval in steps; the last step always has a held-out loss."""
    eval_judgements: flags.MayChange[flags.Count] = 200
    """Held-out answers that the finished GRM judges (greedy), from the front of the file."""
    eval_max_new_tokens: flags.MayChange[flags.Count] = 1024
    """Tokens of such a judgement; one that is cut off does not parse."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import dataclasses
import json

import torch
import torch.nn.functional as F

from chat import Chat
from diagnostics import agreement
from engine import Engine
from model import SharedPrefix, Transformer, load_pretrained
from prompts import (
    DIMENSIONS,
    Judgement,
    Templates,
    bt_ids,
    grm_prompt,
    judgement_text,
    load_templates,
    parse_judgement,
    response_ids,
)
from runtime import packing, plan, roofline, training
from runtime.digests import digest_of, input_digest
from runtime.distributed import Ranks, all_gather, all_sum, print0, start
from runtime.rows import read_rows, refuse_held_out, write_rows, write_text
from runtime.runs import Run
from weights import resolve


class Settings(Args):
    """Args after `with_defaults`: these have values."""

    data: str
    out: str
    epochs: float
    lr: float
    max_length: int


def with_defaults(args: Args) -> Settings:
    """Fills in the objective's value where none was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Settings(**DEFAULTS[args.objective] | given)


def read_examples(args: Settings, path: str, chat: Chat, templates: Templates) -> list[tuple[list, list]]:
    """grm: (ids, loss_mask) of each judgement. bt: (ids of x + chosen, ids of x + rejected)."""
    examples = []
    if args.objective == "grm":
        for row in read_rows(path, "judgement"):
            prompt = grm_prompt(chat, templates, row, row["answer"])
            text = judgement_text(row["critique"], *(row[d] for d in DIMENSIONS), row.get("checks", ""))
            target = response_ids(chat, text)
            examples.append((prompt + target, [False] * len(prompt) + [True] * len(target)))
    else:
        for row in read_rows(path, "pair"):
            both = (row["chosen"], row["rejected"])
            examples.append(tuple(bt_ids(chat, templates, row, answer) for answer in both))
    # of a judgement both lists are as long as its tokens, of a pair the longer answer counts
    kept = [e for e in examples if max(map(len, e)) <= args.max_length]
    print0(
        f"{len(kept)} rows from {path}; {len(examples) - len(kept)} left out "
        f"(over --max-length {args.max_length} tokens)"
    )
    if not kept:
        raise ValueError(f"{path}: no row is within --max-length {args.max_length} tokens")
    return kept


# -- the two losses --------------------------------------------------------------------------------


def bt_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: -log P(chosen beats rejected), per pair. Rewards fp32 [P] each -> [P]."""
    return -F.logsigmoid(chosen - rejected)


def grm_sums(
    model: Transformer, examples: list, device: torch.device
) -> tuple[torch.Tensor, dict[str, float], packing.Batch]:
    """One forward pass: (sum of the losses with its graph, {name: sum over the examples}, what was computed)."""
    ids, loss_masks = zip(*examples)
    batch = packing.pack(ids, loss_masks, device)
    return -training.forward(model, batch).sum(), {}, batch


def bt_sums(
    model: Transformer, examples: list, device: torch.device
) -> tuple[torch.Tensor, dict[str, float], packing.Batch]:
    """The same for pairs; what both answers begin with, the prompt at least, is computed once."""
    input_ids, groups = [], []
    for chosen, rejected in examples:
        n = min(len(os.path.commonprefix([chosen, rejected])), len(chosen) - 1, len(rejected) - 1)
        groups.append((n, [len(chosen) - n, len(rejected) - n]))
        input_ids += chosen + rejected[n:]
    ends = torch.tensor([(n, *suffixes) for n, suffixes in groups]).flatten().cumsum(0).view(-1, 3)
    last_tokens = (ends[:, 1:].flatten() - 1).to(device)  # [2 P]: chosen, rejected, chosen, ...
    batch = packing.Batch(
        torch.tensor(input_ids, device=device), SharedPrefix(groups, device), last_tokens, None, [1] * 2 * len(examples)
    )
    rewards = training.forward(model, batch)
    chosen, rejected = rewards[0::2], rewards[1::2]
    sums = dict(
        correct=(chosen > rejected).sum(),
        ties=(chosen == rejected).sum(),
        margin=(chosen - rejected).sum(),
        chosen_reward=chosen.sum(),
        rejected_reward=rejected.sum(),
    )
    return (bt_loss(chosen, rejected).sum(), {name: value.item() for name, value in sums.items()}, batch)


def size(example: tuple[list, list]) -> int:
    """Tokens of an example: of a judgement, or of both answers of a pair."""
    first, second = example
    return len(first) if isinstance(second[0], bool) else len(first) + len(second)


def over_examples(
    args: Settings, model: Transformer, examples: list, ranks: Ranks, train: bool
) -> tuple[dict[str, float], int, int, float]:
    """Passes over this rank's examples -> (metrics over those of all ranks, tokens, trained, FLOPs).

    The loss is a mean over trained tokens (grm) or pairs (bt): `trained` is their number. With
    `train` each pass is followed by its backward pass.
    """
    if args.objective == "bt":
        sums_of, dummy = bt_sums, ([0], [0])
        n_trained = len(examples)
    else:
        sums_of, dummy = grm_sums, packing.DUMMY
        n_trained = sum(sum(t) for _, t in examples)
    lengths = [size(example) for example in examples]
    # the mean is over all ranks and micro-batches: the count must be known before any backward pass
    trained_count, token_count = all_sum(ranks, n_trained, sum(lengths))

    totals: dict[str, float] = {}
    flops = 0.0
    for indices in packing.micro_batches(lengths, args.tokens_per_microbatch, ranks):
        chosen = [examples[i] for i in indices] or [dummy]
        with torch.set_grad_enabled(train):
            loss, sums, batch = sums_of(model, chosen, ranks.device)
        flops += (roofline.update_flops if train else roofline.forward_flops)(model, batch)
        weight = float(len(indices) > 0)
        if train:  # FSDP averages gradients over the ranks; times world_size makes that the sum
            (loss * weight * ranks.world_size / trained_count).backward()
        for name, value in dict(loss=loss.item(), **sums).items():
            totals[name] = totals.get(name, 0.0) + value * weight
    training.reshard(model)  # passes without gradients leave the root gathered, which has no optimizer state
    metrics = {k: v / trained_count for k, v in zip(totals, all_sum(ranks, *totals.values()))}
    if args.objective == "bt":  # a tie is neither right nor wrong
        correct, decided = metrics.pop("correct"), 1 - metrics["ties"]
        metrics["accuracy"] = correct / decided if decided else float("nan")
    return metrics, int(token_count), int(trained_count), flops


# -- judgements of held-out answers ----------------------------------------------------------------


def judge_held_out(args: Settings, chat: Chat, templates: Templates, ranks: Ranks) -> dict[str, float | None]:
    """The saved model judges the first held-out answers (greedy) -> `agreement` with the labels.

    OUT/held_out.jsonl gets the rows, each with `judged`: what the model said, or null where that does not parse.
    """
    rows = read_rows(args.eval_data, "judgement")[: args.eval_judgements]
    mine = rows[ranks.rank :: ranks.world_size]
    prompts = [grm_prompt(chat, templates, row, row["answer"]) for row in mine]
    found = []
    if prompts:
        model = load_pretrained(f"{args.out}/model", ranks.dtype, ranks.device)
        engine = Engine(model, chat.stop_ids, max(map(len, prompts)) + args.eval_max_new_tokens)
        samples = engine.generate(prompts, temperature=0.0, max_new_tokens=args.eval_max_new_tokens)
        found = [parse_judgement(chat.decode(sample.ids)) for (sample,) in samples]
    labels = [Judgement(row["critique"], *(row[d] for d in DIMENSIONS)) for row in mine]
    both = all_gather(ranks, zip(mine, labels, found, strict=True))
    rows, labels, found = zip(*both)
    if ranks.rank == 0:
        judged = [row | {"judged": own and dataclasses.asdict(own)} for row, own in zip(rows, found)]
        write_rows(os.path.join(args.out, "held_out.jsonl"), judged)
    return agreement(labels, found)


def main(cli_args: Args) -> None:
    args = with_defaults(cli_args)
    if args.plan:
        return plan.one_model(args, plan.config_of(args.model), args.objective == "bt")
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.model)
    chat = Chat(tokenizer_from)
    print0(f"objective {args.objective}: lr {args.lr:g}, {args.epochs:g} epochs")
    templates = load_templates(tokenizer_from, answer_template=args.answer_template, grm_template=args.grm_template)
    template_texts = templates.texts("answer" if args.objective == "bt" else "grm")
    examples = read_examples(args, args.data, chat, templates)
    refuse_held_out(args.data)
    if len(examples) < args.batch_size:
        raise ValueError(f"{args.data}: {len(examples)} usable rows, fewer than --batch-size {args.batch_size}")
    held_out = read_examples(args, args.eval_data, chat, templates) if args.eval_data else []
    total_steps, last_step = packing.count_steps(args.epochs, args.max_steps, len(examples), args.batch_size)
    inputs = {
        "--data": input_digest(args.data),
        "--model": input_digest(tokenizer_from),
        "the template": digest_of(*template_texts.values()),
    }
    run = Run(args.out, args, ranks, inputs, last_step)
    model = training.open_model(args.model, args, args.seed, ranks, scalar_head=args.objective == "bt")
    optimizer = training.adamw(model, args.lr, args.weight_decay)
    run.resume({"model": model}, {"model": optimizer}, tokenizer_from, template_texts)

    for step in run.steps():
        with run.phase("update"):
            indices = packing.batch_indices(len(examples), args.batch_size, step, args.seed)
            mine = [examples[i] for i in packing.shard(indices, [size(examples[i]) for i in indices], ranks)]
            metrics, n_tokens, n_trained, flops = over_examples(args, model, mine, ranks, train=True)
            lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
            part = {"loss": metrics["loss"] / ranks.world_size}  # the mean is over all ranks already
            grad_norm = training.optimizer_step(model, optimizer, lr, args.max_grad_norm, part, mine, run)
        seconds = run.seconds["update"]
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == run.last_step):
            with run.phase("evaluation"):
                shard = held_out[ranks.rank :: ranks.world_size]
                held_out_metrics, *_ = over_examples(args, model, shard, ranks, train=False)
            metrics |= {f"held_out_{name}": value for name, value in held_out_metrics.items()}
        headline = {**metrics, "grad_norm": grad_norm, "lr": lr, "seconds": seconds}
        metrics |= dict(
            grad_norm=grad_norm,
            lr=lr,
            tokens=n_tokens,
            trained=n_trained,
            seconds=seconds,
            tokens_per_second=n_tokens / seconds,
            **training.machine_metrics(ranks, flops, seconds, args.peak_tflops),
        )
        run.log(metrics, headline)
        run.save_if_due()
    if args.objective == "grm" and held_out:
        del model, optimizer  # the engine needs their memory
        run.release_models()
        result = judge_held_out(args, chat, templates, ranks)
        print0("held-out judgements:", result)
        if ranks.rank == 0:
            write_text(os.path.join(args.out, "held_out.json"), json.dumps(result, indent=2))
    judge = f"{args.out}/model" if args.objective == "grm" else f"bt:{args.out}/model --edit-rate 0"
    run.finish("model", f"python ppo_cpe.py --judge {judge}")


if __name__ == "__main__":
    flags.run(main, ARGS)
