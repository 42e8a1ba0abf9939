"""Puts swarm into an engine piece by piece, as far as this version of the engine takes it.

An engine calls its plugins whether or not it loads by swarm. So what a version lacks, or has elsewhere, costs one
feature and a line of the log, and never the engine's start.

Must not know: engines.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

log = logging.getLogger("swarm")


class Plug:
    """What is put into the engine whose package is `package`, once in each process. `name` is for people."""

    def __init__(self, name: str, package: str) -> None:
        self._name = name
        self._package = package
        self._placed: dict[str, bool] = {}

    def place(self, feature: str, put: Callable[[], object]) -> bool:
        """Whether the engine has the feature. The first call puts it there; one that fails is logged, and only once."""
        if feature not in self._placed:
            try:
                put()
            except Exception as error:  # an engine of another version may raise anything
                log.warning(
                    "%s %s goes without %s: %s (%s); docs/engines.md says which versions have all",
                    self._name, self._version(), feature, error, type(error).__name__,
                )  # fmt: skip
                self._placed[feature] = False
            else:
                self._placed[feature] = True
        return self._placed[feature]

    def _version(self) -> str:
        try:
            return str(importlib.import_module(self._package).__version__)
        except Exception:  # what cannot be imported has no version
            return "of an unknown version"
