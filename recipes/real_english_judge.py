"""The rule judge of recipes/real_english.sh, and what its people may be told.

Runs keep this file's digest and go on only with the same one, so what is not the judge is in real_english.py.
"""

import re

from prompts import Judgement

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
CLAUSE_WORDS = {word for _, clauses in CONCERNS.values() for word in clauses}
MIN_WORDS, MAX_WORDS = 15, 30
SENTENCE = re.compile(r"[^.!?]+[.!?]*")
NEGATION = {"not", "no", "never", "don", "avoid", "without", "cannot"}
REFUSAL = re.compile(r"\b(sorry|as an ai|language model|text-based|can't help|cannot help)\b", re.IGNORECASE)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def words_in(text: str) -> set[str]:
    return set(words_of(text))


def says(answer: str, word: str) -> bool:
    """Whether a sentence of four words or more has the word, neither negated nor in a list of such words."""
    for sentence in map(words_of, SENTENCE.findall(answer)):
        before = set(sentence[: sentence.index(word)]) if word in sentence else set()
        if word in sentence and len(sentence) >= 4 and not before & NEGATION and len(CLAUSE_WORDS & set(sentence)) <= 2:
            return True
    return False


def form_faults(row: dict, answer: str) -> list[tuple[str, int]]:
    """(request, points) for each fault of form: refusal, length, ending, list, name, repetition."""
    n_words = len(answer.split())
    sentences = [" ".join(words_of(s)) for s in re.split(r"[.!?]+", answer) if s.strip()]
    faults = []
    if REFUSAL.search(answer):
        faults.append(("Answer the question.", 8))
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
    """Helpfulness and naturalness by form, personalization by whether the prompt's target is said.

    row: a prompt row with `target`, the word that is asked for. Of two requests, the first is for the target.
    """
    faults = form_faults(row, answer)
    said = says(answer, row["target"])
    requests = [] if said else [f"Tell them to {CONCERNS[row['concern']][1][row['target']]}."]
    requests += [request for request, _ in faults]
    form = max(-5, 5 - sum(points for _, points in faults))
    return Judgement(" ".join(requests[:2]) or "Nothing to fix.", form, 5 if said else -2, form)
