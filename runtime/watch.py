"""Early ends of a run: a signal stops it after a checkpoint; a rank that dies or hangs ends it and is named."""

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

import torch
import torch.distributed as dist

from runtime.distributed import Ranks, all_max, barrier, print0
from runtime.flags import around_main

# -- a signal that asks the run to stop --------------------------------------------------------------------------------

STOPPED = 75  # exit status after a signal: saved, and the same command continues (EX_TEMPFAIL)
NOTICES = (signal.SIGTERM, signal.SIGINT)
ONE_NOTICE = 2.0  # seconds; torchrun passes on a signal that its workers have also received


class _Stop:
    requested = False  # on this rank
    agreed = False  # on all ranks


@contextlib.contextmanager
def stop_on_signal() -> Iterator[None]:
    """SIGTERM and SIGINT set a flag, which all ranks read at the same point (`should_stop`). A second signal exits at
    once. A thread reads the signals, since the main thread may be in a collective that never returns.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen():
        first = None
        while number := os.read(reader, 1):
            if number[0] not in NOTICES:  # belongs to another handler
                continue
            if first is None:
                first = time.monotonic()
                _Stop.requested = True
                name = signal.Signals(number[0]).name
                print(f"{name}: the run ends with this step, saved; again: at once", file=sys.stderr, flush=True)
            elif time.monotonic() - first > ONE_NOTICE:
                os._exit(128 + number[0])
        os.close(reader)

    _Stop.requested = _Stop.agreed = False
    before = {number: signal.signal(number, lambda *_: None) for number in NOTICES}
    previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(writer)


def should_stop(ranks: Ranks) -> bool:
    """Whether a signal has asked any rank to stop. All ranks call it and get the same answer."""
    _Stop.agreed = all_max(ranks, float(_Stop.requested)) > 0
    return _Stop.agreed


def end_if_stopped(step: int) -> None:
    """Exits with status STOPPED if `should_stop` was true. Called after the checkpoint of a step."""
    if _Stop.agreed:
        print0(f"stopped after step {step}, which is saved; the same command continues")
        sys.exit(STOPPED)


# -- a rank that dies or hangs -----------------------------------------------------------------------------------------

RANK_LOST = 70  # exit status of a job that was ended because of one rank (EX_SOFTWARE)
SILENCE = 60  # seconds without a sign of life (or the time-out of an update, where that is shorter)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class _State:
    """Where this rank is in the run. All ranks go through the same phases, so the rank with the smallest `count` is
    behind."""

    phase = "start"
    count = 0
    since = 0.0
    watch: "Watch | None" = None


def set_phase(phase: str, step: int | None = None) -> str:
    """Announces the phase that begins on this rank. Its time-out is that of its first word: start | rollout | update |
    score (as update) | anything else (as rollout). Returns its description, such as "update of step 3".
    """
    text = phase if step is None else f"{phase} of step {step}"
    _State.phase = text
    _State.count += 1
    _State.since = time.monotonic()
    return text


class Watch:
    """A thread that reports this rank's phase, since when, and whether it only waits, through the group's store.

    Ranks 0 and 1 read the reports. They end the job on every rank when they find
    - a rank that is gone or has been silent for SILENCE seconds (killed, stopped, or its host is down);
    - a rank that exceeds the time-out of its phase, and is behind the others or computes while they wait for it.
    """

    def __init__(self, ranks: Ranks, timeouts: tuple[int, int, int]):
        self.rank = ranks.rank
        self.world_size = ranks.world_size
        self.device = ranks.device
        self.limits = dict(zip(("start", "rollout", "update"), timeouts))
        self.limits["score"] = self.limits["update"]
        self.silence = min(SILENCE, self.limits["update"])
        # a client of its own, so that no other call holds it up; torch's stubs lack the method
        self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.beat = 0
        self.ended = threading.Event()
        self.seen: dict[int, tuple[int, float]] = {}
        _State.since = time.monotonic()
        self.main = threading.get_ident()
        self.tell()
        barrier(ranks)
        self.keeper = "torchrun"  # of the store
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            self.first = json.loads(self.store.get("rank/0"))
            self.keeper = _who(0, self.first)
        threading.Thread(target=self.run, daemon=True).start()

    def tell(self):
        self.beat += 1
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[self.main])]  # innermost first
        at = next(filter(None, map(_line_of_ours, frames)), "?")
        waits = "/torch/distributed/" in frames[0].f_code.co_filename
        state = dict(beat=self.beat, pid=os.getpid(), host=socket.gethostname(), phase=_State.phase, at=at, waits=waits)
        state |= dict(count=_State.count, seconds=time.monotonic() - _State.since)
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
            if self.device.type == "cuda":
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


def watch_ranks(ranks: Ranks, timeouts: tuple[int, int, int]) -> None:
    """Starts the watch: from now on a rank that dies or exceeds a time-out ends the job, named with its phase and line.

    timeouts: seconds of a start, a rollout and an update.
    """
    if ranks.world_size > 1:
        _State.watch = Watch(ranks, timeouts)
        around_main.enter_context(report_failures())
