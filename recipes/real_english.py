"""Does a real model learn from edits what it never says? Rows, judge and table of recipes/real_english.sh.

Each person has one concern (rain, money, ...). An answer should have 15 to 30 words and say one thing that serves the
concern, as the critique dictates it: "Tell them to check the forecast." What it is depends on concern and kind
of question, so that a policy can learn it. Every concern has one thing that samples of the SFT policy often say, one
that they seldom say, and one that they say hardly ever. Their rates are measured before RL; one run has all three.

    python recipes/real_english.py questions --out DATA                         # questions.jsonl, templates
    python recipes/real_english.py sft --answers ANSWERS.jsonl --out DATA       # sft.jsonl: answers and rewrites
    python recipes/real_english.py prompts --answers SAMPLES.jsonl --out DATA   # prompts_train, prompts_dev, rates.json
    python recipes/real_english.py gate --answers RUN --out DATA                # do edits do what critiques say?
    python recipes/real_english.py table --answers PPO=ANSWERS.jsonl CPE=OTHER.jsonl --out OUT

ANSWERS.jsonl is the output of generate.py for these questions or prompts, RUN a run folder of ppo_cpe.py.
"""

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluation.tables import markdown_table
from prompts import Judgement, Templates, answer_request, fill
from runtime import flags
from runtime.rows import read_rows, step_files, write_rows, write_text


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["questions", "sft", "prompts", "gate", "table"]]
    """The part of the recipe to run, see above."""
    out: str = "out/real_english/data"
    """Folder of the written files."""
    answers: tuple[str, ...] = ()
    """Output of generate.py; for gate a run folder; for table NAME=FILE of each policy."""
    people: flags.Count = 100
    """Names in training; each has all concerns and questions. prompts_dev has a quarter as many others."""
    seed: int = 0
    """Order and choice of rows."""


# Concerns, with what may be said for them: {concern: (what the persona says, {word: clause with this word})}. A clause
# follows "Tell them to". How rare each word is, is measured.
CONCERNS: dict[str, tuple[str, dict[str, str]]] = {
    "rain": (
        "I hate getting wet in the rain.",
        {
            "weather": "look at the weather first",
            "umbrella": "take an umbrella",
            "indoors": "stay indoors if it pours",
            "jacket": "wear a light jacket",
            "forecast": "check the forecast",
            "boots": "put on rubber boots",
            "raincoat": "pack a raincoat",
            "shelter": "know where the next shelter is",
        },
    ),
    "money": (
        "I have very little money this month.",
        {
            "budget": "set a small budget",
            "free": "look for something free",
            "cheap": "choose the cheap option",
            "discount": "ask for a discount",
            "coupons": "bring coupons",
            "borrow": "borrow what is missing",
            "receipt": "keep each receipt",
            "leftovers": "use up leftovers",
        },
    ),
    "back": (
        "I have a bad back that hurts.",
        {
            "rest": "rest in between",
            "stretch": "stretch before and after",
            "posture": "mind your posture",
            "chair": "sit on a firm chair",
            "cushion": "bring a cushion",
            "lifting": "do no heavy lifting",
            "knees": "bend the knees, not the back",
            "backpack": "carry a backpack on both shoulders",
        },
    ),
    "dog": (
        "I have a young dog that comes along everywhere.",
        {
            "walk": "plan a walk with the dog",
            "park": "stop at a park on the way",
            "leash": "bring the leash",
            "treats": "carry some treats",
            "bowl": "fill a bowl with water",
            "toy": "pack a toy",
            "vet": "ask the vet first",
            "towel": "keep an old towel ready for paws",
        },
    ),
    "allergy": (
        "I am allergic to pollen and nuts.",
        {
            "health": "think of your health",
            "doctor": "ask a doctor",
            "avoid": "avoid what makes you sneeze",
            "labels": "read all labels",
            "pills": "take your pills along",
            "tissues": "bring tissues",
            "windows": "keep the windows shut",
            "ingredients": "ask for the ingredients",
        },
    ),
    "sleep": (
        "I sleep badly and am always tired.",
        {
            "relax": "leave time to relax",
            "early": "finish early",
            "nap": "take a short nap",
            "tea": "drink herbal tea instead of coffee",
            "screens": "turn off all screens at nine",
            "alarm": "set no alarm the next day",
            "pillow": "buy a better pillow",
            "curtains": "close the curtains",
        },
    ),
    "noise": (
        "I cannot stand noise and crowds.",
        {
            "quiet": "look for a quiet place",
            "peaceful": "choose a peaceful hour",
            "crowds": "keep away from crowds",
            "headphones": "wear headphones",
            "earplugs": "carry earplugs",
            "weekday": "go on a weekday",
            "library": "try the library",
            "corner": "ask for a table in the corner",
        },
    ),
    "children": (
        "I look after two small children all day.",
        {
            "kids": "let the kids help",
            "fun": "make it fun for everybody",
            "games": "think of some games",
            "snacks": "pack snacks",
            "stroller": "take the stroller",
            "crayons": "bring crayons",
            "babysitter": "ask a babysitter",
            "playground": "end at a playground",
        },
    ),
}
CONCERN_OF = {word: concern for concern, (_, clauses) in CONCERNS.items() for word in clauses}
QUESTIONS = {
    "out": ("What should I do on Saturday?", "Where could I go this weekend?", "What is a good day trip?"),
    "home": (
        "How do I plan a nice evening at home?",
        "What could I do at home today?",
        "How do I spend a free evening?",
    ),
    "food": ("What should I have for dinner?", "What is a good lunch for today?", "How do I eat better?"),
}
KIND_OF = {question: kind for kind, questions in QUESTIONS.items() for question in questions}
BINS = {"common": (0.02, 0.2), "middle": (0.002, 0.02), "rare": (0.0, 0.0005)}  # rate in samples of the SFT policy
NAMES = tuple(
    f"{first} {last}"
    for first in (
        "Mia",
        "Tom",
        "Lea",
        "Sam",
        "Ada",
        "Ben",
        "Zoe",
        "Max",
        "Eva",
        "Jon",
        "Ida",
        "Leo",
        "Amy",
        "Dan",
        "Kim",
    )
    for last in ("Adams", "Baker", "Clark", "Davis", "Evans", "Foster", "Green", "Hill", "Jones", "King")
)
# Clauses that SFT teaches the policy to insert; no word of CONCERNS is among them (tests/test_real_english.py)
POOL = (
    "write a short list", "call a neighbor", "charge the phone", "buy fresh flowers", "learn a new word",
    "thank the host", "water the plants", "sweep the floor", "light a candle", "open a map", "wear comfortable shoes",
    "take a few photos", "read one chapter", "say hello to a stranger", "bring a pencil", "tidy the desk",
    "fold the laundry", "sing a song", "count to ten", "wash the dishes", "fix the lamp", "visit a museum",
    "ride the bus", "try a new recipe", "bake some bread", "clean the mirror", "send a postcard", "feed the birds",
    "draw a picture", "paint the fence", "oil the bike", "sort old letters", "hang up the coat", "lock the door",
    "polish the spoons", "watch the sunset", "join a choir", "plant some herbs", "mend a sock", "practice the piano",
)  # fmt: skip
INSERTIONS = ("You should {}.", "Also, {}.", "Remember to {}.", "It helps to {}.")
ANSWER_TEMPLATE = "{persona} {question} Give me your advice in one or two short sentences.\n"
EDIT_TEMPLATE = "{critique} Rewrite the answer so that this is done. Output only the new answer.\n"
TEMPLATES = Templates(answer=ANSWER_TEMPLATE, edit=EDIT_TEMPLATE)
MIN_WORDS, MAX_WORDS = 15, 30
SENTENCE = re.compile(r"[^.!?]+[.!?]+")


# -- the judge ---------------------------------------------------------------------------------------------------------


def words_in(answer: str) -> set[str]:
    return set(re.findall(r"[a-z]+", answer.lower()))


def concerns_served(answer: str) -> set[str]:
    """The concerns of which the answer says a word."""
    return {CONCERN_OF[word] for word in words_in(answer) & CONCERN_OF.keys()}


def form_faults(row: dict, answer: str) -> list[tuple[str, int]]:
    """(request, points) for each fault of form: length, ending, list, name, repetition."""
    n_words = len(answer.split())
    sentences = [" ".join(re.findall(r"[a-z]+", s)) for s in re.split(r"[.!?]+", answer.lower()) if s.strip()]
    faults = []
    if n_words > MAX_WORDS:
        faults.append((f"Cut it to {MAX_WORDS} words; it has {n_words}.", min(8, 1 + (n_words - MAX_WORDS) // 5)))
    if n_words < MIN_WORDS:
        faults.append((f"Say a little more, at least {MIN_WORDS} words.", 4))
    if not answer.rstrip().endswith((".", "!", "?")):
        faults.append(("End with a whole sentence.", 3))
    if re.search(r"^\s*([-*\u2022]|\d+[.)])\s", answer, re.MULTILINE):
        faults.append(("Write sentences, not a list.", 4))
    if any(re.search(rf"\b{re.escape(name)}\b", answer) for name in row["name"].split()):
        faults.append(("Do not use the person's name.", 3))
    if len(set(sentences)) < len(sentences):
        faults.append(("Say nothing twice.", 4))
    return faults


def judge(row: dict, answer: str) -> Judgement:
    """Helpfulness and naturalness by form, personalization by the word that the prompt's target asks for.

    row: a prompt row with `target`, the word, or a row of `questions` without one.
    """
    faults = form_faults(row, answer)
    target = row.get("target")
    said = target is None or target in words_in(answer)
    foreign = concerns_served(answer) - {row["concern"]}
    requests = [] if said else [f"Tell them to {CONCERNS[row['concern']][1][target]}."]
    requests += [request for request, _ in faults]
    n_points = sum(points for _, points in faults)
    personalization = (5 if said else -2) - 2 * len(foreign)
    critique = " ".join(requests[:2]) or "Nothing to fix."
    return Judgement(critique, max(-5, 5 - n_points), max(-5, personalization), max(-5, 5 - n_points))


# -- rows --------------------------------------------------------------------------------------------------------------


def question_rows(names: Sequence[str], seed: int, split: str) -> list[dict]:
    """A row per name and concern, with a random question."""
    rng = Random(f"{seed} {split}")
    rows = []
    for name in names:
        for concern in CONCERNS:
            question = rng.choice(QUESTIONS[rng.choice(list(QUESTIONS))])
            row = dict(prompt_id=f"{split}{len(rows)}", question=question, concern=concern, name=name)
            rows.append(row | {"persona": f"My name is {name}. {CONCERNS[concern][0]}"})
    rng.shuffle(rows)
    return rows


def names_of(people: int) -> tuple[list[str], list[str]]:
    """Names for training and others for dev. ValueError: too many people."""
    n_dev = max(1, people // 4)
    if people + n_dev > len(NAMES):
        raise ValueError(f"--people {people}: expected at most {len(NAMES) * 4 // 5}")
    names = list(NAMES)
    Random(0).shuffle(names)
    return names[:people], names[people : people + n_dev]


def insert(rng: Random, answer: str, clause: str) -> str:
    """The answer with a sentence that says the clause, at its end or before its last sentence."""
    sentences = SENTENCE.findall(answer)
    place = rng.choice((len(sentences), max(0, len(sentences) - 1)))
    sentences.insert(place, f" {rng.choice(INSERTIONS).format(clause)}")
    return " ".join(s.strip() for s in sentences)


def sft_rows(answers: list[dict], seed: int) -> list[dict]:
    """Conversations: the model's own answers of good form, and rewrites of them by critiques.

    Half of the good answers are learned as they are. The others are answered by a critique: add a clause of POOL (two
    of three), or nothing to fix. Answers that are too long, and become good when cut, show how to cut.
    """
    rng = Random(seed)
    rows = []
    for row in answers:
        prompt = answer_request(TEMPLATES, row)
        faults = form_faults(row, row["text"])
        cut = "".join(SENTENCE.findall(row["text"])[:2]).strip()
        if not faults and rng.random() < 0.5:
            turns = [prompt, row["text"]]
        elif not faults:
            clause = rng.choice(POOL)
            critique, edit = f"Tell them to {clause}.", insert(rng, row["text"], clause)
            if rng.random() < 1 / 3:
                critique, edit = "Nothing to fix.", row["text"]
            turns = [prompt, row["text"], fill(TEMPLATES.edit, critique=critique), edit]
        elif not form_faults(row, cut):
            critique = " ".join(request for request, _ in faults[:2])
            turns = [prompt, row["text"], fill(TEMPLATES.edit, critique=critique), cut]
        else:
            continue
        roles = ("user", "assistant") * 2
        rows.append({"messages": [dict(role=role, content=text) for role, text in zip(roles, turns)]})
    return rows


def says(rows: list[dict], word: str) -> float:
    """The fraction of answers with the word."""
    return float(np.mean([word in words_in(row["text"]) for row in rows])) if rows else 0.0


def choose_targets(samples: list[dict], seed: int) -> dict[str, dict[str, tuple[str, str]]]:
    """{concern: {kind of question: (bin, word)}}, by how often samples for this concern say its words.

    The bins go round, so that each is asked for by each kind of question. Where no word is in a bin, the word is taken
    whose rate is nearest to it.
    """
    rng = Random(seed)
    targets: dict[str, dict[str, tuple[str, str]]] = {}
    for number, (concern, (_, clauses)) in enumerate(CONCERNS.items()):
        rows = [row for row in samples if row["concern"] == concern]
        rates = {word: says(rows, word) for word in rng.sample(list(clauses), len(clauses))}
        targets[concern] = {}
        for shift, (name, (low, high)) in enumerate(BINS.items()):
            word = min(rates, key=lambda word: max(low - rates[word], rates[word] - high, 0))
            kind = list(QUESTIONS)[(number + shift) % len(QUESTIONS)]
            targets[concern][kind] = (name, word)
            del rates[word]
    return targets


def with_targets(rows: list[dict], targets: dict[str, dict[str, tuple[str, str]]]) -> list[dict]:
    aimed = []
    for row in rows:
        bin_name, word = targets[row["concern"]][KIND_OF[row["question"]]]
        aimed.append(row | {"bin": bin_name, "target": word})
    return aimed


def said_by_bin(rows: list[dict]) -> dict[str, float]:
    """The fraction of answers that say their target, by bin."""
    said = defaultdict(list)
    for row in rows:
        said[row["bin"]].append(row["target"] in words_in(row["text"]))
    return {name: float(np.mean(said[name])) for name in BINS if said[name]}


def gate(run: str) -> dict[str, float]:
    """By bin, the fraction of edits that say the target, where the critique named it."""
    edits = []
    for _, path in step_files(run, "rollouts"):
        for row in read_rows(path, "object"):
            if row["edit"] and row["target"] not in words_in(row["answer"]):
                edits.append(row | {"text": row["edit"]["answer"]})
    return said_by_bin(edits)


# -- the table ---------------------------------------------------------------------------------------------------------


def figures_of(rows: list[dict]) -> dict[str, float]:
    """Figures of a policy's answers to prompts_dev: targets said by bin, words of other concerns, score, length."""
    figures = said_by_bin(rows)
    figures["foreign"] = float(np.mean([bool(concerns_served(row["text"]) - {row["concern"]}) for row in rows]))
    figures["score"] = float(np.mean([judge(row, row["text"]).score() for row in rows]))
    figures["words"] = float(np.mean([len(row["text"].split()) for row in rows]))
    return figures


COLUMNS = {**{name: f"{name} words said, %" for name in BINS}, "foreign": "for another's concern, %"}


def write_table(answers: Sequence[str], out: str) -> None:
    """Writes real_english.md and .json into the folder out. answers: NAME=FILE; a name may have several, its seeds."""
    of_name = defaultdict(list)
    for text in answers:
        name, _, file = text.partition("=")
        of_name[name].append(figures_of(read_rows(file, "object")))
    rows = []
    for name, runs in of_name.items():
        cells = [over_seeds(runs, key, 100, 1) for key in COLUMNS]
        cells += [over_seeds(runs, key, 1, 2) for key in ("score", "words")]
        rows.append([name, str(len(runs)), *cells])
    table = "\n".join(markdown_table(["", "seeds", *COLUMNS.values(), "score", "words"], rows))
    write_text(f"{out}/real_english.md", table + "\n")
    write_text(f"{out}/real_english.json", json.dumps(of_name, indent=1) + "\n")
    print(f"{table}\n\nwritten: {out}/real_english.md, real_english.json")


def over_seeds(runs: list[dict], key: str, factor: float, digits: int) -> str:
    """Text of the mean, and of the standard deviation over seeds if there are several."""
    values = [factor * run[key] for run in runs]
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(runs) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def main(args: Args) -> None:
    os.makedirs(args.out, exist_ok=True)
    train, dev = names_of(args.people)
    if args.command == "questions":
        write_text(f"{args.out}/answer.txt", TEMPLATES.answer)
        write_text(f"{args.out}/edit.txt", TEMPLATES.edit)
        write_rows(f"{args.out}/questions.jsonl", question_rows(train, args.seed, "train"))
    elif not args.answers:
        raise ValueError("--answers: expected output of generate.py")
    elif args.command == "table":
        write_table(args.answers, args.out)
    elif args.command == "gate":
        passed = gate(args.answers[0])
        write_text(f"{args.out}/gate.json", json.dumps(passed, indent=1) + "\n")
        print("edits that say the target: " + ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in passed.items()))
    elif args.command == "sft":
        rows = sft_rows(read_rows(args.answers[0], "object"), args.seed)
        write_rows(f"{args.out}/sft.jsonl", rows)
        print(f"{args.out}/sft.jsonl: {len(rows)} rows, {sum(len(r['messages']) > 2 for r in rows)} of them rewrites")
    else:
        samples = read_rows(args.answers[0], "object")
        targets = choose_targets(samples, args.seed)
        for split, names in (("train", train), ("dev", dev)):
            rows = with_targets(question_rows(names, args.seed, split), targets)
            write_rows(f"{args.out}/prompts_{split}.jsonl", rows)
        measured = said_by_bin(with_targets(samples, targets))
        words = {name: [word for kinds in targets.values() for n, word in kinds.values() if n == name] for name in BINS}
        write_text(f"{args.out}/rates.json", json.dumps({"rates": measured, "words": words}, indent=1) + "\n")
        print("\n".join(f"{name}: {100 * measured[name]:.2f} % ({', '.join(words[name])})" for name in measured))


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
