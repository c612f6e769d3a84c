"""Critics for `--judge results/make/critics.py:NAME`: the exact judge's scores, with critiques of different quality.

What does CPE need of its critic? The reward is the same for all of them; only the words of the critique differ
(results/make/sweep.py). This module is no command: ppo_cpe.py loads its functions.
"""

from random import Random

from data.persona_world import STEPS, edit_text, judge, other_value, review
from prompts import Judgement

KINDS = {"say": "Say more of the person.", "add": "A step is missing."}


def exact(row: dict, answer: str) -> Judgement:
    """The words to say, as the exact judge dictates them."""
    return judge(row, answer)


def kind(row: dict, answer: str) -> Judgement:
    """The kind of thing to change, without the words."""
    texts = [KINDS.get(edit[0]) or edit_text(row["persona"], edit) for edit in edits_of(row, answer)]
    return with_critique(row, answer, texts)


def vague(row: dict, answer: str) -> Judgement:
    """That something is missing, if anything is."""
    return with_critique(row, answer, ["Something is missing."] if edits_of(row, answer) else [])


def silent(row: dict, answer: str) -> Judgement:
    """No critique: the same full stop for every answer."""
    return with_critique(row, answer, ["."])


def wrong10(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.1)


def wrong30(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.3)


def wrong50(row: dict, answer: str) -> Judgement:
    return wrong(row, answer, 0.5)


def wrong(row: dict, answer: str, probability: float) -> Judgement:
    """The exact critique, in which each advice or step is with this probability another person's or topic's."""
    rng = Random(f"{row['prompt_id']} {answer}")  # the same answer gets the same critique
    texts = []
    for edit in edits_of(row, answer):
        persona = row["persona"]
        if edit[0] in ("say", "add") and rng.random() < probability:
            persona, edit = misled(rng, persona, edit)
        texts.append(edit_text(persona, edit))
    return with_critique(row, answer, texts)


def misled(rng: Random, persona: dict, edit: tuple[str, ...]) -> tuple[dict, tuple[str, ...]]:
    """Persona and edit of the same sentence with another person's value or another topic's step."""
    if edit[0] == "say":
        attribute = edit[1]
        return persona | {attribute: other_value(rng, attribute, persona[attribute])}, edit
    if edit[0] == "add":
        return persona, ("add", rng.choice([step for step in STEPS if step != edit[1]]))
    return persona, edit


def edits_of(row: dict, answer: str) -> list[tuple[str, ...]]:
    """The edits that the exact critique names, at most three."""
    return review(row["persona"], row["question"], answer)[1][:3]


def with_critique(row: dict, answer: str, texts: list[str]) -> Judgement:
    """The exact judgement with other words; its own critique ("Nothing to fix.") where there are none."""
    judgement = exact(row, answer)
    critique = " ".join(texts) or judgement.critique
    return Judgement(critique, judgement.helpfulness, judgement.personalization, judgement.naturalness)
