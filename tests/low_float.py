"""Checkpoints of fp8 and MXFP4 weights, coded by hand, as their makers publish them."""

import json

import torch
from safetensors.torch import load_file, save_file

BLOCK = 16, 32
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [*BLOCK]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]}
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # its sign is the fourth bit


def compressed_tensors(strategy):
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    inputs = weights | {"strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights | {"dynamic": False}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group | {"input_activations": inputs}},
    }


def in_blocks(weight, block=BLOCK):
    """Codes and the scale of each block, whose last ones may be smaller."""
    rows, cols = (-(-size // each) for size, each in zip(weight.shape, block, strict=True))
    scales = torch.empty(rows, cols)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(cols):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scales[i, j] = weight[part].float().abs().max() / 448
            codes[part] = (weight[part].float() / scales[i, j]).to(codes.dtype)
    return {"weight": codes, "weight_scale_inv": scales}


def out_of_blocks(codes, scales, block=BLOCK):
    """The weight of codes, row by row."""
    weight = torch.empty(codes.shape, dtype=torch.bfloat16)
    columns = torch.arange(codes.shape[1]) // block[1]
    for row in range(len(codes)):
        weight[row] = codes[row].float() * scales[row // block[0], columns]
    return weight


def by_channel(weight):
    scales = weight.float().abs().amax(1, keepdim=True) / 448
    codes = (weight.float() / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales.to(torch.bfloat16)}


def by_tensor(weight):
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    more = {"input_scale": torch.ones(1, dtype=torch.bfloat16)}
    return {"weight": codes, "weight_scale": scale.reshape(1).to(torch.bfloat16)} | more


def in_mxfp4(weight):
    """Of ``[experts, columns, rows]``: blocks ``[experts, rows, columns / 32, 16]`` and scales."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    values = groups / exponent.exp2()
    codes = (values.abs()[..., None] - FP4).abs().argmin(-1) + 8 * (values < 0)
    blocks = codes[..., 0::2] + 16 * codes[..., 1::2]
    return blocks.to(torch.uint8), (exponent.squeeze(-1) + 127).to(torch.uint8)


def code(folder, settings, how, which):
    """Put codes in the place of the matrices that ``which(name)`` picks."""
    path = folder / "model.safetensors"
    state = {}
    for name, tensor in load_file(path).items():
        module, _, suffix = name.rpartition(".")
        if how is in_mxfp4 and suffix in ("gate_up_proj", "down_proj"):
            state[f"{name}_blocks"], state[f"{name}_scales"] = in_mxfp4(tensor)
        elif how is not in_mxfp4 and suffix == "weight" and tensor.ndim == 2 and which(name):
            state |= {f"{module}.{part}": t.contiguous() for part, t in how(tensor).items()}
        else:
            state[name] = tensor
    save_file(state, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder
