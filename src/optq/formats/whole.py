"""A file or a folder that appears only when it is whole.

It grows in a hidden folder beside its place, ``.NAME.partial``, whose lock one living process
holds. One rename gives it its name, and never where something is that was not there at the start.
Whatever goes wrong before, the hidden folder is removed; what a killed process leaves of it, the
next one removes. Only where there is a journal (:mod:`optq.formats.journal`) it stays, and only
who can go on from it may take it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from optq.errors import OptqError, OutputError


class Whole:
    """``part`` is where to write; use it as a context, and call :meth:`appear` inside.

    With ``force`` what ``target`` is now may be replaced. ``notice`` is told of leftovers. Raises
    :class:`OutputError` where another process writes the same target, or has made or changed it,
    and for a journal where the caller does not go on from one (``goes_on``).

    What is to stay after an error, :attr:`keep` says: ``journal`` and ``blocks`` beside ``part``.
    Their owner sets it, and :attr:`kept`, in words; ``part`` stays in its place until it appears.
    """

    def __init__(
        self, target: Path, force: bool, notice: Callable[[str], None], goes_on: bool = False
    ) -> None:
        self.target, self.force, self.notice, self.goes_on = target, force, notice, goes_on
        self.keep, self.kept = False, ""
        with writing(target):
            for parent in target.absolute().parents:
                if parent.exists() and not parent.is_dir():
                    raise OutputError(
                        f"{target}: {parent} is not a folder", "choose another folder"
                    )
            self._seen = _contents(target) if force else None  # what may be replaced

    def check(self) -> None:
        """Refuse, without touching anything, what entering would refuse."""
        with writing(self.target):
            if self._seen is None and os.path.lexists(self.target):
                raise self._exists()
            there = next(path for path in self.target.absolute().parents if path.exists())
            if not os.access(there, os.W_OK):
                raise PermissionError(errno.EACCES, "Permission denied")

    def _exists(self) -> OutputError:
        return OutputError(f"{self.target} exists", "choose another name, or pass --force")

    def __enter__(self) -> Whole:
        self.room = self.target.with_name(f".{self.target.name}.partial")
        self.part, self._old, self._lock = (self.room / n for n in ("whole", "old", "lock"))
        self.journal, self.blocks = self.room / "journal.jsonl", self.room / "blocks"
        with ExitStack() as undo, writing(self.target):
            for parent in [each for each in reversed(self.target.parents) if not each.exists()]:
                parent.mkdir(exist_ok=True)
                undo.callback(_remove_empty, parent)
            while not self._claim(undo):
                pass
            self._find_leftovers()
            if self._seen is None and os.path.lexists(self.target):
                raise self._exists()
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def appear(self) -> None:
        """Give the part its name, in the place of what was there at the start."""
        with writing(self.target):
            for each in (*self.part.rglob("*"), self.part):
                sync(each)  # a name on disk before what it names would be a checkpoint of nothing
            if self._seen is None or not os.path.lexists(self.target):
                _name(self.part, self.target)
                sync(self.target.parent)
                return
            try:
                self.target.rename(self._old)  # where nobody changes it: now it can be compared
                if _contents(self._old) != self._seen:
                    raise _meanwhile(self.target, "changed")
                _name(self.part, self.target)
            except BaseException:  # Ctrl-C too: what was there goes back to its place
                if os.path.lexists(self._old) and not os.path.lexists(self.target):
                    _name(self._old, self.target)
                raise
            sync(self.target.parent)

    def discard(self) -> None:
        """Throw away what an earlier run has left to go on from."""
        self.keep, self.kept = False, ""
        for each in (self.journal, self.blocks):
            _remove(each)
        self.empty()

    def empty(self) -> None:
        """Remove what is in the part, but not itself: without it, all would seem to be done."""
        for each in self.part.iterdir():
            _remove(each)

    def _claim(self, undo: ExitStack) -> bool:
        """Make the hidden folder this process' own, until ``undo``; False: try once more."""
        self.room.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as stack:  # its owner has just removed it
            stack.callback(_remove_empty, self.room)
            self._left = fresh = False
            try:
                handle = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
                fresh = True
            except FileExistsError:
                handle = os.open(self._lock, os.O_RDWR)
            self._left = not fresh or self.journal.exists()
            # An interruption from here on must leave it.
            self.keep = self.journal.exists() and os.path.lexists(self.part)
            if self._locked(handle, fresh):
                stack.callback(os.close, handle)
                if not os.path.samestat(os.fstat(handle), self._lock.stat()):
                    return False
            stack.callback(self._clear)
            undo.push(stack.pop_all())
            return True
        return False

    def _locked(self, handle: int, fresh: bool) -> bool:
        """Lock the file until it is closed or the process dies.

        False where there are no such locks, on Windows and on file systems of some clusters: the
        folder is then of the process that made the file.
        """
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (ImportError, OSError) as error:
            os.close(handle)
            if isinstance(error, BlockingIOError) or not fresh:
                raise OutputError(
                    f"another run is writing {self.target}",
                    f"choose another name, or wait; if none is running, delete {self._lock}",
                ) from error
            return False

    def _clear(self) -> None:
        with suppress(OSError):  # a disk that has failed is told of by what failed on it
            if os.path.lexists(self.target) and not os.path.lexists(self.part):
                _remove(self._old)  # it is replaced
            if os.path.lexists(self._old):  # which could not go back to its place
                self.notice(f"what {self.target} was before is now {self._old}")
                return
            if not self.keep or not os.path.lexists(self.part):
                for each in (self.part, self.blocks, self.journal):
                    _remove(each)
            elif self.kept:
                self.notice(
                    f"{self.kept} are kept in {self.room}: the same command goes on from there,"
                    " --restart throws them away"
                )
            self._lock.unlink()  # last: who takes the folder next finds it as it is to be

    def _find_leftovers(self) -> None:
        """Remove what a run that died has left; what it was about to replace goes back.

        While the part lies beside it, nothing has replaced it. A journal then stays for who goes
        on from it.
        """
        cut_off = os.path.lexists(self.part)
        self.keep = cut_off and self.journal.exists()
        if self._left and cut_off and _remove_empty(self.target):  # see :func:`_name`
            self._seen = None
        if os.path.lexists(self._old) and not os.path.lexists(self.target):
            _name(self._old, self.target)
            self._seen = _contents(self.target) if self.force else None
            self.notice(f"{self.target} is back: a run was cut off while it replaced it")
        elif os.path.lexists(self._old) and cut_off:
            raise OutputError(
                f"a run was cut off while it replaced {self.target}: what that was is {self._old}",
                f"move {self.target} away and run again to have it back, or delete {self._old}",
            )
        if self.keep and not self.goes_on:
            raise OutputError(
                f"{self.room} holds finished blocks of a run of optq quantize",
                f"run that command again to go on from there, or delete {self.room}",
            )
        if self._left and not self.keep:
            for each in (self.part, self._old, self.blocks, self.journal):
                _remove(each)
            self.notice(f"removed {self.room}, which a run that was cut off has left")


def _name(part: Path, target: Path) -> None:
    """Rename, but never onto anything: a plain rename replaces a file, or an empty folder.

    The system makes a folder or a file only where nothing is: an empty one takes the place first.
    """
    folder = part.is_dir() and not part.is_symlink()
    try:
        if os.name != "nt":  # where a rename replaces nothing
            target.mkdir() if folder else target.touch(exist_ok=False)
        part.rename(target)
    except FileExistsError as error:
        raise _meanwhile(target, "made") from error
    except BaseException:  # Ctrl-C too
        _remove_empty(target)  # what is not empty stays: it is the part, or somebody's
        raise


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk before anything else is done."""
    if os.name == "nt":  # which cannot do it to what is open for reading, or to a folder
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise  # where there is no such call, on some network file systems, it is not needed
    finally:
        os.close(handle)


def _meanwhile(target: Path, what: str) -> OutputError:
    return OutputError(
        f"{target} was {what} while the run went on",
        "move it away, or choose another name, and run again",
    )


def _contents(path: Path) -> dict[Path, object] | None:
    """What tells a file, or a folder with all its files, from what somebody makes of it later."""
    if not os.path.lexists(path):
        return None
    inside = path.rglob("*") if path.is_dir() and not path.is_symlink() else ()
    stats = {each.relative_to(path): each.lstat() for each in (path, *inside)}
    return {
        name: stat.S_ISDIR(found.st_mode) or (found.st_size, found.st_mtime_ns)
        for name, found in stats.items()
    }


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(path: Path) -> bool:
    """Remove an empty folder or file; anything else stays."""
    with suppress(OSError):
        if stat.S_ISDIR((found := path.lstat()).st_mode):
            path.rmdir()
            return True
        if stat.S_ISREG(found.st_mode) and not found.st_size:
            path.unlink()
            return True
    return False


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the system says while writing into an error with a remedy."""
    from safetensors import SafetensorError

    try:
        yield
    except OptqError:
        raise
    except (OSError, SafetensorError) as error:
        # Without the hidden folder's name, which says nothing to anyone.
        reason = getattr(error, "strerror", None) or str(error)
        cause = f"{target} cannot be written: {reason}"
        remedy = "choose a folder that you may write to"
        number = getattr(error, "errno", None)  # safetensors has only the words
        if number == errno.ENOSPC or "No space left" in str(error):
            cause, remedy = f"the disk of {target} is full", "make room, and run again"
        elif number == errno.EFBIG or "File too large" in str(error):
            cause = f"{target} cannot be written: the limit on the size of a file is reached"
            remedy = "raise it (ulimit -f), or choose another disk"
        elif number == errno.ENAMETOOLONG:
            remedy = "choose a shorter name"
        raise OutputError(cause, remedy) from error
