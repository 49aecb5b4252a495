"""The options of GPTQ that are the default, by number of bits, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass

from optq.core.order import ActOrder


@dataclass(frozen=True)
class Best:
    """Options of :class:`optq.core.gptq.GPTQ` that leave the file format alone; and QEP."""

    actorder: ActOrder
    static_groups: bool
    mse: bool
    polish: int
    qep: bool


# The best known for each width, and the paper's. docs/defaults.md has the measurements.
BEST = {
    2: Best(actorder="group", static_groups=False, mse=True, polish=2, qep=True),
    3: Best(actorder="group", static_groups=False, mse=True, polish=2, qep=True),
    4: Best(actorder="group", static_groups=False, mse=True, polish=1, qep=True),
    8: Best(actorder="group", static_groups=False, mse=True, polish=0, qep=False),
}
PLAIN = Best(actorder=False, static_groups=False, mse=False, polish=0, qep=False)
OPTIONS = ("actorder", "static_groups", "mse", "polish")  # of those, GPTQ's own
