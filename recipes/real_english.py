"""Does a real model learn from edits what it never says? Rows, targets and table of recipes/real_english.sh.

Each person has one concern (rain, money, ...). An answer should have 15 to 30 words and say one thing that serves the
concern, as the critique dictates it: "Tell them to check the forecast." What it is depends on concern and kind of
question, so that a policy can learn it. Each concern has a thing that the SFT policy often says, one that it seldom
says and one that it hardly ever says, for the three kinds of question. One run of RL has all of them.

    python recipes/real_english.py questions --out DATA                     # questions.jsonl, templates
    python recipes/real_english.py sft --answers ANSWERS.jsonl --out DATA   # sft.jsonl: answers and rewrites
    python recipes/real_english.py prompts --answers SAMPLES.jsonl --model SFT --out DATA   # prompts_*, rates.json
    python recipes/real_english.py gate --answers RUN --out DATA            # do edits do what critiques say?
    python recipes/real_english.py table --answers ppo=RUN cpe=RUN sft=ANSWERS.jsonl --model CHECKPOINT \\
        --rates DATA/rates.json --out OUT                                   # real_english.md, .json, .png, .svg

ANSWERS.jsonl is the output of generate.py for these questions or prompts; a RUN of the table is a run folder of
ppo_cpe.py with answers.jsonl in it.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from scipy import stats
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from chat import Chat
from evaluation.plots import COLORS, save_plot
from evaluation.tables import markdown_table, spread
from json_files import read_json
from model import Transformer, load_pretrained
from prompts import Templates, answer_request, fill
from recipes.real_english_judge import CONCERNS, SENTENCE, form_faults, judge, says, words_in
from runtime import flags, training
from runtime.packing import Batch, pack
from runtime.rows import read_rows, step_files, write_rows, write_text


@dataclass
class Args:
    command: tyro.conf.Positional[Literal["questions", "sft", "prompts", "gate", "table"]]
    """The part of the recipe to run, see above."""
    out: str = "out/real_english/data"
    """Folder of the written files."""
    answers: tuple[str, ...] = ()
    """Output of generate.py; for gate a run folder; for table NAME=FILE or NAME=RUN of each policy."""
    model: str | None = None
    """For prompts the policy that gave the samples, whose rates are measured; for table the model of the perplexity."""
    rates: str | None = None
    """For table the file that prompts wrote: how often the policy says each target before RL."""
    people: flags.Count = 100
    """Names in training; each has all concerns and questions. prompts_dev has a quarter as many others."""
    seed: int = 0
    """Order and choice of rows."""


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
BINS = {"common": (0.05, 0.4), "middle": (0.002, 0.02), "rare": (0.0, 0.0005)}  # chance that an answer of SFT says it
N_CONCERNS = 4  # of those with a word in each bin; more would leave too few samples for each target
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
# without a line break at the end, which is not part of a template that is read from a file
TEMPLATES = Templates(
    answer="{persona} {question} Give me your advice in one or two short sentences.",
    edit="{critique} Rewrite the answer so that this is done. Output only the new answer.",
)
TEMPERATURE = 0.8  # of all samples
N_PLAIN, N_REWRITES = 500, 1500  # rows of SFT, at most
PASSED = 0.5  # of the gate: edits that say their target, in each bin
WINDOW = 5  # steps of a point of the curves


# -- rows --------------------------------------------------------------------------------------------------------------


def question_rows(names: Sequence[str], concerns: Iterable[str], seed: int, split: str) -> list[dict]:
    """A row per name, concern and kind of question, in random order."""
    rng = Random(f"{seed} {split}")
    rows = []
    for name in names:
        for concern in concerns:
            for questions in QUESTIONS.values():
                row = dict(prompt_id=f"{split}{len(rows)}", question=rng.choice(questions), concern=concern, name=name)
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


def conversation(row: dict, critique: str | None = None, edit: str | None = None) -> dict:
    """The answer, or its rewrite by a critique, as a row of SFT: under the prompts that RL will have."""
    turns = [answer_request(TEMPLATES, row), row["text"]]
    if critique is not None and edit is not None:
        turns += [fill(TEMPLATES.edit, critique=critique), edit]
    return {"messages": [dict(role=role, content=text) for role, text in zip(("user", "assistant") * 2, turns)]}


def rewrites(row: dict, rng: Random) -> list[dict]:
    """Rewrites of an answer by critiques as RL will have them: with a clause of POOL, cut, or both.

    A rewrite without a fault of form is kept. The sentence goes to the end, or takes the place of what comes last.
    """
    sentences = [sentence.strip() for sentence in SENTENCE.findall(row["text"]) if sentence.strip()]
    faults = [request for request, _ in form_faults(row, row["text"])]
    clause = rng.choice(POOL)
    insertion = rng.choice(INSERTIONS).format(clause)
    both = " ".join([f"Tell them to {clause}.", *faults[:1]])
    found = []
    for critique, added in ((both, [insertion]), (" ".join(faults[:2]), [])):
        for n_kept in range(len(sentences), 0, -1) if critique else ():
            edit = " ".join([*sentences[:n_kept], *added])
            if not form_faults(row, edit):
                found.append(conversation(row, critique, edit))
                break
    return found


def sft_rows(answers: list[dict], seed: int) -> list[dict]:
    """Conversations: some of the model's own answers of good form, and rewrites of answers of any form."""
    rng = Random(seed)
    plain = [conversation(row) for row in answers if not form_faults(row, row["text"])]
    edited = [conversation for row in answers for conversation in rewrites(row, rng)]
    return rng.sample(plain, min(N_PLAIN, len(plain))) + rng.sample(edited, min(N_REWRITES, len(edited)))


# -- targets -----------------------------------------------------------------------------------------------------------

Rates = dict[str, dict[str, dict[str, float]]]  # {concern: {kind of question: {word: chance that an answer says it}}}


def sequence_of(chat: Chat, row: dict) -> tuple[list[int], list[int]]:
    """Ids of a row's prompt and of its answer."""
    prompt = chat.messages([dict(role="user", content=answer_request(TEMPLATES, row))])
    return prompt, chat.tokenizer.encode(row["text"], add_special_tokens=False).ids


def batch_of(prompt: list[int], answer: list[int]) -> Batch:
    """One sequence, whose answer is scored."""
    return pack([prompt + answer], [[False] * len(prompt) + [True] * len(answer)], "cpu")


@torch.no_grad()
def logits_of(model: Transformer, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Logits before each token of the answer, [L, V]."""
    batch = batch_of(prompt, answer)
    return model(batch.input_ids, batch.context.position_ids, batch.context, batch.index)


def measure_rates(folder: str, samples: list[dict]) -> Rates:
    """The chance that an answer of a policy says each word, from its probabilities along its own samples.

    A count of N samples sees nothing below 1 / N; this does. Words of several tokens are left out.
    """
    chat = Chat(folder)
    model = load_pretrained(folder, torch.float32)
    ids = {w: chat.tokenizer.encode(f" {w}", add_special_tokens=False).ids for _, ws in CONCERNS.values() for w in ws}
    columns = {word: found[0] for word, found in ids.items() if len(found) == 1}
    sums: dict[tuple[str, str], list[torch.Tensor]] = defaultdict(list)
    for row in tqdm(samples, "rates", disable=None):
        logits = logits_of(model, *sequence_of(chat, row)) / TEMPERATURE
        p = (logits[:, list(columns.values())] - logits.logsumexp(1, keepdim=True)).exp()
        sums[row["concern"], KIND_OF[row["question"]]].append(1 - (1 - p).prod(0))
    rates: Rates = defaultdict(dict)
    for (concern, kind), chances in sums.items():
        mean = dict(zip(columns, torch.stack(chances).mean(0).tolist()))
        rates[concern][kind] = {word: mean[word] for word in CONCERNS[concern][1] if word in mean}
    return rates


def choose_targets(rates: Rates) -> dict[str, dict[str, tuple[str, str]]]:
    """{concern: {kind of question: (bin, word)}} for N_CONCERNS concerns. The bins go round over the kinds.

    ValueError: fewer than two concerns have a word in each bin.
    """
    kinds = list(QUESTIONS)
    targets: dict[str, dict[str, tuple[str, str]]] = {}
    for concern, of_kind in rates.items():
        for turn in range(len(kinds)):
            chosen: dict[str, tuple[str, str]] = {}
            for number, (name, (low, high)) in enumerate(BINS.items()):
                kind = kinds[(len(targets) + turn + number) % len(kinds)]
                used = {word for _, word in chosen.values()}
                words = [w for w, rate in of_kind.get(kind, {}).items() if low <= rate <= high and w not in used]
                if words:
                    chosen[kind] = name, words[0]
            if len(chosen) == len(BINS) and len(targets) < N_CONCERNS:
                targets[concern] = chosen
                break
    if len(targets) < 2:
        raise ValueError(f"{len(targets)} concerns have a word in each of {BINS}; expected at least 2")
    return targets


def with_targets(rows: list[dict], targets: dict[str, dict[str, tuple[str, str]]]) -> list[dict]:
    """Rows of the concerns that have targets. others: the targets of the other concerns."""
    words = {concern: {word for _, word in of_kind.values()} for concern, of_kind in targets.items()}
    aimed = []
    for row in rows:
        if row["concern"] in targets:
            name, word = targets[row["concern"]][KIND_OF[row["question"]]]
            others = sorted(set().union(*(words[c] for c in words if c != row["concern"])))
            aimed.append(row | {"bin": name, "target": word, "others": others})
    return aimed


def write_prompts(args: Args, folder: str) -> None:
    """Chooses targets by half of the samples, and reports their rates in the other half."""
    samples = read_rows(args.answers[0], "object")
    rates = measure_rates(folder, samples[::2])
    write_text(f"{args.out}/candidates.json", json.dumps(rates, indent=1) + "\n")  # for other BINS or words
    targets = choose_targets(rates)
    for split, names in zip(("train", "dev"), names_of(args.people)):
        rows = with_targets(question_rows(names, targets, args.seed, split), targets)
        write_rows(f"{args.out}/prompts_{split}.jsonl", rows)
    others = measure_rates(folder, samples[1::2])
    rates_of_bin: dict[str, dict[str, float]] = {name: {} for name in BINS}
    for concern, of_kind in targets.items():
        for kind, (name, word) in of_kind.items():
            rates_of_bin[name][f"{name} {concern} {word}"] = others[concern][kind][word]
    for name, rate_of in rates_of_bin.items():
        print(f"{name}: {100 * np.mean(list(rate_of.values())):.3f} % ({', '.join(rate_of)})")
    write_text(f"{args.out}/rates.json", json.dumps(rates_of_bin, indent=1) + "\n")


# -- what is said ------------------------------------------------------------------------------------------------------


def fraction_by_bin(rows: Iterable[tuple[str, bool]]) -> dict[str, float]:
    """rows: (bin, whether its target is said)."""
    found = defaultdict(list)
    for name, said in rows:
        found[name].append(said)
    return {name: float(np.mean(found[name])) for name in BINS if found[name]}


def gate(run: str) -> dict[str, float]:
    """By bin, the fraction of edits that say the target, where the critique named it."""
    found = []
    for _, path in step_files(run, "rollouts"):
        for row in read_rows(path, "object"):
            if row["edit"] and not says(row["answer"], row["target"]):
                found.append((row["bin"], says(row["edit"]["answer"], row["target"])))
    return fraction_by_bin(found)


def said_in_training(run: str) -> list[dict[str, float]]:
    """By bin, the fraction of originals that say their target, in windows of WINDOW steps."""
    windows: dict[int, list[tuple[str, bool]]] = defaultdict(list)
    for step, path in step_files(run, "rollouts"):
        of_step = [(row["bin"], says(row["answer"], row["target"])) for row in read_rows(path, "object")]
        windows[(step - 1) // WINDOW] += of_step
    return [fraction_by_bin(windows[number]) for number in sorted(windows)]


@torch.no_grad()
def figures_of(rows: list[dict], chat: Chat, model: Transformer) -> dict:
    """Figures of a policy's answers to prompts_dev.

    by bin: the fraction that say their target; targets: the same of each; foreign: the fraction that say a target of
    another concern, foreign_rare a rare one; score; words; perplexity of the answers under a model.
    """
    rare = {row["target"] for row in rows if row["bin"] == "rare"}
    foreign = [words_in(row["text"]) & set(row["others"]) for row in rows]
    of_target = defaultdict(list)
    for row in rows:
        of_target[row["bin"], row["concern"], row["target"]].append(says(row["text"], row["target"]))
    nll = 0.0
    n_tokens = 0
    for row in tqdm(rows, "perplexity", disable=None):
        prompt, answer = sequence_of(chat, row)
        if answer:
            nll -= float(training.forward(model, batch_of(prompt, answer)).sum())
            n_tokens += len(answer)
    return fraction_by_bin((row["bin"], says(row["text"], row["target"])) for row in rows) | dict(
        targets={" ".join(key): float(np.mean(said)) for key, said in of_target.items()},
        foreign=float(np.mean([bool(words) for words in foreign])),
        foreign_rare=float(np.mean([bool(words & rare) for words in foreign])),
        score=float(np.mean([judge(row, row["text"]).score() for row in rows])),
        words=float(np.mean([len(row["text"].split()) for row in rows])),
        perplexity=float(np.exp(nll / max(1, n_tokens))),
    )


# -- the table ---------------------------------------------------------------------------------------------------------

COLUMNS = {
    **{name: (f"{name} target said, %", 1, 100) for name in BINS},
    "foreign": ("another's target, %", 1, 100),
    "foreign_rare": ("another's rare target, %", 1, 100),
    "score": ("score", 2, 1),
    "words": ("words", 1, 1),
    "perplexity": ("perplexity", 1, 1),
    "generated_tokens": ("generated tokens", 0, 1),
    "judge_calls": ("judge calls", 0, 1),
}


def write_table(args: Args, folder: str, rates_file: str) -> None:
    """Writes the table, its numbers and the curves. A name in --answers may have several places, its seeds."""
    rates = read_json(rates_file)
    chat = Chat(folder)
    model = load_pretrained(folder, torch.float32)
    of_name: dict[str, list[dict]] = defaultdict(list)
    for text in args.answers:
        name, _, place = text.partition("=")
        is_run = os.path.isdir(place)
        figures = figures_of(read_rows(f"{place}/answers.jsonl" if is_run else place, "object"), chat, model)
        if is_run:
            steps = read_rows(f"{place}/metrics.jsonl", "metrics")
            figures["training"] = said_in_training(place)
            figures |= {key: sum(step[key] for step in steps) for key in ("generated_tokens", "judge_calls")}
        of_name[name].append(figures)
    rows = []
    for name, runs in of_name.items():
        cells = [spread([run.get(key) for run in runs], *form) for key, (_, *form) in COLUMNS.items()]
        rows.append([name, len(runs), *cells])
    lines = markdown_table(["", "seeds", *(heading for heading, *_ in COLUMNS.values())], rows)
    for name in of_name:
        if name != "ppo" and "ppo" in of_name and len(of_name[name]) == len(of_name["ppo"]):
            lines += ["", *differences(name, of_name[name], of_name["ppo"])]
    header = ["originals in training, %", "bin", f"by windows of {WINDOW} steps"]
    lines += ["", *markdown_table(header, window_rows(of_name))]
    content = "\n".join(lines)
    write_text(f"{args.out}/real_english.md", content + "\n")
    write_text(f"{args.out}/real_english.json", json.dumps(of_name, indent=1) + "\n")
    draw(of_name, rates, args.out)
    print(f"{content}\n\nwritten: {args.out}/real_english.md, .json, .png, .svg")


def differences(name: str, runs: list[dict], others: list[dict]) -> list[str]:
    """Lines: a policy less PPO by bin, in points, with 95 % intervals (Student's t) over targets and over seeds."""
    lines = []
    for bin_name in BINS:
        targets = [key for key in runs[0]["targets"] if key.startswith(f"{bin_name} ")]
        if targets:
            pairs = list(zip(runs, others, strict=True))
            d = 100 * np.array([[run["targets"][t] - other["targets"][t] for t in targets] for run, other in pairs])
            over_targets = f"over {len(targets)} targets {t_interval(d.mean(0))}"
            over_seeds = f"over {len(runs)} seeds {t_interval(d.mean(1))}"
            lines.append(f"- {name} less ppo, {bin_name}: {d.mean():.1f} ({over_targets}, {over_seeds})")
    return lines


def t_interval(values: np.ndarray) -> str:
    if len(values) < 2:
        return "-"
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{low:.1f} to {high:.1f}"


def curves(of_name: dict[str, list[dict]], bin_name: str) -> dict[str, np.ndarray]:
    """{policy: fraction of originals that say a target of the bin, [n seeds, n windows]}; NaN: none was asked for."""
    found = {}
    for name, runs in of_name.items():
        if windows := [run["training"] for run in runs if "training" in run]:
            n = min(map(len, windows))
            found[name] = np.array([[window.get(bin_name, np.nan) for window in run[:n]] for run in windows])
    return found


def window_rows(of_name: dict[str, list[dict]]) -> list[list[str]]:
    rows = []
    for bin_name in BINS:
        for name, of_seed in curves(of_name, bin_name).items():
            text = " ".join("-" if np.isnan(said) else f"{100 * said:.0f}" for said in of_seed.mean(0))
            rows.append([name, bin_name, text])
    return rows


def draw(of_name: dict[str, list[dict]], rates: dict[str, dict[str, float]], out: str) -> None:
    """A panel of curves for each bin, and one of how often each target is said at the end, by its rate before RL."""
    figure = Figure(figsize=(13, 3.4))
    axes = figure.subplots(1, len(BINS) + 1, sharey=True)
    for axis, bin_name in zip(axes, BINS):
        before = 100 * np.mean(list(rates[bin_name].values()))
        axis.set(title=f"{bin_name}: before RL {before:.2g} %", xlabel="step")
        for (name, of_seed), color in zip(curves(of_name, bin_name).items(), COLORS):
            steps = WINDOW * (np.arange(of_seed.shape[1]) + 0.5)
            axis.plot(steps, 100 * of_seed.mean(0), color=color, label=name.upper())
            axis.fill_between(steps, 100 * of_seed.min(0), 100 * of_seed.max(0), color=color, alpha=0.15, lw=0)
    axes[0].set(ylabel="answers that say their target, %", ylim=(-3, 103))
    axes[0].legend(frameon=False)
    rate_of = {target: rate for of_target in rates.values() for target, rate in of_target.items()}
    names = [name for name, runs in of_name.items() if "training" in runs[0]]
    for name, color in zip(names, COLORS):
        points = [(100 * rate_of[t], 100 * np.mean([run["targets"][t] for run in of_name[name]])) for t in rate_of]
        axes[-1].plot(*zip(*points), "o", color=color, alpha=0.7)
    axes[-1].set(title="each target, held-out people", xlabel="said before RL, %", xscale="log")
    save_plot(figure, out, "real_english")


def main(args: Args) -> None:
    os.makedirs(args.out, exist_ok=True)
    if args.command == "questions":
        write_text(f"{args.out}/answer.txt", TEMPLATES.answer + "\n")
        write_text(f"{args.out}/edit.txt", TEMPLATES.edit + "\n")
        train, _ = names_of(args.people)
        write_rows(f"{args.out}/questions.jsonl", question_rows(train, CONCERNS, args.seed, "train"))
        return
    if not args.answers:
        raise ValueError("--answers: expected output of generate.py")
    if args.command == "sft":
        rows = sft_rows(read_rows(args.answers[0], "object"), args.seed)
        write_rows(f"{args.out}/sft.jsonl", rows)
        print(f"{args.out}/sft.jsonl: {len(rows)} rows, {sum(len(r['messages']) > 2 for r in rows)} of them rewrites")
    elif args.command == "gate":
        passed = gate(args.answers[0])
        write_text(f"{args.out}/gate.json", json.dumps(passed, indent=1) + "\n")
        print("edits that say the target: " + ", ".join(f"{name} {100 * rate:.0f} %" for name, rate in passed.items()))
        if not passed or min(passed.values()) < PASSED:
            raise ValueError(
                f"the gate asks for {100 * PASSED:.0f} % in each bin: this policy can't edit, so RL is not run"
            )
    elif args.model is None:
        raise ValueError(f"--model: {args.command} needs the folder of a model")
    elif args.command == "prompts":
        write_prompts(args, args.model)
    elif args.rates is None:
        raise ValueError("--rates: table needs rates.json, which prompts wrote")
    else:
        write_table(args, args.model, args.rates)


if __name__ == "__main__":
    flags.run(main, flags.parse(Args, __doc__))
