"""A plot of a simulated burst: completion times, the progress of each newcomer, and the upload of the seeds.

Needs matplotlib, which the extra `swarm-weights[plot]` installs.

Must not know: how a burst is simulated; it observes the events and actions of the machines.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from swarm.errors import SettingsError
from swarm.simulation.crowd import Asked
from swarm.simulation.report import BurstReport
from swarm.transfer import download_events

INCHES = (15.0, 4.5)


class ChunkHistory:
    """For each newcomer the times of its request and of its verified chunks, and the arrivals of chunks from seeds."""

    def __init__(self) -> None:
        self.verified_at_s: defaultdict[str, list[float]] = defaultdict(list)  # preceded by the time of the request
        self.given_at_s: list[float] = []
        self._verified: defaultdict[str, set[int]] = defaultdict(set)

    def note(self, at_s: float, node: str, what: object) -> None:
        """Takes in an event or action."""
        match what:
            case Asked():
                self.verified_at_s[node].append(at_s)
            case download_events.ChunksVerified(source, _, chunks):
                fresh = set(chunks) - self._verified[node]
                self._verified[node] |= fresh
                self.verified_at_s[node] += [at_s] * len(fresh)
                if source.startswith("seed-"):
                    self.given_at_s += [at_s] * len(chunks)
            case download_events.ChunkCorrupt(source) if source.startswith("seed-"):
                self.given_at_s.append(at_s)


class BurstPlot:
    """A plot for the file `path`. Raises SettingsError without matplotlib, and for a format that it cannot write."""

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

    def draw(self, report: BurstReport, history: ChunkHistory, path: Path) -> None:
        """Writes the plot to `path`. Raises OSError."""
        burst = report.burst
        completion, progress, upload = self._figure.subplots(1, 3)

        lived_s, star_s = report.lived_s, report.star_s
        completion.step([0.0, *lived_s], _parts(lived_s), where="post", label="swarm")
        completion.step([0.0, *star_s], _parts(star_s), where="post", color="tab:gray", label="star")
        completion.axvline(burst.bound_s, linestyle="--", color="tab:green", label="lower bound")
        completion.set_xscale("log")
        completion.set_xlim(left=burst.copy_s / 4)
        completion.set(title="newcomers done", xlabel="s from the request", ylabel="part of all")
        completion.legend()

        for at_s in history.verified_at_s.values():
            progress.plot(at_s, [number / burst.chunks for number in range(len(at_s))], linewidth=0.7, alpha=0.6)
        progress.set(title="progress of each newcomer", xlabel="s", ylabel="part of the model")

        given = [number / burst.chunks for number in range(1, len(history.given_at_s) + 1)]
        upload.plot(history.given_at_s, given)
        upload.axhline(1.0, linestyle="--", color="tab:green")
        upload.set(title="upload of the seeds", xlabel="s", ylabel="copies of the model")

        for axes in (completion, progress, upload):
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        self._figure.suptitle(burst.command)
        self._figure.savefig(path, format=self._kind)


def _parts(times_s: Sequence[float]) -> list[float]:
    return [number / max(1, len(times_s)) for number in range(len(times_s) + 1)]
