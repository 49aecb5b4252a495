"""What is tuned after the solver: each block as soon as it is solved, then all scales at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from optq.core.rtn import RTN
from optq.distill import Distill
from optq.errors import SettingError
from optq.tuning import Tuning

LEVELS = ("blocks", "model")


@dataclass(frozen=True)
class Tune:
    """``blocks``: see :mod:`optq.tuning`; ``model``: see :mod:`optq.distill`. None: not."""

    blocks: Tuning | None = field(default_factory=Tuning)
    model: Distill | None = None

    @classmethod
    def of(cls, what: Tune | str | None, quantizer: object) -> Tune:
        """What a name stands for: ``model`` for both. Raises :class:`SettingError` for another."""
        if what is not None and isinstance(quantizer, RTN):
            raise SettingError(
                "tuning starts from what a solver found, and rtn is none", "use --method gptq"
            )
        if what is None:
            return cls(None, None)
        if isinstance(what, Tune):
            return what
        if what not in LEVELS:
            raise SettingError(f"--tune is {what}", f"choose {' or '.join(LEVELS)}")
        return cls(model=Distill() if what == "model" else None)

    def check(self, samples: int) -> None:
        """Refuse, before any work, text that is too short and several processes."""
        for each in (self.blocks, self.model):
            if each is not None:
                each.check(samples)
