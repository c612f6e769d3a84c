"""English prompts, an exact rule judge with critiques, and the learning curve of recipes/real_curve.sh.

The judge is a rule, not a taste. An answer should name the one thing the person likes that the question is about, have
20 to 60 words, end with a full stop, and leave out the person's name, lists and remarks about itself. A model of 135M
parameters can learn that in minutes. The critique says which rules are broken.

    python recipes/real_curve.py rows --out out/real_curve/data       # prompts_train.jsonl, prompts_dev.jsonl
    python ppo_cpe.py --judge recipes/real_curve.py:judge --prompts out/real_curve/data/prompts_train.jsonl
    python recipes/real_curve.py curve --runs PPO=out/real_curve/ppo CPE=out/real_curve/cpe
"""

import os
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro
from matplotlib import rc_context
from matplotlib.figure import Figure

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from prompts import Judgement
from runtime import flags
from runtime.rows import read_rows, write_rows, write_text


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["rows", "curve"]]
    """rows: write the prompts. curve: draw the rewards of runs over minutes and over steps."""
    out: str | None = None
    """Folder of the written files. Default: out/real_curve/data (rows), out/real_curve (curve)."""
    rows: flags.Count = 400
    """Training prompts; prompts_dev.jsonl gets a tenth as many, of other people."""
    seed: int = 0
    """The prompts depend on the seed and the number of rows only."""
    runs: tuple[str, ...] = ()
    """For curve: NAME=FOLDER of runs of ppo_cpe.py."""


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
HELD_OUT = "held_out/original/reward"  # of metrics.jsonl
COLORS = ("#2f6db3", "#2e8b57", "#777777")
TOPIC_OF = {question: topic for topic, questions in QUESTIONS.items() for question in questions}
ABOUT_ITSELF = re.compile(r"\b(as an ai|language model|your profile|your persona|based on)\b", re.IGNORECASE)


def judge(row: dict, answer: str) -> Judgement:
    """Helpfulness by length and ending, personalization by what is named, naturalness by what is left out."""
    persona = row["persona"]
    text = answer.lower()
    liked = persona["likes"][TOPIC_OF[row["question"]]]
    off_topic = [like for like in persona["likes"].values() if like != liked and like in text]
    n_words = len(answer.split())
    requests = []

    helpfulness = 5
    if n_words > 60:
        helpfulness -= min(8, (n_words - 51) // 10)
        requests.append(f"Cut it to 60 words; it has {n_words}.")
    elif n_words < 20:
        helpfulness -= 4
        requests.append("Say a little more, at least 20 words.")
    if not answer.rstrip().endswith((".", "!", "?")):
        helpfulness -= 2
        requests.append("End with a whole sentence.")

    personalization = 4 if liked in text else -3
    personalization -= 2 * len(off_topic)
    if liked not in text:
        requests.append(f"Suggest something with {liked}.")
    requests += [f"Leave out {like}." for like in off_topic]

    naturalness = 5
    if persona["name"] in answer:
        naturalness -= 3
        requests.append("Do not use the person's name.")
    if re.search(r"^\s*([-*\u2022]|\d+[.)])\s", answer, re.MULTILINE):
        naturalness -= 4
        requests.append("Write sentences, not a list.")
    if ABOUT_ITSELF.search(answer):
        naturalness -= 3
        requests.append("Do not talk about yourself or the profile.")

    critique = " ".join(requests[:3]) or "Nothing to fix."
    return Judgement(critique, max(-5, helpfulness), max(-5, personalization), max(-5, naturalness))


def sample_rows(n: int, seed: int, split: str) -> list[dict]:
    """n prompt rows: a random person and one of the questions."""
    rng = random.Random(f"{seed} {split}")
    rows = []
    for i in range(n):
        topic = rng.choice(list(LIKES))
        likes = {name: rng.choice(values) for name, values in LIKES.items()}
        persona = {"name": rng.choice(NAMES), "likes": likes}
        question = rng.choice(QUESTIONS[topic])
        rows.append({"prompt_id": f"{split}{i}", "persona": persona, "question": question})
    return rows


def draw_curve(runs: Sequence[str], out: str) -> None:
    """Writes curve.png, curve.svg and curve.md into the folder out. runs: NAME=FOLDER of each."""
    figure = Figure(figsize=(8.4, 3.4))
    by_minutes, by_steps = figure.subplots(1, 2)
    lines = []
    for run, color in zip(runs, COLORS):
        name, _, folder = run.partition("=")
        steps = read_rows(f"{folder}/metrics.jsonl", "metrics")
        seconds = [sum(value for key, value in step.items() if key.startswith("seconds/")) for step in steps]
        minutes = np.cumsum(seconds) / 60
        sampled = [step["original/reward"] for step in steps]
        evaluated = [i for i, step in enumerate(steps) if step.get(HELD_OUT) is not None]
        held_out = [steps[i][HELD_OUT] for i in evaluated]
        for axis, xs in ((by_minutes, minutes), (by_steps, np.arange(1, len(steps) + 1))):
            axis.plot(xs, sampled, color=color, alpha=0.35, lw=1)
            axis.plot(xs[evaluated], held_out, color=color, marker=".", label=name)
        tokens = sum(step["generated_tokens"] for step in steps)
        lines.append(
            f"| {name} | {len(steps)} | {minutes[-1]:.0f} | {tokens:,} | {held_out[0]:.2f} | "
            f"{np.mean(held_out[-3:]):.2f} |"
        )
    by_minutes.set(xlabel="minutes", ylabel="reward")
    by_minutes.set_title("dots: held-out prompts; light: samples of a step", fontsize=8)
    by_steps.set(xlabel="step")
    by_steps.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    os.makedirs(out, exist_ok=True)
    figure.savefig(f"{out}/curve.png", dpi=110)
    with rc_context({"svg.hashsalt": "curve"}):  # reproducible ids: the same figure is the same file
        figure.savefig(f"{out}/curve.svg", metadata={"Date": None})
    header = [
        "|  | steps | minutes | generated tokens | held out, before | held out, last three |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    table = "\n".join(header + lines)
    write_text(f"{out}/curve.md", table + "\n")
    print(f"{table}\n\nwritten: {out}/curve.md, curve.png, curve.svg")


def main(args: Args) -> None:
    if args.command == "curve":
        if not args.runs:
            raise ValueError("--runs: expected NAME=FOLDER of at least one run of ppo_cpe.py")
        return draw_curve(args.runs, args.out or "out/real_curve")
    out = args.out or "out/real_curve/data"
    os.makedirs(out, exist_ok=True)
    write_rows(f"{out}/prompts_train.jsonl", sample_rows(args.rows, args.seed, "train"))
    write_rows(f"{out}/prompts_dev.jsonl", sample_rows(max(1, args.rows // 10), args.seed, "dev"))


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
