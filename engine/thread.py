"""The thread that runs the engine of serve.py: it takes the requests of many clients in fair turns.

One thread owns the engine. A request's samples join its batch as rows become free and leave it when they are done, so
that concurrent requests are computed together. Who is next: a sample of the client with the fewest running ones, then
of the request with the fewest started ones, then the oldest; so 300 requests of 128 samples hold up nobody else's one.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial

from engine import Engine, Sample

SLICE = 16  # samples of a request that the engine gets at once: these share the blocks of their prompt


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
    index: int = -1


class Busy(Exception):
    """No more requests are taken for now; the message says which limit is reached."""


class Listener:
    """A connection's end of its request: what it waits for, and the latest of each sample that it has not yet taken.

    However long a client does not read, there is one event a sample.
    """

    def __init__(self):
        self.loop, self.arrived, self.events = asyncio.get_running_loop(), asyncio.Event(), {}

    def send(self, event: Partial | Sample | Failure) -> None:
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event):
        self.events[event.index] = event
        self.arrived.set()

    async def get(self) -> Partial | Sample | Failure:
        while not self.events:
            self.arrived.clear()
            await self.arrived.wait()
        return self.events.pop(next(iter(self.events)))


@dataclass(eq=False)
class Request:
    """n samples of one prompt. The engine knows a slice of them by (key, number of its first sample)."""

    key: int
    client: str  # whose turn it takes
    listener: Listener
    n: int
    watches: bool  # Partials are sent, too
    seeds: list[int]
    settings: dict
    started: int = 0  # samples that the engine has got
    slices: dict[int, int] = field(default_factory=dict)  # number of the first sample -> how many
    ended: set[int] = field(default_factory=set)

    def place_of(self, index: int) -> tuple[tuple[int, int], int]:
        """Of a started sample: the engine's key and index."""
        first = max(first for first in self.slices if first <= index)
        return (self.key, first), index - first


class Worker:
    """Runs the engine in a thread of its own; what others want of it waits in `inbox` as functions to call there.

    max_samples, max_tokens: of all requests that are taken and not released.
    """

    def __init__(self, engine: Engine, max_samples: int, max_tokens: int):
        self.engine, self.inbox, self.ended = engine, queue.SimpleQueue(), False
        self.keys, self.max_samples, self.max_tokens = itertools.count(), max_samples, max_tokens
        self.held, self.samples, self.tokens = {}, 0, 0  # (samples, tokens) of each key, and their sums
        self.requests, self.waiting = {}, []  # by key; those with samples that the engine has not got yet
        self.running = Counter()  # samples in the engine, by client
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    # called on the event loop

    def submit(self, client: str, watches: bool, seeds: list[int], tokens: int, **settings) -> tuple[int, Listener]:
        """-> (key, listener); the key has to be released, however the request ends. tokens: what it counts for.

        Busy: a limit is reached. ValueError: the request alone is over it.
        """
        n = len(seeds)
        for what, now, more, limit in (
            ("samples", self.samples, n, self.max_samples),
            ("tokens", self.tokens, tokens, self.max_tokens),
        ):
            if more > limit:
                raise ValueError(f"a request of {more} {what}; this server holds {limit} of all requests together")
            if now + more > limit:
                raise Busy(f"{now} {what} are waiting or running; {more} more would be over the limit of {limit}")
        key, listener = next(self.keys), Listener()
        self.held[key] = n, tokens
        self.samples, self.tokens = self.samples + n, self.tokens + tokens
        self.inbox.put(partial(self._submit, Request(key, client, listener, n, watches, seeds, settings)))
        if self.ended:
            listener.send(Failure("the engine has ended", 500))
        return key, listener

    def release(self, key: int) -> None:
        """The request has been answered, or nobody waits for it any more."""
        if key in self.held:
            samples, tokens = self.held.pop(key)
            self.samples, self.tokens = self.samples - samples, self.tokens - tokens
            self.inbox.put(partial(self._cancel, key))

    def finish(self, key: int, index: int) -> None:
        """Ends a sample with what it has: its stop string is there."""
        self.inbox.put(partial(self._finish, key, index))

    # called in the thread

    def run(self):
        try:
            while True:
                try:
                    self.take(block=not self.engine.busy and not self.waiting)
                    self.feed()
                    self.engine.step()
                    self.deliver()
                except Exception as error:  # running requests are lost, the server is not: say so to their clients
                    traceback.print_exc()
                    self.fail_all(f"generation failed: {type(error).__name__}: {error}")
                    self.engine.reset()  # what the step has left in the cache is anyone's guess
        finally:  # a GPU that has failed, say: not even the reset works
            self.ended = True
            while not self.inbox.empty():  # what comes later sees that it has ended
                with contextlib.suppress(Exception):
                    self.inbox.get()()
            self.fail_all("the engine has ended")

    def take(self, block):
        """Does what has arrived; waits for something where there is nothing else to do."""
        while block or not self.inbox.empty():
            self.inbox.get()()
            block = False

    def feed(self):
        """Gives the engine as many samples as it has rows."""
        while self.waiting and (room := self.engine.max_batch - self.running.total()) > 0:
            request = min(self.waiting, key=lambda r: (self.running[r.client], r.started, r.key))
            first, n = request.started, min(SLICE, room, request.n - request.started)
            seeds = request.seeds[first : first + n]
            try:
                self.engine.submit(key=(request.key, first), n=n, seeds=seeds, **request.settings)
            except ValueError as error:
                request.listener.send(Failure(str(error), 400))
                self._cancel(request.key)
                continue
            request.started, request.slices[first] = first + n, n
            self.running[request.client] += n
            if request.started == request.n:
                self.waiting.remove(request)

    def _submit(self, request):
        self.requests[request.key] = request
        self.waiting.append(request)

    def _cancel(self, key):
        request = self.requests.pop(key, None)
        if request is None:  # it has ended, or was lost to a step that failed
            return
        for first in request.slices:
            self.engine.cancel((key, first))
        self._leave(request, request.started - len(request.ended))
        if request in self.waiting:
            self.waiting.remove(request)

    def _leave(self, request, n):
        self.running[request.client] -= n
        if not self.running[request.client]:
            del self.running[request.client]  # clients come and go

    def _finish(self, key, index):
        if key in self.requests:
            self.engine.finish(*self.requests[key].place_of(index))

    def fail_all(self, message):
        for request in self.requests.values():
            request.listener.send(Failure(message, 500))
        self.requests.clear()
        self.waiting.clear()
        self.running.clear()

    def deliver(self):
        for sample in self.engine.collect(errors=True):
            key, first = sample.key
            request, index = self.requests[key], first + sample.index
            request.listener.send(replace(sample, key=key, index=index))
            request.ended.add(index)
            self._leave(request, 1)
            if len(request.ended) == request.n:
                del self.requests[key]
        for request in self.requests.values():
            if request.watches:
                for index in set(range(request.started)) - request.ended:
                    if ids := self.engine.partial(*request.place_of(index)):
                        request.listener.send(Partial(index, ids))
