"""Stage 4: how good are the answers, and how good is the judge (docs/evaluation.md)?

`--task win-rate` compares a model with a baseline:
1. Draw `n_prompts` of the prompts and get the answers of both sides: sampled by the engine or by a server, read from a
   file (--answers, --baseline-answers), or the prompts' own references (--baseline reference).
2. Ask a judge. `--judge pair:...` names the better of the two answers and is asked in both orders. Any other judge (a
   generative reward model, a Bradley-Terry model, a function of your own) scores each answer by itself, and the higher
   score wins. Equal texts are a draw, and a judge of pairs is not asked about them.
3. Write tables: win rate and length-controlled win rate with 95 % intervals, by group, position bias, what is missing.
The prompt rows make the benchmark (data/prepare.py): PersonaFeedback's questions with their fixed baseline,
AlpacaEval's with personas, PersonaMem's with the persona only, or your own.

`--task reward-accuracy` says how often the judge prefers the chosen answer of a pair, by tier.
`--task persona-swap` scores the model's answers under their own and under another person's persona.
`--task personamem` is multiple choice after a long history, by generated letter and by likelihood.
`--annotations A.json B.json` makes tables from annotation files in AlpacaEval's format; no model, no judge. Two models
on the same questions and baseline get a paired test. `--labels FILE` (annotations of another judge or of people) adds
Cohen's kappa.

Each finished answer and verdict is appended to OUT/journal/ as it comes, under a digest of everything that it depends
on (weights, prompt, settings, seed). So a killed run continues without asking twice, and a changed model, prompt or
setting is never mistaken for a finished one. Failed requests are not kept, and the next run asks them again. Nothing
that failed becomes a number: a prompt without a verdict is left out of the rates, counted and listed.

Departures from the paper: both orders instead of one, our own text for the judge, intervals.

    python evaluate.py                                  # out/ppo_cpe/policy against out/sft/policy, scored by out/grm
    torchrun --nproc_per_node=8 evaluate.py --judge pair:https://api.example.com/v1#NAME --baseline reference
    python evaluate.py --stage answers; python evaluate.py --stage verdicts; python evaluate.py --stage table
    python evaluate.py --annotations annotations.json --gamed-data tatsu-lab/alpaca_eval --out out/compare
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

sys.path.append(os.getcwd())  # so that a copy in another folder, run from this one, finds the modules here

from runtime import flags


@dataclass(kw_only=True)
class Args(flags.JudgeArgs, flags.EngineArgs):
    # -- the task
    task: Literal["win-rate", "reward-accuracy", "persona-swap", "personamem"] = "win-rate"
    """See the top of this file."""
    stage: Literal["all", "answers", "verdicts", "table"] = "all"
    """The stage to run; results of earlier ones are only read. A server without #NAME is asked for it each time."""
    annotations: tuple[str, ...] = ()
    """Tables from these files instead of a task. Each file is one model."""
    labels: tuple[str, ...] = ()
    """With --annotations: annotation files of another judge or of people, for Cohen's kappa."""

    # -- models, answers and prompts
    model: str = "out/ppo_cpe/policy"
    """Folder or hub id of the model, or http(s)://HOST#NAME of a chat server. The key for https://my.host is in
    API_KEY_MY_HOST."""
    answers: str | None = None
    """File of answers instead of --model: rows with `prompt_id, persona, question, answer`, or AlpacaEval's outputs
    (.json). These are found by their prompt_id or persona, else by persona and question, else by a unique question."""
    baseline: str = "out/sft/policy"
    """As --model, or `reference`: the prompts' own answers."""
    baseline_answers: str | None = None
    """File of answers instead of --baseline."""
    prompts: str = "out/data/prompts_eval.jsonl"
    """Prompt rows. For reward-accuracy: pair rows. For personamem: its questions."""
    n_prompts: flags.Natural = 300
    """Number of prompts, drawn at random by the seed. 0: all."""
    out: str = "out/evaluate"
    """Folder for journal, answers, verdicts, annotations, tables and plots. With --annotations: one without an
    evaluation."""
    journal: str | None = None
    """Folder whose journal/ to use instead of OUT/journal, so that evaluations one after the other share answers and
    verdicts."""
    answer_template: str | None = None
    """File with another prompt of the policy, and of a judge bt:. Default: the one that a model was trained with, else
    the built-in one."""
    grm_template: str | None = None
    """File with another rubric, for a judge that scores. Default: its own, else the built-in one."""
    pair_template: str | None = None
    """File with another question, for a judge that compares. Default: its own, else the built-in one."""

    # -- sampling of answers (the released evaluation's values; the length limit is that of RL)
    temperature: flags.NonNegative = 0.8
    """Sampling temperature. RL samples at 0.9 (ppo_cpe.py)."""
    top_p: flags.TopP = 0.9
    """Nucleus sampling; the same in RL."""
    max_new_tokens: flags.Count = 2048
    """Tokens of an answer. Answers that are cut off are judged as they stand, and listed."""
    seed: int = 0
    """For the choice of prompts, answers, judgements, bootstrap."""

    # -- the judge
    judge: str = "out/grm/model"
    """PATH of a generative reward model | http(s)://... | bt:PATH | world | FILE.py:FUNCTION | pair:PATH | pair:http...
    (judges/). The key for https://my.host is in API_KEY_MY_HOST."""
    orders: Literal["both", "drawn"] = "both"
    """A judge of pairs sees both orders, or the one that AlpacaEval's rule draws from the instruction."""
    judge_temperature: flags.NonNegative = 0.0
    """0: the judge's most likely judgement, so that a table can be made again. Above 0 (RL: 0.9), a judgement that does
    not parse is asked for again."""
    judge_votes: flags.Count = 5
    """Votes of a server that gives no log-probabilities. 1 vote is asked for at temperature 0."""

    # -- the tables
    gamed_data: str | None = None
    """AlpacaEval's df_gamed.csv, or the data set tatsu-lab/alpaca_eval: adds length_controlled_v1 (805 rows only)."""
    bootstrap_draws: flags.Count = 1000
    """Draws for the interval of the length-controlled win rate; each is a fit."""

    # -- the machine
    concurrency: flags.Count = 64
    """Requests in flight to a server, per rank."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""
    timeouts: tuple[flags.Count, flags.Count, flags.Count] = flags.TIMEOUTS
    """Seconds that a rank may take to start, for each answer or verdict, and without a sign of life (at most 60)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import dataclasses
import itertools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from typing import Any

import numpy as np

from chat import Chat, without_control_tokens
from evaluation import personamem, tables, winrate
from evaluation.accuracy import accuracy_by_tier, accuracy_table
from evaluation.annotations import (
    SIDES,
    compare,
    group_of,
    judge_kappa,
    mean_and_error,
    paired,
    persons_of,
    position_bias,
    read_annotations,
)
from evaluation.answer_files import given_answers, instruction_of, reference_answers
from evaluation.asking import check_judge, draw_rows, replies, verdicts_on
from evaluation.tables import interval_text, markdown_table, number_text, write_json, write_results
from judges import FunctionJudge, parse_spec
from judges.chat_client import ChatServer, is_url
from judges.functions import call, file_and_name, load_file
from prompts import DIMENSIONS, answer_request, load_templates
from runtime.distributed import Ranks, derive_seed, print0, start
from runtime.rows import write_rows
from weights import resolve


def compares(judge: str) -> bool:
    """Whether a judge sees two answers at a time."""
    return parse_spec(judge)[0].compares


# -- answers -----------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """The answers of one side."""

    generator: str
    rows: list[dict]  # prompt rows in order, with `answer` (None: missing) and, where it is known, `truncated`
    figures: Sequence[str] = ()  # fields of the rows whose means the tables hold

    @property
    def texts(self) -> list[str | None]:
        return [row["answer"] for row in self.rows]


def answers_of(sides: Sequence[str], rows: list[dict], args: Args, ranks: Ranks) -> dict[str, Answers]:
    """Gets the answers of each side, and writes them. Files and templates are checked before any sampling."""
    specs = {"model": args.model, "baseline": args.baseline}
    files = {"model": args.answers, "baseline": args.baseline_answers}
    answers = {}
    requests = {}
    for side in sides:
        spec = specs[side]
        file = files[side]
        if file is not None:
            answers[side] = Answers(*given_answers(file, rows))
        elif spec == "reference":
            answers[side] = Answers("reference", reference_answers(args.prompts, rows))
        else:  # each model answers the prompt that it was trained with
            templates = load_templates(None if is_url(spec) else resolve(spec), answer_template=args.answer_template)
            shown = without_control_tokens(rows) if is_url(spec) else rows
            texts = [answer_request(templates, row) for row in shown]
            requests[side] = [(row["prompt_id"], [{"role": "user", "content": t}]) for row, t in zip(rows, texts)]
    for side in requests:
        replied = replies("answers", specs[side], requests[side], args.temperature, args, ranks)
        no_reply = {"answer": None, "truncated": None}
        answers[side] = Answers(specs[side], [row | (reply or no_reply) for row, reply in zip(rows, replied)])
    local = [specs[side] for side in requests if not is_url(specs[side])]
    chat = Chat(local[0]) if local else None  # one tokenizer counts the tokens of both sides
    for side in answers:
        add_figures(answers[side], chat, args.judge)
        if ranks.rank == 0:
            answered = [row for row in answers[side].rows if row["answer"] is not None]
            write_rows(os.path.join(args.out, f"answers_{side}.jsonl"), answered)
    return answers


def add_figures(answers: Answers, chat: Chat | None, judge: str) -> None:
    """Adds to each row its lengths, whether it was cut off, and what `describe` in the judge's file says of it.

    Tokens are counted by `chat`; without it they are what the row says. Unknown figures are None.
    """
    kind, target = parse_spec(judge)
    describe = None
    if kind is FunctionJudge:
        describe = getattr(load_file(file_and_name(target)[0]), "describe", None)
    rows = []
    names = dict.fromkeys(("n_characters", "n_tokens", "truncated"))
    for row in answers.rows:
        answer = row["answer"]
        figures = dict(n_characters=None, n_tokens=None, truncated=row.get("truncated"))
        if answer is not None:
            figures["n_characters"] = len(answer)
            figures["n_tokens"] = len(chat.encode(answer)) if chat else row.get("n_tokens")
            if describe is not None:
                figures |= call(f"{target}, describe", describe, row, answer)
        names |= figures
        rows.append(row | figures)
    answers.rows = rows
    answers.figures = list(names)


# -- verdicts ----------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """The verdict on the two answers to a prompt."""

    preference: float | None = None  # 1 baseline, 2 model, between them 1 + P(model); None: no verdict
    shown: dict[str, float | None] = field(default_factory=dict)  # P(model) by order
    method: str | None = None  # how the verdict came about
    failure: str | None = "no answer"  # why there is none


def shown_orders(row: dict, args: Args) -> list[str]:
    """The orders that the judge sees: "baseline_first", "model_first", or the one that AlpacaEval's rule draws."""
    if args.orders == "both":
        return ["baseline_first", "model_first"]
    switched = random.Random(f"is_switched_outputs{instruction_of(row)}0").choices([False, True])[0]
    return ["model_first"] if switched else ["baseline_first"]


def verdicts_on_both(
    rows: list[dict], texts: dict[str, list[str | None]], args: Args, ranks: Ranks
) -> list[dict[str, dict]]:
    """Verdict rows on the answers of both sides to each prompt: {order: verdict} of a judge that compares, or {side:
    verdict} of one that scores each answer by itself.

    A judge that compares is not asked about equal texts, nor where an answer is missing.
    """
    asked = []  # (prompt index, order or side) of each item
    items: list[tuple] = []
    for i in sorted(range(len(rows)), key=lambda i: str(rows[i]["prompt_id"])):  # neighbours share a prefix
        model, baseline = (texts[side][i] for side in SIDES)
        shown: dict[str, Any] = {}
        if not compares(args.judge):
            shown = {side: texts[side][i] for side in SIDES if texts[side][i] is not None}
        elif None not in (model, baseline) and model != baseline:
            both = {"baseline_first": (baseline, model), "model_first": (model, baseline)}
            shown = {order: both[order] for order in shown_orders(rows[i], args)}
        for name, answer in shown.items():
            asked.append((i, name))
            items.append((rows[i], answer))
    found: list[dict[str, dict]] = [{} for _ in rows]
    for (i, name), verdict in zip(asked, verdicts_on(items, args, ranks)):
        found[i][name] = verdict
    return found


def outcome_of(model: str | None, baseline: str | None, verdicts: dict[str, dict]) -> Outcome:
    """The outcome of the verdicts on two answers."""
    if model is None or baseline is None:
        return Outcome(method="scores" if verdicts else None)
    if model == baseline:
        return Outcome(preference=1.5, method="equal texts", failure=None)
    failures = [v["failure"] for v in verdicts.values() if v["reward"] is None]
    outcome = Outcome(failure=failures[0] if failures else None)
    if "model" in verdicts:
        outcome.method = "scores"
        if not failures:
            difference = verdicts["model"]["reward"] - verdicts["baseline"]["reward"]
            outcome.preference = 1.5 + 0.5 * float(np.sign(difference))
        return outcome
    for order, verdict in verdicts.items():
        p_first = verdict["reward"]
        is_turned = order == "baseline_first" and p_first is not None
        outcome.shown[order] = 1 - p_first if is_turned else p_first
    methods = {v["method"] for v in verdicts.values()} - {None}
    outcome.method = max(methods, default=None)  # votes, if either order was voted on
    if not failures:  # a single order would count the judge's position bias: all orders or none
        outcome.preference = 1 + sum(p for p in outcome.shown.values() if p is not None) / len(outcome.shown)
    return outcome


# -- win rate ----------------------------------------------------------------------------------------------------------


def annotations_of(rows: list[dict], answers: dict[str, Answers], outcomes: list[Outcome], judge: str) -> list[dict]:
    """Rows in AlpacaEval's format, in the order of the prompts. A missing answer is an empty text."""
    annotations = []
    for i, (row, outcome) in enumerate(zip(rows, outcomes)):
        answer_of = {side: answers[side].rows[i] for side in SIDES}
        annotation = dict(
            prompt_id=row["prompt_id"],
            instruction=instruction_of(row),
            output_1=answer_of["baseline"]["answer"] or "",
            generator_1=answers["baseline"].generator,
            output_2=answer_of["model"]["answer"] or "",
            generator_2=answers["model"].generator,
            annotator=judge,
            preference=outcome.preference,
            group=group_of(row),
            shown=outcome.shown or None,
            method=outcome.method,
            failure=outcome.failure,
            missing=[side for side in SIDES if answer_of[side]["answer"] is None],
            truncated=[side for side in SIDES if answer_of[side]["truncated"]],
        )
        annotations.append(annotation | {name: row[name] for name in ("user_id", "dataset") if name in row})
    return annotations


def summarize(side: str, answers: Answers, found: list[dict[str, dict]]) -> dict:
    """Means of one side's figures and, where the judge scores, of its scores.

    The scores are those of the prompts whose answers both have a verdict, so that the sides can be compared.

    found: the verdicts on each prompt, from `verdicts_on_both`.
    """
    verdicts = [verdict[side] for verdict in found if side in verdict]
    both = [verdict for verdict in found if all(verdict.get(s, {}).get("reward") is not None for s in SIDES)]
    means = {name: mean_and_error(verdict[side][name] for verdict in both) for name in (*DIMENSIONS, "reward")}
    means |= {name: mean_and_error(row.get(name) for row in answers.rows) for name in answers.figures}
    return means | dict(
        answers=sum(answer is not None for answer in answers.texts),
        unjudged=sum(v["reward"] is None for v in verdicts) if verdicts else None,  # None: the judge compares
        compared=len(both) if verdicts else None,
    )


SIDE_LABELS = {
    "reward": "weighted score",
    "n_characters": "length, characters",
    "n_tokens": "length, tokens",
    "truncated": "truncated, %",
    "unjudged": "without a judgement",
    "compared": "prompts of the scores",
}


def side_table(results: dict) -> str:
    """The numbers of both sides as text."""

    def cell(value: dict | int | None, scale: int) -> str:
        if not isinstance(value, dict):
            return "-" if value is None else str(value)
        text = number_text(value["mean"], 2, scale)
        error = value["standard_error"]
        return text if error is None else f"{text} ± {scale * error:.2f}"

    nothing = mean_and_error([])  # describe() gave the figure for answers of the other side alone
    lines = [f"{'':24}{'model':>18}{'baseline':>18}"]
    for name in dict.fromkeys([*results["model"], *results["baseline"]]):
        label = SIDE_LABELS.get(name, name.replace("_", " "))
        model, baseline = (cell(results[side].get(name, nothing), 100 if label.endswith("%") else 1) for side in SIDES)
        if (model, baseline) != ("-", "-"):
            lines.append(f"{label:24}{model:>18}{baseline:>18}")
    return "\n".join(lines)


def win_rate(args: Args, ranks: Ranks) -> None:
    """--task win-rate."""
    rows = draw_rows(args)
    gamed = winrate.read_gamed(args.gamed_data) if args.gamed_data else None
    if gamed is not None and len(rows) != winrate.ALPACA_ROWS:
        raise ValueError(
            f"--gamed-data: it needs AlpacaEval's {winrate.ALPACA_ROWS} rows, got {len(rows)} (--n-prompts 0: all rows)"
        )
    check_judge(args, ranks)
    answers = answers_of(SIDES, rows, args, ranks)
    if args.stage == "answers":
        return
    model, baseline = (answers[side] for side in SIDES)
    if model.generator == baseline.generator and model.texts != baseline.texts:
        raise ValueError(
            f"the model and the baseline are both called {model.generator}, and their answers differ; expected another "
            "`generator` in the rows of --answers or --baseline-answers"
        )
    found = verdicts_on_both(rows, {side: answers[side].texts for side in SIDES}, args, ranks)
    outcomes = [outcome_of(*one) for one in zip(model.texts, baseline.texts, found)]
    verdicts = []
    for name in (*SIDES, "baseline_first", "model_first"):
        about = "side" if name in SIDES else "order"
        for row, of_row in zip(rows, found):
            if name in of_row:
                verdicts.append({"prompt_id": row["prompt_id"], about: name} | of_row[name])
    if ranks.rank == 0:
        write_rows(os.path.join(args.out, "verdicts.jsonl"), verdicts)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    annotations = annotations_of(rows, answers, outcomes, args.judge)
    comparison = compare(annotations, args.seed, gamed, args.bootstrap_draws)
    results = {side: summarize(side, answers[side], found) for side in SIDES}
    write_json(os.path.join(args.out, "annotations.json"), annotations)
    write_json(os.path.join(args.out, "results.json"), results | comparison | {"args": flags.record(args)})
    sides = {answers[side].generator: results[side] for side in SIDES}
    text = tables.write_tables(args.out, [comparison], [annotations], sides=sides)
    print(f"{side_table(results)}\n\n{text}")
    files = "answers_*.jsonl, verdicts.jsonl, annotations.json, results.json, leaderboard.csv, table.md, plots/"
    print(f"written: {args.out}/ ({files})")


def compare_files(args: Args) -> None:
    """--annotations: tables, paired tests between the models, kappas against --labels."""
    for name in ("annotations.json", "verdicts.jsonl", "choices.jsonl"):
        if os.path.exists(os.path.join(args.out, name)):
            raise ValueError(f"--out {args.out}: it holds an evaluation ({name}); expected another folder for tables")
    files = [(path, read_annotations(path)) for path in args.annotations]
    labels = [(path, read_annotations(path)) for path in args.labels]
    gamed = winrate.read_gamed(args.gamed_data) if args.gamed_data else None
    comparisons = [compare(rows, args.seed, gamed, args.bootstrap_draws) for _, rows in files]
    pairs = itertools.combinations(files, 2)
    found = [paired(a, b, args.seed, (path_a, path_b)) for (path_a, a), (path_b, b) in pairs]
    tests = [test for test in found if test]
    kappas = []
    for label_path, label_rows in labels:
        agreements = [judge_kappa(rows, label_rows, (path, label_path)) for path, rows in files]
        if not any(agreements):
            raise ValueError(f"{label_path}: no instruction with the same two outputs as in --annotations")
        kappas += [kappa for kappa in agreements if kappa]
    results = dict(comparisons=comparisons, paired_tests=tests, kappas=kappas, args=flags.record(args))
    write_json(os.path.join(args.out, "results.json"), results)
    print(tables.write_tables(args.out, comparisons, [rows for _, rows in files], tests, kappas))
    print(f"written: {args.out}/ (results.json, leaderboard.csv, table.md, plots/)")


# -- reward-model accuracy ---------------------------------------------------------------------------------------------


def reward_accuracy(args: Args, ranks: Ranks) -> None:
    """--task reward-accuracy. Scores of a GRM are sums of integers with exact weights, so ties are no rounding."""
    pairs = draw_rows(args, "pair")
    check_judge(args, ranks)
    if args.stage == "answers":
        return print0("reward-accuracy has no answers to make: they are in the pairs")
    texts = {"model": [pair["chosen"] for pair in pairs], "baseline": [pair["rejected"] for pair in pairs]}
    verdicts = verdicts_on_both(pairs, texts, dataclasses.replace(args, orders="both"), ranks)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    rows = []
    outcomes = []
    shown = []
    of_what = {
        "model": {"side": "chosen"},
        "baseline": {"side": "rejected"},
        "model_first": {"order": "chosen_first"},
        "baseline_first": {"order": "rejected_first"},
    }
    for pair, of_pair in zip(pairs, verdicts):
        outcome = outcome_of(pair["chosen"], pair["rejected"], of_pair)
        right = None
        if outcome.preference is not None:
            right = 0.5 + 0.5 * float(np.sign(outcome.preference - 1.5))
        outcomes.append(right)
        shown.append(outcome.shown)
        judged = [of_what[name] | verdict for name, verdict in of_pair.items()]
        rows.append({**pair, "outcome": right, "verdicts": judged})
    results = accuracy_by_tier(pairs, np.array(outcomes, dtype=np.float64), args.seed) | dict(  # None is NaN
        position_bias=position_bias(shown, args.seed, persons_of(rows)),
        failures=dict(Counter(v["failure"] for of_pair in verdicts for v in of_pair.values() if v["failure"])),
        judge=args.judge,
    )
    write_rows(os.path.join(args.out, "verdicts.jsonl"), rows)
    write_results(args.out, results, flags.record(args), accuracy_table(results), "verdicts.jsonl")


# -- persona swap ------------------------------------------------------------------------------------------------------


def swapped_personas(rows: list[dict], seed: int) -> list[dict | str]:
    """Another row's persona for each row, drawn by the seed. ValueError: there is only one persona."""
    personas = {json.dumps(row["persona"], sort_keys=True): row["persona"] for row in rows}
    if len(personas) < 2:
        raise ValueError("persona-swap needs prompts of at least two persons")
    swapped = []
    for row in rows:
        others = [persona for persona in personas.values() if persona != row["persona"]]
        swapped.append(others[derive_seed(seed, row["prompt_id"], "swap") % len(others)])
    return swapped


def persona_swap(args: Args, ranks: Ranks) -> None:
    """--task persona-swap: an answer that fits one person scores lower under another's persona.

    If it does not, the answer is generic, or the judge does not read the persona.
    """
    if compares(args.judge):
        raise ValueError(f"--judge {args.judge}: persona-swap needs a judge that scores one answer")
    rows = draw_rows(args)
    strangers = swapped_personas(rows, args.seed)
    check_judge(args, ranks)
    answers = answers_of(["model"], rows, args, ranks)["model"]
    if args.stage == "answers":
        return
    shown = [each for each in zip(rows, strangers, answers.texts) if each[2] is not None]
    items = [(row, answer) for row, _, answer in shown]
    items += [(row | {"persona": stranger}, answer) for row, stranger, answer in shown]
    verdicts = verdicts_on(items, args, ranks)
    if args.stage == "verdicts" or ranks.rank > 0:
        return
    own = verdicts[: len(shown)]
    swapped = verdicts[len(shown) :]
    both = [(a, b) for a, b in zip(own, swapped) if None not in (a["reward"], b["reward"])]
    names = [*(name for name in DIMENSIONS if any(a[name] is not None for a, _ in both)), "reward"]
    persons = persons_of([row for row, _, _ in shown])

    def test(name: str) -> dict:
        a, b = (np.array([v[name] for v in side], dtype=np.float64) for side in (own, swapped))  # None is NaN
        return winrate.paired_test(a, b, args.seed, persons)

    results = dict(
        model=answers.generator,
        judge=args.judge,
        missing=[row["prompt_id"] for row in answers.rows if row["answer"] is None],
        own={name: mean_and_error(a[name] for a, _ in both) for name in names},
        swapped={name: mean_and_error(b[name] for _, b in both) for name in names},
        difference={name: test(name) for name in names},
        failures=dict(Counter(v["failure"] for v in verdicts if v["failure"])),
    )
    named = []
    for (row, stranger, answer), a, b in zip(shown, own, swapped):
        named.append(dict(prompt_id=row["prompt_id"], persona=stranger, answer=answer, own=a, swapped=b))
    write_rows(os.path.join(args.out, "verdicts.jsonl"), named)
    table = swap_table(results)
    write_results(args.out, results, flags.record(args), table, "answers_model.jsonl, verdicts.jsonl")


def swap_table(results: dict) -> str:
    """Markdown."""
    rows = []
    for name, d in results["difference"].items():
        means = [number_text(results[side][name]["mean"], 2) for side in ("own", "swapped")]
        difference = interval_text(d["difference"], d["low"], d["high"], digits=2)
        counts = [d[count] for count in ("better", "equal", "worse", "left_out")]
        rows.append([name, *means, difference, *counts, number_text(d["p_permutation"], 4)])
    header = ["own persona", "another's", "difference (95 %)", "better", "equal", "worse", "no verdict", "p"]
    lines = markdown_table([results["model"], *header], rows)
    lines += [f"{count} judgements without a verdict: {kind}" for kind, count in results["failures"].items()]
    return "\n".join(lines) + "\n"


TASKS = {
    "win-rate": win_rate,
    "reward-accuracy": reward_accuracy,
    "persona-swap": persona_swap,
    "personamem": personamem.evaluate,
}


def named_server(flag: str, spec: str) -> str:
    """Adds the name of the server's model to the spec of a judge or model behind a server, if it has none."""
    url = spec.removeprefix("pair:")
    if not is_url(url) or "#" in url:
        return spec
    try:
        return f"{spec}#{ChatServer(url).model}"
    except ValueError as error:
        raise ValueError(f"--{flag} {spec}: {error} (every stage asks for #NAME, which is not given)") from error


def main(args: Args) -> None:
    if args.annotations:
        return compare_files(args)
    if args.labels:
        raise ValueError("--labels needs --annotations: the files whose judges are compared")
    ranks = start(args.dtype, timeouts=args.timeouts)
    named: dict[str, Any] = {name: named_server(name, getattr(args, name)) for name in ("model", "baseline", "judge")}
    args = dataclasses.replace(args, **named)
    TASKS[args.task](args, ranks)
    if args.stage in ("all", "table"):
        print0(f"look at it: python report.py {args.out}")


if __name__ == "__main__":
    flags.run(main, ARGS)
