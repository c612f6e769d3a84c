"""Makes pairs and judgements from personas and questions with any language models (docs/method.md 1.1, 1.2, 1.4).

1. questions: for each persona, some questions of each kind (specific, general), if none are given.
2. answers: several models answer each question.
3. pairs: a scorer gives each answer an overall score from 1 to 5. Two answers to a question whose scores differ by more
   than --min-gap become a pair. SFT, DPO and Bradley-Terry are trained on these.
4. judgements: a judge writes a critique and three scores of each answer in a pair. If the weighted scores of a pair
   tie, both answers are dropped. The GRM is trained on these. --audit-answers of them are judged again, also by other
   judges.
5. split: a row goes where its prompt lies. Rows of held-out prompts are for evaluation.

    python data/annotate.py                                  # all five; a single one: python data/annotate.py pairs
    python data/annotate.py --models a=http://HOST:8000#qwen b=out/sft/policy --scorer a=http://HOST:8000#qwen \\
        --judge https://api.openai.com/v1#gpt-4o-mini --prices gpt-4o-mini=0.15/0.60 --max-cost 20 --plan
    python report.py out/data                                # the quality sheet

A model is `[NAME=]SPEC`. SPEC is http(s)://HOST#MODEL (an OpenAI-compatible server), FOLDER (a checkpoint on the engine
in this process, with the templates it was trained with), or FILE.py:FUNCTION. A function (row, answer) scores or
judges, as for --judge elsewhere; a function (row, seed) returns an answer or a list of questions. The scorer may be
bt:FOLDER, too. The defaults are functions of the generated world, and know only its personas and questions. Each
request is made once: data/ask.py says what is kept, when it stops and how it resumes.

The key for https://api.example.com is read from API_KEY_API_EXAMPLE_COM and goes to no other server. OPENAI_API_KEY is
for api.openai.com (docs/reliability.md, Keys).

Reads prompts_train and prompts_eval in OUT (data/prepare.py makes them from your own tables), or --prompts and
--eval-prompts, or --personas. With --personas, questions are written into prompts_train and, for a fraction of the
personas, prompts_eval. Writes to OUT
- pairs, judgements, and pairs_eval, judgements_eval for the held-out prompts (.jsonl): the inputs of the stages,
- annotate/STEP.jsonl: the rows of each step, in the order of its input whatever order the replies came in,
- annotate/dropped.jsonl: what failed (request, refused, unparsable, too long) or was discarded (duplicate, small gap,
  tie, ...), a row each, with step, why, cause and reason. Only --retry-failed asks for failures again,
- annotation.json: the settings and counts.

Departures from the paper: it does not say which two of the answers make a pair; here it is the two furthest apart, one
pair for a question. Overall scores may have decimals.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from runtime import flags

Step = Literal["all", "questions", "answers", "pairs", "judgements", "split"]


@dataclass(kw_only=True)
class Args:
    step: tyro.conf.Positional[Step] = "all"
    """all | questions | answers | pairs | judgements | split"""
    out: str = "out/data"
    """Folder of the output files and the journal."""
    prompts: tuple[str, ...] = ()
    """Files of prompt rows to train on. Default: prompts_train in OUT, as data/prepare.py writes it."""
    eval_prompts: tuple[str, ...] = ()
    """Files of held-out prompt rows. Default: prompts_eval in OUT if it exists, and none with --prompts."""
    personas: str | None = None
    """Personas to write questions for: a .csv, .jsonl or .parquet file, or a source, as for data/prepare.py."""
    persona_column: tuple[str, ...] = ()
    """Column or columns of the personas. Default: "persona" if there is one, else the whole row."""
    id_column: str = "user_id"
    """Column with the id of a persona, if there is one."""

    # -- who is asked
    models: tuple[str, ...] = ("world=data/persona_world.py:answer",)
    """Who answers questions. Several different models are best. The key for https://my.host is in API_KEY_MY_HOST."""
    writer: str = "world=data/persona_world.py:questions"
    """Who writes questions."""
    scorer: str = "world=data/persona_world.py:score"
    """Who gives overall scores."""
    judge: str = "world=data/persona_world.py:judge"
    """Who writes critiques and three scores."""
    questions_template: str | None = None
    """File with another request for questions. Default: the one in prompts.py."""
    answer_template: str | None = None
    """File with another prompt for answers, to train the policy with, too. Default: a model's own, or prompts.py's."""
    score_template: str | None = None
    """File with another request for an overall score. Default: the one in prompts.py."""
    grm_template: str | None = None
    """File with another rubric of the judge. Default: the judge's own, or prompts.py's."""

    # -- how much
    questions_per_persona: flags.Count = 5
    """Of each kind (specific, general)."""
    answers_per_model: flags.Count = 1
    """Per question. With a single model, a pair needs several."""
    min_gap: flags.NonNegative = 2
    """The scores of a pair differ by more than this. The world's exact scores need 0.6: they are closer together."""
    pairs_per_question: flags.Count = 1
    """Pairs with the largest difference in scores."""
    score_weights: tuple[flags.NonNegative, flags.NonNegative, flags.NonNegative] = flags.SCORE_WEIGHTS
    """Weights of helpfulness, personalization, naturalness. Equal weighted scores tie."""
    audit_answers: flags.Natural = 0
    """Judged answers that are judged again for the quality sheet; 100 are enough."""
    audit_repeats: flags.Count = 3
    """Judgements of each by each judge. The first one of --judge is the one trained on."""
    audit_judges: tuple[str, ...] = ()
    """Other judges for these answers."""
    eval_share: flags.Fraction | None = None
    """With --personas: fraction of them held out for evaluation, in [0, 1). Default: 0.1."""
    seed: int = 0
    """Seed of the replies and of drawn samples."""

    # -- sampling
    temperature: flags.NonNegative = 0.9
    """For answers and questions."""
    top_p: flags.TopP = 1.0
    """For answers and questions."""
    max_new_tokens: flags.Count = 1024
    """Tokens of an answer or a list of questions. A reply that is cut off has failed."""
    judge_temperature: flags.NonNegative = 0.9
    """For scores and critiques."""
    judge_max_new_tokens: flags.Count = 512
    """Tokens of a score, or of a critique with scores."""

    # -- limits
    plan: bool = False
    """Make about 20 requests, which are kept, and estimate the whole: calls, tokens, money, time."""
    prices: tuple[str, ...] = ()
    """NAME=IN/OUT: dollars for a million prompt tokens and reply tokens of a model."""
    max_cost: flags.NonNegative | None = None
    """Dollars to spend in this folder at most, over all runs. Then it stops as on Ctrl-C."""
    concurrency: flags.Count = 32
    """Requests under way to a server."""
    requests_per_minute: tuple[str, ...] = ()
    """NAME=NUMBER for a model, or a number for each of them."""
    attempts: flags.Count = 3
    """Replies to ask for before a request has failed for good (refused, cut off, unreadable)."""
    patience: flags.Positive = flags.PATIENCE
    """Seconds to wait for a server that is down, busy or sends garbage."""
    max_batch: flags.Count = 256
    """Sequences at once on the engine of a checkpoint."""
    retry_failed: bool = False
    """Ask again for what failed in earlier runs."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import dataclasses
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from fractions import Fraction
from random import Random
from typing import Any

import pandas as pd
from scipy import stats

from data import prepare
from data.ask import COUNTS, Limits, Model, PaidAsker, Request, named, open_models
from data.readers import normal
from json_files import read_json
from judges import BradleyTerryJudge
from prompts import (
    QUESTION_KINDS,
    answer_request,
    grm_request,
    parse_judgement,
    parse_questions,
    parse_score,
    questions_request,
    score_request,
)
from runtime.distributed import derive_seed, start
from runtime.rows import final_answer, json_lines, logged_rows, read_rows, refuse_held_out, write_rows, write_text

PLAN_REQUESTS = 20
PROMPT = ("prompt_id", "persona", "question", "source", "user_id", "kind", "reference")  # what later rows keep
SIDES = ("chosen", "rejected")


def prompt_of(row: dict) -> dict:
    return {name: row[name] for name in PROMPT if name in row}


# -- the requests of each step -----------------------------------------------------------------------------------------


def make_request(args: Args, model: Model, asks_for: str, row: dict, number: int = 0) -> Request:
    """asks_for: questions | answer | score | judgement, of row["answer"]. number: tells apart equal requests, by their
    seed.
    """
    readable = model.readable(row)
    parse: Any  # text -> a value
    if asks_for == "questions":
        text = questions_request(model.templates, readable["persona"], row["kind"], row["number"])
        parse = parse_questions if model.is_language_model else function_questions
    elif asks_for == "answer":
        text = answer_request(model.templates, readable)
        parse = final_answer
    elif asks_for == "score":
        text = score_request(model.templates, readable, readable["answer"])
        parse = parse_score if model.is_language_model else float
    else:
        text = grm_request(model.templates, readable, readable["answer"])
        parse = parse_judgement
    settings = dict(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens)
    if asks_for in ("score", "judgement"):
        settings = dict(temperature=args.judge_temperature, top_p=1.0, max_tokens=args.judge_max_new_tokens)
    settings["seed"] = derive_seed(args.seed, text, number)
    return Request(model, asks_for, text, settings, parse, row, row.get("answer"))


def function_questions(text: str) -> list[str] | None:
    """Questions that a function listed, which PaidAsker keeps as JSON, or gave in a language model's form."""
    return json.loads(text) if text.startswith("[") else parse_questions(text)


def questions_requests(args: Args, model: Model, personas: dict[str, dict | str]) -> list[Request]:
    """One for each persona and kind of question."""
    requests = []
    for (user_id, persona), kind in itertools.product(personas.items(), QUESTION_KINDS):
        row = dict(persona=persona, user_id=user_id, kind=kind, number=args.questions_per_persona)
        requests.append(make_request(args, model, "questions", row))
    return requests


def answer_requests(args: Args, models: list[Model], prompts: list[dict]) -> list[Request]:
    """Those of a prompt follow one another."""
    asked = itertools.product(prompts, models, range(args.answers_per_model))
    return [make_request(args, model, "answer", row, number) for row, model, number in asked]


# -- the steps ---------------------------------------------------------------------------------------------------------


def failed(step: str, reply: dict, row: dict) -> dict:
    """A row of annotate/dropped.jsonl."""
    return dict(step=step, why="failed", cause=reply["failure"], reason=reply["reason"]) | row


def discarded(step: str, cause: str, reason: str, row: dict) -> dict:
    return dict(step=step, why="discarded", cause=cause, reason=reason) | row


def questions(args: Args, asker: PaidAsker, model: Model) -> None:
    """personas -> annotate/questions.jsonl: prompt rows, with the kind of question; prompts_train, prompts_eval."""
    requests = questions_requests(args, model, read_personas(args))
    rows = {}  # by persona and question
    dropped = []
    n_written = 0
    for request, reply in zip(requests, asker.ask("questions", requests)):
        about = {name: request.row[name] for name in ("persona", "user_id", "kind")}
        if reply["failure"]:
            dropped.append(failed("questions", reply, about))
            continue
        for question in request.parse(reply["reply"])[: args.questions_per_persona]:
            n_written += 1
            row = prepare.prompt_row(about["persona"], question, f"written by {model.name}") | about
            key = prepare.digest(about["persona"], normal(question))
            if rows.setdefault(key, row) is not row:
                dropped.append(discarded("questions", "duplicate", "this person's question a second time", row))
    prompts = list(rows.values())
    write_step(args, "questions", prompts, dropped, asker, len(requests), n_written)
    share = 0.1 if args.eval_share is None else args.eval_share
    train, held_out = prepare.split(prompts, lambda row: prepare.in_held_out_share(row["persona"], share))
    write_side(args, "prompts_train", train)
    write_side(args, "prompts_eval", held_out)


def answers(args: Args, asker: PaidAsker, models: list[Model]) -> None:
    """prompts -> annotate/answers.jsonl: a prompt's fields, answer, model."""
    train, held_out = read_prompts(args)
    requests = answer_requests(args, models, train + held_out)
    rows = {}  # by prompt and answer
    dropped = []
    for request, reply in zip(requests, asker.ask("answers", requests)):
        row = prompt_of(request.row) | {"model": request.model.name}
        if reply["failure"]:
            dropped.append(failed("answers", reply, row))
            continue
        row["answer"] = request.parse(reply["reply"]).strip()
        if rows.setdefault((row["prompt_id"], normal(row["answer"])), row) is not row:
            dropped.append(discarded("answers", "duplicate", "the same answer to this question a second time", row))
    write_step(args, "answers", list(rows.values()), dropped, asker, len(requests), len(requests))


def pairs(args: Args, asker: PaidAsker, model: Model) -> None:
    """annotate/answers.jsonl -> annotate/scores.jsonl (the answers with scores), annotate/pairs.jsonl (pair rows)."""
    rows = read_rows(step_file(args, "answers"), "answer")
    requests = [make_request(args, model, "score", row) for row in rows]
    dropped = []
    of_prompt: dict[str, list[dict]] = {row["prompt_id"]: [] for row in rows}
    for request, reply in zip(requests, asker.ask("scores", requests)):
        if reply["failure"]:
            dropped.append(failed("pairs", reply, request.row))
        else:
            of_prompt[request.row["prompt_id"]].append(request.row | {"score": request.parse(reply["reply"])})
    write_rows(step_file(args, "scores"), [row for scored in of_prompt.values() for row in scored])
    prompts = {row["prompt_id"]: prompt_of(row) for row in rows}
    found = []
    for prompt_id, scored in of_prompt.items():
        apart = [sorted(pair, key=lambda row: row["score"]) for pair in itertools.combinations(scored, 2)]
        apart.sort(key=gap, reverse=True)  # if equal, the pair whose answers came first
        kept = [pair for pair in apart if gap(pair) > Fraction(str(args.min_gap))]
        for pair in kept[: args.pairs_per_question]:
            row = dict(prompts[prompt_id])
            for side, answer in zip(("rejected", "chosen"), pair):
                row |= {side: answer["answer"], f"{side}_score": answer["score"], f"{side}_model": answer["model"]}
            found.append(row)
        if not kept:
            about = prompts[prompt_id] | {"scores": [row["score"] for row in scored]}
            cause, reason = "no pair", "fewer than two scored answers"
            if apart:
                cause, reason = "small gap", f"no two scores differ by more than {args.min_gap:g}"
            dropped.append(discarded("pairs", cause, reason, about))
    write_step(args, "pairs", found, dropped, asker, len(requests), len(of_prompt))


def gap(pair: Sequence[dict]) -> Fraction:
    """Difference of the scores of (rejected, chosen), exactly: as floats 4.4 - 2.4 is more than 2."""
    low, high = (Fraction(str(row["score"])) for row in pair)
    return high - low


def judgements(args: Args, asker: PaidAsker, model: Model, others: list[Model]) -> None:
    """annotate/pairs.jsonl -> annotate/judgements.jsonl: judgement rows, each answer once; annotate/audit.jsonl."""
    pair_rows = read_rows(step_file(args, "pairs"), "pair")
    rows: dict[tuple[str, str], dict] = {}  # {(prompt_id, answer): row}: an answer may be in several pairs
    for pair in pair_rows:
        for side in SIDES:
            row = prompt_of(pair)
            row |= dict(answer=pair[side], model=pair[f"{side}_model"], score=pair[f"{side}_score"])
            rows.setdefault((pair["prompt_id"], pair[side]), row)
    requests = [make_request(args, model, "judgement", row) for row in rows.values()]
    dropped = []
    judged = {}
    for (key, row), reply in zip(rows.items(), asker.ask("judgements", requests)):
        if reply["failure"]:
            dropped.append(failed("judgements", reply, row))
        else:
            judged[key] = parse_judgement(reply["reply"])
    judged_rows = {key: rows[key] | dataclasses.asdict(judgement) for key, judgement in judged.items()}
    kept = set()
    reasons: dict[tuple[str, str], tuple[str, str]] = {}  # why an answer is dropped, unless another pair keeps it
    for pair in pair_rows:
        sides = [(pair["prompt_id"], pair[side]) for side in SIDES]
        keys = [key for key in sides if key in judged]
        scores = [judged[key].score(args.score_weights) for key in keys]
        if len(set(scores)) == 2:
            kept |= set(sides)
            continue
        cause, reason = "alone", "the other answer of its pair has no judgement, so that a tie can't be seen"
        if len(scores) == 2:
            cause, reason = "tie", f"both answers have the weighted score {scores[0]:g}"
        reasons |= dict.fromkeys(keys, (cause, reason))
    dropped += [discarded("judgements", *why, judged_rows[key]) for key, why in reasons.items() if key not in kept]
    found = [judged_rows[key] | {"judge": model.name} for key in rows if key in kept]
    audit(args, asker, [model, *others], [rows[key] for key in rows if key in kept])
    write_step(args, "judgements", found, dropped, asker, len(rows), len(rows))


def audit(args: Args, asker: PaidAsker, judges: list[Model], rows: list[dict]) -> None:
    """annotate/audit.jsonl: some answers judged several times by each judge. A failure is a row without scores."""
    drawn = sorted(Random(args.seed).sample(range(len(rows)), min(args.audit_answers, len(rows))))
    asked = list(itertools.product(judges, range(args.audit_repeats), [rows[i] for i in drawn]))
    requests = [make_request(args, judge, "judgement", row, repeat) for judge, repeat, row in asked]
    found = []
    for (judge, repeat, row), reply in zip(asked, asker.ask("audit", requests) if requests else ()):
        about = dict(prompt_id=row["prompt_id"], answer=row["answer"], judge=judge.name, repeat=repeat)
        if reply["failure"]:
            found.append(about | dict(failure=reply["failure"], reason=reply["reason"]))
        else:
            found.append(about | dataclasses.asdict(parse_judgement(reply["reply"])))
    write_rows(step_file(args, "audit"), found)


def split(args: Args) -> None:
    """Writes the rows to train on, and those of the held-out prompts. ValueError: a row of neither."""
    train, held_out = ({row["prompt_id"] for row in prompts} for prompts in read_prompts(args))
    for name in ("pairs", "judgements"):
        file = step_file(args, name)
        rows = read_rows(file, name[:-1])
        for row in rows:
            if row["prompt_id"] not in train | held_out:
                raise ValueError(f'{file}: prompt_id "{row["prompt_id"]}" is none of the prompts; make {name} again')
        for side in (name, f"{name}_eval"):
            set_aside(args, side, "chosen_model" if name == "pairs" else "judge")
        write_side(args, name, [row for row in rows if row["prompt_id"] in train])
        write_side(args, f"{name}_eval", [row for row in rows if row["prompt_id"] in held_out])
    print(f"look at it: python report.py {args.out}")
    print(f"next:       python sft.py --model MODEL --data {args.out}/pairs.jsonl")
    print(f"            python train_grm.py --model MODEL --data {args.out}/judgements.jsonl")


# -- files -------------------------------------------------------------------------------------------------------------


def step_file(args: Args, name: str) -> str:
    return os.path.join(args.out, "annotate", f"{name}.jsonl")


def read_personas(args: Args) -> dict[str, dict | str]:
    table = prepare.Args(personas=args.personas, persona_column=args.persona_column, id_column=args.id_column)
    return prepare.own_personas(table, needs_ids=False)


def read_prompts(args: Args) -> tuple[list[dict], list[dict]]:
    """-> prompts to train on, and held-out prompts. ValueError: none, or one that is both."""

    def in_out(name: str) -> list[str]:
        file = os.path.join(args.out, f"prompts_{name}.jsonl")
        return [file] if os.path.isfile(file) and os.path.getsize(file) else []

    files = args.prompts or in_out("train")
    eval_files = args.eval_prompts or ([] if args.prompts else in_out("eval"))
    train, held_out = distinct_prompts(files), distinct_prompts(eval_files)
    for file in files:
        refuse_held_out(file, *eval_files)
    if not train + held_out:
        raise ValueError(
            f"no prompts: {args.out} has no prompts_train.jsonl (data/prepare.py makes it of your tables); give "
            "--prompts FILE, or --personas FILE to have questions written"
        )
    return train, held_out


def distinct_prompts(files: Sequence[str]) -> list[dict]:
    """Prompts of the files, each once. ValueError: one prompt_id for two prompts."""
    prompts: dict[str, dict] = {}
    for file in files:
        for row in read_rows(file, "prompt"):
            first = prompts.setdefault(row["prompt_id"], row)
            if (first["persona"], first["question"]) != (row["persona"], row["question"]):
                raise ValueError(f'{file}: prompt_id "{row["prompt_id"]}" is of another prompt in another file')
    return list(prompts.values())


def set_aside(args: Args, name: str, field: str) -> None:
    """Renames OUT/NAME.jsonl if another command made it: its first row lacks a field that rows have here."""
    path = os.path.join(args.out, f"{name}.jsonl")
    if os.path.isfile(path) and field not in next((row for _, row in json_lines(path)), {field: ""}):
        kept = os.path.join(args.out, f"{name}.before.jsonl")
        os.replace(path, kept)
        print(f"{path} was made by another command, and is now {kept}")


def write_side(args: Args, name: str, rows: list[dict]) -> None:
    write_rows(os.path.join(args.out, f"{name}.jsonl"), rows)
    print(f"{len(rows):7d} {args.out}/{name}.jsonl")


def write_step(
    args: Args, step: str, rows: list[dict], dropped: list[dict], asker: PaidAsker, requests: int, discarded_of: int
) -> None:
    """annotate/STEP.jsonl, this step's part of annotate/dropped.jsonl and of annotation.json.

    requests and discarded_of: the totals for the fractions of failures and discards. ValueError: nothing is left.
    """
    file = step_file(args, "dropped")
    write_rows(file, [row for row in logged_rows(file, ["step"]) if row["step"] != step] + dropped)
    write_rows(step_file(args, step), rows)
    counts = dict(sorted(Counter(f"{row['why']}: {row['cause']}" for row in dropped).items()))
    say = ", ".join(f"{n} {what}" for what, n in counts.items())
    reasons = [row["reason"] for row in dropped if row["why"] == "failed"]
    if reasons:
        say += f"; the first failure: {reasons[0]}"
    print(f"{step}: {len(rows)} rows" + (f"; {say} (annotate/dropped.jsonl)" if say else ""), flush=True)
    summary_file = os.path.join(args.out, "annotation.json")
    summary = read_json(summary_file) if os.path.isfile(summary_file) else {"steps": {}}
    fractions_of = dict(failed=requests, discarded=discarded_of)
    summary["args"] = flags.record(args)
    summary["steps"][step] = dict(rows=len(rows), dropped=counts, of=fractions_of)
    summary["models"] = spent_by_model(asker)
    write_text(summary_file, json.dumps(summary, ensure_ascii=False, indent=1))
    if not rows:
        raise ValueError(f"{step}: nothing is left; {say} (see {file})")


def spent_by_model(asker: PaidAsker) -> dict[str, dict]:
    """{"step, model": COUNTS} over all requests in the journal."""
    found: dict[str, Counter] = defaultdict(Counter)
    for row in asker.rows.values():
        found[f"{row['step']}, {row['model']}"].update({"requests": 1, **{name: row[name] for name in COUNTS}})
    return {name: {k: round(v, 6) for k, v in counts.items()} for name, counts in sorted(found.items())}


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(args: Args, asker: PaidAsker, models: list[Model], writer: Model, scorer: Model, judge: Model) -> None:
    """Makes a few requests of each step, drawn at random, and prints an estimate for all of them.

    Tokens, dollars and seconds of a call are means over the calls made, with 95 % intervals (Student's t).
    """
    rng = Random(args.seed)
    steps = []  # (step, requests in all, replies to a few)
    n_drawn = PLAN_REQUESTS // (4 if args.personas else 3)

    def draw(items: list) -> list:
        return rng.sample(items, min(n_drawn, len(items)))

    def answered(step: str, n: int, requests: list[Request]) -> list[tuple[Request, Any]]:
        """(request, value of its reply) of a few."""
        drawn = draw(requests)
        replies = asker.ask(step, drawn)
        steps.append((step, n, replies))
        pairs = zip(drawn, replies)
        return [(request, request.parse(reply["reply"])) for request, reply in pairs if not reply["failure"]]

    if args.personas:
        personas = read_personas(args)
        requests = questions_requests(args, writer, {name: personas[name] for name in draw(list(personas))})
        n_requests = len(personas) * len(QUESTION_KINDS)
        prompts = []
        for request, written in answered("questions", n_requests, requests):
            prompts += [prepare.prompt_row(request.row["persona"], question, "plan") for question in written]
        n_prompts = n_requests * args.questions_per_persona
    else:
        train, held_out = read_prompts(args)
        prompts = train + held_out
        n_prompts = len(prompts)
    n_answers = n_prompts * len(models) * args.answers_per_model
    replies = answered("answers", n_answers, answer_requests(args, models, draw(prompts)))
    rows = [request.row | {"answer": answer.strip()} for request, answer in replies]
    answered("scores", n_answers, [make_request(args, scorer, "score", row) for row in rows])
    at_most = min(n_answers, 2 * args.pairs_per_question * n_prompts)
    answered("judgements", at_most, [make_request(args, judge, "judgement", row) for row in rows])
    print_plan(args, asker, steps, len(models))


def print_plan(args: Args, asker: PaidAsker, steps: list[tuple[str, int, list[dict]]], n_models: int) -> None:
    table = [["step", "requests", "tokens in", "tokens out", "dollars", "minutes", "failed"]]
    totals = []  # of the steps: means, and squared half widths of their intervals
    for step, n, replies in steps:
        if not replies:
            raise ValueError("--plan: no request of a step has been answered; see the failures in OUT/journal")
        at_once = args.concurrency * (n_models if step == "answers" else 1)
        figures = pd.DataFrame(replies)[["prompt_tokens", "completion_tokens", "cost", "seconds"]] * n
        figures["seconds"] /= 60 * at_once  # requests are made side by side
        mean = figures.mean()
        half = (stats.t.ppf(0.975, len(replies) - 1) * figures.sem()).fillna(math.inf)  # unknown of a single call
        totals.append((mean, half**2))
        n_failed = sum(row["failure"] is not None for row in replies)
        bound = "at most " if step == "judgements" else ""
        table.append([step, f"{bound}{n:,}", *map(between, mean, half), f"{n_failed} of {len(replies)}"])
    mean, variance = map(sum, zip(*totals))
    table.append(["all", f"{sum(n for _, n, _ in steps):,}", *map(between, mean, variance**0.5), ""])
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())
    n_made = sum(len(replies) for *_, replies in steps)
    print(f"\n{n_made} requests were made for this, and are kept; ${asker.spent:.4f} are spent in {args.out}")
    print(
        f"minutes: as fast as these, --concurrency {args.concurrency} at a time; limits and a busier server add to it"
    )
    for step, _, replies in steps:
        reasons = [row["reason"] for row in replies if row["failure"]]
        if reasons:
            print(f"{step}: {len(reasons)} of {len(replies)} failed, the first: {reasons[0]}")
    if args.audit_answers:
        n_audits = (1 + len(args.audit_judges)) * args.audit_repeats - 1
        print(f"the audit adds {args.audit_answers * n_audits} judgements")


def between(mean: float, half: float) -> str:
    """ "120 (90-150)", or a single number if both ends read the same."""

    def short(x: float) -> str:
        if x >= 100:
            return f"{x:,.0f}"
        return f"{x:.3g}" if x >= 0.01 or x == 0 else "<0.01"

    low, high = short(max(0, mean - half)), short(mean + half)
    return short(mean) if low == high else f"{short(mean)} ({low}-{high})"


# -- main --------------------------------------------------------------------------------------------------------------


def by_name(values: tuple[str, ...], flag: str, names: set[str], read) -> dict:
    """{NAME: read(VALUE)} of NAME=VALUE flags; "" without a name. ValueError: no such model, no such value."""
    found = {}
    for value in values:
        name, _, text = value.rpartition("=")
        if name and name not in names:
            raise ValueError(f"{flag} {value}: no model is called {name}; there are {', '.join(sorted(names))}")
        try:
            found[name] = read(text)
        except ValueError as error:
            raise ValueError(f"{flag} {value}: {error}") from error
    return found


def positive(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError("expected a positive number")
    return number


def prices(text: str) -> tuple[float, float]:
    numbers = [float(part) for part in text.split("/")]
    if len(numbers) != 2 or not all(0 <= n < math.inf for n in numbers):
        raise ValueError("expected NAME=IN/OUT, dollars for a million tokens")
    return tuple(numbers)


def main(args: Args) -> None:
    if args.eval_share is not None and args.personas is None:
        raise ValueError(
            f"--eval-share {args.eval_share}: only with --personas; the prompts of --prompts have their sides"
        )
    if args.eval_share == 1:
        raise ValueError("--eval-share 1.0: expected a share in [0, 1)")
    if args.step == "questions" and args.personas is None:
        raise ValueError("questions: give --personas, for whom to write them")
    if args.step == "split":
        return split(args)
    if args.max_cost is not None and not args.prices:
        raise ValueError("--max-cost: give --prices, or nothing is known to cost anything")
    specs = (*args.models, args.writer, args.scorer, args.judge, *args.audit_judges)
    names = {named(spec)[0] for spec in specs}
    copied = ("concurrency", "attempts", "max_cost", "retry_failed", "patience", "max_batch")
    limits = Limits(
        args.out,
        prices=by_name(args.prices, "--prices", names, prices),
        per_minute=by_name(args.requests_per_minute, "--requests-per-minute", names, positive),
        **{name: getattr(args, name) for name in copied},
    )
    ranks = start("auto")
    templates = {f"{k}_template": getattr(args, f"{k}_template") for k in ("questions", "answer", "score", "grm")}
    opened = open_models(specs, ranks, limits, args.score_weights, **templates)
    for spec in (args.judge, *args.audit_judges):
        if opened[spec].writes_critiques is False:
            raise ValueError(f"{spec}: it writes no critiques, which judgements need")
    for spec in (*args.models, args.writer):
        if opened[spec].kind is BradleyTerryJudge:
            raise ValueError(f"{spec}: a Bradley-Terry model scores answers, and writes none")
    models = [opened[spec] for spec in args.models]
    writer, scorer, judge = (opened[spec] for spec in (args.writer, args.scorer, args.judge))
    with PaidAsker(limits, ranks) as asker:
        if args.plan:
            return plan(args, asker, models, writer, scorer, judge)
        if args.step == "questions" or args.step == "all" and args.personas is not None:
            questions(args, asker, writer)
        if args.step in ("all", "answers"):
            answers(args, asker, models)
        if args.step in ("all", "pairs"):
            pairs(args, asker, scorer)
        if args.step in ("all", "judgements"):
            judgements(args, asker, judge, [opened[spec] for spec in args.audit_judges])
    if args.step == "all":
        split(args)


if __name__ == "__main__":
    flags.run(main, ARGS)
