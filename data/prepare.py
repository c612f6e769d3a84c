"""Turns public data sets, or your own personas and questions, into the rows that the stages read.

**PersonaFeedback** (arXiv 2506.12915; docs/evaluation.md 7), for training and evaluation:
1. Recognize the files of a source by their contents: personas, preference pairs, RL prompts (verl's form). The authors'
   repository, the data set on the hub and a flat folder of JSON lines differ in names only.
2. Join pairs with their personas, and parse persona and question out of the RL prompts' text.
3. Hold out a fraction of the personas. Their questions and pairs go to the *_eval files, so that no evaluation question
   has a persona that was trained on. The split depends on the persona alone. If the release's file of baseline answers
   is there (question, persona, response), its questions become prompts_winrate with the answer as `reference`, and
   their personas are held out too.
4. Write prompts_train, prompts_eval, prompts_winrate, pairs and pairs_eval (.jsonl), each only if it has rows, and
   print how many rows each has and what was dropped.

After training on PersonaFeedback's pairs, results on it are meaningful for the held-out personas only.

**Your own** personas and questions, as .csv, .jsonl or .parquet files (--questions, --personas), become prompts_train
and prompts_eval, split by persona in the same way.
- A persona is the value of --persona-column: text, or a JSON object (also as text). Several columns become an object.
  Without such a column it is the whole row.
- A question belongs to the persona with the same --id-column. If the questions have no such column, each goes to
  --personas-per-question personas, drawn by --seed. If they have a persona column, --personas is not needed.
- A column `reference` of the questions (an answer to compare with) is kept. An empty cell is no value.

**For evaluation only**, written whole, with no persona held out:
- AlpacaEval's outputs (a .json of instruction and output; docs/evaluation.md 8): alpaca_eval.jsonl, the output as
  `reference`, in the file's order. Each instruction gets a persona of --personas, drawn by --seed and kept in the row
  (`user_id`, `assigned`), because the paper's own assignment is not released.
- PersonaMem v1 (arXiv 2504.14225: questions_SIZE.csv, shared_contexts_SIZE.jsonl; docs/evaluation.md 9):
  personamem_SIZE.jsonl, both multiple choice and plain prompts, and personamem_SIZE_contexts.jsonl.
- PersonaMem v2 (arXiv 2512.06688: benchmark/text/benchmark.csv, and the chat histories that it links to): the same as
  personamem2_SIZE.jsonl, for each size whose histories are there.
- Personalized-RewardBench (arXiv 2604.07343: question, profile, chosen, rejected): rewardbench.jsonl.

Files are UTF-8, with or without a byte order mark; compressed files are not read. Keys without a value (null) are
dropped, so that a table gives the same rows as JSON lines (data/readers.py).

    python data/prepare.py --source PersonalAILab/PersonaFeedback      # a data set on the hub
    python data/prepare.py --source path/to/files --out out/data    # a folder, searched through
    python data/prepare.py --source tatsu-lab/alpaca_eval --personas PersonalAILab/PersonaFeedback
    python data/prepare.py --source bowen-upenn/PersonaMem
    python data/prepare.py --personas people.csv --questions asked.csv --id-column id --question-column text
    python data/prepare.py --questions asked.csv --persona-column name job likes     # persona and question in one table
"""

import os
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import flags


@dataclass
class Args:
    source: str | None = None
    """A public data set: a folder, a single file, or its name on the hub."""
    out: str = "out/data"
    """Folder of the written files."""
    eval_share: flags.Fraction = 0.1
    """Fraction of the personas held out for evaluation, in [0, 1)."""
    personas: str | None = None
    """Personas for AlpacaEval and --questions: a source as above, or a table."""
    seed: int = 0
    """Seed for drawing personas for questions that name none (AlpacaEval's instructions, --questions)."""
    profile_entries: flags.Count | None = None
    """Entries of a Personalized-RewardBench profile that are kept, from its front. Default: all, some 20,000 tokens."""

    # -- your own tables instead of --source
    questions: str | None = None
    """A .csv, .jsonl or .parquet file of questions."""
    question_column: str = "question"
    """Column of the questions."""
    persona_column: tuple[str, ...] = ()
    """Column of the personas, or several. Default: "persona" if it exists, else the whole row of --personas."""
    id_column: str = "user_id"
    """Column of both files that links a question to its persona."""
    personas_per_question: flags.Count = 1
    """Personas drawn for each question, if questions have no --id-column."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import ast
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data.readers import ENDINGS, read_objects, read_raw, read_table, read_text
from runtime.distributed import derive_seed
from runtime.rows import check_compression, check_row, data_row, json_lines, parse_json, refuse_surrogates, write_rows

# What precedes the persona (as JSON) and the question in the text of the release's RL prompts
PERSONA_MARK = "当前用户配置："
QUESTION_MARK = "以下是用户问题："
QUESTION_END = re.compile(r"\s*生成\s*1\s*个[^\n]*回答：?\s*$")
ANSWER_TAGS = re.compile(r"^\s*<?answer>\s*|\s*</answer>\s*$")
TIER = re.compile(r"(easy|mid|medium|hard)")
KIND = re.compile(r"(general|spe[cd]ific)")  # the hub spells one folder "spedific"
# The baseline's file has no tiers: 50 questions of each, in this order
WINRATE_TIERS = [(kind, tier) for kind in ("specific", "general") for tier in ("easy", "mid", "hard")]
FIELDS = {  # kind of file: fields of its first row, the first kind that fits
    "baseline": {"question", "persona", "response"},
    "rewardbench": {"question", "profile", "chosen", "rejected"},
    "pairs": {"user_id", "question", "chosen"},
    "rl": {"prompt", "reward_model"},
}
WINRATE_BASELINE = "mix_gpt-4o.jsonl"  # of the authors' repository, which has GPT-4o-mini's answers beside it
ALPACA_BASELINE = "alpaca_eval_gpt4_baseline.json"  # of AlpacaEval 2, whose difficulties belong to it
OPTION = re.compile(r"\s*\(([a-d])\)\s*")


def list_files(source: str) -> tuple[str, list[str]]:
    """-> root folder and sorted files of a folder, a file or a data set on the hub. ValueError: there is none."""
    if os.path.isfile(source):
        check_compression(source, b"")
        return os.path.dirname(source), [source]
    patterns = [f"*{ending}" for ending in ENDINGS]
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            source = snapshot_download(source, repo_type="dataset", allow_patterns=patterns)
        except (HFValidationError, OSError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"{source}: no such folder or file, and as a data set not fetched from the hub ({reason}). "
                "Without a network, copy the release's files to a folder and name that"
            ) from error
    files = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    compressed = [os.path.relpath(f, source) for f in files if f.endswith(tuple(f"{e}.gz" for e in ENDINGS))]
    if compressed:
        print(f"compressed, not read: {', '.join(compressed[:5])}")
    return source, [f for f in files if f.endswith(ENDINGS)]


def what_it_holds(path: str) -> str | None:
    """What a file holds, by its name and the fields of its first row; None: nothing that is known.

    "persona" is a file of one persona, "personas" one of many.
    """
    folder, name = os.path.split(path)
    if name.startswith("chat_history_"):  # of PersonaMem v2: its questions link to them
        return None
    if path.endswith(".json"):
        if name.startswith("dataset_info") or name in ("state.json", "dataset_dict.json"):  # of the library datasets
            return None
        if "persona" in os.path.basename(folder):
            return "persona"
        text = read_text(path)
        if text.startswith("version https://git-lfs"):  # a pointer to a file that was not fetched
            return None
        return "alpaca" if is_outputs(parse_json(text, path)) else None
    if path.endswith(".csv"):
        if path.endswith(os.path.join("text", "benchmark.csv")):
            return "personamem2"
        return "personamem" if name.startswith("questions_") else None
    if name.startswith("shared_contexts_"):
        return "contexts"
    _, first = next(read_raw(path), (path, {}))
    check_row(first, "object", path)
    for kind, fields in FIELDS.items():
        if fields <= first.keys():
            return kind
    return "personas" if "persona" in name else None


def checked_persona(persona: Any, where: str) -> dict | str:
    """A persona that is a non-empty object or text. ValueError: it is not."""
    if isinstance(persona, str) and persona.lstrip().startswith("{"):  # an object as text
        persona = parse_json(persona, f'{where}: field "persona"')
    persona = data_row(persona, where)
    refuse_surrogates({"persona": persona}, where)
    if not isinstance(persona, (dict, str)) or not persona or not str(persona).strip():
        raise ValueError(f'{where}: field "persona" is {json.dumps(persona)[:80]}, expected a non-empty object or text')
    return persona


def text_field(row: dict, field: str, where: str) -> str:
    """The text of a field, which may be blank. ValueError: it is missing or no text."""
    if not isinstance(row.get(field), str):
        raise ValueError(f'{where}: field "{field}" is missing or no text')
    return row[field]


def read_personas(
    path: str, id_column: str = "user_id", persona_columns: tuple[str, ...] = ()
) -> dict[str, dict | str]:
    """Personas of a table by id, which is the row number, from 1, in a table without ids.

    persona_columns: one, or several for an object of them; none: "persona" if it exists, else the whole row.
    ValueError: a row without an id in a table that has ids, two rows of one id, no persona, or no rows.
    """
    columns, rows = read_table(path)
    if not persona_columns and "persona" in columns:
        persona_columns = ("persona",)
    for column in persona_columns:
        require_column(column, columns, path)
    personas = {}
    for number, (where, row) in enumerate(rows, 1):
        persona_id = str(number)
        if id_column in columns:
            if id_column not in row:
                raise ValueError(f'{where}: field "{id_column}" is missing; expected an id, as in the other rows')
            persona_id = str(row[id_column])
        if persona_id in personas:
            raise ValueError(f'{where}: {id_column} "{persona_id}" occurs twice')
        persona = persona_of(row, persona_columns)
        if not persona_columns:
            persona = {column: value for column, value in row.items() if column != id_column}
        personas[persona_id] = checked_persona(persona, where)
    return personas


def digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def in_held_out_share(persona: dict | str, share: float) -> bool:
    """Whether a persona is held out for evaluation: by its digest, so that each layout and run has the same split."""
    return int(digest(persona), 16) < share * 2**64


def prompt_row(persona: dict | str, question: str, source: str) -> dict:
    """A prompt row; its prompt_id depends on persona and question only."""
    prompt_id = digest(persona, question)
    # evaluate.py draws a person's questions together
    return {
        "prompt_id": prompt_id,
        "user_id": digest(persona),
        "persona": persona,
        "question": question,
        "source": source,
    }


def parse_rl_prompt(row: dict, where: str) -> tuple[dict | str, str]:
    """Persona and question out of a verl row's text. ValueError: where, and what was not found."""
    prompt = row.get("prompt")
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)):
        raise ValueError(f'{where}: field "prompt" is no list of messages')
    _, mark, rest = text_field(prompt[-1], "content", where).partition(PERSONA_MARK)
    if not mark:
        raise ValueError(f'{where}: no "{PERSONA_MARK}" in the prompt, so no persona')
    try:
        persona, end = json.JSONDecoder().raw_decode(rest.lstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: the persona in the prompt is not JSON ({error})") from error
    _, mark, question = rest.lstrip()[end:].rpartition(QUESTION_MARK)
    question = QUESTION_END.sub("", question).strip()
    if not mark or not question:
        raise ValueError(f'{where}: no question after "{QUESTION_MARK}" in the prompt')
    return checked_persona(persona, where), question


def rl_rows(path: str, source: str) -> Iterator[dict]:
    """Prompt rows of a verl file; `reference` is its model-written answer, without stray tags."""
    for where, row in read_objects(path):
        prompt = prompt_row(*parse_rl_prompt(row, where), source)
        truth = (row.get("reward_model") or {}).get("ground_truth")
        reference = ANSWER_TAGS.sub("", truth) if isinstance(truth, str) else ""
        yield {**prompt, "reference": reference} if reference.strip() else prompt


def preference_pairs(
    path: str, source: str, rejected_field: str, persona_in: Callable[[dict, str], dict | str], dropped: Counter
) -> Iterator[tuple[dict, dict]]:
    """(row, pair) of each row of a file. Pairs without a difference are counted instead."""
    for where, row in read_objects(path):
        persona = persona_in(row, where)
        question, chosen, rejected = (text_field(row, field, where) for field in ("question", "chosen", rejected_field))
        if not (question.strip() and chosen.strip() and rejected.strip()):
            dropped["pairs with a blank question or answer"] += 1
        elif chosen == rejected:
            dropped["pairs of two equal answers"] += 1
        else:
            yield row, prompt_row(persona, question, source) | {"chosen": chosen, "rejected": rejected}


def pair_rows(path: str, source: str, personas: dict, dropped: Counter) -> Iterator[dict]:
    """Pair rows of a benchmark file, with user_id, tier and kind."""
    tier = TIER.search(source)
    kind = KIND.search(source)

    def persona_in(row: dict, where: str) -> dict | str:
        user_id = str(row.get("user_id"))
        if user_id not in personas:
            raise ValueError(f'{where}: no persona with user_id "{user_id}" among {len(personas)}')
        return personas[user_id]

    for row, pair in preference_pairs(path, source, "reject", persona_in, dropped):
        pair["user_id"] = str(row["user_id"])
        if row.get("tier"):
            pair["tier"] = row["tier"]
        elif tier:
            pair["tier"] = tier[1].replace("medium", "mid")
        if kind:
            pair["kind"] = "general" if kind[1] == "general" else "specific"
        yield pair


def distinct(rows: Iterable[dict], fields: tuple[str, ...], dropped: Counter, what: str) -> list[dict]:
    """The first row with each value of the fields, in order; the others are counted."""
    first_rows: dict[tuple, dict] = {}
    for row in rows:
        key = tuple(row[field] for field in fields)
        if first_rows.setdefault(key, row) is not row:
            dropped[what] += 1
    return list(first_rows.values())


def split(rows: Iterable[dict], is_held_out: Callable[[dict], bool]) -> tuple[list[dict], list[dict]]:
    """-> rows to train on, and held-out rows."""
    sides: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        sides[is_held_out(row)].append(row)
    return sides


def winrate_rows(path: str, source: str, dropped: Counter) -> list[dict]:
    """Prompt rows of the baseline's file, its answer as `reference`; tiers by position if all 300 are present."""
    rows = []
    for where, row in read_objects(path):
        persona = checked_persona(row.get("persona"), where)
        question = text_field(row, "question", where)
        answer = text_field(row, "response", where)
        rows.append(prompt_row(persona, question, source) | {"reference": answer})
    if len(rows) == 50 * len(WINRATE_TIERS):
        for i, row in enumerate(rows):
            row["kind"], row["tier"] = WINRATE_TIERS[i // 50]
    return distinct(rows, ("prompt_id",), dropped, "repeated questions of the baseline")


def is_outputs(value: Any) -> bool:
    """Whether a JSON value has AlpacaEval's form: a list of objects with the texts instruction and output."""
    rows = value if isinstance(value, list) else []
    texts = [row.get(name) if isinstance(row, dict) else None for row in rows for name in ("instruction", "output")]
    return bool(texts) and all(isinstance(text, str) for text in texts)


def the_one(paths: list[str], name: str, what: str, args: Args) -> str:
    """The only file, or the one of this name. ValueError: there are several, and not one of that name."""
    found = [path for path in paths if os.path.basename(path) == name] or paths
    if len(found) > 1:
        raise ValueError(f"--source {args.source}: several files of {what} ({', '.join(sorted(found)[:5])}); name one")
    return found[0]


def alpaca_rows(paths: list[str], args: Args) -> Iterator[dict]:
    """AlpacaEval's instructions in order, each with a drawn persona, of those that are held out from training.

    ValueError: no such personas, or several files.
    """
    path = the_one(paths, ALPACA_BASELINE, "outputs", args)
    if args.personas is None:
        raise ValueError(
            "AlpacaEval's instructions have no personas: give --personas, a folder or data set that has some "
            "(such as PersonalAILab/PersonaFeedback)"
        )
    pool = find_personas(sort_files(list_files(args.personas)[1]))
    pool = {user_id: persona for user_id, persona in pool.items() if in_held_out_share(persona, args.eval_share)}
    if not pool:
        raise ValueError(
            f"--personas {args.personas}: no personas there that --eval-share {args.eval_share:g} holds out"
        )
    user_ids = sorted(pool)
    outputs = parse_json(read_text(path), path)
    refuse_surrogates(outputs, path)
    for i, row in enumerate(outputs):
        user_id = user_ids[derive_seed("persona", args.seed, i) % len(user_ids)]
        yield dict(
            prompt_id=f"alpaca-{i}",
            persona=pool[user_id],
            question=row["instruction"],
            reference=row["output"],
            source=os.path.basename(path),
            dataset=row.get("dataset") or "",
            user_id=user_id,
            assigned=f"at random, seed {args.seed}, of {len(pool)} held-out personas in {args.personas}",
        )


def personamem_rows(path: str, contexts: dict[str, list], dropped: Counter) -> Iterator[dict]:
    """PersonaMem v1's questions. contexts: messages by id. The persona is the system message that opens a context."""
    version = f"v1 {os.path.basename(path)[len('questions_') : -len('.csv')]}"
    for where, row in read_objects(path):
        options, correct = personamem_options(row, where)
        context_id = row.get("shared_context_id")
        end = text_field(row, "end_index_in_shared_context", where)
        messages = contexts.get(context_id)
        if messages is None or not end.isdigit() or int(end) > len(messages):
            raise ValueError(f'{where}: no context "{context_id}" with {end} messages in its shared_contexts file')
        if messages[0]["role"] != "system":
            raise ValueError(f'{where}: context "{context_id}" does not begin with a system message, the persona')
        question = text_field(row, "user_question_or_message", where)
        if not question.strip():
            dropped["blank questions"] += 1
            continue
        yield dict(
            prompt_id=text_field(row, "question_id", where),
            persona=messages[0]["content"],
            question=question,
            source="PersonaMem",
            version=version,
            user_id=str(row.get("persona_id")),
            kind=text_field(row, "question_type", where),
            question_type=row["question_type"],
            options=options,
            correct=correct,
            context_id=context_id,
            end_index=int(end),
        )


def literal(row: dict, field: str, where: str) -> Any:
    """The value that a text field holds as JSON or as a Python literal. ValueError: it holds neither."""
    text = text_field(row, field, where)
    try:
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f'{where}: field "{field}" is neither JSON nor a Python literal ({error})') from error
    refuse_surrogates({field: value}, where)
    return value


def literal_texts(row: dict, field: str, where: str) -> list[str]:
    """A `literal` that is a list of texts. ValueError: it is not."""
    texts = literal(row, field, where)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f'{where}: field "{field}" is no list of texts')
    return texts


def personamem_options(row: dict, where: str) -> tuple[list[str], str]:
    """-> texts of the options a to d, and the right letter, of a row of PersonaMem v1."""
    options = literal_texts(row, "all_options", where)
    texts = {match[1]: option[match.end() :] for option in options if (match := OPTION.match(option))}
    correct = text_field(row, "correct_answer", where).strip().strip("()")
    if sorted(texts) != list("abcd") or correct not in texts:
        raise ValueError(
            f"{where}: expected options (a) to (d) and one of them as correct_answer; got {sorted(texts)} "
            f'and "{correct}"'
        )
    return [texts[letter] for letter in "abcd"], correct


def personamem_contexts(path: str) -> dict[str, list]:
    """Messages by id of a shared_contexts file, each line of which is an object of one id and its messages."""
    contexts = {}
    for where, row in read_objects(path):
        for context_id, messages in row.items():
            check_row({"messages": messages}, "messages", where)
            if context_id in contexts:
                raise ValueError(f'{where}: context "{context_id}" occurs twice')
            contexts[context_id] = messages
    return contexts


def personamem2_rows(path: str, root: str, size: str) -> tuple[list[dict], list[dict]]:
    """Questions and chat histories of PersonaMem v2, as those of v1: prompt rows and context rows.

    The whole history comes before the question. The release draws the order of the options by a hash that differs
    between processes; here it depends on the question. The persona is the system message that opens a history.
    """
    contexts: dict[str, list[dict]] = {}
    questions = []
    for where, row in read_objects(path):
        link = text_field(row, f"chat_history_{size}_link", where)
        if link not in contexts:
            file = os.path.join(root, link)
            if not os.path.isfile(file):
                raise ValueError(f"{where}: its chat history is missing; expected {file}")
            history = parse_json(read_text(file), file)
            contexts[link] = history.get("chat_history") if isinstance(history, dict) else history
            check_row({"messages": contexts[link]}, "messages", file)
            if contexts[link][0]["role"] != "system":
                raise ValueError(f"{file}: it does not begin with a system message, the persona")
        query = literal(row, "user_query", where)
        question = query.get("content") if isinstance(query, dict) else query
        answers = [text_field(row, "correct_answer", where), *literal_texts(row, "incorrect_answers", where)]
        if not isinstance(question, str) or not question.strip() or len(set(answers)) != 4:
            raise ValueError(f"{where}: expected a question as user_query, and three incorrect_answers")
        options = answers.copy()
        prompt_id = digest(row.get("persona_id"), question, answers)
        random.Random(derive_seed("options", prompt_id)).shuffle(options)
        prompt = dict(
            prompt_id=prompt_id,
            persona=contexts[link][0]["content"],
            question=question,
            source="PersonaMem",
            version=f"v2 {size}",
            user_id=str(row.get("persona_id")),
            kind=text_field(row, "pref_type", where),
            question_type=row["pref_type"],
            options=options,
            correct="abcd"[options.index(answers[0])],
            context_id=link,
            end_index=len(contexts[link]),
        )
        questions.append(prompt)
    return questions, [dict(context_id=k, messages=v) for k, v in contexts.items()]


def rewardbench_rows(path: str, source: str, profile_entries: int | None, dropped: Counter) -> Iterator[dict]:
    """Pair rows of Personalized-RewardBench; a profile that is a list becomes an object.

    The kind is the subset: a file's name, or the folder of files that are called test. Rubric aspects and narrative are
    left out, since they tell a judge which answer was meant.
    """

    def persona_in(row: dict, where: str) -> dict | str:
        profile = row.get("profile")
        if isinstance(profile, list):
            profile = {"profile": profile[:profile_entries]}
        return checked_persona(profile, where)

    kind = os.path.splitext(os.path.basename(path))[0]
    if kind.startswith("test"):  # on the hub: SUBSET/test-00000-of-00001.parquet
        kind = os.path.basename(os.path.dirname(path))
    for _, pair in preference_pairs(path, source, "rejected", persona_in, dropped):
        yield pair | {"kind": kind}


def sort_files(paths: list[str]) -> dict[str | None, list[str]]:
    """Paths by `what_it_holds`."""
    files: dict[str | None, list[str]] = {}
    for path in paths:
        files.setdefault(what_it_holds(path), []).append(path)
    return files


def find_personas(
    files: dict[str | None, list[str]], id_column: str = "user_id", persona_columns: tuple[str, ...] = ()
) -> dict[str, dict | str]:
    """Personas by user_id, of all files of a source. ValueError: two persons have one user_id."""
    personas: dict[str, dict | str] = {}
    for path in files.get("personas", []) + files.get("persona", []):
        if path.endswith(".json"):  # one file per persona: its name is the user_id
            user_id = os.path.basename(path).removesuffix(".json")
            in_file = {user_id: checked_persona(read_text(path), path)}
        else:
            in_file = read_personas(path, id_column, persona_columns)
        for user_id, persona in in_file.items():
            if personas.setdefault(user_id, persona) != persona:
                raise ValueError(f'{path}: user_id "{user_id}" is of another person in another file')
    return personas


# -- sources: rows by name of the written file; there may be none ---------------------------------------------


def benchmark_rows(files: dict, root: str, args: Args, dropped: Counter) -> dict[str, list[dict]]:
    """Sources that are for evaluation only."""
    if files.get("alpaca"):
        return {"alpaca_eval": list(alpaca_rows(files["alpaca"], args))}
    if files.get("rewardbench"):
        rows: list[dict] = []
        for path in files["rewardbench"]:
            rows += rewardbench_rows(path, os.path.relpath(path, root), args.profile_entries, dropped)
        return {"rewardbench": rows}
    outputs: dict[str, list[dict]] = {}
    for path in files.get("personamem2", []):
        for size in ("32k", "128k"):
            _, first = next(read_objects(path), (path, {}))
            if os.path.isfile(os.path.join(root, str(first.get(f"chat_history_{size}_link")))):
                questions, histories = personamem2_rows(path, root, size)
                outputs[f"personamem2_{size}"] = distinct(questions, ("prompt_id",), dropped, "repeated questions")
                outputs[f"personamem2_{size}_contexts"] = histories
        if not outputs:
            raise ValueError(f"{path}: the chat histories that its first row links to are not in {root}")
    for path in files.get("personamem", []):
        folder, name = os.path.split(path)
        size = name[len("questions_") : -len(".csv")]
        file = os.path.join(folder, f"shared_contexts_{size}.jsonl")
        if file not in files.get("contexts", []):
            raise ValueError(f"{path}: its contexts are missing; expected {file}")
        contexts = personamem_contexts(file)
        questions = list(personamem_rows(path, contexts, dropped))
        if not questions:
            raise ValueError(f"{path}: empty, no questions")
        outputs[f"personamem_{size}"] = questions
        outputs[f"personamem_{size}_contexts"] = [dict(context_id=k, messages=v) for k, v in contexts.items()]
    return outputs


def personafeedback(files: dict, root: str, args: Args, dropped: Counter) -> dict[str, list[dict]]:
    """PersonaFeedback: prompts and pairs, split by persona. ValueError: no rows."""
    personas = find_personas(files)
    pairs: list[dict] = []
    prompts: list[dict] = []
    winrate: list[dict] = []
    for path in files.get("pairs", []):
        pairs += pair_rows(path, os.path.relpath(path, root), personas, dropped)
    for path in files.get("rl", []):
        prompts += rl_rows(path, os.path.relpath(path, root))
    if files.get("baseline"):
        path = the_one(files["baseline"], WINRATE_BASELINE, "baseline answers", args)
        winrate += winrate_rows(path, os.path.relpath(path, root), dropped)
    pairs = distinct(pairs, ("prompt_id", "chosen", "rejected"), dropped, "repeated pairs")
    prompts += [prompt_row(pair["persona"], pair["question"], pair["source"]) for pair in pairs]
    prompts = distinct(prompts, ("prompt_id",), dropped, "repeated prompts")
    if not prompts and not winrate:
        n_files = sum(map(len, files.values()))
        raise ValueError(
            f"--source {args.source}: neither pairs nor RL prompts nor another known release in {n_files} files "
            "(see the top of data/prepare.py for what is read)"
        )
    winrate_personas = {digest(row["persona"]) for row in winrate}

    def is_held_out(row: dict) -> bool:
        return digest(row["persona"]) in winrate_personas or in_held_out_share(row["persona"], args.eval_share)

    outputs = {}
    outputs["prompts_train"], outputs["prompts_eval"] = split(prompts, is_held_out)
    if winrate:
        outputs["prompts_winrate"] = winrate
    outputs["pairs"], outputs["pairs_eval"] = split(pairs, is_held_out)
    return outputs


def require_column(column: str, columns: list[str], path: str, reason: str = "") -> None:
    """ValueError naming the file and the columns it has."""
    if column not in columns:
        raise ValueError(f'{path}: no column "{column}"{reason}; it has: {", ".join(columns)}')


def persona_of(row: dict, columns: tuple[str, ...]) -> Any:
    """The value of one column, or an object of several; an empty cell is no value."""
    if len(columns) == 1:
        return row.get(columns[0])
    return {name: row[name] for name in columns if name in row}


def own_personas(args: Args, needs_ids: bool) -> dict[str, dict | str]:
    """Personas by id, of --personas: a table's rows, or those of a source."""
    if not os.path.isfile(args.personas):
        return find_personas(sort_files(list_files(args.personas)[1]), args.id_column, args.persona_column)
    if needs_ids:
        reason = f", by which the questions of {args.questions} name their persona"
        require_column(args.id_column, read_table(args.personas)[0], args.personas, reason)
    return read_personas(args.personas, args.id_column, args.persona_column)


def refuse_other_ids(args: Args, columns: list[str]) -> None:
    """ValueError: questions without --id-column share another column with the table of personas, likely their ids."""
    of_personas = read_table(args.personas)[0] if os.path.isfile(args.personas) else []
    shared = [name for name in columns if name in of_personas and name not in (args.question_column, "reference")]
    if shared:
        raise ValueError(
            f'{args.questions}: no column "{args.id_column}", but {args.personas} has {", ".join(shared)}, too; '
            f"expected --id-column {shared[0]}, if it says whose question it is, or another name for it"
        )


def own_rows(args: Args, dropped: Counter) -> dict[str, list[dict]]:
    """Your own questions, each with its persona or with drawn ones."""
    columns, rows = read_table(args.questions)
    require_column(args.question_column, columns, args.questions, " of questions")
    has_ids = args.id_column in columns
    persona_columns = args.persona_column or ("persona",)
    personas: dict[str, dict | str] = {}
    if args.personas is None:
        for column in persona_columns:
            require_column(column, columns, args.questions, " of personas, and no --personas are given")
    else:
        personas = own_personas(args, has_ids)
        if not has_ids:
            refuse_other_ids(args, columns)
            print(f'{args.questions} has no column "{args.id_column}": each question is given to drawn personas')
            if args.personas_per_question > len(personas):
                raise ValueError(
                    f"--personas-per-question {args.personas_per_question}: expected 1 to {len(personas)}, the "
                    f"personas of {args.personas}"
                )
    prompts = []
    known: dict[str, dict | str] = {}
    for number, (where, row) in enumerate(rows):
        question = row.get(args.question_column)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f'{where}: field "{args.question_column}" is missing or blank, expected a question')
        user_id = str(row[args.id_column]) if args.id_column in row else ""
        if args.personas is None:
            asked_by = {user_id: checked_persona(persona_of(row, persona_columns), where)}
        elif not has_ids:
            rng = random.Random(derive_seed("persona", args.seed, number))
            asked_by = {drawn: personas[drawn] for drawn in rng.sample(sorted(personas), args.personas_per_question)}
        elif user_id in personas:
            asked_by = {user_id: personas[user_id]}
        else:
            raise ValueError(f'{where}: no persona with {args.id_column} "{user_id}" among {len(personas)}')
        if user_id and known.setdefault(user_id, asked_by[user_id]) != asked_by[user_id]:
            raise ValueError(f'{where}: {args.id_column} "{user_id}" is of another person above')
        reference = text_field(row, "reference", where) if row.get("reference") is not None else ""
        extra = {"reference": reference} if reference.strip() else {}
        for persona_id, persona in asked_by.items():
            prompt = prompt_row(persona, question, os.path.basename(args.questions))
            prompts.append(prompt | ({"user_id": persona_id} if persona_id else {}) | extra)
    prompts = distinct(prompts, ("prompt_id",), dropped, "repeated prompts")
    train, held_out = split(prompts, lambda row: in_held_out_share(row["persona"], args.eval_share))
    # so that `write` leaves none of another source beside the new prompts
    none: dict[str, list[dict]] = {"prompts_winrate": [], "pairs": [], "pairs_eval": []}
    return {"prompts_train": train, "prompts_eval": held_out} | none


def may_stay(path: str, prompts: list[dict]) -> bool:
    """Whether data/annotate.py made all pairs of a file, of these prompts."""
    prompt_ids = {row["prompt_id"] for row in prompts}
    return all("chosen_model" in row and row["prompt_id"] in prompt_ids for _, row in json_lines(path))


def write(outputs: dict[str, list[dict]], folder: str) -> None:
    """Writes a file for each name that has rows. ValueError: one would remain that an earlier command made.

    Pairs that data/annotate.py made of prompts on the same side of the split may stay.
    """
    files = {name: os.path.join(folder, f"{name}.jsonl") for name in outputs}
    for name, rows in outputs.items():
        prompts = outputs.get("prompts_eval" if name.endswith("_eval") else "prompts_train", [])
        if not rows and os.path.exists(files[name]) and not may_stay(files[name], prompts):
            raise ValueError(
                f"{files[name]} was made by another command; this one has no such rows: remove it or choose another "
                "--out"
            )
    for name, rows in outputs.items():
        if rows:
            write_rows(files[name], rows)
        print(f"{len(rows):7d} {name}{'' if rows else ': not written'}")


def main(args: Args) -> None:
    if args.eval_share == 1:
        raise ValueError(f"--eval-share {args.eval_share}: expected a share in [0, 1)")
    if (args.source is None) == (args.questions is None):
        raise ValueError("give one of --source and --questions: a public data set, or a file of your own questions")
    dropped: Counter[str] = Counter()
    if args.questions is not None:
        outputs = own_rows(args, dropped)
    else:
        root, paths = list_files(args.source)
        files = sort_files(paths)
        ignored = [os.path.relpath(path, root) for path in files.get(None, [])]
        if ignored:
            print(f"not used, {len(ignored)} other files: {', '.join(ignored[:5])}")
        outputs = benchmark_rows(files, root, args, dropped) or personafeedback(files, root, args, dropped)
    write(outputs, args.out)
    for what, count in sorted(dropped.items()):
        print(f"{count:7d} dropped: {what}")
    if outputs.get("pairs"):
        print(f"next: python sft.py --data {args.out}/pairs.jsonl")


if __name__ == "__main__":
    flags.run(main, ARGS)
