"""Text from peers, files and traces, made fit for a terminal, a log or an error.

A control character moves the cursor or sets the terminal's title; a bidirectional character reorders the line; a text
without a bound fills a log. `clean` replaces the first two and cuts the third.
"""

from __future__ import annotations

CHARS_MAX = 300  # of a value in a line
LINE_CHARS_MAX = 1000  # of an error or a line of the log
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CUT = " … "


def clean(text: object, *, chars_max: int = CHARS_MAX) -> str:
    """`text` on one line of at most `chars_max` characters; a longer text loses its middle.

    A character that Unicode does not call printable (control, format, surrogate, private use) is replaced.
    """
    line = str(text)
    if len(line) > chars_max:
        tail = (chars_max - len(_CUT)) // 3
        line = line[: chars_max - len(_CUT) - tail] + _CUT + line[len(line) - tail :]
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else _REPLACEMENT for c in line)
