"""Critics for `--judge recipes/critics.py:NAME`: the exact judge's scores beside critiques of different quality.

What does CPE need of its critic? The reward is the same for all of them (recipes/rarity.py, "Critique quality").
"""

from random import Random

from data.persona_world import STEPS, edit_text, judge, other_value, review
from prompts import Judgement


def exact(row: dict, answer: str) -> Judgement:
    """The words to say, as the exact judge dictates them."""
    return judge(row, answer)


def kind(row: dict, answer: str) -> Judgement:
    """What kind of thing is to change, without the words."""
    names = dict(say="Say more of the person.", add="A step is missing.")
    edits = review(row["persona"], row["question"], answer)[1][:3]
    return with_critique(row, answer, [names.get(e[0]) or edit_text(row["persona"], e) for e in edits])


def vague(row: dict, answer: str) -> Judgement:
    """That something is missing, if anything is."""
    edits = review(row["persona"], row["question"], answer)[1]
    return with_critique(row, answer, ["Something is missing."] if edits else [])


def silent(row: dict, answer: str) -> Judgement:
    """No critique: the same full stop for every answer."""
    return with_critique(row, answer, ["."])


def wrong10(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.1)


def wrong30(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.3)


def wrong50(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.5)


def wrong(row: dict, answer: str, share: float) -> Judgement:
    """The exact critique, where each thing to say or add is with this probability that of another person or topic."""
    rng = Random(f"{row['prompt_id']} {answer}")  # the same answer gets the same critique
    texts = []
    for edit in review(row["persona"], row["question"], answer)[1][:3]:
        persona = row["persona"]
        if edit[0] == "say" and rng.random() < share:
            persona = persona | {edit[1]: other_value(rng, edit[1], persona[edit[1]])}
        elif edit[0] == "add" and rng.random() < share:
            edit = ("add", rng.choice([s for s in STEPS if s != edit[1]]))
        texts.append(edit_text(persona, edit))
    return with_critique(row, answer, texts)


def with_critique(row: dict, answer: str, texts: list[str]) -> Judgement:
    found = exact(row, answer)
    return Judgement(" ".join(texts) or found.critique, found.helpfulness, found.personalization, found.naturalness)
