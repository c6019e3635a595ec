"""A folder that appears complete or not at all.

Everything is written into a hidden folder beside the target, flushed to disk, and renamed. A target that is a mount
point (a volume of a container), or whose parent is not writable, cannot be renamed: then the hidden folder lies inside
the target, and its files are moved, the manifest last, and moved back if that fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from deploy.export.errors import ExportError, Interrupted

__all__ = ["Staging", "check_target", "interruptible"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MARK = ".torch-ext-export-"
_PREVIOUS = ".torch-ext-previous-"


def _in_place(target: Path) -> bool:
    """Whether files have to be moved into `target`, because the folder itself cannot be replaced."""
    return target.is_dir() and (os.path.ismount(target) or not os.access(target.parent, os.W_OK | os.X_OK))


def _contents(target: Path) -> list[Path]:
    """What a folder holds, apart from what exports left and what file systems put there."""
    return [path for path in target.iterdir() if path.name != "lost+found" and not path.name.startswith(_MARK)]


def check_target(target: Path, force: bool, protected: Sequence[Path] = ()) -> Path:
    """Checks that a bundle may be written to `target`, before any work is done.

    Args:
        target: Folder to make, or to replace.
        force: Whether a folder with contents may be replaced.
        protected: Paths that must not lie in what is replaced.

    Returns:
        `target`, absolute and with symbolic links resolved.

    Raises:
        ExportError: It is a file, or holds something, or holds something that must not be replaced, or is not writable.
    """
    target = Path(os.path.realpath(target.expanduser()))
    if target.exists() and not target.is_dir():
        raise ExportError(f"-o {target}: expected a folder to write, found a file; choose another name or remove it")
    if not target.exists():
        above = target.parent
        while not above.exists():
            above = above.parent
        if not above.is_dir():
            raise ExportError(f"-o {target}: {above} is a file, not a folder; choose another name")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ExportError(f"-o {target}: no permission to write in {above}; choose another folder")
        return target
    try:
        contents = _contents(target)
    except OSError as error:
        raise ExportError(f"-o {target}: cannot be listed: {error.strerror or error}") from error
    if _in_place(target) and not os.access(target, os.W_OK | os.X_OK):
        raise ExportError(f"-o {target}: no permission to write in it; choose another folder")
    if not contents:
        return target
    if not force:
        names = ", ".join(sorted(path.name for path in contents)[:3])
        raise ExportError(
            f"-o {target}: the folder is not empty ({names}...); pass --force to replace it, or choose another"
        )
    for path in (Path.home(), Path.cwd(), *protected):
        path = Path(os.path.realpath(path))
        if path == target or target in path.parents:
            raise ExportError(f"-o {target}: refuses to replace a folder that holds {path}; choose another one")
    return target


class Staging:
    """A context in which `path` is filled; `commit` puts it in place, and leaving without it removes every trace."""

    def __init__(self, target: Path, force: bool) -> None:
        """Prepares to write.

        Args:
            target: What `check_target` returned.
            force: Whether a folder with contents is replaced.
        """
        self.target = target
        self._force = force
        self._inside = _in_place(target)
        self._home = target if self._inside else target.parent
        self._made: list[Path] = []
        self._lock: int | None = None
        self.path = self._home / f"{_MARK}{'' if self._inside else target.name + '-'}{secrets.token_hex(6)}"

    def __enter__(self) -> Staging:
        try:
            missing = [path for path in (self._home, *self._home.parents) if not path.exists()]
            for path in reversed(missing):
                path.mkdir()
                self._made.append(path)
            self._remove_stale()
            self.path.mkdir()
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            with contextlib.suppress(OSError):  # Not every network file system has locks.
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _deferred_signals():
            shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            if not self.target.exists():
                for path in reversed(self._made):
                    with contextlib.suppress(OSError):
                        path.rmdir()

    def _remove_stale(self) -> None:
        """Removes what a killed export to the same target left; the lock of one that runs is held."""
        prefix = _MARK if self._inside else f"{_MARK}{self.target.name}-"
        for path in self._home.glob(f"{prefix}*"):
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError:
                continue
            finally:
                os.close(descriptor)

    def free_bytes(self) -> int:
        """Free space on the file system that is written to."""
        return shutil.disk_usage(self._home).free

    def commit(self, last: str) -> None:
        """Puts the folder in place: after this the target is complete, and before it untouched.

        Args:
            last: Name of the file that makes the folder a bundle; moved last where files have to be moved.

        Raises:
            ExportError: Something appeared in the target in the meantime.
            OSError: The disk is full or does not let us.
        """
        _make_durable(self.path)
        with _deferred_signals():
            if self._inside:
                self._move_inside(last)
            else:
                self._replace()
            _fsync(self.target)
            _fsync(self._home)

    def _replace(self) -> None:
        try:
            os.rename(self.path, self.target)  # Also over an empty folder.
            return
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
                raise
        if not self._force:
            raise ExportError(
                f"-o {self.target}: something else was written there during the export; pass --force to replace it"
            )
        if not _exchange(self.path, self.target):
            previous = self._home / f"{_PREVIOUS}{self.target.name}-{secrets.token_hex(6)}"
            os.rename(self.target, previous)
            try:
                os.rename(self.path, self.target)
            except BaseException:
                os.rename(previous, self.target)
                raise
            shutil.rmtree(previous, ignore_errors=True)
        # After an exchange the old folder has our name, and __exit__ removes it.

    def _move_inside(self, last: str) -> None:
        old = _contents(self.target)
        if old and not self._force:
            raise ExportError(
                f"-o {self.target}: something else was written there during the export; pass --force to replace it"
            )
        aside = self.path / f"{_PREVIOUS}{secrets.token_hex(6)}"
        aside.mkdir()
        new = sorted(
            (path for path in self.path.iterdir() if path != aside), key=lambda path: (path.name == last, path.name)
        )
        moves: list[tuple[Path, Path]] = []
        try:
            for source, destination in [
                *((path, aside / path.name) for path in sorted(old, key=lambda path: path.name != last)),
                *((path, self.target / path.name) for path in new),
            ]:
                os.rename(source, destination)
                moves.append((source, destination))
        except BaseException:
            for source, destination in reversed(moves):
                os.rename(destination, source)
            raise


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two folders in one step; False where the kernel or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # Some file systems have no fsync of folders.
            raise
    finally:
        os.close(descriptor)


def _make_durable(folder: Path) -> None:
    """Flushes a folder's files to disk, and lets those read them whom the umask lets."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & ~umask)
            _fsync(path)
    folder.chmod(0o777 & ~umask)
    _fsync(folder)


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def _deferred_signals() -> Iterator[None]:
    """Signals that arrive here are delivered afterwards."""
    if not hasattr(signal, "pthread_sigmask") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turns SIGINT, SIGTERM and SIGHUP into `Interrupted`, once: what cleans up is not interrupted again.

    Outside of the main thread, where Python has no signal handlers, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    try:
        for number in _SIGNALS:
            # A signal that the caller ignores (nohup) stays ignored.
            if before[number] != signal.SIG_IGN:
                signal.signal(number, stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
