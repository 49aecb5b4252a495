"""The journal of a run: the lines on disk from which one that was cut off goes on.

It lies in the hidden folder beside the target (:mod:`optq.formats.whole`):

    journal.jsonl       what ran, as one JSON object, then a line for each block that is done
    blocks/00000.*      its packed tensors (.safetensors) and its records (.json), by checksum
    whole/              the checkpoint, while it is put together from them

What a line names is whole: the files have their names, and are synced, before the line is written.
A last line without its end was being written when the run ended, and its block is done again. Any
other damage costs the blocks from there on, and is said.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from optq import __version__
from optq.core.weight import LayerScheme
from optq.errors import ModelError, OutputError
from optq.formats.whole import Whole, sync, writing
from optq.model.checkpoint import Checkpoint
from optq.record import Found

VERSION = 2
PIECES, PIECE = 256, 2**14  # of a file of weights, and bytes of each
CHANGED = {"tokens": "the calibration text", "config": "the config.json of the source"}


class Done(BaseModel):
    """What is known of a finished block beside its tensors."""

    tensors: list[str]  # names in the file
    layers: dict[str, LayerScheme]  # by name on disk
    found: Found | None  # None: layers of an export
    bytes: int  # as encoded, and how many weights that is
    weights: int
    plain: list[str] = []  # of the names: tensors that are no layer's, other than the source's


class Journal:
    """The blocks of ``place`` that are :attr:`done`, in the order in which they were finished.

    ``settings`` (see :func:`settings`) are those of this run, ``blocks`` how many it will finish.
    :attr:`choices` are what the run has found out before its first block, for whoever goes on.
    With ``restart`` what an earlier run has left is thrown away. Raises :class:`OutputError` where
    that was another run.
    """

    def __init__(
        self, place: Whole, settings: dict[str, Any], blocks: int, restart: bool = False
    ) -> None:
        self.place, self.settings, self.blocks = place, settings, blocks
        self.done: list[Done] = []
        self.choices: list[Any] | None = None
        with writing(place.target):
            if place.keep and restart:
                place.discard()
                place.notice(f"threw away what was in {place.room}")
            elif place.keep:
                self._go_on()
            place.blocks.mkdir(exist_ok=True)

    @property
    def next_file(self) -> Path:
        """Where the packed tensors of the next block go."""
        return self.file(len(self.done))

    def file(self, index: int, suffix: str = ".safetensors") -> Path:
        """The file of one block."""
        return self.place.blocks / f"{index:05}{suffix}"

    def add(self, done: Done) -> None:
        """One more block is done; its tensors, if it has any, are in :attr:`next_file`."""
        with writing(self.place.target):
            records, new = (self.file(len(self.done), suffix) for suffix in (".json", ".new"))
            new.write_text(json.dumps(done.model_dump()) + "\n", encoding="utf-8")
            sync(new)
            new.rename(records)
            sync(self.place.blocks)
            files = [path for path in (self.next_file, records) if path.exists()]
            line = {"sha256": {path.name: sha256(path) for path in files}}
            known = {} if self.choices is None else {"choices": self.choices}
            lines = [line] if self.done else [self.settings | known, line]
            with self.place.journal.open("ab" if self.done else "wb") as file:
                file.write("".join(json.dumps(each) + "\n" for each in lines).encode())
                file.flush()
                os.fsync(file.fileno())
            sync(self.place.room)
        self.done.append(done)
        self._keep()

    def _keep(self) -> None:
        count = len(self.done)
        self.place.keep, self.place.kept = count > 0, f"{count} of {self.blocks} blocks"

    def _go_on(self) -> None:
        """Take what an earlier run has left as far as it is whole, and remove the rest."""
        place, raw = self.place, self.place.journal.read_bytes()
        first, *lines = raw.split(b"\n")[:-1] or [b""]  # one that was cut off has no end
        if lines and _object(first) is None:
            raise OutputError(
                f"the first line of {place.journal}, which says what run it is of, is damaged",
                f"--restart throws its {len(lines)} finished blocks away",
            )
        if lines and (then := _object(first)) is not None:
            self.choices = then.pop("choices", None)
            self._compare(then, len(lines))
            named = [_sums(line) for line in lines]
            self._put_back([f"{i:05}.safetensors" for i, sums in enumerate(named) if len(sums) > 1])
            for index, sums in enumerate(named):
                if damage := self._damage(index, sums):
                    place.notice(f"block {index + 1} in {place.room} {damage}: it is done again")
                    break
                found = _object(self.file(index, ".json").read_bytes())
                self.done.append(Done.model_validate(found))
        if not self.done:
            self.choices = None
            place.discard()
            place.notice(f"no block in {place.room} was whole: starting anew")
            return
        place.empty()
        count = len(self.done)
        keep = {self.file(i, end) for i in range(count) for end in (".safetensors", ".json")}
        for path in {*place.blocks.iterdir()} - keep:
            path.unlink()
        os.truncate(place.journal, sum(len(line) + 1 for line in (first, *lines[:count])))
        sync(place.journal)
        self._keep()
        place.notice(f"going on after {place.kept}, which {place.room} holds")

    def _compare(self, then: dict[str, Any], count: int) -> None:
        """Refuse to go on from another run."""
        remedy = (
            f"give what that run was given, or --restart, which throws {count} finished blocks away"
        )
        if then.get("journal") != VERSION:
            cause = f"the journal in {self.place.room} is of version {then.get('journal')}"
            raise OutputError(f"{cause}, and this OPTQ reads {VERSION}", remedy)
        if found := [*_differences(then, self.settings)]:
            cause = f"{self.place.room} holds finished blocks of another run"
            raise OutputError(f"{cause}: {'; '.join(found)}", remedy)

    def _put_back(self, names: list[str]) -> None:
        """What had its name in the checkpoint already, when the run was cut off, goes back."""
        for number, name in enumerate(names, 1):
            for moved in self.place.part.glob(f"model-{number:05}-of-*.safetensors"):
                if not (self.place.blocks / name).exists():
                    moved.rename(self.place.blocks / name)
        sync(self.place.blocks)

    def _damage(self, index: int, sums: dict[str, Any]) -> str | None:
        """What is wrong with a block whose files have these checksums; None: nothing."""
        if self.file(index, ".json").name not in sums:
            return "has a damaged line in the journal"
        for name, expected in sums.items():
            path = self.place.blocks / name
            if not path.is_file():
                return f"lacks its {name}"
            if sha256(path) != expected:
                return f"has a damaged {name}"
        return None


def settings(
    checkpoint: Checkpoint, device: torch.device, tokens: Tensor, **options: Any
) -> dict[str, Any]:
    """All that decides the bytes of a checkpoint: ``options``, versions, what the source is.

    Of the source's weights it has what is cheap to know: names, sizes, headers, and pieces.
    """
    found = {
        "journal": VERSION,
        "optq": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "device": device.type,
        **options,
        "tokens": hashlib.sha256(tokens.to("cpu", torch.int64).numpy().tobytes()).hexdigest(),
        "config": hashlib.sha256(json.dumps(checkpoint.config()).encode()).hexdigest(),
        "source": {
            name: _fingerprint(checkpoint.folder / name)
            for name in sorted({*checkpoint.files.values()})
        },
    }
    return json.loads(json.dumps(found))


def sha256(path: Path) -> str:
    """The checksum of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    if path.parent.parent.name == "snapshots":  # of the hub: the file may be still to come
        return {"revision": path.parent.name}
    try:
        found = path.stat()
        known: dict[str, Any] = {"size": found.st_size, "pieces": _pieces(path, found.st_size)}
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = file.read(int.from_bytes(file.read(8), "little"))
            known["header"] = hashlib.sha256(header).hexdigest()
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror}", "copy the model again, with all files"
        ) from error
    return known


def _pieces(path: Path, size: int) -> str:
    """A checksum of pieces from all over a file: of all of it, if it is small.

    A copy has another time and the same values, and other weights differ everywhere.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for start in range(0, size, max(PIECE, size // PIECES)):
            file.seek(start)
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def _differences(
    then: dict[str, Any], now: dict[str, Any], of_source: bool = False
) -> Iterator[str]:
    """What differs, in words; ``of_source``: what is known of its files."""
    for name in dict.fromkeys([*then, *now]):
        before, after = then.get(name), now.get(name)
        if before == after or (
            name == "tokens" and then.get("calibration") != now.get("calibration")
        ):
            continue  # another text is named already
        if name in CHANGED or of_source:
            yield f"{CHANGED.get(name, f'{name} of the source')} has changed since"
        elif isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, name == "source")
        else:
            yield f"{name} was {_word(before)} and is {_word(after)}"


def _sums(line: bytes) -> dict[str, Any]:
    """The checksums in a line of the journal, by the names of files; none in a damaged one."""
    found = (_object(line) or {}).get("sha256")
    return found if isinstance(found, dict) else {}


def _word(value: Any) -> str:
    if value is None or isinstance(value, bool | dict):
        return "on" if value else "off"
    return str(value)


def _object(line: bytes) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
