"""Progress of a long task: a bar on a terminal, lines in a log file."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

LINE_EVERY = 30  # seconds


@contextlib.contextmanager
def counting(
    total: int, what: str, quiet: bool = False, figures: Callable[[], str] = str
) -> Iterator[Callable[[], None]]:
    """Yields done(), to be called for each of `total` items. Shows a bar on a terminal; a log file gets a line now and
    then and at the end. figures() returns text that the bar or line ends with.
    """
    if quiet or sys.stderr.isatty():
        with tqdm(total=total, desc=what, disable=quiet) as bar:

            def advance():
                bar.set_postfix_str(figures(), refresh=False)
                bar.update()

            yield advance
        return
    count = 0
    started = time.monotonic()
    last_line = started

    def done():
        nonlocal count, last_line
        count += 1
        now = time.monotonic()
        if count == total or now - last_line > LINE_EVERY:
            last_line = now
            left = (now - started) / count * (total - count)
            parts = [f"{what}: {count} of {total}", figures(), f"{left:.0f} s left" if left else ""]
            print(", ".join(filter(None, parts)), file=sys.stderr, flush=True)

    yield done
