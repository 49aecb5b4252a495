"""Export a quantized checkpoint as one GGUF file, which llama.cpp and what is built on it run.

Quantized layers keep their codes, in the blocks of :mod:`optq.formats.gguf_blocks`. Norms, biases
and routers become float32; every other tensor keeps its dtype and its bits, but for embeddings and
a head that are to be rounded. One projection of all
experts of a block is one tensor ``[experts, rows, columns]``.

llama.cpp turns neighbouring features (2i, 2i + 1) in a Llama's rotary embedding, transformers
features (i, i + d/2): the rows of q and k are reordered to match. A row's codes stay as they are.

Container, names and keys are the package ``gguf``'s. Rejected: llama.cpp's converter, which
dequantizes a checkpoint, and its quantizer, which then rounds a second time, to other scales.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zlib import crc32

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_TENSOR
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from optq import __version__
from optq.errors import ModelError, OutputError, SettingError
from optq.formats import detect
from optq.formats.gguf_blocks import BLOCK, ROUNDED, choose, encode, rounded
from optq.formats.gguf_settings import add_settings, architecture, head_dim
from optq.formats.gguf_vocabulary import add_vocabulary
from optq.formats.reader import packed_tensors, quantized_layers, read_layer
from optq.formats.scheme import Detected
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import TOGETHER, Checkpoint
from optq.model.experts import bank_of, is_bank
from optq.model.names import disk_names
from optq.model.source import empty_model, load_tokenizer

DENSE = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16, torch.float32: Kind.F32}
OUTER = (MODEL_TENSOR.TOKEN_EMBD, MODEL_TENSOR.OUTPUT)
ROUTERS = (MODEL_TENSOR.FFN_GATE_INP, MODEL_TENSOR.FFN_GATE_INP_SHEXP)  # as its converter does


@dataclass(frozen=True)
class _Tensor:
    """One tensor of the file: ``shape`` counts values; ``read`` gives its bytes in its turn."""

    name: str
    kind: Kind
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def byte_shape(self) -> tuple[int, ...]:
        values, size = gguf.GGML_QUANT_SIZES[self.kind]
        return (*self.shape[:-1], self.shape[-1] // values * size)


def export_gguf(
    checkpoint: Checkpoint,
    target: Path,
    force: bool = False,
    notice: Callable[[str], None] = lambda _: None,
    head: int | None = None,
) -> dict[str, Any]:
    """Write ``checkpoint`` to the file ``target``, which appears only when it is whole.

    ``head``: the embeddings, and a head that is not quantized, are rounded to so many bits, 8 or 4.
    ``notice`` is told of what a run that was cut off has left beside ``target``.

    Returns ``file``, ``bytes``, ``tensors`` (how many of each type), ``minimum_moved``: the
    largest distance by which fp16 moved a minimum ``m`` of Q4_1, as a fraction of its scale, and
    ``left_out``: tensors, if there are any, that neither transformers nor llama.cpp takes.
    Raises :class:`ModelError` for a model that llama.cpp would not run as it is,
    :class:`SettingError` for codes that none of the three types holds, :class:`OutputError`
    where the target exists (without ``force``), is no place for a file, or does not read back.
    """
    _check_target(target)
    if head not in (None, *ROUNDED):
        raise SettingError(f"a head of {head} bits is asked for", "choose --head 8 or 4")
    detect(checkpoint)  # refuses what nobody can read
    arch = architecture(checkpoint.config())
    with Whole(target, force, notice) as place:
        return _export(checkpoint, arch, place, head)


def begun(checkpoint: Checkpoint, model: Any) -> gguf.GGUFWriter:
    """A file with all but tensors; ``model`` may be empty.

    Raises :class:`ModelError` for a model, or a tokenizer, that llama.cpp would not run as it is.
    """
    arch = architecture(checkpoint.config())
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    sparse = sum(is_bank(module) for module in model.modules())
    add_settings(writer, model.config, arch, sparse)
    add_vocabulary(writer, load_tokenizer(checkpoint), model.config)
    return writer


def _export(
    checkpoint: Checkpoint, arch: MODEL_ARCH, place: Whole, head: int | None
) -> dict[str, Any]:
    model, target = empty_model(checkpoint), place.target
    writer = begun(checkpoint, model)
    tensors, moved, left_out = _tensors(checkpoint, model, arch, head)
    count = Counter(tensor.kind for tensor in tensors)
    writer.add_name(target.stem)
    writer.add_quantized_by(f"optq {__version__}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    most = max((Kind.Q4_0, Kind.Q4_1, Kind.Q8_0), key=lambda kind: count[kind])
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most.name}"])
    _write(writer, place.part, target, tensors)
    place.appear()
    return {
        "file": str(target),
        "bytes": target.stat().st_size,
        "tensors": {kind.name: number for kind, number in sorted(count.items())},
        "minimum_moved": moved,
    } | ({"left_out": left_out} if left_out else {})


# The model: its settings and its tensors by llama.cpp's names.


def _rotary(config: Any) -> list[_Tensor]:
    """Llama 3's scaling of the rotary frequencies, as llama.cpp reads it: their divisors."""
    if config.rope_parameters["rope_type"] != "llama3":
        return []
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    exponents = torch.arange(0, 2 * len(scaled), 2) / (2 * len(scaled))
    factors = config.rope_parameters["rope_theta"] ** -exponents / scaled
    name = f"{gguf.TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
    return [_Tensor(name, Kind.F32, tuple(factors.shape), lambda: factors)]


def _order(name: str, config: Any, arch: MODEL_ARCH) -> Tensor | slice:
    """The rows of the tensor called ``name`` as llama.cpp wants them, of q and k of a Llama."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if arch != MODEL_ARCH.LLAMA or count is None:
        return slice(None)
    rows = torch.arange(count * head_dim(config))
    return rows.view(count, 2, -1).transpose(1, 2).reshape(-1)


def _tensors(
    checkpoint: Checkpoint, model: Any, arch: MODEL_ARCH, head: int | None
) -> tuple[list[_Tensor], float, list[str]]:
    """What goes into the file, how far a minimum moves, and what is left out.

    Raises :class:`ModelError` where tensors and config do not belong together.
    """
    config, scheme = model.config, detect(checkpoint)
    packed = {f"{name}.weight" for name in quantized_layers(checkpoint)}
    assert scheme is not None  # quantized_layers has refused a plain model
    there = {**dict.fromkeys(checkpoint.files), **dict.fromkeys(sorted(packed))}
    found = {place: n for place, n in disk_names(model, there).items() if n in there}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    places = {name: parts for name, parts in _places(model).items() if name not in tied}
    lacking = {name for parts in places.values() for name in parts} - found.keys()
    left = {*checkpoint.files} - {*found.values(), *packed_tensors(checkpoint)}
    of_packed = [name for name in left if f"{name.rpartition('.')[0]}.weight" in packed]
    added = {name for name, tensor in checkpoint.tensors(of_packed) if tensor.count_nonzero()}
    added |= packed - {*found.values()}
    for what, names in (("lacks", lacking), ("also has", added)):
        if names:
            raise ModelError(f"{checkpoint.folder} {what} {min(names)}", TOGETHER)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors, farthest = _rotary(config), 0.0
    for place, parts in places.items():
        which = known.get_type_and_name(place, (".weight", ".bias"))
        assert which is not None, place  # of every tensor of the families above
        rows, kinds, reads = _order(place, config, arch), set(), []
        for part, fits in parts.items():
            name = found[part]
            if name in packed:
                layer_name = name.removesuffix(".weight")
                layer = read_layer(checkpoint, layer_name, scheme)
                kind, moved = choose(layer, layer_name)
                shape, farthest = tuple(layer.codes.shape), max(farthest, moved)
                reads.append(partial(_read_layer, checkpoint, layer_name, scheme, kind, rows))
            else:
                ((_, tensor),) = checkpoint.tensors([name])
                kind, shape = _dense_kind(name, tensor, which[0], head), tuple(tensor.shape)
                reads.append(partial(_read_dense, checkpoint, name, kind, rows))
            if shape != fits:
                raise ModelError(f"{name} is {list(shape)} where {list(fits)} fits", TOGETHER)
            kinds.add(kind)
        if len(kinds) > 1:
            what = " and ".join(sorted(kind.name for kind in kinds))
            cause = f"llama.cpp keeps the experts of {place} in one tensor, and these are {what}"
            raise SettingError(cause, "quantize them alike")
        if which[0] == MODEL_TENSOR.FFN_GATE_INP_SHEXP:  # one row
            shape = shape[1:]
        if place not in parts:  # experts
            shape, reads = (len(parts), *shape), [partial(_stack, reads)]
        tensors.append(_Tensor(which[1], kind, shape, reads[0]))
    return tensors, farthest, sorted(n for n in left if not n.endswith("rotary_emb.inv_freq"))


def _places(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """What llama.cpp keeps in one tensor, by names in the model: of experts each, with its shape.

    The experts' projections are called as if they were one linear layer, as the package
    ``gguf`` knows them.
    """
    places = {name: {name: tuple(each.shape)} for name, each in model.state_dict().items()}
    for bank in (
        bank_of(name, module) for name, module in model.named_modules() if is_bank(module)
    ):
        for layer in bank.layers:
            places.pop(f"{bank.name}.{layer.attribute}", None)
            place = f"{bank.name}.{layer.name.rpartition('.')[2]}.weight"
            places.setdefault(place, {})[f"{layer.name}.weight"] = layer.shape
    return places


def _stack(reads: Sequence[Callable[[], Tensor]]) -> Tensor:
    """All experts in one tensor: one of them at a time is in memory beside it."""
    whole = torch.empty(0)
    for number, read in enumerate(reads):
        expert = read()
        if number == 0:
            whole = expert.new_empty(len(reads), *expert.shape)
        whole[number] = expert
        del expert  # before the next is read
    return whole


def _read_layer(
    checkpoint: Checkpoint, name: str, scheme: Detected, kind: Kind, rows: Tensor | slice
) -> Tensor:
    return encode(read_layer(checkpoint, name, scheme), kind)[rows]


def _dense_kind(name: str, tensor: Tensor, which: MODEL_TENSOR, head: int | None) -> Kind:
    if tensor.dtype not in DENSE:
        raise ModelError(
            f"{name} is {tensor.dtype}, which llama.cpp does not take".replace("torch.", ""),
            "convert the model to float32, float16 or bfloat16",
        )
    if head is not None and which in OUTER:
        if columns := tensor.shape[-1] % BLOCK:
            cause = f"the {tensor.shape[-1]} columns of {name} are {columns} more than whole blocks"
            raise SettingError(f"{cause} of {BLOCK}", "leave out --head")
        return ROUNDED[head]
    return Kind.F32 if tensor.ndim == 1 or which in ROUTERS else DENSE[tensor.dtype]


def _read_dense(checkpoint: Checkpoint, name: str, kind: Kind, rows: Tensor | slice) -> Tensor:
    ((_, tensor),) = checkpoint.tensors([name])
    if kind in ROUNDED.values():
        return rounded(tensor, kind)
    return (tensor.float() if kind == Kind.F32 else tensor)[rows]


# The file: hidden until it is whole.


def _write(writer: gguf.GGUFWriter, part: Path, target: Path, tensors: list[_Tensor]) -> None:
    """Write ``part``, read it back, and compare: one tensor at a time is in memory."""
    needed, bytes_ = 0, np.dtype(np.uint8)
    for tensor in tensors:
        size = math.prod(tensor.byte_shape)
        writer.add_tensor_info(tensor.name, tensor.byte_shape, bytes_, size, tensor.kind)
        needed += size
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OutputError(
            f"{target} needs {needed} bytes, and its disk has {free}", "make room, and run again"
        )
    sums: dict[str, int] = {}
    with writing(target), closing(writer):
        writer.write_header_to_file(part)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            data = tensor.read().contiguous().view(torch.uint8).numpy()
            sums[tensor.name] = crc32(data.data)
            writer.write_tensor_data(data)
    with writing(target):
        found = {tensor.name: crc32(tensor.data.data) for tensor in gguf.GGUFReader(part).tensors}
    if found != sums:
        raise OutputError(f"{target} reads back changed", "check the disk, and run again")


def _check_target(target: Path) -> None:
    """Refuse a target that is no file, or would not be found."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder", f"give a file, such as {target / 'model.gguf'}")
    if target.suffix != ".gguf":
        raise OutputError(
            f"{target} does not end in .gguf", f"give a name such as {target.name}.gguf"
        )
