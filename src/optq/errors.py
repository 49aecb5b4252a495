"""Every error a user can cause, each with a cause and a remedy.

The command prints the two as two lines and exits with status 2. Anything that is not an
``OptqError`` is a defect in OPTQ: it keeps its traceback and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Mapping


class OptqError(Exception):
    """Something the user can put right.

    ``cause`` says in one line what is wrong, ``remedy`` in one line what to do about it.
    """

    def __init__(self, cause: str, remedy: str) -> None:
        super().__init__(f"{cause}\n{remedy}")
        self.cause = cause
        self.remedy = remedy


class ModelError(OptqError):
    """A model that is missing, broken, or not one OPTQ can quantize."""


class OtherMethodError(ModelError):
    """A model that is quantized in a way that is not read."""


class DataError(OptqError):
    """Calibration or evaluation text that is missing, too short, or unknown."""


class SettingError(OptqError):
    """Options that contradict each other or the model's shapes."""


class NumericsError(OptqError):
    """A NaN or infinity in a weight or an activation."""


def not_finite_remedy(dtype: object) -> str:
    """What to do where a model that runs in ``dtype`` (torch's) gives NaN or infinity."""
    if str(dtype) == "torch.float16":
        return "choose --dtype bfloat16 or float32, which hold more; else copy the model again"
    return "copy the model again: a weight may be damaged"


class OutputError(OptqError):
    """A place that cannot be written to: it exists, is read-only, or is full."""

    @classmethod
    def of(cls, path: object, error: OSError, option: str) -> OutputError:
        """A file that the system would not write, and the option that names it."""
        return cls(f"{path} cannot be written: {error.strerror}", f"name another with {option}")


class PeerError(OptqError):
    """Another process of the same run has ended, and with it this one."""


def require_positive(settings: Mapping[str, object]) -> None:
    """Refuse a setting that is no number above 0."""
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise SettingError(f"{name} is {value!r}", "choose a number above 0")
