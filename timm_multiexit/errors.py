"""Errors in what the user gave: a message names it and says what to do. Commands print it as one line."""
import io
import signal
import sys
from typing import Callable, List, Optional, Sequence

HINT = '--traceback shows where an unexpected error arose'


class InputError(Exception):
    """Something the user gave cannot be used. The command line prints the message and exits with code 2.

    Not a ValueError: handlers of library errors must not catch it.
    """


class MissingFileError(InputError):
    """A folder or a repository lacks this file; a repository that cannot be reached is a plain `InputError`."""


class UnreachableError(InputError):
    """A file cannot be opened now, through no fault of its content."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def run_command(
        name: str,
        run: Callable[[List[str]], Optional[int]],
        argv: Optional[Sequence[str]] = None,
        bad_input: int = 2,
) -> int:
    """Runs a command; its errors become one line, unless `--traceback` is among the arguments.

    Args:
        name: Name of the command, for messages.
        run: Takes the other arguments; returns a status, None for 0.
        argv: Arguments; None for those of the command line.
        bad_input: Status for an `InputError`.

    Returns:
        The exit status: 0, `bad_input`, 1 for an unexpected error, 128 + the number of the signal that ended it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack letters of class names
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        return run([arg for arg in argv if arg != '--traceback']) or 0
    except InputError as error:
        print(f'{name}: error: {error}', file=sys.stderr)
        return bad_input
    except KeyboardInterrupt as interrupt:
        number, *message = interrupt.args or (signal.SIGINT,)
        print(*(message or ['interrupted']), file=sys.stderr)
        return 128 + number
    except BrokenPipeError:  # the reader (head, less) closed the pipe
        sys.stderr.close()
        return 0
    except Exception as error:
        if '--traceback' in argv:
            raise
        reason = (str(error).strip().splitlines() or ['no message'])[0][:300]
        print(f'{name}: error: {type(error).__name__}: {reason} ({HINT})', file=sys.stderr)
        return 1
