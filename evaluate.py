"""Stage 4: how good are the answers, and how good is the judge (docs/evaluation.md).

`--task win-rate` compares a model with a baseline:
1. Draw `n_prompts` of the prompts and get both sides' answers: sampled from a model by the engine or by a server, read
   from a file (--answers, --baseline-answers), or the prompts' own references (--baseline reference).
2. A judge decides. `--judge pair:...` names the better of the two answers, asked in both orders (judges/). Any other
   judge (a generative reward model, a Bradley-Terry model, the exact judge of the generated world, a function of your
   own) scores each answer by itself, and the higher score wins. Equal texts are a draw without a question.
3. Tables: win rate and length-controlled win rate with 95 % intervals, by group, position bias, what is missing.
What the rows are makes the benchmark: PersonaFeedback's questions with their fixed baseline, AlpacaEval's with
personas, PersonaMem's with the persona only, the generated world's (data/prepare.py, data/persona_world.py).

`--task reward-accuracy`: how often the judge prefers the chosen answer of a pair, by tier.
`--task persona-swap`: the model's answers scored under their own and under another person's profile.
`--task personamem`: multiple choice after a long history, by generated letter and by likelihood (personamem.py).
`--annotations A.json B.json`: tables from annotation files in AlpacaEval's format; no model, no judge. Two models on
the same questions get a paired test; `--labels FILE` (another judge's or people's annotations) gives Cohen's kappa.

Each finished answer and verdict is appended to OUT/journal/ as it comes, under a digest of all that it depends on
(weights, prompt, settings, seed): a killed run goes on without asking twice, and a changed model, prompt or setting is
never mistaken for a finished one. Requests that failed are not kept, so the next run asks them again. Nothing that
failed becomes a number: a prompt without a verdict is left out of the rates, counted and listed.

Departures from the paper: both orders instead of one; the judge's text is ours; intervals.

    python evaluate.py                                  # out/ppo_cpe/policy against out/sft/policy, scored by out/grm
    torchrun --nproc_per_node=8 evaluate.py --judge pair:https://api.example.com/v1#NAME --baseline reference
    python evaluate.py --stage answers; python evaluate.py --stage verdicts; python evaluate.py --stage table
    python evaluate.py --annotations annotations.json --gamed-data tatsu-lab/alpaca_eval
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here
from runtime import flags


@dataclass(kw_only=True)
class Args(flags.JudgeArgs, flags.EngineArgs):
    # -- what is done
    task: Literal["win-rate", "reward-accuracy", "persona-swap", "personamem"] = "win-rate"
    """See the top of this file."""
    stage: Literal["all", "answers", "verdicts", "table"] = "all"
    """What is made; earlier stages are only read."""
    annotations: tuple[str, ...] = ()
    """Tables from these files instead of a task; each is one model."""
    labels: tuple[str, ...] = ()
    """With --annotations: files of another judge or of people, for Cohen's kappa."""

    # -- who is compared, on what
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id of the model, or http(s)://HOST#NAME of a chat server."""
    answers: str | None = None
    """File of answers instead of --model: rows with `prompt_id, persona, question, answer`, or AlpacaEval's outputs
    (.json), found by their prompt_id or persona where they have one, else by profile and question, or question."""
    baseline: str = "out/sft/policy"
    """As --model | reference: the answers that the prompts bring along."""
    baseline_answers: str | None = None
    """File of answers, instead of --baseline."""
    prompts: str = "out/data/prompts_eval.jsonl"
    """Prompt rows; for reward-accuracy pair rows, for personamem its questions."""
    n_prompts: flags.Natural = 300
    """Drawn at random by the seed where the file has more; 0 takes all."""
    out: str = "out/evaluate"
    """Folder of journal, answers, verdicts, annotations, tables and plots."""
    answer_template: str | None = None
    """File that replaces the prompt which a model was trained with (FOLDER/templates), or the built-in one."""
    grm_template: str | None = None
    """The same for the rubric of a judge that scores."""
    pair_template: str | None = None
    """The same for the question of a judge that compares."""

    # -- sampling of answers (docs/evaluation.md; the length limit is that of RL)
    temperature: flags.NonNegative = 0.8
    """Of the answers, as in the paper's released evaluation; its RL sampled at 0.9 (ppo_cpe.py)."""
    baseline_temperature: flags.NonNegative | None = None
    """Of the baseline's answers, where it differs."""
    top_p: flags.TopP = 0.9
    """Nucleus; the same in RL."""
    max_new_tokens: flags.Count = 2048
    """Tokens of an answer; what is cut off is judged as it stands, and listed."""
    seed: int = 0
    """Choice of prompts, answers, judgements, bootstrap."""

    # -- the judge
    judge: str = "out/grm/model"
    """PATH of a generative reward model | http(s)://... | bt:PATH | world | FILE.py:FUNCTION | pair:PATH | pair:http...
    (judges/)."""
    orders: Literal["both", "drawn"] = "both"
    """A judge that compares sees both orders, or one that AlpacaEval's rule draws from the instruction."""
    judge_temperature: flags.NonNegative = 0.0
    """0: its most likely judgement, so that a table can be made again. Above 0 (RL: 0.9) one that does not parse is
    asked again."""
    judge_votes: flags.Count = 5
    """Verdicts whose share counts where a server gives no log-probabilities; 1 is asked at temperature 0."""

    # -- the tables
    gamed_data: str | None = None
    """AlpacaEval's df_gamed.csv or the data set tatsu-lab/alpaca_eval: adds length_controlled_v1 (805 rows only)."""
    bootstrap_draws: flags.Count = 1000
    """Of the length-controlled win rate; each is a fit."""

    # -- the machine
    concurrency: flags.Count = 64
    """Requests that a server gets at a time, per rank."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import dataclasses
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from chat import Chat, without_control_tokens
from evaluation import personamem, tables, winrate
from evaluation.accuracy import accuracy_by_tier, accuracy_table
from evaluation.asking import check_judge, draw_rows, replies, verdicts_on
from evaluation.tables import mean_and_error, write_json
from judges import describing_function, named_server, parse_spec
from judges.chat_client import is_url
from prompts import DIMENSIONS, answer_request, load_templates, persona_text
from runtime.distributed import derive_seed, print0, start
from runtime.rows import read_rows, write_rows, write_text
from weights import resolve

SIDES = ("model", "baseline")


# -- answers: prompt rows with `answer` (None: missing) and, where it is known, `truncated` ----------------------------


def instruction_of(row: dict) -> str:
    """Profile and question as one text: what AlpacaEval's files have as the instruction."""
    return f"{persona_text(row['persona'])}\n\n{row['question']}"


def given_answers(file: str, rows: list[dict]) -> tuple[str, list[dict]]:
    """Answers from a file -> (generator, rows with `answer`, None where the file has none).

    ValueError: no answer to any prompt, two to one, another question under the same prompt_id.
    """
    generator, outputs, found = file, file.endswith(".json"), defaultdict(list)
    for place, entry in enumerate(_read_outputs(file) if outputs else read_rows(file, "answer"), not outputs):
        for key in _output_keys(entry) if outputs else [("prompt", entry["prompt_id"])]:
            found[key].append((place, {"answer": entry["output"]} if outputs else entry))
        generator = entry.get("generator") or generator
    times = Counter(row["question"] for row in rows)
    given = []
    for row in rows:
        keys = [("prompt", row["prompt_id"])]
        if outputs:
            keys += [("question of a persona", _persona_and_question(row["persona"], row["question"]))]
            keys += [("instruction", instruction_of(row))]
            keys += [("instruction", row["question"])] if times[row["question"]] == 1 else []
        key = next((key for key in keys if key in found), None)
        entries = found[key] if key else [(None, {"answer": None})]
        if len(entries) > 1:
            (first, _), (second, _) = entries[:2]
            where = f"{file}, entry {second}" if outputs else f"{file}:{second}"
            first = f"entry {first}" if outputs else f"line {first}"
            raise ValueError(f'{where}: a second answer to {key[0]} "{str(key[1])[:80]}"; the first is {first}')
        entry = entries[0][1]
        if entry.get("question", row["question"]) != row["question"]:
            raise ValueError(f'{file}: prompt "{row["prompt_id"]}": it has another question there')
        given.append({**row, **entry})
    if all(row["answer"] is None for row in given):
        raise ValueError(f"{file}: no answer to any of the {len(rows)} prompts")
    return generator, given


def _output_keys(entry):
    """How an entry of AlpacaEval's outputs can be found; one that says whose it is answers nobody else's question."""
    keys = [("prompt", entry["prompt_id"])] if isinstance(entry.get("prompt_id"), (str, int)) else []
    if isinstance(entry.get("persona"), (str, dict)):
        return [*keys, ("question of a persona", _persona_and_question(entry["persona"], entry["instruction"]))]
    return [*keys, ("instruction", entry["instruction"])]


def _persona_and_question(persona, question):
    """As one text; a persona may be an object here and its JSON there."""
    if isinstance(persona, str):
        try:
            persona = json.loads(persona)
        except (ValueError, RecursionError):  # a text of another kind
            return json.dumps([persona.strip(), question])
    return json.dumps([persona, question], sort_keys=True)


def _read_outputs(file):
    """AlpacaEval's outputs: a JSON list of instruction, output and generator."""
    try:
        with open(file, encoding="utf-8") as f:
            entries = json.load(f)
    except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, nested too deep
        raise ValueError(f"{file}: not JSON ({error})") from error
    for i, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        for field in ("instruction", "output"):
            if not isinstance(entries, list) or not isinstance(entry, dict) or not isinstance(entry.get(field), str):
                raise ValueError(
                    f'{file}, entry {i}: field "{field}" is missing or no text; expected AlpacaEval\'s '
                    "outputs, a JSON list of instruction, output, generator"
                )
    return entries


def reference_answers(file: str, rows: list[dict]) -> tuple[str, list[dict]]:
    """The answers that prompts bring along. ValueError: a prompt without one."""
    for row in rows:
        if not isinstance(row.get("reference"), str):
            raise ValueError(
                f'{file}: prompt "{row["prompt_id"]}" has no reference; give '
                "--baseline FOLDER or --baseline-answers FILE"
            )
    return "reference", [{**row, "answer": row["reference"], "truncated": None} for row in rows]


def measured(rows: list[dict], chat: Chat | None, describe: Callable | None) -> tuple[list[dict], list[str]]:
    """Returns the rows with the figures of each answer, and the names of these.

    The figures are lengths (None where unknown; tokens by `chat` for both sides, without it as a row says), whether it
    was cut off, and what `describe` in the judge's file gives.
    """
    result = []
    names = dict.fromkeys(("n_characters", "n_tokens", "truncated"))
    for row in rows:
        answer = row["answer"]
        figures = dict(n_characters=None, n_tokens=None, truncated=row.get("truncated"))
        if answer is not None:
            figures["n_characters"] = len(answer)
            figures["n_tokens"] = len(chat.encode(answer)) if chat else row.get("n_tokens")
            if describe is not None:
                figures |= describe(row, answer)
        names |= figures
        result.append(row | figures)
    return result, list(names)


@dataclass
class Answers:
    """One side's answers."""

    generator: str
    rows: list[dict]  # in the order of the prompts; `answer` is None where there is none
    figures: Sequence[str] = ()  # fields of the rows whose means the tables hold


def answers_of(sides: Sequence[str], rows: list[dict], args: Args, ranks) -> dict[str, Answers]:
    """Answers by side. What is quick to refuse (files, templates) comes before any sampling."""
    specs = {"model": args.model, "baseline": args.baseline}
    files = {"model": args.answers, "baseline": args.baseline_answers}
    temperatures = {"model": args.temperature, "baseline": args.temperature}
    if args.baseline_temperature is not None:
        temperatures["baseline"] = args.baseline_temperature
    found, requests = {}, {}
    for side in sides:
        if files[side] is not None:
            found[side] = Answers(*given_answers(files[side], rows))
        elif specs[side] == "reference":
            found[side] = Answers(*reference_answers(args.prompts, rows))
        else:  # each under the prompt that it was trained with
            folder = None if is_url(specs[side]) else resolve(specs[side])
            templates = load_templates(folder, answer_template=args.answer_template)
            shown = without_control_tokens(rows) if is_url(specs[side]) else rows
            asked = [{"role": "user", "content": answer_request(templates, row)} for row in shown]
            requests[side] = [(row["prompt_id"], [message]) for row, message in zip(rows, asked)]
    for side in requests:
        replied = replies(f"answers_{side}", specs[side], requests[side], temperatures[side], args, ranks)
        name = specs[side] + ("" if args.baseline_temperature is None else f" at temperature {temperatures[side]:g}")
        no_reply = {"answer": None, "truncated": None}
        found[side] = Answers(name, [row | (reply or no_reply) for row, reply in zip(rows, replied)])
    local = [specs[side] for side in requests if not is_url(specs[side])]
    chat = Chat(local[0]) if local else None
    describe = describing_function(args.judge)
    for side, answers in found.items():
        answers.rows, answers.figures = measured(answers.rows, chat, describe)
        if ranks.rank == 0:
            answered = [row for row in answers.rows if row["answer"] is not None]
            write_rows(os.path.join(args.out, f"answers_{side}.jsonl"), answered)
    return found


# -- verdicts ----------------------------------------------------------------------------------------------------------


def compares(judge: str) -> bool:
    """Whether a judge sees two answers at a time."""
    return parse_spec(judge)[0].compares


def shown_orders(row: dict, args: Args) -> list[str]:
    """The orders that the judge sees: "baseline_first", "model_first", or the one that AlpacaEval's rule draws."""
    if args.orders == "both":
        return ["baseline_first", "model_first"]
    switched = random.Random(f"is_switched_outputs{instruction_of(row)}0").choices([False, True])[0]
    return ["model_first"] if switched else ["baseline_first"]


def judged_in_pairs(rows: list[dict], outputs: dict[str, list], args: Args, ranks) -> tuple[list[dict], list[dict]]:
    """outputs: {side: [answer or None]} -> dict(preference, shown, method, failure) a prompt, and the verdict rows."""
    items, places = [], []
    for i, (row, ours, theirs) in enumerate(zip(rows, outputs["model"], outputs["baseline"])):
        if None in (ours, theirs) or ours == theirs:
            continue
        for order in shown_orders(row, args):
            items.append((row, (theirs, ours) if order == "baseline_first" else (ours, theirs)))
            places.append((i, order))
    verdicts = verdicts_on(items, args, ranks)
    results = []
    for ours, theirs in zip(outputs["model"], outputs["baseline"]):
        result = dict(preference=None, shown=None, method=None, failure="no answer")
        if ours is not None and ours == theirs:
            result |= dict(preference=1.5, method="equal texts", failure=None)
        results.append(result)
    for (i, order), verdict in zip(places, verdicts):
        p = verdict["reward"]
        if results[i]["shown"] is None:
            results[i] |= dict(shown={}, failure=None)
        results[i]["shown"][order] = None if p is None else p if order == "model_first" else 1 - p
        if "votes" not in (results[i]["method"], verdict["method"]):
            results[i]["method"] = results[i]["method"] or verdict["method"]
        else:  # of either order
            results[i]["method"] = "votes"
        results[i]["failure"] = results[i]["failure"] or verdict["failure"]
    for result in results:  # one order alone would count the judge's bias for a place: all or none
        if result["shown"] and None not in result["shown"].values():
            result["preference"] = 1 + sum(result["shown"].values()) / len(result["shown"])
    verdicts = [dict(prompt_id=rows[i]["prompt_id"], order=order, **v) for (i, order), v in zip(places, verdicts)]
    return results, verdicts


def judged_alone(rows: list[dict], outputs: dict[str, list], args: Args, ranks) -> tuple[list[dict], list[dict]]:
    """The same by scores: the higher one wins, equal ones draw."""
    places = [(side, i) for side in SIDES for i, answer in enumerate(outputs[side]) if answer is not None]
    found = verdicts_on([(rows[i], outputs[side][i]) for side, i in places], args, ranks)
    by_place = dict(zip(places, found))
    results = []
    for i in range(len(rows)):
        ours, theirs = (by_place.get((side, i)) for side in SIDES)
        result = dict(preference=None, shown=None, method="scores", failure="no answer")
        if ours and theirs:
            failures = [v["failure"] for v in (ours, theirs) if v["reward"] is None]
            result["failure"] = failures[0] if failures else None
            if not failures:
                a, b = ours["reward"], theirs["reward"]
                result["preference"] = 1.5 if a == b else 2.0 if a > b else 1.0
        results.append(result)
    return results, [dict(side=side, prompt_id=rows[i]["prompt_id"], **v) for (side, i), v in zip(places, found)]


# -- the comparison ----------------------------------------------------------------------------------------------------


def annotations_of(rows: list[dict], answers: dict[str, Answers], judged: list[dict], judge: str) -> list[dict]:
    """Rows in AlpacaEval's format, in the order of the prompts. A missing answer is an empty text without a verdict."""
    found = []
    for i, (row, result) in enumerate(zip(rows, judged)):
        sides = {side: answers[side].rows[i] for side in SIDES}
        annotation = {"prompt_id": row["prompt_id"], "instruction": instruction_of(row)}
        for number, side in (("1", "baseline"), ("2", "model")):
            annotation |= {
                f"output_{number}": sides[side]["answer"] or "",
                f"generator_{number}": answers[side].generator,
            }
        annotation |= dict(
            annotator=judge,
            preference=result["preference"],
            group=tables.group_of(row),
            shown=result["shown"],
            method=result["method"],
            failure=result["failure"],
            missing=[side for side in SIDES if sides[side]["answer"] is None],
            truncated=[side for side in SIDES if sides[side]["truncated"]],
        )
        found.append(annotation | {k: row[k] for k in ("user_id", "dataset") if k in row})
    return found


def summarize(answers: Answers, verdicts: list[dict]) -> dict:
    """One side's numbers, from its answer rows (`measured`) and, where the judge scores, its verdict rows."""
    judged = {name: mean_and_error([v[name] for v in verdicts]) for name in (*DIMENSIONS, "reward")}
    counted = {name: mean_and_error([row.get(name) for row in answers.rows]) for name in answers.figures}
    return (
        judged
        | counted
        | dict(
            answers=sum(row["answer"] is not None for row in answers.rows),
            unjudged=sum(v["reward"] is None for v in verdicts),
        )
    )


def side_table(results: dict) -> str:
    """Both sides' numbers as text."""
    known = (*DIMENSIONS, "reward", "n_characters", "n_tokens", "truncated", "answers", "unjudged")
    described = [name for name in results["model"] if name not in known]
    labels = {
        **{name: name for name in DIMENSIONS},
        "reward": "weighted score",
        "n_characters": "length, characters",
        "n_tokens": "length, tokens",
        "truncated": "truncated, %",
        **{name: name.replace("_", " ") for name in described},
        "answers": "answers",
        "unjudged": "without a judgement",
    }

    def cell(value, scale):
        if not isinstance(value, dict):
            return str(value)
        mean, error = value["mean"], value["standard_error"]
        text = "-" if mean is None else f"{scale * mean:.2f}"
        return text if error is None else f"{text} ± {scale * error:.2f}"

    lines = [f"{'':24}{'model':>18}{'baseline':>18}"]
    for name, label in labels.items():
        cells = [cell(results[side][name], 100 if label.endswith("%") else 1) for side in SIDES]
        if set(cells) != {"-"}:
            lines.append(f"{label:24}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)


def compare_sides(args: Args, ranks) -> None:
    """--task win-rate."""
    rows = draw_rows(args)
    gamed = winrate.read_gamed(args.gamed_data) if args.gamed_data else None
    check_judge(args, ranks)
    answers = answers_of(SIDES, rows, args, ranks)
    if args.stage == "answers":
        return
    outputs = {side: [row["answer"] for row in answers[side].rows] for side in SIDES}
    by_pairs = compares(args.judge)
    judged, verdicts = (judged_in_pairs if by_pairs else judged_alone)(rows, outputs, args, ranks)
    if ranks.rank == 0:
        write_rows(os.path.join(args.out, "verdicts.jsonl"), verdicts)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    annotations = annotations_of(rows, answers, judged, args.judge)
    comparison = tables.compare(annotations, args.seed, gamed, args.bootstrap_draws)
    scored = {side: [] if by_pairs else [v for v in verdicts if v["side"] == side] for side in SIDES}
    results = {side: summarize(answers[side], scored[side]) for side in SIDES}
    write_json(os.path.join(args.out, "annotations.json"), annotations)
    write_json(os.path.join(args.out, "results.json"), results | comparison | {"args": dataclasses.asdict(args)})
    text = tables.write_tables(
        args.out, [comparison], [annotations], sides={answers[side].generator: results[side] for side in SIDES}
    )
    print(f"{side_table(results)}\n\n{text}")
    print(
        f"written: {args.out}/ (answers_*.jsonl, verdicts.jsonl, annotations.json, results.json, leaderboard.csv, "
        "table.md, plots/)"
    )


def compare_files(args: Args) -> None:
    """--annotations: tables, paired tests between the models, kappas against --labels."""
    files = [tables.read_annotations(path) for path in args.annotations]
    labels = [tables.read_annotations(path) for path in args.labels]
    gamed = winrate.read_gamed(args.gamed_data) if args.gamed_data else None
    comparisons = [tables.compare(rows, args.seed, gamed, args.bootstrap_draws) for rows in files]
    named = list(zip(args.annotations, files))
    tests = [tables.paired(a, b, args.seed, (x, y)) for (x, a), (y, b) in itertools.combinations(named, 2)]
    kappas = []
    for path, rows in zip(args.labels, labels):
        found = [kappa for kappa in (tables.judge_kappa(a, rows, (x, path)) for x, a in named) if kappa]
        if not found:
            raise ValueError(f"{path}: no instruction with the same two outputs as in --annotations")
        kappas += found
    write_json(
        os.path.join(args.out, "results.json"),
        dict(comparisons=comparisons, paired_tests=tests, kappas=kappas, args=dataclasses.asdict(args)),
    )
    print(tables.write_tables(args.out, comparisons, files, tests, kappas))
    print(f"written: {args.out}/ (results.json, leaderboard.csv, table.md, plots/)")


# -- reward-model accuracy ---------------------------------------------------------------------------------------------


def reward_accuracy(args: Args, ranks) -> None:
    """--task reward-accuracy. Scores of a GRM are sums of integers with exact weights: ties are ties, not rounding."""
    pairs = draw_rows(args, "pair")
    check_judge(args, ranks)
    if args.stage == "answers":
        return print0("reward-accuracy has no answers to make: they are in the pairs")
    # both texts of a pair, and all pairs of a prompt, one after another: their prompts share a prefix
    order = sorted(range(len(pairs)), key=lambda i: pairs[i]["prompt_id"])
    if compares(args.judge):
        items = [
            (pairs[i], texts)
            for i in order
            for texts in ((pairs[i]["chosen"], pairs[i]["rejected"]), (pairs[i]["rejected"], pairs[i]["chosen"]))
        ]
    else:
        items = [(pairs[i], pairs[i][side]) for i in order for side in ("chosen", "rejected")]
    found = verdicts_on(items, args, ranks)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    both = {i: (found[2 * k], found[2 * k + 1]) for k, i in enumerate(order)}
    outcomes, shown = np.full(len(pairs), np.nan), []
    for i in range(len(pairs)):
        a, b = (v["reward"] for v in both[i])
        if None in (a, b):
            continue
        if compares(args.judge):  # P(first): chosen first, then rejected first
            shown.append({"baseline_first": 1 - b, "model_first": a})
            a, b = a + (1 - b), b + (1 - a)
        outcomes[i] = 0.5 if a == b else float(a > b)
    results = accuracy_by_tier(pairs, outcomes, args.seed)
    failures = Counter(v["failure"] for pair in both.values() for v in pair if v["failure"])
    results |= dict(
        position_bias=tables.position_bias(shown, args.seed),
        failures=dict(failures),
        judge=args.judge,
        args=dataclasses.asdict(args),
    )
    write_rows(
        os.path.join(args.out, "verdicts.jsonl"),
        [
            {**pair, "outcome": None if np.isnan(o) else float(o), "verdicts": both[i]}
            for i, (pair, o) in enumerate(zip(pairs, outcomes))
        ],
    )
    write_json(os.path.join(args.out, "results.json"), results)
    text = accuracy_table(results)
    write_text(os.path.join(args.out, "table.md"), text)
    print(f"{text}\nwritten: {args.out}/ (verdicts.jsonl, results.json, table.md)")


# -- persona swap ------------------------------------------------------------------------------------------------------


def swapped_personas(rows: list[dict], seed: int) -> list:
    """Another person's profile for each row, drawn from the file's by the seed. ValueError: there is only one."""
    personas = {json.dumps(row["persona"], sort_keys=True): row["persona"] for row in rows}
    if len(personas) < 2:
        raise ValueError("persona-swap needs prompts of at least two persons")
    found = []
    for row in rows:
        others = [p for p in personas.values() if p != row["persona"]]
        found.append(others[derive_seed(seed, row["prompt_id"], "swap") % len(others)])
    return found


def persona_swap(args: Args, ranks) -> None:
    """--task persona-swap: an answer that is meant for one person scores lower under another's profile. One that does
    not is generic, or the judge does not read the profile."""
    if compares(args.judge):
        raise ValueError(f"--judge {args.judge}: persona-swap needs a judge that scores one answer")
    rows = draw_rows(args)
    strangers = swapped_personas(rows, args.seed)
    check_judge(args, ranks)
    answers = answers_of(["model"], rows, args, ranks)["model"]
    if args.stage == "answers":
        return
    answered = [i for i, row in enumerate(answers.rows) if row["answer"] is not None]
    own = [(rows[i], answers.rows[i]["answer"]) for i in answered]
    swapped = [({**rows[i], "persona": strangers[i]}, answers.rows[i]["answer"]) for i in answered]
    found = verdicts_on(own + swapped, args, ranks)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    own, swapped = found[: len(own)], found[len(own) :]
    names = [n for n in (*DIMENSIONS, "reward") if any(v[n] is not None for v in own)]
    results = dict(
        model=answers.generator,
        judge=args.judge,
        missing=[row["prompt_id"] for row in answers.rows if row["answer"] is None],
        own={n: mean_and_error([v[n] for v in own]) for n in names},
        swapped={n: mean_and_error([v[n] for v in swapped]) for n in names},
        difference={},
        failures=dict(Counter(v["failure"] for v in found if v["failure"])),
    )
    persons = tables.persons_of([rows[i] for i in answered])
    for name in names:
        a, b = (np.array([np.nan if v[name] is None else v[name] for v in side]) for side in (own, swapped))
        results["difference"][name] = winrate.paired_test(a, b, args.seed, persons)
    write_rows(
        os.path.join(args.out, "verdicts.jsonl"),
        [
            dict(prompt_id=rows[i]["prompt_id"], persona=strangers[i], own=a, swapped=b)
            for i, a, b in zip(answered, own, swapped)
        ],
    )
    write_json(os.path.join(args.out, "results.json"), results | {"args": dataclasses.asdict(args)})
    row = tables.markdown_row
    lines = [
        row(answers.generator, "own profile", "another's", "difference (95 %)", "better", "equal", "worse", "p"),
        row("---", *["--:"] * 7),
    ]
    for name in names:
        means = [
            f"{results[side][name]['mean']:.2f}" if results[side][name]["mean"] is not None else "-"
            for side in ("own", "swapped")
        ]
        d = results["difference"][name]
        gap = "-" if d["difference"] is None else f"{d['difference']:.2f} ({d['low']:.2f} to {d['high']:.2f})"
        p = "-" if d["p_permutation"] is None else f"{d['p_permutation']:.4f}"
        lines.append(row(name, *means, gap, d["better"], d["equal"], d["worse"], p))
    lines += [f"{count} answers without a verdict: {kind}" for kind, count in results["failures"].items()]
    text = "\n".join(lines) + "\n"
    write_text(os.path.join(args.out, "table.md"), text)
    print(f"{text}\nwritten: {args.out}/ (answers_model.jsonl, verdicts.jsonl, results.json, table.md)")


TASKS = {
    "win-rate": compare_sides,
    "reward-accuracy": reward_accuracy,
    "persona-swap": persona_swap,
    "personamem": personamem.evaluate,
}


def main(args):
    if args.annotations:
        return compare_files(args)
    if args.labels:
        raise ValueError("--labels needs --annotations: the files whose judges are compared")
    named = {name: named_server(getattr(args, name)) for name in ("model", "baseline", "judge")}
    args = dataclasses.replace(args, **named)
    ranks = start(args.dtype)
    TASKS[args.task](args, ranks)
    if args.stage in ("all", "table"):
        print0(f"look at it: python report.py {args.out}")


if __name__ == "__main__":
    flags.run(main, ARGS)
