"""PersonaMem (docs/evaluation.md 9): which of four replies suits a person whose long history comes first.

1. The history of a question is the conversation up to `end_index`; later messages are not seen. The question follows.
2. By choice (the release's metric): the options stand below the question and the reply ends with a letter. Right if the
   letters after `<final_answer>` are exactly the right one; failing that, if the letters of the whole reply are. A
   reply without a letter is wrong, and counted.
3. By likelihood, for a model in this process: the option whose text is the most likely reply, by the sum of its
   log-probs (which favours short options) and by their mean per token.
4. A table by question type; chance is 25 %. Rows whose request failed are not answered, neither right nor wrong.

Departures from the release: the request for the letter is worded otherwise, and a lone "a" counts as a letter only
where it does not stand before a word, as the English article does.
"""

import dataclasses
import os
import re
import sys

import numpy as np
import torch

from chat import Chat, without_control_tokens
from evaluation import tables, winrate
from evaluation.asking import draw_rows, make_stage, replies
from judges.base import weights_fingerprint
from judges.chat_client import is_url
from model import load_pretrained
from prompts import without_reasoning
from runtime import packing
from runtime.digests import digest_of
from runtime.rows import read_rows, write_rows, write_text

REQUEST = """Which of the replies below suits me best, given all that you know about me? Think first where it helps,
then end with <final_answer> and the letter of that reply, such as <final_answer>(a)."""
LETTERS = "abcd"
MARK = "<final_answer>"
BRACKETED = re.compile(r"\(([a-dA-D])\)")
SINGLE = re.compile(r"\b([a-dA-D])\b(?!['’]|\s+[a-z])")  # not the article of "a reply", nor the d of "I'd"
FIELDS = {"question_type": str, "options": list, "correct": str, "context_id": str, "end_index": int}


def read_questions(args) -> tuple[list[dict], dict[str, list[dict]]]:
    """-> (question rows, {context_id: messages}). ValueError: file, line and field of what is no such row."""
    rows = draw_rows(args)
    for row in rows:
        for field, kind in FIELDS.items():
            if not isinstance(row.get(field), kind):
                raise ValueError(
                    f'{args.prompts}: prompt "{row["prompt_id"]}": field "{field}" is missing or no '
                    f"{kind.__name__}; expected data/prepare.py's rows of PersonaMem"
                )
        if len(row["options"]) != len(LETTERS) or row["correct"] not in LETTERS:
            raise ValueError(
                f'{args.prompts}: prompt "{row["prompt_id"]}": expected 4 options and one of a to d as correct'
            )
    file = args.prompts.removesuffix(".jsonl") + "_contexts.jsonl"
    contexts = {}
    for number, row in enumerate(read_rows(file, "messages"), 1):
        if contexts.setdefault(row.get("context_id"), row["messages"]) is not row["messages"]:
            raise ValueError(f'{file}:{number}: a second context "{row["context_id"]}"')
    for row in rows:
        if len(contexts.get(row["context_id"], ())) < row["end_index"]:
            raise ValueError(
                f'{file}: no context "{row["context_id"]}" of {row["end_index"]} messages, which prompt '
                f'"{row["prompt_id"]}" needs'
            )
    return rows, contexts


def history_of(row: dict, contexts: dict[str, list[dict]]) -> list[dict]:
    return contexts[row["context_id"]][: row["end_index"]]


def letters_in(text: str) -> set[str]:
    """The option letters that a text names: those in brackets, or else single ones."""
    found = BRACKETED.findall(text) or SINGLE.findall(text)
    return {letter.lower() for letter in found}


def is_right(reply: str, correct: str) -> float | None:
    """1.0 right, 0.0 wrong, None: names no letter at all (which counts as wrong)."""
    reply = without_reasoning(reply)
    final = letters_in(reply.rpartition(MARK)[2]) if MARK in reply else set()
    if final == {correct}:
        return 1.0
    named = letters_in(reply)
    return float(named == {correct}) if named else None


@torch.no_grad()
def option_logprobs(model, prompt_ids: list[int], options: list[list[int]], device) -> tuple[torch.Tensor, ...]:
    """Log-probs of each option's tokens after the prompt, which is computed once: lists of ids -> fp32 tensors."""
    batch = packing.pack_shared([prompt_ids] * len(options), options, [[True] * len(ids) for ids in options], device)
    logprobs, _ = model(batch.input_ids, batch.context.position_ids, batch.context, batch.index, batch.targets)
    return logprobs.float().cpu().split(batch.counts)


def likelihoods(rows: list[dict], contexts: dict[str, list[dict]], args, ranks) -> list[dict | None]:
    """-> per row {"sums": [4], "means": [4]} of the options' log-probs, or None where it was not made."""
    chat = Chat(args.model)
    asked = [{"role": "user", "content": row["question"]} for row in rows]
    prompts = [chat.messages([*history_of(row, contexts), question]) for row, question in zip(rows, asked)]
    options = [[chat.encode(text) for text in row["options"]] for row in rows]
    digests = [digest_of(p, o, weights_fingerprint(args.model), str(ranks.dtype)) for p, o in zip(prompts, options)]

    def make(indices, record):
        model = load_pretrained(args.model, ranks.dtype, ranks.device)
        limit = model.config.max_position_embeddings
        for i in indices:
            if len(prompts[i]) + max(map(len, options[i])) > limit:
                raise ValueError(
                    f'prompt "{rows[i]["prompt_id"]}" has {len(prompts[i])} tokens and options, over the '
                    f"{limit} positions of {args.model}"
                )
            found = option_logprobs(model, prompts[i], options[i], ranks.device)
            if not all(x.isfinite().all() for x in found):  # else the largest of four would be what is not a number
                print(f'likelihoods: not finite at prompt "{rows[i]["prompt_id"]}"', file=sys.stderr)
                continue
            record(i, dict(sums=[x.sum().item() for x in found], means=[x.mean().item() for x in found]))

    return make_stage("likelihoods", "answers", digests, make, args, ranks)


def by_type(rows: list[dict], right: np.ndarray, seed: int) -> dict[str, dict]:
    """right: 1, 0 or NaN (not answered) [n] -> {question type or "total": accuracy in [0, 1], low, high, n}."""
    types, persons = [row["question_type"] for row in rows], tables.persons_of(rows)
    found = {}
    for name in [*sorted(set(types)), "total"]:
        where = [i for i, kind in enumerate(types) if name in (kind, "total")]
        values = right[where]
        low, high = winrate.bootstrap_mean(values, seed, persons and [persons[i] for i in where])
        n = int((~np.isnan(values)).sum())
        found[name] = dict(
            accuracy=float(np.nanmean(values)) if n else None, low=low, high=high, n=n, not_answered=len(values) - n
        )
    return found


def evaluate(args, ranks) -> None:
    """--task personamem of evaluate.py."""
    rows, contexts = read_questions(args)
    requests = []
    for row in rows:
        options = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, row["options"]))
        content = f"{row['question']}\n\n{REQUEST}\n\n{options}"
        messages = [*history_of(row, contexts), {"role": "user", "content": content}]
        requests.append((row["prompt_id"], without_control_tokens(messages) if is_url(args.model) else messages))
    replied = replies("choices", args.model, requests, args.temperature, args, ranks)
    likely = None if is_url(args.model) else likelihoods(rows, contexts, args, ranks)
    if args.stage in ("answers", "verdicts") or ranks.rank > 0:
        return
    judged = [None if r is None else is_right(r["answer"], row["correct"]) for row, r in zip(rows, replied)]
    measures = {"by choice": np.array([np.nan if r is None else j or 0.0 for r, j in zip(replied, judged)])}
    if likely is not None:
        for name in ("sums", "means"):
            best = [None if found is None else LETTERS[int(np.argmax(found[name]))] for found in likely]
            measures[{"sums": "by likelihood", "means": "by likelihood per token"}[name]] = np.array(
                [np.nan if b is None else float(b == row["correct"]) for b, row in zip(best, rows)]
            )
    results = dict(
        model=args.model,
        version=sorted({str(row.get("version")) for row in rows}),
        chance=0.25,
        no_letter=[row["prompt_id"] for row, r, j in zip(rows, replied, judged) if r and j is None],
        truncated=[row["prompt_id"] for row, r in zip(rows, replied) if r and r["truncated"]],
        **{name: by_type(rows, right, args.seed) for name, right in measures.items()},
    )
    write_rows(
        os.path.join(args.out, "choices.jsonl"),
        [
            {**row, **(reply or {"answer": None}), "right": j, "likelihood": likely and likely[i]}
            for i, (row, reply, j) in enumerate(zip(rows, replied, judged))
        ],
    )
    tables.write_json(os.path.join(args.out, "results.json"), results | {"args": dataclasses.asdict(args)})
    text = choices_markdown(results, list(measures))
    write_text(os.path.join(args.out, "table.md"), text)
    print(f"{text}\nwritten: {args.out}/ (choices.jsonl, results.json, table.md)")


def choices_markdown(results: dict, measures: list[str]) -> str:
    row = tables.markdown_row
    lines = [
        row("question type", *(f"accuracy %, {m}" for m in measures), "n", "not answered"),
        row("---", *["--:"] * (len(measures) + 2)),
    ]
    for name, first in results[measures[0]].items():
        cells = [results[m][name] for m in measures]
        lines.append(
            row(
                name,
                *(tables.interval_text(c["accuracy"], c["low"], c["high"], 100) for c in cells),
                first["n"],
                first["not_answered"],
            )
        )
    lines += [
        "",
        f"{results['model']}, {', '.join(results['version'])}; chance 25 %; 95 % intervals by bootstrap. "
        f"{len(results['no_letter'])} replies name no letter (wrong), {len(results['truncated'])} are truncated.",
    ]
    return "\n".join(lines) + "\n"
