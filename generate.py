"""Generates from a file of prompts, or chats on a terminal.

python generate.py --model DIR                                      # chat
python generate.py --model DIR --persona '{"name": "Mia", "food": "vegan"}'     # questions of one person
python generate.py --model DIR --input ROWS.jsonl --output OUT.jsonl --n 4 --temperature 0
"""

from dataclasses import dataclass

from runtime import flags


@dataclass
class Args:
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id."""
    input: str | None = None
    """JSON lines with `messages`, or `persona` and `question`, or `prompt_ids`; without it a chat on the terminal."""
    output: str = "out/generated.jsonl"
    """The input rows, each with sample, text, token_ids, logprobs, finish_reason; appears when all are done."""
    persona: str | None = None
    """For the chat: a JSON object, or a file that holds one; each line is then a question of this person."""
    answer_template: str | None = None
    """File that replaces the prompt for persona and question that the model was trained with."""
    n: flags.Count = 1
    """Samples per row."""
    temperature: flags.NonNegative = 1.0
    """0 takes the most likely token."""
    top_p: flags.TopP = 1.0
    """Nucleus; log-probs stay those of the full softmax."""
    max_new_tokens: flags.Count = 512
    """Tokens of a response."""
    max_batch: flags.Count = 64
    """Samples that run at once."""
    kv_tokens: flags.Count | None = None
    """Tokens that the KV cache holds, of all sequences together; by default by --max-batch and the free memory."""
    seed: int = 0
    """Of the sampling: a row's samples depend on the seed, its place in the file and the sample's number."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import os
from dataclasses import dataclass
from typing import Any

from chat import Chat
from engine import Engine
from model import load_pretrained
from prompts import Templates, answer_prompt, load_templates
from runtime.distributed import derive_seed, start
from runtime.progress import counting
from runtime.rows import check_row, parse_json, read_rows, write_rows
from weights import resolve


def row_prompt(row: dict, chat: Chat, templates: Templates, where: str) -> list[int]:
    """Prompt ids of an input row; ValueError names file, line and field."""
    if "prompt_ids" in row:
        ids, size = row["prompt_ids"], chat.tokenizer.get_vocab_size()
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise ValueError(f'{where}: field "prompt_ids": expected a non-empty list of integers from 0 to {size - 1}')
        return ids
    if "messages" in row:
        check_row(row, "messages", where)
        return chat.messages(row["messages"])
    if "persona" not in row and "question" not in row:
        raise ValueError(f'{where}: expected "messages", or "persona" and "question", or "prompt_ids"')
    check_row({"prompt_id": "-", **row}, "prompt", where)
    return answer_prompt(chat, templates, row)


def generate_file(args: Args, engine: Engine, chat: Chat, templates: Templates) -> None:
    rows = read_rows(args.input, "object")
    prompts = [row_prompt(row, chat, templates, f"{args.input}:{i + 1}") for i, row in enumerate(rows)]
    for i, ids in enumerate(prompts):
        seeds = [derive_seed(args.seed, i, sample) for sample in range(args.n)]
        try:
            engine.submit(ids, i, args.n, seeds, args.max_new_tokens, args.temperature, args.top_p)
        except ValueError as error:
            raise ValueError(f"{args.input}:{i + 1}: {error}") from error
    results = {}
    with counting(len(rows) * args.n, "samples") as done:
        while engine.busy:
            engine.step()
            for s in engine.collect():
                results[s.key, s.index] = s
                done()
    written = []
    for (i, k), s in sorted(results.items()):
        found = dict(sample=k, text=chat.decode(s.ids), token_ids=s.ids, logprobs=s.logprobs[: len(s.ids)])
        written.append({**rows[i], **found, "finish_reason": s.finish_reason})
    write_rows(args.output, written)
    print(f"{len(results)} samples of {len(rows)} rows: {args.output}")


def read_persona(text: str) -> Any:
    where = "--persona (no such file)"
    if os.path.isfile(text):
        where = f"--persona {text}"
        with open(text, encoding="utf-8-sig") as f:
            text = f.read()
    persona = parse_json(text, where)
    check_row({"prompt_id": "-", "question": "-", "persona": persona}, "prompt", "--persona")
    return persona


def stream(engine: Engine, chat: Chat, prompt_ids: list[int], args: Args, seed: int) -> str:
    """Generates one response and prints it as it grows -> its text."""
    engine.submit(prompt_ids, 0, 1, [seed], args.max_new_tokens, args.temperature, args.top_p)
    shown = ""
    while engine.busy:
        engine.step()
        done = engine.collect()
        text = chat.decode(done[0].ids if done else engine.partial(0))
        if done or not text.endswith("\ufffd"):  # half of a character waits for its other bytes
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(" [cut off at --max-new-tokens]" if done[0].finish_reason == "length" else "")
    return shown


def chat_loop(args: Args, engine: Engine, chat: Chat, templates: Templates) -> None:
    persona = read_persona(args.persona) if args.persona else None
    print("A question of this person per line" if persona else "A message per line, /new starts over", "(end: Ctrl-D)")
    messages, turn = [], 0
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text == "/new":
            messages = []
        elif text:
            turn += 1
            messages.append({"role": "user", "content": text})
            row = {"persona": persona, "question": text}
            prompt_ids = answer_prompt(chat, templates, row) if persona else chat.messages(messages)
            try:
                reply = stream(engine, chat, prompt_ids, args, derive_seed(args.seed, turn))
            except ValueError as error:  # the conversation has outgrown the model
                print(f"{error}; /new starts over")
                continue
            messages.append({"role": "assistant", "content": reply})


def main(args: Args) -> None:
    ranks = start(args.dtype)
    chat, templates = Chat(args.model), load_templates(resolve(args.model), answer_template=args.answer_template)
    model = load_pretrained(args.model, ranks.dtype, ranks.device)
    engine = Engine(model, chat.stop_ids, model.config.max_position_embeddings, args.max_batch, args.kv_tokens)
    (generate_file if args.input else chat_loop)(args, engine, chat, templates)


if __name__ == "__main__":
    flags.run(main, ARGS)
