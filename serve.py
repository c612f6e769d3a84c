"""An OpenAI-compatible chat server over the generation engine: how a judge runs on another machine.

One thread owns the engine. A request joins its batch at the next step and leaves it when it is done, so concurrent
requests are computed together; requests are checked and their text is encoded outside that thread.

    POST /v1/chat/completions   messages, max_tokens, temperature, top_p, n, seed, stream, logprobs, top_logprobs
    GET  /v1/models             the one model
    GET  /health                200 as long as the engine's thread runs

Messages are encoded with special-token parsing off, so no text in them becomes a control token. Log-probs are those of
the full softmax at the sampling temperature (at temperature 0 of the plain one), whatever top_p is. What the engine
can't do (stop strings, penalties, tools, response formats, log-probs of a stream) is refused, not ignored.

    python serve.py --model out/grm/model --port 8000
    python ppo_cpe.py --judge http://HOST:8000          # on the machine that trains
"""

import asyncio
import contextlib
import itertools
import json
import os
import queue
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any, Literal

import pydantic
import tyro
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from generate import Engine
from model import load_pretrained
from prompts import Chat
from runtime.distributed import derive_seed, start
from runtime.flags import user_errors


@dataclass
class Args:
    model: str = "out/grm/model"
    """Folder or hub id."""
    name: str | None = None
    """What clients call it; by default --model itself."""
    host: str = "127.0.0.1"
    """0.0.0.0 lets other machines in; there is no authentication."""
    port: int = 8000
    max_batch: int = 64
    """Samples that run at once; more wait."""
    kv_tokens: int | None = None
    """Tokens in the KV cache; None: by max_batch and what memory is free."""
    max_len: int | None = None
    """Tokens of prompt and response together; by default the positions of the model."""
    dtype: str = "auto"
    """fp32, bf16, or auto (bf16 on a GPU)."""


# -- what a request may hold -------------------------------------------------------------------------------------------


class TextPart(pydantic.BaseModel):
    type: Literal["text"]
    text: str


class Message(pydantic.BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    def text(self):
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(pydantic.BaseModel):
    include_usage: bool = False


class ChatRequest(pydantic.BaseModel):
    model: str
    messages: list[Message] = pydantic.Field(min_length=1)
    max_tokens: int | None = pydantic.Field(None, ge=1)
    max_completion_tokens: int | None = pydantic.Field(None, ge=1)
    temperature: float | None = pydantic.Field(None, ge=0, le=2)
    top_p: float | None = pydantic.Field(None, gt=0, le=1)
    n: int | None = pydantic.Field(None, ge=1, le=128)
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)
    # what would change the answer and is not there: refused unless it has its neutral value
    stop: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    tools: Any = None
    functions: Any = None
    response_format: Any = None


NEUTRAL = {
    "stop": (None, []),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "logit_bias": (None, {}),
    "tools": (None, []),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
}


class BadRequest(Exception):
    def __init__(self, message, param=None, code=None, status=400):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


def read_request(body, name):
    """The ChatRequest in a body. BadRequest: not JSON, a field that is missing, out of range or not supported."""
    try:
        request = ChatRequest.model_validate_json(body)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise BadRequest(f"{field}: {first['msg']}" if field else first["msg"], field or None) from error
    for field, allowed in NEUTRAL.items():
        if getattr(request, field) not in allowed:
            raise BadRequest(f"{field} is not supported by this server", field, "unsupported_parameter")
    if request.model != name:
        raise BadRequest(f"no model {request.model!r} here, only {name!r}", "model", "model_not_found", 404)
    if request.stream and request.logprobs:
        raise BadRequest("logprobs of a stream are not supported", "logprobs", "unsupported_parameter")
    if request.top_logprobs and not request.logprobs:
        raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
    return request


# -- the engine's thread -----------------------------------------------------------------------------------------------


class Worker:
    """Runs the engine in a thread of its own. Events of a request go to an asyncio queue of its connection:
    ("partial", index, ids), ("done", Sample), ("error", message, status).
    """

    def __init__(self, engine):
        self.engine, self.inbox, self.listeners = engine, queue.Queue(), {}
        self.keys = itertools.count()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, n, stream, **settings):
        """Called on the event loop -> (key, asyncio.Queue of the events)."""
        key, events = next(self.keys), asyncio.Queue()
        self.inbox.put((key, (asyncio.get_running_loop(), events, n, stream), settings))
        return key, events

    def cancel(self, key):
        self.inbox.put((key, None, None))

    def send(self, key, *event):
        loop, events, _, _ = self.listeners[key]
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            loop.call_soon_threadsafe(events.put_nowait, event)

    def run(self):
        while True:
            self.admit(block=not self.engine.busy)
            try:
                self.engine.step()
                self.deliver()
            except Exception as error:  # running requests are lost, the server is not: say so to their clients
                traceback.print_exc()
                for key in list(self.listeners):
                    self.send(key, "error", f"generation failed: {type(error).__name__}: {error}", 500)
                    self.engine.cancel(key)
                self.listeners.clear()

    def admit(self, block):
        """Takes what has arrived; waits for something where there is nothing else to do."""
        while block or not self.inbox.empty():
            key, listener, settings = self.inbox.get()
            block = False
            if listener is None:
                if self.listeners.pop(key, None) is not None:
                    self.engine.cancel(key)
                continue
            self.listeners[key] = listener
            try:
                self.engine.submit(key=key, n=listener[2], **settings)
            except ValueError as error:
                self.send(key, "error", str(error), 400)
                del self.listeners[key]

    def deliver(self):
        done = {}
        for sample in self.engine.collect():
            self.send(sample.key, "done", sample)
            done.setdefault(sample.key, set()).add(sample.index)
        for key, (loop, events, left, stream) in list(self.listeners.items()):
            left -= len(done.get(key, ()))
            self.listeners[key] = (loop, events, left, stream)
            if left == 0:
                del self.listeners[key]
            elif stream:
                for index in range(stream):
                    ids = self.engine.partial(key, index)
                    if ids and index not in done.get(key, ()):
                        self.send(key, "partial", index, ids)


# -- the application ---------------------------------------------------------------------------------------------------


def error_response(message, status, param=None, code=None):
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def token_entry(chat, token_id, logprob):
    text = chat.decode([token_id])
    # half of a character has no text of its own, and its bytes are not those of the replacement sign
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def logprobs_of(chat, sample, n_top):
    content = []
    for i, token_id in enumerate(sample.ids):
        top = sample.top_logprobs[i][:n_top] if n_top else []
        content.append(
            {
                **token_entry(chat, token_id, sample.logprobs[i]),
                "top_logprobs": [token_entry(chat, *pair) for pair in top],
            }
        )
    return {"content": content, "refusal": None}


def usage(n_prompt, samples):
    n = sum(len(s.logprobs) for s in samples)  # the stop token included
    return {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


def make_app(engine, chat, name):
    worker, numbers = Worker(engine), itertools.count()

    async def models(request):
        model = {"id": name, "object": "model", "created": 0, "owned_by": "local"}
        return JSONResponse({"object": "list", "data": [model]})

    async def health(request):
        alive = worker.thread.is_alive()
        return JSONResponse({"status": "ok" if alive else "the engine's thread has ended"}, 200 if alive else 500)

    async def completions(http):
        try:
            request = read_request(await http.body(), name)
        except BadRequest as error:
            return error_response(str(error), error.status, error.param, error.code)
        prompt_ids = chat.messages([{"role": m.role, "content": m.text()} for m in request.messages])
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
        key, events = worker.submit(n, n if request.stream else 0, **settings)
        head = {"id": f"chatcmpl-{os.getpid()}-{next(numbers)}", "created": int(time.time()), "model": name}
        if request.stream:
            first = await events.get()  # a request that the engine refuses still gets its status
            if first[0] == "error":
                return error_response(*first[1:])
            chunks = stream_chunks(key, events, first, n, len(prompt_ids), request, head)
            return StreamingResponse(chunks, media_type="text/event-stream")
        return await whole(http, key, events, n, len(prompt_ids), request, head)

    async def whole(http, key, events, n, n_prompt, request, head):
        """Waits for the n samples, and for the client's going away, which stops them."""
        gone, samples = asyncio.ensure_future(http.receive()), []
        try:
            while len(samples) < n:
                event = asyncio.ensure_future(events.get())
                await asyncio.wait([event, gone], return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    return JSONResponse(None, 499)  # nobody reads it
                kind, *rest = event.result()
                if kind == "error":
                    return error_response(*rest)
                samples.append(rest[0])
        finally:
            gone.cancel()
            worker.cancel(key)
        choices = [
            {
                "index": s.index,
                "finish_reason": s.finish_reason,
                "message": {"role": "assistant", "content": chat.decode(s.ids), "refusal": None},
                "logprobs": logprobs_of(chat, s, request.top_logprobs) if request.logprobs else None,
            }
            for s in sorted(samples, key=lambda s: s.index)
        ]
        body = {"object": "chat.completion", "choices": choices, "usage": usage(n_prompt, samples)}
        return JSONResponse(head | body)

    async def stream_chunks(key, events, event, n, n_prompt, request, head):
        """Server-sent events: a role, pieces of text, a finish_reason for each sample, then [DONE]."""

        def chunk(choices, **more):
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        def piece(index, delta, finish_reason=None):
            return chunk([{"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

        shown, samples = [""] * n, []
        try:
            for index in range(n):
                yield piece(index, {"role": "assistant", "content": ""})
            while True:
                kind, *rest = event
                if kind == "error":
                    yield f"data: {json.dumps({'error': {'message': rest[0], 'type': 'server_error'}})}\n\n"
                    return
                done = rest[0] if kind == "done" else None
                index, ids = (done.index, done.ids) if done else rest
                text = chat.decode(ids)
                if len(text) > len(shown[index]) and (done or not text.endswith("\ufffd")):  # no half characters
                    yield piece(index, {"content": text[len(shown[index]) :]})
                    shown[index] = text
                if done:
                    samples.append(done)
                    yield piece(index, {}, done.finish_reason)
                if len(samples) == n:
                    break
                event = await events.get()
            if request.stream_options and request.stream_options.include_usage:
                yield chunk([], usage=usage(n_prompt, samples))
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


def main(args):
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
    with user_errors():
        main(tyro.cli(Args))
