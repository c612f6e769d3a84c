"""Models asked many things at the same time, each thing once: what data/annotate.py stands on.

    with Asker(limits, ranks) as asker:
        rows = asker.ask("answers", requests)      # a row of the journal for each request, in their order

A model is `[NAME=]http(s)://HOST#MODEL` (any OpenAI-compatible server), `[NAME=]FOLDER` (a checkpoint, on the engine in
this process) or `world` (the generated world: its writer and its exact judge; `world:RARITY` as --rarity there).

A request has a digest of the model, the text it is sent and the settings it is sampled with, and nothing else. What
came of it, a reply or a failure, is a line of OUT/journal/replies.0.jsonl as soon as it is known, and a request whose
line is there is not sent again: not after a kill, not by a later step, not where other settings have changed; a failure
only under `retry_failed`. A server's trouble that passes is waited for with growing pauses and is no failure
(runtime/chat_client.py); a reply that is refused, cut off or in no readable form is asked for `attempts` times, each
with another seed.

A server gets `concurrency` requests at a time, as many a minute as its limit says, and what is paid stays under
`max_cost`: a request is sent once what it may cost at most fits beside what was paid and what is under way. Ctrl-C,
SIGTERM and the end of the money wait for the replies that are under way, keep them, and end with status 75.
"""

import asyncio
import hashlib
import json
import random
import re
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
from aiolimiter import AsyncLimiter

from chat import Chat, without_control_tokens
from data import persona_world
from engine import Engine
from evaluation.journal import Journal
from judges.base import weights_fingerprint
from judges.servers import text_of
from model import load_pretrained
from prompts import Templates, judgement_text, load_templates
from runtime.chat_client import (
    ERRORS,
    PLAIN_TIMEOUT,
    ChatServer,
    Failure,
    ServerDown,
    Unanswered,
    Waiting,
    failure_from,
    first_choice,
    is_url,
    shown,
)
from runtime.digests import file_digest
from runtime.distributed import Ranks, derive_seed
from runtime.flags import PATIENCE
from runtime.progress import counting
from runtime.watch import STOPPED
from weights import resolve

COUNTS = ("calls", "prompt_tokens", "completion_tokens", "cost", "seconds")  # of a row, over all its attempts
STOPPED_HERE = "stopped"  # failure of a request that a stop has cut short between two attempts: asked again by any run


@dataclass(frozen=True)
class Model:
    """spec: a URL, a folder or world[:RARITY]. identity: what of it a reply depends on. prices: dollars for a million
    tokens of prompts and replies. per_minute: requests, None: no limit.
    """

    name: str
    spec: str
    identity: str
    templates: Templates
    prices: tuple[float, float] = (0.0, 0.0)
    per_minute: float | None = None

    def readable(self, value: Any) -> Any:
        """Text out of rows as this model may get it: one behind a server would read control tokens in it."""
        return without_control_tokens(value) if is_url(self.spec) else value


NAMED = re.compile(r"([\w.@ -]+)=(.+)")


def named(flag: str) -> tuple[str, str]:
    """[NAME=]SPEC -> (name, spec); without a name it is what the spec says: the server's model, the folder."""
    match = NAMED.fullmatch(flag)
    name, spec = match.groups() if match else (None, flag)
    return name or spec.partition("#")[2] or spec, spec


def open_model(flag: str, ranks: Ranks, limits: "Limits", **templates: str | None) -> Model:
    """[NAME=]SPEC -> Model; templates: as load_templates takes them. ValueError: no such model."""
    name, spec = named(flag)
    kind, _, rarity = spec.partition(":")
    folder = None
    if kind == "world":
        world_rarity(spec)
        identity = f"world {rarity} {file_digest(persona_world.__file__)}"
    elif is_url(spec):  # a named model may move to another address
        identity = spec.partition("#")[2] or spec
    else:
        folder = resolve(spec)
        identity = f"{weights_fingerprint(folder)} {ranks.dtype}"
    return Model(
        name,
        spec,
        identity,
        load_templates(folder, **templates),
        limits.prices.get(name, (0.0, 0.0)),
        limits.per_minute.get(name, limits.per_minute.get("")),
    )


def world_rarity(spec: str) -> tuple[float, float]:
    rarity = spec.partition(":")[2]
    try:
        value = float(rarity) if rarity else None
    except ValueError:
        value = -1.0
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"{spec}: expected world or world:RARITY, a share from 0 to 1")
    return persona_world.COMMON if value is None else (value, value)


@dataclass(frozen=True)
class Request:
    """parse: reply -> something, or None where it is of no use. about: row, answer, kind, number: what the generated
    world answers by; a message names its prompt_id.
    """

    model: Model
    text: str  # the user's message
    settings: dict  # temperature, top_p, max_tokens, seed
    parse: Callable[[str], Any]
    about: dict = field(compare=False)

    @property
    def key(self) -> str:
        parts = [self.model.identity, self.messages, self.settings]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": self.text}]

    def seed(self, attempt: int) -> int:
        """The first attempt's is that of the settings."""
        return self.settings["seed"] if attempt == 1 else derive_seed(self.settings["seed"], attempt)

    @property
    def most_expensive(self) -> float:
        """Dollars: a token of the prompt has at least a byte (64 more: the chat template's); the reply is as long as
        it may be."""
        price_in, price_out = self.model.prices
        return ((len(self.text.encode()) + 64) * price_in + self.settings["max_tokens"] * price_out) / 1e6


@dataclass(frozen=True)
class Limits:
    out: str
    """Folder of the journal."""
    concurrency: int = 32
    """Requests that a server gets at a time."""
    attempts: int = 3
    """Replies that are asked for before a request has failed."""
    max_cost: float | None = None
    """Dollars, over all runs in this folder."""
    retry_failed: bool = False
    patience: float = PATIENCE
    """Seconds that a server is waited for."""
    max_batch: int = 256
    """Sequences in the engine of a checkpoint."""
    prices: dict[str, tuple[float, float]] = field(default_factory=dict)
    """{name of a model: dollars for a million tokens of prompts, of replies}."""
    per_minute: dict[str, float] = field(default_factory=dict)
    """{name of a model, "" for all: requests a minute}."""


class Asker:
    """Asks, and keeps the journal; while it is open no other process writes there."""

    def __init__(self, limits: Limits, ranks: Ranks):
        self.limits, self.ranks = limits, ranks
        self.journal = Journal(limits.out, "replies", 0)
        self.kept, self.servers, self.silent = {}, {}, set()  # silent: models whose server counts no tokens
        self.stopped = None  # why nothing more is asked
        self.spent, self.reserved = 0.0, {}  # dollars that are paid; that each request under way may cost
        self.tokens = 0

    def __enter__(self):
        self.writing = self.journal.writing()
        self.writing.__enter__()
        self.kept = self.journal.rows()
        self.spent = sum(row["cost"] for row in self.kept.values())
        self.tokens = sum(tokens_of(row) for row in self.kept.values())
        self.before = {number: signal.signal(number, self.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        return self.writing.__exit__(*error)

    def on_signal(self, number, frame):
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = signal.Signals(number).name
        print(f"{self.stopped}: waiting for what is under way; again: at once", file=sys.stderr, flush=True)

    def is_known(self, key: str) -> bool:
        """Whether a request needs no asking."""
        row = self.kept.get(key)
        if row is None or row["failure"] == STOPPED_HERE:
            return False
        return row["failure"] is None or not self.limits.retry_failed

    def ask(self, step: str, requests: list[Request]) -> list[dict]:
        """A row each: reply (text), or None and failure, reason; COUNTS. Equal requests are asked once.

        Leaves with status 75 if it was stopped before all were answered. ServerDown: a server's patience is over.
        """
        self.step, keys = step, [request.key for request in requests]
        missing = {k: r for k, r in zip(keys, requests) if not self.is_known(k)}
        of_model = defaultdict(list)
        for key, request in missing.items():
            of_model[request.model.spec].append((key, request))
        n_kept = len(set(keys)) - len(missing)
        print(f"{step}: {len(missing)} requests to make, {n_kept} kept", flush=True)
        servers = {spec: asked for spec, asked in of_model.items() if is_url(spec)}
        for spec in servers:
            if spec not in self.servers:
                self.servers[spec] = AsyncServer(spec, patience=self.limits.patience)
        with counting(len(missing), step, figures=self.figures) as self.done:
            if servers:
                asyncio.run(self.ask_servers(servers))
            for spec, asked in of_model.items():
                if spec.startswith("world"):
                    self.ask_world(asked)
                elif not is_url(spec):
                    self.ask_engine(spec, asked)
        if self.stopped:
            left = sum(not self.is_known(k) for k in missing)
            print(f"stopped ({self.stopped}): {left} {step} are left; the same command goes on", file=sys.stderr)
            sys.exit(STOPPED)
        return [self.kept[key] for key in keys]

    def figures(self) -> str:
        return f"{self.tokens:,} tokens" + (f", ${self.spent:.2f}" if self.spent else "")

    def record(self, key: str, request: Request, reply: str | None, counts: dict, failure: Failure | None = None):
        row = dict(made_by=key, step=self.step, model=request.model.name, reply=reply)
        row |= dict(failure=failure and failure.kind, reason=failure and str(failure))
        before = self.kept.get(key, {})  # a failure that was asked again: what it has cost counts
        row |= {name: counts.get(name, 0) + before.get(name, 0) for name in COUNTS}
        self.kept[key] = row
        self.journal.append(row)
        if row["failure"] != STOPPED_HERE:
            self.done()

    # -- servers

    async def ask_servers(self, servers: dict[str, list]) -> None:
        """All servers side by side. The first that is down ends it; the replies of the others that are under way are
        kept."""
        self.freed = asyncio.Event()
        for server in map(self.servers.get, servers):
            server.connect()
        results = await asyncio.gather(*(self.ask_server(*item) for item in servers.items()), return_exceptions=True)
        for server in map(self.servers.get, servers):
            await server.calls.close()
        for error in results:
            if isinstance(error, ServerDown):
                raise ServerDown(f"{error}; what was answered is kept, the same command goes on") from error
            if error is not None:
                raise error

    async def ask_server(self, spec: str, asked: list[tuple[str, Request]]) -> None:
        """Starts a request whenever one of `concurrency` has ended and the server's limit a minute allows it."""
        server, free, under_way, errors = self.servers[spec], asyncio.Semaphore(self.limits.concurrency), set(), []
        per_minute = asked[0][1].model.per_minute
        limiter = AsyncLimiter(1, 60 / per_minute) if per_minute else None  # evenly: a burst is refused by many

        async def one(key, request):
            try:
                await self.ask_one(server, key, request, limiter)
            except Exception as error:  # a server that is down, or a bug: no more of this is started
                errors.append(error)
                self.stopped = self.stopped or f"{type(error).__name__}"
            finally:
                free.release()

        for key, request in asked:
            await free.acquire()
            if limiter and not self.stopped:
                await limiter.acquire()
            if self.stopped:
                break
            task = asyncio.create_task(one(key, request))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
        if errors:
            raise errors[0]

    async def ask_one(self, server: "AsyncServer", key: str, request: Request, limiter: AsyncLimiter | None) -> None:
        """At most `attempts` replies to a request, the first of which may be asked for now, and its row."""
        counts, failure = defaultdict(int), None
        for n, attempt in enumerate(self.attempts(key, request)):
            if n and limiter:
                await limiter.acquire()
            if not await self.may_send(key, request):
                return self.cut_short(key, request, counts)
            began, reply, usage = time.monotonic(), None, None
            try:
                settings = {**request.settings, "seed": request.seed(attempt) % 2**31}
                choice, usage = await server.complete(request.messages, limiter, **settings)
                self.pay(request, usage, counts)
                reply, failure = usable(request, choice), None
            except Failure as error:
                failure = error
            except ServerDown:
                self.cut_short(key, request, counts)
                raise
            finally:
                del self.reserved[key]
                self.freed.set()
            counts["seconds"] += time.monotonic() - began
            counts["calls"] += 1
            if failure is None or not failure.retry:
                break
        self.record(key, request, reply, counts, failure)

    def cut_short(self, key: str, request: Request, counts: dict) -> None:
        """A row for attempts that have failed where no other is made: they are paid."""
        if counts:
            self.record(key, request, None, counts, Failure("between two attempts", STOPPED_HERE, retry=True))

    def attempts(self, key: str, request: Request) -> range:
        """The numbers of the attempts to come; a failure that is asked again goes on with other seeds."""
        first = int(self.kept.get(key, {}).get("calls", 0)) + 1
        return range(first, first + (self.limits.attempts if request.settings["temperature"] > 0 else 1))

    async def may_send(self, key: str, request: Request) -> bool:
        """Reserves what the request may cost, once that much is sure to be left; False: nothing more is sent."""
        bound, limit = request.most_expensive, self.limits.max_cost
        while not self.stopped and limit is not None and self.spent + sum(self.reserved.values()) + bound > limit:
            if self.reserved:
                self.freed.clear()
                await self.freed.wait()
            else:
                self.stopped = f"--max-cost {limit:g}: ${self.spent:.4f} are spent, the next call may cost ${bound:.4f}"
        if not self.stopped:
            self.reserved[key] = bound
        return not self.stopped

    def pay(self, request: Request, usage: tuple[int, int] | None, counts: dict) -> None:
        """Counts the tokens of a reply, and what they cost; of a server that does not say, the most they may cost."""
        if usage is None:
            cost = request.most_expensive
            if request.model.name not in self.silent:
                self.silent.add(request.model.name)
                print(
                    f"{request.model.name} counts no tokens (usage): none are shown; the bound is paid", file=sys.stderr
                )
        else:
            cost = sum(n * price for n, price in zip(usage, request.model.prices)) / 1e6
            counts["prompt_tokens"] += usage[0]
            counts["completion_tokens"] += usage[1]
            self.tokens += sum(usage)
        counts["cost"] += cost
        self.spent += cost

    # -- in this process

    def ask_world(self, asked: list[tuple[str, Request]]) -> None:
        for key, request in asked:
            if self.stopped:
                return
            began = time.monotonic()
            try:
                reply, failure = usable(request, {"message": {"content": world_reply(request)}}), None
            except Failure as error:
                reply, failure = None, error
            self.record(key, request, reply, dict(calls=1, seconds=time.monotonic() - began), failure)

    def ask_engine(self, spec: str, asked: list[tuple[str, Request]]) -> None:
        """A checkpoint on the engine. What is under way when the run stops is lost: it costs nothing but time."""
        if self.stopped:
            return
        chat, began = Chat(spec), {}
        model = load_pretrained(spec, self.ranks.dtype, self.ranks.device)
        inputs, room = {}, model.config.max_position_embeddings
        for key, request in asked:
            ids = chat.messages(request.messages)
            if len(ids) + request.settings["max_tokens"] <= room:
                inputs[key] = request, ids
            else:
                reason = f"{len(ids)} tokens leave no room for {request.settings['max_tokens']} in {room} positions"
                self.record(key, request, None, {}, Failure(reason, "too long", retry=False))
        if not inputs:
            return
        max_len = max(len(ids) + request.settings["max_tokens"] for request, ids in inputs.values())
        engine = Engine(model, chat.stop_ids, max_len, self.limits.max_batch)
        counts = {key: defaultdict(int) for key in inputs}
        attempts = {key: iter(self.attempts(key, request)) for key, (request, _) in inputs.items()}

        def submit(key) -> bool:
            attempt = next(attempts[key], None)
            if attempt is not None:
                request, ids = inputs[key]
                s, began[key] = request.settings, time.monotonic()
                sampling = dict(temperature=s["temperature"], top_p=s["top_p"], max_new_tokens=s["max_tokens"])
                engine.submit(ids, key=key, seeds=[request.seed(attempt)], **sampling)
            return attempt is not None

        for key in inputs:
            submit(key)
        while engine.busy and not self.stopped:
            engine.step()
            for sample in engine.collect(errors=True):
                request, ids = inputs[sample.key]
                self.pay(request, (len(ids), len(sample.ids)), counts[sample.key])
                counts[sample.key]["calls"] += 1
                counts[sample.key]["seconds"] += time.monotonic() - began[sample.key]
                try:
                    if sample.error:
                        raise Failure(sample.error, "not a number", retry=False)
                    message = {"content": chat.decode(sample.ids)}
                    reply = usable(request, {"finish_reason": sample.finish_reason, "message": message})
                    self.record(sample.key, request, reply, counts[sample.key])
                except Failure as failure:
                    if not failure.retry or not submit(sample.key):
                        self.record(sample.key, request, None, counts[sample.key], failure)


def tokens_of(row: dict) -> int:
    return row["prompt_tokens"] + row["completion_tokens"]


def usable(request: Request, choice: dict) -> str:
    """The text of a reply. Failure: refused, cut off, empty, or in another form than was asked for."""
    if choice.get("finish_reason") == "content_filter" or choice["message"].get("refusal"):
        raise Failure("refused", "refused", retry=True)
    text = text_of(choice)
    if not text.strip() or request.parse(text) is None:
        raise Failure(f"in no readable form: {shown(text)}", "unparsable", retry=True)
    return text


class AsyncServer(ChatServer):
    """The same kind of server, asked by coroutines."""

    def connect(self) -> None:
        """Within the event loop that will ask."""
        self.calls = openai.AsyncOpenAI(base_url=self.client.base_url, api_key=self.client.api_key, max_retries=0)

    async def complete(self, messages: list[dict], limiter: AsyncLimiter | None, **wanted) -> tuple[dict, tuple | None]:
        """One chat completion -> (its first choice, (tokens of the prompt, of the reply), None: not said).

        Waits as ChatServer.complete does; each time that it is sent again counts for the limiter. Failure: this request
        gets no choice. ServerDown: none does, also where the server never was one (a wrong key, a wrong address).
        """
        waiting = Waiting(self.patience)
        while True:
            if self.down:
                raise ServerDown(self.down)
            try:
                found = await self.reply(messages, waiting.timeout(), wanted)
                self.answered()
                return found
            except Unanswered as failure:
                waiting.failed(failure)
                if not failure.passing and not self.has_answered:
                    self.down = str(failure)
                elif waiting.in_doubt and await self.answers_others():
                    waiting.others_are_answered(failure)
                elif waiting.is_over:
                    self.down = f"{self.client.base_url} has given no answer for {self.patience:g} s: {failure}"
                else:
                    if failure.malformed:
                        wanted["seed"] += 1
                    if waiting.is_long:
                        self.tell(f"{failure}; asked again for {waiting.left:.0f} s more")
                    await asyncio.sleep(waiting.pause * random.uniform(0.75, 1))  # not all at the same moment
                    if limiter:
                        await limiter.acquire()

    async def answers_others(self) -> bool:
        try:
            await self.reply([{"role": "user", "content": "Hi"}], min(PLAIN_TIMEOUT, self.patience), dict(max_tokens=1))
        except Unanswered:
            return False
        except Failure:
            pass
        return True

    async def reply(self, messages: list[dict], timeout: float, wanted: dict) -> tuple[dict, tuple | None]:
        """One request. timeout: seconds for the whole reply. Failure, also Unanswered."""
        while True:
            sent = self.parameters(wanted)
            create = self.calls.chat.completions.with_raw_response.create
            try:
                async with asyncio.timeout(timeout):
                    response = await create(model=self.model, messages=messages, timeout=timeout, **sent)
            except TimeoutError as error:
                raise Unanswered(f"no reply within {timeout:.3g} s", busy=True) from error
            except ERRORS as error:
                if self.adapts(error, sent):
                    continue
                raise failure_from(error, timeout) from error
            text = response.http_response.text
            return first_choice(text), usage_of(json.loads(text))


def usage_of(reply: dict) -> tuple[int, int] | None:
    usage = reply.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else [None]
    return tuple(counts) if all(type(n) is int and n >= 0 for n in counts) else None


def world_reply(request: Request) -> str:
    """What the generated world says: its writer's questions and answers, its exact judge's scores.

    An overall score is the weighted one of the judgement (-5 to 5) on the scale from 1 to 5.
    """
    about, rng = request.about, random.Random(request.settings["seed"])
    persona, rarity = about["row"]["persona"], world_rarity(request.model.spec)
    try:
        if about["asks_for"] == "questions":
            topics = [t for t in persona_world.TOPICS if not persona_world.is_held_out(persona, t)]
            asked = [persona_world.sample_question(rng, topic) for topic in rng.sample(topics, about["number"])]
            return "<questions>\n" + "\n".join(asked) + "\n</questions>"
        question = about["row"]["question"]
        if about["asks_for"] == "answer":
            return persona_world.improved_answer(rng, persona, question, rarity)
        j = persona_world.judge(about["row"], about["answer"])
        if about["asks_for"] == "score":
            return f"<score> {3 + 0.4 * j.score():.2f} </score>"
        return judgement_text(j.critique, j.helpfulness, j.personalization, j.naturalness)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{request.model.name} knows only the generated world: {error}") from error
