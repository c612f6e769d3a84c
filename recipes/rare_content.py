"""How often answers in the generated world hold its rare content: a topic's last step, and suitable advice.

Critiques ask for both, and answers of the corpus seldom have them (`data/persona_world.py --rarity`). Measured on
samples of the SFT policy, it is the probability that RL starts from; after RL, it is what a method has learned. This
module is no command: recipes/sanity_checks.py, recipes/tiny_table.py and results/make/ import it.
"""

from data.persona_world import TOPICS, find_topic, read_sentences, review


def fraction(values: list[bool]) -> float | None:
    """The fraction of true values; None for an empty list."""
    return sum(values) / len(values) if values else None


def items_of(row: dict, answer: str) -> set[tuple]:
    """The items that an answer says: claims, advice and steps (`persona_world.Sentence`)."""
    return {item for sentence in read_sentences(row["persona"], answer) for item in sentence.items}


def item_of(persona: dict, edit: tuple[str, ...]) -> tuple | None:
    """The item of an answer that carries out an edit of `persona_world.review`; None if it only removes something."""
    if edit[0] == "say":
        return ("advice", edit[1], persona[edit[1]])
    return ("step", edit[1]) if edit[0] == "add" else None


def advised(row: dict, answer: str) -> list[bool]:
    """For each relevant attribute of the question, whether the answer gives the advice that suits the person."""
    items = items_of(row, answer)
    relevant = TOPICS[find_topic(row["question"])][0]
    return [("advice", attribute, row["persona"][attribute]) in items for attribute in relevant]


def measure(rows: list[dict]) -> dict[str, float | None]:
    """Fractions in [0, 1] over rows with persona, question and answer:

    last_step     answers that say the topic's last step
    advice        relevant attributes (two per question) for which the answer gives suitable advice
    advice_right  advice on relevant attributes that suits the person; None if no answer gives any
    wrong         answers with a value or advice that is not the person's
    """
    last_step = []
    advice = []
    advice_right = []
    wrong = []
    for row in rows:
        persona = row["persona"]
        relevant, _, steps = TOPICS[find_topic(row["question"])]
        items = items_of(row, row["answer"])
        last_step.append(("step", steps[-1]) in items)
        advice += advised(row, row["answer"])
        facts = [item for item in items if item[0] in ("claim", "advice")]
        wrong.append(any(persona[attribute] != value for _, attribute, value in facts))
        for kind, attribute, value in facts:
            if kind == "advice" and attribute in relevant:
                advice_right.append(persona[attribute] == value)
    return {
        "last_step": fraction(last_step),
        "advice": fraction(advice),
        "advice_right": fraction(advice_right),
        "wrong": fraction(wrong),
    }


def carried_out(rows: list[dict], edits: list[str]) -> dict[str, float | None]:
    """How much of an exact critique the edits of the rows' answers carry out, as fractions in [0, 1].

    edit_step    steps that the critique names and the edit says
    edit_advice  advice that the critique names and the edit gives
    """
    steps = []
    advice = []
    for row, edit in zip(rows, edits, strict=True):
        items = items_of(row, edit)
        requests = review(row["persona"], row["question"], row["answer"])[1]
        for request in requests[:3]:  # a critique names three
            if item := item_of(row["persona"], request):
                (steps if item[0] == "step" else advice).append(item in items)
    return {"edit_step": fraction(steps), "edit_advice": fraction(advice)}
