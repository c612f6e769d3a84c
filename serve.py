"""An OpenAI-compatible chat server over the generation engine: how a judge runs on another machine.

One thread owns the engine. A request joins its batch at the next step and leaves it when it is done, so concurrent
requests are computed together; requests are checked and their text is encoded outside that thread.

    POST /v1/chat/completions   messages, max_tokens, temperature, top_p, n, seed, stop, stream, logprobs, top_logprobs
    GET  /v1/models             the one model
    GET  /health                200 as long as the engine's thread runs

Messages are encoded with special-token parsing off, so no text in them becomes a control token. Log-probs are those of
the full softmax at the sampling temperature (at temperature 0 of the plain one), whatever top_p is. A response ends
before the first of its `stop` strings. What would change the answer and is not there (penalties, tools, response
formats, log-probs of a stream, any field of another name) is refused, not ignored.

    python serve.py --model out/grm/model --port 8000
    python ppo_cpe.py --judge http://HOST:8000          # on the machine that trains
"""

from dataclasses import dataclass

from runtime import flags


@dataclass
class Args:
    model: str = "out/grm/model"
    """Folder or hub id."""
    name: str | None = None
    """What clients call it; by default --model itself."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in; there is no authentication."""
    port: flags.Port = 8000
    """TCP port; 0 takes a free one."""
    max_batch: flags.Count = 64
    """Samples that run at once; more wait."""
    kv_tokens: flags.Count | None = None
    """Tokens in the KV cache; None: by max_batch and what memory is free."""
    max_len: flags.Count | None = None
    """Tokens of prompt and response together; by default the positions of the model."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import asyncio
import bisect
import contextlib
import itertools
import json
import os
import queue
import sys
import threading
import time
import traceback
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import pydantic
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from generate import Engine, Sample
from model import load_pretrained
from prompts import Chat
from runtime.distributed import derive_seed, start

# -- what a request may hold -------------------------------------------------------------------------------------------


# Fields of other servers, and the values with which they change nothing; beside these, null passes everywhere.
NEUTRAL = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "echo": (False,),
    "add_generation_prompt": (True,),
    "stop_token_ids": ([],),
    "bad_words": ([],),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "chat_template_kwargs": ({},),
    # of a message, as clients send an answer back
    "tool_calls": ([],),
    "annotations": ([],),
}


class Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    harmless: ClassVar[frozenset[str]] = frozenset()  # fields that never change the answer

    def refuse_unknown(self, where: str = "") -> None:
        """BadRequest for a field that would change the answer, if it were not ignored."""
        for field, value in (self.model_extra or {}).items():
            if value is not None and field not in self.harmless and value not in NEUTRAL.get(field, ()):
                raise BadRequest(f"{where}{field} is not supported by this server", field, "unsupported_parameter")


class TextPart(Fields):
    type: Literal["text"]
    text: str


class Message(Fields):
    harmless = frozenset({"name"})
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(Fields):
    harmless = frozenset({"include_obfuscation"})
    include_usage: bool = False


class ChatRequest(Fields):
    harmless = frozenset(
        {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
    )
    model: str
    messages: list[Message] = pydantic.Field(min_length=1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    n: int | None = pydantic.Field(None, ge=1, le=128)
    seed: int | None = None
    stop: list[str] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def up_to_four(cls, value):
        stops = [] if value is None else value if isinstance(value, list) else [value]
        if len(stops) > 4 or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("expected a string or a list of up to 4, none of them empty")
        return stops


class BadRequest(Exception):
    def __init__(self, message, param=None, code=None, status=400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def read_request(body: bytes, name: str) -> ChatRequest:
    """The ChatRequest in a body. BadRequest: not JSON, a field that is missing, out of range or not supported."""
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{field}: {first['msg']}" if field else first["msg"], field or None) from error
    request.refuse_unknown()
    for i, message in enumerate(request.messages):
        message.refuse_unknown(f"messages.{i}.")
        for part in message.content if isinstance(message.content, list) else []:
            part.refuse_unknown(f"messages.{i}.content.")
    if request.stream_options:
        request.stream_options.refuse_unknown("stream_options.")
    if request.model != name:
        raise BadRequest(f"no model {request.model!r} here, only {name!r}", "model", "model_not_found", 404)
    if request.stream and request.logprobs:
        raise BadRequest("logprobs of a stream are not supported", "logprobs", "unsupported_parameter")
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return request


# -- stop strings ------------------------------------------------------------------------------------------------------


def find_stop(text: str, stops: list[str]) -> int | None:
    """Where the stop string begins that is complete first, or None: the same however the text arrives."""
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return min(found)[1] if found else None


def shown_so_far(text: str, stops: list[str]) -> str:
    """What may be sent of a text that goes on: no half characters, nothing that may turn out to belong to a stop."""
    at = find_stop(text, stops)
    if at is not None:
        return text[:at]
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


@dataclass
class Choice:
    """A sample as its client sees it: cut before its stop string."""

    sample: Sample  # ids: those that the text needs
    text: str
    finish_reason: str
    n_tokens: int  # that were sampled up to the end, be it a stop token or string


def choice_of(chat: Chat, sample: Sample, stops: list[str]) -> Choice:
    text = chat.decode(sample.ids)
    at = find_stop(text, stops)
    if at is None:
        return Choice(sample, text, sample.finish_reason, len(sample.logprobs))
    text, counts = text[:at], range(len(sample.ids) + 1)
    needed = bisect.bisect_left(counts, True, key=lambda n: chat.decode(sample.ids[:n]).startswith(text))
    n_tokens = bisect.bisect_left(counts, True, key=lambda n: find_stop(chat.decode(sample.ids[:n]), stops) is not None)
    return Choice(replace(sample, ids=sample.ids[:needed]), text, "stop", n_tokens)


# -- the engine's thread -----------------------------------------------------------------------------------------------


@dataclass
class Partial:
    """Event: what a sample has so far."""

    index: int
    ids: list[int]


@dataclass
class Failure:
    """Event: the request ends without an answer."""

    message: str
    status: int


@dataclass
class Listener:
    """A request whose connection waits for events: Partial (where it watches), Sample (ended), Failure."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue
    n: int  # samples
    watches: bool
    n_left: int

    def send(self, event: Partial | Sample | Failure) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class Worker:
    """Runs the engine in a thread of its own; what others want of it waits in `inbox` as functions to call there."""

    def __init__(self, engine: Engine):
        self.engine, self.inbox, self.listeners = engine, queue.Queue(), {}
        self.keys, self.ended = itertools.count(), False
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    # called on the event loop

    def submit(self, n: int, watches: bool, **settings) -> tuple[int, asyncio.Queue]:
        """-> (key, queue of the events). watches: Partials are sent, too."""
        key, listener = next(self.keys), Listener(asyncio.get_running_loop(), asyncio.Queue(), n, watches, n)
        self.listeners[key] = listener
        self.inbox.put(partial(self._submit, key, settings))
        if self.ended:
            listener.send(Failure("the engine has ended", 500))
        return key, listener.events

    def cancel(self, key: int) -> None:
        self.inbox.put(partial(self._cancel, key))

    def finish(self, key: int, index: int) -> None:
        """Ends a sample with what it has: its stop string is there."""
        self.inbox.put(partial(self.engine.finish, key, index))

    # called in the thread

    def run(self):
        try:
            while True:
                try:
                    self.admit(block=not self.engine.busy)
                    self.engine.step()
                    self.deliver()
                except Exception as error:  # running requests are lost, the server is not: say so to their clients
                    traceback.print_exc()
                    self.fail_all(f"generation failed: {type(error).__name__}: {error}")
                    self.engine.reset()  # what the step has left in the cache is anyone's guess
        finally:  # a GPU that has failed, say: not even the reset works
            self.ended = True
            self.fail_all("the engine has ended")

    def admit(self, block):
        """Does what has arrived; waits for something where there is nothing else to do."""
        while block or not self.inbox.empty():
            self.inbox.get()()
            block = False

    def _submit(self, key, settings):
        listener = self.listeners.get(key)
        if listener is None:  # lost to a step that failed in between
            return
        try:
            self.engine.submit(key=key, n=listener.n, **settings)
        except ValueError as error:
            listener.send(Failure(str(error), 400))
            del self.listeners[key]

    def _cancel(self, key):
        if self.listeners.pop(key, None) is not None:
            self.engine.cancel(key)

    def fail_all(self, message):
        for key in list(self.listeners):
            self.listeners.pop(key).send(Failure(message, 500))

    def deliver(self):
        done = set()
        for sample in self.engine.collect(errors=True):
            done.add((sample.key, sample.index))
            listener = self.listeners[sample.key]
            listener.send(sample)
            listener.n_left -= 1
            if listener.n_left == 0:
                del self.listeners[sample.key]
        for key, listener in list(self.listeners.items()):
            for index in range(listener.n if listener.watches else 0):
                ids = self.engine.partial(key, index)
                if ids and (key, index) not in done:
                    listener.send(Partial(index, ids))


# -- the application ---------------------------------------------------------------------------------------------------


def error_response(message: str, status: int, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def token_entry(chat: Chat, token_id: int, logprob: float) -> dict:
    text = chat.decode([token_id])
    # half of a character has no text of its own, and its bytes are not those of the replacement sign
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def logprobs_of(chat: Chat, sample: Sample, n_top: int | None) -> dict:
    content = []
    for i, token_id in enumerate(sample.ids):
        top = sample.top_logprobs[i][:n_top] if n_top else []
        entry = token_entry(chat, token_id, sample.logprobs[i])
        content.append({**entry, "top_logprobs": [token_entry(chat, *pair) for pair in top]})
    return {"content": content, "refusal": None}


def usage(n_prompt: int, choices: list[Choice]) -> dict:
    n = sum(choice.n_tokens for choice in choices)  # the stop token included
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


def failure_of(event: Partial | Sample | Failure) -> Failure | None:
    """One sample that failed is the end of its request: there is no answer with fewer choices."""
    if isinstance(event, Sample) and event.error:
        return Failure(f"generation failed: {event.error}", 500)
    return event if isinstance(event, Failure) else None


def make_app(engine: Engine, chat: Chat, name: str) -> Starlette:
    worker, numbers = Worker(engine), itertools.count()

    async def models(request):
        model = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request):
        ended = worker.ended
        return JSONResponse({"status": "the engine has ended" if ended else "ok"}, 500 if ended else 200)

    async def completions(http):
        try:
            request = read_request(await http.body(), name)
        except BadRequest as error:
            return error_response(str(error), error.status, error.param, error.code)
        try:
            prompt_ids = chat.messages([{"role": m.role, "content": m.text()} for m in request.messages])
        except ValueError as error:
            return error_response(str(error), 400, "messages")
        room = engine.max_len - len(prompt_ids)
        if room < 1:
            return error_response(
                f"the messages have {len(prompt_ids)} tokens; this server holds {engine.max_len} of "
                "prompt and response together",
                400,
                "messages",
                "context_length_exceeded",
            )
        n = request.n or 1
        seed = int.from_bytes(os.urandom(7), "little") if request.seed is None else request.seed
        settings = dict(
            prompt_ids=prompt_ids,
            seeds=[derive_seed(seed, i) for i in range(n)],
            max_new_tokens=min(request.max_completion_tokens or request.max_tokens or room, room),
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_logprobs=request.top_logprobs or 0,
        )
        key, events = worker.submit(n, bool(request.stream or request.stop), **settings)
        head = {"id": f"chatcmpl-{os.getpid()}-{next(numbers)}", "created": int(time.time()), "model": name}
        if request.stream:
            first = await events.get()  # a request that the engine refuses still gets its status
            if failure := failure_of(first):
                worker.cancel(key)
                return error_response(failure.message, failure.status)
            chunks = stream_chunks(key, events, first, n, len(prompt_ids), request, head)
            return StreamingResponse(chunks, media_type="text/event-stream")
        return await whole(http, key, events, n, len(prompt_ids), request, head)

    async def whole(http, key, events, n, n_prompt, request, head):
        """Waits for the n samples, and for the client's going away, which stops them."""
        gone, done = asyncio.ensure_future(http.receive()), []
        try:
            while len(done) < n:
                arrived = asyncio.ensure_future(events.get())
                await asyncio.wait([arrived, gone], return_when=asyncio.FIRST_COMPLETED)
                if not arrived.done():
                    arrived.cancel()
                    return JSONResponse(None, 499)  # nobody reads it
                event = arrived.result()
                if failure := failure_of(event):
                    return error_response(failure.message, failure.status)
                if isinstance(event, Sample):
                    done.append(choice_of(chat, event, request.stop))
                elif find_stop(chat.decode(event.ids), request.stop) is not None:
                    worker.finish(key, event.index)
        finally:
            gone.cancel()
            worker.cancel(key)
        done.sort(key=lambda choice: choice.sample.index)
        choices = [
            {
                "index": choice.sample.index,
                "finish_reason": choice.finish_reason,
                "message": {"role": "assistant", "content": choice.text, "refusal": None},
                "logprobs": logprobs_of(chat, choice.sample, request.top_logprobs) if request.logprobs else None,
            }
            for choice in done
        ]
        body = {"object": "chat.completion", "choices": choices, "usage": usage(n_prompt, done)}
        return JSONResponse(head | body)

    async def stream_chunks(key, events, event, n, n_prompt, request, head):
        """Server-sent events: a role, pieces of text, a finish_reason for each sample, then [DONE]."""

        def chunk(choices, **more):
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        def piece(index, delta, finish_reason=None):
            return chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

        shown, done = [""] * n, []
        try:
            for index in range(n):
                yield piece(index, {"role": "assistant", "content": ""})
            while True:
                if failure := failure_of(event):
                    yield f"data: {json.dumps({'error': {'message': failure.message, 'type': 'server_error'}})}\n\n"
                    return
                choice = choice_of(chat, event, request.stop) if isinstance(event, Sample) else None
                text = choice.text if choice else chat.decode(event.ids)
                if not choice and find_stop(text, request.stop) is not None:
                    worker.finish(key, event.index)
                text = text if choice else shown_so_far(text, request.stop)
                if len(text) > len(shown[event.index]):
                    yield piece(event.index, {"content": text[len(shown[event.index]) :]})
                    shown[event.index] = text
                if choice:
                    done.append(choice)
                    yield piece(event.index, {}, choice.finish_reason)
                if len(done) == n:
                    break
                event = await events.get()
            if request.stream_options and request.stream_options.include_usage:
                yield chunk([], usage=usage(n_prompt, done))
            yield "data: [DONE]\n\n"
        finally:  # also where the client has gone
            worker.cancel(key)

    async def not_found(http, error):
        return error_response(f"no {http.method} {http.url.path} here; try /v1/chat/completions", error.status_code)

    routes = [
        Route("/v1/models", models),
        Route("/health", health),
        Route("/v1/chat/completions", completions, methods=["POST"]),
    ]
    return Starlette(routes=routes, exception_handlers={404: not_found, 405: not_found})


def main(args: Args) -> None:
    ranks = start(args.dtype)
    chat = Chat(args.model)
    model = load_pretrained(args.model, ranks.dtype, ranks.device)
    limit = model.config.max_position_embeddings
    if args.max_len is not None and not 2 <= args.max_len <= limit:
        raise ValueError(f"--max-len {args.max_len}: expected 2 to {limit}, the positions of {args.model}")
    engine = Engine(model, chat.stop_ids, args.max_len or limit, args.max_batch, args.kv_tokens)
    name = args.name or args.model
    app = make_app(engine, chat, name)
    print(f"{name!r} at http://{args.host}:{args.port}/v1", file=sys.stderr, flush=True)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning")


if __name__ == "__main__":
    flags.run(main, ARGS)
