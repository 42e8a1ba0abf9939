"""What identifies a file and its version, so that a change is noticed without reading the content.

Must not know: stores, paths that a manifest names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from swarm.errors import SourceChanged


@dataclass(frozen=True, slots=True)
class Stamp:
    """Identity and version of a file: size in bytes, inode, times of modification and of change in nanoseconds.

    A program sets the modification time as it likes; the time of change is the kernel's own. A new name of the file (a
    hard link) moves the time of change too, so a check while a file is served leaves it out.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The stamp in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)

    @classmethod
    def at(cls, path: Path) -> Self:
        """The stamp of the file at `path`, through links. Raises SourceChanged if it cannot be read."""
        try:
            return cls.of(os.stat(path))
        except FileNotFoundError as error:
            raise SourceChanged(path, "it is gone") from error
        except OSError as error:
            raise SourceChanged(path, f"its status cannot be read: {error.strerror}") from error

    def check(self, path: Path, fd: int) -> None:
        """Raises SourceChanged unless both the file named `path` and the open file `fd` have this stamp.

        The name is checked because a directory with a replaced file is another model, `fd` because it is read.
        """
        self.demand(path, Stamp.at(path))
        self.check_open(path, fd)

    def check_open(self, path: Path, fd: int) -> None:
        """Raises SourceChanged for `path` unless the open file `fd`, which may have been moved, has this stamp."""
        self.demand(path, Stamp.of(os.fstat(fd)))

    def demand(self, path: Path, found: Stamp) -> None:
        """Raises SourceChanged for `path` unless the found stamp is this one; the time of change may differ."""
        if found.inode != self.inode:
            raise SourceChanged(path, "another file took its place")
        if found.size != self.size:
            raise SourceChanged(path, f"{self.size} bytes became {found.size}")
        if found.mtime_ns != self.mtime_ns:
            raise SourceChanged(path, "it was written to")
