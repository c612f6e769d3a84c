"""Asks a model many things at once, whether it runs in this process or behind a server.

    asker = Asker(EngineBackend(engine, chat))            # or ServerBackend(ChatServer(url), concurrency)
    asker.submit(key, ask_until_parsed(messages, seeds, settings, parse))
    while asker.busy:
        for key, reply in asker.poll():                   # a little work, then whatever has finished
            ...

A question is a generator. It yields a Call, is resumed with the model's choice (or a Failure is raised in it), and so
on until it returns a Reply. So it reads as a plain loop, although thousands of questions are under way at once.
`ask_until_parsed` is the usual one; judges/models.py has others for pairs of answers.

A choice is a dict in OpenAI's form: `message`, `finish_reason`, and `usage` (tokens of the prompt and of the reply, or
None). From an engine it also has `sample`, with log-probs by token id.
"""

import itertools
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from chat import Chat
from engine import Engine
from judges import chat_client
from judges.chat_client import ChatServer, Failure, ServerDown
from model import load_pretrained
from runtime.distributed import Ranks


@dataclass(frozen=True)
class Call:
    """One request to a model. prompt: messages, or whatever the backend takes. settings: max_tokens, top_p, ..."""

    prompt: Any
    seed: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """The result of a question: a value, or None and the failure of its last call."""

    value: Any
    calls: int  # those that reached the model
    failed: int  # calls without a usable reply
    failure: Failure | None = None


Question = Generator[Call, dict, Reply]
Outcome = dict | Failure | ServerDown  # a choice, or what went wrong
Ended = list[tuple[Any, Outcome, float]]  # number, outcome and seconds of calls


def ask_until_parsed(prompt: Any, seeds: list[int], settings: dict[str, Any], parse: Callable[[dict], Any]) -> Question:
    """Asks with one seed after another until `parse` accepts the choice; parse raises Failure for an unusable one."""
    for attempt, seed in enumerate(seeds, 1):
        try:
            choice = yield Call(prompt, seed, settings)
            return Reply(parse(choice), attempt, attempt - 1)
        except Failure as error:
            failure = error
            if not failure.retry:
                break
    calls = attempt - (failure.kind == "too long")  # such a call is not made
    return Reply(None, calls, calls, failure)


# Finish reasons of servers. A reply under any other (null, "error", "abort", "tool_calls") has broken off.
FINISH = {
    "stop": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "eos_token": "stop",
    "length": "length",
    "max_tokens": "length",
    "model_length": "length",
    "content_filter": "refused",
    "safety": "refused",
    "refusal": "refused",
}


def finish_of(choice: dict) -> str:
    """How a reply ended: stop (only then is it whole) | length | refused | broken off."""
    return FINISH.get(str(choice.get("finish_reason")).lower(), "broken off")


def text_of(choice: dict) -> str:
    """The text of a complete reply. Failure: it was refused, cut off, or is no text."""
    check_refusal(choice)
    if finish_of(choice) != "stop":  # the end of a cut-off reply may be a quotation
        raise Failure(f"cut off (finish reason {choice.get('finish_reason')})", "unparsable", retry=True)
    content = choice["message"].get("content")
    if not isinstance(content, str):
        raise Failure("a reply without text", "unparsable", retry=True)
    return content


def check_refusal(choice: dict) -> None:
    if finish_of(choice) == "refused" or choice["message"].get("refusal"):
        raise Failure(f"refused (finish reason {choice.get('finish_reason')})", "refused", retry=True)


# -- backends ----------------------------------------------------------------------------------------------------------


class Backend(Protocol):
    at_once: float  # calls under way

    def start(self, number: int, call: Call) -> None:
        """Failure: the call can't be made."""

    def poll(self) -> Ended:
        """A little work; then the calls that have ended."""


class EngineBackend:
    """A model in this process, on the generation engine."""

    at_once = math.inf

    def __init__(self, engine: Engine, chat: Chat):
        self.engine = engine
        self.chat = chat
        self.started: dict[Any, tuple[int, float]] = {}  # {number: (tokens of the prompt, when)}

    def start(self, number: int, call: Call) -> None:
        settings = dict(call.settings)
        settings["max_new_tokens"] = settings.pop("max_tokens")
        prompt_ids = self.chat.messages(call.prompt)
        try:
            self.engine.submit(prompt_ids, key=number, seeds=[call.seed], **settings)
        except ValueError as error:  # longer than the engine's sequences
            raise Failure(str(error), "too long", retry=False) from error
        self.started[number] = len(prompt_ids), time.monotonic()

    def poll(self) -> Ended:
        if self.engine.busy:
            self.engine.step()
        ended: Ended = []
        for sample in self.engine.collect(errors=True):
            n_prompt, began = self.started.pop(sample.key)
            outcome: Outcome
            if sample.error:  # another seed would not make numbers of these logits
                outcome = Failure(sample.error, "not a number", retry=False)
            else:
                message = {"content": self.chat.decode(sample.ids)}
                usage = (n_prompt, len(sample.ids))
                outcome = dict(message=message, finish_reason=sample.finish_reason, usage=usage, sample=sample)
            ended.append((sample.key, outcome, time.monotonic() - began))
        return ended


def open_engine(target: str, ranks: Ranks, max_len: int, max_batch: int, kv_tokens: int | None = None) -> EngineBackend:
    """A folder or hub id on an engine for sequences of max_len tokens, or as many as the model has positions."""
    chat = Chat(target)
    model = load_pretrained(target, ranks.dtype, ranks.device, engine_ranks=ranks.engine_ranks)
    max_len = min(max_len, model.config.max_position_embeddings)
    return EngineBackend(Engine(model, chat.stop_ids, max_len, max_batch, kv_tokens), chat)


class ServerBackend:
    """A model behind a server, called by a pool of threads."""

    def __init__(self, server: ChatServer, concurrency: int):
        self.server = server
        self.at_once: float = concurrency
        self.calls: queue.Queue = queue.Queue()
        self.ended: queue.Queue = queue.Queue()
        self.n_under_way = 0
        self.quiet_since = time.monotonic()  # when a call ended last, or the first of those under way began
        for _ in range(concurrency):  # daemons: a process that ends does not wait for them
            threading.Thread(target=self.work, daemon=True).start()

    def start(self, number: int, call: Call) -> None:
        if self.n_under_way == 0:
            self.quiet_since = time.monotonic()
        self.n_under_way += 1
        self.calls.put((number, call))

    def poll(self) -> Ended:
        ended: Ended = []
        try:
            ended.append(self.ended.get(timeout=0.001))  # a caller that only waits for the server should not spin
            while True:
                ended.append(self.ended.get_nowait())
        except queue.Empty:
            pass
        self.n_under_way -= len(ended)
        now = time.monotonic()
        if ended:
            self.quiet_since = now
        elif self.n_under_way and now - self.quiet_since > chat_client.TOLD_EVERY:
            quiet = now - self.quiet_since
            self.server.tell(f"{self.n_under_way} requests, nothing for {quiet:.0f} s; {self.server.trouble}")
        return ended

    def work(self) -> None:
        """One thread of the pool. Whatever happens to a call, its number comes back."""
        while True:
            number, call = self.calls.get()
            began = time.monotonic()
            outcome: Outcome
            try:
                outcome = self.server.complete(call.prompt, seed=call.seed % 2**31, **call.settings)
            except (Failure, ServerDown) as error:
                outcome = error
            except Exception as error:  # in a thread nobody would see it, and the run would wait for ever
                outcome = Failure(f"{type(error).__name__}: {error}", "request", retry=False)
            self.ended.put((number, outcome, time.monotonic() - began))


# -- the asker ---------------------------------------------------------------------------------------------------------


class Asker:
    """Keeps many questions to one model under way. down: why the server is given up, once it is."""

    def __init__(
        self,
        backend: Backend,
        may_send: Callable[[Any], bool] = lambda key: True,
        received: Callable[[Any, Outcome, float], None] = lambda key, outcome, seconds: None,
    ):
        self.backend = backend
        self.may_send = may_send  # whether a call of the question with this key may be made now
        self.received = received  # is told of each call that ended: key, outcome, seconds
        self.questions: dict[int, tuple[Any, Question]] = {}  # {number: (key, question)}
        self.waiting: deque[int] = deque()  # questions that have not begun
        self.ready: deque[tuple[int, Call]] = deque()  # calls to be sent, of those that have
        self.under_way: set[int] = set()
        self.finished: list[tuple[Any, Reply]] = []
        self.numbers = itertools.count()
        self.down: str | None = None

    @property
    def busy(self) -> bool:
        return bool(self.questions or self.finished)

    def submit(self, key: Any, question: Question) -> None:
        number = next(self.numbers)
        self.questions[number] = key, question
        self.waiting.append(number)
        self.send()

    def poll(self) -> list[tuple[Any, Reply]]:
        """(key, reply) of each question that has finished, once. What finished before an error is not lost."""
        self.send()
        for number, outcome, seconds in self.backend.poll():
            self.under_way.remove(number)
            self.received(self.questions[number][0], outcome, seconds)
            if isinstance(outcome, ServerDown):
                self.down = str(outcome)
            else:
                self.resume(number, outcome)
        self.send()
        finished = self.finished
        self.finished = []
        return finished

    def abandon(self) -> list[Any]:
        """Drops the questions that are not answered, and returns their keys."""
        keys = [key for key, _ in self.questions.values()]
        self.questions.clear()
        self.waiting.clear()
        self.ready.clear()
        self.under_way.clear()
        return keys

    def resume(self, number: int, outcome: dict | Failure | None) -> None:
        """Lets a question go on to its next call or its end. None: it begins."""
        key, question = self.questions[number]
        try:
            if outcome is None:
                call = next(question)
            elif isinstance(outcome, Failure):
                call = question.throw(outcome)
            else:
                call = question.send(outcome)
        except StopIteration as end:
            del self.questions[number]
            self.finished.append((key, end.value))
        else:
            self.ready.append((number, call))

    def send(self) -> None:
        while (self.ready or self.waiting) and len(self.under_way) < self.backend.at_once and not self.down:
            if not self.ready:  # begins as late as it can: earlier questions may have found out what a server refuses
                self.resume(self.waiting.popleft(), None)
                continue
            number, call = self.ready[0]
            if not self.may_send(self.questions[number][0]):
                break
            self.ready.popleft()
            try:
                self.backend.start(number, call)
            except Failure as failure:
                self.resume(number, failure)
            else:
                self.under_way.add(number)
