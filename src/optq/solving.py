"""Sites are solved: experts some at a time, rows by portions, and all of it shared by ranks."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optq.budget import Mixed
from optq.core.clock import elapsed
from optq.core.error import output_energy
from optq.core.grid import Storage
from optq.core.problem import Problem
from optq.core.qep import QEP
from optq.core.solution import Solution
from optq.core.solver import Solver
from optq.errors import NumericsError
from optq.model.blocks import Site
from optq.model.inputs import SiteSums
from optq.ranks import UNIT, Ranks

MEMORY = 2**29  # bytes for experts that are solved together: more of them are hardly faster
PORTION = 2**30  # bytes for rows that are solved together; they are independent
RUNS = 32  # of columns, of whose Hessian the record has the mean diagonal
LEAST = 1024  # rows of a portion: the column loop costs the same for fewer


@dataclass(frozen=True)
class Outcome:
    """What became of a site, or of some of its rows: all that is told of it on."""

    solution: Solution
    energy: Tensor  # of the output, by row
    tokens: int
    borrowed: int
    damp: float
    damp_tries: int
    dead_columns: int
    diagonal: list[float]  # of H, as :class:`optq.record.SiteRecord` has it
    seconds: dict[str, float]

    @classmethod
    def cat(cls, parts: Sequence[Outcome]) -> Outcome:
        """Rows that were solved by themselves, in order; on several ranks, at the same time."""
        if len(parts) == 1:
            return parts[0]
        stages = {stage for part in parts for stage in part.seconds}
        return replace(
            parts[0],
            solution=Solution.cat([part.solution for part in parts]),
            energy=torch.cat([part.energy for part in parts]),
            seconds={s: max(part.seconds.get(s, 0.0) for part in parts) for s in stages},
        )

    def cpu(self) -> Outcome:
        """With its tensors there, to be sent."""
        return replace(self, solution=self.solution.cpu(), energy=self.energy.cpu())


@dataclass(frozen=True)
class Solving:
    """How sites are solved, and by whom."""

    quantizer: Solver | Mixed  # each layer knows its width where there are several
    qep: QEP | None
    storage: Storage
    ranks: Ranks

    def solve(self, some: list[tuple[Site, SiteSums | None]]) -> list[Outcome]:
        """What becomes of sites of one shape, as many as :func:`together` allows on each rank.

        Experts without sums are other ranks'; of any other site the ranks share the rows.
        """
        own = [(site, sums) for site, sums in some if sums is not None]
        ranks, rows = self.ranks, slice(None)
        if not is_expert(some[0][0]):
            rows = ranks.own(sum(layer.shape[0] for layer in some[0][0].layers), UNIT)
        outcomes = self._rows(own, rows)
        if ranks.size == 1:
            return outcomes
        told = ranks.gather([outcome.cpu() for outcome in outcomes], "solutions")
        outcomes = [outcome for each in told for outcome in each]  # in order
        return outcomes if is_expert(some[0][0]) else [Outcome.cat(outcomes)]

    def _rows(self, some: list[tuple[Site, SiteSums]], rows: slice) -> list[Outcome]:
        """These ``rows`` of each site, a portion at a time."""
        if not some:
            return []
        quantizer = self.quantizer.at(some[0][0].layers[0].wbits)
        problems = [quantizer.problem(sums.H) for _, sums in some]
        few = portions(some[0][0], rows)
        parts = [self._portion(quantizer, some, problems, portion) for portion in few]
        return [Outcome.cat(of_one) for of_one in zip(*parts, strict=True)]

    def _portion(
        self,
        quantizer: Solver,
        some: list[tuple[Site, SiteSums]],
        problems: list[Problem],
        rows: slice,
    ) -> list[Outcome]:
        weights, aims = [], []
        for (site, sums), problem in zip(some, problems, strict=True):
            weights.append(weight := stacked(site, rows))
            start, factor, qep = time.perf_counter(), problem.seconds["factor"], self.qep
            aims.append(None if qep is None else _aim(qep, problem, site, sums, weight, rows))
            factor -= problem.seconds["factor"]
            problem.seconds["solve"] += elapsed(start, weight) + factor
        solutions = quantizer.solve_together(problems, weights, aims, self.storage)
        return [
            Outcome(
                solution,
                output_energy(weight, sums.H),
                sums.tokens,
                sums.borrowed,
                problem.damp,
                problem.damp_tries,
                int(problem.dead.sum()),
                diagonal(problem),
                problem.seconds,
            )
            for (_, sums), weight, problem, solution in zip(
                some, weights, problems, solutions, strict=True
            )
        ]


def diagonal(problem: Problem) -> list[float]:
    """The diagonal of ``H`` in the order of the sweep: means of equal runs of columns."""
    values = problem.H.diagonal()
    if problem.order is not None:
        values = values[problem.order]
    runs = values.double().tensor_split(min(RUNS, len(values)))
    return [float(f"{run.mean().item():.4g}") for run in runs]


def together(site: Site) -> int:
    """How many sites of this shape are solved at a time."""
    rows, columns = sum(layer.shape[0] for layer in site.layers), site.layers[0].shape[1]
    # H, its factor and what makes them; weights, aims, codes and what the sweep holds.
    return max(1, MEMORY // (4 * columns * (4 * columns + 10 * rows)))


def in_turn(
    sites: Iterable[tuple[Site, SiteSums | None]], ranks: Ranks
) -> Iterator[list[tuple[Site, SiteSums | None]]]:
    """As many sites at a time as all ranks solve together."""
    some: list[tuple[Site, SiteSums | None]] = []
    for site, sums in sites:
        some.append((site, sums))
        if len(some) == together(site) * (ranks.size if is_expert(site) else 1):
            yield some
            some = []
    if some:
        yield some


def is_expert(site: Site) -> bool:
    return site.layers[0].expert is not None


def portions(site: Site, rows: slice) -> list[slice]:
    """Of these ``rows`` of a site's stacked weights, those that are solved at a time."""
    start, stop, _ = rows.indices(sum(layer.shape[0] for layer in site.layers))
    most = max(LEAST, PORTION // (40 * site.layers[0].shape[1]) // UNIT * UNIT)
    return [slice(first, min(first + most, stop)) for first in range(start, stop, most)]


def stacked(site: Site, some: slice) -> Tensor:
    """These rows of the site's layers, one below the other, and no copy of the others.

    Smoothed, where the site is.
    """
    parts, first = [], 0
    for layer in site.layers:
        part = layer.weight[max(some.start - first, 0) : max(some.stop - first, 0)]
        first += layer.shape[0]
        if part.numel() and not torch.stack(part.aminmax()).isfinite().all():
            raise NumericsError(
                f"the weight of {layer.name} (block {site.block.index}) holds NaN or infinity",
                "copy the model again, or train it again",
            )
        parts.append(part)
    weight = torch.cat(parts)
    if site.scales is None:
        return weight
    wide = torch.promote_types(weight.dtype, torch.float32)  # scaled, it is not rounded once more
    return (weight.double() * site.scales).to(wide)


def _aim(
    qep: QEP, problem: Problem, site: Site, sums: SiteSums, weight: Tensor, some: slice
) -> Tensor | None:
    """What ``some`` of the stacked rows of a site, its ``weight``, aim at.

    None: at themselves, as where nothing drifted.
    """
    drift = sums.drift
    assert drift is not None  # the full-precision stream runs
    if not any(qep.applies(layer.name) for layer in site.layers) or not drift.any():
        return None
    weight = weight.to(drift.dtype)
    applies = [(qep.applies(layer.name), layer.shape[0]) for layer in site.layers]
    moved = torch.tensor([each for each, rows in applies for _ in range(rows)], device=drift.device)
    target = qep.correct(problem, weight, drift, len(moved))
    return target if moved.all() else torch.where(moved[some, None], target, weight)
