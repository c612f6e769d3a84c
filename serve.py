"""An OpenAI-compatible chat server over the engine, for example for a judge on another machine.

One thread owns the engine (engine/thread.py): concurrent requests are computed together, and clients take turns. Other
threads check and encode the requests, so a long text does not hold up anybody else.

    POST /v1/chat/completions   messages, max_tokens, temperature, top_p, n, seed, stop, stream, logprobs, top_logprobs
    GET  /v1/models             the one model
    GET  /health                200 as long as the engine's thread runs

Flags limit what clients can use. A request that is too large is answered 413, one that is too slow 408, and one too
many 503 with Retry-After. A client that is slow to send or to read loses its connection.

Messages are encoded with special-token parsing off, so no text in them becomes a control token. Log-probs are those of
the full softmax at the sampling temperature (at temperature 0, of the plain softmax), whatever top_p is. A response
ends before the first of its `stop` strings. A field that would change the answer and is not supported (penalties,
tools, response formats, log-probs of a stream, any unknown name) is refused, not ignored.

    python serve.py --model out/grm/model --host 0.0.0.0 --port 8000
    python ppo_cpe.py --judge http://HOST:8000          # on the machine that trains
"""

from dataclasses import dataclass

from runtime import flags


@dataclass(kw_only=True)
class ServerLimits:
    # -- limits
    api_key: str | None = None
    """Clients have to send `Authorization: Bearer KEY`. Also read from the environment variable SERVE_API_KEY. Without
    a key the server answers only to an IP address, localhost and the machine's name."""
    max_body: flags.Count = 2**23
    """Bytes of a request body."""
    max_n: flags.Count = 128
    """Samples per request (n)."""
    max_samples: flags.Count = 4096
    """Samples of all requests that wait or run. Further requests are answered 503."""
    max_tokens_held: flags.Count = 2**22
    """Tokens of all requests that wait or run, in prompts and in lists of top_logprobs. Then 503."""
    max_logprobs: flags.Count = 2**17
    """Log-probs in an answer: n * max_tokens * (1 + top_logprobs)."""
    max_connections: flags.Count = 2048
    """Open connections. Then 503. Lowered if the system allows fewer open files (ulimit -n)."""
    read_timeout: flags.Positive = 30
    """Seconds for a request to arrive."""
    write_timeout: flags.Positive = 60
    """Seconds that a client may go without reading what it is sent."""


@dataclass(kw_only=True)
class Args(ServerLimits):
    model: str = "out/grm/model"
    """Folder or hub id."""
    name: str | None = None
    """Name of the model for clients. Default: the value of --model."""
    host: str = "127.0.0.1"
    """Address to listen on. 0.0.0.0 accepts other machines; see --api-key."""
    port: flags.Port = 8000
    """TCP port; 0 chooses a free one."""
    max_batch: flags.Count = 64
    """Samples that run at once; more wait."""
    kv_tokens: flags.Count | None = None
    """Tokens in the KV cache. Default: by --max-batch and the free memory."""
    max_len: flags.Count | None = None
    """Tokens of prompt and response together. Default: the model's maximum."""
    dtype: flags.DType = "auto"
    """Compute dtype: fp32, bf16, or auto (bf16 on a GPU)."""


if __name__ == "__main__":
    ARGS = flags.parse(Args, __doc__)  # before the imports below, which take seconds

import asyncio
import bisect
import concurrent.futures
import hmac
import ipaddress
import itertools
import json
import math
import os
import resource
import secrets
import socket
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, NoReturn, TypeVar

import h11
import pydantic
import pydantic_core
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage
from uvicorn.protocols.http.h11_impl import H11Protocol

from chat import Chat
from engine import Engine, Sample
from engine.thread import EngineThread, Listener, Progress, RequestFailed, ServerBusy
from model import load_pretrained
from runtime.distributed import derive_seed, start

T = TypeVar("T")

# -- what a request may hold -------------------------------------------------------------------------------------------


LONGEST_STOP = 1000  # characters of a stop string: each piece of text is searched for it
MOST_VALUES = 2**14  # objects, lists, texts and numbers in a request: nobody else is served while they are checked

# Fields of other servers, with the values that change nothing. null is accepted for every field.
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
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    # in messages, as clients send an answer back
    "tool_calls": ([],),
    "annotations": ([],),
}


class Fields(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    harmless: ClassVar[frozenset[str]] = frozenset()  # unknown fields that never change the answer

    def refuse_unknown(self, where: str = "") -> None:
        """BadRequest: an unknown field that might change the answer."""
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
    messages: list[Message] = pydantic.Field(min_length=1, fail_fast=True)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    n: int | None = pydantic.Field(None, ge=1)
    seed: int | None = pydantic.Field(None, ge=-(2**63), lt=2**63)
    stop: list[str] = []
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)

    @pydantic.field_validator("stop", mode="before")
    @classmethod
    def up_to_four(cls, value: object) -> object:
        if value is None:
            return []
        stops = value if isinstance(value, list) else [value]
        if len(stops) > 4 or not all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops):
            raise ValueError(f"expected a string or a list of up to 4, each of 1 to {LONGEST_STOP} characters")
        return stops


class BadRequest(Exception):
    """A request that is answered with an error in OpenAI's form: a message, the field, a code, the HTTP status."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400):
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


def check_size(content: Any) -> None:
    """BadRequest: a request holds too many values, such as messages."""
    n_values = 0
    waiting = [content]
    while waiting:
        value = waiting.pop()
        values = value.values() if isinstance(value, dict) else value
        if isinstance(value, dict | list):
            n_values += len(values)
            if n_values > MOST_VALUES:
                raise BadRequest(f"the request has over {MOST_VALUES} values: messages, their parts and fields")
            waiting.extend(values)


def read_request(body: bytes, name: str, max_n: int) -> ChatRequest:
    """Parses a body. BadRequest: it is not JSON or too much, or a field is missing, out of range or not supported."""
    try:
        content = pydantic_core.from_json(body)
    except ValueError as error:
        raise BadRequest(f"Invalid JSON: {error}") from error
    check_size(content)
    try:
        request = ChatRequest.model_validate(content)
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
    if (request.n or 1) > max_n:
        raise BadRequest(f"n {request.n}: this server gives at most {max_n} samples", "n")
    if request.stream and request.logprobs:
        raise BadRequest("logprobs of a stream are not supported", "logprobs", "unsupported_parameter")
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return request


PIECE = 2**16  # characters


def encode_messages(chat: Chat, messages: list[Message], max_len: int) -> list[int]:
    """Returns the prompt ids. BadRequest: they leave no room for a response.

    Text that is far too long is refused in the time that encoding text of the allowed length takes: it is first counted
    piece by piece.
    """

    def refuse(count: int | str) -> NoReturn:
        reason = f"the messages have {count} tokens; this server holds {max_len} of prompt and response together"
        raise BadRequest(reason, "messages", "context_length_exceeded")

    texts = [message.text() for message in messages]
    if sum(map(len, texts)) > PIECE:
        n_tokens = 0
        for text in texts:
            for start in range(0, len(text) or 1, PIECE):
                n_tokens += len(chat.encode(text[start : start + PIECE])) + 1
                if n_tokens > 2 * max_len:  # cutting the text adds tokens, but does not double them
                    refuse(f"more than {max_len}")
    try:
        ids = chat.messages([{"role": m.role, "content": text} for m, text in zip(messages, texts)])
    except ValueError as error:
        raise BadRequest(str(error), "messages") from error
    if len(ids) >= max_len:
        refuse(len(ids))
    return ids


# -- stop strings ------------------------------------------------------------------------------------------------------


def find_stop(text: str, stops: list[str]) -> int | None:
    """Returns the start of the stop string that is complete first, or None. It does not depend on how text arrives."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]  # (end, start)
    return min(ends)[1] if ends else None


def shown_so_far(text: str, stops: list[str]) -> str:
    """Returns the part of an unfinished text that can be sent: no half character, no possible start of a stop."""
    at = find_stop(text, stops)
    if at is not None:
        return text[:at]
    text = text.rstrip("\ufffd")
    held = max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
    return text[: len(text) - held]


@dataclass
class Choice:
    """A sample as its client sees it, cut before its stop string."""

    sample: Sample  # its ids are those of the text
    text: str
    finish_reason: str
    n_tokens: int  # sampled, including the stop token or the tokens of the stop string


def choice_of(chat: Chat, sample: Sample, stops: list[str]) -> Choice:
    whole_text = chat.decode(sample.ids)
    stop_at = find_stop(whole_text, stops)
    if stop_at is None:
        return Choice(sample, whole_text, sample.finish_reason, len(sample.logprobs))
    text = whole_text[:stop_at]

    def has_text(n: int) -> bool:
        return chat.decode(sample.ids[:n]).startswith(text)

    def has_stop(n: int) -> bool:
        return find_stop(chat.decode(sample.ids[:n]), stops) is not None

    counts = range(len(sample.ids) + 1)
    n_text = bisect.bisect_left(counts, True, key=has_text)
    n_tokens = bisect.bisect_left(counts, True, key=has_stop)
    return Choice(replace(sample, ids=sample.ids[:n_text]), text, "stop", n_tokens)


# -- the application ---------------------------------------------------------------------------------------------------


RETRY_AFTER = 5  # seconds; a client that was answered 503 may ask again then
BODIES = 32  # of the largest size; so many bytes may be arriving or being encoded at once


def error_body(error: BadRequest) -> dict:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    param = error.param and error.param[:100]
    return {"error": {"message": str(error)[:1000], "type": kind, "param": param, "code": error.code}}


async def refused(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BadRequest)
    headers = {"Retry-After": str(RETRY_AFTER)} if error.status == 503 else None
    return JSONResponse(error_body(error), error.status, headers)


async def not_found(http: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"no {http.method} {http.url.path} here; try /v1/chat/completions"
    return await refused(http, BadRequest(message, status=error.status_code))


async def left_alone(http: Request, error: Exception) -> JSONResponse:
    """The client has gone: nobody reads the answer."""
    return JSONResponse(None, 499)


def token_entry(chat: Chat, token_id: int, logprob: float) -> dict:
    text = chat.decode([token_id])
    # half of a character decodes to the replacement sign, whose bytes are not those of the token
    text_bytes = None if "\ufffd" in text else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": text_bytes}


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


def completion(chat: Chat, head: dict, choices: list[Choice], n_prompt: int, request: ChatRequest) -> JSONResponse:
    """The answer to a request that is no stream. With many log-probs this takes seconds."""
    answers = [
        {
            "index": choice.sample.index,
            "finish_reason": choice.finish_reason,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": logprobs_of(chat, choice.sample, request.top_logprobs) if request.logprobs else None,
        }
        for choice in choices
    ]
    return JSONResponse(head | {"object": "chat.completion", "choices": answers, "usage": usage(n_prompt, choices)})


async def while_connected(http: Request, work: Awaitable[T]) -> T:
    """The result of `work`. ClientDisconnect: the client has gone before it was there."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(http.receive())  # after the body, the next message says that the client has gone
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        gone.cancel()
        task.cancel()


Piece = tuple[int, str, Choice | None]  # index of a sample, its text so far, and the whole of it when it has ended


async def pieces_of(chat: Chat, worker: EngineThread, key: int, listener: Listener, request: ChatRequest):
    """Yields pieces until all samples have ended. BadRequest: one has failed, and there is no answer with fewer."""
    samples_left = request.n or 1
    while samples_left:
        event = await listener.get()
        if isinstance(event, RequestFailed):
            raise BadRequest(event.message, status=event.status)
        if isinstance(event, Progress):
            text = chat.decode(event.ids)
            if find_stop(text, request.stop) is not None:
                worker.finish(key, event.index)
            yield event.index, shown_so_far(text, request.stop), None
            await asyncio.sleep(0)  # an event that is there already would not let others have their turn
            continue
        if event.error:
            raise BadRequest(f"generation failed: {event.error}", status=500)
        samples_left -= 1
        choice = await asyncio.to_thread(choice_of, chat, event, request.stop)
        yield event.index, choice.text, choice


async def choices_of(pieces: AsyncGenerator[Piece, None]) -> list[Choice]:
    choices = [choice async for _, _, choice in pieces if choice is not None]
    return sorted(choices, key=lambda choice: choice.sample.index)


async def stream_chunks(
    head: dict, first: Piece, pieces: AsyncGenerator[Piece, None], n_prompt: int, request: ChatRequest
) -> AsyncIterator[str]:
    """Yields server-sent events: for each sample a role, pieces of text, a finish_reason; then [DONE]."""

    def chunk(choices: list[dict], **more: dict) -> str:
        return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

    def delta_chunk(index: int, delta: dict, finish_reason: str | None = None) -> str:
        return chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    shown = [""] * (request.n or 1)
    choices: list[Choice] = []
    for index in range(len(shown)):
        yield delta_chunk(index, {"role": "assistant", "content": ""})
    piece: Piece | None = first
    while piece is not None:
        index, text, choice = piece
        if len(text) > len(shown[index]):
            yield delta_chunk(index, {"content": text[len(shown[index]) :]})
            shown[index] = text
        if choice is not None:
            choices.append(choice)
            yield delta_chunk(index, {}, choice.finish_reason)
        try:
            piece = await anext(pieces, None)
        except BadRequest as error:  # the status has been sent
            yield f"data: {json.dumps(error_body(error))}\n\n"
            return
    if request.stream_options and request.stream_options.include_usage:
        yield chunk([], usage=usage(n_prompt, choices))
    yield "data: [DONE]\n\n"


class Stream(StreamingResponse):
    """Releases its request even if the client leaves before the first chunk."""

    def __init__(self, chunks: AsyncIterator[str], release: Callable[[], None]):
        super().__init__(chunks, media_type="text/event-stream")
        self.release = release

    async def __call__(self, scope, receive, send):
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.release()


def is_own_host(name: str | None) -> bool:
    """Whether a Host header names this machine. A name that somebody else may point here does not: a web page could
    then read what a server without a key answers (DNS rebinding).
    """
    try:
        return ipaddress.ip_address((name or "").strip("[]")) is not None
    except ValueError:
        return name in ("localhost", socket.gethostname().lower())  # as starlette has the header's


def read_to_end(app: ASGIApp, seconds: float) -> ASGIApp:
    """Reads what is left of a request, for so many seconds since its start, before its answer is sent.

    A connection that is closed with unread bytes is reset, and its client may not see why it was refused.
    """

    async def whole(scope: Scope, receive: Receive, send: Send) -> None:
        is_left = scope["type"] == "http"  # whether more of the request may come
        deadline = asyncio.get_running_loop().time() + seconds

        async def receive_part() -> ASGIMessage:
            nonlocal is_left
            message = await receive()
            is_left = message.get("more_body", False)
            return message

        async def send_after(message: ASGIMessage) -> None:
            if is_left and message["type"] == "http.response.start":
                try:
                    async with asyncio.timeout_at(deadline):
                        while is_left:
                            await receive_part()
                except TimeoutError:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        await app(scope, receive_part, send_after)

    return whole


def make_app(engine: Engine, chat: Chat, name: str, limits: ServerLimits) -> Starlette:
    worker = EngineThread(engine, limits.max_samples, limits.max_tokens_held)
    numbers = itertools.count()
    encoders = concurrent.futures.ThreadPoolExecutor(2)
    bytes_arriving = 0  # of requests that are arriving or being encoded

    def guarded(handler):
        key = limits.api_key or os.environ.get("SERVE_API_KEY", "")

        async def checked(http: Request):
            sent = http.headers.get("authorization", "")
            if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
                raise BadRequest("expected the header Authorization: Bearer KEY", code="invalid_api_key", status=401)
            if not key and not is_own_host(http.url.hostname):
                raise BadRequest(f"no --api-key, and a Host that may be a web page's: {http.url.hostname}", status=403)
            # a web page may send other types to any address, and this one only where the server allows it
            if http.method == "POST" and not http.headers.get("content-type", "").startswith("application/json"):
                raise BadRequest("expected the header Content-Type: application/json", status=415)
            return await handler(http)

        return checked

    async def models(http: Request):
        model = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(http: Request):
        if worker.ended:
            return JSONResponse({"status": "the engine has ended"}, 500)
        return JSONResponse({"status": "ok"})

    def prepare(body: bytes) -> tuple[ChatRequest, list[int]]:
        request = read_request(body, name, limits.max_n)
        return request, encode_messages(chat, request.messages, engine.max_len)

    async def prepared(http: Request) -> tuple[ChatRequest, list[int]]:
        """Returns the request and the prompt ids. BadRequest: also for a body that is too large or too slow."""
        nonlocal bytes_arriving
        body = bytearray()
        try:
            async with asyncio.timeout(limits.read_timeout):
                async for part in http.stream():
                    body += part
                    bytes_arriving += len(part)
                    if len(body) > limits.max_body:
                        raise BadRequest(f"the request has more than {limits.max_body} bytes", status=413)
                    if bytes_arriving > BODIES * limits.max_body:
                        raise BadRequest("too many large requests are on their way", status=503)
            return await asyncio.get_running_loop().run_in_executor(encoders, prepare, bytes(body))
        except TimeoutError as error:
            raise BadRequest(f"the request did not arrive within {limits.read_timeout:g} s", status=408) from error
        finally:
            bytes_arriving -= len(body)

    def submit(http: Request, request: ChatRequest, prompt_ids: list[int]) -> tuple[int, Listener]:
        """Hands a request to the engine's thread. BadRequest: it does not fit in now, or never will."""
        n = request.n or 1
        tokens_left = engine.max_len - len(prompt_ids)
        wanted = request.max_completion_tokens or request.max_tokens or tokens_left
        max_new_tokens = min(wanted, tokens_left)
        top_logprobs = request.top_logprobs or 0
        n_logprobs = n * max_new_tokens * (1 + top_logprobs)
        if request.logprobs and n_logprobs > limits.max_logprobs:
            raise BadRequest(
                f"n * max_tokens * (1 + top_logprobs) is {n_logprobs}; this server gives at most "
                f"{limits.max_logprobs} log-probs in an answer",
                "logprobs",
            )
        seed = secrets.randbits(56) if request.seed is None else request.seed
        try:
            return worker.submit(
                http.client.host if http.client else "",
                bool(request.stream or request.stop),
                seeds=[derive_seed(seed, i) for i in range(n)],
                tokens=len(prompt_ids) + n * max_new_tokens * top_logprobs,
                prompt_ids=prompt_ids,
                max_new_tokens=max_new_tokens,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                top_logprobs=top_logprobs,
            )
        except ValueError as error:
            raise BadRequest(str(error)) from error
        except ServerBusy as error:
            raise BadRequest(str(error), status=503) from error

    async def completions(http: Request):
        request, prompt_ids = await prepared(http)
        key, listener = submit(http, request, prompt_ids)
        head = {"id": f"chatcmpl-{os.getpid()}-{next(numbers)}", "created": int(time.time()), "model": name}
        pieces = pieces_of(chat, worker, key, listener, request)
        stream = None
        try:
            if request.stream:
                first = await while_connected(http, anext(pieces))  # before the header: a refusal gets its status
                chunks = stream_chunks(head, first, pieces, len(prompt_ids), request)
                stream = Stream(chunks, partial(worker.release, key))
                return stream
            choices = await while_connected(http, choices_of(pieces))
            return await asyncio.to_thread(completion, chat, head, choices, len(prompt_ids), request)
        finally:
            if stream is None:
                worker.release(key)

    app = Starlette(
        routes=[
            Route("/v1/models", guarded(models)),
            Route("/health", health),
            Route("/v1/chat/completions", guarded(completions), methods=["POST"]),
        ],
        exception_handlers={404: not_found, 405: not_found, BadRequest: refused, ClientDisconnect: left_alone},
        middleware=[Middleware(read_to_end, limits.read_timeout)],
    )
    app.state.worker = worker
    app.state.limits = limits
    return app


SPARE_CONNECTIONS = 128  # over the limit: they are answered 503, further ones are closed at once
BACKLOG = 128  # connections that the event loop may accept before it closes any
OTHER_FILES = 128  # weights, libraries, devices


def fitting_connections(wanted: int) -> int:
    """Returns how many connections this process may have, up to the wanted number. Raises its limit on open files for
    them. Without a file for a connection, nobody could connect. ValueError: the system allows none.
    """
    needed = wanted + SPARE_CONNECTIONS + BACKLOG + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fitting = wanted - (needed - allowed)
    if fitting < 1:
        raise ValueError(f"ulimit -n is {hard}; a server needs {needed - wanted} open files and one per connection")
    if fitting < wanted:
        print(f"--max-connections {wanted}: lowered to {fitting}, since ulimit -n is {hard}", file=sys.stderr)
    return fitting


class Connection(H11Protocol):
    """Closes when the head of a request does not arrive in time, or the client stops reading. Answers 503 if there are
    too many connections."""

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        app = config.app
        assert isinstance(app, Starlette)
        self.limits: ServerLimits = app.state.limits
        self.head_timer: asyncio.TimerHandle | None = None
        self.reading_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport):
        super().connection_made(transport)
        over_limit = len(self.connections) - self.limits.max_connections
        if over_limit > SPARE_CONNECTIONS:
            return transport.abort()
        if over_limit > 0:
            error = BadRequest("too many connections", status=503)
            headers = {"Retry-After": str(RETRY_AFTER), "Connection": "close"}
            refusal = JSONResponse(error_body(error), error.status, headers)
            self.app = read_to_end(refusal, self.limits.read_timeout)
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for every unread byte
        self.time_head()

    def data_received(self, data):
        super().data_received(data)
        self.time_head()

    def time_head(self):
        if self.conn.their_state is not h11.IDLE:
            cancel_timer(self.head_timer)
            self.head_timer = None
        elif self.head_timer is None:  # the head has not begun to arrive, or only in part
            self.head_timer = self.loop.call_later(self.limits.read_timeout, self.transport.abort)

    def pause_writing(self):
        super().pause_writing()
        self.time_reading()

    def time_reading(self, unread_before: float = math.inf) -> None:
        """Closes unless the client has read since the timer started. unread_before: unread bytes at that time."""
        unread = self.transport.get_write_buffer_size()
        if unread < unread_before:
            self.reading_timer = self.loop.call_later(self.limits.write_timeout, self.time_reading, unread)
        else:
            self.transport.abort()  # close() would wait for these bytes

    def resume_writing(self):
        super().resume_writing()
        cancel_timer(self.reading_timer)

    def connection_lost(self, exc):
        super().connection_lost(exc)
        cancel_timer(self.head_timer)
        cancel_timer(self.reading_timer)


def cancel_timer(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()


def server_config(app: Starlette, **settings) -> uvicorn.Config:
    # below errors there is a line for each request that is none
    return uvicorn.Config(app, http=Connection, ws="none", backlog=BACKLOG, log_level="error", **settings)


def main(args: Args) -> None:
    limits = replace(args, max_connections=fitting_connections(args.max_connections))
    ranks = start(args.dtype)
    chat = Chat(args.model)
    model = load_pretrained(args.model, ranks.dtype, ranks.device)
    positions = model.config.max_position_embeddings
    if args.max_len is not None and not 2 <= args.max_len <= positions:
        raise ValueError(f"--max-len {args.max_len}: expected 2 to {positions}, the positions of {args.model}")
    # a request without max_tokens may take all that is left of a sequence, which has to fit into the cache
    max_len = min(args.max_len or positions, args.kv_tokens or positions)
    engine = Engine(model, chat.stop_ids, max_len, args.max_batch, args.kv_tokens)
    name = args.name or args.model
    config = server_config(make_app(engine, chat, name, limits), host=args.host, port=args.port)
    listening = config.bind_socket()
    port = listening.getsockname()[1]  # the one that --port 0 has chosen
    print(f"{name!r} at http://{args.host}:{port}/v1", file=sys.stderr, flush=True)
    uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    flags.run(main, ARGS)
