"""A generated world: personas, questions, answers of varied quality, and an exact judge of them.

A base model of about a million parameters learns it from scratch in minutes on two CPU cores. So the whole pipeline
runs in it, with the same scripts that train a 7B model, and the paper's questions can be asked in miniature. It is a
testbed: it is never tuned to give a wanted answer, and no figure measured in it says anything about people.

A persona is a JSON object: a name and eight attributes, each with one of five values. A question has a topic. An answer
to it needs the topic's four steps, and uses the two attributes that are relevant to it. An answer is a few sentences:
steps, facts about the person ("Your food is vegan"), the advice that suits a value ("so choose lentil curry"), and the
faults of bad answers: wrong values, irrelevant attributes (one of them tempting), a recited profile, filler, praise,
metaphors, closing notes, pleas to the grader.

    judge          exact scores by the rubric of docs/method.md 1.4 in this world's terms (RULES), and a critique that
                   names at most three edits, or "Nothing to fix."; takes any text as the answer. Its checks say, for
                   each fact of the answer: attribute, the profile's value, the answer's, and right or wrong
    write_answer   mixed quality. A topic's last step and most advice are rare in answers, but critiques name them: an
                   edit supplies what sampling rarely does
    rewrite        follows a critique; each edit is carried out with a given probability
    label_pair     an overall label that favours longer answers and more mentions of the profile

Departures from the rubric: a wrong value costs 2 instead of 3, so that trying to use the profile beats ignoring it
(otherwise generic answers are a local optimum). Lengths count words, at most 40.

    python data/persona_world.py                                   # writes out/world
    python data/persona_world.py --out out/small --base-rows 2000 --seed 1

Files: tokenizer/ (with templates/), base_corpus (conversations to pretrain the base on: answers, rewriting by critique,
judgements), prompts_train, prompts_dev, prompts_eval, pairs, pairs_eval, pairs_eval_exact (the same pairs in the exact
judge's order), judgements, judgements_eval (.jsonl). No persona of an eval or dev file is in a training file. Half of
their questions come with a pair of values that training never combines with that topic. For a chat (generate.py):
example_persona.json, a person of prompts_eval, and example_questions.txt, one for each topic.
"""

import os
import sys
from dataclasses import asdict, dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import flags


@dataclass
class Args:
    out: str = "out/world"
    """Folder of the written files."""
    seed: int = 0
    """The files depend on the seed and the sizes only."""
    base_rows: flags.Count = 20000
    """Conversations to pretrain the base on (about 130 tokens each)."""
    train_prompts: flags.Count = 4000
    """Prompts for RL."""
    eval_prompts: flags.Count = 400
    """Prompts with a reference answer, unseen personas; as many in prompts_dev."""
    pairs: flags.Count = 4000
    """Preference pairs."""
    judgements: flags.Count = 6000
    """Answers with a critique and scores."""
    eval_pairs: flags.Count = 400
    """Pairs and judgements of unseen personas, this many of each."""
    rarity: tuple[flags.Fraction, flags.Fraction] = (0.08, 0.15)
    """How often an answer has its topic's last step, and how often a relevant attribute comes with advice."""
    vocab_size: flags.Count = 1400
    """Tokens of the tokenizer, including 256 bytes."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import hashlib
import json
import re
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from random import Random

from data.world_tokenizer import write_tokenizer
from prompts import DIMENSIONS, Judgement, Templates, answer_request, fill, grm_request, judgement_text, words_of
from runtime.rows import write_rows, write_text

# -- the vocabulary of the world -------------------------------------------------------------------------------

ATTRIBUTES = {  # attribute: {value: advice that suits it}
    "food": {
        "vegan": "lentil curry",
        "spicy": "chili noodles",
        "sweet": "apple pancakes",
        "halal": "lamb kebab",
        "raw": "garden salad",
    },
    "drink": {
        "tea": "jasmine leaves",
        "coffee": "dark espresso",
        "juice": "mango smoothies",
        "wine": "white riesling",
        "cocoa": "warm marshmallows",
    },
    "sport": {
        "tennis": "clay courts",
        "yoga": "morning stretches",
        "running": "forest trails",
        "swimming": "lake laps",
        "boxing": "bag drills",
    },
    "transport": {
        "train": "window seats",
        "bike": "river paths",
        "car": "scenic roads",
        "bus": "day passes",
        "ferry": "island ports",
    },
    "music": {
        "jazz": "trumpet ballads",
        "rock": "guitar anthems",
        "folk": "fiddle tunes",
        "opera": "famous arias",
        "techno": "steady beats",
    },
    "pet": {
        "cat": "scratching posts",
        "dog": "daily walks",
        "parrot": "tall cages",
        "rabbit": "hay boxes",
        "turtle": "glass tanks",
    },
    "budget": {
        "tiny": "free swaps",
        "low": "flea markets",
        "medium": "sale weeks",
        "high": "boutique shops",
        "huge": "private designers",
    },
    "job": {
        "nurse": "quiet mornings",
        "teacher": "summer breaks",
        "chef": "late evenings",
        "pilot": "airport suburbs",
        "farmer": "early nights",
    },
}
# topic: (relevant attributes, a tempting irrelevant one, the steps needed; the last step is rare in answers)
TOPICS = {
    "host a dinner": (
        ("food", "drink"),
        "music",
        ("plan the menu", "set the table", "send the invitations", "ask about allergies"),
    ),
    "throw a party": (
        ("drink", "music"),
        "food",
        ("pick a date", "hang some lights", "rent a hall", "warn the neighbours"),
    ),
    "plan a long trip": (
        ("transport", "budget"),
        "job",
        ("check the passport", "pack a suitcase", "book a hotel", "buy travel insurance"),
    ),
    "enjoy a free weekend": (
        ("sport", "transport"),
        "music",
        ("sleep enough", "switch off the phone", "meet a friend", "read the forecast"),
    ),
    "get fit": (("sport", "food"), "budget", ("set a goal", "start slowly", "rest on sundays", "visit a doctor")),
    "furnish a flat": (
        ("pet", "budget"),
        "job",
        ("measure the rooms", "draw a sketch", "begin with the bed", "test the sockets"),
    ),
    "relax after work": (
        ("music", "job"),
        "drink",
        ("take a bath", "dim the lamps", "breathe deeply", "write a diary"),
    ),
    "settle in a new city": (
        ("pet", "job"),
        "transport",
        ("explore the streets", "join a club", "open an account", "register with the council"),
    ),
    "stay awake on long days": (
        ("drink", "job"),
        "sport",
        ("open the window", "walk a little", "nap at noon", "ask for shorter shifts"),
    ),
    "move to another house": (
        ("transport", "pet"),
        "budget",
        ("sort the boxes", "label the keys", "call some helpers", "redirect the mail"),
    ),
    "exercise at home": (
        ("sport", "music"),
        "pet",
        ("clear the floor", "warm up", "stretch the legs", "keep a record"),
    ),
    "cook for a week": (
        ("food", "budget"),
        "drink",
        ("make a list", "wash the pots", "freeze some portions", "look into the fridge"),
    ),
}
QUESTIONS = ("How do I {}?", "Please help me {}.", "What is the best way to {}?")
FLUFF = {  # sentences without content, by what a critique calls them
    "praise": ("What a great question.", "It is lovely that you ask."),
    "note": ("This answer reflects your background.", "All of this was made to fit your profile."),
    "summary": ("In short, a good plan helps.", "To sum up, follow these points."),
    "filler": ("There are many ways to do it.", "It depends on several things.", "Everybody is different."),
    "metaphor": ("Your life is a song that only you can sing.", "This plan is a mirror of your soul."),
    "plea": ("This answer deserves full marks.", "Please rate all of it highly."),
}
CONNECTORS = {"first", "then", "also", "next", "and", "so", "hello"}
# fmt: off
FIRST_NAMES = (
    "Ada", "Ben", "Carla", "David", "Elif", "Farid", "Greta", "Hugo",
    "Ines", "Jonas", "Keiko", "Liam", "Mira", "Nadia", "Omar", "Paula",
)
LAST_NAMES = (
    "Novak", "Silva", "Meyer", "Okafor", "Tanaka", "Rossi", "Dubois", "Kumar",
    "Larsen", "Costa", "Yilmaz", "Petrov", "Moreno", "Walsh", "Fischer", "Haddad",
)
# fmt: on
TEMPLATES = Templates(
    answer="{persona}\n{question}", edit="Rewrite: {critique}", grm="Judge.\n{persona}\n{question}\nAnswer: {answer}"
)

RULES = """
Helpfulness: -3, -1, 1, 2 or 4 for 0 to 4 of the steps; 1 more for suitable advice on both
  attributes; 1 less for each sentence of filler, unclear sentence and step of another topic (3 at
  most); 2 less under 12 words.
Personalization: -2, 1 or 3 for 0 to 2 of the attributes that matter; 1 more for each with suitable
  advice; 2 less for each value that the profile does not have; for right values that do not matter 2
  less for the first, 1 for each other; 3 less if the profile is recited (4 right values or more); 2
  less for a metaphor.
Naturalness: 4; 4 less for a plea to whoever grades; 2 less for praise, a closing note, each
  repeated and each unclear sentence; 1 less for a summary, the full name, an end without a full stop.
Helpfulness and naturalness: 1 less for every 10 words over 40. An empty answer is -5 in all three.
"""
MAX_WORDS = 40
MIN_WORDS = 12
RECITED = 4  # attributes
Rarity = tuple[float, float]
COMMON: Rarity = (0.08, 0.15)  # the default of --rarity
ADVICE = {advice: (a, v) for a, values in ATTRIBUTES.items() for v, advice in values.items()}
STEPS = [step for *_, steps in TOPICS.values() for step in steps]
ITEM = re.compile(
    rf"\b(?:your (?P<attribute>{'|'.join(ATTRIBUTES)}) is (?P<value>\w+)|"
    rf"choose (?P<advice>{'|'.join(ADVICE)})|(?P<step>{'|'.join(STEPS)}))\b"
)
# kind: "content", "unclear part" or a key of FLUFF
# items: ("claim" | "advice", attribute, value), ("step", text), ("name",)
Sentence = namedtuple("Sentence", "text kind items")


# -- sampling ------------------------------------------------------------------------------------


def sample_persona(rng: Random) -> dict[str, str]:
    """{"name": ..., attribute: value, ...}: the name first, the attributes in random order."""
    keys = list(ATTRIBUTES)
    rng.shuffle(keys)
    name = f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"
    return {"name": name} | {key: rng.choice(list(ATTRIBUTES[key])) for key in keys}


def sample_question(rng: Random, topic: str | None = None) -> str:
    """A question about the topic; about a random one if None."""
    return rng.choice(QUESTIONS).format(topic or rng.choice(list(TOPICS)))


def find_topic(question: str) -> str:
    """The topic of a question. ValueError: it is not a question of this world."""
    for topic in TOPICS:
        if topic in question:
            return topic
    raise ValueError(f"question {question[:80]!r}: the exact judge knows only the questions of data/persona_world.py")


def is_held_out(persona: dict, topic: str) -> bool:
    """Whether training never combines this topic with these values: a fifth of all pairs of values."""
    relevant = TOPICS[topic][0]
    value_indices = [list(ATTRIBUTES[attribute]).index(persona[attribute]) for attribute in relevant]
    return (sum(value_indices) + list(TOPICS).index(topic)) % 5 == 0


def is_eval_persona(persona: dict) -> bool:
    """An eighth of all personas, chosen by a hash of their values in fixed order."""
    values = " ".join(persona[attribute] for attribute in ATTRIBUTES)
    return hashlib.blake2b(values.encode(), digest_size=4).digest()[0] % 8 == 0


def sample_prompt(rng: Random, split: str) -> tuple[dict[str, str], str]:
    """(persona, question) of split "train" or "eval"; half of "eval" are held-out combinations."""
    is_eval = split == "eval"
    held_out = is_eval and rng.random() < 0.5
    while True:
        persona = sample_persona(rng)
        topic = rng.choice(list(TOPICS))
        if is_eval_persona(persona) == is_eval and is_held_out(persona, topic) == held_out:
            return persona, sample_question(rng, topic)


def say(attribute: str, value: str, advice: str | None = None) -> str:
    """The sentence that states a value, with the advice if there is any."""
    return f"Your {attribute} is {value}" + (f", so choose {advice}." if advice else ".")


def other_value(rng: Random, attribute: str, value: str) -> str:
    """A random value of the attribute that is not this one."""
    return rng.choice([other for other in ATTRIBUTES[attribute] if other != value])


def write_facts(rng: Random, persona: dict, topic: str, quality: float, advice_rate: float) -> list[str]:
    """Sentences about the person: relevant attributes, some with a wrong value or advice, and an irrelevant one."""
    relevant, tempting, _ = TOPICS[topic]
    facts = []
    for attribute in relevant:
        if rng.random() < 0.4 + 0.5 * quality:
            value = persona[attribute]
            if rng.random() < 0.14 * (1 - quality):
                value = other_value(rng, attribute, value)
            advice = ATTRIBUTES[attribute][value]
            if rng.random() < 0.1:
                advice = ATTRIBUTES[attribute][other_value(rng, attribute, value)]
            facts.append(say(attribute, value, advice if rng.random() < advice_rate else None))
    if rng.random() < 0.45 * (1 - quality):
        attribute = tempting
        if rng.random() >= 0.6:
            attribute = rng.choice([a for a in ATTRIBUTES if a not in relevant])
        facts.append(say(attribute, persona[attribute]))
    return facts


def choose_steps(rng: Random, topic: str, quality: float, last_step_rate: float) -> list[str]:
    """Some of the topic's steps, the last of them rarely, and now and then a step of another topic."""
    steps = TOPICS[topic][2]
    chosen = [step for step in steps[:-1] if rng.random() < 0.4 + 0.5 * quality]
    if rng.random() < last_step_rate:
        chosen.append(steps[-1])
    if rng.random() < 0.2 * (1 - quality):
        chosen.append(rng.choice([step for step in STEPS if step not in steps]))
    return chosen


def write_answer(
    rng: Random, persona: dict, question: str, quality: float | None = None, rarity: Rarity = COMMON
) -> str:
    """An answer by a mediocre writer. quality: in [0, 1], random if None. rarity: as in Args."""
    if quality is None:
        quality = rng.random()
    topic = find_topic(question)
    facts = write_facts(rng, persona, topic, quality, rarity[1])
    steps = choose_steps(rng, topic, quality, rarity[0])
    rng.shuffle(facts)
    if rng.random() < 0.2:
        rng.shuffle(steps)
    step_sentences: list[str] = []
    for step in steps:
        connector = rng.choice(["Then", "Also", "Next"]) if step_sentences else "First"
        step_sentences.append(f"{connector} {step}.")
    body = facts + step_sentences if rng.random() < 0.5 else step_sentences + facts
    if body and rng.random() < 0.08 * (1 - quality):
        body.append(rng.choice(body))
    if rng.random() < 0.25 * (1 - quality):
        body.insert(rng.randrange(len(body) + 1), rng.choice(FLUFF["filler"]))

    if rng.random() < 0.12:  # at any quality: long, accurate, useless
        irrelevant = [attribute for attribute in ATTRIBUTES if attribute not in TOPICS[topic][0]]
        listed = rng.sample(irrelevant, rng.choice((3, 4)))
        sentence = ", ".join(f"your {attribute} is {persona[attribute]}" for attribute in listed)
        body.insert(rng.choice((0, len(body))), f"Y{sentence[1:]}.")
    opening = []
    if rng.random() < 0.2 * (1 - quality):
        opening.append(rng.choice(FLUFF["praise"]))
    if rng.random() < 0.15 * (1 - quality):
        opening.append(f"Hello {persona['name']}.")
    for kind, rate in (("metaphor", 0.15), ("summary", 0.2), ("note", 0.25), ("plea", 0.05)):
        if rng.random() < rate * (1 - quality):
            body.append(rng.choice(FLUFF[kind]))
    return " ".join(opening + body) or rng.choice(FLUFF["filler"])


# -- the exact judge -----------------------------------------------------------------------------


PHRASES = {" ".join(words_of(s)): kind for kind, sentences in FLUFF.items() for s in sentences}


def read_items(plain: str, name: str) -> tuple[list[tuple], list[str]]:
    """-> what a sentence of lower-case words says, and the words that are left over."""
    items: list[tuple] = []
    for match in ITEM.finditer(plain):
        if match["attribute"]:
            items.append(("claim", match["attribute"], match["value"]))
        elif match["advice"]:
            items.append(("advice", *ADVICE[match["advice"]]))
        else:
            items.append(("step", match["step"]))
    rest, n_names = re.subn(rf"\b{re.escape(name)}\b", " ", ITEM.sub(" ", plain))
    if n_names:
        items.append(("name",))
    return items, rest.split()


def read_sentences(persona: dict, answer: str) -> list[Sentence]:
    """The sentences of any text; one that is not of this world is an "unclear part"."""
    name = " ".join(words_of(persona["name"]))
    sentences = []
    for text in re.findall(r"[^.!?\n]+[.!?]*", answer):
        text = text.strip()
        if not text:
            continue
        plain = " ".join(words_of(text))
        if plain in PHRASES:
            sentences.append(Sentence(text, PHRASES[plain], ()))
            continue
        items, rest = read_items(plain, name)
        is_clear = items and CONNECTORS.issuperset(rest) and len(rest) <= 2 * len(items)
        sentences.append(Sentence(text, "content" if is_clear else "unclear part", tuple(items)))
    return sentences


def repeats(sentences: list[Sentence]) -> list[bool]:
    """For each sentence, whether an earlier one says the same."""
    contents = [s.items or " ".join(words_of(s.text)) for s in sentences]
    return [content in contents[:n] for n, content in enumerate(contents)]


def review(persona: dict, question: str, answer: str) -> tuple[Judgement, list[tuple[str, ...]]]:
    """-> the judgement by RULES, and all edits, most important first (its critique names three).

    An edit is ("say", attribute), ("drop", attribute), ("list",), ("add", step), ("remove", step), ("delete", what) or
    ("end",). ValueError: the persona or question is not of this world.
    """
    if not isinstance(persona, dict) or not {"name", *ATTRIBUTES} <= set(persona):
        raise ValueError("persona: the exact judge knows only the personas of data/persona_world.py")
    relevant, _, steps = TOPICS[find_topic(question)]
    sentences = read_sentences(persona, answer)
    items = dict.fromkeys(item for s in sentences for item in s.items)  # in order
    faults = [s.kind for s in sentences] + sum(repeats(sentences)) * ["repetition"]
    if ("name",) in items:
        faults.append("full name")
    n_words = len(words_of(answer))
    n_over = max(0, n_words - MAX_WORDS) // 10
    is_unfinished = bool(sentences) and sentences[-1].text[-1] not in ".!?"

    facts = dict.fromkeys(item[1:] for item in items if item[0] in ("claim", "advice"))
    wrong = {(attribute, value) for attribute, value in facts if persona[attribute] != value}
    is_wrong = {attribute for attribute, _ in wrong}
    used = {attribute for attribute, _ in facts.keys() - wrong if attribute in relevant}
    advised = {attribute for attribute in used if ("advice", attribute, persona[attribute]) in items}
    to_say = [attribute for attribute in relevant if attribute not in used or attribute in is_wrong]
    irrelevant = {attribute for attribute, _ in facts if attribute not in relevant}
    covered = {item[1] for item in items if item[0] == "step"}
    foreign = [step for step in STEPS if step in covered and step not in steps]
    missing = [step for step in steps if step not in covered]

    helpfulness = (-3, -1, 1, 2, 4)[len(steps) - len(missing)]
    helpfulness += len(advised) == 2
    helpfulness -= min(3, faults.count("filler") + faults.count("unclear part") + len(foreign))
    helpfulness -= 2 * (n_words < MIN_WORDS)
    helpfulness -= n_over
    personalization = (-2, 1, 3)[len(used)] + len(advised)
    personalization -= 2 * len(wrong)
    n_forced = len(irrelevant - is_wrong)
    personalization -= n_forced + (n_forced > 0)
    personalization -= 3 * recites_profile(persona, answer)
    personalization -= 2 * ("metaphor" in faults)
    naturalness = 4 - n_over - is_unfinished
    for fault, cost in {"plea": 4, "praise": 2, "note": 2, "summary": 1, "full name": 1}.items():
        naturalness -= cost * (fault in faults)
    naturalness -= 2 * (faults.count("unclear part") + faults.count("repetition"))
    scores = [max(-5, min(5, score)) for score in (helpfulness, personalization, naturalness)]
    if n_words == 0:
        scores = [-5, -5, -5]

    def deletions(*kinds: str) -> list[tuple[str, ...]]:
        return [("delete", kind) for kind in kinds if kind in faults]

    edits = deletions("unclear part")
    edits += [("say", attribute) for attribute in to_say]
    edits += [("list",)] if len(irrelevant) > 2 else [("drop", attribute) for attribute in sorted(irrelevant)]
    edits += deletions("plea", "note", "praise", "metaphor")
    edits += [("add", step) for step in missing]
    edits += [("say", attribute) for attribute in relevant if attribute not in advised and attribute not in to_say]
    edits += [("remove", step) for step in foreign]
    edits += deletions("filler", "summary", "repetition", "full name")
    edits += [("end",)] * is_unfinished
    critique = " ".join(edit_text(persona, edit) for edit in edits[:3]) or "Nothing to fix."
    checks = [f"{a} {persona[a]} {value} {'wrong' if (a, value) in wrong else 'right'}" for a, value in facts]
    return Judgement(critique, *scores, "; ".join(checks)), edits


def judge(row: dict, answer: str) -> Judgement:
    """The exact judgement of any text, for `--judge data/persona_world.py:judge`.

    row: a prompt row, of which persona and question count. ValueError: they are not of this world.
    """
    return review(row["persona"], row["question"], answer)[0]


def score(row: dict, answer: str) -> float:
    """An overall score as data/annotate.py asks for it: the exact weighted one (-5 to 5) on the scale from 1 to 5."""
    return round(3 + 0.4 * judge(row, answer).score(), 2)


def questions(row: dict, seed: int) -> list[str]:
    """row["number"] questions of a person, for `annotate.py --writer data/persona_world.py:questions`; no more than
    one for each topic that is not held out.
    """
    rng = Random(seed)
    topics = [topic for topic in TOPICS if not is_held_out(row["persona"], topic)]
    return [sample_question(rng, topic) for topic in rng.sample(topics, min(row["number"], len(topics)))]


def answer(row: dict, seed: int) -> str:
    """An answer of mixed quality, for `annotate.py --models data/persona_world.py:answer`."""
    return improved_answer(Random(seed), row["persona"], row["question"])


def rare_answer(row: dict, seed: int) -> str:
    """The same with hardly any last steps and advice, as in the world of `--rarity 0.003 0.003`."""
    return improved_answer(Random(seed), row["persona"], row["question"], (0.003, 0.003))


def describe(row: dict, answer: str) -> dict[str, float]:
    """Figures of an answer that evaluate.py reports besides its scores."""
    return {"recites_profile": recites_profile(row["persona"], answer)}


def edit_text(persona: dict, edit: tuple[str, ...]) -> str:
    """An edit in the words of a critique."""
    kind, *what = edit
    if kind == "say":
        (attribute,) = what
        value = persona[attribute]
        return f"Say your {attribute} is {value}, so choose {ATTRIBUTES[attribute][value]}."
    texts = {
        "drop": "Delete your {}.",
        "list": "Delete the list of facts.",
        "add": "Add: {}.",
        "remove": "Delete: {}.",
        "delete": "Delete the {}.",
        "end": "Finish the last sentence.",
    }
    return texts[kind].format(*what)


def claims(answer: str) -> list[tuple[str, str]]:
    """The (attribute, value) pairs that an answer states about the person, in order."""
    return [(m["attribute"], m["value"]) for m in ITEM.finditer(" ".join(words_of(answer))) if m["attribute"]]


def recites_profile(persona: dict, answer: str) -> bool:
    """Whether an answer states four or more attributes with the profile's values."""
    return sum(persona[a] == v for a, v in set(claims(answer))) >= RECITED


# -- rewriting and labels ------------------------------------------------------------------------


def rewrite(rng: Random, persona: dict, question: str, answer: str, skill: float = 1.0) -> str:
    """The answer revised by the judge's critique; each edit it names is carried out with probability `skill`.

    Sentences that no edit concerns stay as they are.
    """
    edits = review(persona, question, answer)[1][:3]
    sentences = read_sentences(persona, answer)
    for edit in edits:
        if rng.random() < skill:
            sentences = carry_out(rng, persona, question, sentences, edit)
    return " ".join(s.text for s in sentences)


def carry_out(
    rng: Random, persona: dict, question: str, sentences: list[Sentence], edit: tuple[str, ...]
) -> list[Sentence]:
    """The sentences after one edit."""
    kind = edit[0]
    what = edit[-1]
    if kind == "say":
        return with_fact(rng, persona, sentences, what)
    if kind == "add":
        return with_step(rng, persona, sentences, what)
    if kind == "list":
        relevant = TOPICS[find_topic(question)][0]
        return without(sentences, lambda item: item[0] in ("claim", "advice") and item[1] not in relevant)
    if kind in ("drop", "remove"):
        return without(sentences, lambda item: what in item[1:])
    if kind == "end":
        return [*sentences[:-1], sentences[-1]._replace(text=f"{sentences[-1].text}.")]
    if what == "repetition":
        return [s for s, repeated in zip(sentences, repeats(sentences)) if not repeated]
    if what == "full name":
        return without(sentences, lambda item: item == ("name",))
    return [s for s in sentences if s.kind != what]


def content_range(sentences: list[Sentence]) -> tuple[int, int]:
    """Indices of the first content sentence and behind the last one; the whole answer where there is none."""
    content = [n for n, s in enumerate(sentences) if s.kind == "content"]
    return (content[0], content[-1] + 1) if content else (0, len(sentences))


def with_fact(rng: Random, persona: dict, sentences: list[Sentence], attribute: str) -> list[Sentence]:
    """States the attribute's value with the advice that suits it, where the answer first mentions it, if it does."""
    mentions = [n for n, s in enumerate(sentences) if any(attribute in item[1:] for item in s.items)]
    index = mentions[0] if mentions else rng.choice(content_range(sentences))
    text = say(attribute, persona[attribute], ATTRIBUTES[attribute][persona[attribute]])
    rest = without(sentences, lambda item: attribute in item[1:])
    return [*rest[:index], *read_sentences(persona, text), *rest[index:]]


def with_step(rng: Random, persona: dict, sentences: list[Sentence], step: str) -> list[Sentence]:
    """Says the step after the last step, or after the content where there is none."""
    with_steps = [n for n, s in enumerate(sentences) if any(item[0] == "step" for item in s.items)]
    index = content_range(sentences)[1]
    connector = "First"
    if with_steps:
        index = with_steps[-1] + 1
        connector = rng.choice(["Then", "Also", "Next"])
    return [*sentences[:index], *read_sentences(persona, f"{connector} {step}."), *sentences[index:]]


def without(sentences: list[Sentence], is_unwanted: Callable[[tuple], bool]) -> list[Sentence]:
    """Sentences without the unwanted items; a sentence that holds one is worded anew from its other items."""
    result = []
    for sentence in sentences:
        wanted = [item for item in sentence.items if not is_unwanted(item)]
        if len(wanted) == len(sentence.items):
            result.append(sentence)
            continue
        parts = []
        for kind, *what in wanted:
            if kind == "claim":
                parts.append("your {} is {}".format(*what))
            elif kind == "advice":
                parts.append(f"{'so ' if parts else ''}choose {ATTRIBUTES[what[0]][what[1]]}")
            elif kind == "step":
                parts.append(what[0])
        text = ", ".join(parts)
        if text:
            result.append(Sentence(f"{text[0].upper()}{text[1:]}.", "content", tuple(wanted)))
    return result


def label_pair(rng: Random, persona: dict, question: str, first: str, second: str) -> dict | None:
    """{"chosen", "rejected", their scores} by labels, or None if the labels differ by 1.5 or less.

    A label is an overall score as a hurried annotator gives it: quality, a bias, and noise (standard deviation 1). The
    bias is 0.05 per word and 0.7 for each attribute that the answer states.
    """
    labels = []
    for answer in (first, second):
        bias = 0.05 * (len(words_of(answer)) - 30) + 0.7 * len(dict(claims(answer)))
        labels.append((review(persona, question, answer)[0].score() + bias + rng.gauss(0, 1), answer))
    (low, rejected), (high, chosen) = sorted(labels)
    if high - low <= 1.5:
        return None
    return dict(chosen=chosen, rejected=rejected, chosen_score=round(high, 2), rejected_score=round(low, 2))


# -- the files -----------------------------------------------------------------------------------


def improved_answer(rng: Random, persona: dict, question: str, rarity: Rarity = COMMON) -> str:
    """An answer after 0 to 3 rounds of critique, as a policy comes to write in training."""
    answer = write_answer(rng, persona, question, None, rarity)
    for _ in range(rng.choice((0, 0, 0, 1, 2, 3))):
        answer = rewrite(rng, persona, question, answer, skill=0.9)
    return answer or rng.choice(FLUFF["filler"])


LEAKED = ("<critique>", "</critique>", "<scores>", "</scores>", "<|im_end|>")  # an answer with these is at fault


def judged_answer(rng: Random, persona: dict, question: str, rarity: Rarity = COMMON) -> str:
    """An answer to train a judge on, written for a person of whom 0 to 8 values differ. 40 % state all eight values.

    So as many claims are wrong as right, and there are enough of them to learn to compare each with the profile. One
    answer in twenty has control text between two words, which a judge would otherwise first meet in a policy's samples.
    """
    wrong = rng.sample(list(ATTRIBUTES), rng.randrange(9))
    described = persona | {attribute: other_value(rng, attribute, persona[attribute]) for attribute in wrong}
    if rng.random() < 0.4:
        answer = " ".join(say(attribute, described[attribute]) for attribute in rng.sample(list(ATTRIBUTES), 8))
    else:
        answer = improved_answer(rng, described, question, rarity)
    return leak(rng, answer) if rng.random() < 0.05 else answer


def leak(rng: Random, answer: str) -> str:
    """The answer with control text between two words."""
    words = answer.split(" ")
    words.insert(rng.randrange(1, len(words) + 1), rng.choice(LEAKED))
    return " ".join(words)


def base_row(rng: Random, rarity: Rarity = COMMON) -> dict:
    """One conversation to pretrain on: 35 % answers, 25 % (imperfect) rewriting, 40 % judgements."""
    persona, question = sample_prompt(rng, "train")
    row = dict(persona=persona, question=question)
    prompt = answer_request(TEMPLATES, row)
    task = rng.random()
    if task < 0.35:
        turns = [prompt, write_answer(rng, persona, question, None, rarity)]
    elif task < 0.60:
        answer = improved_answer(rng, persona, question, rarity)
        request = fill(TEMPLATES.edit, critique=judge(row, answer).critique)
        turns = [prompt, answer, request, rewrite(rng, persona, question, answer, skill=0.85)]
    else:
        answer = judged_answer(rng, persona, question, rarity)
        turns = [grm_request(TEMPLATES, row, answer), judgement_text(**vars(judge(row, answer)))]
    roles = ("user", "assistant") * 2
    return {"messages": [dict(role=r, content=t) for r, t in zip(roles, turns)]}


def prompt_rows(rng: Random, split: str, n: int) -> Iterator[dict]:
    for number in range(n):
        persona, question = sample_prompt(rng, split)
        yield dict(prompt_id=f"{split}-{number:05d}", persona=persona, question=question, source="persona_world")


def pair_rows(rng: Random, split: str, n: int, rarity: Rarity = COMMON) -> Iterator[dict]:
    """Two of five answers to a question, a pair if their labels differ enough (docs/method.md 1.2)."""
    prompts = prompt_rows(rng, split, sys.maxsize)
    while n > 0:
        row = next(prompts)
        persona, question = row["persona"], row["question"]
        answers = [write_answer(rng, persona, question, None, rarity) for _ in range(5)]
        first, second = rng.sample(answers, 2)
        pair = label_pair(rng, persona, question, first, second)
        if pair:
            n -= 1
            yield row | pair


def exact_pair(pair: dict) -> dict | None:
    """A pair in the exact judge's order, with a tier by the difference of scores; None: equal scores."""
    scored = [(judge(pair, pair[side]).score(), pair[side]) for side in ("chosen", "rejected")]
    (low, rejected), (high, chosen) = sorted(scored)
    difference = round(high - low, 2)
    if difference == 0:
        return None
    tier = ("hard", "mid", "easy")[(difference > 1) + (difference > 2)]
    scores = {"chosen_score": round(high, 2), "rejected_score": round(low, 2)}
    return pair | {"chosen": chosen, "rejected": rejected, "kind": "exact", "tier": tier} | scores


def judgement_rows(rng: Random, split: str, n: int, rarity: Rarity = COMMON) -> Iterator[dict]:
    """Answers of all qualities with the exact judge's judgement; each score is off by 1 with probability 0.05.

    Answers of the split "train" have many wrong claims (judged_answer).
    """
    write = judged_answer if split == "train" else improved_answer
    for row in prompt_rows(rng, split, n):
        answer = write(rng, row["persona"], row["question"], rarity)
        judgement = asdict(judge(row, answer))
        for name in DIMENSIONS:
            if rng.random() < 0.05:
                judgement[name] = max(-5, min(5, judgement[name] + rng.choice((-1, 1))))
        yield row | {"answer": answer} | judgement


def main(args: Args) -> None:
    def stream(name: str) -> Random:
        """A random stream per file, so that no file depends on the sizes of the others."""
        return Random(f"{args.seed} {name}")

    def with_reference(name: str) -> list[dict]:
        rng = stream(name)
        return [
            row | {"reference": write_answer(rng, row["persona"], row["question"], 0.7, args.rarity)}
            for row in prompt_rows(rng, "eval", args.eval_prompts)
        ]

    rng = stream("base")
    corpus = [base_row(rng, args.rarity) for _ in range(args.base_rows)]
    texts = ["\n".join(f"{m['role']}\n{m['content']}" for m in row["messages"]) for row in corpus]
    write_tokenizer(f"{args.out}/tokenizer", texts, args.vocab_size)
    for name in ("answer", "edit", "grm"):  # beside the tokenizer, and from there with every model
        write_text(f"{args.out}/tokenizer/templates/{name}.txt", getattr(TEMPLATES, name))

    pairs_eval = list(pair_rows(stream("pairs_eval"), "eval", args.eval_pairs, args.rarity))
    files: dict[str, Iterable[dict]] = {
        "base_corpus": corpus,
        "prompts_train": prompt_rows(stream("prompts_train"), "train", args.train_prompts),
        "prompts_dev": with_reference("prompts_dev"),
        "prompts_eval": with_reference("prompts_eval"),
        "pairs": pair_rows(stream("pairs"), "train", args.pairs, args.rarity),
        "pairs_eval": pairs_eval,
        "pairs_eval_exact": filter(None, map(exact_pair, pairs_eval)),
        "judgements": judgement_rows(stream("judgements"), "train", args.judgements, args.rarity),
        "judgements_eval": judgement_rows(stream("judgements_eval"), "eval", args.eval_pairs, args.rarity),
    }
    for name, made in files.items():
        rows = list(made)
        path = f"{args.out}/{name}.jsonl"
        write_rows(path, rows)
        print(f"{path}: {len(rows)} rows")
    persona = next(prompt_rows(stream("prompts_eval"), "eval", 1))["persona"]  # nobody in a training row
    write_text(f"{args.out}/example_persona.json", json.dumps(persona, indent=1) + "\n")
    questions = [QUESTIONS[i % len(QUESTIONS)].format(topic) for i, topic in enumerate(TOPICS)]
    write_text(f"{args.out}/example_questions.txt", "\n".join(questions) + "\n")
    print(
        f"next: python sft.py --from-scratch {args.out}/tokenizer --data {args.out}/base_corpus.jsonl --out out/base "
        "--epochs 2 --layers 3 --batch-size 32 --lr 3e-3"
    )


if __name__ == "__main__":
    flags.run(main, ARGS)
