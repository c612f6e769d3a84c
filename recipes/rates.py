"""How often answers of the generated world hold its rare content: a topic's last step, and the advice that suits.

Both are what critiques ask for and answers of the corpus seldom have (data/persona_world.py --rarity). What is
measured here on samples of a policy is the probability that a method starts from, and what it has made of it.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data.persona_world import TOPICS, find_topic, read_sentences, review

Rates = dict[str, float | None]


def content_of(row: dict, answer: str) -> tuple[str, tuple[str, str], set[tuple]]:
    """-> the topic's last step, the attributes that matter, the items that the answer says (persona_world.Sentence)."""
    relevant, _, steps = TOPICS[find_topic(row["question"])]
    return steps[-1], relevant, {item for s in read_sentences(row["persona"], answer) for item in s.items}


def share(found: list[bool]) -> float | None:
    return sum(found) / len(found) if found else None


def rates(rows: list[dict]) -> Rates:
    """Of rows with persona, question and answer:

    last_step: the share of answers that say it; advice: over the two attributes that matter, the share with suitable
    advice; advice_right: of the advice on them, the share that suits (None without any); wrong: the share of answers
    with a value or advice that is not the person's.
    """
    step, advice, right, wrong = [], [], [], []
    for row in rows:
        last, relevant, items = content_of(row, row["answer"])
        facts = [item for item in items if item[0] in ("claim", "advice")]
        step.append(("step", last) in items)
        advice += [("advice", a, row["persona"][a]) in items for a in relevant]
        right += [row["persona"][a] == v for kind, a, v in facts if kind == "advice" and a in relevant]
        wrong.append(any(row["persona"][a] != v for _, a, v in facts))
    return dict(last_step=share(step), advice=share(advice), advice_right=share(right), wrong=share(wrong))


def carried_out(rows: list[dict], edits: list[str]) -> Rates:
    """What the edits of the rows' answers do of what the exact critique dictates.

    edit_step: the share of the named steps that the edit says; edit_advice: of the advice.
    """
    steps, advice = [], []
    for row, edit in zip(rows, edits, strict=True):
        _, _, items = content_of(row, edit)
        for kind, *what in review(row["persona"], row["question"], row["answer"])[1][:3]:  # a critique names three
            if kind == "add":
                steps.append(("step", what[0]) in items)
            elif kind == "say":
                advice.append(("advice", what[0], row["persona"][what[0]]) in items)
    return dict(edit_step=share(steps), edit_advice=share(advice))
