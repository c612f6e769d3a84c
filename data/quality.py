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

import numpy as np
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import cohen_kappa_score

from data.readers import normal
from json_files import read_json
from prompts import DIMENSIONS, Judgement, persona_text
from runtime.rows import logged_rows

SIMILAR = 0.9  # two texts with this cosine or more count as copies
DRAWN = 3000  # texts to compare with one another; a sample of so many if there are more
SCALE = list(range(-5, 6))


def judgement_of(row: dict) -> Judgement | None:
    return Judgement(row["critique"], *(row[name] for name in DIMENSIONS)) if "critique" in row else None


def stability(audit: list[dict], weights: list[float]) -> dict[str, dict]:
    """{judge: figures over the answers that it judged at least twice}.

    sd: {score: standard deviation over repeats, averaged over answers}, also for the weighted score; same: fraction of
    answers whose three scores were the same each time; answers, judgements, failed: counts.
    """
    found = {}
    for judge in dict.fromkeys(row["judge"] for row in audit):
        of_answer = defaultdict(list)
        rows = [row for row in audit if row["judge"] == judge]
        for row in rows:
            if judgement := judgement_of(row):
                values = [getattr(judgement, name) for name in DIMENSIONS]
                of_answer[row["prompt_id"], row["answer"]].append([*values, judgement.score(weights)])
        repeated = [np.array(values) for values in of_answer.values() if len(values) > 1]  # [repeats, 4] each
        deviations = np.array([values.std(axis=0, ddof=1) for values in repeated])
        found[judge] = dict(
            sd=dict(zip((*DIMENSIONS, "weighted"), deviations.mean(axis=0).tolist())) if repeated else {},
            same=sum(bool((values == values[0]).all()) for values in repeated) / len(repeated) if repeated else None,
            answers=len(repeated),
            judgements=sum(map(len, of_answer.values())),
            failed=sum("failure" in row for row in rows),
        )
    return found


def agreement(audit: list[dict], weights: list[float]) -> list[dict]:
    """Compares the first judgements of any two judges, and each judge's first with its second, which bounds the rest.

    Returns [{judges, answers, kappa: {score: kappa}, pearson, spearman: of the weighted score}]; None: undefined.
    """
    judged = defaultdict(dict)  # {(judge, repeat): {answer: Judgement}}
    for row in audit:
        if judgement := judgement_of(row):
            judged[row["judge"], row["repeat"]][row["prompt_id"], row["answer"]] = judgement
    judges = list(dict.fromkeys(row["judge"] for row in audit))
    compared = [((judge, 0), (judge, 1)) for judge in judges]
    compared += [((a, 0), (b, 0)) for a, b in itertools.combinations(judges, 2)]
    found = []
    for one, other in compared:
        both = [key for key in judged[one] if key in judged[other]]
        a, b = [[judged[side][key] for key in both] for side in (one, other)]
        kappa = {}
        for name in DIMENSIONS:
            kappa[name] = kappa_of([getattr(j, name) for j in a], [getattr(j, name) for j in b])
        scores = [[j.score(weights) for j in side] for side in (a, b)]
        names = f"{one[0]}, twice" if one[0] == other[0] else f"{one[0]} and {other[0]}"
        found.append(dict(judges=names, answers=len(both), kappa=kappa, **correlations(*scores)))
    return [one for one in found if one["answers"]]


def kappa_of(a: list[int], b: list[int]) -> float | None:
    """Cohen's kappa with quadratic weights; None if both give the same single value throughout."""
    if not a or len(set(a) | set(b)) == 1:
        return None
    return float(cohen_kappa_score(a, b, labels=SCALE, weights="quadratic"))


def correlations(a: list[float], b: list[float]) -> dict[str, float | None]:
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


def similarities(texts: list[str], others: list[str] | None = None) -> np.ndarray:
    """The cosine of each text with the nearest other one, in `texts` or in `others`: [len(texts)], 0 if there is none.

    The texts should differ from one another.
    """
    if not texts or (len(texts) < 2 if others is None else not others):
        return np.zeros(len(texts))
    vectors = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5)).fit([*texts, *(others or ())])
    rows = vectors.transform(texts)
    near = (rows @ (rows if others is None else vectors.transform(others)).T).toarray()
    if others is None:
        np.fill_diagonal(near, 0)
    return near.max(axis=1)


def copies(train: list[dict], held_out: list[dict], seed: int = 0) -> dict:
    """Counts near-duplicates among questions, and what the held-out rows have in common with the training rows."""

    def drawn(texts):
        texts = list(dict.fromkeys(texts))
        return Random(seed).sample(texts, DRAWN) if len(texts) > DRAWN else texts

    questions = [[normal(row["question"]) for row in rows] for rows in (train, held_out)]
    personas = [[persona_text(row["persona"]) for row in rows] for rows in (train, held_out)]
    distinct = list(dict.fromkeys(questions[0] + questions[1]))
    found = dict(
        questions=len(train) + len(held_out),
        distinct_questions=len(distinct),
        similar_questions=float((similarities(drawn(distinct)) >= SIMILAR).mean()) if distinct else None,
        drawn=min(len(distinct), DRAWN),
        personas_on_both_sides=len(set(personas[0]) & set(personas[1])),
    )
    if held_out:
        seen = set(questions[0])
        new = drawn(q for q in questions[1] if q not in seen)
        found["held_out_questions_of_training"] = sum(q in seen for q in questions[1]) / len(held_out)
        found["similar_to_training"] = (
            float((similarities(new, drawn(questions[0])) >= SIMILAR).mean()) if new and train else None
        )
        found["personas_similar_to_training"] = float(
            (similarities(drawn(personas[1]), drawn(personas[0])) >= SIMILAR).mean()
        )
    return found


def lengths(answers: list[dict], pairs: list[dict]) -> dict[str, list[int]]:
    """{whose answers: [number, and the 10 %, 50 % and 90 % quantiles of their characters]}."""
    groups = defaultdict(list)
    for row in answers:
        groups[f"answers of {row['model']}"].append(len(row["answer"]))
    for pair in pairs:
        for side in ("chosen", "rejected"):
            groups[side].append(len(pair[side]))
    return {name: [len(n), *np.quantile(n, (0.1, 0.5, 0.9)).round().astype(int).tolist()] for name, n in groups.items()}


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


def sheet(folder: str) -> tuple[str, list[dict]]:
    """Returns the sheet as Markdown, and ten random pair rows with the judgements of both sides."""
    summary = read_json(os.path.join(folder, "annotation.json"))
    rows = read(folder)
    args = summary["args"]
    weights = args["score_weights"]
    judged = {(row["prompt_id"], row["answer"]): judgement_of(row) for row in rows["judgements"]}
    tied = [row for row in rows["dropped"] if row["step"] == "judgements" and "critique" in row]
    all_judged = judged | {(row["prompt_id"], row["answer"]): judgement_of(row) for row in tied}
    lines = []

    def table(title, head, body, note=""):
        if body:
            lines.extend([f"## {title}", "", *([note, ""] if note else []), "| " + " | ".join(map(str, head)) + " |"])
            lines.append("|" + "---|" * len(head))
            lines.extend("| " + " | ".join(map(cell, row)) + " |" for row in body)
            lines.append("")

    steps = []
    for step, done in summary["steps"].items():
        steps.append([step, "kept", done["rows"], ""])
        for name, n in done["dropped"].items():
            of = done["of"][name.partition(":")[0]]
            steps.append([step, name, n, f"{n / of:.1%} of {of:,}"])
    table(
        "What each step kept and dropped",
        ("step", "what", "rows", "fraction"),
        steps,
        "Reasons: annotate/dropped.jsonl.",
    )

    steady = stability(rows["audit"], weights)
    body = [
        [
            judge,
            s["answers"],
            s["judgements"],
            s["failed"],
            *(s["sd"].get(n) for n in (*DIMENSIONS, "weighted")),
            s["same"],
        ]
        for judge, s in steady.items()
    ]
    head = ("judge", "answers", "judgements", "failed", *DIMENSIONS, "weighted", "all the same")
    note = "Standard deviation of a score when the same answer is judged again; the paper chose its judge by this."
    table("Stability of judgements", head, body, note)

    agreed = [
        [one["judges"], one["answers"], *one["kappa"].values(), one["pearson"], one["spearman"]]
        for one in agreement(rows["audit"], weights)
    ]
    head = ("judges", "answers", *(f"kappa, {n}" for n in DIMENSIONS), "Pearson, weighted", "Spearman, weighted")
    table("Agreement of judges", head, agreed, "Cohen's kappa with quadratic weights, on the answers of the audit.")

    same = order(rows["pairs"], all_judged, weights)
    if same["pairs"]:
        body = [[same["pairs"], same["same"], same["pearson"], same["spearman"]]]
        head = ("pairs", "chosen is the better one", "Pearson", "Spearman")
        table("Overall scores against the judge's weighted scores", head, body)

    counts = [Counter(getattr(j, name) for j in all_judged.values()) for name in DIMENSIONS]
    body = [[name, *(c[s] / max(1, len(all_judged)) for s in SCALE)] for name, c in zip(DIMENSIONS, counts)]
    table(f"Scores of the {len(all_judged):,} judged answers", ("", *SCALE), body if all_judged else [], "Shares.")
    by_model = defaultdict(list)
    for row in rows["scores"]:
        by_model[row["model"]].append(row["score"])
    body = [
        [m, len(s), float(np.mean(s)), *np.histogram(s, (1, 1.5, 2.5, 3.5, 4.5, 5))[0] / len(s)]
        for m, s in by_model.items()
    ]
    table("Overall scores", ("model", "answers", "mean", 1, 2, 3, 4, 5), body, "Shares of what rounds to 1 ... 5.")
    body = [[name, *values] for name, values in lengths(rows["answers"], rows["pairs"]).items()]
    table("Characters of an answer", ("", "answers", "10 %", "median", "90 %"), body)

    found = copies(rows["train"], rows["eval"], args["seed"])
    body = [[COPIES[name], value] for name, value in found.items() if name in COPIES]
    table(
        "Copies, and what the held-out side shares with training",
        ("", ""),
        body,
        f"Similar: a cosine of {SIMILAR:g} or more (tf-idf of 3 to 5 characters), of at most {DRAWN:,} texts.",
    )

    body = [
        [name, *(counts[k] for k in ("requests", "calls", "prompt_tokens", "completion_tokens", "cost"))]
        for name, counts in summary["models"].items()
    ]
    table("What was asked", ("step, model", "requests", "calls", "tokens in", "tokens out", "dollars"), body)

    drawn = Random(args["seed"]).sample(rows["pairs"], min(10, len(rows["pairs"])))
    for pair in drawn:
        pair["judged"] = {side: all_judged.get((pair["prompt_id"], pair[side])) for side in ("chosen", "rejected")}
    return "\n".join(lines), drawn


COPIES = {
    "questions": "questions",
    "distinct_questions": "different questions",
    "similar_questions": "share of these with another that is similar",
    "personas_on_both_sides": "personas on both sides",
    "personas_similar_to_training": "share of held-out personas that are similar to one of training",
    "held_out_questions_of_training": "share of held-out questions that training has word for word, for others",
    "similar_to_training": "share of the others that are similar to one of training",
}


def cell(value) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")
