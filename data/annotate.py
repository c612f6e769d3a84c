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

A model is `[NAME=]SPEC`. SPEC is http(s)://HOST#MODEL (OpenAI-compatible; the key is in OPENAI_API_KEY), FOLDER (a
checkpoint on the engine in this process, with the templates it was trained with), or FILE.py:FUNCTION. A function
(row, answer) scores or judges, as for --judge elsewhere; a function (row, seed) returns an answer or a list of
questions. The scorer may be bt:FOLDER, too. The defaults are functions of the generated world, and know only its
personas and questions. Each request is made once: data/ask.py says what is kept, when it stops and how it resumes.

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
    """Files of held-out prompt rows. Default, without --prompts: prompts_eval in OUT, if it exists."""
    personas: str | None = None
    """Personas to write questions for: a .csv, .jsonl or .parquet file, or a source, as for data/prepare.py."""
    persona_column: tuple[str, ...] = ()
    """Column or columns of the personas. Default: "persona" if there is one, else the whole row."""
    id_column: str = "user_id"
    """Column with the id of a persona, if there is one."""

    # -- who is asked
    models: tuple[str, ...] = ("world=data/persona_world.py:answer",)
    """Who answers questions. Several different models are best."""
    writer: str = "world=data/persona_world.py:questions"
    """Who writes questions."""
    scorer: str = "world=data/persona_world.py:score"
    """Who gives overall scores."""
    judge: str = "world=data/persona_world.py:judge"
    """Who writes critiques and three scores."""
    questions_template: str | None = None
    """File that replaces the request for questions (prompts.py)."""
    answer_template: str | None = None
    """File that replaces the prompt for answers of all models. The policy will be trained with it."""
    score_template: str | None = None
    """File that replaces the request for an overall score."""
    grm_template: str | None = None
    """File that replaces the rubric of the judge."""

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
    """With --personas: fraction of them held out for evaluation, in [0, 1); none: 0.1."""
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
from collections.abc import Callable
from random import Random
from typing import Any

from scipy import stats

from data import prepare
from data.ask import COUNTS, Limits, Model, PaidAsker, Request, named, open_models
from data.readers import normal
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
from runtime.rows import final_answer, read_rows, refuse_held_out, write_rows, write_text

PLAN_REQUESTS = 20
PROMPT = ("prompt_id", "persona", "question", "source", "user_id", "kind", "reference")  # what later rows keep


# -- the requests of each step -----------------------------------------------------------------------------------------


def make_request(
    args: Args, model: Model, asks_for: str, row: dict, answer: str | None = None, number: int = 0
) -> Request:
    """asks_for: questions | answer | score | judgement. number: tells apart equal requests, by their seed."""
    readable_row = model.readable(row)
    readable_answer = model.readable(answer)
    parse: Callable[[str], Any]
    if asks_for == "questions":
        persona = readable_row["persona"]
        text = questions_request(model.templates, persona, row["kind"], row["number"])
        parse = parse_questions
    elif asks_for == "answer":
        text = answer_request(model.templates, readable_row)
        parse = final_answer
    elif asks_for == "score":
        text = score_request(model.templates, readable_row, readable_answer)
        parse = parse_score if model.is_language_model else float
    else:
        text = grm_request(model.templates, readable_row, readable_answer)
        parse = parse_judgement
    judging = asks_for in ("score", "judgement")
    settings = sampling(args, text, number, judging)
    return Request(model, asks_for, text, settings, parse, row, answer)


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
    return [make_request(args, model, "answer", row, number=i) for row, model, i in asked]


def judging_requests(args: Args, model: Model, asks_for: str, answers: list[dict], repeat: int = 0) -> list[Request]:
    """asks_for: score | judgement."""
    return [make_request(args, model, asks_for, row, row["answer"], repeat) for row in answers]


def sampling(args: Args, text: str, number: int, judging: bool = False) -> dict:
    """Settings of a request; the seed tells apart what is asked several times with the same text."""
    seed = derive_seed(args.seed, text, number)
    if judging:
        return dict(temperature=args.judge_temperature, top_p=1.0, max_tokens=args.judge_max_new_tokens, seed=seed)
    return dict(temperature=args.temperature, top_p=args.top_p, max_tokens=args.max_new_tokens, seed=seed)


# -- the steps ---------------------------------------------------------------------------------------------------------


def questions(args: Args, asker: PaidAsker, model: Model) -> None:
    """personas -> annotate/questions.jsonl: prompt rows, with the kind of question; prompts_train, prompts_eval."""
    requests = questions_requests(args, model, read_personas(args))
    rows = []
    seen = set()
    done = Done("questions")
    for request, reply in zip(requests, asker.ask("questions", requests)):
        about = {name: request.row[name] for name in ("persona", "user_id", "kind")}
        if reply["failure"]:
            done.failed(about, reply)
            continue
        for question in parse_questions(reply["reply"])[: args.questions_per_persona]:
            row = prepare.prompt_row(about["persona"], question, f"written by {model.name}") | about
            key = prepare.digest(about["persona"], normal(question))
            if key in seen:
                done.discard(row, "duplicate", "this person's question a second time")
            else:
                seen.add(key)
                rows.append(row)
    written = len(rows) + sum(row["why"] == "discarded" for row in done.dropped)
    done.write(args, rows, asker, len(requests), written)
    share = 0.1 if args.eval_share is None else args.eval_share
    train, held_out = prepare.split(rows, lambda row: prepare.in_held_out_share(row["persona"], share))
    write_side(args, "prompts_train", train)
    write_side(args, "prompts_eval", held_out)


def answers(args: Args, asker: PaidAsker, models: list[Model]) -> None:
    """prompts -> annotate/answers.jsonl: a prompt's fields, answer, model."""
    train, held_out = read_prompts(args)
    requests = answer_requests(args, models, train + held_out)
    rows = []
    seen = set()
    done = Done("answers")
    for request, reply in zip(requests, asker.ask("answers", requests)):
        row = {k: v for k, v in request.row.items() if k in PROMPT} | {"model": request.model.name}
        if reply["failure"]:
            done.failed(row, reply)
            continue
        row["answer"] = request.parse(reply["reply"]).strip()
        if (row["prompt_id"], normal(row["answer"])) in seen:
            done.discard(row, "duplicate", "the same answer to this question a second time")
        else:
            seen.add((row["prompt_id"], normal(row["answer"])))
            rows.append(row)
    done.write(args, rows, asker, len(requests), len(requests))


def pairs(args: Args, asker: PaidAsker, model: Model) -> None:
    """annotate/answers.jsonl -> annotate/scores.jsonl (the answers with scores), annotate/pairs.jsonl (pair rows)."""
    rows = read_rows(step_file(args, "answers"), "answer")
    requests = judging_requests(args, model, "score", rows)
    done = Done("pairs")
    of_prompt = defaultdict(list)
    for request, row, reply in zip(requests, rows, asker.ask("scores", requests)):
        of_prompt[row["prompt_id"]]  # an entry even for a prompt without a score
        if reply["failure"]:
            done.failed(row, reply)
        else:
            of_prompt[row["prompt_id"]].append(row | {"score": request.parse(reply["reply"])})
    write_rows(step_file(args, "scores"), [row for scored in of_prompt.values() for row in scored])
    found = []
    prompts = {row["prompt_id"]: row for row in rows}
    for prompt_id, scored in of_prompt.items():
        # the largest difference first; if equal, the pair whose answers came first
        apart = sorted(itertools.combinations(scored, 2), key=lambda pair: -abs(pair[0]["score"] - pair[1]["score"]))
        kept = [pair for pair in apart if abs(pair[0]["score"] - pair[1]["score"]) > args.min_gap]
        prompt = {k: v for k, v in prompts[prompt_id].items() if k in PROMPT}
        if not kept:
            about = prompt | {"scores": [row["score"] for row in scored]}
            reason = f"no two scores differ by more than {args.min_gap:g}" if apart else "fewer than two scored answers"
            done.discard(about, "small gap" if apart else "no pair", reason)
        for pair in kept[: args.pairs_per_question]:
            sides = zip(("rejected", "chosen"), sorted(pair, key=lambda row: row["score"]))
            for side, row in sides:
                prompt |= {side: row["answer"], f"{side}_score": row["score"], f"{side}_model": row["model"]}
            found.append(dict(prompt))
    done.write(args, found, asker, len(requests), len(of_prompt))


def judgements(args: Args, asker: PaidAsker, model: Model, others: list[Model]) -> None:
    """annotate/pairs.jsonl -> annotate/judgements.jsonl: judgement rows, each answer once; annotate/audit.jsonl."""
    pair_rows = read_rows(step_file(args, "pairs"), "pair")
    done = Done("judgements")
    rows = {}  # {(prompt_id, answer): row}: an answer may be in several pairs
    for pair in pair_rows:
        prompt = {k: v for k, v in pair.items() if k in PROMPT}
        for side in ("chosen", "rejected"):
            row = prompt | dict(answer=pair[side], model=pair[f"{side}_model"], score=pair[f"{side}_score"])
            rows.setdefault((pair["prompt_id"], pair[side]), row)
    replies = asker.ask("judgements", judging_requests(args, model, "judgement", list(rows.values())))
    judged = {}
    for (key, row), reply in zip(rows.items(), replies):
        if reply["failure"]:
            done.failed(row, reply)
        else:
            judged[key] = parse_judgement(reply["reply"])
    kept = set()
    for pair in pair_rows:
        sides = [(pair["prompt_id"], pair[side]) for side in ("chosen", "rejected")]
        scores = [judged[key].score(args.score_weights) for key in sides if key in judged]
        if len(scores) == 2 and scores[0] != scores[1]:
            kept |= set(sides)
            continue
        for key in sides:
            if key in judged:
                tie = f"both answers have the weighted score {scores[0]:g}"
                alone = "the other answer of its pair has no judgement, so that a tie can't be seen"
                row = rows[key] | dataclasses.asdict(judged[key])
                done.discard(row, *(("tie", tie) if len(scores) == 2 else ("alone", alone)))
    found = [row | dataclasses.asdict(judged[key]) | {"judge": model.name} for key, row in rows.items() if key in kept]
    audit(args, asker, [model, *others], found)
    done.write(args, found, asker, len(rows), len(rows))


def audit(args: Args, asker: PaidAsker, judges: list[Model], rows: list[dict]) -> None:
    """annotate/audit.jsonl: some answers judged several times by each judge. A failure is a row without scores."""
    chosen = sorted(Random(args.seed).sample(range(len(rows)), min(args.audit_answers, len(rows))))
    drawn = [rows[i] for i in chosen]
    found = []
    asked = [(judge, repeat) for judge in judges for repeat in range(args.audit_repeats)]
    requests = [r for judge, repeat in asked for r in judging_requests(args, judge, "judgement", drawn, repeat)]
    replies = iter(asker.ask("audit", requests)) if requests else iter(())
    for (judge, repeat), row in itertools.product(asked, drawn):
        reply = next(replies)
        found.append(dict(prompt_id=row["prompt_id"], answer=row["answer"], judge=judge.name, repeat=repeat))
        if reply["failure"]:
            found[-1] |= dict(failure=reply["failure"], reason=reply["reason"])
        else:
            found[-1] |= dataclasses.asdict(parse_judgement(reply["reply"]))
    write_rows(step_file(args, "audit"), found)


def split(args: Args) -> None:
    """Writes the rows to train on, and those of the held-out prompts. ValueError: a row of neither."""
    train, held_out = ({row["prompt_id"] for row in prompts} for prompts in read_prompts(args))
    for name, kind in (("pairs", "pair"), ("judgements", "judgement")):
        file = step_file(args, name)
        rows = read_rows(file, kind)
        for row in rows:
            if row["prompt_id"] not in train | held_out:
                raise ValueError(f'{file}: prompt_id "{row["prompt_id"]}" is none of the prompts; make {name} again')
        write_side(args, name, [row for row in rows if row["prompt_id"] in train])
        write_side(args, f"{name}_eval", [row for row in rows if row["prompt_id"] in held_out])
    print(f"next: python train_grm.py --data {args.out}/judgements.jsonl, and python report.py {args.out}")


# -- files -------------------------------------------------------------------------------------------------------------


def step_file(args: Args, name: str) -> str:
    return os.path.join(args.out, "annotate", f"{name}.jsonl")


def read_personas(args: Args) -> dict[str, dict | str]:
    table = prepare.Args(personas=args.personas, persona_column=args.persona_column, id_column=args.id_column)
    return prepare.own_personas(table, needs_ids=False)


def write_side(args: Args, name: str, rows: list[dict]) -> None:
    write_rows(os.path.join(args.out, f"{name}.jsonl"), rows)
    print(f"{len(rows):7d} {args.out}/{name}.jsonl")


def read_prompts(args: Args) -> tuple[list[dict], list[dict]]:
    """-> prompts to train on, and held-out prompts. ValueError: none, or one that is both."""
    sides = [args.prompts, args.eval_prompts]
    if not any(sides):
        files = [os.path.join(args.out, f"prompts_{name}.jsonl") for name in ("train", "eval")]
        sides = [[file] if os.path.isfile(file) and os.path.getsize(file) else [] for file in files]
    train, held_out = ([row for file in files for row in read_rows(file, "prompt")] for files in sides)
    for file in sides[0]:
        refuse_held_out(file, *sides[1])
    if not train + held_out:
        raise ValueError(
            f"no prompts: {args.out} has no prompts_train.jsonl (data/prepare.py makes it of your tables); give "
            "--prompts FILE, or --personas FILE to have questions written"
        )
    return train, held_out


class Done:
    """The rows that a step drops, and the writer of its files."""

    def __init__(self, step: str):
        self.step, self.dropped = step, []

    def failed(self, row: dict, reply: dict) -> None:
        self.drop("failed", reply["failure"], reply["reason"], row)

    def discard(self, row: dict, cause: str, reason: str) -> None:
        self.drop("discarded", cause, reason, row)

    def drop(self, why: str, cause: str, reason: str, row: dict) -> None:
        self.dropped.append(dict(step=self.step, why=why, cause=cause, reason=reason) | row)

    def write(self, args: Args, rows: list[dict], asker: PaidAsker, requests: int, discarded_of: int) -> None:
        """annotate/STEP.jsonl, this step's part of annotate/dropped.jsonl and of annotation.json.

        requests and discarded_of: the totals for the fractions of failures and discards. ValueError: nothing is left.
        """
        file = step_file(args, "dropped")
        before = []
        if os.path.isfile(file) and os.path.getsize(file):
            before = [row for row in read_rows(file, "object") if row["step"] != self.step]
        write_rows(file, before + self.dropped)
        write_rows(step_file(args, self.step), rows)
        counts = Counter(f"{row['why']}: {row['cause']}" for row in self.dropped)
        say = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        print(f"{self.step}: {len(rows)} rows" + (f"; {say} (annotate/dropped.jsonl)" if say else ""), flush=True)
        file = os.path.join(args.out, "annotation.json")
        summary = {"steps": {}}
        if os.path.isfile(file):
            with open(file, encoding="utf-8") as f:
                summary = json.load(f)
        summary["args"] = dataclasses.asdict(args)
        shares_of = dict(failed=requests, discarded=discarded_of)
        summary["steps"][self.step] = dict(rows=len(rows), dropped=dict(sorted(counts.items())), of=shares_of)
        summary["models"] = spent_by_model(asker)
        write_text(file, json.dumps(summary, ensure_ascii=False, indent=1))
        if not rows:
            raise ValueError(f"{self.step}: nothing is left; {say}: see {step_file(args, 'dropped')}")


def spent_by_model(asker: PaidAsker) -> dict[str, dict]:
    """{"step, model": COUNTS} over all requests in the journal."""
    found = defaultdict(Counter)
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

    def some(step, n, requests):
        """Returns (request, reply) of those that were answered."""
        drawn = rng.sample(requests, min(n_drawn, len(requests)))
        replies = asker.ask(step, drawn)
        steps.append((step, n, replies))
        return [(request, reply["reply"]) for request, reply in zip(drawn, replies) if not reply["failure"]]

    if args.personas:
        personas = read_personas(args)
        names = rng.sample(list(personas), min(n_drawn, len(personas)))
        requests = questions_requests(args, writer, {name: personas[name] for name in names})
        n_requests = len(personas) * len(QUESTION_KINDS)
        prompts = [
            prepare.prompt_row(request.row["persona"], question, "plan")
            for request, reply in some("questions", n_requests, requests)
            for question in parse_questions(reply)
        ]
        n_prompts = n_requests * args.questions_per_persona
    else:
        train, held_out = read_prompts(args)
        prompts = train + held_out
        n_prompts = len(prompts)
    n_answers = n_prompts * len(models) * args.answers_per_model
    requests = answer_requests(args, models, rng.sample(prompts, min(n_drawn, len(prompts))))
    answered = some("answers", n_answers, requests)
    rows = [request.row | {"answer": request.parse(reply).strip()} for request, reply in answered]
    some("scores", n_answers, judging_requests(args, scorer, "score", rows))
    at_most = min(n_answers, 2 * args.pairs_per_question * n_prompts)
    some("judgements", at_most, judging_requests(args, judge, "judgement", rows))
    print_plan(args, asker, steps, len(models))


def print_plan(args: Args, asker: PaidAsker, steps: list[tuple], n_models: int) -> None:
    figures = {"prompt_tokens": "tokens in", "completion_tokens": "tokens out", "cost": "dollars", "seconds": "minutes"}
    table = [["step", "requests", *figures.values(), "failed"]]
    means = Counter()
    squares = Counter()  # sums over the steps of the squared half widths
    for step, n, replies in steps:
        cells = []
        for name in figures:
            scale = n
            if name == "seconds":  # requests are made side by side
                scale = n / 60 / (args.concurrency * (n_models if step == "answers" else 1))
            mean, half = interval([row[name] for row in replies])
            cells.append(between(scale * mean, scale * half))
            means[name] += scale * mean
            squares[name] += (scale * half) ** 2
        failed = sum(row["failure"] is not None for row in replies)
        bound = "at most " if step == "judgements" else ""
        table.append([step, f"{bound}{n:,}", *cells, f"{failed} of {len(replies)}"])
    cells = [between(means[name], math.sqrt(squares[name])) for name in figures]
    table.append(["all", f"{sum(n for _, n, _ in steps):,}", *cells, ""])
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for row in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)).rstrip())
    made, audits = sum(len(r) for *_, r in steps), (1 + len(args.audit_judges)) * args.audit_repeats - 1
    print(f"\n{made} requests were made for this, and are kept; ${asker.spent:.4f} are spent in {args.out}")
    print(
        f"minutes: as fast as these, --concurrency {args.concurrency} at a time; limits and a busier server add to it"
    )
    for step, _, replies in steps:
        reasons = [row["reason"] for row in replies if row["failure"]]
        if reasons:
            print(f"{step}: {len(reasons)} of {len(replies)} failed, the first: {reasons[0]}")
    if args.audit_answers:
        print(f"the audit adds {args.audit_answers * audits} judgements")


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half the width of its 95 % interval (infinite for one value). ValueError: no values."""
    if not values:
        raise ValueError("--plan: no request of a step has been answered; see the failures in OUT/journal")
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.inf
    return mean, float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def between(mean: float, half: float) -> str:
    """ "120 (90-150)", or a single number if both ends read the same."""

    def short(x):
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
    who = (*args.models, args.writer, args.scorer, args.judge, *args.audit_judges)
    names = {named(flag)[0] for flag in who}
    if args.max_cost is not None and not args.prices:
        raise ValueError("--max-cost: give --prices, or nothing is known to cost anything")
    limits = Limits(
        args.out,
        prices=by_name(args.prices, "--prices", names, prices),
        per_minute=by_name(args.requests_per_minute, "--requests-per-minute", names, positive),
        **{
            k: getattr(args, k)
            for k in ("concurrency", "attempts", "max_cost", "retry_failed", "patience", "max_batch")
        },
    )
    ranks = start("auto")
    templates = {f"{k}_template": getattr(args, f"{k}_template") for k in ("questions", "answer", "score", "grm")}
    opened = open_models(who, ranks, limits, args.score_weights, **templates)
    models, others = [opened[flag] for flag in args.models], [opened[flag] for flag in args.audit_judges]
    writer, scorer, judge = opened[args.writer], opened[args.scorer], opened[args.judge]
    for flag in (args.judge, *args.audit_judges):
        if opened[flag].writes_critiques is False:
            raise ValueError(f"{flag}: it writes no critiques, which judgements need")
    for flag in (*args.models, args.writer):
        if opened[flag].kind is BradleyTerryJudge:
            raise ValueError(f"{flag}: a Bradley-Terry model scores answers, and writes none")
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
            judgements(args, asker, judge, others)
    if args.step == "all":
        split(args)


if __name__ == "__main__":
    flags.run(main, ARGS)
