"""Before a run within a budget: what each width would cost each part of the model.

One calibration pass on the original weights, which stay as they are: at each site the Hessian and
its factor are made once, and a sweep for each width gives its error, row by row. What the model's
predictions feel of a row's error is :mod:`optq.model.sensitivity`'s. The sum of both over the rows
of a part is how far the predictions will diverge because of it, in nats a token; the divergences of
parts add up nearly, so their least sum is chosen (:mod:`optq.budget`). The sweeps do without the
polish that follows them in the run (docs/log.md has both).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from optq.budget import Budget, Mixed, part_of
from optq.core.error import output_energy
from optq.core.grid import BITS, Storage
from optq.core.precision import exact_products
from optq.formats.journal import Journal
from optq.formats.scheme import Format
from optq.model.activations import Activations
from optq.model.blocks import Block, Site
from optq.model.checkpoint import Checkpoint
from optq.model.flow import Flow
from optq.model.inputs import SiteSums
from optq.model.layer import Layer
from optq.model.names import disk_names
from optq.model.sensitivity import gradients, some_of
from optq.model.shards import open_model
from optq.model.weights import Weights
from optq.quantize import BATCH_TOKENS, Progress
from optq.ranks import UNIT, Ranks
from optq.record import Choice
from optq.solving import in_turn, is_expert, portions, stacked, together


@dataclass(frozen=True)
class Seen:
    """What was measured at a site: of each row its errors by width, and its output's energy."""

    site: Site
    trace: float  # of H
    energy: Tensor
    errors: dict[int, Tensor]


@dataclass
class Probe:
    """The pass through the original model; :attr:`seen` is what it gives."""

    mixed: Mixed
    storage: Storage
    ranks: Ranks
    blocks: int
    progress: Callable[[Progress], None]
    seen: list[Seen] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.quantizers = {wbits: replace(self.mixed.at(wbits), polish=0) for wbits in BITS}

    def solve(self, sites: Iterator[tuple[Site, SiteSums | None]]) -> None:
        """Measure the error of each site at each width, some sites at a time."""
        for some in in_turn(sites, self.ranks):
            self._measure(some)

    @exact_products()
    def _measure(self, some: list[tuple[Site, SiteSums | None]]) -> None:
        first, ranks = some[0][0], self.ranks
        rows = slice(None)
        if not is_expert(first):
            rows = ranks.own(sum(layer.shape[0] for layer in first.layers), UNIT)
        own = [(site, sums) for site, sums in some if sums is not None]
        # Widths differ in what the order of the sweep does not depend on.
        problems = [self.quantizers[BITS[0]].problem(sums.H) for _, sums in own]
        measured: list[Any] = [
            (sums.H.trace().item(), [], {b: [] for b in BITS}) for _, sums in own
        ]
        for few in portions(first, rows) if own else []:
            weights = [stacked(site, few) for site, _ in own]
            for (_, sums), weight, (_, energy, _) in zip(own, weights, measured, strict=True):
                energy.append(output_energy(weight, sums.H).cpu())
            for wbits, quantizer in self.quantizers.items():
                solutions = quantizer.solve_together(
                    problems, weights, [None] * len(own), self.storage
                )
                for (_, _, errors), solution in zip(measured, solutions, strict=True):
                    errors[wbits].append(solution.error.cpu())
        if ranks.size > 1:
            measured = self._gathered(first, measured)
        for (site, _), (trace, energy, errors) in zip(some, measured, strict=True):
            every = {wbits: torch.cat(parts) for wbits, parts in errors.items()}
            self.seen.append(Seen(site, trace, torch.cat(energy), every))
        self.progress(Progress(first.block.index, self.blocks, first.layers[0].name, []))

    def _gathered(self, first: Site, measured: list[Any]) -> list[Any]:
        """Experts of all ranks in order; of another site its rows."""
        told = self.ranks.gather(measured, "errors")
        if is_expert(first):
            return [one for each in told for one in each]
        every = [each[0] for each in told]
        energy = [part for _, energy, _ in every for part in energy]
        errors = {b: [part for _, _, errors in every for part in errors[b]] for b in BITS}
        return [(every[0][0], energy, errors)]


def choose(
    blocks: list[Block],
    journal: Journal | None,
    ranks: Ranks,
    measure: Callable[[], list[Choice]],
) -> list[Choice]:
    """Give each layer of ``blocks`` its width; which ones, and why.

    As the ``journal`` of a run that was cut off has it, else as ``measure`` finds.
    """
    known = ranks.share(lambda: journal.choices if journal else None)
    if known is None:
        choices = measure()
        if journal is not None:
            journal.choices = [choice.model_dump() for choice in choices]
    else:
        choices = [Choice.model_validate(choice) for choice in known]
    widths = {name: choice.wbits for choice in choices for name in choice.layers}
    for block in blocks:
        # An expert that no token came to, as those beside it.
        of_part = {part_of(block, x): widths[x.name] for x in block.layers if x.name in widths}
        for layer in block.layers:
            layer.wbits = widths.get(layer.name, of_part.get(part_of(block, layer)))
    return choices


def measured(
    mixed: Mixed,
    checkpoint: Checkpoint,
    find: Callable[[Any], list[Block]],
    form: Format,
    tokens: Tensor,
    held: Activations,
    progress: Callable[[Progress], None],
    ranks: Ranks,
) -> list[Choice]:
    """Which width each layer is to have, on a model of its own, whose blocks ``find`` finds.

    ``held`` keeps what ``tokens`` hold. Raises ``SettingError`` for a budget that no choice meets,
    ``NumericsError`` for values that are not finite.
    """
    model, blocks, shards = open_model(checkpoint, find)
    where = model, blocks, shards, some_of(tokens), held.device
    felt = ranks.share(lambda: _felt(gradients(*where)))
    probe = Probe(mixed, form.storage(model.dtype), ranks, len(blocks), progress)
    every = list(tokens.split(max(1, BATCH_TOKENS // tokens.shape[1])))
    weights = Weights(model, blocks, held.device, False, shards)
    flow = Flow(model, blocks, every, weights, probe.solve, activations=held, ranks=ranks)
    flow.together = together
    flow.run()
    sites, names = [seen.site for seen in probe.seen], disk_names(model, checkpoint.files)
    budget = Budget.of(mixed, sites, form, model.dtype, checkpoint, names)
    return ranks.share(lambda: _choices(budget, probe.seen, felt))


def _felt(squares: dict[Layer, Tensor]) -> dict[str, Tensor]:
    return {layer.name: value for layer, value in squares.items()}


def _choices(budget: Budget, seen: list[Seen], felt: dict[str, Tensor]) -> list[Choice]:
    costs: dict[str, dict[int, float]] = {}
    errors: dict[str, dict[int, float]] = {}
    energies: dict[str, float] = {}
    for each in seen:
        layers = each.site.layers
        name = part_of(each.site.block, layers[0])
        weigh = [felt.get(layer.name, torch.zeros(layer.shape[0])) for layer in layers]
        feel = torch.cat(weigh).double() / (each.trace or 1.0)
        energies[name] = energies.get(name, 0.0) + math.fsum(each.energy.tolist())
        cost = costs.setdefault(name, dict.fromkeys(BITS, 0.0))
        total = errors.setdefault(name, dict.fromkeys(BITS, 0.0))
        for wbits, error in each.errors.items():
            cost[wbits] += math.fsum((feel * error).tolist())
            total[wbits] += math.fsum(error.tolist())
    costs = {name: {b: _short(x) for b, x in cost.items()} for name, cost in costs.items()}
    widths = budget.choose([*costs.values()])
    return [
        Choice(
            layers=[layer.name for layer in part.layers],
            weights=part.weights,
            wbits=wbits,
            bytes=part.bytes[wbits],
            errors={b: _short(errors[name][b] / (energies[name] or 1.0)) for b in part.bytes},
            divergence={b: costs[name][b] for b in part.bytes},
        )
        for name, part, wbits in zip(costs, budget.parts, widths, strict=True)
    ]


def _short(number: float) -> float:
    """Four digits: further ones depend on how many threads there are."""
    return float(f"{number:.4g}")
