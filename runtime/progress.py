"""What a terminal shows: the progress of a long task, text of others without its control characters."""

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator

from tqdm import tqdm

LINE_EVERY = 30  # seconds
# all but tab and line feed, and the characters that turn the direction of text
CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """Text of a model or a server with its control characters escaped. A terminal would obey them: set its title, fill
    the clipboard, overwrite what was printed."""
    return CONTROL_CHARACTER.sub(lambda match: repr(match[0])[1:-1], text)


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
