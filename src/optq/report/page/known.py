"""What a report starts from: what is on disk of one checkpoint, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optq.errors import SettingError
from optq.findings import Findings, OnText
from optq.record import RunRecord, Times


@dataclass(frozen=True)
class Known:
    """One checkpoint.

    ``what`` is what :func:`optq.formats.describe.describe` found; ``before`` the bytes of all its
    tensors before they were quantized, and ``exact`` whether that was read from the dense model,
    or reckoned from shapes. ``full``: the dense model's perplexity on the first text of the
    findings, where these do not say it. None: not there, or not known.
    """

    place: str  # as it was named
    config: Mapping[str, Any]
    what: Mapping[str, Any]
    before: int | None = None
    exact: bool = False
    weights: int | None = None  # that are quantized
    dense: str | None = None  # the dense model, as it was named
    record: RunRecord | None = None
    times: Times | None = None
    findings: Findings | None = None
    full: float | None = None

    @property
    def name(self) -> str:
        return Path(self.place).name or self.place

    @property
    def main_text(self) -> OnText | None:
        """The text that is shown first: one with the dense model beside it, if there is one."""
        texts = [] if self.findings is None else self.findings.texts
        return next((text for text in texts if text.against), texts[0] if texts else None)

    def full_on(self, text: OnText) -> float | None:
        """The dense model's perplexity on one of the texts."""
        if text.against:
            return text.against.perplexity
        is_first = self.findings is not None and self.findings.texts[0] == text
        return self.full if is_first else None

    def ratio_on(self, text: OnText) -> float | None:
        """The perplexity over the dense model's."""
        if text.against:
            return text.against.ratio
        full = self.full_on(text)
        return text.perplexity / full if full else None


@dataclass(frozen=True)
class Several:
    """Those of one report, each by a name of its own; the first is what it is about."""

    every: Sequence[Known]
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Raises :class:`SettingError` for checkpoints of different models."""
        short, places = [each.name for each in self.every], [each.place for each in self.every]
        object.__setattr__(self, "names", short if len({*short}) == len(short) else places)
        if len({*map(_folder, places)}) < len(places):
            raise SettingError("a checkpoint is named twice", "name each once")
        first = self.every[0]
        for other in self.every[1:]:
            if why := _differ(first, other):
                raise SettingError(
                    f"{first.place} and {other.place} are of different models: {why}",
                    "put checkpoints of one model into a report",
                )


def _folder(place: str) -> str:
    """A folder by its whole path, however it was named; a hub id as it is."""
    return str(Path(place).resolve()) if Path(place).is_dir() else place


def shapes(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """What of a ``config.json`` says which model it is: its architecture, and its sizes."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name != "quantization_config":
            found |= shapes(value, f"{above}{name}.")
        elif name in ("architectures", "model_type") or (
            type(value) is int and not name.endswith("_token_id")
        ):
            found[above + name] = value
    return found


def different(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The first thing in which two ``config.json`` are of different models."""
    of_one, of_other = shapes(one), shapes(other)
    for name in sorted(of_one.keys() & of_other.keys()):  # tools add and drop what is a default
        if of_one[name] != of_other[name]:
            return f"{name} is {of_one[name]} and {of_other[name]}"
    return None


def _differ(one: Known, other: Known) -> str | None:
    if why := different(one.config, other.config):
        return why
    if one.record is None or other.record is None:
        return None
    layers, others = (
        {layer.name: (layer.rows, layer.cols) for layer in each.record.layers}
        for each in (one, other)
        if each.record
    )
    both = layers.keys() & others.keys()
    if layers and others and not both:
        return f"the other has no layer {next(iter(layers))}"
    for name in sorted(both):
        if layers[name] != others[name]:
            (rows, cols), (other_rows, other_cols) = layers[name], others[name]
            return f"{name} is {rows} x {cols} and {other_rows} x {other_cols}"
    return None
