"""What is tuned after the solver: each block as soon as it is solved, then all scales at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from optq.core.pruning import Pruner
from optq.core.rtn import RTN
from optq.distill import Distill
from optq.errors import DataError, SettingError
from optq.ranks import launched
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
        if isinstance(quantizer, Pruner):
            raise SettingError("tuning would move the zeros of a pruned model", "leave out --tune")
        if isinstance(what, Tune):
            return what
        if what not in LEVELS:
            raise SettingError(f"--tune is {what}", f"choose {' or '.join(LEVELS)}")
        return cls(model=Distill() if what == "model" else None)

    def check(self, samples: int) -> None:
        """Refuse what cannot be tuned, before any work.

        Raises :class:`DataError` for too few samples, ``SettingError`` among several processes.
        """
        if self.blocks is None and self.model is None:
            return
        if samples < 2:
            raise DataError(
                "tuning holds back a sample that no step sees, and there is only one",
                "choose --nsamples 2 or more: 64 do well",
            )
        if launched():
            raise SettingError(
                "--tune runs in one process", "start it without torchrun, or leave it out"
            )
