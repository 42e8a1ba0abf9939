"""File-system access below one directory, with paths that other hosts chose.

Paths in a manifest come from other hosts, and the output directory may be shared with other users. So no path goes to
the kernel whole: `ConfinedDirectory` opens it component by component, each relative to the directory before it, and
refuses symbolic links. A rename by another user between check and use therefore cannot redirect a write.

Must not know: manifests, chunks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from swarm.errors import StoreConflict, StoreFull
from swarm.store.file_errors import IN_THE_WAY


class ConfinedDirectory:
    """An open directory; paths inside it are resolved without following symbolic links. `path` is for messages.

    Paths are relative, with `/`. Methods raise StoreConflict for a link or file in place of a directory, and OSError.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def open(cls, path: Path) -> Self:
        """Opens `path` through links: the user chose this name."""
        return cls(path, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self.fd)

    def enter(self, path: str, *, make: bool = False) -> ConfinedDirectory:
        """Opens the directory at `path`, '' for this one; the caller closes it. `make` creates missing directories."""
        here = ConfinedDirectory(self.path, os.dup(self.fd))
        for name in path.split("/") if path else ():
            with contextlib.closing(here):
                here = here._child(name, make=make)
        return here

    def make(self, name: str) -> bool:
        """Makes a subdirectory; False if the name is taken."""
        try:
            os.mkdir(name, dir_fd=self.fd)
        except FileExistsError:
            return False
        return True

    def lstat(self, path: str) -> os.stat_result | None:
        """Status of the entry at `path`, links not followed; None if there is none."""
        try:
            with self._parent(path) as (parent, name):
                return os.stat(name, dir_fd=parent.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def open_file(self, path: str, flags: int, *, make_parents: bool = False) -> int:
        """Opens the regular file at `path` and returns its descriptor. Raises StoreConflict for any other entry."""
        with self._parent(path, make=make_parents) as (parent, name):
            # O_NONBLOCK: opening a pipe would wait for its other end.
            flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            try:
                fd = os.open(name, flags, 0o666, dir_fd=parent.fd)
            except OSError as error:
                if error.errno in IN_THE_WAY | {errno.ENXIO}:
                    raise StoreConflict(self.path / path, "is not a regular file; move it away") from error
                raise
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise StoreConflict(self.path / path, "is not a regular file; move it away")
        return fd

    def move(self, path: str, target: ConfinedDirectory) -> None:
        """Moves a file to the same path in `target`, making directories. Raises FileExistsError, never overwrites."""
        with self._parent(path) as (source, name), target._parent(path, make=True) as (goal, _):
            try:
                # A rename would replace an existing file; a hard link fails instead.
                os.link(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd, follow_symlinks=False)
            except FileExistsError:
                raise
            except OSError:
                # No hard links on this file system. Microseconds remain between the check and the rename.
                if target.lstat(path) is not None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
                os.rename(name, name, src_dir_fd=source.fd, dst_dir_fd=goal.fd)
            else:
                os.unlink(name, dir_fd=source.fd)

    def unlink(self, path: str) -> None:
        """Removes a file if it exists."""
        with contextlib.suppress(FileNotFoundError), self._parent(path) as (parent, name):
            os.unlink(name, dir_fd=parent.fd)

    def remove_tree(self, name: str) -> None:
        """Removes a subdirectory with its contents, as far as possible: NFS keeps files that are open."""
        shutil.rmtree(name, dir_fd=self.fd, ignore_errors=True)  # with dir_fd it follows no links

    def remove_if_empty(self, name: str) -> None:
        """Removes a subdirectory if it is empty and can be removed."""
        with contextlib.suppress(OSError):
            os.rmdir(name, dir_fd=self.fd)

    def demand_room(self, need_bytes: int, need_inodes: int) -> None:
        """Raises StoreFull if fewer bytes or inodes are free, as far as the file system reports them."""
        room = os.statvfs(self.fd)
        free_bytes = room.f_bavail * room.f_frsize
        if room.f_blocks and need_bytes > free_bytes:
            raise StoreFull(self.path, need_bytes=need_bytes, free_bytes=free_bytes)
        if room.f_files and need_inodes > room.f_favail:
            why = f"{need_inodes} new files and directories are needed and {room.f_favail} inodes are free"
            raise StoreFull(self.path, need_bytes=need_bytes, free_bytes=free_bytes, why=why)

    @contextlib.contextmanager
    def _parent(self, path: str, *, make: bool = False) -> Iterator[tuple[ConfinedDirectory, str]]:
        directory, _, name = path.rpartition("/")
        with contextlib.closing(self.enter(directory, make=make)) as parent:
            yield parent, name

    def _child(self, name: str, *, make: bool) -> ConfinedDirectory:
        if make:
            self.make(name)
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return ConfinedDirectory(self.path / name, os.open(name, flags, dir_fd=self.fd))
        except OSError as error:
            if error.errno in IN_THE_WAY:
                raise StoreConflict(self.path / name, "is a link or no directory; move it away") from error
            raise
