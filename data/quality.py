"""Quality figures of a folder of data/annotate.py, for the sheet that report.py draws of it.

    stability      do scores stay the same when an answer is judged again? (the paper chose its judge by it: Table 9)
    agreement      do judges agree with one another, a judge with itself, overall scores with weighted ones?
    steps          which fraction was lost at each step, and why
    distributions  of scores, and of the lengths of answers by model and side
    copies         near-duplicates among questions, and between the training and the held-out side

The first two need the audit (--audit-answers). Cohen's kappa has quadratic weights: it counts how far two judges are
apart. Similarity is the cosine of tf-idf over 3 to 5 characters, which works in any language.
"""

import itertools
import os
from collections import Counter, defaultdict
from random import Random
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import cohen_kappa_score

from data.readers import normal
from json_files import read_json
from prompts import DIMENSIONS, Judgement, persona_text
from runtime.rows import logged_rows

SIMILAR = 0.9  # two texts with this cosine or more count as copies
DRAWN = 3000  # texts that are compared with the others; a sample of so many if there are more
SCALE = list(range(-5, 6))
ANSWER = ["prompt_id", "answer"]
SCORES = [*DIMENSIONS, "weighted"]


def judgement_of(row: dict) -> Judgement:
    return Judgement(row["critique"], *(row[name] for name in DIMENSIONS))


def judgements_in(audit: list[dict], weights: list[float]) -> pd.DataFrame:
    """The rows that are judgements, with their weighted score."""
    rows = [row | {"weighted": judgement_of(row).score(weights)} for row in audit if "critique" in row]
    return pd.DataFrame(rows, columns=["judge", "repeat", *ANSWER, *SCORES])


def judges_in(audit: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["judge"] for row in audit))


def stability(audit: list[dict], weights: list[float]) -> dict[str, dict]:
    """{judge: figures over the answers that it judged at least twice}.

    sd: {score: standard deviation over repeats, averaged over answers}, also for the weighted score; same: fraction of
    answers whose three scores were the same each time; answers, judgements, failed: counts.
    """
    found = {}
    judgements = judgements_in(audit, weights)
    for judge in judges_in(audit):
        rows = judgements[judgements["judge"] == judge]
        by_answer = rows.groupby(ANSWER)[SCORES]
        deviations = by_answer.std().dropna()  # NaN: judged once
        some = not deviations.empty
        found[judge] = dict(
            sd=deviations.mean().to_dict() if some else {},
            same=float((by_answer.nunique().loc[deviations.index] == 1).all(axis=1).mean()) if some else None,
            answers=len(deviations),
            judgements=len(rows),
            failed=sum(row["judge"] == judge and "failure" in row for row in audit),
        )
    return found


def agreement(audit: list[dict], weights: list[float]) -> list[dict]:
    """Compares the first judgements of any two judges, and each judge's first with its second, which bounds the rest.

    Returns [{judges, answers, kappa: {score: kappa}, pearson, spearman: of the weighted score}]; None: undefined.
    """
    judgements = {
        key: rows.set_index(ANSWER) for key, rows in judgements_in(audit, weights).groupby(["judge", "repeat"])
    }
    judges = judges_in(audit)
    compared = [(f"{judge}, twice", (judge, 0), (judge, 1)) for judge in judges]
    compared += [(f"{a} and {b}", (a, 0), (b, 0)) for a, b in itertools.combinations(judges, 2)]
    found = []
    for names, one, other in compared:
        if one not in judgements or other not in judgements:
            continue
        both = judgements[one].join(judgements[other], how="inner", suffixes=("", " of the other"))
        if both.empty:
            continue
        kappa = {name: kappa_of(both[name], both[f"{name} of the other"]) for name in DIMENSIONS}
        correlation = correlations(both["weighted"], both["weighted of the other"])
        found.append(dict(judges=names, answers=len(both), kappa=kappa, **correlation))
    return found


def kappa_of(a: pd.Series, b: pd.Series) -> float | None:
    """Cohen's kappa with quadratic weights; None if both give the same single value throughout."""
    if len({*a, *b}) == 1:
        return None
    return float(cohen_kappa_score(a, b, labels=SCALE, weights="quadratic"))


def correlations(a: pd.Series | list[float], b: pd.Series | list[float]) -> dict[str, float | None]:
    if len(a) < 3 or len(set(a)) == 1 or len(set(b)) == 1:
        return dict(pearson=None, spearman=None)
    return dict(pearson=float(stats.pearsonr(a, b)[0]), spearman=float(stats.spearmanr(a, b)[0]))


def order(pairs: list[dict], judged: dict[tuple, Judgement], weights: list[float]) -> dict:
    """Does the judge put pairs in the order of the overall scores? judged: {(prompt_id, answer): Judgement}."""
    signs = []  # 1: the chosen answer has the higher weighted score
    overall = []
    weighted = []
    for pair in pairs:
        sides = [judged.get((pair["prompt_id"], pair[side])) for side in ("chosen", "rejected")]
        if None in sides:
            continue
        scores = [judgement.score(weights) for judgement in sides]
        signs.append(int(np.sign(scores[0] - scores[1])))
        overall += [pair["chosen_score"], pair["rejected_score"]]
        weighted += scores
    return dict(
        pairs=len(signs), same=signs.count(1) / len(signs) if signs else None, **correlations(overall, weighted)
    )


def similar_fraction(texts: list[str], others: list[str] | None = None, seed: int = 0) -> float | None:
    """The fraction of the texts with a similar one among the others, or (None) among themselves. None: no texts.

    If there are more than DRAWN texts, a sample of them is compared with all the others.
    """
    texts = list(dict.fromkeys(texts))
    others = list(dict.fromkeys(others)) if others is not None else None
    if not texts or others == []:
        return None
    drawn = Random(seed).sample(range(len(texts)), min(DRAWN, len(texts)))
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit([*texts, *(others or ())])
    columns = vectors.transform(others or texts).T
    n_similar = 0
    for start in range(0, len(drawn), 256):
        part = drawn[start : start + 256]
        cosines = (vectors.transform([texts[i] for i in part]) @ columns).toarray()
        if others is None:
            cosines[range(len(part)), part] = 0  # of a text with itself
        n_similar += int((cosines.max(1) >= SIMILAR).sum())
    return n_similar / len(drawn)


def copies(train: list[dict], held_out: list[dict], seed: int = 0) -> dict:
    """Counts near-duplicates among questions, and what the held-out rows have in common with the training rows."""
    questions, held_out_questions = ([normal(row["question"]) for row in rows] for rows in (train, held_out))
    personas, held_out_personas = ([persona_text(row["persona"]) for row in rows] for rows in (train, held_out))
    distinct = list(dict.fromkeys(questions + held_out_questions))
    found = dict(
        questions=len(train) + len(held_out),
        distinct_questions=len(distinct),
        similar_questions=similar_fraction(distinct, seed=seed),
        personas_on_both_sides=len({*personas} & {*held_out_personas}),
    )
    if held_out:
        known = set(questions)
        new = [question for question in held_out_questions if question not in known]
        found["held_out_questions_of_training"] = 1 - len(new) / len(held_out)
        found["similar_to_training"] = similar_fraction(new, questions, seed)
        found["personas_similar_to_training"] = similar_fraction(held_out_personas, personas, seed)
    return found


# -- the sheet ---------------------------------------------------------------------------------------------------------


def read(folder: str) -> dict[str, list[dict]]:
    """{name: rows} of OUT/annotate, and the prompts of both sides; [] if a step has not been made."""
    names = ("answers", "scores", "pairs", "judgements", "audit", "dropped")
    found = {name: logged_rows(os.path.join(folder, "annotate", f"{name}.jsonl")) for name in names}
    for side in ("train", "eval"):
        found[side] = logged_rows(os.path.join(folder, f"prompts_{side}.jsonl"))
        if not found[side]:  # the prompts were given by --prompts: take those that came to a pair
            found[side] = logged_rows(os.path.join(folder, "pairs.jsonl" if side == "train" else "pairs_eval.jsonl"))
    return found


def table(title: str, head: tuple, body: list, note: str = "") -> list[str]:
    """Lines of Markdown; none for an empty body."""
    if not body:
        return []
    rows = ["| " + " | ".join(map(cell, row)) + " |" for row in (head, *body)]
    return [f"## {title}", "", *([note, ""] if note else []), rows[0], "|" + "---|" * len(head), *rows[1:], ""]


def steps_table(steps: dict[str, dict]) -> list[str]:
    body = []
    for step, done in steps.items():
        body.append([step, "kept", done["rows"], ""])
        for name, n in done["dropped"].items():
            of = done["of"][name.partition(":")[0]]
            body.append([step, name, n, f"{n / of:.1%} of {of:,}"])
    head = ("step", "what", "rows", "fraction")
    return table("What each step kept and dropped", head, body, "Reasons: annotate/dropped.jsonl.")


def audit_tables(audit: list[dict], weights: list[float]) -> list[str]:
    body = []
    for judge, s in stability(audit, weights).items():
        deviations = [s["sd"].get(name) for name in SCORES]
        body.append([judge, s["answers"], s["judgements"], s["failed"], *deviations, s["same"]])
    head = ("judge", "answers", "judgements", "failed", *SCORES, "all the same")
    note = "Standard deviation of a score when the same answer is judged again; the paper chose its judge by this."
    lines = table("Stability of judgements", head, body, note)
    body = []
    for one in agreement(audit, weights):
        body.append([one["judges"], one["answers"], *one["kappa"].values(), one["pearson"], one["spearman"]])
    head = ("judges", "answers", *(f"kappa, {n}" for n in DIMENSIONS), "Pearson, weighted", "Spearman, weighted")
    note = "Cohen's kappa with quadratic weights, on the answers of the audit."
    return lines + table("Agreement of judges", head, body, note)


def score_tables(rows: dict[str, list[dict]], judged: dict[tuple, Judgement], weights: list[float]) -> list[str]:
    """judged: {(prompt_id, answer): Judgement}, also of answers that tied."""
    lines = []
    same = order(rows["pairs"], judged, weights)
    if same["pairs"]:
        head = ("pairs", "chosen is the better one", "Pearson", "Spearman")
        lines += table("Overall scores against the judge's weighted scores", head, [list(same.values())])
    if judged:
        body = []
        for name in DIMENSIONS:
            counts = Counter(getattr(judgement, name) for judgement in judged.values())
            body.append([name, *(counts[score] / len(judged) for score in SCALE)])
        lines += table(f"Scores of the {len(judged):,} judged answers", ("", *SCALE), body, "Shares.")
    by_model = defaultdict(list)
    for row in rows["scores"]:
        by_model[row["model"]].append(row["score"])
    body = []
    for model, scores in by_model.items():
        fractions = [None] * 5  # another scale
        if min(scores) >= 1 and max(scores) <= 5:
            fractions = list(np.histogram(scores, (1, 1.5, 2.5, 3.5, 4.5, 5))[0] / len(scores))
        body.append([model, len(scores), float(np.mean(scores)), *fractions])
    head = ("model", "answers", "mean", 1, 2, 3, 4, 5)
    lines += table("Overall scores", head, body, "Shares of what rounds to 1 ... 5.")
    by_kind = defaultdict(list)
    for row in rows["answers"]:
        by_kind[f"answers of {row['model']}"].append(len(row["answer"]))
    for side in ("chosen", "rejected"):
        by_kind[side] = [len(pair[side]) for pair in rows["pairs"]]
    body = [[kind, len(n), *np.quantile(n, (0.1, 0.5, 0.9)).round().astype(int)] for kind, n in by_kind.items() if n]
    return lines + table("Characters of an answer", ("", "answers", "10 %", "median", "90 %"), body)


def copies_table(found: dict[str, Any]) -> list[str]:
    body = [[COPIES[name], value] for name, value in found.items()]
    note = f"Similar: a cosine of {SIMILAR:g} or more (tf-idf of 3 to 5 characters) with any other text."
    return table("Copies, and what the held-out side shares with training", ("", ""), body, note)


def cost_table(models: dict[str, dict]) -> list[str]:
    counted = ("requests", "calls", "prompt_tokens", "completion_tokens", "cost")
    body = [[name, *(counts[k] for k in counted)] for name, counts in models.items()]
    return table("What was asked", ("step, model", "requests", "calls", "tokens in", "tokens out", "dollars"), body)


def sheet(folder: str) -> tuple[str, list[dict]]:
    """Returns the sheet as Markdown, and ten random pair rows with the judgements of both sides."""
    summary = read_json(os.path.join(folder, "annotation.json"))
    rows = read(folder)
    seed = summary["args"]["seed"]
    weights = summary["args"]["score_weights"]
    tied = [row for row in rows["dropped"] if row["step"] == "judgements" and "critique" in row]
    judged = {(row["prompt_id"], row["answer"]): judgement_of(row) for row in rows["judgements"] + tied}
    lines = [
        *steps_table(summary["steps"]),
        *audit_tables(rows["audit"], weights),
        *score_tables(rows, judged, weights),
        *copies_table(copies(rows["train"], rows["eval"], seed)),
        *cost_table(summary["models"]),
    ]
    pairs = Random(seed).sample(rows["pairs"], min(10, len(rows["pairs"])))
    for pair in pairs:
        pair["judged"] = {side: judged.get((pair["prompt_id"], pair[side])) for side in ("chosen", "rejected")}
    return "\n".join(lines), pairs


COPIES = {
    "questions": "questions",
    "distinct_questions": "different questions",
    "similar_questions": "share of these with another that is similar",
    "personas_on_both_sides": "personas on both sides",
    "personas_similar_to_training": "share of held-out personas that are similar to one of training",
    "held_out_questions_of_training": "share of held-out questions that training has word for word, for others",
    "similar_to_training": "share of the others that are similar to one of training",
}


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, (int, np.integer)) else str(value).replace("|", "/")
