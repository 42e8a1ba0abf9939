"""Installs swarm's hooks in an engine, each by itself, as far as this version of the engine has a place for it.

An engine calls its plugins whether or not it loads by swarm. A missing or moved function costs its feature and a log
line, and never the engine's start.

Must not know: engines.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable

log = logging.getLogger("swarm")


class EngineHooks:
    """The hooks in the engine `name` (for people), imported from `package`; each is installed once a process."""

    def __init__(self, name: str, package: str) -> None:
        self._name = name
        self._package = package
        self._installed: dict[str, bool] = {}

    def install(self, feature: str, put: Callable[[], object]) -> bool:
        """Whether the engine has the feature. The first call installs it by `put`; a failure is logged once."""
        if feature not in self._installed:
            try:
                put()
            except Exception as error:  # an engine of another version may raise anything
                log.warning(
                    "%s %s goes without %s: %s (%s); docs/engines.md says which versions have all",
                    self._name, self._version(), feature, error, type(error).__name__,
                )  # fmt: skip
                self._installed[feature] = False
            else:
                self._installed[feature] = True
        return self._installed[feature]

    def _version(self) -> str:
        try:
            return str(importlib.import_module(self._package).__version__)
        except Exception:  # a package that cannot be imported has no version
            return "of an unknown version"
