"""A folder that appears complete or not at all.

Everything is written into a hidden folder beside the target, flushed to disk, and renamed. A target that is a mount
point (a volume of a container), or the current directory, or whose parent is not writable, cannot be renamed: then the
hidden folder is inside the target, and its files are moved, the manifest last, and moved back if that fails. What a
killed export had moved aside is put back by the next one.

Only a bundle is ever replaced, and only files that its manifest names: a folder with anything else in it is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.bundle import MANIFEST_FILE, BundleError, owned_files
from deploy.export.errors import ExportError
from deploy.export.signals import deferred_signals

__all__ = ["Staging", "check_target"]

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_MARK = ".torch-ext-export-"
_PREVIOUS = ".torch-ext-previous-"


def _places_in_use() -> list[Path]:
    """Folders that somebody stands in: they keep their identity. Links are resolved."""
    places: list[Path] = []
    for place in (Path.home, Path.cwd):
        # A user without an entry and HOME has no home, and the current directory can be deleted.
        with contextlib.suppress(RuntimeError, OSError):
            places.append(place())
    return [Path(os.path.realpath(path)) for path in places]


def _in_place(target: Path) -> bool:
    """Whether files have to be moved into `target`, because the folder itself cannot be replaced."""
    return target.is_dir() and (
        os.path.ismount(target) or target in _places_in_use() or not os.access(target.parent, os.W_OK | os.X_OK)
    )


def _is_hidden(path: Path, prefix: str) -> bool:
    """Whether a folder is named by `Staging`: prefix and 12 random digits."""
    return re.fullmatch(re.escape(prefix) + "[0-9a-f]{12}", path.name) is not None


def _hidden(home: Path, prefix: str) -> list[Path]:
    """Folders that `Staging` named; none where `home` cannot be listed."""
    try:
        return sorted(path for path in home.iterdir() if _is_hidden(path, prefix))
    except OSError:
        return []


def _contents(target: Path) -> list[Path]:
    """What a folder holds, apart from what exports left and what file systems put there."""
    mounted = os.path.ismount(target)
    return sorted(
        path for path in target.iterdir() if not _is_hidden(path, _MARK) and not (mounted and path.name == "lost+found")
    )


def _listed(paths: Sequence[Path]) -> str:
    """Names for a message, three at most."""
    return ", ".join(path.name for path in paths[:3]) + ("..." if len(paths) > 3 else "")


def _check_bundle(target: Path) -> None:
    """Checks that a folder holds a bundle and nothing else.

    Raises:
        ExportError: It is not a bundle, or holds something that its manifest does not name.
    """
    contents = _contents(target)
    try:
        owned = owned_files(target)
    except BundleError as error:
        raise ExportError(
            f"-o {target}: the folder holds {_listed(contents)} and is not a bundle, and only bundles are replaced; "
            f"choose another folder, or empty this one yourself ({error})"
        ) from error
    foreign = [path for path in contents if path.name not in owned or (path.is_dir() and not path.is_symlink())]
    if foreign:
        raise ExportError(
            f"-o {target}: besides a bundle the folder holds {_listed(foreign)}, which would be lost; move that to "
            "another place, or choose another folder"
        )


def check_target(target: Path, force: bool, protected: Sequence[Path] = ()) -> Path:
    """Checks that a bundle may be written to `target`, before any work is done.

    Args:
        target: Folder to make, or to replace.
        force: Whether a bundle that is there may be replaced.
        protected: Paths that must not be inside what is replaced.

    Returns:
        `target`, absolute and with symbolic links resolved.

    Raises:
        ExportError: It is a file, or holds something that is not a bundle or must not be replaced, or a bundle without
            `force`, or is not writable.
    """
    target = Path(os.path.realpath(target.expanduser()))
    if target.is_symlink():
        raise ExportError(f"-o {target}: the symbolic link leads to itself; choose another name or remove it")
    if target.exists() and not target.is_dir():
        raise ExportError(f"-o {target}: expected a folder to write, found a file; choose another name or remove it")
    _recover(target)
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
    for path in (*_places_in_use(), *(Path(os.path.realpath(path)) for path in protected)):
        if path == target or target in path.parents:
            raise ExportError(f"-o {target}: refuses to replace a folder that holds {path}; choose another one")
    _check_bundle(target)
    if not force:
        raise ExportError(
            f"-o {target}: a bundle is there already; pass --force to replace it, or choose another folder"
        )
    return target


def _dead(home: Path, prefix: str) -> Iterator[Path]:
    """Yields hidden folders that killed exports left; the lock of one that runs is held."""
    for path in _hidden(home, prefix):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield path
        except OSError:
            continue
        finally:
            os.close(descriptor)


def _recover(target: Path) -> None:
    """Puts the old bundle back that an export was moving aside when it was killed."""
    if not target.exists():
        # Between two renames: the new folder is still hidden, and so is the old one.
        for _ in _dead(target.parent, f"{_MARK}{target.name}-"):
            for previous in _hidden(target.parent, f"{_PREVIOUS}{target.name}-"):
                if not target.exists():
                    os.rename(previous, target)
        return
    if not target.is_dir() or not os.access(target, os.W_OK | os.X_OK):
        return
    for stage in _dead(target, _MARK):
        for aside in _hidden(stage, _PREVIOUS):
            if (stage / MANIFEST_FILE).exists():  # Else its move was the last one: the new bundle is complete.
                _move_back(target, stage, aside)


def _move_back(target: Path, stage: Path, aside: Path) -> None:
    """Undoes the moves of `Staging._move_inside`: old files first went to `aside`, then new ones came from `stage`."""

    def owned(folder: Path) -> frozenset[str]:
        try:
            return owned_files(folder)
        except BundleError:
            return frozenset()

    old = owned(aside)
    for name in owned(stage):
        # An old file of that name that is not aside is still in its place.
        if not (stage / name).exists() and ((aside / name).exists() or name not in old):
            (target / name).unlink(missing_ok=True)
    for path in sorted(aside.iterdir(), key=lambda path: path.name == MANIFEST_FILE):
        os.rename(path, target / path.name)


class Staging:
    """A context in which `path` is filled; `commit` puts it in place, and leaving without it removes every trace."""

    def __init__(self, target: Path, force: bool) -> None:
        """Prepares to write.

        Args:
            target: What `check_target` returned.
            force: Whether a bundle that is there is replaced.
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
        with deferred_signals():
            shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            if not self.target.exists():
                for path in reversed(self._made):
                    with contextlib.suppress(OSError):
                        path.rmdir()

    def _remove_stale(self) -> None:
        """Removes what a killed export to the same target left, once `check_target` has put back what was moved."""
        for path in _dead(self._home, _MARK if self._inside else f"{_MARK}{self.target.name}-"):
            shutil.rmtree(path, ignore_errors=True)
        if not self._inside and self.target.exists():
            for path in _hidden(self._home, f"{_PREVIOUS}{self.target.name}-"):
                shutil.rmtree(path, ignore_errors=True)

    def free_bytes(self) -> int:
        """Free space on the file system that is written to."""
        return shutil.disk_usage(self._home).free

    def commit(self, last: str) -> None:
        """Puts the folder in place: after this the target is complete, and before it untouched.

        Args:
            last: Name of the file that makes the folder a bundle; moved last where files have to be moved.

        Raises:
            ExportError: Something appeared in the target in the meantime, and is not replaced.
            OSError: The disk is full or does not let us.
        """
        _make_durable(self.path)
        with deferred_signals():
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
                f"-o {self.target}: something else was written there during the export; choose another folder"
            )
        _check_bundle(self.target)
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
                f"-o {self.target}: something else was written there during the export; choose another folder"
            )
        if old:
            _check_bundle(self.target)
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
    allowed = _allowed_modes(folder)
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(0o666 & allowed)
            _fsync(path)
    folder.chmod(0o777 & allowed)
    _fsync(folder)


def _allowed_modes(folder: Path) -> int:
    """The permissions that the umask leaves to what is made in a folder.

    Read off a folder that is made: asking for the umask means to set it, and it belongs to all threads.
    """
    probe = folder / f"{_MARK}{secrets.token_hex(6)}"
    probe.mkdir(0o777)
    try:
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.rmdir()
