"""Public data sets, or your own personas and questions, into the rows that the stages read.

**PersonaFeedback** (arXiv 2506.12915; docs/evaluation.md 7), for training and evaluation:
1. Recognise the files of a source by their contents: personas, preference pairs, RL prompts (verl's form). The authors'
   repository, the data set on the hub and a flat folder of JSON lines differ in names only.
2. Join pairs with their personas, and take persona and question back out of the RL prompts' text.
3. Hold out a share of the personas: their questions and pairs go to the *_eval files, so that no evaluation question
   has a persona that was trained on. Which side a persona is on depends on the persona alone. If the release's file of
   baseline answers is present (question, persona, response), its questions become prompts_winrate with the answer as
   `reference`, and their personas are held out too.
4. Write prompts_train, prompts_eval, prompts_winrate, pairs and pairs_eval (.jsonl), each only if it has rows, and
   print how many rows each has and what was dropped.

After training on PersonaFeedback's pairs, figures on it are meaningful for the held-out personas only.

**Your own** personas and questions, as .csv, .jsonl or .parquet files (--questions, --personas): prompts_train and
prompts_eval, split by persona in the same way.
- A persona is the value of --persona-column: text, or a JSON object (as text, too); several columns are an object of
  them. Without such a column it is the
  whole row.
- A question belongs to the persona with the same --id-column. If the questions have no such column, each is given to
  --personas-per-question personas, drawn by --seed; if they have a persona column, --personas is not needed.
- A column `reference` of the questions (an answer to compare with) is kept. An empty cell is no value.

**For evaluation only**, written whole, no persona held out:
- AlpacaEval's outputs (a .json of instruction and output; docs/evaluation.md 8): alpaca_eval.jsonl, the output as
  `reference`, in the file's order. Each instruction gets a persona of --personas, drawn by --seed and kept in the row
  (`user_id`, `assigned`), since the paper's own assignment is not released.
- PersonaMem v1 (arXiv 2504.14225: questions_SIZE.csv, shared_contexts_SIZE.jsonl; docs/evaluation.md 9):
  personamem_SIZE.jsonl, both multiple choice and plain prompts, and personamem_SIZE_contexts.jsonl.
- Personalized-RewardBench (arXiv 2604.07343: question, profile, chosen, rejected): rewardbench.jsonl.

Files are UTF-8, with or without a byte order mark; compressed ones are not read. Keys without a value (null) are
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
    """Share of the personas held out for evaluation, in [0, 1)."""
    personas: str | None = None
    """For AlpacaEval and --questions: whose personas are used; a source as above, or a table."""
    seed: int = 0
    """Which persona a question gets that names none (AlpacaEval's instructions, --questions)."""

    # -- your own tables instead of --source
    questions: str | None = None
    """A .csv, .jsonl or .parquet file of questions."""
    question_column: str = "question"
    """Column of the questions."""
    persona_column: tuple[str, ...] = ()
    """Column of the personas, or several; none: "persona" if there is one, else the whole row of --personas."""
    id_column: str = "user_id"
    """Column of both files by which a question names its persona."""
    personas_per_question: flags.Count = 1
    """Personas that are drawn for each question, if questions have no --id-column."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import ast
import hashlib
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from data.readers import (
    DECODER,
    ENDINGS,
    check_compression,
    check_text,
    normalized,
    parse_json,
    read_objects,
    read_raw,
    read_table,
    read_text,
)
from runtime import flags
from runtime.distributed import derive_seed
from runtime.rows import check_row, write_rows

# where an RL prompt holds the persona (JSON follows) and the question: the text of the release
PERSONA_MARK, QUESTION_MARK = "当前用户配置：", "以下是用户问题："
QUESTION_END = re.compile(r"\s*生成\s*1\s*个[^\n]*回答：?\s*$")
ANSWER_TAGS = re.compile(r"^\s*<?answer>\s*|\s*</answer>\s*$")
TIER = re.compile(r"(easy|mid|medium|hard)")
KIND = re.compile(r"(general|spe[cd]ific)")  # the hub spells one folder "spedific"
# the baseline's file has no tiers: 50 questions of each, in this order
WINRATE_TIERS = [(kind, tier) for kind in ("specific", "general") for tier in ("easy", "mid", "hard")]
ALPACA_BASELINE = "alpaca_eval_gpt4_baseline.json"  # of AlpacaEval 2, which its difficulties belong to
OPTION = re.compile(r"\s*\(([a-d])\)\s*")


def list_files(source: str) -> tuple[str, list[str]]:
    """(root, sorted files) of a folder, a file or a data set on the hub. ValueError: no such."""
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
    found = sorted(os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names)
    compressed = [os.path.relpath(f, source) for f in found if f.endswith(tuple(f"{e}.gz" for e in ENDINGS))]
    if compressed:
        print(f"compressed, not read: {', '.join(compressed[:5])}")
    return source, [f for f in found if f.endswith(ENDINGS)]


def what_it_holds(path: str) -> str | None:
    """personas | persona (the file is one) | pairs | rl | baseline | rewardbench | alpaca | personamem |
    contexts | None, by name and first row's fields."""
    folder, name = os.path.split(path)
    if path.endswith(".json"):
        if "persona" in os.path.basename(folder):
            return "persona"
        return "alpaca" if is_outputs(parse_json(read_text(path), path)) else None
    if path.endswith(".csv"):
        return "personamem" if name.startswith("questions_") else None
    if name.startswith("shared_contexts_"):
        return "contexts"
    _, first = next(read_raw(path), (None, {}))
    if {"question", "persona", "response"} <= set(first):
        return "baseline"
    if {"question", "profile", "chosen", "rejected"} <= set(first):
        return "rewardbench"
    if {"user_id", "question", "chosen"} <= set(first):
        return "pairs"
    if {"prompt", "reward_model"} <= set(first):
        return "rl"
    return "personas" if "persona" in name else None


def checked_persona(persona: Any, place: str) -> dict | str:
    """A persona that is a non-empty object or text. ValueError otherwise: never an empty one in its place."""
    if isinstance(persona, str) and persona.lstrip().startswith("{"):  # an object as text
        persona = parse_json(persona, place, "persona")
    persona = normalized(persona)
    check_text({"persona": persona}, place)
    if not isinstance(persona, (dict, str)) or not persona or not str(persona).strip():
        raise ValueError(f'{place}: field "persona" is {json.dumps(persona)[:80]}, expected a non-empty object or text')
    return persona


def text_field(row: dict, field: str, place: str) -> str:
    """A field that must be text; whether it may be blank is for the caller to say."""
    if not isinstance(row.get(field), str):
        raise ValueError(f'{place}: field "{field}" is missing or no text')
    return row[field]


def read_personas(path: str) -> dict[str, dict | str]:
    """{user_id: persona}. If the rows have no user_id it is the line's number, from 1 (as on the hub)."""
    personas = {}
    for number, (place, row) in enumerate(read_objects(path), 1):
        user_id = str(row.get("user_id", number))
        persona = row.get("persona") if {"user_id", "persona"} & set(row) else row
        if user_id in personas:
            raise ValueError(f'{place}: user_id "{user_id}" occurs twice')
        personas[user_id] = checked_persona(persona, place)
    if not personas:
        raise ValueError(f"{path}: empty, no personas")
    return personas


def digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def in_held_out_share(persona: dict | str, share: float) -> bool:
    """Whether a persona is held out for evaluation: by its digest, so the same in every layout and every run."""
    return int(digest(persona), 16) < share * 2**64


def prompt_row(persona: dict | str, question: str, source: str) -> dict:
    """prompt_id is a function of persona and question: the same in every layout and every run."""
    prompt_id = digest(persona, question)
    return {"prompt_id": prompt_id, "persona": persona, "question": question, "source": source}


def parse_rl_prompt(row: dict, place: str) -> tuple[dict | str, str]:
    """(persona, question) out of a verl row's text. ValueError: place and what was not found."""
    prompt = row.get("prompt")
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)):
        raise ValueError(f'{place}: field "prompt" is no list of messages')
    _, mark, rest = text_field(prompt[-1], "content", place).partition(PERSONA_MARK)
    if not mark:
        raise ValueError(f'{place}: no "{PERSONA_MARK}" in the prompt, so no persona')
    try:
        persona, end = DECODER.raw_decode(rest.lstrip())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the persona in the prompt is not JSON ({error})") from error
    _, mark, question = rest.lstrip()[end:].rpartition(QUESTION_MARK)
    question = QUESTION_END.sub("", question).strip()
    if not mark or not question:
        raise ValueError(f'{place}: no question after "{QUESTION_MARK}" in the prompt')
    return checked_persona(persona, place), question


def rl_rows(path: str, source: str) -> Iterator[dict]:
    """Prompt rows of a verl file; its model-written answer, without stray tags, is `reference`."""
    for place, row in read_objects(path):
        prompt = prompt_row(*parse_rl_prompt(row, place), source)
        truth = (row.get("reward_model") or {}).get("ground_truth")
        reference = ANSWER_TAGS.sub("", truth) if isinstance(truth, str) else ""
        yield {**prompt, "reference": reference} if reference.strip() else prompt


def pair_rows(path: str, source: str, personas: dict, dropped: Counter) -> Iterator[dict]:
    """Pair rows of a benchmark file, with user_id, tier and kind; what is dropped is counted."""
    tier, kind = TIER.search(source), KIND.search(source)
    for place, row in read_objects(path):
        user_id = str(row.get("user_id"))
        if user_id not in personas:
            raise ValueError(f'{place}: no persona with user_id "{user_id}" among {len(personas)}')
        texts = [text_field(row, field, place) for field in ("question", "chosen", "reject")]
        if not all(text.strip() for text in texts):
            dropped["pairs with a blank question or answer"] += 1
        elif texts[1] == texts[2]:
            dropped["pairs of two equal answers"] += 1
        else:
            pair = prompt_row(personas[user_id], texts[0], source)
            pair |= {"chosen": texts[1], "rejected": texts[2], "user_id": user_id}
            if row.get("tier") or tier:
                pair["tier"] = row.get("tier") or tier[1].replace("medium", "mid")
            if kind:
                pair["kind"] = "general" if kind[1] == "general" else "specific"
            yield pair


def distinct(rows: Iterable[dict], key: Any, dropped: Counter, what: str) -> list[dict]:
    """The first row of each key, in order; the others are counted."""
    kept = {}
    for row in rows:
        if kept.setdefault(key(row), row) is not row:
            dropped[what] += 1
    return list(kept.values())


def winrate_rows(path: str, source: str, dropped: Counter) -> list[dict]:
    """Prompt rows of the baseline's file, its answer as `reference`; tiers by position if all 300 are present."""
    rows = []
    for place, row in read_objects(path):
        persona = checked_persona(row.get("persona"), place)
        question, answer = text_field(row, "question", place), text_field(row, "response", place)
        rows.append(prompt_row(persona, question, source) | {"reference": answer})
    if len(rows) == 50 * len(WINRATE_TIERS):
        for i, row in enumerate(rows):
            row["kind"], row["tier"] = WINRATE_TIERS[i // 50]
    return distinct(rows, lambda row: row["prompt_id"], dropped, "repeated questions of the baseline")


def is_outputs(value: Any) -> bool:
    """AlpacaEval's form: a list of instruction and output."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(row, dict) and isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str)
            for row in value
        )
    )


def alpaca_rows(paths: list[str], args: Args) -> Iterator[dict]:
    """AlpacaEval's instructions in order, each with a persona of the pool. ValueError: no pool, several files."""
    named = [path for path in paths if os.path.basename(path) == ALPACA_BASELINE] or paths
    if len(named) > 1:
        raise ValueError(f"--source {args.source}: several files of outputs ({', '.join(sorted(named)[:5])}); name one")
    if args.personas is None:
        raise ValueError(
            "AlpacaEval's instructions have no personas: give --personas, a folder or data set that has some "
            "(such as PersonalAILab/PersonaFeedback)"
        )
    pool = find_personas(sort_files(list_files(args.personas)[1]))
    if not pool:
        raise ValueError(f"--personas {args.personas}: no personas there")
    names = sorted(pool)
    for i, row in enumerate(parse_json(read_text(named[0]), named[0])):
        user_id = names[derive_seed("persona", args.seed, i) % len(names)]
        yield dict(
            prompt_id=f"alpaca-{i}",
            persona=pool[user_id],
            question=row["instruction"],
            reference=row["output"],
            source=os.path.basename(named[0]),
            dataset=row.get("dataset") or "",
            user_id=user_id,
            assigned=f"at random, seed {args.seed}, of {len(pool)} personas in {args.personas}",
        )


def personamem_rows(path: str, contexts: dict[str, list], dropped: Counter) -> Iterator[dict]:
    """PersonaMem v1's questions. contexts: {id: messages}. The persona is the system message that opens a context."""
    version = f"v1 {os.path.basename(path)[len('questions_') : -len('.csv')]}"
    for place, row in read_objects(path):
        options, correct = personamem_options(row, place)
        context_id, end = row.get("shared_context_id"), text_field(row, "end_index_in_shared_context", place)
        messages = contexts.get(context_id)
        if messages is None or not end.isdigit() or int(end) > len(messages):
            raise ValueError(f'{place}: no context "{context_id}" with {end} messages in its shared_contexts file')
        if messages[0]["role"] != "system":
            raise ValueError(f'{place}: context "{context_id}" does not begin with a system message, the persona')
        question = text_field(row, "user_question_or_message", place)
        if not question.strip():
            dropped["blank questions"] += 1
            continue
        yield dict(
            prompt_id=text_field(row, "question_id", place),
            persona=messages[0]["content"],
            question=question,
            source="PersonaMem",
            version=version,
            user_id=str(row.get("persona_id")),
            kind=text_field(row, "question_type", place),
            question_type=row["question_type"],
            options=options,
            correct=correct,
            context_id=context_id,
            end_index=int(end),
        )


def personamem_options(row: dict, place: str) -> tuple[list[str], str]:
    """([text of a, b, c, d], right letter); the list is JSON or a Python literal. ValueError: it is neither."""
    text = text_field(row, "all_options", place)
    try:
        try:
            options = json.loads(text)
        except json.JSONDecodeError:
            options = ast.literal_eval(text)
        texts = {match[1]: option[match.end() :] for option in options if (match := OPTION.match(option))}
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f'{place}: field "all_options" is no list of texts ({error})') from error
    check_text({"all_options": options}, place)
    correct = text_field(row, "correct_answer", place).strip().strip("()")
    if sorted(texts) != list("abcd") or correct not in texts:
        raise ValueError(
            f"{place}: expected options (a) to (d) and one of them as correct_answer; got {sorted(texts)} "
            f'and "{correct}"'
        )
    return [texts[letter] for letter in "abcd"], correct


def personamem_contexts(path: str) -> dict[str, list]:
    """{id: messages} of a shared_contexts file: a line is an object of one id and its messages."""
    found = {}
    for place, row in read_objects(path):
        for context_id, messages in row.items():
            check_row({"messages": messages}, "messages", place)
            found[context_id] = messages
    return found


def rewardbench_rows(path: str, source: str, dropped: Counter) -> Iterator[dict]:
    """Pair rows of Personalized-RewardBench; a profile that is a list becomes an object."""
    for place, row in read_objects(path):
        profile = row.get("profile")
        profile = {"profile": profile} if isinstance(profile, list) else profile
        texts = [text_field(row, field, place) for field in ("question", "chosen", "rejected")]
        if not all(text.strip() for text in texts) or texts[1] == texts[2]:
            dropped["pairs with a blank text, or of two equal answers"] += 1
            continue
        pair = prompt_row(checked_persona(profile, place), texts[0], source)
        yield pair | {"chosen": texts[1], "rejected": texts[2], "kind": os.path.splitext(os.path.basename(path))[0]}


def sort_files(paths: list[str]) -> dict[str | None, list[str]]:
    """{what it holds: [path]}."""
    files = {}
    for path in paths:
        files.setdefault(what_it_holds(path), []).append(path)
    return files


def find_personas(files: dict[str | None, list[str]]) -> dict[str, dict | str]:
    """{user_id: persona} of all files of a source."""
    personas = {}
    for path in files.get("personas", []):
        personas |= read_personas(path)
    for path in files.get("persona", []):  # one file per persona: its name is the user_id
        personas[os.path.basename(path).removesuffix(".json")] = checked_persona(read_text(path), path)
    return personas


# -- sources: {name of the written file: rows}, of which there may be none ---------------------------------------------


def benchmark_rows(files: dict, root: str, args: Args, dropped: Counter) -> dict[str, list[dict]]:
    """Sources that are for evaluation only."""
    if files.get("alpaca"):
        return {"alpaca_eval": list(alpaca_rows(files["alpaca"], args))}
    if files.get("rewardbench"):
        return {
            "rewardbench": [
                row
                for path in files["rewardbench"]
                for row in rewardbench_rows(path, os.path.relpath(path, root), dropped)
            ]
        }
    outputs = {}
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
    personas = find_personas(files)
    pairs, prompts, winrate = [], [], []
    for path in files.get("pairs", []):
        pairs += pair_rows(path, os.path.relpath(path, root), personas, dropped)
    for path in files.get("rl", []):
        prompts += rl_rows(path, os.path.relpath(path, root))
    for path in files.get("baseline", []):
        winrate += winrate_rows(path, os.path.relpath(path, root), dropped)
    pairs = distinct(pairs, lambda row: (row["prompt_id"], row["chosen"], row["rejected"]), dropped, "repeated pairs")
    fields = ("prompt_id", "persona", "question", "source")
    prompts += [{field: pair[field] for field in fields} for pair in pairs]
    prompts = distinct(prompts, lambda row: row["prompt_id"], dropped, "repeated prompts")
    if not prompts and not winrate:
        raise ValueError(
            f"--source {args.source}: neither pairs nor RL prompts nor another known release in "
            f"{sum(map(len, files.values()))} files (see the top of data/prepare.py for what is read)"
        )
    asked = {digest(row["persona"]) for row in winrate}

    def held_out(row):
        return digest(row["persona"]) in asked or in_held_out_share(row["persona"], args.eval_share)

    return {
        "prompts_train": [row for row in prompts if not held_out(row)],
        "prompts_eval": [row for row in prompts if held_out(row)],
        **({"prompts_winrate": winrate} if winrate else {}),
        "pairs": [row for row in pairs if not held_out(row)],
        "pairs_eval": [row for row in pairs if held_out(row)],
    }


def require_column(column: str, columns: list[str], path: str, reason: str = "") -> None:
    """ValueError naming the file and the columns it has."""
    if column not in columns:
        raise ValueError(f'{path}: no column "{column}"{reason}; it has: {", ".join(columns)}')


def persona_of(row: dict, columns: tuple[str, ...]) -> Any:
    """The value of one column, or an object of several; an empty cell is no value."""
    return row.get(columns[0]) if len(columns) == 1 else {name: row[name] for name in columns if name in row}


def own_personas(args: Args, needs_ids: bool) -> dict[str, dict | str]:
    """{id: persona} of --personas: a table's rows, or those of a source. ids by row, from 1, if there are none."""
    if not os.path.isfile(args.personas):
        return find_personas(sort_files(list_files(args.personas)[1]))
    columns, rows = read_table(args.personas)
    named = args.persona_column or ("persona",) * ("persona" in columns)
    for column in named:
        require_column(column, columns, args.personas)
    if needs_ids:
        require_column(
            args.id_column, columns, args.personas, f", by which the questions of {args.questions} name their persona"
        )
    personas = {}
    for number, (place, row) in enumerate(rows, 1):
        name = str(row.get(args.id_column, number))
        if name in personas:
            raise ValueError(f'{place}: {args.id_column} "{name}" occurs twice')
        whole = {k: v for k, v in row.items() if k != args.id_column}
        personas[name] = checked_persona(persona_of(row, named) if named else whole, place)
    return personas


def own_rows(args: Args, dropped: Counter) -> dict[str, list[dict]]:
    """Your own questions, each with its persona or with drawn ones."""
    columns, rows = read_table(args.questions)
    require_column(args.question_column, columns, args.questions, " of questions")
    has_ids, pool, named = args.id_column in columns, {}, args.persona_column or ("persona",)
    if args.personas is None:
        for column in named:
            require_column(column, columns, args.questions, " of personas, and no --personas are given")
    else:
        pool = own_personas(args, has_ids)
        if not has_ids and not 1 <= args.personas_per_question <= len(pool):
            raise ValueError(
                f"--personas-per-question {args.personas_per_question}: expected 1 to {len(pool)}, the personas of "
                f"{args.personas}"
            )
    prompts, source = [], os.path.basename(args.questions)
    for number, (place, row) in enumerate(rows):
        question = row.get(args.question_column)
        if not isinstance(question, str) or not question.strip():
            raise ValueError(f'{place}: field "{args.question_column}" is missing or blank, expected a question')
        more = {"user_id": str(row[args.id_column])} if args.id_column in row else {}
        if "reference" in row:
            more["reference"] = text_field(row, "reference", place)
        if args.personas is None:
            prompts.append(prompt_row(checked_persona(persona_of(row, named), place), question, source) | more)
        elif has_ids:
            if more.get("user_id") not in pool:
                name = more.get("user_id", "")
                raise ValueError(f'{place}: no persona with {args.id_column} "{name}" among {len(pool)}')
            prompts.append(prompt_row(pool[more["user_id"]], question, source) | more)
        else:
            drawn = random.Random(derive_seed("persona", args.seed, number))
            for name in drawn.sample(sorted(pool), args.personas_per_question):
                prompts.append(prompt_row(pool[name], question, source) | more | {"user_id": name})
    prompts = distinct(prompts, lambda row: row["prompt_id"], dropped, "repeated prompts")
    held_out = [in_held_out_share(row["persona"], args.eval_share) for row in prompts]
    return {
        "prompts_train": [row for row, out in zip(prompts, held_out) if not out],
        "prompts_eval": [row for row, out in zip(prompts, held_out) if out],
    }


def write(outputs: dict[str, list[dict]], args: Args) -> None:
    """One file for each name that has rows, and a line on each. ValueError: a file of another source would remain."""

    def path_of(name):
        return os.path.join(args.out, f"{name}.jsonl")

    for name, rows in outputs.items():
        if not rows and os.path.exists(path_of(name)):
            raise ValueError(
                f"{path_of(name)} is of another source; this one has no such rows: remove it or choose another --out"
            )
    for name, rows in outputs.items():
        if rows:
            write_rows(path_of(name), rows)
        print(f"{len(rows):7d} {name}{'' if rows else ': not written'}")


def main(args: Args) -> None:
    if not 0 <= args.eval_share < 1:
        raise ValueError(f"--eval-share {args.eval_share}: expected a share in [0, 1)")
    if (args.source is None) == (args.questions is None):
        raise ValueError("give one of --source and --questions: a public data set, or a file of your own questions")
    dropped = Counter()
    if args.questions is not None:
        outputs = own_rows(args, dropped)
    else:
        root, paths = list_files(args.source)
        files = sort_files(paths)
        ignored = [os.path.relpath(path, root) for path in files.get(None, [])]
        if ignored:
            print(f"not used, {len(ignored)} other files: {', '.join(ignored[:5])}")
        outputs = benchmark_rows(files, root, args, dropped) or personafeedback(files, root, args, dropped)
    write(outputs, args)
    for what, count in sorted(dropped.items()):
        print(f"{count:7d} dropped: {what}")
    if outputs.get("pairs"):
        print(f"next: python sft.py --data {args.out}/pairs.jsonl")


if __name__ == "__main__":
    flags.run(main, ARGS)
