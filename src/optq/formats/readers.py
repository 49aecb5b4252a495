"""Which programs load a checkpoint, and why not: from what they are known to read, without them.

Read in the sources of transformers 5.23, vLLM 0.33 and SGLang, for models that these know; of them
only transformers is run, in the tests. llama.cpp reads one file, which ``optq export`` writes.
What experts, and a packed head, are to these programs says :mod:`optq.formats.notices`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from optq.core.weight import LayerScheme
from optq.errors import ModelError, OptqError
from optq.formats import detect, quantization
from optq.formats.compressed_tensors import COMPRESSED_TENSORS
from optq.formats.config_groups import of_experts
from optq.formats.gguf import begun
from optq.formats.gguf_blocks import misfits
from optq.formats.gguf_settings import FAMILIES
from optq.formats.int_quantized import INT_QUANTIZED
from optq.formats.notices import (
    GROUPS,
    experts_in_transformers,
    experts_in_vllm,
    for_optq_alone,
    head_in_transformers,
    slow_in_vllm,
    widths_in_transformers,
)
from optq.formats.reader import quantized_layers
from optq.formats.scheme import Format, heads_of
from optq.model.blocks import find_blocks
from optq.model.checkpoint import Checkpoint
from optq.model.dequantize import Dequantized
from optq.model.experts import Bank
from optq.model.names import disk_names
from optq.model.source import empty_model

TOOLS = ("transformers", "vLLM", "SGLang", "llama.cpp")
# Each is one matrix in vLLM and SGLang.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
INSIDE = r"(.*?\.\d+\.)(.+)"  # a block, and a layer's name inside
CT = COMPRESSED_TENSORS.name
Answer = tuple[bool | None, str]


@dataclass(frozen=True)
class Reader:
    """Whether a ``tool`` loads a checkpoint (None: that cannot be told), and why, in one line."""

    tool: str
    loads: bool | None
    why: str


@dataclass(frozen=True)
class _Packed:
    """A quantized checkpoint; layers have their names on disk."""

    checkpoint: Checkpoint
    form: Format
    model: Any  # without weights
    names: dict[str, str]  # on disk, of the model's tensors
    layers: dict[str, LayerScheme]
    columns: dict[str, int]
    turned: list[str]  # those that are Conv1D
    banks: list[Bank]
    dense: list[Bank]

    @property
    def schemes(self) -> list[LayerScheme]:
        return _different([self.layers.values()])

    @property
    def experts(self) -> list[list[LayerScheme]]:
        """Those of each bank's layers."""
        every = [[self.on_disk(layer.name) for layer in bank.layers] for bank in self.banks]
        return [_different([[self.layers[name] for name in names]]) for names in every]

    @property
    def head(self) -> bool:
        return bool(heads_of(self.layers))

    def on_disk(self, layer: str) -> str:
        return self.names.get(f"{layer}.weight", "").removesuffix(".weight")


def who_loads(checkpoint: Checkpoint) -> list[Reader]:
    """What transformers, vLLM, SGLang and llama.cpp, in this order, make of a checkpoint.

    Weights are not read. A checkpoint that OPTQ does not understand raises nothing: that is then
    the reason why it cannot be told.
    """
    try:
        answers = _answers(checkpoint)
    except ModelError as error:
        answers = [(None, error.cause)] * len(TOOLS)
    return [Reader(tool, *answer) for tool, answer in zip(TOOLS, answers, strict=True)]


def _answers(checkpoint: Checkpoint) -> list[Answer]:
    if isinstance(checkpoint, Dequantized):
        method = checkpoint.source.config()["quantization_config"]["quant_method"]
        other = None, f"nobody has compared what it makes of {method}"
        return [(True, f"reads {method}; on a CPU with dequantize=True"), other, other, other]
    if found := detect(checkpoint):
        packed = _packed(checkpoint, found)
        return [rule(packed) for rule in (_transformers, _vllm, _sglang, _llama_cpp)]
    model, plain = empty_model(checkpoint), "takes weights that are not quantized"
    known = model.config.model_type in FAMILIES
    convert = "its own convert_hf_to_gguf.py writes the file for it"
    server = True, f"{plain}, of the models that it has"
    return [(True, plain), server, server, (known or None, convert + ("" if known else ", if any"))]


def _packed(checkpoint: Checkpoint, found: Any) -> _Packed:
    layers: dict[str, LayerScheme] = {}
    for name in quantized_layers(checkpoint):
        scheme = found.layer(name)
        if scheme is None:
            raise ModelError(f"{name} is packed, and config.json says that it is not", "")
        layers[name] = scheme
    model = empty_model(checkpoint)
    blocks = find_blocks(model)
    names = disk_names(model, {**checkpoint.files, **{f"{name}.weight": "" for name in layers}})
    of_disk = {place.removesuffix(".weight"): name for name, place in names.items()}
    inside = {layer.name: layer for block in blocks for layer in block.layers}
    columns, turned = {}, []
    for name in layers:
        own = of_disk.get(name, "").removesuffix(".weight")
        if own in inside:
            columns[name] = inside[own].shape[1]
            turned += [name] if inside[own].conv1d else []
        elif own:
            columns[name] = model.get_submodule(own).weight.shape[-1]
    every = [bank for block in blocks for bank in block.banks]
    first = {id(bank): names.get(f"{bank.layers[0].name}.weight", "") for bank in every}
    banks = [bank for bank in every if first[id(bank)].removesuffix(".weight") in layers]
    dense = [bank for bank in every if bank not in banks]
    around = model, names, layers, columns, turned, banks, dense
    return _Packed(checkpoint, found.form, *around)


def _transformers(packed: _Packed) -> Answer:
    form, experts = packed.form, _different(packed.experts)
    around = packed.model, packed.banks, packed.dense, packed.names
    why = experts_in_transformers(form, all(each.sym for each in experts), *around)
    why = why or widths_in_transformers(form, {each.wbits for each in experts})
    if why or (packed.head and (why := head_in_transformers(form))):
        return False, why
    if form is INT_QUANTIZED:
        return True, "reads it with the package compressed-tensors, and rounds activations"
    if form is not COMPRESSED_TENSORS:
        if len(packed.schemes) > 1:
            return None, "was not tried with gptq layers of several kinds (dynamic rules)"
        if _in_some_blocks(packed):
            return None, "was not tried with gptq layers that are dense in some blocks alone"
        return True, "reads gptq with the packages optimum and gptqmodel"
    if packed.turned:
        return False, "leaves Conv1D layers random from compressed-tensors; from gptq it reads them"
    if any(each.actorder for each in packed.schemes):
        return False, "knows no groups in act-order in compressed-tensors"
    if experts and of_experts(quantization(packed.checkpoint) or {}) not in experts:
        return False, "takes another of the config groups for experts"
    if all(each.sym for each in packed.schemes):
        return True, "reads it with the package compressed-tensors"
    if len(packed.schemes) > 1:
        return False, "reads zero points only where all layers are quantized alike"
    how = "quantization_config=CompressedTensorsConfig(dequantize=True)"
    return True, f"reads zero points with the package compressed-tensors and {how}"


def _vllm(packed: _Packed) -> Answer:
    gptq = packed.form is not COMPRESSED_TENSORS
    if why := _in_servers(packed):
        return False, why
    if packed.form is INT_QUANTIZED:
        return True, "multiplies 8-bit weights and activations as integers"
    if gptq and (other := [each for each in packed.schemes if not _is_plain(each)]):
        why = f"takes 4 and 8 bits, symmetric, from gptq, not {_called(other[0])}"
        whole = packed.turned or any(each.actorder for each in packed.schemes)
        return False, why if whole else f"{why}; `optq export .. --format {CT}` writes what it does"
    if any(each.actorder and each.groupsize != -1 for each in packed.schemes):
        return False, "takes no groups in act-order (desc_act): --static-groups leaves none"
    if packed.turned:
        return None, "was not tried with quantized Conv1D layers"
    for scheme in _different(packed.experts):
        if slow := slow_in_vllm(scheme.groupsize, packed.banks):
            return True, slow[0]
    if odd := {each.groupsize for each in packed.schemes} - {-1, *GROUPS}:
        return True, f"has no fast kernel for groups of {min(odd)}: those are for 32, 64, 128, rows"
    if gptq:
        return True, "takes 4 and 8 bits, symmetric, from gptq"
    wide = any(each.wbits != 4 for each in packed.schemes)
    return True, f"takes 2 to 8 bits from compressed-tensors{', on CPUs 4 alone' if wide else ''}"


def _sglang(packed: _Packed) -> Answer:
    plain = [_is_plain(each) for each in packed.schemes]
    if why := _in_servers(packed):
        return False, why
    if packed.turned:
        return None, "was not tried with quantized Conv1D layers"
    if packed.form is INT_QUANTIZED:
        return True, "multiplies 8-bit weights and activations as integers"
    if packed.form is COMPRESSED_TENSORS:
        if few := [each.wbits for each in packed.schemes if each.wbits not in (4, 8)]:
            return False, f"takes 4 and 8 bits from compressed-tensors, not {min(few)}"
        if packed.head or any(each.actorder for each in packed.schemes):
            what = "a packed head" if packed.head else "groups in act-order"
            return None, f"was not tried with {what} in compressed-tensors"
        zeros = "" if all(plain) else "; zero points are new to it, update it"
        return True, f"takes 4 and 8 bits from compressed-tensors{zeros}"
    if all(plain):
        return True, "takes 4 and 8 bits, symmetric, from gptq"
    if any(plain):
        return (
            None,
            "was not tried with layers for its fast kernels beside others in one gptq",
        )
    return True, "takes 2, 3, 4 and 8 bits from gptq; symmetric 4 and 8 bits are the fast ones"


def _llama_cpp(packed: _Packed) -> Answer:
    try:
        begun(packed.checkpoint, packed.model)
    except OptqError as error:
        return False, error.cause.removeprefix("llama.cpp ")
    for name, layer in packed.layers.items():
        width = packed.columns[name] if layer.groupsize == -1 else layer.groupsize
        consecutive = not layer.actorder or layer.groupsize == -1
        if misfit := misfits(packed.columns[name], width, layer.wbits, layer.sym, consecutive):
            return False, f"has no blocks for {name}: {misfit[0]}"
    if any(len({each.wbits == 8 for each in schemes}) > 1 for schemes in packed.experts):
        return False, "keeps the experts of a block in one tensor, and these have different bits"
    return True, "reads one file, which `optq export .. --format gguf` writes"


def _in_servers(packed: _Packed) -> str | None:
    """Why neither vLLM nor SGLang takes it."""
    if packed.banks and for_optq_alone(packed.model, packed.banks, packed.names):
        return "reads no single experts of this model"
    for schemes in packed.experts:
        if len(schemes) > 1:
            return "wants all experts of a block quantized alike"
        if why := experts_in_vllm(schemes[0]):
            return why
    kinds = {**dict.fromkeys(_dense(packed)), **packed.layers}
    for name in packed.layers:
        place, _, own = name.rpartition(".")
        parts = next((parts for parts in FUSED if own in parts), ())
        there = [part for part in parts if f"{place}.{part}" in kinds]
        if len({kinds[f"{place}.{part}"] for part in there}) > 1:
            return f"wants {', '.join(there)} quantized alike, and those of {place} are not"
    return None


def _in_some_blocks(packed: _Packed) -> bool:
    """Whether a layer is packed in one block and dense in another: the config cannot say that."""
    packed_names, dense_names = (
        {found[2] for name in names if (found := re.match(INSIDE, name))}
        for names in (packed.layers, _dense(packed))
    )
    return bool(packed_names & dense_names)


def _dense(packed: _Packed) -> list[str]:
    ends = (name.removesuffix(".weight") for name in packed.checkpoint.files)
    return [name for name in ends if name not in packed.checkpoint.files]


def _is_plain(scheme: LayerScheme) -> bool:
    """Whether the fast kernels of servers are for it."""
    return scheme.wbits in (4, 8) and scheme.sym


def _called(scheme: LayerScheme) -> str:
    return f"{scheme.wbits} bits{'' if scheme.sym else ' asymmetric'}"


def _different(schemes: Iterable[Iterable[LayerScheme]]) -> list[LayerScheme]:
    return list(dict.fromkeys(chain.from_iterable(schemes)))
