"""Stage 1: supervised fine-tuning of the policy (docs/method.md 1.3), and pretraining of a tiny base from scratch.

1. Read preference pairs and learn the chosen answers, or read conversations (`messages`) and learn every assistant
   turn. A later turn follows the ids of the earlier ones, as an edit does in RL: a template that would shorten earlier
   turns (Qwen3 drops their empty <think> blocks) is not applied again. From scratch, every token is learned.
2. Each step takes the next `batch_size` rows of the epoch's permutation, shards them over the ranks and packs them
   without padding. The loss is the mean negative log-likelihood over the learned tokens of all ranks.
3. AdamW with warm-up and cosine decay. Checkpoints are saved regularly; the same command continues from the newest.

Editing is not trained here: the instruct model can already rewrite an answer by a critique.
Departures: the released code trains 3 epochs, the paper says 2. Rows over the length limit are left out and counted.
They are not cut, since a cut answer teaches the model to stop in mid-sentence.

    python sft.py --model Qwen/Qwen2.5-0.5B-Instruct                   # one CPU or GPU
    torchrun --nproc_per_node=8 sft.py                                 # eight GPUs
    python sft.py --from-scratch out/world/tokenizer --data out/world/base_corpus.jsonl --out out/base \\
        --epochs 2 --layers 3 --batch-size 32 --lr 3e-3                # a tiny base model
"""

import os
import sys
from dataclasses import dataclass

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags


@dataclass(kw_only=True)
class Args(flags.RuntimeArgs):
    # -- what goes in and out
    model: str = "Qwen/Qwen2.5-7B-Instruct"
    """Folder or hub id of the instruct model that is fine-tuned."""
    data: str = "out/data/pairs.jsonl"
    """Pairs (chosen answers are learned) or rows with `messages`."""
    out: str = "out/sft"
    """Run folder; the newest weights are OUT/policy. An unfinished run in it is continued."""
    answer_template: str | None = None
    """File with another prompt of the policy. Default: the one of --model's folder, else the built-in one."""

    # -- optimization (the released code's values)
    epochs: flags.Positive = 3
    """Passes over the data; the last partial batch of each is dropped."""
    batch_size: flags.Count = 128
    """Rows per step, over all ranks."""
    lr: flags.Positive = 5e-6
    """Peak learning rate."""
    warmup_ratio: flags.Fraction = 0.1
    """Fraction of the steps with linear warm-up."""
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

from chat import Chat
from model import Transformer, init_weights
from model_config import Config
from prompts import Templates, answer_prompt, load_templates, response_ids
from runtime import packing, plan, training
from runtime.digests import digest_of, input_digest
from runtime.distributed import Ranks, all_sum, print0, start
from runtime.rows import EMPTY_THOUGHT, read_rows, refuse_held_out
from runtime.runs import Run
from weights import load_config, resolve


def read_examples(args: Args, chat: Chat, templates: Templates, max_length: int) -> list[packing.Masked]:
    """(ids, loss_mask) of each row of at most max_length tokens: token ids, and which of them are learned."""
    examples: list[packing.Masked] = []
    if read_rows(args.data, "object")[0].get("messages") is None:  # null: a table that holds conversations too
        for row in read_rows(args.data, "pair"):
            prompt = answer_prompt(chat, templates, row)
            answer = response_ids(chat, row["chosen"])
            examples.append((prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    else:
        for line, row in enumerate(read_rows(args.data, "messages"), 1):
            if row["messages"][0]["role"] == "assistant":
                raise ValueError(f"{args.data}:{line}: messages[0]: expected a message of the user (or the system's)")
            for i, message in enumerate(row["messages"]):
                if message["role"] == "assistant" and not EMPTY_THOUGHT.sub("", message["content"]).strip():
                    raise ValueError(f"{args.data}:{line}: messages[{i}] is empty, which would teach to end at once")
            examples.append(conversation(chat, row["messages"]))
        n_rows = len(examples)
        examples = [(ids, loss_mask) for ids, loss_mask in examples if any(loss_mask)]
        if len(examples) < n_rows:
            print0(f"{n_rows - len(examples)} rows of {args.data} are left out: no turn of the assistant")
    if args.from_scratch:  # pretraining learns from the questions too
        examples = [(ids, [False] + [True] * (len(ids) - 1)) for ids, _ in examples]
    return packing.within_length(examples, size, max_length, args.data, args.batch_size)


def conversation(chat: Chat, messages: list[dict]) -> packing.Masked:
    """Ids of a conversation, and which are learned: the assistant's turns. What follows the last of them is dropped."""
    ids: list[int] = []
    loss_mask: list[bool] = []
    before: list[dict] = []
    for message in messages:
        if message["role"] != "assistant":
            before.append(message)
            continue
        # later turns continue the ids of the earlier ones, as an edit does in RL
        turns = [i for m in before for i in chat.turn(m["role"], m["content"])]
        prompt = ids + chat.after_turn + turns + chat.header if ids else chat.messages(before)
        answer = response_ids(chat, message["content"])
        loss_mask += [False] * (len(prompt) - len(ids)) + [True] * len(answer)
        ids = prompt + answer
        before = []
    return ids, loss_mask


def size(example: packing.Masked) -> int:
    """Tokens of an example."""
    return len(example[0])


def scratch_config(args: Args, chat: Chat) -> Config:
    config = Config(
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
    return Config.from_dict(config.to_dict(), "--from-scratch")  # checks the sizes


def open_model(args: Args, chat: Chat, ranks: Ranks) -> Transformer:
    """The model that is trained, sharded."""
    if not args.from_scratch:
        return training.open_model(args.model, args, args.seed, ranks)
    model = training.shard(Transformer(scratch_config(args, chat)).to(ranks.device), ranks)
    init_weights(model, args.seed)
    model.checkpoint_activations = args.checkpoint_activations
    return model


def main(args: Args) -> None:
    if args.from_scratch and args.lora_rank:
        raise ValueError(f"--lora-rank {args.lora_rank}: random weights (--from-scratch) are trained whole")
    if args.plan:
        scratch = args.from_scratch
        return plan.one_model(args, scratch_config(args, Chat(scratch)) if scratch else plan.config_of(args.model))
    ranks = start(args.dtype, args.shard_size, args.timeouts, args.deterministic)
    tokenizer_from = resolve(args.from_scratch or args.model)
    chat = Chat(tokenizer_from)
    templates = load_templates(tokenizer_from, answer_template=args.answer_template)
    refuse_held_out(args.data)
    config = scratch_config(args, chat) if args.from_scratch else load_config(tokenizer_from)
    examples = read_examples(args, chat, templates, min(args.max_length, config.max_position_embeddings))
    total_steps, last_step = packing.count_steps(args.epochs, args.max_steps, len(examples), args.batch_size)
    inputs = {
        "--data": input_digest(args.data),
        "--from-scratch" if args.from_scratch else "--model": input_digest(tokenizer_from),
        "--answer-template": digest_of(templates.answer),
    }
    run = Run(args.out, args, ranks, inputs, last_step)
    model = open_model(args, chat, ranks)
    optimizer = training.adamw(model, args.lr, args.weight_decay)
    run.resume({"policy": model}, {"policy": optimizer}, tokenizer_from, templates.texts("answer"))

    for step in run.steps():
        with run.phase("update"):
            mine = packing.step_shard(examples, size, args.batch_size, step, args.seed, ranks)
            n_learned, n_tokens = all_sum(ranks, sum(sum(loss_mask) for _, loss_mask in mine), sum(map(size, mine)))
            parts = packing.split(mine, size, args.tokens_per_microbatch, ranks)
            means, flops = training.forward_backward(training.nll, model, parts, n_learned, ranks)
            lr = training.learning_rate(args.lr, step, total_steps, args.warmup_ratio)
            grad_norm = training.optimizer_step(
                model, optimizer, lr, args.max_grad_norm, {"loss": means["loss"]}, mine, run
            )
        metrics = means | training.update_metrics(run, grad_norm, lr, n_tokens, flops)
        metrics["learned_tokens"] = int(n_learned)
        run.log(metrics, {name: metrics[name] for name in ("loss", "grad_norm", "lr", "seconds")})
        run.save_if_due()
    folder = os.path.dirname(args.data)
    after = f"train_grm.py --model {args.model} --data {os.path.join(folder, 'judgements.jsonl')}"
    if args.from_scratch:
        after = f"sft.py --model {args.out}/policy --data {os.path.join(folder, 'pairs.jsonl')}"
    run.finish("policy", f"python {after}")


if __name__ == "__main__":
    flags.run(main, ARGS)
