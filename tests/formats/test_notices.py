"""What is said of readers before the work: which group size would do, and nothing where all do."""

import pytest
import torch
import transformers
import zoo_configs as configs

from optq.core.weight import LayerScheme
from optq.formats import FORMATS
from optq.formats.notices import notices
from optq.model.experts import Bank, is_bank
from optq.model.names import disk_names

NAME = "model.layers.0.mlp.experts.{}.{}_proj.weight"
ON_DISK = [NAME.format(e, part) for e in range(4) for part in ("gate", "up", "down")]


def told(width, scheme, hidden=256, form="compressed-tensors"):
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "num_hidden_layers": 1}
    with torch.device("meta"):
        config = transformers.Qwen3MoeConfig(**configs._COMMON | sizes, num_experts=4)
        model = transformers.Qwen3MoeForCausalLM(config)
    banks = [Bank(name, module) for name, module in model.named_modules() if is_bank(module)]
    lines = notices(FORMATS[form], scheme, model, banks, [], disk_names(model, ON_DISK))
    assert all("\n" not in line for line in lines)
    return lines


def shared(width, group, most, offers):
    return [
        f"vLLM can share these experts' {width} columns in groups of {group} among {most} at most:"
        f" choose {offers}"
    ]


GROUPS = [
    (1024, 128, []),
    (640, 128, shared(640, 128, "1 GPU", "--groupsize 64 for 2, --groupsize 32 for 4")),
    (768, 128, shared(768, 128, "2 GPUs", "--groupsize 64 for 4, --groupsize 32 for 8")),
    (1408, 128, shared(1408, 128, "1 GPU", "--groupsize 64 for 2, --groupsize 32 for 4")),
    (640, 64, shared(640, 64, "2 GPUs", "--groupsize 32 for 4")),
    (640, 32, []),  # no smaller group would help
    (96, 32, []),
    (640, -1, []),
    (
        640,
        16,
        ["vLLM runs these experts without its fast kernel: it takes --groupsize 32, 64, 128"],
    ),
    (1024, 256, ["vLLM runs these experts without its fast kernel: it takes --groupsize 32, 64"]),
]


@pytest.mark.parametrize(("width", "group", "expected"), GROUPS)
def test_groups_that_gpus_share(width, group, expected):
    found = told(width, LayerScheme(4, group, sym=True, actorder=False))
    assert len(found) == len(expected)
    assert all(line.startswith(start) for line, start in zip(found, expected, strict=True))


def test_an_odd_hidden_size():
    found = told(1024, LayerScheme(4, 64, sym=True, actorder=False), hidden=192)
    assert found == [
        "vLLM runs these experts without its fast kernel: their 192 inputs are no multiple of 128"
    ]


@pytest.mark.parametrize(
    ("wbits", "sym", "actorder", "wanted"),
    [
        (3, True, False, "--wbits 4 or 8"),
        (4, False, False, "--sym"),
        (2, False, True, "--wbits 4 or 8 --sym --static-groups"),
    ],
)
def test_experts_that_vllm_does_not_run(wbits, sym, actorder, wanted):
    found = told(1024, LayerScheme(wbits, 128, sym, actorder), form="gptq")
    assert found == [
        "transformers does not read experts from these files: compressed-tensors it does",
        f"vLLM does not run such experts: it wants {wanted}",
    ]


def test_zero_points_of_experts():
    """transformers' loader carries none."""
    found = told(1024, LayerScheme(4, 128, sym=False, actorder=False))
    assert found[0] == "transformers reads experts from these files only if symmetric (--sym)"
