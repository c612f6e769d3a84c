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
from typing import Any, Literal

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags

DEFAULTS: dict[str, dict[str, Any]] = {
    "grm": dict(data="out/data/judgements.jsonl", out="out/grm", lr=4e-5, epochs=2.0, max_length=16384),
    "bt": dict(data="out/data/pairs.jsonl", out="out/bt", lr=1e-5, epochs=1.0, max_length=8192),
}


@dataclass(kw_only=True)
class Args(flags.RuntimeArgs):
    # -- what goes in and out
    objective: Literal["grm", "bt"] = "grm"
    """grm: write critique and scores. bt: scalar head on pairs."""
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the model that is fine-tuned."""
    data: str | None = None
    """Judgements or pairs. Default: out/data/judgements.jsonl (grm), out/data/pairs.jsonl (bt)."""
    out: str | None = None
    """Run folder; the newest weights are OUT/model. An unfinished run in it is continued.
    Default: out/grm (grm), out/bt (bt)."""
    answer_template: str | None = None
    """For bt: file with another prompt of the policy. Default: the one of --model's folder, else the built-in one."""
    grm_template: str | None = None
    """For grm: file with another rubric. Default: the one of --model's folder, else the built-in one."""

    # -- optimization
    epochs: flags.Positive | None = None
    """Passes over the data; the last partial batch of each is dropped. Default: 2 (grm), 1 (bt)."""
    batch_size: flags.Count = 128
    """Judgements or pairs per step, over all ranks."""
    lr: flags.Positive | None = None
    """Peak learning rate. Default: 4e-5 (grm), 1e-5 (bt)."""
    warmup_ratio: flags.Fraction = 0.1
    """Fraction of the steps with linear warm-up; cosine decay to zero after it."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, on all parameters."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping."""
    max_length: flags.Count | None = None
    """Tokens of prompt and answer; longer rows are left out and counted. Default: 16384 (grm), 8192 (bt)."""
    seed: int = 0
    """Order of the rows."""

    # -- held-out rows
    eval_data: flags.MayChange[str | None] = None
    """Rows like those of --data that are not trained on."""
    eval_every: flags.MayChange[flags.Count] = 100
    """Evaluation interval in steps; the last step always has a held-out loss."""
    eval_judgements: flags.MayChange[flags.Count] = 200
    """Held-out answers that the finished GRM judges (greedy), from the front of the file."""
    eval_max_new_tokens: flags.MayChange[flags.Count] = 512
    """Tokens of such a judgement. RL's judge has as many (--judge-max-new-tokens)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import dataclasses
import glob
import itertools
import json
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from attention import SharedPrefix
from chat import Chat
from diagnostics import agreement
from engine import Engine
from model import Transformer, load_pretrained
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
from runtime import offload, packing, plan, training
from runtime.digests import digest_of, input_digest
from runtime.distributed import Ranks, all_gather, all_sum, print0, start
from runtime.rows import read_rows, refuse_held_out, write_rows, write_text
from runtime.runs import Run
from weights import load_config, resolve


class Settings(Args):
    """Args after `with_defaults`: these have values."""

    data: str
    out: str
    epochs: float
    lr: float
    max_length: int

    @property
    def defaults(self) -> dict[str, Any]:
        return DEFAULTS[self.objective]


def with_defaults(args: Args) -> Settings:
    """Fills in the objective's value where none was given."""
    given = {name: value for name, value in vars(args).items() if value is not None}
    return Settings(**DEFAULTS[args.objective] | given)


# grm: ids of a judgement, and which of them are learned. bt: ids of x + chosen, and of x + rejected.
Example = tuple[Sequence[int], Sequence[int]]


def read_examples(
    args: Settings, path: str, chat: Chat, templates: Templates, max_length: int, batch_size: int = 1
) -> list[Example]:
    """Examples of a file that have at most max_length tokens. ValueError: fewer than batch_size."""
    examples: list[Example] = []
    if args.objective == "grm":
        for row in read_rows(path, "judgement"):
            prompt = grm_prompt(chat, templates, row, row["answer"])
            scores = {dimension: row[dimension] for dimension in DIMENSIONS}
            text = judgement_text(row["critique"], **scores, checks=row.get("checks", ""))
            target = response_ids(chat, text)
            examples.append((prompt + target, [False] * len(prompt) + [True] * len(target)))
    else:
        for row in read_rows(path, "pair"):
            chosen = bt_ids(chat, templates, row, row["chosen"])
            rejected = bt_ids(chat, templates, row, row["rejected"])
            examples.append((chosen, rejected))
    return packing.within_length(examples, lambda e: max(len(e[0]), len(e[1])), max_length, path, batch_size)


def size(objective: str, example: Example) -> int:
    """Tokens of an example: of a judgement, or of both answers of a pair."""
    return len(example[0]) if objective == "grm" else len(example[0]) + len(example[1])


def bt_loss(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Bradley-Terry: -log P(chosen beats rejected), per pair (arXiv 2203.02155, eq. 1). fp32 rewards [P] -> [P]."""
    return -F.logsigmoid(chosen - rejected)


def bt_sums(
    model: Transformer, pairs: Sequence[Example], device: torch.device
) -> tuple[torch.Tensor, dict[str, torch.Tensor], packing.Batch]:
    """The loss and what else is measured, summed over pairs, for `training.forward_backward`.

    What both answers begin with, the prompt at least, is computed once.
    """
    input_ids: list[int] = []
    groups = []
    last_tokens = []  # chosen, rejected, chosen, ...
    for chosen_ids, rejected_ids in pairs or [([0], [0])]:
        n = min(
            len(os.path.commonprefix([list(chosen_ids), list(rejected_ids)])),
            len(chosen_ids) - 1,
            len(rejected_ids) - 1,
        )
        groups.append((n, [len(chosen_ids) - n, len(rejected_ids) - n]))
        input_ids += chosen_ids
        last_tokens.append(len(input_ids) - 1)
        input_ids += rejected_ids[n:]
        last_tokens.append(len(input_ids) - 1)
    batch = packing.Batch(
        input_ids=torch.tensor(input_ids, device=device),
        context=SharedPrefix(groups, device),
        index=torch.tensor(last_tokens, device=device),
        targets=None,
        counts=[1] * len(last_tokens),
    )
    rewards = training.forward(model, batch)
    loss = bt_loss(rewards[0::2], rewards[1::2]).sum()
    chosen, rejected = rewards.detach().unflatten(0, (-1, 2)).unbind(1)
    sums = dict(
        correct=(chosen > rejected).sum(),
        ties=(chosen == rejected).sum(),
        margin=(chosen - rejected).sum(),
        chosen_reward=chosen.sum(),
        rejected_reward=rejected.sum(),
    )
    return loss, sums, batch


def passes(
    args: Settings, model: Transformer, examples: list[Example], ranks: Ranks, train: bool = True
) -> tuple[dict[str, float], int, int, float]:
    """Passes over this rank's examples -> (metrics over those of all ranks, tokens, trained, FLOPs).

    The loss is a mean over learned tokens (grm) or pairs (bt): `trained` is their number.
    """
    size_of = partial(size, args.objective)
    parts = packing.split(examples, size_of, args.tokens_per_microbatch, ranks)
    n_trained = len(examples) if args.objective == "bt" else sum(sum(loss_mask) for _, loss_mask in examples)
    trained_count, token_count = all_sum(ranks, n_trained, sum(map(size_of, examples)))
    loss_of = bt_sums if args.objective == "bt" else training.nll
    metrics, flops = training.forward_backward(loss_of, model, parts, trained_count, ranks, train)
    if args.objective == "bt":  # a tie is neither right nor wrong
        correct = metrics.pop("correct")
        decided = 1 - metrics["ties"]
        metrics["accuracy"] = correct / decided if decided else float("nan")
    return metrics, int(token_count), int(trained_count), flops


# -- judgements of held-out answers ----------------------------------------------------------------


def judge_held_out(args: Settings, path: str, chat: Chat, templates: Templates, positions: int, ranks: Ranks) -> None:
    """The saved model judges the first held-out answers (greedy) whose prompts leave it positions for a judgement.

    OUT/held_out.json gets `agreement` with the labels.
    OUT/held_out.jsonl gets the rows, each with `judged`: what the model said, or null where that does not parse.
    """
    with_prompts = ((row, grm_prompt(chat, templates, row, row["answer"])) for row in read_rows(path, "judgement"))
    fitting = ((row, prompt) for row, prompt in with_prompts if len(prompt) < positions)
    first = list(itertools.islice(fitting, args.eval_judgements))[ranks.rank :: ranks.world_size]
    mine = [row for row, _ in first]
    prompts = [prompt for _, prompt in first]
    found: list[Judgement | None] = []
    if prompts:
        model = load_pretrained(f"{args.out}/model", ranks.dtype, ranks.device)
        longest = min(positions, max(map(len, prompts)) + args.eval_max_new_tokens)
        engine = Engine(model, chat.stop_ids, longest)
        samples = engine.generate(prompts, temperature=0.0, max_new_tokens=args.eval_max_new_tokens)
        found = [parse_judgement(chat.decode(sample.ids)) for (sample,) in samples]
    judged = all_gather(ranks, zip(mine, found, strict=True))
    labels = [Judgement(row["critique"], *(row[d] for d in DIMENSIONS)) for row, _ in judged]
    result = agreement(labels, [judgement for _, judgement in judged])
    print0("held-out judgements:", result)
    if ranks.rank == 0:
        write_text(os.path.join(args.out, "held_out.json"), json.dumps(result, indent=2))
        with_judgements = [row | {"judged": own and dataclasses.asdict(own)} for row, own in judged]
        write_rows(os.path.join(args.out, "held_out.jsonl"), with_judgements)


def main(cli_args: Args) -> None:
    args = with_defaults(cli_args)
    is_bt = args.objective == "bt"
    if args.plan:
        return plan.one_model(args, plan.config_of(args.model), is_bt, sequences=2 if is_bt else 1)
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.model)
    chat = Chat(tokenizer_from)
    print0(f"objective {args.objective}: lr {args.lr:g}, {args.epochs:g} epochs")
    templates = load_templates(tokenizer_from, answer_template=args.answer_template, grm_template=args.grm_template)
    template_texts = templates.texts("answer" if is_bt else "grm")
    refuse_held_out(args.data, args.eval_data)
    positions = load_config(tokenizer_from).max_position_embeddings
    max_length = min(args.max_length, positions)
    examples = read_examples(args, args.data, chat, templates, max_length, args.batch_size)
    held_out = read_examples(args, args.eval_data, chat, templates, max_length) if args.eval_data else []
    total_steps, last_step = packing.count_steps(args.epochs, args.max_steps, len(examples), args.batch_size)
    inputs = {
        "--data": input_digest(args.data),
        "--model": input_digest(tokenizer_from),
        "the template": digest_of(*template_texts.values()),
    }
    if args.eval_data:
        inputs[f"--eval-data {args.eval_data}"] = input_digest(args.eval_data)
    run = Run(args.out, args, ranks, inputs, last_step)
    model = training.open_model(args.model, args, args.seed, ranks, scalar_head=is_bt)
    optimizer = training.adamw(model, args.lr, args.weight_decay)
    run.resume({"model": model}, {"model": optimizer}, tokenizer_from, template_texts)
    if run.first_step < last_step and ranks.rank == 0:
        for file in glob.glob(f"{glob.escape(args.out)}/held_out.json*"):  # of an earlier last step
            os.remove(file)

    for step in run.steps():
        with run.phase("update"):
            size_of = partial(size, args.objective)
            mine = packing.step_shard(examples, size_of, args.batch_size, step, args.seed, ranks)
            means, n_tokens, n_trained, flops = passes(args, model, mine, ranks)
            lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
            grad_norm = training.optimizer_step(
                model, optimizer, lr, args.max_grad_norm, {"loss": means["loss"]}, mine, run
            )
        if held_out and ((step + 1) % args.eval_every == 0 or step + 1 == run.last_step):
            with run.phase("evaluation"):
                shard = held_out[ranks.rank :: ranks.world_size]
                held_out_means, *_ = passes(args, model, shard, ranks, train=False)
            means |= {f"held_out_{name}": value for name, value in held_out_means.items()}
        metrics = means | training.update_metrics(run, grad_norm, lr, n_tokens, flops)
        metrics["pairs" if is_bt else "learned_tokens"] = n_trained
        run.log(metrics, {name: metrics[name] for name in (*means, "grad_norm", "lr", "seconds")})
        run.save_if_due()
    if args.objective == "grm" and args.eval_data:
        del model, optimizer  # the engine needs their memory
        run.release_models()
        offload.free_host_copies()
        judge_held_out(args, args.eval_data, chat, templates, positions, ranks)
    judge = f"bt:{args.out}/model --edit-rate 0" if is_bt else f"{args.out}/model"
    prompts = os.path.join(os.path.dirname(args.data), "prompts_train.jsonl")
    run.finish("model", f"python ppo_cpe.py --model SFT_POLICY --prompts {prompts} --judge {judge}")


if __name__ == "__main__":
    flags.run(main, ARGS)
