"""How large the result may be, and which width each part of the model then gets.

What readers fuse has one width: the layers that read one input (q/k/v, gate/up), and all experts of
a block. Each such part has, at each width, a size and what its error costs
(:mod:`optq.probe` measures both). The least cost within the budget is a knapsack with one choice a
part, a small integer program, which HiGHS solves (``scipy.optimize.milp``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from optq.core.gptq import GPTQ, OPTIONS, PLAIN
from optq.core.grid import BITS
from optq.core.order import ActOrder
from optq.core.solver import Solver
from optq.core.weight import LayerScheme
from optq.errors import SettingError
from optq.formats.scheme import Format
from optq.model.blocks import Block, Site
from optq.model.checkpoint import Checkpoint
from optq.model.layer import Layer

HEADER = 62  # bytes of a tensor in a file's header, beside its name and where it lies


@dataclass(frozen=True)
class Mixed:
    """GPTQ at 2, 3, 4 or 8 bits, each layer as it needs: the whole within a budget.

    ``bits_per_weight``: of the quantized layers as they are stored, scales and all; or ``size``:
    bytes of the checkpoint's weight files, with all that stays dense. The other options are those
    of :class:`optq.core.gptq.GPTQ`, at every width. Errors: ``SettingError``.
    """

    bits_per_weight: float | None = None
    size: int | None = None
    groupsize: int = -1
    sym: bool = True
    actorder: ActOrder | None = None
    percdamp: float = 0.01
    mse: bool | None = None
    static_groups: bool | None = None
    blocksize: int = 64
    polish: int | None = None

    @classmethod
    def plain(cls, **options: Any) -> Mixed:
        """The paper's algorithm at each width."""
        return cls(**({name: getattr(PLAIN, name) for name in OPTIONS} | options))

    def __post_init__(self) -> None:
        given = [x for x in (self.bits_per_weight, self.size) if x is not None]
        if len(given) != 1:
            cause = "two budgets are given" if given else "no budget is given"
            raise SettingError(cause, "choose either bits_per_weight or size")
        if isinstance(given[0], bool) or not isinstance(given[0], int | float) or not given[0] > 0:
            raise SettingError(f"the budget is {given[0]!r}", "give a number above 0")
        self.at(BITS[0])  # refuses the other options

    def at(self, wbits: int | None) -> GPTQ:
        """The quantizer of the layers that get ``wbits``; None: of those that no part has."""
        own = {field.name for field in fields(GPTQ)} & {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in own if getattr(self, name) is not None}
        return GPTQ(wbits or BITS[-1], **given)

    def scheme(self) -> LayerScheme:
        """What a file says of a layer, but for its width: at the one that every format holds."""
        return self.at(None).scheme()

    @property
    def flag(self) -> str:
        """The budget as it is given to the command."""
        if self.size is None:
            return f"--bits-per-weight {self.bits_per_weight:g}"
        return f"--size {self.size / 1e6:.6g}MB"


def told(quantizer: Solver | Mixed) -> dict[str, Any]:
    """What a record says of a run's quantizer."""
    kind = GPTQ if isinstance(quantizer, Mixed) else type(quantizer)
    options = asdict(quantizer)  # type: ignore[arg-type]
    return {"method": kind.__name__.lower(), "quantizer": options}


@dataclass(frozen=True)
class Part:
    """Layers of one width; ``bytes`` in the file for each width that the format can hold."""

    layers: tuple[Layer, ...]
    bytes: Mapping[int, int]

    @property
    def weights(self) -> int:
        return sum(rows * columns for rows, columns in (layer.shape for layer in self.layers))


@dataclass(frozen=True)
class Budget:
    """``bytes`` for all ``parts``, which have ``weights``; ``beside``: what the files hold else."""

    parts: tuple[Part, ...]
    weights: int
    beside: int
    bytes: int

    @classmethod
    def of(
        cls,
        mixed: Mixed,
        sites: Iterable[Site],
        form: Format,
        dtype: torch.dtype,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
    ) -> Budget:
        """Raises ``SettingError`` for a budget that no choice of widths meets, or all do."""
        grouped: dict[str, list[Layer]] = {}
        for site in sites:
            for layer in site.layers:
                grouped.setdefault(part_of(site.block, site.layers[0]), []).append(layer)
        schemes = {wbits: mixed.at(wbits).scheme() for wbits in BITS}
        known: dict[tuple[int, int, bool], dict[int, int]] = {}
        parts = []
        for layers in grouped.values():
            kinds = [(*layer.shape, layer.conv1d) for layer in layers]
            for kind in {*kinds} - known.keys():
                known[kind] = _sizes(kind, schemes, form, dtype)
            widths = [wbits for wbits in BITS if all(wbits in known[kind] for kind in kinds)]
            sizes = {wbits: sum(known[kind][wbits] for kind in kinds) for wbits in widths}
            parts.append(Part(tuple(layers), sizes))
        weights = sum(part.weights for part in parts)
        layers = [layer for part in parts for layer in part.layers]
        beside = _beside(layers, form, checkpoint, names)
        if mixed.size is None:
            assert mixed.bits_per_weight is not None
            most = int(round(mixed.bits_per_weight * weights / 8, 3))
        else:
            most = mixed.size - beside
        budget = cls(tuple(parts), weights, beside, most)
        budget.check(mixed)
        return budget

    def check(self, mixed: Mixed) -> None:
        least, largest = (
            sum(end(part.bytes.values()) for part in self.parts) for end in (min, max)
        )
        if least <= self.bytes <= largest:
            return
        if mixed.size is None:  # rounded so that both ends are inside
            low, high = (8 * end / self.weights for end in (least, largest))
            ends = f"from {low + 0.005:.2f} to {high - 0.005:.2f} bits per weight"
        else:
            low, high = ((end + self.beside) / 1e6 for end in (least, largest))
            ends = f"from {low + 0.05:.1f}MB to {high - 0.05:.1f}MB"
        below = self.bytes < least
        cause = f"{mixed.flag} is {'below' if below else 'above'} what any choice of widths takes"
        raise SettingError(cause, f"choose {ends}")

    def uniform(self) -> int:
        """The least width at which all parts would take as much or more."""
        return next(b for b in BITS if self.bytes <= sum(_at(part.bytes, b) for part in self.parts))

    def choose(self, costs: Sequence[Mapping[int, float]]) -> list[int]:
        """The width of each part: the least sum of ``costs`` within the budget."""
        return knapsack([part.bytes for part in self.parts], costs, self.bytes)


def _at(sizes: Mapping[int, int], wbits: int) -> int:
    """The size at this width, or at the next that there is."""
    return sizes[min((b for b in sizes if b >= wbits), default=max(sizes))]


def part_of(block: Block, first: Layer) -> str:
    """The name of the part that a site belongs to whose first layer is ``first``.

    Experts have numbers in their block: all are one part, and what holds them is its name.
    """
    inside = first.name.removeprefix(f"{block.name}.")
    experts = re.match(r"(.+?)\.\d+\.", inside)
    return f"{block.name}.{experts[1]}" if experts else first.name


def knapsack(
    sizes: Sequence[Mapping[int, int]], costs: Sequence[Mapping[int, float]], most: int
) -> list[int]:
    """One width for each part, with the least sum of costs where the sizes sum to ``most`` or less.

    ``sizes`` and ``costs`` are by width, of each part; some choice has to fit.
    """
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [(part, wbits) for part, size in enumerate(sizes) for wbits in size]
    columns = np.arange(len(options))
    one = csr_array((np.ones(len(options)), ([part for part, _ in options], columns)))
    cost = np.array([costs[part][wbits] for part, wbits in options])
    size = np.array([sizes[part][wbits] for part, wbits in options], dtype=float)
    for margin in (0, 2e-6):  # what the solver takes for zero is 1e-6
        found = milp(
            cost / (cost.max() or 1.0),
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(one, 1, 1),
                LinearConstraint(size[None] / most, 0, 1 - margin),
            ],
            options={"mip_rel_gap": 1e-4},
        )
        if found.x is not None and size @ (taken := found.x > 0.5) <= most:
            return [options[index][1] for index in np.flatnonzero(taken)]
    return [min(size, key=size.__getitem__) for size in sizes]  # nothing else is so small


def _sizes(
    kind: tuple[int, int, bool],
    schemes: Mapping[int, LayerScheme],
    form: Format,
    dtype: torch.dtype,
) -> dict[int, int]:
    """Bytes of a layer at each width that the format holds it at."""
    rows, columns, conv1d = kind
    sizes = {}
    for wbits, scheme in schemes.items():
        try:
            form.check("a layer", rows, columns, scheme, conv1d)
        except SettingError:
            continue
        tensors = form.layout(rows, columns, scheme, dtype)
        sizes[wbits] = sum(tensor.nbytes for tensor in tensors.values())
    return sizes


def _beside(
    layers: Iterable[Layer], form: Format, checkpoint: Checkpoint, names: Mapping[str, str]
) -> int:
    """Bytes of what stays dense, and of the headers of the files."""
    packed = {f"{layer.name}.weight" for layer in layers}
    fused = {f"{x.name.rsplit('.', 2)[0]}.{x.attribute}" for x in layers if x.expert is not None}
    replaced = {names[name] for name in packed | fused if name in names}
    dense = [name for name in checkpoint.layout if name not in replaced]
    every = [*dense, *(f"{names[n][:-7]}.{s}" for n in packed for s in form.suffixes)]
    digits = len(str(sum(tensor.nbytes for tensor in checkpoint.layout.values())))
    headers = sum(len(name) + HEADER + 2 * digits for name in every)
    return sum(checkpoint.layout[name].nbytes for name in dense) + headers
