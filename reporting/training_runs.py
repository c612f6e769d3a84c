"""Entry of a page for a training run: settings, metrics, warnings, a sample of rollouts, held-out judgements."""

import itertools
import json
import math
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from json_files import read_json
from reporting.evaluations import judgement_pair
from reporting.panels import panels_of
from reporting.warnings import rl_warnings, supervised_warnings
from runtime.rows import DIMENSIONS, logged_rows, step_files

SAMPLE = ("prompt_id", "sample_id")  # identifies an original
LABELS = {"grm": "Generative reward model", "bt": "Bradley-Terry reward model", "dpo": "DPO", "sft": "SFT"}
EXACT_ANSWERS = 64  # answers of a step that --exact-judge scores, at most
Scorer = Callable[[dict, str], float | None]  # (prompt row, answer) -> score; None: no score


def label_of(kind: str, args: dict) -> str:
    if kind != "rl":
        return "Pretraining from scratch" if args.get("from_scratch") else LABELS.get(kind, kind)
    return "PPO with critique-post-edit" if args.get("edit_rate") else "PPO"


# -- a sample of the rollouts ------------------------------------------------------------------------------------------


class Budget:
    """Picks a fraction of all rows by size, spread evenly over the run: each step earns what it may spend."""

    def __init__(self, max_bytes: float, total_bytes: int):
        self.fraction = max_bytes / max(1, total_bytes)
        self.credit = 0.0

    def earn(self, size: int) -> None:
        self.credit += self.fraction * size

    def spend(self, size: int) -> bool:
        affordable = self.fraction >= 1 or self.credit >= size
        if affordable:
            self.credit -= size
        return affordable


def size_of(row: dict) -> int:
    """Characters of a row's line."""
    return len(json.dumps(row, ensure_ascii=False)) + 1


def sample_of(row: dict) -> tuple:
    return tuple(row[name] for name in SAMPLE)


def by_interest(rows: list[dict]) -> list[int]:
    """Indices of a step's rows, the ones that a sample should hold first.

    First come the most improved, most worsened and longest rows, all with tokens, and one each that left the batch or
    was cut off. The others are ordered by prompt, in the same order in every step, so that the same prompts are kept.
    """
    gains = {}
    for i, row in enumerate(rows):
        edit = row.get("edit")
        if edit and edit.get("reward") is not None and row.get("reward") is not None:
            gains[i] = edit["reward"] - row["reward"]
    by_gain = sorted(gains, key=gains.__getitem__)
    first = [*by_gain[-1:], *by_gain[:1]]
    if rows:
        first.append(max(range(len(rows)), key=lambda i: rows[i].get("n_tokens") or 0))
    for name, at_most in (("tokens", None), ("drop_reason", 1), ("truncated", 1)):
        having = [i for i, row in enumerate(rows) if row.get(name) or (row.get("edit") or {}).get(name)]
        first += having[:at_most]
    rest = sorted(range(len(rows)), key=lambda i: (zlib.crc32(str(rows[i].get("prompt_id")).encode()), i))
    return list(dict.fromkeys(first + rest))


def add_lost(lost_rows: list[dict], rows: list[dict], index_of: dict[tuple, int]) -> None:
    """Adds lost responses of a step to its rows: a lost original as a row, a lost edit to the row of its original."""
    for lost in lost_rows:
        i = index_of.get(sample_of(lost))
        if i is None:
            rows.append(lost)
        else:
            rows[i] = rows[i] | {"edit": lost["edit"]}


def add_tokens(file: str, rows: list[dict], index_of: dict[tuple, int], budget: Budget) -> None:
    """Adds OUT/tokens of a step to its rows, as far as the budget goes: row["tokens"], row["edit"]["tokens"]."""
    by_sample: dict[tuple, list[dict]] = {}
    for tokens in logged_rows(file, (*SAMPLE, "edit")):
        by_sample.setdefault(sample_of(tokens), []).append(tokens)
    for parts in by_sample.values():
        budget.earn(sum(map(size_of, parts)))
    for sample, parts in by_sample.items():
        if sample not in index_of or not budget.spend(sum(map(size_of, parts))):
            continue
        row = rows[index_of[sample]]
        for part in parts:
            figures = {name: value for name, value in part.items() if name not in (*SAMPLE, "edit")}
            if not part["edit"]:
                row["tokens"] = figures
            elif row.get("edit"):
                row["edit"]["tokens"] = figures


def read_rollouts(
    folder: str, last_step: int, max_bytes: float, n_first: int
) -> tuple[list[dict], int, dict[int, list[dict]]]:
    """Reads a sample of a run's rollouts; a quarter of max_bytes is for tokens.

    Steps after last_step are left out: the run was killed in them and will repeat them.

    Returns:
        rows, with `step` and `held_out`; the number of rollouts that were logged; {step: its n_first first rows}
    """
    files = {
        kind: {step: file for step, file in step_files(folder, kind) if step <= last_step}
        for kind in ("rollouts", "held_out", "lost", "tokens")
    }
    size = {kind: sum(map(os.path.getsize, files[kind].values())) for kind in files}
    budget = Budget(0.75 * max_bytes, size["rollouts"] + size["held_out"] + size["lost"])
    tokens_budget = Budget(0.25 * max_bytes, size["tokens"])
    sampled = []
    n_logged = 0
    first_rows = {}
    for kind in ("rollouts", "held_out"):
        for step, file in files[kind].items():
            rows = logged_rows(file, (*SAMPLE, "answer") if kind == "rollouts" else SAMPLE)
            if kind == "held_out":  # its lost responses are among the rows; those of edits have no answer
                lost_edits = [row for row in rows if "answer" not in row]
                rows = [row for row in rows if "answer" in row]
                add_lost(lost_edits, rows, {sample_of(row): i for i, row in enumerate(rows)})
            sizes = [size_of(row) for row in rows]
            if kind == "rollouts":
                first_rows[step] = rows[:n_first]
                index_of = {sample_of(row): i for i, row in enumerate(rows)}
                if step in files["tokens"]:
                    add_tokens(files["tokens"][step], rows, index_of, tokens_budget)
                if step in files["lost"]:
                    add_lost(logged_rows(files["lost"][step], SAMPLE), rows, index_of)
                    sizes += [size_of(row) for row in rows[len(sizes) :]]
            budget.earn(sum(sizes))
            in_sample = sorted(itertools.takewhile(lambda i: budget.spend(sizes[i]), by_interest(rows)))
            sampled += [rows[i] | {"step": step, "held_out": kind == "held_out"} for i in in_sample]
            n_logged += len(rows)
    return sampled, n_logged, first_rows


# -- scores ------------------------------------------------------------------------------------------------------------


def load_scorer(spec: str, weights: Sequence[float] | None) -> Scorer:
    """--exact-judge FILE.py:FUNCTION -> its score of an answer; each answer is judged once.

    weights: the run's --score-weights. None: the default ones.
    """
    from judges import load_function  # these bring torch along
    from prompts import SCORE_WEIGHTS, Judgement

    function = load_function(spec)
    scores: dict[tuple, float | None] = {}

    def score(row: dict, answer: str) -> float | None:
        key = (row["prompt_id"], answer)
        if key not in scores:
            value = function(row, answer)
            if isinstance(value, Judgement):
                value = value.score(weights or SCORE_WEIGHTS)
            scores[key] = None if value is None or not math.isfinite(value) else float(value)
        return scores[key]

    return score


def add_exact(metrics: list[dict], rows_by_step: dict[int, list[dict]], score: Scorer) -> None:
    """Adds exact/original, exact/edit and exact/gain to the metrics of each step: means over its first rows."""
    per_step = max(4, min(EXACT_ANSWERS, 4000 // max(1, len(rows_by_step))))  # a few seconds for a whole run
    for line in metrics:
        rows = rows_by_step.get(line["step"], [])[:per_step]
        originals = []
        edits = []
        gains = []
        for row in rows:
            before = score(row, row["answer"])
            after = score(row, row["edit"]["answer"]) if row.get("edit") else None
            if before is not None:
                originals.append(before)
            if after is not None:
                edits.append(after)
            if before is not None and after is not None:
                gains.append(after - before)
        for name, values in (("original", originals), ("edit", edits), ("gain", gains)):
            if values:
                line[f"exact/{name}"] = sum(values) / len(values)


RESPONSE_FIELDS = (
    "answer",
    "checks",
    "critique",
    "reward",
    *DIMENSIONS,
    "n_tokens",
    "truncated",
    "drop_reason",
    "selected",
    "tokens",
    "audit",
)


def rollouts_for_page(rows: list[dict], score: Scorer | None) -> tuple[list[dict], dict[str, dict]]:
    """Splits rows into what differs and what all rows of a prompt share.

    Returns:
        rows; {prompt_id: persona, question, topic, and persona_text, an object as prompts have it}
    """
    from diagnostics import recited  # these bring torch along
    from prompts import has_control_text, persona_text

    def response(row: dict, part: dict) -> dict:
        answer = part.get("answer") or ""
        values = {name: part.get(name) for name in RESPONSE_FIELDS}
        figures = {name: value for name, value in values.items() if value is not None and value is not False}
        repeated = recited(row.get("persona"), answer)
        if repeated is not None:
            figures["recited"] = round(repeated, 3)
        if has_control_text(answer):
            figures["control_text"] = True
        exact = score(row, answer) if score else None
        if exact is not None:
            figures["exact"] = round(exact, 2)
        return figures

    prompts: dict[str, dict] = {}
    rollouts = []
    for row in rows:
        topic = row.get("topic") or row.get("source")
        prompt = dict(persona=row.get("persona"), question=row.get("question"), topic=topic)
        if isinstance(row.get("persona"), dict):
            prompt["persona_text"] = persona_text(row["persona"])
        prompts.setdefault(row["prompt_id"], prompt)
        rollout = {
            "step": row["step"],
            "prompt": row["prompt_id"],
            "sample": row.get("sample_id", 0),
            **response(row, row),
        }
        if row["held_out"]:
            rollout["held_out"] = True
        if row.get("edit"):
            rollout["edit"] = response(row, row["edit"])
        rollouts.append(rollout)
    return rollouts, prompts


# -- the run -----------------------------------------------------------------------------------------------------------


def prompt_templates(folder: str) -> dict[str, str] | None:
    """Text that the policy of a run reads, control tokens included: {"prompt": ..., "edit": what follows the prompt}.

    {persona}, {question}, {answer} and {critique} stand for what differs. None before the first checkpoint, whose
    policy has the tokenizer and the templates.
    """
    policy = os.path.join(folder, "policy")
    if not os.path.isdir(policy):
        return None
    from chat import Chat  # these bring transformers along
    from prompts import answer_prompt, edit_prompt, load_templates

    chat = Chat(policy)
    templates = load_templates(policy, quiet=True)
    prompt = answer_prompt(chat, templates, {"persona": "{persona}", "question": "{question}"})
    edit = edit_prompt(chat, templates, [], chat.encode("{answer}"), "{critique}")
    return {"prompt": chat.decode(prompt), "edit": chat.decode(edit)}


def columns(metrics: list[dict]) -> dict[str, list]:
    """{metric: values by step}, rounded to six digits."""

    def short(value):
        return float(f"{value:.6g}") if isinstance(value, float) and math.isfinite(value) else value

    names = dict.fromkeys(name for row in metrics for name in row)
    return {name: [short(row.get(name)) for row in metrics] for name in names}


def training_run(folder: str, kind: str, max_bytes: float, exact_judge: str | None = None) -> dict[str, Any]:
    """The entry of a training run. kind: rl | grm | bt | dpo | sft; max_bytes: of rollouts."""
    args = read_json(os.path.join(folder, "args.json"))
    metrics_file = os.path.join(folder, "metrics.jsonl")
    metrics = logged_rows(metrics_file)
    for number, line in enumerate(metrics, 1):
        if type(line.get("step")) is not int:
            raise ValueError(f'{metrics_file}:{number}: expected a number as "step"')
    run: dict[str, Any] = dict(kind=kind, label=label_of(kind, args), args=args, rows=[], prompts={})
    if kind == "rl" and metrics:
        score = load_scorer(exact_judge, args.get("score_weights")) if exact_judge else None
        rows, n_logged, first_rows = read_rollouts(
            folder, metrics[-1]["step"], max_bytes, EXACT_ANSWERS if score else 0
        )
        if score:
            add_exact(metrics, first_rows, score)
        run["sampled"] = {"shown": len(rows), "of": n_logged}
        run["rows"], run["prompts"] = rollouts_for_page(rows, score)
        run["templates"] = prompt_templates(folder)
    run["warnings"] = rl_warnings(metrics) if kind == "rl" else supervised_warnings(metrics)
    if kind == "grm":
        run["judgements"] = [judgement_pair(row) for row in logged_rows(os.path.join(folder, "held_out.jsonl"))]
        agreement = os.path.join(folder, "held_out.json")
        if os.path.isfile(agreement):
            run["agreement"] = read_json(agreement)
    if metrics:
        run["written"] = os.path.getmtime(metrics_file)
    return run | dict(metrics=columns(metrics), panels=panels_of(metrics))
