"""Asks models for what data/annotate.py needs, each thing once, and keeps count of money.

    with PaidAsker(limits, ranks) as asker:
        rows = asker.ask("answers", requests)      # a row of the journal for each request, in their order

A model is `[NAME=]SPEC`. SPEC is what --judge takes (judges/), for scores and judgements; for questions and answers it
is a server (http://HOST#MODEL), a checkpoint (FOLDER), or a function FILE.py:FUNCTION(row, seed) that returns a list of
questions or an answer. Names in one command differ, and so do the names of models behind servers: a request is known
by the latter, so that a model may move to another address.

A request is known by a digest of its model, text and sampling settings. What came of it, a reply or a failure, is a
line of OUT/journal/replies.0.jsonl as soon as it is known, and the request is not sent again: not after a kill, not in
a later step, not if other settings change; a failure only with `retry_failed`. Trouble of a server that passes is no
failure (judges/chat_client.py). A reply that is refused, cut off or unreadable is asked for `attempts` times, with
another seed each time.

A server has at most `concurrency` requests under way, and no more a minute than its limit. A request is sent only if
the most it may cost fits into `max_cost` beside what was paid and what is under way. That is the price of its longest
reply, or of the dearest call so far: thoughts of reasoning models are paid, and may be longer than a reply may be.
Ctrl-C, SIGTERM and the end of the money wait for the replies under way, keep them, and end with status 75.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import signal
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chat import Chat, without_control_tokens
from judges import FunctionJudge, GenerativeJudge, Judge, JudgeSettings, Verdict, annotated_critiques, parse_spec
from judges.asking import (
    Asker,
    Backend,
    Call,
    Ended,
    Outcome,
    Question,
    ServerBackend,
    ask_until_parsed,
    open_engine,
    text_of,
)
from judges.base import weights_fingerprint
from judges.chat_client import ChatServer, Failure, ServerDown, is_url, shown
from judges.functions import call, load_function
from judges.journal import Journal
from prompts import Templates, judgement_text, load_templates
from runtime.distributed import Ranks, derive_seed
from runtime.flags import PATIENCE
from runtime.progress import counting
from runtime.watch import STOPPED
from weights import resolve

COUNTS = ("calls", "prompt_tokens", "completion_tokens", "cost", "seconds")  # summed over all attempts of a row
STOPPED_HERE = "stopped"  # failure of a request that a stop has cut short between two attempts: any run asks again


@dataclass(frozen=True)
class Model:
    """spec: the target of parse_spec. identity: what its replies depend on. settings: of a judge that is no language
    model. prices: dollars for a million tokens of prompts and of replies. per_minute: limit on requests.
    """

    name: str
    kind: type[Judge]
    spec: str
    identity: str
    templates: Templates
    settings: JudgeSettings = JudgeSettings()
    prices: tuple[float, float] = (0.0, 0.0)
    per_minute: float | None = None

    @property
    def is_language_model(self) -> bool:
        return self.kind is GenerativeJudge

    @property
    def writes_critiques(self) -> bool | None:
        """None: not known yet."""
        return (
            annotated_critiques(load_function(self.spec)) if self.kind is FunctionJudge else self.kind.writes_critiques
        )

    def readable(self, value: Any) -> Any:
        """Text from rows as this model may get it: a server would read control tokens in it."""
        return without_control_tokens(value) if is_url(self.spec) else value


NAMED = re.compile(r"([\w.@ -]+)=(.+)")


def named(flag: str) -> tuple[str, str]:
    """[NAME=]SPEC -> (name, spec). Without a name it is the server's model, or the spec."""
    match = NAMED.fullmatch(flag)
    name, spec = match.groups() if match else (None, flag)
    return name or spec.partition("#")[2] or spec, spec


def open_model(
    flag: str, ranks: Ranks, limits: "Limits", weights: tuple[float, float, float], **templates: str | None
) -> Model:
    """[NAME=]SPEC -> Model. weights: of the scores of a judgement; templates: as load_templates takes them.

    ValueError: no such model.
    """
    name, spec = named(flag)
    kind, target = parse_spec(spec)
    if kind.compares:
        raise ValueError(f"{flag}: it compares answers; expected a model that writes or scores one")
    settings = JudgeSettings(weights=weights, answer_template=templates.get("answer_template"))
    folder = None
    if kind is not GenerativeJudge:
        identity = json.dumps([kind.__name__, kind.fingerprint(target, settings), weights])
    elif is_url(target):  # a named model may move to another address
        identity = target.partition("#")[2] or target
    else:
        folder = resolve(target)
        identity = f"{weights_fingerprint(folder)} {ranks.dtype}"
    return Model(
        name,
        kind,
        target,
        identity,
        load_templates(folder, **templates),
        settings,
        limits.prices.get(name, (0.0, 0.0)),
        limits.per_minute.get(name, limits.per_minute.get("")),
    )


def open_models(
    flags: Sequence[str], ranks: Ranks, limits: "Limits", weights: tuple[float, float, float], **templates: str | None
) -> dict[str, Model]:
    """{flag: Model} of a command, see open_model.

    ValueError: two models (other than functions) have one name, by which prices and rows know them, or two servers
    call their model alike, which is how the journal knows it.
    """
    models = {flag: open_model(flag, ranks, limits, weights, **templates) for flag in flags}
    for (flag, model), (other_flag, other) in itertools.combinations(models.items(), 2):
        if model.spec == other.spec or {model.kind, other.kind} == {FunctionJudge}:
            continue
        shares_replies = is_url(model.spec) and model.identity == other.identity
        if shares_replies or model.name == other.name:
            name = model.identity if shares_replies else model.name
            raise ValueError(f"{flag} and {other_flag}: both models are called {name}; expected one address for a name")
    return models


@dataclass(frozen=True)
class Request:
    """asks_for: questions | answer | score | judgement. text: the user's message to a language model. settings:
    temperature, top_p, max_tokens, seed. parse: reply -> a value, None if it is unreadable. row, answer: what the text
    was made of.
    """

    model: Model
    asks_for: str
    text: str
    settings: dict[str, Any]
    parse: Callable[[str], Any]
    row: dict = field(compare=False)
    answer: str | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        parts = [self.model.identity, self.messages, self.settings]
        if not self.model.is_language_model:  # which may read all of the row
            parts += [self.asks_for, self.row, self.answer]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.text}]

    @property
    def highest_cost(self) -> float:
        """Dollars, if each byte of the prompt is a token (and 64 are the chat template's) and the reply is as long as
        it may be.
        """
        price_in, price_out = self.model.prices
        return ((len(self.text.encode()) + 64) * price_in + self.settings["max_tokens"] * price_out) / 1e6

    def text_in(self, choice: dict) -> str:
        """The reply of a choice. Failure: refused, cut off, empty, or unreadable."""
        text = text_of(choice)
        if not text.strip() or self.parse(text) is None:
            raise Failure(f"in no readable form: {shown(text)}", "unparsable", retry=True)
        return text


@dataclass(frozen=True)
class Limits:
    out: str  # folder of the journal
    concurrency: int = 32  # requests under way to a server
    attempts: int = 3  # replies that are asked for before a request has failed
    max_cost: float | None = None  # dollars, over all runs in this folder
    retry_failed: bool = False
    patience: float = PATIENCE  # seconds to wait for a server that gives no reply
    max_batch: int = 256  # sequences in the engine of a checkpoint
    # {name of a model: dollars for a million tokens of prompts, of replies}
    prices: dict[str, tuple[float, float]] = field(default_factory=dict)
    per_minute: dict[str, float] = field(default_factory=dict)  # {name of a model, "" for all: requests a minute}


class FunctionBackend:
    """A function or a Bradley-Terry model. The prompt of a call is its Request."""

    at_once = math.inf

    def __init__(self, model: Model, judges: bool, ranks: Ranks):
        self.model = model
        self.judge = model.kind.open(model.spec, model.settings, ranks) if judges else None
        self.waiting: deque[tuple[int, Call]] = deque()

    def start(self, number: int, call: Call) -> None:
        if self.judge:
            self.judge.submit((number, call.prompt.asks_for), call.prompt.row, call.prompt.answer, call.seed)
        else:
            self.waiting.append((number, call))

    def poll(self) -> Ended:
        began = time.monotonic()
        outcomes: list[tuple[int, Outcome]] = []
        if self.judge:
            verdicts = self.judge.poll()
            if self.judge.down:  # the function raised, which says nothing of the other answers
                verdicts = [verdict for verdict in verdicts if verdict.failure != "request"]
                if not verdicts:
                    raise ValueError(self.judge.down)
            outcomes = [(verdict.key[0], self.judged(verdict)) for verdict in verdicts]
        elif self.waiting:
            number, asked = self.waiting.popleft()
            value = call(self.model.name, load_function(self.model.spec), asked.prompt.row, asked.seed)
            if isinstance(value, list):  # of questions
                value = json.dumps([str(question).strip() for question in value])
            outcomes = [(number, whole(value))]
        seconds = time.monotonic() - began
        return [(number, outcome, seconds / len(outcomes)) for number, outcome in outcomes]

    def judged(self, verdict: Verdict) -> dict | Failure:
        """A score or a judgement as the text that a language model would have written."""
        if verdict.reward is None:
            return Failure(str(verdict.error), str(verdict.failure), retry=False)
        if verdict.key[1] == "score":
            return whole(repr(verdict.reward))
        if verdict.judgement is None:
            raise ValueError(f"{self.model.name} writes no critiques, which judgements need")
        try:
            text = judgement_text(**dataclasses.asdict(verdict.judgement))
        except ValueError as error:  # its critique holds a tag of the form
            raise ValueError(f"{self.model.name}: {error}") from error
        return whole(text)


def whole(text: Any) -> dict:
    """A choice, as a server would return it."""
    return dict(message={"content": text}, finish_reason="stop", usage=(0, 0))


class PaidAsker:
    """Asks, and keeps the journal. While it is open no other process writes there."""

    def __init__(self, limits: Limits, ranks: Ranks):
        self.limits = limits
        self.ranks = ranks
        self.journal = Journal(limits.out, "replies", 0)
        self.rows: dict[str, dict] = {}  # the journal by key
        self.servers: dict[str, ChatServer] = {}
        self.uncounted: set[str] = set()  # models whose server counts no tokens
        self.stopped: str | None = None  # why nothing more is asked
        self.spent = 0.0  # dollars
        self.reserved: dict[str, float] = {}  # dollars that each request under way may cost
        self.dearest: dict[str, float] = defaultdict(float)  # {name of a model: dollars of its most expensive call}
        self.tokens = 0

    def __enter__(self) -> "PaidAsker":
        self.writing = self.journal.writing()
        self.writing.__enter__()
        self.rows = self.journal.rows()
        self.spent = sum(row["cost"] for row in self.rows.values())
        for row in self.rows.values():
            if row["calls"]:
                self.dearest[row["model"]] = max(self.dearest[row["model"]], row["cost"] / row["calls"])
        self.tokens = sum(row["prompt_tokens"] + row["completion_tokens"] for row in self.rows.values())
        self.handlers = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> bool | None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        return self.writing.__exit__(*error)

    def on_signal(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = signal.Signals(number).name
        print(f"{self.stopped}: waiting for what is under way; again: at once", file=sys.stderr, flush=True)

    def is_known(self, key: str) -> bool:
        """Whether a request needs no asking."""
        row = self.rows.get(key)
        if row is None or row["failure"] == STOPPED_HERE:
            return False
        return row["failure"] is None or not self.limits.retry_failed

    def ask(self, step: str, requests: list[Request]) -> list[dict]:
        """A row for each request: reply (text), or None with failure and reason; COUNTS. Equal requests are asked once.

        Leaves with status 75 if it was stopped before all were answered. ServerDown: a server gave no reply.
        """
        self.step = step
        keys = [request.key for request in requests]
        self.missing = {key: request for key, request in zip(keys, requests) if not self.is_known(key)}
        self.counts: dict[str, dict[str, float]] = {key: defaultdict(int) for key in self.missing}
        of_model: dict[str, list[str]] = defaultdict(list)
        for key, request in self.missing.items():
            of_model[request.model.spec].append(key)
        print(f"{step}: {len(self.missing)} requests to make, {len(set(keys)) - len(self.missing)} kept", flush=True)
        for spec, asked in of_model.items():
            if is_url(spec) and spec not in self.servers:  # all of them, before one of them is paid
                self.servers[spec] = self.open_server(self.missing[asked[0]].model)
        with counting(len(self.missing), step, figures=self.figures) as self.done:
            self.run([self.open_asker(asked) for spec, asked in of_model.items() if is_url(spec)])
            for spec, asked in of_model.items():
                if not is_url(spec) and not self.stopped:
                    self.run([self.open_asker(asked)])
        if self.stopped:
            left = sum(not self.is_known(key) for key in self.missing)
            print(f"stopped ({self.stopped}): {left} {step} are left; the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        return [self.rows[key] for key in keys]

    def figures(self) -> str:
        return f"{self.tokens:,} tokens" + (f", ${self.spent:.2f}" if self.spent else "")

    def record(self, key: str, reply: str | None, failure: Failure | None) -> None:
        row = dict(made_by=key, step=self.step, model=self.missing[key].model.name, reply=reply)
        row |= dict(failure=failure and failure.kind, reason=failure and str(failure))
        before = self.rows.get(key, {})  # a failure that was asked again: what it has cost counts
        row |= {name: self.counts[key].get(name, 0) + before.get(name, 0) for name in COUNTS}
        self.rows[key] = row
        self.journal.append(row)
        if row["failure"] != STOPPED_HERE:
            self.done()

    # -- money

    def may_send(self, key: str) -> bool:
        """Sets aside what a request may cost. False: it has to wait for its slot or for others to be paid, or the money
        is spent.
        """
        if self.stopped:
            return False
        server = self.servers.get(self.missing[key].model.spec)
        if server is None:  # a model in this process, which costs nothing but time
            return True
        if not server.limit.is_free():
            return False
        request = self.missing[key]
        cost = max(request.highest_cost, self.dearest[request.model.name])  # thoughts may pass max_tokens
        limit = self.limits.max_cost
        if limit is not None and self.spent + sum(self.reserved.values()) + cost > limit:
            if not self.reserved:
                self.stopped = f"--max-cost {limit:g}: ${self.spent:.4f} are spent, the next call may cost ${cost:.4f}"
            return False
        self.reserved[key] = cost
        server.limit.wait()
        return True

    def received(self, key: str, outcome: Outcome, seconds: float) -> None:
        """Counts a call, its tokens, and what they cost."""
        self.reserved.pop(key, None)
        if isinstance(outcome, ServerDown):
            return
        counts = self.counts[key]
        counts["calls"] += 1
        counts["seconds"] += seconds
        if isinstance(outcome, Failure):
            return
        model = self.missing[key].model
        usage = outcome["usage"]
        if usage is None:  # the server does not say: the most it may cost counts
            cost = self.missing[key].highest_cost
            if model.name not in self.uncounted:
                self.uncounted.add(model.name)
                print(f"{model.name} counts no tokens (usage): none are shown; the bound is paid", file=sys.stderr)
        else:
            cost = sum(n * price for n, price in zip(usage, model.prices)) / 1e6
            counts["prompt_tokens"] += usage[0]
            counts["completion_tokens"] += usage[1]
            self.tokens += sum(usage)
        counts["cost"] += cost
        self.spent += cost
        self.dearest[model.name] = max(self.dearest[model.name], cost)

    # -- models

    def open_server(self, model: Model) -> ChatServer:
        return ChatServer(model.spec, patience=self.limits.patience, per_minute=model.per_minute, strict=True)

    def open_asker(self, asked: list[str]) -> Asker:
        """An asker of the model that all these requests are for, with their questions."""
        requests = [self.missing[key] for key in asked]
        model = requests[0].model
        backend: Backend
        if is_url(model.spec):
            backend = ServerBackend(self.servers[model.spec], self.limits.concurrency)
        elif model.is_language_model:
            chat = Chat(model.spec)
            max_len = max(len(chat.messages(r.messages)) + r.settings["max_tokens"] for r in requests)
            backend = open_engine(model.spec, self.ranks, max_len, self.limits.max_batch)
        else:
            backend = FunctionBackend(model, requests[0].asks_for in ("score", "judgement"), self.ranks)
        asker = Asker(backend, self.may_send, self.received)
        for key in asked:
            asker.submit(key, self.question(key))
        return asker

    def question(self, key: str) -> Question:
        request = self.missing[key]
        if not request.model.is_language_model:
            return ask_until_parsed(request, [request.settings["seed"]], {}, request.text_in)
        sampling = dict(request.settings)
        seed = sampling.pop("seed")
        n = self.limits.attempts if sampling["temperature"] > 0 else 1
        calls = 0
        if row := self.rows.get(key):  # a failure that is asked again gets other seeds
            calls = int(row["calls"])
            if row["failure"] == STOPPED_HERE:
                n -= calls % n
        seeds = [seed if attempt == 1 else derive_seed(seed, attempt) for attempt in range(calls + 1, calls + n + 1)]
        return ask_until_parsed(request.messages, seeds, sampling, request.text_in)

    def run(self, askers: list[Asker]) -> None:
        """Runs askers side by side. After a stop, replies under way from servers are kept; those of an engine cost
        nothing but time, and are dropped. ServerDown: one of the servers is given up.
        """
        paid = [asker for asker in askers if isinstance(asker.backend, ServerBackend)]
        while any(a.under_way for a in paid) if self.stopped else any(a.busy for a in askers):
            for asker in askers:
                for key, reply in asker.poll():
                    self.record(key, reply.value, reply.failure)
                if asker.down:
                    self.stopped = self.stopped or asker.down
        for asker in paid:
            for key in asker.abandon():
                if self.counts[key]:  # calls that have failed are paid, though no other follows now
                    self.record(key, None, Failure("between two attempts", STOPPED_HERE, retry=True))
        for asker in paid:
            if asker.down:
                raise ServerDown(f"{asker.down}; what was answered is kept, the same command goes on")
