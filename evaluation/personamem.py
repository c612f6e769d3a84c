"""PersonaMem (docs/evaluation.md 9): which of four replies suits a person, after a long history with that person?

1. The history of a question is its conversation up to `end_index`; later messages are not shown. Then comes the
   question.
2. By choice (the release's metric): the options stand below the question, and the reply ends with a letter. It is right
   if the letters after `<final_answer>` are exactly the right one, or else if those of the whole reply are. A reply
   without a letter is wrong, and counted.
3. By likelihood, for a model in this process: the option whose text is the most likely reply, by the sum of its
   log-probs (which favours short options) and by their mean per token.
4. A table by question type. Chance is 25 %. Rows whose request failed are not answered: neither right nor wrong.

Departures from the release: our own text asks for the letter. A lone "a" before a word is the English article, not a
letter.

`args` are those of evaluate.py.
"""

import os
import re
import sys

import numpy as np
import torch

from chat import Chat, without_control_tokens
from evaluation import winrate
from evaluation.annotations import persons_of
from evaluation.asking import draw_rows, make_stage, replies
from evaluation.tables import markdown_table, percent_text, write_results
from judges.base import weights_fingerprint
from judges.chat_client import is_url
from model import Transformer, load_pretrained
from prompts import without_reasoning
from runtime import flags, packing
from runtime.digests import digest_of
from runtime.distributed import Ranks
from runtime.rows import read_rows, write_rows

REQUEST = """Which of the replies below suits me best, given all that you know about me? Think first where it helps,
then end with <final_answer> and the letter of that reply, such as <final_answer>(a)."""
LETTERS = "abcd"
MARK = "<final_answer>"
BRACKETED = re.compile(r"\(([a-dA-D])\)")
# not the article of "a reply", nor the d of "I'd"
SINGLE = re.compile(r"(?<!['’])\b([b-dB-D]|[aA](?!\s+(?!(?:is|was|fits|suits|because|since|as)\b)[a-z]))\b(?!['’])")
FIELDS = {"question_type": str, "options": list, "correct": str, "context_id": str, "end_index": int}
MEASURES = {"sums": "by likelihood", "means": "by likelihood per token"}

Contexts = dict[str, list[dict]]  # {context_id: messages}


def read_questions(args) -> tuple[list[dict], Contexts]:
    """Question rows, and the conversations before them. ValueError: file, line and field of a wrong row."""
    rows = draw_rows(args)
    for row in rows:
        where = f'{args.prompts}: prompt "{row["prompt_id"]}"'
        for field, kind in FIELDS.items():
            if not isinstance(row.get(field), kind):
                raise ValueError(
                    f'{where}: field "{field}" is missing or no {kind.__name__}; expected data/prepare.py\'s rows of '
                    "PersonaMem"
                )
        if len(row["options"]) != len(LETTERS) or row["correct"] not in LETTERS:
            raise ValueError(f"{where}: expected 4 options and one of a to d as correct")
    file = args.prompts.removesuffix(".jsonl") + "_contexts.jsonl"
    contexts: Contexts = {}
    for number, row in enumerate(read_rows(file, "messages"), 1):
        context_id = row.get("context_id", "")  # rows without one belong to no question
        if context_id in contexts:
            raise ValueError(f'{file}:{number}: a second context "{context_id}"')
        contexts[context_id] = row["messages"]
    for row in rows:
        if len(contexts.get(row["context_id"], ())) < row["end_index"]:
            raise ValueError(
                f'{file}: no context "{row["context_id"]}" of {row["end_index"]} messages, which prompt '
                f'"{row["prompt_id"]}" needs'
            )
    return rows, contexts


def history_of(row: dict, contexts: Contexts) -> list[dict]:
    return contexts[row["context_id"]][: row["end_index"]]


# -- by choice ---------------------------------------------------------------------------------------------------------


def choice_messages(row: dict, contexts: Contexts) -> list[dict]:
    options = "\n".join(f"({letter}) {text}" for letter, text in zip(LETTERS, row["options"]))
    content = f"{row['question']}\n\n{REQUEST}\n\n{options}"
    return [*history_of(row, contexts), {"role": "user", "content": content}]


def letters_in(text: str) -> set[str]:
    """The option letters that a text names: those in brackets, or else single ones."""
    letters = BRACKETED.findall(text) or SINGLE.findall(text)
    return {letter.lower() for letter in letters}


def is_right(reply: str, correct: str) -> float | None:
    """1.0 if the reply is right, 0.0 if it is wrong, None if it names no letter (which counts as wrong)."""
    reply = without_reasoning(reply)
    if MARK in reply and letters_in(reply.rpartition(MARK)[2]) == {correct}:
        return 1.0
    named = letters_in(reply)
    return float(named == {correct}) if named else None


# -- by likelihood -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def option_logprobs(
    model: Transformer, prompt_ids: list[int], options: list[list[int]], device: torch.device | str
) -> tuple[torch.Tensor, ...]:
    """Log-probs of each option's tokens after the prompt, fp32 [length] each. The prompt is computed once."""
    batch = packing.pack_shared([prompt_ids] * len(options), options, [[True] * len(ids) for ids in options], device)
    logprobs, _ = model(batch.input_ids, batch.context.position_ids, batch.context, batch.index, batch.targets)
    return logprobs.float().cpu().split(batch.counts)


def likelihoods(rows: list[dict], contexts: Contexts, args, ranks: Ranks) -> list[dict | None]:
    """For each row {"sums": [4], "means": [4]} of the options' log-probs, or None where they are missing."""
    chat = Chat(args.model)
    prompts = []
    for row in rows:
        prompts.append(chat.messages([*history_of(row, contexts), {"role": "user", "content": row["question"]}]))
    options = [[chat.encode(text) for text in row["options"]] for row in rows]
    identity = (weights_fingerprint(args.model), str(ranks.dtype))
    digests = [digest_of(p, o, *identity) for p, o in zip(prompts, options)]

    def make(indices, record):
        model = load_pretrained(args.model, ranks.dtype, ranks.device)
        limit = model.config.max_position_embeddings
        for i in indices:
            if len(prompts[i]) + max(map(len, options[i])) > limit:
                raise ValueError(
                    f'prompt "{rows[i]["prompt_id"]}" has {len(prompts[i])} tokens and options, over the {limit} '
                    f"positions of {args.model}"
                )
            logprobs = option_logprobs(model, prompts[i], options[i], ranks.device)
            if all(x.isfinite().all() for x in logprobs):
                record(i, dict(sums=[x.sum().item() for x in logprobs], means=[x.mean().item() for x in logprobs]))
            else:  # argmax would choose a NaN
                print(f'likelihoods: not finite at prompt "{rows[i]["prompt_id"]}"', file=sys.stderr)

    return make_stage("likelihoods", "answers", digests, make, args, ranks)


# -- numbers -----------------------------------------------------------------------------------------------------------


def by_type(rows: list[dict], right: np.ndarray, seed: int) -> dict[str, dict]:
    """{question type or "total": accuracy in [0, 1], its interval low and high, n, not_answered}.

    right: 1, 0 or NaN (not answered), [n].
    """
    types = [row["question_type"] for row in rows]
    persons = persons_of(rows)
    results = {}
    for name in [*sorted(set(types)), "total"]:
        indices = [i for i, kind in enumerate(types) if name in (kind, "total")]
        values = right[indices]
        n = int((~np.isnan(values)).sum())
        rate = winrate.mean_and_interval(values, seed, persons and [persons[i] for i in indices], "accuracy")
        results[name] = rate | dict(n=n, not_answered=len(values) - n)
    return results


def evaluate(args, ranks: Ranks) -> None:
    """--task personamem of evaluate.py."""
    rows, contexts = read_questions(args)
    requests = []
    for row in rows:
        messages = choice_messages(row, contexts)
        requests.append((row["prompt_id"], without_control_tokens(messages) if is_url(args.model) else messages))
    replied = replies("choices", args.model, requests, args.temperature, args, ranks)
    likely = [] if is_url(args.model) else likelihoods(rows, contexts, args, ranks)
    if args.stage in ("answers", "verdicts") or ranks.rank > 0:
        return

    judged = [reply and is_right(reply["answer"], row["correct"]) for row, reply in zip(rows, replied)]
    right = {"by choice": [reply and (verdict or 0.0) for reply, verdict in zip(replied, judged)]}
    for name, measure in MEASURES.items() if likely else ():
        right[measure] = [x and float(LETTERS[np.argmax(x[name])] == row["correct"]) for x, row in zip(likely, rows)]
    results = dict(
        model=args.model,
        version=sorted({str(row.get("version")) for row in rows}),
        chance=0.25,
        no_letter=[row["prompt_id"] for row, reply, v in zip(rows, replied, judged) if reply and v is None],
        truncated=[row["prompt_id"] for row, reply in zip(rows, replied) if reply and reply["truncated"]],
    )
    for measure, values in right.items():
        results[measure] = by_type(rows, np.array(values, dtype=np.float64), args.seed)  # None is NaN
    choices = []
    for i, row in enumerate(rows):
        reply = replied[i] or {"answer": None}
        choices.append({**row, **reply, "right": judged[i], "likelihood": likely[i] if likely else None})
    write_rows(os.path.join(args.out, "choices.jsonl"), choices)
    table = choices_table(results, list(right))
    write_results(args.out, results, flags.record(args), table, "choices.jsonl")


def choices_table(results: dict, measures: list[str]) -> str:
    """Markdown."""
    rows = []
    for name, first in results[measures[0]].items():
        cells = []
        for measure in measures:
            result = results[measure][name]
            cells += [percent_text(result, "accuracy"), result["n"]]
        rows.append([name, *cells, first["not_answered"]])
    columns = [column for measure in measures for column in (f"accuracy %, {measure}", "n")]
    header = ["question type", *columns, "not answered"]
    lines = [
        *markdown_table(header, rows),
        "",
        f"{results['model']}, {', '.join(results['version'])}; chance 25 %; 95 % intervals by bootstrap. "
        f"{len(results['no_letter'])} replies name no letter (wrong), {len(results['truncated'])} are truncated.",
    ]
    return "\n".join(lines) + "\n"
