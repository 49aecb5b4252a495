"""Export a quantized checkpoint as one GGUF file, which llama.cpp and what is built on it run.

Quantized layers keep their codes, in the blocks of :mod:`optq.formats.gguf_blocks`. Norms and
biases become float32; every other tensor keeps its dtype and its bits.

llama.cpp turns neighbouring features (2i, 2i + 1) in a Llama's rotary embedding, transformers
features (i, i + d/2): the rows of q and k are reordered to match. A row's codes stay as they are.

Container, names and keys are the package ``gguf``'s. Rejected: llama.cpp's converter, which
dequantizes a checkpoint, and its quantizer, which then rounds a second time, to other scales.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable
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
from optq.errors import ModelError, OutputError
from optq.formats import detect
from optq.formats.gguf_blocks import choose, encode
from optq.formats.gguf_vocabulary import add_vocabulary
from optq.formats.reader import packed_tensors, quantized_layers, read_layer
from optq.formats.whole import Whole, writing
from optq.model.checkpoint import TOGETHER, Checkpoint
from optq.model.source import disk_names, empty_model, load_tokenizer

FAMILIES = {  # by the model_type of config.json
    "llama": MODEL_ARCH.LLAMA,
    "mistral": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
}
DENSE = {torch.float16: Kind.F16, torch.bfloat16: Kind.BF16, torch.float32: Kind.F32}


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
) -> dict[str, Any]:
    """Write ``checkpoint`` to the file ``target``, which appears only when it is whole.

    ``notice`` is told of what a run that was cut off has left beside ``target``.

    Returns ``file``, ``bytes``, ``tensors`` (how many of each type), ``minimum_moved``: the
    largest distance by which fp16 moved a minimum ``m`` of Q4_1, as a fraction of its scale, and
    ``left_out``: tensors, if there are any, that neither transformers nor llama.cpp takes.
    Raises :class:`ModelError` for a model that llama.cpp would not run as it is,
    :class:`SettingError` for codes that none of the three types holds, :class:`OutputError`
    where the target exists (without ``force``), is no place for a file, or does not read back.
    """
    _check_target(target)
    detect(checkpoint)  # refuses what nobody can read
    kind = checkpoint.config().get("model_type")
    if kind not in FAMILIES:
        raise ModelError(
            f"a {kind} model cannot be exported to llama.cpp", f"export {', '.join(FAMILIES)}"
        )
    with Whole(target, force, notice) as place:
        return _export(checkpoint, FAMILIES[kind], place)


def _export(checkpoint: Checkpoint, arch: MODEL_ARCH, place: Whole) -> dict[str, Any]:
    model, target = empty_model(checkpoint), place.target
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[arch])
    _add_settings(writer, model.config, arch)
    add_vocabulary(writer, load_tokenizer(checkpoint), model.config)
    tensors, moved, left_out = _tensors(checkpoint, model, arch)
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


def _add_settings(writer: gguf.GGUFWriter, config: Any, arch: MODEL_ARCH) -> None:
    """What llama.cpp computes with. Raises :class:`ModelError` for what it computes otherwise."""
    rope, longest = config.rope_parameters, config.max_position_embeddings
    window = getattr(config, "sliding_window", None)
    kinds = {*(getattr(config, "layer_types", None) or ())}
    local = kinds - {"full_attention"} or (config.model_type == "mistral" and window is not None)
    scalings = {"default", "linear"} | ({"llama3"} if arch == MODEL_ARCH.LLAMA else set())
    heads = config.num_attention_heads
    wide = arch == MODEL_ARCH.QWEN2 and _head_dim(config) * heads != config.hidden_size
    biased = arch == MODEL_ARCH.QWEN3 and config.attention_bias
    for refused, reason in (
        (config.hidden_act != "silu", f"the activation {config.hidden_act}"),
        (local and (window or 0) < longest, f"attention to the last {window} tokens only"),
        (rope["rope_type"] not in scalings, f"rotary scaling of the kind {rope['rope_type']}"),
        (rope.get("partial_rotary_factor", 1) != 1, "rotary embeddings of a part of each head"),
        (wide, "heads that are not as wide together as the model"),
        (biased, "biases in the attention"),
    ):
        if refused:
            raise ModelError(
                f"llama.cpp does not compute {reason} for a {config.model_type} model",
                "run the checkpoint with optq, transformers or vLLM instead",
            )
    writer.add_type("model")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(longest)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_dim(config))
    writer.add_value_length(_head_dim(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


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


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _order(name: str, config: Any, arch: MODEL_ARCH) -> Tensor | slice:
    """The rows of the tensor called ``name`` as llama.cpp wants them, of q and k of a Llama."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if arch != MODEL_ARCH.LLAMA or count is None:
        return slice(None)
    rows = torch.arange(count * _head_dim(config))
    return rows.view(count, 2, -1).transpose(1, 2).reshape(-1)


def _tensors(
    checkpoint: Checkpoint, model: Any, arch: MODEL_ARCH
) -> tuple[list[_Tensor], float, list[str]]:
    """What goes into the file, how far a minimum moves, and what is left out.

    Raises :class:`ModelError` where tensors and config do not belong together.
    """
    config = model.config
    packed = [f"{name}.weight" for name in quantized_layers(checkpoint)]
    in_model = disk_names(model, [*checkpoint.files, *packed])
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    left = {*checkpoint.files} - {*in_model.values(), *packed_tensors(checkpoint)}
    of_packed = [name for name in left if f"{name.rpartition('.')[0]}.weight" in packed]
    added = {name for name, tensor in checkpoint.tensors(of_packed) if tensor.count_nonzero()}
    added |= {*packed} - {*in_model.values()}
    for what, names in (("lacks", {*model.state_dict()} - {*in_model} - tied), ("also has", added)):
        if names:
            raise ModelError(f"{checkpoint.folder} {what} {min(names)}", TOGETHER)
    known = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tensors, farthest = _rotary(config), 0.0
    for place, name in in_model.items():
        if place in tied:
            continue
        rows = _order(place, config, arch)
        if name in packed:
            layer_name = name.removesuffix(".weight")
            layer = read_layer(checkpoint, layer_name)
            kind, moved = choose(layer, layer_name)
            shape, farthest = tuple(layer.codes.shape), max(farthest, moved)
            read = partial(_read_layer, checkpoint, layer_name, kind, rows)
        else:
            ((_, tensor),) = checkpoint.tensors([name])
            kind, shape = _dense_kind(name, tensor), tuple(tensor.shape)
            read = partial(_read_dense, checkpoint, name, kind, rows)
        if shape != (fits := tuple(model.get_parameter(place).shape)):
            raise ModelError(f"{name} is {list(shape)} where {list(fits)} fits", TOGETHER)
        title = known.get_name(place, (".weight", ".bias"))
        assert title is not None, place  # of every tensor of the families above
        tensors.append(_Tensor(title, kind, shape, read))
    return tensors, farthest, sorted(n for n in left if not n.endswith("rotary_emb.inv_freq"))


def _read_layer(checkpoint: Checkpoint, name: str, kind: Kind, rows: Tensor | slice) -> Tensor:
    return encode(read_layer(checkpoint, name), kind)[rows]


def _dense_kind(name: str, tensor: Tensor) -> Kind:
    if tensor.dtype not in DENSE:
        raise ModelError(
            f"{name} is {tensor.dtype}, which llama.cpp does not take".replace("torch.", ""),
            "convert the model to float32, float16 or bfloat16",
        )
    return Kind.F32 if tensor.ndim == 1 else DENSE[tensor.dtype]


def _read_dense(checkpoint: Checkpoint, name: str, kind: Kind, rows: Tensor | slice) -> Tensor:
    ((_, tensor),) = checkpoint.tensors([name])
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
