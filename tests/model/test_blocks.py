"""Models that would be half quantized are refused by name."""

import pytest
import torch
from torch import nn

from optq.errors import ModelError, SettingError
from optq.model.blocks import find_blocks


class Block(nn.Module):
    def __init__(self, extra: nn.Module | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        if extra is not None:
            self.extra = extra


class Experts(nn.Module):
    """Experts as one matrix: no third dimension gives them away."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.zeros(rows, 32))


class Model(nn.Module):
    def __init__(self, *lists: list[nn.Module]) -> None:
        super().__init__()
        for index, members in enumerate(lists):
            setattr(self, f"list{index}", nn.ModuleList(members))


def test_experts_in_one_matrix_are_refused():
    with pytest.raises(ModelError, match=r"list0\.0\.extra\.w1 .*experts"):
        find_blocks(Model([Block(Experts(256)), Block(Experts(256))]))


def test_a_router_or_a_table_is_no_expert():
    blocks = find_blocks(Model([Block(Experts(4)), Block(nn.Conv1d(16, 16, 16))]))
    assert [len(block.layers) for block in blocks] == [2, 2]


def test_parts_of_blocks_in_several_lists_are_refused():
    with pytest.raises(ModelError, match="several lists"):
        find_blocks(Model([Block(), Block()], [nn.Linear(32, 32), nn.Linear(32, 32)]))


def test_a_small_second_list_is_not_part_of_the_blocks():
    assert len(find_blocks(Model([Block(), Block()], [nn.Linear(8, 8)]))) == 2


def test_a_skip_that_matches_nothing_is_refused():
    with pytest.raises(SettingError, match="matches no layer"):
        find_blocks(Model([Block(), Block()]), skip="no_such_layer")


class Heads(nn.Module):
    """As in a gated delta net: a number for each of 32 heads from each of two small layers."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(32))
        self.qkv, self.k = nn.Linear(1024, 512), nn.Linear(1024, 128)
        self.a, self.b, self.ba = nn.Linear(1024, 32), nn.Linear(1024, 32), nn.Linear(1024, 64)
        self.wide = nn.Linear(128, 32)


def test_a_layer_that_makes_one_number_for_each_head_stays_dense():
    block = find_blocks(Model([Block(Heads())]))[0]
    names = {layer.name.rpartition(".")[2] for layer in block.layers}
    assert names == {"up", "down", "qkv", "k", "wide"}
    assert {"list0.0.extra.a", "list0.0.extra.b", "list0.0.extra.ba"} <= {*block.linears}
