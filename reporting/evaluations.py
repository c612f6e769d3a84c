"""Entries of a page for evaluations, annotated data and held-out judgements: rows with two sides each.

A row: id, question, persona, verdict (win | tie | loss | none), sides, and optionally group, gap (characters of the
first side minus those of the second), preference, note. A side: title, answer, scores, critique.
"""

import dataclasses
import os
from typing import Any

from json_files import read_json, read_json_list
from runtime.rows import DIMENSIONS, logged_rows

# task: what its page calls a win, a tie, a loss and no verdict
VERDICTS = {
    "win-rate": ("model wins", "tie", "baseline wins", "no verdict"),
    "reward-accuracy": ("right", "ties", "wrong", "no verdict"),
    "persona-swap": ("own persona higher", "equal", "own persona lower", "no verdict"),
    "personamem": ("right", "", "wrong", "not answered"),
    "annotation": ("chosen has the higher weighted score", "equal", "rejected has the higher one", "not both judged"),
    "grm": ("all three as labelled", "some", "none as labelled", "does not parse"),
}


def verdict_of(value: float | None) -> str:
    """The word for a verdict in [0, 1]: above 0.5 a win, below it a loss."""
    if value is None:
        return "none"
    if value == 0.5:
        return "tie"
    return "win" if value > 0.5 else "loss"


def verdict_by_scores(first: float | None, second: float | None) -> str:
    """The word for the comparison of two scores."""
    if first is None or second is None:
        return "none"
    return verdict_of(0.5 + (first > second) / 2 - (first < second) / 2)


def scores_of(verdict: dict | None) -> dict:
    return {name: (verdict or {}).get(name) for name in ("reward", *DIMENSIONS, "critique")}


def page_row(row: dict, verdict: str, sides: list[dict], **more: Any) -> dict:
    """A row of the page for a row with prompt_id, question and persona."""
    prompt = dict(id=row["prompt_id"], question=row.get("question"), persona=row.get("persona"))
    return prompt | dict(verdict=verdict, sides=sides, **more)


# -- tasks of evaluate.py ----------------------------------------------------------------------------------------------


def win_rate_rows(folder: str) -> list[dict]:
    path = os.path.join(folder, "annotations.json")
    if not os.path.isfile(path):
        return []
    annotations = read_json_list(path, "annotations")
    answers = {}
    for side in ("model", "baseline"):
        for row in logged_rows(os.path.join(folder, f"answers_{side}.jsonl")):
            answers[side, row["prompt_id"]] = row
    verdicts = {(row.get("side"), row["prompt_id"]): row for row in logged_rows(os.path.join(folder, "verdicts.jsonl"))}
    rows = []
    for annotation in annotations:
        prompt_id = annotation["prompt_id"]
        prompt = answers.get(("model", prompt_id)) or answers.get(("baseline", prompt_id)) or {}
        sides = []
        for side, number in (("model", "2"), ("baseline", "1")):
            sides.append(
                dict(
                    title=side,
                    answer=annotation[f"output_{number}"],
                    n_tokens=answers.get((side, prompt_id), {}).get("n_tokens"),
                    drop_reason="no answer" if side in annotation.get("missing", ()) else None,
                    truncated=side in annotation.get("truncated", ()),
                    **scores_of(verdicts.get((side, prompt_id))),
                )
            )
        preference = annotation["preference"]
        if preference is not None:
            preference -= 1
        rows.append(
            dict(
                id=prompt_id,
                group=annotation.get("group"),
                question=prompt.get("question") or annotation["instruction"],
                persona=prompt.get("persona"),
                verdict=verdict_of(preference),
                preference=None if preference is None else round(preference, 3),
                gap=len(annotation["output_2"]) - len(annotation["output_1"]),
                note=annotation.get("failure"),
                sides=sides,
            )
        )
    return rows


def reward_accuracy_rows(folder: str) -> list[dict]:
    from evaluation.annotations import group_of  # brings scikit-learn along

    rows = []
    for row in logged_rows(os.path.join(folder, "verdicts.jsonl")):
        of_side = {verdict.get("side"): verdict for verdict in row["verdicts"]}  # a judge of pairs scores no side
        sides = [dict(title=side, answer=row[side], **scores_of(of_side.get(side))) for side in ("chosen", "rejected")]
        rows.append(
            page_row(
                row,
                verdict_of(row["outcome"]),
                sides,
                group=group_of(row),
                gap=len(row["chosen"]) - len(row["rejected"]),
            )
        )
    return rows


def persona_swap_rows(folder: str) -> list[dict]:
    answers = {row["prompt_id"]: row for row in logged_rows(os.path.join(folder, "answers_model.jsonl"))}
    rows = []
    for row in logged_rows(os.path.join(folder, "verdicts.jsonl")):
        answer = answers.get(row["prompt_id"], {})
        judged = row.get("answer", answer.get("answer"))  # an evaluation under way may have written newer answers
        own = dict(title="under the own persona", answer=judged, **scores_of(row["own"]))
        swapped = dict(title="under another's", answer=judged, **scores_of(row["swapped"]))
        rows.append(
            dict(
                id=row["prompt_id"],
                group=answer.get("source"),
                question=answer.get("question"),
                persona=answer.get("persona"),
                verdict=verdict_by_scores(own["reward"], swapped["reward"]),
                sides=[own, swapped | {"persona": row["persona"]}],
            )
        )
    return rows


def personamem_rows(folder: str) -> list[dict]:
    rows = []
    for row in logged_rows(os.path.join(folder, "choices.jsonl")):
        correct = row["options"]["abcd".index(row["correct"])]
        sides = [dict(title="reply", answer=row["answer"]), dict(title=f"right: ({row['correct']})", answer=correct)]
        no_letter = row["answer"] is not None and row["right"] is None
        verdict = "loss" if no_letter else verdict_of(row["right"])
        note = "no letter" if no_letter else None
        rows.append(page_row(row, verdict, sides, group=row["question_type"], note=note))
    return rows


TASKS = {
    "win-rate": win_rate_rows,
    "reward-accuracy": reward_accuracy_rows,
    "persona-swap": persona_swap_rows,
    "personamem": personamem_rows,
}


def evaluation_run(folder: str) -> dict[str, Any]:
    """The entry of a folder of evaluate.py: its table as text, and one row a prompt."""
    file = os.path.join(folder, "results.json")
    results = read_json(file)
    args = results.get("args") or {}
    task = args.get("task", "win-rate")
    table = os.path.join(folder, "table.md")
    text = ""
    if os.path.isfile(table):
        with open(table, encoding="utf-8") as f:
            text = f.read()
    run = dict(
        kind="evaluation",
        label=f"Evaluation: {task}",
        task=task,
        args=args,
        table=text,
        rows=TASKS[task](folder),
        warnings=[],
        written=os.path.getmtime(file),
    )
    if task == "win-rate" and "win_rate" in results:
        names = ("win_rate", "length_controlled", "model", "baseline", "generators")
        run["summary"] = {name: results.get(name) for name in names}
    return run


# -- annotated data and held-out judgements ----------------------------------------------------------------------------


def annotation_run(folder: str) -> dict[str, Any]:
    """The entry of a folder of data/annotate.py: its quality sheet, and ten pairs with their critiques."""
    from data.quality import sheet  # brings scikit-learn along

    file = os.path.join(folder, "annotation.json")
    args = read_json(file)["args"]
    text, pairs = sheet(folder)
    rows = []
    for pair in pairs:
        sides = []
        for name, judgement in pair["judged"].items():
            side = dict(title=f"{name}, by {pair[f'{name}_model']}: {pair[f'{name}_score']:g} of 5", answer=pair[name])
            if judgement:
                side |= dataclasses.asdict(judgement) | {"reward": judgement.score(args["score_weights"])}
            sides.append(side)
        rows.append(
            page_row(
                pair,
                verdict_by_scores(*(side.get("reward") for side in sides)),
                sides,
                group=pair.get("kind"),
                gap=len(pair["chosen"]) - len(pair["rejected"]),
            )
        )
    return dict(
        kind="evaluation",
        label="Annotated data",
        task="annotation",
        args=args,
        table=text,
        rows=rows,
        warnings=[],
        written=os.path.getmtime(file),
    )


def judgement_pair(row: dict) -> dict:
    """A held-out row of train_grm.py: the label's judgement beside the model's."""
    label = {name: row.get(name) for name in ("critique", *DIMENSIONS)}
    judged = row.get("judged")
    verdict = "none"
    if judged is not None:
        n_equal = sum(label[name] == judged[name] for name in DIMENSIONS)
        verdict = {3: "win", 0: "loss"}.get(n_equal, "tie")
    sides = [
        {"title": "label", **label},
        {"title": "this model", **(judged or {"drop_reason": "the judgement does not parse"})},
    ]
    return page_row(row, verdict, sides, answer=row["answer"])
