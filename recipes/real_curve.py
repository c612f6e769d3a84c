"""English rows, an exact rule judge with critiques, and the learning curve of recipes/real_curve.sh.

    python recipes/real_curve.py rows --out out/real_curve/data       # prompts_train.jsonl, prompts_dev.jsonl
    python ppo_cpe.py --judge recipes/real_curve.py:judge ...
    python recipes/real_curve.py curve --runs PPO=out/real_curve/ppo CPE=out/real_curve/cpe

A rule and no taste: an answer to one of these questions shall name what the person likes that the question is about, be
of 20 to 60 words, end with a full stop, and leave out the person's name, lists and talk about itself. A model of 135M
can learn that in minutes; the critique says which of the rules are broken.
"""

import os
import random
import re
import sys
from dataclasses import dataclass

import numpy as np
import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from prompts import Judgement
from recipes import draw
from runtime import flags
from runtime.rows import read_rows, write_rows, write_text


@dataclass
class Rows:
    """Writes the prompts."""

    out: str = "out/real_curve/data"
    """Folder of the written files."""
    rows: flags.Count = 400
    """Prompts to train on; a tenth as many, of other people, in prompts_dev.jsonl."""
    seed: int = 0
    """The files are a function of seed and number."""


@dataclass
class Curve:
    """Draws the rewards of runs over minutes and steps, as they came."""

    runs: list[str]
    """NAME=FOLDER of runs of ppo_cpe.py."""
    out: str = "out/real_curve"
    """Folder of curve.png, curve.svg and curve.md."""


LIKES = {
    "food": ("tofu", "salmon", "pasta", "curry", "soup", "rice", "beans", "mushrooms"),
    "sport": ("yoga", "tennis", "running", "swimming", "climbing", "cycling", "chess", "dancing"),
    "music": ("jazz", "opera", "folk", "techno", "blues", "rock", "choirs", "piano"),
    "place": ("mountains", "beaches", "museums", "forests", "lakes", "castles", "markets", "islands"),
}
QUESTIONS = {
    "food": ("What should I cook tonight?", "What could I bring to a picnic?", "What is a good lunch for work?"),
    "sport": (
        "How can I get more exercise?",
        "What could I do on Saturday morning?",
        "How do I start a healthy habit?",
    ),
    "music": (
        "What should I listen to on the train?",
        "How do I relax in the evening?",
        "What could I learn this year?",
    ),
    "place": ("Where should I go this weekend?", "What is a good day trip?", "Where could I take my friends?"),
}
NAMES = ("Mia", "Tom", "Lea", "Sam", "Ada", "Ben", "Zoe", "Max", "Eva", "Jon")
HELD_OUT = "held_out/original/reward"
TOPIC_OF = {question: topic for topic, questions in QUESTIONS.items() for question in questions}
ABOUT_ITSELF = re.compile(r"\b(as an ai|language model|your profile|your persona|based on)\b", re.IGNORECASE)


def judge(row: dict, answer: str) -> Judgement:
    """Helpfulness by length and ending, personalization by what is named, naturalness by what is left out."""
    persona, broken = row["persona"], []
    n_words, liked = len(answer.split()), persona["likes"][TOPIC_OF[row["question"]]]
    others = [like for like in persona["likes"].values() if like != liked and like in answer.lower()]
    helpfulness = 5
    if n_words > 60:
        helpfulness -= min(8, (n_words - 51) // 10)
        broken.append(f"Cut it to 60 words; it has {n_words}.")
    elif n_words < 20:
        helpfulness -= 4
        broken.append("Say a little more, at least 20 words.")
    if not answer.rstrip().endswith((".", "!", "?")):
        helpfulness -= 2
        broken.append("End with a whole sentence.")
    personalization = (4 if liked in answer.lower() else -3) - 2 * len(others)
    if personalization < 0 and liked not in answer.lower():
        broken.append(f"Suggest something with {liked}.")
    broken += [f"Leave out {other}." for other in others]
    naturalness = 5
    if persona["name"] in answer:
        naturalness -= 3
        broken.append("Do not use the person's name.")
    if re.search(r"^\s*([-*\u2022]|\d+[.)])\s", answer, re.MULTILINE):
        naturalness -= 4
        broken.append("Write sentences, not a list.")
    if ABOUT_ITSELF.search(answer):
        naturalness -= 3
        broken.append("Do not talk about yourself or the profile.")
    critique = " ".join(broken[:3]) or "Nothing to fix."
    return Judgement(critique, max(-5, helpfulness), max(-5, personalization), max(-5, naturalness))


def sample_rows(n: int, seed: int, start: str) -> list[dict]:
    rng, rows = random.Random(f"{seed} {start}"), []
    for i in range(n):
        topic = rng.choice(list(LIKES))
        likes = {name: rng.choice(values) for name, values in LIKES.items()}
        persona = {"name": rng.choice(NAMES), "likes": likes}
        rows.append(dict(prompt_id=f"{start}{i}", persona=persona, question=rng.choice(QUESTIONS[topic])))
    return rows


def draw_curve(args: Curve) -> None:
    figure, axes = draw.new_figure(2)
    colors = [draw.COLORS["ppo_grm"], draw.COLORS["cpe"], draw.GREY]
    lines = []
    for (name, _, run), color in zip((run.partition("=") for run in args.runs), colors):
        steps = read_rows(f"{run}/metrics.jsonl", "metrics")
        seconds = [sum(v for key, v in step.items() if key.startswith("seconds/")) for step in steps]
        minutes = np.cumsum(seconds) / 60
        held_out = [(i, step[HELD_OUT]) for i, step in enumerate(steps) if step.get(HELD_OUT) is not None]
        places, rewards = zip(*held_out)
        for axis, xs in ((axes[0], minutes), (axes[1], np.arange(1, len(steps) + 1))):
            axis.plot(xs, [step["original/reward"] for step in steps], color=color, alpha=0.35, lw=1)
            axis.plot(xs[list(places)], rewards, color=color, marker=".", label=name)
        before, after = np.mean(rewards[:1]), np.mean(rewards[-3:])
        tokens = sum(step["generated_tokens"] for step in steps)
        lines.append([name, len(steps), f"{minutes[-1]:.0f}", f"{tokens:,}", f"{before:.2f}", f"{after:.2f}"])
    axes[0].set(xlabel="minutes", ylabel="reward")
    axes[0].set_title("dots: held-out prompts; light: samples of a step", fontsize=8)
    axes[1].set(xlabel="step")
    axes[1].legend(frameon=False, fontsize=8)
    os.makedirs(args.out, exist_ok=True)
    draw.save_figure(figure, args.out, "curve")
    header = ["", "steps", "minutes", "generated tokens", "held out, before", "held out, last three"]
    text = draw.markdown_table(header, lines)
    write_text(f"{args.out}/curve.md", text + "\n")
    print(f"{text}\n\nwritten: {args.out}/curve.md, curve.png, curve.svg")


def main(args: Rows | Curve) -> None:
    if isinstance(args, Curve):
        return draw_curve(args)
    os.makedirs(args.out, exist_ok=True)
    write_rows(f"{args.out}/prompts_train.jsonl", sample_rows(args.rows, args.seed, "train"))
    write_rows(f"{args.out}/prompts_dev.jsonl", sample_rows(max(1, args.rows // 10), args.seed, "dev"))


if __name__ == "__main__":
    with flags.user_errors():
        main(tyro.cli(Rows | Curve))
