"""Standard output and standard error of a command: no state of them makes a command fail.

- A closed descriptor (`2>&-`) is opened on /dev/null, so that no socket gets its number.
- A character that the encoding lacks is printed as `?`.
- After a failed write (closed pipe, full disk) all further output goes to /dev/null; `Output.error` has the reason.
- Names of files are UTF-8. Under a locale with another encoding, the command starts again in Python's UTF-8 mode.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any

PATH_CHARS_MAX = 4096  # of a path in a line: the bound of the kernel, so that what is printed can be copied


class Output:
    """A text stream that keeps the error of a failed write instead of raising it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes, or drops the text after an error."""
        if self.error is None:
            try:
                self._stream.write(text)
            except OSError as error:
                self._fail(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Writes each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flushes, unless a write has failed."""
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.error = error
        # The stream keeps what it could not write, and Python flushes it at exit.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded() -> Iterator[Output]:
    """Replaces `sys.stdout` and `sys.stderr` while the block runs; yields the standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    before = sys.stdout, sys.stderr
    for stream in before:
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    with open(os.devnull, "w", encoding="utf-8") as null:
        output, errors = Output(before[0] or null), Output(before[1] or null)
        sys.stdout, sys.stderr = output, errors
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
            sys.stdout, sys.stderr = before


def ended() -> bool:
    """Whether standard output has failed: a command that prints for ever stops."""
    return getattr(sys.stdout, "error", None) is not None


def complaint(output: Output) -> str | None:
    """What the user must know of a failed write; None if all was written or the reader closed the pipe."""
    if output.error is None or output.error.errno == errno.EPIPE:
        return None
    return f"standard output: {output.error.strerror}; not everything was printed"


def ensure_utf8_names() -> None:
    """Starts this command again in UTF-8 mode if names of files have another encoding: `naïve.txt` may have none."""
    if codecs.lookup(sys.getfilesystemencoding()).name == "utf-8" or not sys.executable:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:replace")
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 - no shell
