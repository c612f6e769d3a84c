"""Stage 1: supervised fine-tuning of the policy (docs/method.md 1.3), and pretraining of a tiny base from scratch.

1. Read rows: preference pairs, of which the chosen answers are learned, or conversations (`messages`), of which every
   assistant turn is learned (from scratch: every token).
2. Each step draws the next `batch_size` rows of the epoch's permutation, shares them out over the ranks, packs them
   without padding and takes the mean negative log-likelihood over all trained tokens of all ranks.
3. AdamW with warm-up and cosine decay; a checkpoint from time to time, from which the same command continues.

Editing is not trained here: rewriting by a critique is a skill that the instruct model brings along.
Departures: the released code trains 3 epochs, the paper says 2; rows over the length limit are left out and counted,
not cut, since a cut answer teaches to stop in mid-sentence.

    python sft.py --model Qwen/Qwen2.5-0.5B-Instruct                   # one CPU or GPU
    torchrun --nproc_per_node=8 sft.py                                 # eight GPUs
    python sft.py --from-scratch out/world/tokenizer --data out/world/base_corpus.jsonl --out out/base  # tiny base
"""

from dataclasses import dataclass

from runtime import flags


@dataclass(kw_only=True)
class Args(flags.Machine):
    # -- what goes in and out
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the instruct model that is fine-tuned."""
    data: str = "out/data/pairs.jsonl"
    """Pairs (chosen answers are learned) or rows with `messages`."""
    out: str = "out/sft"
    """Run folder; the newest weights are OUT/policy. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File that replaces the built-in prompt of the policy."""

    # -- optimization (the released code's values)
    epochs: flags.Positive = 3
    """Passes over the data; the last partial batch of each is dropped."""
    batch_size: flags.Count = 128
    """Rows per step, over all ranks."""
    lr: flags.Positive = 5e-6
    """Peak learning rate."""
    warmup_ratio: flags.Share = 0.1
    """Share of the steps with linear warm-up."""
    weight_decay: flags.NonNegative = 0.01
    """AdamW's, on all parameters."""
    max_grad_norm: flags.Positive = 1.0
    """Gradient clipping."""
    max_length: flags.Count = 8192
    """Tokens; longer rows are left out and counted."""
    seed: int = 0
    """Order of the rows, initial weights from scratch."""

    # -- from scratch: size of the tiny base (about a million parameters: two CPU cores in minutes)
    from_scratch: str | None = None
    """Folder of a tokenizer: start from random weights of the sizes below, instead of from --model."""
    hidden_size: flags.Count = 128
    """Width."""
    layers: flags.Count = 4
    """Number of layers."""
    heads: flags.Count = 4
    """Query heads; half as many key-value heads."""
    intermediate_size: flags.Count = 384
    """Width of the MLP."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import time

from chat import Chat
from model import Transformer, init_weights
from model_config import Config
from prompts import Templates, answer_prompt, load_templates, response_ids
from runtime import checkpoints, packing, plan, roofline, runs, training
from runtime.distributed import Ranks, all_sum, print0, start
from runtime.rows import read_rows
from weights import resolve


def read_examples(args: Args, chat: Chat, templates: Templates) -> list[tuple[list[int], list[bool]]]:
    """(ids, trained) of each row: token ids, and which of them are learned."""
    first = read_rows(args.data, "object")[0]
    examples = []
    if "messages" in first:
        for line, row in enumerate(read_rows(args.data, "messages"), 1):
            if row["messages"][0]["role"] == "assistant":
                raise ValueError(f"{args.data}:{line}: messages[0]: expected a message of the user (or the system's)")
            ids, trained, before = [], [], []
            for message in row["messages"]:
                if message["role"] != "assistant":
                    before.append(message)
                    continue
                # later turns go on from the ids of the earlier ones, as an edit does in RL
                turns = [i for m in before for i in chat.turn(m["role"], m["content"])]
                prompt = ids + chat.after_turn + turns + chat.header if ids else chat.messages(before)
                answer = response_ids(chat, message["content"])
                trained += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
                ids, before = prompt + answer, []
            if args.from_scratch:  # pretraining: what people ask is text to learn from, too
                trained = [False] + [True] * (len(ids) - 1)
            examples.append((ids, trained))
    else:
        for row in read_rows(args.data, "pair"):
            prompt, answer = answer_prompt(chat, templates, row), response_ids(chat, row["chosen"])
            examples.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    kept = [e for e in examples if len(e[0]) <= args.max_length and any(e[1])]
    print0(
        f"{len(kept)} rows from {args.data}; {len(examples) - len(kept)} left out "
        f"(over --max-length {args.max_length} tokens, or without an assistant turn)"
    )
    if len(kept) < args.batch_size:
        raise ValueError(f"{args.data}: {len(kept)} usable rows are fewer than --batch-size {args.batch_size}")
    return kept


def scratch_config(args: Args, chat: Chat) -> Config:
    return Config(
        chat.tokenizer.get_vocab_size(),
        args.hidden_size,
        args.intermediate_size,
        args.layers,
        args.heads,
        args.heads // 2,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )


def open_model(args: Args, chat: Chat, ranks: Ranks) -> Transformer:
    """The model that is trained, sharded."""
    if not args.from_scratch:
        return training.open_model(args.model, args, ranks)
    model = training.shard(Transformer(scratch_config(args, chat)).to(ranks.device), ranks)
    init_weights(model, args.seed)
    model.checkpoint_activations = args.checkpoint_activations
    return model


def main(args):
    if args.from_scratch and args.lora_rank:
        raise ValueError(f"--lora-rank {args.lora_rank}: random weights (--from-scratch) are trained whole")
    if args.plan:
        scratch = args.from_scratch
        return plan.one_model(args, scratch_config(args, Chat(scratch)) if scratch else plan.config_of(args.model))
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.from_scratch or args.model)
    chat = Chat(tokenizer_from)
    templates = load_templates(tokenizer_from, answer_template=args.answer_template)
    examples = read_examples(args, chat, templates)
    total_steps, last_step = packing.count_steps(args.epochs, args.max_steps, len(examples), args.batch_size)
    runs.open_run(
        args,
        ranks,
        inputs={
            "--data": runs.input_digest(args.data),
            "--from-scratch" if args.from_scratch else "--model": runs.input_digest(tokenizer_from),
            "--answer-template": runs.digest_of(templates.answer),
        },
    )
    model = open_model(args, chat, ranks)
    optimizer = training.adamw(model, args.lr, args.weight_decay)
    first_step = checkpoints.load(args.out, {"policy": model}, {"policy": optimizer}, ranks)

    progress = runs.progress(first_step, last_step, ranks)
    for step in progress:
        started = time.perf_counter()
        rows = packing.batch_indices(len(examples), args.batch_size, step, args.seed)
        mine = [examples[i] for i in packing.share(rows, [len(examples[i][0]) for i in rows], ranks)]
        # the mean is over the tokens of all ranks and micro-batches: the count must be known before any backward pass
        n_trained, n_tokens = all_sum(ranks, sum(sum(t) for _, t in mine), sum(len(ids) for ids, _ in mine))

        loss_sum, flops = 0.0, 0
        for indices in packing.micro_batches([len(ids) for ids, _ in mine], args.tokens_per_microbatch, ranks):
            chosen = [mine[i] for i in indices] or [packing.EMPTY]
            batch = packing.pack(*zip(*chosen), ranks.device)
            logprobs, _ = model(batch.input_ids, batch.context.position_ids, batch.context, batch.index, batch.targets)
            flops += roofline.update_flops(model, batch)
            loss = -logprobs.sum() * (len(indices) > 0)
            # FSDP averages gradients over the ranks; times world_size makes that the sum
            (loss * ranks.world_size / n_trained).backward()
            loss_sum += loss.item()
        lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
        share = dict(loss=loss_sum / n_trained)  # of the mean
        grad_norm = training.optimizer_step(model, optimizer, lr, step + 1, share, mine, args, ranks)

        (loss_sum,) = all_sum(ranks, loss_sum)
        seconds = time.perf_counter() - started
        runs.log_metrics(
            args.out,
            dict(
                step=step + 1,
                loss=loss_sum / n_trained,
                grad_norm=grad_norm,
                lr=lr,
                tokens=int(n_tokens),
                trained_tokens=int(n_trained),
                seconds=seconds,
                tokens_per_second=n_tokens / seconds,
                **training.machine_metrics(ranks, flops, seconds, args.peak_tflops),
            ),
            ranks,
        )
        runs.print_step(
            progress, step + 1, last_step, dict(loss=loss_sum / n_trained, grad_norm=grad_norm, lr=lr, seconds=seconds)
        )
        if checkpoints.due(step + 1, last_step, args, ranks):
            checkpoints.save(
                args,
                step + 1,
                {"policy": model},
                {"policy": optimizer},
                tokenizer_from,
                templates.texts("answer"),
                ranks,
            )
    after = f"sft.py --model {args.out}/policy" if args.from_scratch else f"train_grm.py --model {args.model}"
    runs.print_end(args.out, "policy", f"python {after}")


if __name__ == "__main__":
    flags.run(main, ARGS)
