"""Text of peers for people: bounded, printable, on one line."""

from __future__ import annotations

import io
import logging

import pytest

from swarm.errors import CHARS_MAX, LINE_CHARS_MAX, ManifestInvalid, PeerUnreachable, clean


def test_plain_text_is_unchanged() -> None:
    for text in ("org/model", "naïve 文", "", "a b"):
        assert clean(text) == text


def test_control_and_bidirectional_characters_are_replaced() -> None:
    for character in "\x1b\x07\n\r\t\x00\x7f\x9b\u202e\u2066\u200f\ufeff\udcff\u2028":
        assert clean(f"a{character}b") == "a\N{REPLACEMENT CHARACTER}b"


def test_a_long_text_keeps_its_ends() -> None:
    for size in (CHARS_MAX, CHARS_MAX + 1, 1_000_000):
        text = clean("begin" + "x" * (size - 8) + "end")
        assert len(text) <= CHARS_MAX
        assert text.startswith("begin")
        assert text.endswith("end")
    assert len(clean("x" * 1000, chars_max=50)) == 50


def test_an_error_with_text_of_a_peer_is_one_bounded_line() -> None:
    for error in (ManifestInvalid("a\nb", "\x1b" * 10**6), PeerUnreachable("\u202e", "n" * 10**6)):
        text = str(error)
        assert text.isprintable()
        assert len(text) <= LINE_CHARS_MAX


@pytest.mark.parametrize("name", ["swarm", "swarm.http"])
def test_is_a_line_of_the_log_clean_for_any_handler(name: str) -> None:
    """Programs that use the API have handlers of their own, which write names that peers chose to terminals."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        logger.warning("%s left %d: %s", "\x1b]0;owned\x07", 3, PeerUnreachable("\u202e", "n" * 10**6))
        try:
            raise ValueError("\x1b[2J" * 1000)
        except ValueError:
            logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() and len(line) <= LINE_CHARS_MAX for line in lines)
    assert lines[0].startswith("\N{REPLACEMENT CHARACTER}]0;owned")
    assert " left 3: " in lines[0]
    assert "Traceback" in "".join(lines)
