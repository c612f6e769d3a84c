"""The command line of a script: errors that a user can mend."""

import contextlib
import os
import sys


@contextlib.contextmanager
def user_errors():
    """What a user can mend (a flag, a file, a row) ends in one line and exit status 2, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        print(f"error: {error}\n(TRACEBACK=1 shows where)", file=sys.stderr)
        sys.exit(2)
