"""Linear layers and experts whose weights stay packed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from optq.core.weight import QuantizedWeight
from optq.errors import ModelError
from optq.kernels.product import Product
from optq.kernels.table import build
from optq.model.checkpoint import TOGETHER
from optq.model.experts import PARTS, Bank, bank_of, is_bank
from optq.model.names import disk_names


class QuantizedLinear(nn.Module):
    """Takes the place of an ``nn.Linear`` or a ``Conv1D``: ``x @ W.T + bias``.

    Without :attr:`product` it is the empty place that a checkpoint is loaded into.
    """

    product: Product | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        empty = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self.register_parameter("bias", empty)
        self.register_module("product", None)

    def fill(self, weight: QuantizedWeight, dtype: torch.dtype, abits: int | None = None) -> None:
        """Hand the weight to the kernel that serves it best; ``abits``: of the activations."""
        self.product = build(weight, dtype, abits)

    @property
    def weight(self) -> Tensor:
        """The dequantized weights ``[rows, cols]``, made anew at each call."""
        if self.product is None:  # for models that initialise by name, before anything is loaded
            return torch.empty(0)
        return self.product.dense()

    def forward(self, x: Tensor) -> Tensor:
        # Past what modules do on the way to an attribute and a call: as much as a small product.
        product: Any = self._modules["product"]
        y = product.forward(x if x.ndim == 2 else x.reshape(-1, self.in_features))
        if (bias := self._parameters["bias"]) is not None:
            y = y + bias
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}"

    def _save_to_state_dict(self, *arguments: Any) -> None:
        """A file of the kernel's layout would be of use to nobody, one without it a trap."""
        if self.product is not None:
            raise ModelError(
                "a model that runs on packed weights cannot be saved",
                "copy its folder, or convert it with optq export",
            )
        super()._save_to_state_dict(*arguments)


class QuantizedExperts(nn.Module):
    """What experts become whose layers are modules of their own, packed: see :func:`open_bank`."""

    bank: Bank

    def forward(self, x: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Only experts that were chosen are multiplied."""
        return self.bank.call(x, *self.bank.routing(x, *routing, *named.values()))

    def product(self, attribute: str, expert: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """One projection: of gate and up together as the experts' own code has them."""
        own: Any = self._modules[str(expert)]  # a name with dots would be looked up more slowly
        parts = [own._modules[part](x) for part in PARTS.get(attribute, (attribute,))]
        if self.bank.concatenated or len(parts) == 1:
            y = torch.cat(parts, dim=-1) if len(parts) > 1 else parts[0]
        else:
            y = torch.stack(parts, dim=-1).flatten(-2)
        return y if bias is None else y + bias


def open_bank(module: Any) -> None:
    """Turn experts in one parameter into modules ``EXPERT.PROJECTION``, empty, in place."""
    bank = bank_of(type(module).__name__, module)
    bank.check()
    layers = [(layer.name.split(".")[-2:], layer.shape) for layer in bank.layers]
    for attribute in (bank.first, "down_proj"):
        delattr(module, attribute)
        setattr(module, attribute, torch.empty(0))  # for models that initialise by name
    for (expert, part), (rows, columns) in layers:
        if not hasattr(module, expert):
            module.add_module(expert, nn.Module())
        with torch.device("meta"):
            empty = nn.Linear(columns, rows, bias=False)
        module.get_submodule(expert).add_module(part, empty)
    bank.packed, module.bank = True, bank
    module.__class__ = type(type(module).__name__, (QuantizedExperts, type(module)), {})


def make_room(model: Any, names_on_disk: list[str], tensors: Collection[str]) -> dict[str, str]:
    """Put empty :class:`QuantizedLinear` in the places of layers; their names in the model.

    One gets a bias if the file has one for it (among ``tensors``): AutoGPTQ gave every layer one.
    """
    from transformers.pytorch_utils import Conv1D

    wanted = [f"{name}.weight" for name in names_on_disk]
    in_model = {disk: name for name, disk in disk_names(model, wanted).items()}
    banks = {n: m for n, m in model.named_modules() if is_bank(m)}
    opened = [n for n in banks if any(name.startswith(f"{n}.") for name in in_model.values())]
    for name in opened:
        open_bank(banks[name])
    places = {}
    for name in names_on_disk:
        place = in_model.get(f"{name}.weight", "").removesuffix(".weight")
        old = model.get_submodule(place) if place else None
        if not isinstance(old, nn.Linear | Conv1D):
            raise ModelError(
                f"{name} is no linear layer of {type(model).__name__}",
                TOGETHER,
            )
        rows, columns = old.weight.T.shape if isinstance(old, Conv1D) else old.weight.shape
        parent, _, attribute = place.rpartition(".")
        biased = old.bias is not None or f"{name}.bias" in tensors
        new = QuantizedLinear(columns, rows, biased)
        setattr(model.get_submodule(parent), attribute, new)
        places[name] = place
    for name in opened:
        for expert, module in banks[name].named_modules(prefix=name):
            if isinstance(module, nn.Linear):
                raise ModelError(f"the experts are packed, and {expert} is missing", TOGETHER)
    return places


def fill(
    model: Any, place: str, name_on_disk: str, weight: QuantizedWeight, abits: int | None = None
) -> None:
    """Give the layer at ``place`` its weight. Raises :class:`ModelError` for another shape."""
    layer = model.get_submodule(place)
    if (weight.rows, weight.cols) != (layer.out_features, layer.in_features):
        raise ModelError(
            f"{name_on_disk} is {weight.rows} x {weight.cols} where the model has"
            f" {layer.out_features} x {layer.in_features}",
            TOGETHER,
        )
    layer.fill(weight, model.dtype, abits)


def make_dense(model: Any) -> None:
    """Put an ``nn.Linear`` with the dequantized weights in the place of each quantized layer."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, QuantizedLinear):
            parent, _, attribute = name.rpartition(".")
            with torch.device("meta"):
                dense = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
            dense.weight = nn.Parameter(layer.weight, requires_grad=False)
            if layer.bias is not None:
                dense.bias = layer.bias
            setattr(model.get_submodule(parent), attribute, dense)
