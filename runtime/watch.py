"""A rank that dies or hangs ends the job on all ranks and is named."""

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist

from runtime.flags import around_main

E = TypeVar("E", bound=Exception)
STOPPED = 75  # exit status after a signal: saved, and the same command continues (EX_TEMPFAIL)
RANK_LOST = 70  # exit status of a job that was ended because of one rank (EX_SOFTWARE)
SILENCE = 60  # seconds without a sign of life (or the time-out of an update, where that is shorter)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TORCH = os.path.dirname(torch.__file__) + os.sep
# code that computes next to nothing: who is there waits for the other ranks (on a GPU, at the end of such a function)
COMMUNICATION = (os.path.join(TORCH, "distributed") + os.sep, os.path.join(HERE, "runtime", "distributed.py"))


class _State:
    """Where this rank is in the run. All ranks go through the same phases, so the rank with the smallest `count` is
    behind."""

    phase = "start"
    count = 0
    since = 0.0
    watch: "Watch | None" = None
    shared_error: Exception | None = None


def set_phase(phase: str, step: int | None = None) -> str:
    """Announces the phase that begins on this rank, or progress in it, from which its time-out counts again. The
    time-out is that of its first word: start | rollout | update | score (as update) | anything else (as rollout).
    Returns its description, such as "update of step 3".
    """
    text = phase if step is None else f"{phase} of step {step}"
    if text != _State.phase:
        _State.count += 1
    _State.phase = text
    _State.since = time.monotonic()
    return text


def shared(error: E) -> E:
    """The error, noted as one that all ranks raise at this point: no rank is named for it."""
    _State.shared_error = error
    return error


class Watch:
    """A thread that reports this rank's phase, since when, and whether it only waits, through the job's store.

    Ranks 0 and 1 read the reports. They end the job on every rank when they find
    - a rank that is gone or has been silent for SILENCE seconds (killed, stopped, or its host is down);
    - a rank that exceeds the time-out of its phase, and is behind the others or computes while they wait for it.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeouts: tuple[int, int, int]):
        self.rank = rank
        self.world_size = world_size
        self.limits = dict(zip(("start", "rollout", "update"), timeouts))
        self.limits["score"] = self.limits["update"]
        self.silence = min(SILENCE, self.limits["update"])
        # a client of its own, so that no other call holds it up; torch's stubs lack the method
        self.store = store.clone()  # type: ignore[attr-defined]
        self.beat = 0
        self.ended = threading.Event()
        self.seen: dict[int, tuple[int, float]] = {}
        _State.since = time.monotonic()
        self.main = threading.get_ident()
        self.tell()
        self.store.wait([f"rank/{r}" for r in range(world_size)])
        self.keeper = "torchrun"  # of the store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.first = json.loads(self.store.get("rank/0"))
            self.keeper = _who(0, self.first)
        threading.Thread(target=self.run, daemon=True).start()

    def tell(self):
        self.beat += 1
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[self.main])]  # innermost first
        at = next(filter(None, map(_line_of_ours, frames)), "?")
        state = dict(beat=self.beat, pid=os.getpid(), host=socket.gethostname(), phase=_State.phase, at=at)
        state |= dict(count=_State.count, seconds=time.monotonic() - _State.since, waits=_waits(frames))
        self.store.set(f"rank/{self.rank}", json.dumps(state))

    def run(self):
        while not self.ended.wait(min(5, self.silence / 4)):
            patience = threading.Timer(
                self.silence, self.without_store, ["silent"]
            )  # no call of a store has a time-out
            patience.daemon = True
            patience.start()
            try:
                self.tell()
                found = json.loads(self.store.get("lost")) if self.store.check(["lost"]) else None
                if found is None and self.rank < 2 and (found := self.find()):
                    self.report(*found)
                    found = json.loads(self.store.get("lost"))
                state = found and json.loads(self.store.get(f"rank/{found['rank']}"))
            except dist.DistError:
                self.without_store("gone")
            patience.cancel()
            if found:
                self.leave(found["rank"], state)

    def find(self) -> tuple[int, str] | None:
        """Returns (rank, description of its fault), or None."""
        states = [json.loads(s) for s in self.store.multi_get([f"rank/{r}" for r in range(self.world_size)])]
        now = time.monotonic()
        for rank, state in enumerate(states):
            beat, since = self.seen.get(rank, (None, now))
            if beat != state["beat"]:
                self.seen[rank] = (state["beat"], now)
            elif _is_gone(state):
                return rank, f"{_who(rank, state)} is gone; it was in {_where(state)}"
            elif now - since > self.silence:
                return rank, f"{_who(rank, state)} has been silent for {now - since:.0f} s; it was in {_where(state)}"
        last = min(state["count"] for state in states)
        behind = {rank: state for rank, state in enumerate(states) if state["count"] == last}
        # if all that are behind wait, they wait for one another, and all are named
        working = {rank: state for rank, state in behind.items() if not state["waits"]} or behind
        late = {rank: state for rank, state in working.items() if state["seconds"] > self.limit(state["phase"])}
        if late:
            said = [f"{_who(r, s)} has been in {_where(s)} for {s['seconds']:.0f} s" for r, s in late.items()]
            return min(late), "; ".join(said) + ": over its time-out (--timeouts)"
        return None

    def limit(self, phase):
        return self.limits.get(phase.split()[0], self.limits["rollout"])

    def report(self, rank, message):
        """Publishes a fault. Every rank sees the first one."""
        found = json.dumps(dict(rank=rank, message=message))
        if self.store.compare_set("lost", "", found).decode() == found:
            print(f"error: {message}", file=sys.stderr, flush=True)

    def without_store(self, how):
        if not self.ended.is_set():
            message = f"error: {self.keeper}, which keeps the job's store, is {how}; rank {self.rank} ends"
            print(message, file=sys.stderr, flush=True)
            self.leave(0, self.first if self.keeper != "torchrun" else None)

    def leave(self, blamed, state):
        """Ends this process, after the blamed rank, since torchrun names the first process that ends."""
        try:
            if blamed != self.rank:
                time.sleep(1)
                if state and state["host"] == socket.gethostname() and not _is_gone(state):
                    os.kill(state["pid"], signal.SIGKILL)  # one that is stopped or hangs does not end by itself
                time.sleep(2)
            if torch.cuda.is_available():
                with open(f"nccl_trace_rank{self.rank}.pickle", "wb") as f:  # read by `torchfrtrace`
                    f.write(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]  # not in stubs
        finally:
            os._exit(RANK_LOST)


def _who(rank, state):
    return f"rank {rank} (host {state['host']}, pid {state['pid']})"


def _where(state):
    return f"{state['phase']} at {state['at']}"


def _is_gone(state):
    """Whether a process has ended. Only processes of this host can be checked."""
    if state["host"] != socket.gethostname():
        return False
    try:
        os.kill(state["pid"], 0)
        with open(f"/proc/{state['pid']}/stat") as f:  # Linux: it may have ended without being waited for
            return f.read().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except FileNotFoundError:
        return False


def _waits(frames: list[FrameType]) -> bool:
    """Whether a thread waits for other ranks: only frames of torch are inside one of COMMUNICATION. There are some,
    since a collective ends in an operator of torch (torch/_ops.py). frames: of the thread, innermost first.
    """
    for frame in frames:
        file = frame.f_code.co_filename
        if file.startswith(COMMUNICATION):
            return True
        if not file.startswith(TORCH):
            break
    return False


def _line_of_ours(frame):
    file = frame.f_code.co_filename
    if file.startswith(HERE) and "site-packages" not in file:
        return f"{os.path.relpath(file, HERE)}:{frame.f_lineno}"


# error texts of a collective when another rank has gone: this rank is not the one that failed
BROKEN = ("onnection closed", "onnection reset", "onnection refused", "roken pipe", "imed out", "NCCL", "gloo")


@contextlib.contextmanager
def report_failures() -> Iterator[None]:
    """Wraps a script's main: when it fails on one rank, all ranks name that rank instead of a broken connection."""
    try:
        yield
        _end_together()
    except SystemExit as error:
        if error.code == STOPPED:
            _end_together()
        raise
    except Exception as error:
        watch = _State.watch
        assert watch is not None
        if error is _State.shared_error:
            raise
        if isinstance(error, RuntimeError) and any(word in str(error) for word in BROKEN):
            time.sleep(watch.silence + 30)  # until the watch has found who is gone, and ends this process
        with contextlib.suppress(dist.DistNetworkError):  # the store has gone with its rank, which has said why
            watch.report(watch.rank, f"rank {watch.rank} failed in {_State.phase}: {type(error).__name__}: {error}")
        raise
    finally:
        if _State.watch:
            _State.watch.ended.set()


def _end_together():
    """Rank 0 may hold the store, so all ranks leave together."""
    set_phase("the end")
    dist.barrier()


def watch_ranks(store: dist.Store, rank: int, world_size: int, timeouts: tuple[int, int, int]) -> None:
    """Starts the watch: from now on a rank that dies or exceeds a time-out ends the job, named with its phase and line.

    store: of the job; all ranks call this. timeouts: seconds of a start, a rollout and an update. The watch ends with
    main, which has to run under `flags.run`. dist.DistError: a rank has not started its watch in the store's time-out.
    """
    _State.watch = Watch(store, rank, world_size, timeouts)
    around_main.enter_context(report_failures())
