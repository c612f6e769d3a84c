"""What a report shows of folders of evaluate.py and data/annotate.py, and of held-out judgements: rows of two sides."""

import json
import os
from dataclasses import asdict
from typing import Any

from reporting.folders import DIMENSIONS, read_object, rows_of

VERDICTS = {  # task: what a page calls win, tie, loss, none
    "win-rate": ("model wins", "tie", "baseline wins", "no verdict"),
    "reward-accuracy": ("right", "ties", "wrong", "no verdict"),
    "persona-swap": ("own profile higher", "equal", "own profile lower", "no verdict"),
    "personamem": ("right", "", "wrong", "no letter"),
    "annotation": ("chosen has the higher weighted score", "equal", "rejected has the higher one", "not both judged"),
    "grm": ("all three as labelled", "some", "none as labelled", "does not parse"),
}


def evaluation_run(folder: str) -> dict[str, Any]:
    """What the page has of an evaluation: its table as text, one row a prompt, with two sides each."""
    results = read_object(os.path.join(folder, "results.json"))
    args = results.get("args") or {}
    task = args.get("task", "win-rate")
    make = {"win-rate": compared, "reward-accuracy": pairs, "persona-swap": swapped, "personamem": choices}[task]
    table = os.path.join(folder, "table.md")
    text = ""
    if os.path.isfile(table):
        with open(table, encoding="utf-8") as f:
            text = f.read()
    run = dict(kind="evaluation", label=f"Evaluation: {task}", task=task, args=args, table=text, rows=[])
    run["written"] = os.path.getmtime(os.path.join(folder, "results.json"))
    if task == "win-rate" and "win_rate" in results:
        run["summary"] = {
            k: results.get(k) for k in ("win_rate", "length_controlled", "model", "baseline", "generators")
        }
    return run | dict(rows=make(folder), lights=[])


def annotation_run(folder: str) -> dict[str, Any]:
    """What the page has of data/annotate.py's folder: the quality sheet, and ten pairs with their critiques."""
    from data.quality import sheet  # brings scikit-learn along

    summary = read_object(os.path.join(folder, "annotation.json"))
    text, drawn = sheet(folder)
    weights, found = summary["args"]["score_weights"], []
    for pair in drawn:
        judged = pair["judged"]
        sides = []
        for name, judgement in judged.items():
            figures = asdict(judgement) | {"reward": judgement.score(weights)} if judgement else {}
            title = f"{name}, by {pair[f'{name}_model']}: {pair[f'{name}_score']:g} of 5"
            sides.append(dict(title=title, answer=pair[name], **figures))
        rewards = [side.get("reward") for side in sides]
        verdict = (
            "none"
            if None in rewards
            else verdict_of(0.5 + (rewards[0] > rewards[1]) / 2 - (rewards[0] < rewards[1]) / 2)
        )
        shared = dict(id=pair["prompt_id"], question=pair["question"], persona=pair["persona"], group=pair.get("kind"))
        found.append(dict(**shared, verdict=verdict, gap=len(pair["chosen"]) - len(pair["rejected"]), sides=sides))
    run = dict(
        kind="evaluation", label="Annotated data", task="annotation", args=summary["args"], table=text, rows=found
    )
    return run | dict(written=os.path.getmtime(os.path.join(folder, "annotation.json")), lights=[])


def verdict_of(value: float | None) -> str:
    """value: above 0.5 a win, 0.5 a tie, below it a loss."""
    return "none" if value is None else "win" if value > 0.5 else "tie" if value == 0.5 else "loss"


def scores(verdict: dict | None) -> dict:
    return {name: (verdict or {}).get(name) for name in ("reward", *DIMENSIONS, "critique")}


def compared(folder: str) -> list[dict]:
    path = os.path.join(folder, "annotations.json")
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8") as f:
        annotations = json.load(f)
    rows_by_side = {
        s: {r["prompt_id"]: r for r in rows_of(folder, f"answers_{s}.jsonl")} for s in ("model", "baseline")
    }
    judged = {(v.get("side"), v["prompt_id"]): v for v in rows_of(folder, "verdicts.jsonl")}
    found = []
    for a in annotations:
        sides, row = [], {}
        for side, number in (("model", "2"), ("baseline", "1")):
            answer = rows_by_side[side].get(a["prompt_id"], {})
            row = row or answer
            text = {"answer": a[f"output_{number}"], "n_tokens": answer.get("n_tokens")}
            left = "no answer" if side in a.get("missing", ()) else None
            cut = side in a.get("truncated", ())
            sides.append(
                dict(title=side, **text, left=left, truncated=cut, **scores(judged.get((side, a["prompt_id"]))))
            )
        preference = a["preference"]
        found.append(
            dict(
                id=a["prompt_id"],
                group=a.get("group"),
                question=row.get("question") or a["instruction"],
                persona=row.get("persona"),
                verdict=verdict_of(None if preference is None else preference - 1),
                preference=None if preference is None else round(preference - 1, 3),
                gap=len(a["output_2"]) - len(a["output_1"]),
                note=a.get("failure"),
                sides=sides,
            )
        )
    return found


def pairs(folder: str) -> list[dict]:
    found = []
    for row in rows_of(folder, "verdicts.jsonl"):
        texts = [row.get("chosen"), row.get("rejected")]
        compares = len(row["verdicts"]) and row["verdicts"][0].get("critique") is None
        sides = [
            dict(title=title, answer=text, **({} if compares and text is None else scores(verdict)))
            for title, text, verdict in zip(("chosen", "rejected"), texts, row["verdicts"])
        ]
        gap = len(texts[0]) - len(texts[1]) if None not in texts else None
        one = dict(
            id=row["prompt_id"], group=row.get("tier") or row.get("source"), question=row.get("question"), gap=gap
        )
        found.append(one | dict(persona=row.get("persona"), verdict=verdict_of(row["outcome"]), sides=sides))
    return found


def swapped(folder: str) -> list[dict]:
    answers, found = {r["prompt_id"]: r for r in rows_of(folder, "answers_model.jsonl")}, []
    for row in rows_of(folder, "verdicts.jsonl"):
        answer = answers.get(row["prompt_id"], {})
        own, other = row["own"]["reward"], row["swapped"]["reward"]
        known = own is not None and other is not None
        sides = [
            dict(title="under the own profile", answer=answer.get("answer"), **scores(row["own"])),
            dict(
                title="under another's", persona=row["persona"], answer=answer.get("answer"), **scores(row["swapped"])
            ),
        ]
        verdict = verdict_of(0.5 + (own > other) / 2 - (own < other) / 2 if known else None)
        shared = dict(question=answer.get("question"), persona=answer.get("persona"), group=answer.get("source"))
        found.append(dict(id=row["prompt_id"], verdict=verdict, sides=sides, **shared))
    return found


def choices(folder: str) -> list[dict]:
    found = []
    for row in rows_of(folder, "choices.jsonl"):
        right = row["options"]["abcd".index(row["correct"])]
        sides = [dict(title="reply", answer=row["answer"]), dict(title=f"right: ({row['correct']})", answer=right)]
        shared = dict(id=row["prompt_id"], question=row["question"], persona=row.get("persona"))
        found.append(dict(**shared, group=row["question_type"], verdict=verdict_of(row["right"]), sides=sides))
    return found


def judgement_pair(row: dict) -> dict:
    """A held-out row of train_grm.py: the label's judgement beside the model's."""
    names = ("critique", *DIMENSIONS)
    label, own = {n: row.get(n) for n in names}, row.get("judged")
    exact = own and sum(label[d] == own[d] for d in DIMENSIONS)
    verdict = "none" if own is None else "win" if exact == 3 else "loss" if exact == 0 else "tie"
    sides = [{"title": "label", **label}, {"title": "this model", **(own or {"left": "the judgement does not parse"})}]
    return dict(
        id=row["prompt_id"],
        question=row.get("question"),
        persona=row.get("persona"),
        answer=row["answer"],
        verdict=verdict,
        sides=sides,
    )
