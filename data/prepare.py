"""Public data in: PersonaFeedback's released files (arXiv 2506.12915) into rows of this project.

1. Find the files of a source by what they hold: personas, preference pairs, RL prompts (verl form).
   The authors' repository, the hub's data set and a flat folder of JSON lines differ in names only.
2. Join pairs with their personas, and take persona and question back out of the RL prompts' text.
3. Hold out a share of the personas: their questions and pairs go to the *_eval files, so that no
   evaluation question has a persona that was trained on. A persona's side depends on itself alone.
4. Write prompts_train, prompts_eval, pairs and pairs_eval (.jsonl), each only where there are rows
   for it, and print how many rows each has and what was left out.

PersonaFeedback is a benchmark: after training on its pairs, figures on it mean something for the
held-out personas only.

    python data/prepare.py --source PersonalAILab/PersonaFeedback      # a data set on the hub
    python data/prepare.py --source path/to/files --output out/data    # a folder, searched through
"""

import hashlib
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from common import user_errors, write_rows  # noqa: E402


@dataclass
class Args:
    source: str
    """A folder, a single file, or the name of a data set on the hub."""
    output: str = "out/data"
    """Folder of the written files."""
    eval_share: float = 0.1
    """Share of the personas held out for evaluation, in [0, 1)."""


# where an RL prompt holds the persona (JSON follows) and the question: the text of the release
PERSONA_MARK, QUESTION_MARK = "当前用户配置：", "以下是用户问题："
QUESTION_END = re.compile(r"\s*生成\s*1\s*个[^\n]*回答：?\s*$")
ANSWER_TAGS = re.compile(r"^\s*<?answer>\s*|\s*</answer>\s*$")
TIER = re.compile(r"(easy|mid|medium|hard)")
KIND = re.compile(r"(general|spe[cd]ific)")  # the hub spells one folder "spedific"


def list_files(source):
    """(root, sorted files) of a folder, a file or a data set on the hub. ValueError: no such."""
    if os.path.isfile(source):
        return os.path.dirname(source), [source]
    if not os.path.isdir(source):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        patterns = ["*.jsonl", "*.json", "*.parquet"]
        try:
            source = snapshot_download(source, repo_type="dataset", allow_patterns=patterns)
        except (HFValidationError, OSError) as error:
            raise ValueError(f"--source {source}: no folder or file, and not fetched from the hub "
                             f"({type(error).__name__}: {error})") from error
    found = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
    return source, sorted(f for f in found if f.endswith((".jsonl", ".json", ".parquet")))


def read_objects(path):
    """Yields (place, object) of a .jsonl or .parquet file. ValueError: file:line of broken JSON."""
    if path.endswith(".parquet"):
        from datasets import Dataset

        for number, row in enumerate(Dataset.from_parquet(path)):
            yield f"{path}, row {number}", row
        return
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}:{number}: expected a JSON object")
            yield f"{path}:{number}", row


def what_it_holds(path):
    """personas | persona (the file is one) | pairs | rl | None, by name and first row's fields."""
    folder, name = os.path.split(path)
    if path.endswith(".json"):
        return "persona" if "persona" in os.path.basename(folder) else None
    _, first = next(read_objects(path), (None, {}))
    if {"user_id", "question", "chosen"} <= set(first):
        return "pairs"
    if {"prompt", "reward_model"} <= set(first):
        return "rl"
    return "personas" if "persona" in name else None


def checked_persona(persona, place):
    """A persona that is a non-empty object or text. ValueError otherwise: never a blank instead."""
    if isinstance(persona, str) and persona.lstrip().startswith("{"):  # an object as text
        try:
            persona = json.loads(persona)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: the persona is not JSON ({error})") from error
    if not isinstance(persona, (dict, str)) or not persona or not str(persona).strip():
        raise ValueError(f'{place}: field "persona" is {json.dumps(persona)[:80]}, expected a '
                         "non-empty object or text")
    return persona


def text_field(row, field, place):
    """A field that must be text; whether it may be blank is the caller's question."""
    if not isinstance(row.get(field), str):
        raise ValueError(f'{place}: field "{field}" is missing or no text')
    return row[field]


def read_personas(path):
    """{user_id: persona}. Where the rows have no user_id it is the line's number, from 1 (hub)."""
    personas = {}
    for number, (place, row) in enumerate(read_objects(path), 1):
        user_id = str(row.get("user_id", number))
        persona = row.get("persona") if {"user_id", "persona"} & set(row) else row
        if user_id in personas:
            raise ValueError(f'{place}: user_id "{user_id}" occurs twice')
        personas[user_id] = checked_persona(persona, place)
    return personas


def digest(*parts):
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def prompt_row(persona, question, source):
    """prompt_id is a function of persona and question: the same in every layout and every run."""
    prompt_id = digest(persona, question)
    return {"prompt_id": prompt_id, "persona": persona, "question": question, "source": source}


def parse_rl_prompt(row, place):
    """(persona, question) out of a verl row's text. ValueError: place and what was not found."""
    prompt = row.get("prompt")
    if not (isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict)):
        raise ValueError(f'{place}: field "prompt" is no list of messages')
    _, mark, rest = text_field(prompt[-1], "content", place).partition(PERSONA_MARK)
    if not mark:
        raise ValueError(f'{place}: no "{PERSONA_MARK}" in the prompt, so no persona')
    try:
        persona, end = json.JSONDecoder().raw_decode(rest.lstrip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: the persona in the prompt is not JSON ({error})") from error
    _, mark, question = rest.lstrip()[end:].rpartition(QUESTION_MARK)
    question = QUESTION_END.sub("", question).strip()
    if not mark or not question:
        raise ValueError(f'{place}: no question after "{QUESTION_MARK}" in the prompt')
    return checked_persona(persona, place), question


def rl_rows(path, source):
    """Prompt rows of a verl file; its model-written answer, without stray tags, is `reference`."""
    for place, row in read_objects(path):
        prompt = prompt_row(*parse_rl_prompt(row, place), source)
        truth = (row.get("reward_model") or {}).get("ground_truth")
        reference = ANSWER_TAGS.sub("", truth) if isinstance(truth, str) else ""
        yield {**prompt, "reference": reference} if reference.strip() else prompt


def pair_rows(path, source, personas, dropped):
    """Pair rows of a benchmark file, with user_id, tier and kind; what is left out is counted."""
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
            if tier or "tier" in row:
                pair["tier"] = row.get("tier") or tier[1].replace("medium", "mid")
            if kind:
                pair["kind"] = "general" if kind[1] == "general" else "specific"
            yield pair


def distinct(rows, key, dropped, what):
    """The first row of each key, in order; the others are counted."""
    kept = {}
    for row in rows:
        if kept.setdefault(key(row), row) is not row:
            dropped[what] += 1
    return list(kept.values())


def main(args):
    if not 0 <= args.eval_share < 1:
        raise ValueError(f"--eval-share {args.eval_share}: expected a share in [0, 1)")
    root, paths = list_files(args.source)
    files = {}
    for path in paths:
        files.setdefault(what_it_holds(path), []).append(path)
    ignored = [os.path.relpath(path, root) for path in files.get(None, [])]
    if ignored:
        print(f"not used, {len(ignored)} other files: {', '.join(ignored[:5])}")

    personas = {}
    for path in files.get("personas", []):
        personas |= read_personas(path)
    for path in files.get("persona", []):  # one file a persona: its name is the user_id
        with open(path, encoding="utf-8") as f:
            personas[os.path.basename(path).removesuffix(".json")] = checked_persona(f.read(), path)

    dropped = Counter()
    pairs, prompts = [], []
    for path in files.get("pairs", []):
        pairs += pair_rows(path, os.path.relpath(path, root), personas, dropped)
    for path in files.get("rl", []):
        prompts += rl_rows(path, os.path.relpath(path, root))
    pairs = distinct(pairs, lambda row: (row["prompt_id"], row["chosen"], row["rejected"]), dropped,
                     "repeated pairs")
    fields = ("prompt_id", "persona", "question", "source")
    prompts += [{field: pair[field] for field in fields} for pair in pairs]
    prompts = distinct(prompts, lambda row: row["prompt_id"], dropped, "repeated prompts")
    if not prompts:
        raise ValueError(f"--source {args.source}: neither pairs nor RL prompts in {len(paths)} "
                         "files; expected PersonaFeedback's (see the top of data/prepare.py)")

    def held_out(row):
        return int(digest(row["persona"]), 16) < args.eval_share * 2**64

    def path_of(name):
        return os.path.join(args.output, f"{name}.jsonl")

    outputs = {"prompts_train": [row for row in prompts if not held_out(row)],
               "prompts_eval": [row for row in prompts if held_out(row)],
               "pairs": [row for row in pairs if not held_out(row)],
               "pairs_eval": [row for row in pairs if held_out(row)]}
    for name, rows in outputs.items():
        if not rows and os.path.exists(path_of(name)):
            raise ValueError(f"{path_of(name)} is of another source; this one has no such rows: "
                             "remove it or choose another --output")
    for name, rows in outputs.items():
        if rows:
            write_rows(path_of(name), rows)
        print(f"{len(rows):7d} {name}{'' if rows else ': not written'}")
    for what, count in sorted(dropped.items()):
        print(f"{count:7d} left out: {what}")


if __name__ == "__main__":
    with user_errors():
        main(tyro.cli(Args))
