"""A device that is not there: tensors that say ``cuda:0`` and compute on the CPU.

Inside :func:`pretended` everything that puts a tensor on a GPU (factories, ``.to``, ``.cuda``,
``torch.device`` as a context) gives a :class:`Pretend`, which refuses to meet a plain CPU tensor
where torch would refuse it: the commonest fault of code that never saw a GPU. What torch lets pass
passes: CPU tensors without dimensions, CPU tensors as an index, copies between devices.

It does not follow what reads a tensor's memory or belongs to the CUDA runtime: streams, graphs,
``data_ptr``, storages (so not what moves from the device to files), pinned memory, NCCL. Nor does
it know what a GPU's arithmetic rounds otherwise, which operators have no CUDA kernel, or that a
copy may be under way. Gradients it has none: autograd asks the runtime of each device for a
stream. Triton's kernels run inside :func:`interpreted` only, in its interpreter; elsewhere what
has none is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

CUDA = torch.device("cuda:0")
FREE = 2**33  # bytes that the device says it has left

aten = torch.ops.aten
ACROSS = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default}
INDEXED = {  # of these the indices may be on the CPU
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}


# These ask the CUDA runtime, or choose among its kernels, before an operator is dispatched.
GUARDED = {
    Tensor.__invert__,
    Tensor.contiguous,
    Tensor.nonzero,
    Tensor.new_tensor,
    Tensor.quantile,
    Tensor.where,
    torch.nonzero,
    torch.quantile,
    torch.where,
    scaled_dot_product_attention,
}
SCALARS = {
    getattr(Tensor, name)
    for name in ("item", "__float__", "__int__", "__bool__", "__index__", "__contains__")
}


class Pretend(Tensor):
    """Says that it is on ``cuda:0``; ``beneath`` is where it is."""

    beneath: Tensor

    @staticmethod
    def __new__(cls, beneath: Tensor) -> Pretend:
        made = Tensor._make_wrapper_subclass(
            cls,
            beneath.shape,
            strides=beneath.stride(),
            storage_offset=beneath.storage_offset(),
            dtype=beneath.dtype,
            device=CUDA,
            requires_grad=beneath.requires_grad,
        )
        made.beneath = beneath.detach()
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"Pretend({self.beneath!r})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        target = kwargs.get("device")
        if function not in ACROSS:
            _refuse_plain(function, args, kwargs)
        if target is not None:
            target = torch.device(target)
            kwargs["device"] = torch.device("cpu") if target.type == "cuda" else target
        found = function(*tree_map(_beneath, args), **tree_map(_beneath, kwargs))
        if function is aten._to_copy.default and target is not None and target.type != "cuda":
            return found
        if function is aten.copy_.default:
            return args[0]
        written = _written(function, args, kwargs)
        return tree_map(lambda each: written.get(id(each), _wrapped(each)), found)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Makes ``Module.to`` swap tensors: what it does else keeps the class of the old ones."""
        return ["beneath"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> Pretend:
        return Pretend(inner["beneath"])

    def tolist(self) -> Any:
        return self.beneath.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


def _beneath(each: Any) -> Any:
    return each.beneath if isinstance(each, Pretend) else each


def _wrapped(each: Any) -> Any:
    return Pretend(each) if isinstance(each, Tensor) and not isinstance(each, Pretend) else each


def _refuse_plain(function: Any, args: Any, kwargs: Any) -> None:
    if function in INDEXED:
        args = (args[0], *args[2:])
    for each in tree_leaves((args, kwargs)):
        if isinstance(each, Tensor) and not isinstance(each, Pretend) and each.dim():
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices,"
                f" cuda:0 and cpu! (in {function})"
            )


def _written(function: Any, args: Any, kwargs: Any) -> dict[int, Pretend]:
    """Arguments that the operator returns, having written into them, by what is beneath."""
    return {
        id(each.beneath): each for each in tree_leaves((args, kwargs)) if isinstance(each, Pretend)
    }


class _Factories(TorchFunctionMode):
    """Turns what asks for the device into what makes a :class:`Pretend`."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if function is Tensor.__getitem__ and isinstance(args[0], Pretend):
            return _part(args[0], args[1])
        if function is Tensor.__setitem__ and isinstance(args[0], Pretend):
            return _set_part(*args)
        if function in SCALARS and isinstance(args[0], Pretend):
            return function(args[0].beneath, *args[1:])
        if function is Tensor.copy_ and isinstance(args[0], Pretend):
            return _copied(*args[:2])
        if function in GUARDED and any(isinstance(each, Pretend) for each in tree_leaves(args)):
            _refuse_plain(function, args, kwargs)
            found = function(*tree_map(_beneath, args), **tree_map(_beneath, kwargs))
            written = _written(function, args, kwargs)
            return tree_map(lambda each: written.get(id(each), _wrapped(each)), found)
        if function == Tensor.data.__set__ and Pretend in map(type, (args[0].data, args[1])):
            return _exchange(*args)
        if function is Tensor.cuda:
            return _moved(args[0])
        if function is Tensor.to:
            device, dtype, copy = _asked(args[1:], kwargs)
            if _is_cuda(device):
                return _moved(args[0], dtype, copy)
        if _is_cuda(kwargs.get("device")) and not isinstance(args[0] if args else None, Pretend):
            made = function(*args, **(kwargs | {"device": "cpu"}))
            return made if name == "Generator" else _wrapped(made)
        return function(*args, **kwargs)


def _copied(tensor: Pretend, value: Tensor) -> Pretend:
    tensor.beneath.copy_(_beneath(value))
    torch.autograd.graph.increment_version(tensor)
    return tensor


def _exchange(parameter: Tensor, value: Tensor) -> None:
    """``parameter.data = value``, which cannot change the class."""
    new = torch.nn.Parameter(value.detach(), requires_grad=parameter.requires_grad)
    torch.utils.swap_tensors(parameter, new)


def _part(tensor: Tensor, index: Any) -> Tensor:
    """``tensor[index]`` by operators: torch's own asks the CUDA runtime for a guard first."""
    index = index if isinstance(index, tuple) else (index,)
    known = sum(_takes(each) for each in index)
    dim, tensors = 0, dict[int, Tensor]()
    for each in index:
        if each is Ellipsis:
            dim += tensor.dim() - dim - (known - sum(map(_takes, index[: index.index(Ellipsis)])))
        elif each is None:
            tensor, dim = aten.unsqueeze(tensor, dim), dim + 1
        elif isinstance(each, slice):
            step = 1 if each.step is None else each.step
            tensor, dim = aten.slice(tensor, dim, each.start, each.stop, step), dim + 1
        elif isinstance(each, Tensor):
            tensors[dim] = each
            dim += _takes(each)
        elif isinstance(each, list):
            tensors[dim], dim = torch.tensor(each), dim + 1
        else:
            tensor = aten.select(tensor, dim, int(each))
    if not tensors:
        return tensor
    return aten.index(tensor, [tensors.get(at) for at in range(max(tensors) + 1)])


def _takes(each: Any) -> int:
    """How many dimensions an index takes."""
    if each is None or each is Ellipsis:
        return 0
    return each.dim() if isinstance(each, Tensor) and each.dtype == torch.bool else 1


def _set_part(tensor: Tensor, index: Any, value: Any) -> None:
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(each, Tensor | list) and not _scalar(each) for each in parts):
        target = _part(tensor, index)
        _copied(target, value) if isinstance(value, Tensor) else target.fill_(value)
        return
    if len(parts) > 1 and not all(isinstance(each, Tensor | slice) for each in parts):
        raise NotImplementedError(f"pretended: an assignment to {index}")
    places = [None if each == slice(None) else each for each in _no_scalars(parts)]
    if any(isinstance(each, slice) for each in places):
        raise NotImplementedError(f"pretended: an assignment to {index}")
    if not isinstance(value, Tensor):
        value = Pretend(torch.tensor(value, dtype=tensor.dtype))
    aten.index_put_(tensor, places, value.to(tensor.dtype))


def _no_scalars(parts: Any) -> list[Any]:
    return [torch.tensor(each) if isinstance(each, list) else each for each in parts]


def _scalar(each: Any) -> bool:
    return isinstance(each, Tensor) and each.dim() == 0 and each.dtype != torch.bool


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str | torch.device):
        return torch.device(device).type == "cuda"
    return isinstance(device, int) and not isinstance(device, bool)


def _asked(args: Any, kwargs: Any) -> tuple[Any, Any, bool]:
    """Device, dtype and whether a copy is wanted, of the arguments of ``Tensor.to``."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for each in (*args, kwargs.get("other")):
        if isinstance(each, Tensor):
            device, dtype = each.device, each.dtype
        elif isinstance(each, torch.dtype):
            dtype = each
        elif isinstance(each, str | torch.device) or (
            isinstance(each, int) and not isinstance(each, bool)
        ):
            device = each
    return device, dtype, bool(kwargs.get("copy", False))


def _moved(tensor: Tensor, dtype: torch.dtype | None = None, copy: bool = False) -> Tensor:
    """On the device; already there it is itself, unless it changes."""
    if isinstance(tensor, Pretend):
        same = dtype in (None, tensor.dtype) and not copy
        return tensor if same else aten._to_copy(tensor, dtype=dtype or tensor.dtype)
    if tensor.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    return Pretend(tensor.detach().to(dtype=dtype or tensor.dtype, copy=True))


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device, for as long as the context lasts."""
    with ExitStack() as stack:
        # A GPU of this kind has no kernels in Triton, which would ask for a tensor's address.
        stack.enter_context(patch.object(torch.version, "cuda", None))
        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
            "mem_get_info": lambda *_: (FREE, FREE),
            "get_device_capability": lambda *_: (9, 0),
            "_lazy_init": lambda: None,
        }.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        stack.enter_context(_Factories())
        yield CUDA


@contextmanager
def interpreted() -> Iterator[torch.device]:
    """The device with Triton's kernels, whose interpreter is given what is beneath."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        _refuse_plain(executor.fn, args, kwargs)
        run(executor, *tree_map(_beneath, args), **tree_map(_beneath, kwargs))

    with pretended() as device, ExitStack() as stack:
        stack.enter_context(patch.object(GridExecutor, "__call__", launch))
        stack.enter_context(patch.object(torch.version, "cuda", "12.8"))
        for name in ("_exchange_device", "_maybe_exchange_device"):
            stack.enter_context(patch.object(torch.cuda, name, lambda index: index))
        yield device
