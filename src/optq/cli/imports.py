"""What the commands import, and no more.

The model code of transformers imports, for any model, what compiles, shards and trains: torch's
compiler, its distributed tensors, scipy. No command asks for them. So they
are not run before somebody does, in a process that is the command's own.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

COMPILER = "torch._dynamo"
NEEDED = f"{COMPILER}._trace_wrapped_higher_order_op"  # by transformers, of the compiler
MARKS = ("disable", "assume_constant_result", "allow_in_graph")  # of functions, for the compiler
ELASTIC = "TORCHELASTIC_RUN_ID"  # torchrun's: one process of several


def load() -> None:
    """Import torch and transformers' models; nothing where somebody has imported torch already."""
    if "torch" in sys.modules:
        return
    gc.disable()  # imports leave no garbage, and looking for it takes its time
    try:
        import torch

        _without_compiler(torch)
        _without_scipy_and_shards()
        import transformers.modeling_utils  # noqa: F401
    finally:
        gc.freeze()  # what is there now stays
        gc.enable()


class _Later(ModuleType):
    """A package that runs when it is first asked for what it does not have."""

    def __getattr__(self, name: str) -> Any:
        module: Any = self
        module.__class__ = ModuleType
        module.__path__ = module.__spec__.submodule_search_locations
        module.__spec__.loader.exec_module(module)
        return getattr(module, name)


def _without_compiler(torch: Any) -> None:
    """Where nothing is compiled, a function that is marked for the compiler is as it was."""
    spec = importlib.util.find_spec(COMPILER)
    if spec is None or COMPILER in sys.modules:
        return
    later: Any = importlib.util.module_from_spec(spec)
    later.__class__ = _Later
    sys.modules[COMPILER] = torch._dynamo = later
    if importlib.util.find_spec(NEEDED):
        importlib.import_module(NEEDED)
    if type(later) is _Later:  # else somebody has asked for it already
        vars(later).update(dict.fromkeys(MARKS, _marked))
        vars(later).pop("__path__", None)  # other parts of it want it whole


def _marked(function: Any = None, *_: object, **__: object) -> Any:
    """The decorator, with its arguments or without."""
    return _marked if function is None else function


def _without_scipy_and_shards() -> None:
    """For losses of object detection, and for models that are spread over processes."""
    from transformers import utils
    from transformers.utils import import_utils

    absent = ["is_scipy_available"]
    if ELASTIC not in os.environ:
        absent.append("is_torch_distributed_available")
    for module in (utils, import_utils):
        for name in absent:
            if hasattr(module, name):
                setattr(module, name, lambda: False)
