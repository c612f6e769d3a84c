"""The thread that runs the engine for serve.py and shares it fairly among clients.

The samples of a request join the engine's batch as slots become free and leave when they are done, so concurrent
requests are computed together. The next slot goes to the client with the fewest running samples, then to its request
with the fewest started ones, then to the oldest: 300 requests of 128 samples hold up nobody else's single one.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from engine import Engine, Sample
from engine.scheduler import SAMPLES_AT_ONCE


@dataclass
class Progress:
    """Event: the ids of a sample so far."""

    index: int
    ids: list[int]


@dataclass
class RequestFailed:
    """Event: the request ends without an answer."""

    message: str
    status: int  # of HTTP
    index: int = -1


Event = Progress | Sample | RequestFailed


class ServerBusy(Exception):
    """No more requests are accepted for now; the message names the limit."""


class Listener:
    """Receives the events of one request on the event loop of its connection.

    It keeps only the newest event of each sample, so a client that does not read does not fill the memory.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.arrived = asyncio.Event()
        self.events: dict[int, Event] = {}  # by the sample's index

    def send(self, event: Event) -> None:
        """Can be called from any thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server is shutting down
            self.loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Event) -> None:
        self.events[event.index] = event
        self.arrived.set()

    async def get(self) -> Event:
        while not self.events:
            self.arrived.clear()
            await self.arrived.wait()
        return self.events.pop(next(iter(self.events)))


@dataclass(eq=False)
class ServedRequest:
    """n samples of one prompt. They enter the engine in slices, each under (key, index of its first sample)."""

    key: int
    client: str  # whose share of the engine it uses
    listener: Listener
    wants_progress: bool
    seeds: list[int]  # one for each sample
    settings: dict[str, Any]  # other arguments of Engine.submit
    started: int = 0  # samples that have entered the engine
    slices: list[int] = field(default_factory=list)  # index of the first sample of each
    ended: set[int] = field(default_factory=set)

    @property
    def n(self) -> int:
        return len(self.seeds)

    def engine_index(self, index: int) -> tuple[tuple[int, int], int]:
        """Returns the engine's key and index of a started sample."""
        first = max(first for first in self.slices if first <= index)
        return (self.key, first), index - first


class EngineThread:
    """Owns the engine. Other threads put functions into `inbox`, which this thread calls between steps.

    max_samples, max_tokens: limits of all requests that were submitted and not released.
    """

    def __init__(self, engine: Engine, max_samples: int, max_tokens: int):
        self.engine = engine
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.ended = False
        # on the event loop
        self.keys = itertools.count()
        self.max_samples = max_samples
        self.max_tokens = max_tokens
        self.held: dict[int, tuple[int, int]] = {}  # samples and tokens of each request that is not released
        self.samples = 0  # sums of `held`
        self.tokens = 0
        # in the thread
        self.requests: dict[int, ServedRequest] = {}
        self.waiting: list[ServedRequest] = []  # those with samples that have not entered the engine
        self.running: Counter[str] = Counter()  # samples in the engine, by client
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    # -- called on the event loop ----------------------------------------------------------------------------------

    def submit(
        self, client: str, wants_progress: bool, seeds: list[int], tokens: int, **settings: Any
    ) -> tuple[int, Listener]:
        """Returns (key, listener). The caller releases the key however the request ends.

        tokens: what the request counts for. settings: arguments of `Engine.submit`.
        ServerBusy: a limit is reached. ValueError: the request alone exceeds it.
        """
        self._check_limit("samples", self.samples, len(seeds), self.max_samples)
        self._check_limit("tokens", self.tokens, tokens, self.max_tokens)
        key = next(self.keys)
        self.held[key] = len(seeds), tokens
        self.samples += len(seeds)
        self.tokens += tokens
        request = ServedRequest(key, client, Listener(), wants_progress, seeds, settings)
        self.inbox.put(partial(self._submit, request))
        if self.ended:
            request.listener.send(RequestFailed("the engine has ended", 500))
        return key, request.listener

    def _check_limit(self, name: str, held: int, more: int, limit: int) -> None:
        if more > limit:
            raise ValueError(f"a request of {more} {name}; this server holds {limit} of all requests together")
        if held + more > limit:
            raise ServerBusy(f"{held} {name} are waiting or running; {more} more would be over the limit of {limit}")

    def release(self, key: int) -> None:
        """The request has been answered, or nobody waits for it any more. Can be called twice."""
        if key in self.held:
            samples, tokens = self.held.pop(key)
            self.samples -= samples
            self.tokens -= tokens
            self.inbox.put(partial(self._cancel, key))

    def finish(self, key: int, index: int) -> None:
        """Ends a sample with what it has, because its stop string has come."""
        self.inbox.put(partial(self._finish, key, index))

    # -- called in the thread --------------------------------------------------------------------------------------

    def run(self) -> None:
        try:
            while True:
                try:
                    self.empty_inbox(wait=not self.engine.busy and not self.waiting)
                    self.feed()
                    self.engine.step()
                    self.deliver()
                except Exception as error:  # the running requests are lost, the server goes on
                    traceback.print_exc()
                    self.fail_all(f"generation failed: {type(error).__name__}: {error}")
                    self.engine.reset()  # the failed step may have left anything in the cache
        finally:  # not even the reset works, for example because the GPU has failed
            self.ended = True
            while not self.inbox.empty():  # later requests see that it has ended
                with contextlib.suppress(Exception):
                    self.inbox.get()()
            self.fail_all("the engine has ended")

    def empty_inbox(self, wait: bool) -> None:
        """Calls what has arrived. wait: until there is something."""
        if wait:
            self.inbox.get()()
        while not self.inbox.empty():
            self.inbox.get()()

    def feed(self) -> None:
        """Gives the engine as many samples as it has slots."""
        while self.waiting:
            free_slots = self.engine.max_batch - self.running.total()
            if free_slots <= 0:
                return
            request = min(self.waiting, key=lambda r: (self.running[r.client], r.started, r.key))
            first = request.started
            n = min(SAMPLES_AT_ONCE, free_slots, request.n - first)
            seeds = request.seeds[first : first + n]
            try:
                self.engine.submit(key=(request.key, first), n=n, seeds=seeds, **request.settings)
            except ValueError as error:
                request.listener.send(RequestFailed(str(error), 400))
                self._cancel(request.key)
                continue
            request.started += n
            request.slices.append(first)
            self.running[request.client] += n
            if request.started == request.n:
                self.waiting.remove(request)

    def _submit(self, request: ServedRequest) -> None:
        self.requests[request.key] = request
        self.waiting.append(request)

    def _cancel(self, key: int) -> None:
        request = self.requests.pop(key, None)
        if request is None:  # it has ended, or a failed step has lost it
            return
        for first in request.slices:
            self.engine.cancel((key, first))
        self._count_ended(request, request.started - len(request.ended))
        if request in self.waiting:
            self.waiting.remove(request)

    def _count_ended(self, request: ServedRequest, n: int) -> None:
        self.running[request.client] -= n
        if not self.running[request.client]:
            del self.running[request.client]  # clients come and go

    def _finish(self, key: int, index: int) -> None:
        if key in self.requests:
            self.engine.finish(*self.requests[key].engine_index(index))

    def fail_all(self, message: str) -> None:
        for request in self.requests.values():
            request.listener.send(RequestFailed(message, 500))
        self.requests.clear()
        self.waiting.clear()
        self.running.clear()

    def deliver(self) -> None:
        """Sends what the last step has brought to the listeners."""
        for sample in self.engine.collect(errors=True):
            key, first = sample.key
            request = self.requests[key]
            index = first + sample.index
            request.listener.send(replace(sample, key=key, index=index))
            request.ended.add(index)
            self._count_ended(request, 1)
            if len(request.ended) == request.n:
                del self.requests[key]
        if self.engine.steps_since_poll:  # on a GPU each look at a slot waits for all steps so far
            return
        for request in self.requests.values():
            if request.wants_progress:
                for index in set(range(request.started)) - request.ended:
                    ids = self.engine.partial(*request.engine_index(index))
                    if ids:
                        request.listener.send(Progress(index, ids))
