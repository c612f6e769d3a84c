"""A signal stops a run after a checkpoint."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

from runtime.distributed import Ranks, all_max, print0
from runtime.watch import STOPPED

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
