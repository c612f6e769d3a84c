"""Samples responses to the rows of a file, or chats on a terminal.

An output row is its input row with the response, so rows of any kind keep their fields.

    python generate.py --model DIR                                      # chat
    python generate.py --model DIR --persona '{"name": "Mia", "food": "vegan"}'     # questions from one person
    python generate.py --model DIR --input ROWS.jsonl --output OUT.jsonl --n 4 --temperature 0
"""

from dataclasses import dataclass

from runtime import flags


@dataclass
class Args:
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id."""
    input: str | None = None
    """JSON lines with `messages`, or `persona` and `question`, or `prompt_ids`. Without it: a chat on the terminal."""
    output: str = "out/generated.jsonl"
    """The input rows with sample, text, token_ids, logprobs and finish_reason. Written when all samples are done."""
    persona: str | None = None
    """For the chat: a JSON object, a file that holds one, or a text. Each line is then a question from this person."""
    answer_template: str | None = None
    """File with another prompt for persona and question. Default: the one that the model was trained with."""
    n: flags.Count = 1
    """Samples per row."""
    temperature: flags.NonNegative = 1.0
    """0 takes the most likely token."""
    top_p: flags.TopP = 1.0
    """Nucleus sampling. Log-probs are those of the full softmax all the same."""
    max_new_tokens: flags.Count = 512
    """Most tokens of a response."""
    max_batch: flags.Count = 64
    """Samples that run at once; more wait."""
    kv_tokens: flags.Count | None = None
    """Tokens in the KV cache. Default: by --max-batch and the free memory."""
    seed: int = 0
    """A sample depends on this seed, the line of its row and its number among the row's samples."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import os
from typing import Any

from chat import Chat
from engine import Engine
from model import load_pretrained
from prompts import Templates, answer_prompt, load_templates
from runtime.distributed import derive_seed, start
from runtime.progress import counting, printable
from runtime.rows import check_row, normalized, parse_json, read_rows, write_rows
from weights import resolve


def row_prompt(row: dict, chat: Chat, templates: Templates, where: str) -> list[int]:
    """Returns the prompt ids of an input row. ValueError: file, line and field of what is wrong."""
    if "prompt_ids" in row:
        ids = row["prompt_ids"]
        size = chat.tokenizer.get_vocab_size()
        if not isinstance(ids, list) or not ids or not all(type(i) is int and 0 <= i < size for i in ids):
            raise ValueError(f'{where}: field "prompt_ids": expected a non-empty list of integers from 0 to {size - 1}')
        return ids
    if "messages" in row:
        check_row(row, "messages", where)
        if row["messages"][-1]["role"] == "assistant":
            raise ValueError(f"{where}: the last message is the assistant's; expected one to be answered")
        return chat.messages(row["messages"])
    if "persona" not in row and "question" not in row:
        raise ValueError(f'{where}: expected "messages", or "persona" and "question", or "prompt_ids"')
    check_row({"prompt_id": "-", **row}, "prompt", where)
    return answer_prompt(chat, templates, row)


def generate_file(rows: list[dict], prompts: list[list[int]], args: Args, engine: Engine, chat: Chat) -> None:
    """Writes the samples of each row of --input, whose prompts are given."""
    for i, ids in enumerate(prompts):
        seeds = [derive_seed(args.seed, i, sample) for sample in range(args.n)]
        try:
            engine.submit(ids, i, args.n, seeds, args.max_new_tokens, args.temperature, args.top_p)
        except ValueError as error:
            raise ValueError(f"{args.input}:{i + 1}: {error}") from error
    samples = []
    with counting(len(rows) * args.n, "samples") as done:
        while engine.busy:
            engine.step()
            for sample in engine.collect(errors=True):
                samples.append(sample)
                done()
    failed = [sample for sample in samples if sample.error]
    samples = [sample for sample in samples if not sample.error]
    samples.sort(key=lambda sample: (sample.key, sample.index))  # the order of the input
    output_rows = []
    for sample in samples:
        fields = dict(
            sample=sample.index,
            text=chat.decode(sample.ids),
            token_ids=sample.ids,
            logprobs=sample.logprobs[: len(sample.ids)],
            finish_reason=sample.finish_reason,
        )
        output_rows.append(rows[sample.key] | fields)
    write_rows(args.output, output_rows)
    print(f"{len(samples)} samples of {len(rows)} rows: {args.output}")
    if failed:
        first = failed[0]
        raise FloatingPointError(
            f"{len(failed)} samples are left out, the first one of {args.input}:{first.key + 1}: {first.error}"
        )


def read_persona(text: str) -> Any:
    """The value of --persona: the name of a file with JSON or text, JSON, or any other text; it describes the person.

    ValueError: it looks like the name of a file, and there is none.
    """
    if os.path.isfile(text):
        with open(text, encoding="utf-8-sig") as f:
            content = f.read()
        persona = content if text.endswith(".txt") else parse_json(content, f"--persona {text}")
    elif text.lstrip()[:1] in ("{", "[", '"'):
        persona = parse_json(text, "--persona")
    elif text.endswith((".json", ".jsonl", ".txt")):
        raise ValueError(f"--persona {text}: no such file")
    else:
        persona = text
    persona = normalized(persona)
    check_row({"prompt_id": "-", "question": "-", "persona": persona}, "prompt", "--persona")
    return persona


def stream(engine: Engine, chat: Chat, prompt_ids: list[int], args: Args, seed: int) -> str:
    """Prints one response as it grows and returns its text."""
    engine.submit(prompt_ids, 0, 1, [seed], args.max_new_tokens, args.temperature, args.top_p)
    shown = ""
    while engine.busy:
        engine.step()
        done = engine.collect()
        text = chat.decode(done[0].ids if done else engine.partial(0))
        if done or not text.endswith("\ufffd"):  # half of a character: its other bytes are in the next token
            print(printable(text[len(shown) :]), end="", flush=True)
            shown = text
    cut_off = " [cut off at --max-new-tokens, or the last of the model's positions]"
    print(cut_off if done[0].finish_reason == "length" else "")
    return shown


HELP = """A message per line. The model sees the whole conversation.
/new starts over, Ctrl-D ends. Flags at the start: --temperature, --top-p, --max-new-tokens, --persona."""
HELP_WITH_PERSONA = """A question of the person per line. The model sees the profile and this question, no earlier ones.
Ctrl-D ends. Flags at the start: --temperature, --top-p, --max-new-tokens."""


def chat_loop(args: Args, engine: Engine, chat: Chat, templates: Templates) -> None:
    persona = read_persona(args.persona) if args.persona else None
    if persona:
        print("A question of this person per line (/help, end: Ctrl-D)")
    else:
        print("A message per line (/new starts over, /help, end: Ctrl-D); with --persona, questions of one person")
    messages: list[dict[str, str]] = []
    turn = 0
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return print()
        if text == "/new":
            messages = []
        elif text.startswith("/"):
            print(HELP_WITH_PERSONA if persona else HELP)
        elif text:
            turn += 1
            messages.append({"role": "user", "content": text})
            row = {"persona": persona, "question": text}
            prompt_ids = answer_prompt(chat, templates, row) if persona else chat.messages(messages)
            try:
                reply = stream(engine, chat, prompt_ids, args, derive_seed(args.seed, turn))
            except ValueError as error:  # longer than the model's positions
                messages.pop()
                print(error if persona else f"{error}; /new starts over")
                continue
            messages.append({"role": "assistant", "content": reply})


def main(args: Args) -> None:
    ranks = start(args.dtype)
    if ranks.world_size > 1:
        raise ValueError(f"{ranks.world_size} processes; expected one: python generate.py, without torchrun")
    chat = Chat(args.model)
    templates = load_templates(resolve(args.model), answer_template=args.answer_template)
    rows = read_rows(args.input, "object") if args.input else []
    prompts = [row_prompt(normalized(row), chat, templates, f"{args.input}:{i}") for i, row in enumerate(rows, 1)]
    model = load_pretrained(args.model, ranks.dtype, ranks.device)
    max_len = model.config.max_position_embeddings
    if args.input:  # a GPU may not have the memory for as many tokens as the model has positions
        max_len = min(max_len, max(map(len, prompts)) + args.max_new_tokens)
    engine = Engine(model, chat.stop_ids, max_len, args.max_batch, args.kv_tokens)
    if args.input:
        generate_file(rows, prompts, args, engine, chat)
    else:
        chat_loop(args, engine, chat, templates)


if __name__ == "__main__":
    flags.run(main, ARGS)
