"""A picture of one simulated burst: who was done when, how far everybody was, what the seeds had sent.

Needs matplotlib, which `swarm-weights[plot]` brings along.

Must not know: how a burst is played; it listens to the events and actions of the machines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from swarm.errors import SettingsError
from swarm.simulation.crowd import Asked
from swarm.simulation.report import Report
from swarm.transfer import download_events

INCHES = (15.0, 4.5)


class History:
    """When each newcomer asked and verified its chunks, and when chunks from seeds arrived."""

    def __init__(self) -> None:
        self.verified_at_s: defaultdict[str, list[float]] = defaultdict(list)  # the first is when it asked
        self.given_at_s: list[float] = []

    def note(self, at_s: float, node: str, what: object) -> None:
        """One event or action."""
        match what:
            case Asked():
                self.verified_at_s[node].append(at_s)
            case download_events.Announce(chunks):
                self.verified_at_s[node] += [at_s] * len(chunks)
            case download_events.ChunksVerified(source, _, chunks) if source.startswith("seed-"):
                self.given_at_s += [at_s] * len(chunks)
            case download_events.ChunkCorrupt(source) if source.startswith("seed-"):
                self.given_at_s.append(at_s)


class Picture:
    """A file to draw into. Raises SettingsError when matplotlib is missing or does not know this kind of file."""

    def __init__(self, path: Path) -> None:
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise SettingsError(
                "plot", "matplotlib is not installed; it comes with: pip install 'swarm-weights[plot]'"
            ) from error
        self._figure = Figure(figsize=INCHES, layout="constrained")
        self._kind = path.suffix.removeprefix(".") or "png"
        if self._kind not in (known := self._figure.canvas.get_supported_filetypes()):
            raise SettingsError("plot", f"{path} is no picture; {', '.join(sorted(known))} can be written")

    def draw(self, report: Report, history: History, path: Path) -> None:
        """Writes the picture at `path`. Raises OSError."""
        setup = report.setup
        completion, progress, upload = self._figure.subplots(1, 3)

        lived_s, star_s = report.lived_s, report.star_s
        completion.step([0.0, *lived_s], _parts(lived_s), where="post", label="swarm")
        completion.step([0.0, *star_s], _parts(star_s), where="post", color="tab:gray", label="star")
        completion.axvline(setup.bound_s, linestyle="--", color="tab:green", label="lower bound")
        completion.set_xscale("log")
        completion.set_xlim(left=setup.copy_s / 4)
        completion.set(title="newcomers done", xlabel="s from their own request", ylabel="part of all")
        completion.legend()

        for at_s in history.verified_at_s.values():
            progress.plot(at_s, [number / setup.chunks for number in range(len(at_s))], linewidth=0.7, alpha=0.6)
        progress.set(title="what each newcomer has", xlabel="s", ylabel="part of the model")

        given = [number / setup.chunks for number in range(1, len(history.given_at_s) + 1)]
        upload.plot(history.given_at_s, given)
        upload.axhline(1.0, linestyle="--", color="tab:green")
        upload.set(title="what the seeds sent", xlabel="s", ylabel="copies of the model")

        for axes in (completion, progress, upload):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        self._figure.suptitle(setup.command)
        self._figure.savefig(path, format=self._kind)


def _parts(times_s: Sequence[float]) -> list[float]:
    return [number / max(1, len(times_s)) for number in range(len(times_s) + 1)]
