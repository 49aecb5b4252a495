"""Where a checkpoint may be written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from optq.errors import OutputError
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import Checkpoint


def place_of(
    target: Path,
    source: Checkpoint,
    force: bool,
    notice: Callable[[str], None] = lambda _: None,
    goes_on: bool = False,
) -> Whole:
    """The place of a checkpoint of ``source``; ``notice`` is told of leftovers.

    Raises :class:`OutputError` for a target that must not be, or cannot be, replaced.
    """
    elsewhere = "choose another folder"
    if "\0" in str(target):
        raise OutputError(f"no folder can be called {str(target)!r}", elsewhere)
    with writing(target):
        model, here, place = source.folder.resolve(), Path.cwd(), target.resolve()
        if place in (model, *model.parents):
            raise OutputError(f"{target} holds the model itself", elsewhere)
        if place in (here, *here.parents):
            raise OutputError(f"{target} holds the current folder", elsewhere)
        if target.is_symlink() and not target.exists():
            raise OutputError(f"{target} is a link to nowhere", elsewhere)
        if os.path.ismount(target):  # the volume of a container, say
            raise OutputError(
                f"{target} is a mount point", f"give a folder inside, such as {target / 'model'}"
            )
        empty = target.is_dir() and not any(target.iterdir())
        if target.exists() and not empty and not (target / "config.json").exists():
            raise OutputError(
                f"{target} exists and holds no checkpoint", f"move it away, or {elsewhere}"
            )
        if target.is_dir() and not os.access(target, os.W_OK):  # it could not be moved at the end
            raise OutputError(f"{target} is read-only", f"make it writable, or {elsewhere}")
    return Whole(target, force, notice, goes_on)
