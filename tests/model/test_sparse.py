"""The flow through sparse experts, family by family: its sites, and the bits of a plain forward."""

import copy

import pytest
import torch
import zoo
from model.test_flow import Run, check_outcomes, living_batches
from test_experts import FAMILIES, build

BATCHES = [zoo.token_ids(2, 24), zoo.token_ids(1, 24, seed=1)]


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_experts_are_sites_and_one_pass_has_the_bits_of_a_plain_forward(name, propagate):
    model = build(name)
    model.set_experts_implementation("eager")
    original = copy.deepcopy(model)
    run = Run(model, BATCHES, propagate=propagate)
    assert not living_batches()
    check_outcomes(run, original if propagate else None)
    for block in run.blocks:
        sites = run.site_names(block.index)
        solved = [layer for site in sites for layer in site]
        assert len(solved) == len({*solved}), "a layer is solved twice"
        assert {*solved} == {
            layer.name.removeprefix(f"{block.name}.") for layer in block.layers if layer.solved
        }
        for bank in block.banks:
            own = bank.name.removeprefix(f"{block.name}.")
            inner = [part for part in ("gate_proj", "up_proj") if bank.has_gate or part[0] == "u"]
            expected = [tuple(f"{own}.{expert}.{part}" for part in inner) for expert in range(4)]
            expected += [(f"{own}.{expert}.down_proj",) for expert in range(4)]
            first = sites.index(expected[0])
            assert [*sites[first : first + 8]] == expected
            assert all(torch.isfinite(layer.weight).all() for layer in bank.layers)
