"""The calibration flow against plain forwards, hooks and float64: on the zoo and on odd models."""

import copy
import gc

import pytest
import torch
import zoo
from core.checks import solved
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import DynamicCache

from optq.core.precision import exact_products
from optq.core.rtn import RTN
from optq.errors import ModelError, NumericsError
from optq.model import activations
from optq.model.batch import Batch
from optq.model.blocks import find_blocks
from optq.model.flow import Flow
from optq.model.weights import Weights

CPU = torch.device("cpu")
WIDTH = 32
BRANCH = 7  # the token that takes another way in models that branch


class Run:
    """One run of the flow, and all that a bystander can see of it."""

    def __init__(self, model, batches, solve=None, propagate=False, skip=None, **options):
        self.model, self.batches = model, batches
        self.blocks = find_blocks(model, skip)
        self.sites, self.inputs, self.finished = [], [], []
        self.outcomes = {}  # (kind, first sample) -> what the head would have read
        self.forwards = [0] * len(self.blocks)
        self.own_solve = solve
        self.weights = Weights(model, self.blocks, CPU)
        self.flow = Flow(
            model,
            self.blocks,
            batches,
            self.weights,
            self._solve,
            lambda block, error: self.finished.append(block),
            propagate,
            **options,
        )
        handles = [model.get_output_embeddings().register_forward_pre_hook(self._at_head)]
        for block in self.blocks:
            handles.append(block.module.register_forward_pre_hook(self._at_block(block.index)))
        try:
            self.flow.run()
        finally:
            for handle in handles:
                handle.remove()

    def _solve(self, sites):
        for site, inputs in sites:
            self.sites.append(site)
            self.inputs.append(inputs)
            if self.own_solve is not None:
                self.own_solve(site, inputs)
            else:
                quantize(site, inputs)

    def _at_head(self, module, args):
        batch = getcurrent()
        if isinstance(batch, Batch):
            self.outcomes[batch.kind, batch.first_sample] = args[0].detach().clone()

    def _at_block(self, index):
        def hook(module, args):
            self.forwards[index] += 1

        return hook

    def site_names(self, index):
        block = self.blocks[index]
        return tuple(
            tuple(layer.name.removeprefix(block.name + ".") for layer in site.layers)
            for site in self.sites
            if site.block is block
        )


def quantize(site, inputs):
    for layer in site.layers:
        layer.put(solved(RTN(3), layer.weight.float(), inputs.H).weight)


def at_head(model, ids):
    """What the output embedding reads in a plain forward."""
    seen = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, args: seen.append(args[0].clone())
    )
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    handle.remove()
    return seen[0]


def hook_count(model):
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def living_batches():
    return [o for o in gc.get_objects() if type(o) is Batch and o and not o.dead]


def check_outcomes(run, original=None):
    start = 0
    for ids in run.batches:
        assert torch.equal(run.outcomes["quantized", start], at_head(run.model, ids))
        if original is not None:
            assert torch.equal(run.outcomes["full", start], at_head(original, ids))
        start += len(ids)


BATCHES = [zoo.token_ids(2, 24), zoo.token_ids(1, 24, seed=1)]
every_model = pytest.mark.parametrize("row", zoo.ROWS + zoo.MULTIMODAL, ids=lambda row: row.name)


@every_model
def test_one_pass_gives_the_sites_and_the_bits_of_a_plain_forward(row):
    model = row.build()
    before = copy.deepcopy(model)
    hooks = hook_count(model)
    run = Run(model, BATCHES)
    assert hook_count(model) == hooks and not living_batches()
    assert [block.name for block in run.finished] == [block.name for block in run.blocks]

    for block in run.blocks:
        assert block.name == f"{row.blocks}.{block.index}"
        assert run.site_names(block.index) == row.sites_of(block.index)
        unsolved = [layer.name for layer in block.layers if not layer.solved]
        assert unsolved == [f"{block.name}.{name}" for name in row.never_called]
        assert all(layer.calls == int(layer.solved) for layer in block.layers)
    assert run.forwards == [len(BATCHES) + 1] * len(run.blocks)  # and the one-sample dry run
    assert all(inputs.tokens == 3 * 24 and inputs.drift is None for inputs in run.inputs)
    check_outcomes(run)
    start = ("quantized", 0)
    assert not torch.equal(run.outcomes[start], at_head(before, BATCHES[0])), "not quantized"


@every_model
def test_two_streams_are_the_quantized_and_the_untouched_model(row):
    model = row.build()
    original = copy.deepcopy(model)
    run = Run(model, BATCHES, propagate=True)
    for block in run.blocks:
        assert run.site_names(block.index) == row.sites_of(block.index)
    assert run.forwards == [2 * len(BATCHES) + 1] * len(run.blocks)
    check_outcomes(run, original)
    assert not run.weights._originals
    assert not living_batches()
    # Up to the first quantized site both streams read the same.
    first, last = run.inputs[0], run.inputs[-1]
    assert not first.drift.any() and last.drift.any()


@every_model
def test_a_block_with_other_weights_is_passed_again_by_the_quantized_stream(row):
    model = row.build()
    original = copy.deepcopy(model)
    blocks, changes = [], [True, False]

    def tune(block, passages):
        blocks.append(block.index)
        assert len(passages) == len(BATCHES)
        for own, full in passages:
            assert own.whole and full.whole
            torch.testing.assert_close(block.module(*own.args, **own.kwargs), own.made)
        if changes[block.index % 2]:
            for layer in block.layers:
                layer.put(layer.weight * 0.75)
        return changes[block.index % 2]

    run = Run(model, BATCHES, tune=tune)
    assert blocks == [block.index for block in run.blocks]
    assert all(inputs.drift is None for inputs in run.inputs)  # nothing is propagated
    check_outcomes(run, original)
    assert all(layer.calls <= 1 for block in run.blocks for layer in block.layers)
    assert not run.weights._originals and not living_batches()


# Synthetic models, for what the zoo does not exercise.


def linear():
    return nn.Linear(WIDTH, WIDTH, bias=False)


class Decoder(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.embed = nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, ids):
        h = self.embed(ids)
        for block in self.blocks:
            h = block(h, ids)
        return h


class Tiny(nn.Module):
    def __init__(self, *blocks, around=None):
        super().__init__()
        self.decoder = Decoder(blocks)
        self.head = nn.Linear(WIDTH, 64, bias=False)

    def get_decoder(self):
        return self.decoder

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        assert use_cache is False
        return self.head(self.decoder(input_ids))


class Block(nn.Module):
    """A block out of a function of itself, its input and the token ids."""

    def __init__(self, act, **modules):
        super().__init__()
        self.act = act
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, h, ids):
        return self.act(self, h, ids)


def plain():
    return Block(lambda self, h, ids: h + self.a(h), a=linear())


def ids_of(*rows):
    return torch.tensor(rows)


IDS = [ids_of([1, 2, 3, 4], [5, 6, 8, 9]), ids_of([10, 11, 12, 13])]


def test_equal_but_distinct_tensors_are_two_sites():
    block = Block(lambda self, h, ids: self.a(h) + self.b(h.clone()), a=linear(), b=linear())
    run = Run(Tiny(block), IDS)
    assert run.site_names(0) == (("a",), ("b",))
    assert torch.equal(run.inputs[0].H, run.inputs[1].H)
    check_outcomes(run)


def test_a_tensor_changed_in_place_between_two_readers_is_two_sites():
    def act(self, h, ids):
        x = 2 * h
        first = self.a(x)
        x.add_(1)
        return first + self.b(x) + self.c(x)

    run = Run(Tiny(Block(act, a=linear(), b=linear(), c=linear())), IDS)
    assert run.site_names(0) == (("a",), ("b", "c"))
    assert not torch.allclose(run.inputs[0].H, run.inputs[1].H)
    check_outcomes(run)


def test_one_tensor_read_again_after_another_site_is_still_one_site():
    block = Block(
        lambda self, h, ids: self.a(h) + self.b(self.c(h)) + self.d(h),
        **{name: linear() for name in "abcd"},
    )
    run = Run(Tiny(block), IDS)
    assert run.site_names(0) == (("a", "c", "d"), ("b",))
    check_outcomes(run)


def test_a_freed_address_used_again_is_another_site():
    def act(self, h, ids):
        total = torch.zeros_like(h)
        for layer in self.layers:
            x = h * 1.0  # each freed before the next: the allocator gives the same memory
            total += layer(x)
            del x
        return total

    block = Block(act, layers=nn.ModuleList(linear() for _ in range(6)))
    # Two lists of modules: the outermost one holds the blocks.
    run = Run(Tiny(block, plain()), IDS)
    assert run.site_names(0) == tuple((f"layers.{index}",) for index in range(6))
    check_outcomes(run)


def test_keyword_arguments_of_layers_are_read():
    block = Block(lambda self, h, ids: self.a(input=h) + self.b(h), a=linear(), b=linear())
    run = Run(Tiny(block), IDS)
    assert run.site_names(0) == (("a", "b"),)


def test_a_layer_belongs_to_its_first_call():
    block = Block(lambda self, h, ids: self.a(self.b(self.a(h))), a=linear(), b=linear())
    model = Tiny(block, plain())
    reads = []
    handle = block.a.register_forward_pre_hook(
        lambda module, args: reads.append(args[0]) if getcurrent().kind != "scout" else None
    )
    run = Run(model, IDS)
    handle.remove()
    assert run.site_names(0) == (("a",), ("b",))
    assert [layer.calls for layer in run.blocks[0].layers] == [2, 1]
    assert len(reads) == 2 * len(IDS)
    assert run.inputs[0].tokens == sum(ids.numel() for ids in IDS)
    x = model.decoder.embed(torch.cat([ids.flatten() for ids in IDS])).detach()
    torch.testing.assert_close(run.inputs[0].H, x.T @ x / len(x))
    check_outcomes(run)


def shared_model():
    shared = linear()
    blocks = [
        Block(lambda self, h, ids: h + self.a(self.b(h)), a=linear(), b=shared) for _ in range(3)
    ]
    return Tiny(*blocks)


@pytest.mark.parametrize("propagate", [False, True])
def test_a_module_shared_between_blocks_is_solved_once(propagate):
    model = shared_model()
    original = copy.deepcopy(model)
    run = Run(model, IDS, propagate=propagate)
    assert [run.site_names(i) for i in range(3)] == [(("b",), ("a",)), (("a",),), (("a",),)]
    assert run.blocks[0].layers[1].calls == 3
    check_outcomes(run, original if propagate else None)


def test_autocast_of_a_forward_does_not_leak():
    states = []

    def act(self, h, ids):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
            h = self.b(self.a(h))
            states.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        assert not torch.is_autocast_enabled("cpu")
        return h.float()

    seen = []

    def solve(site, inputs):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32
        quantize(site, inputs)

    blocks = [Block(act, a=linear(), b=linear()) for _ in range(2)]
    run = Run(Tiny(*blocks), IDS, solve)
    assert seen == [(False, False)] * 4
    assert states == [(True, torch.bfloat16)] * len(states) and len(states) == 12
    assert not torch.is_autocast_enabled("cpu") and torch.is_grad_enabled()
    check_outcomes(run)


@pytest.mark.parametrize("propagate", [False, True])
def test_autocast_around_all_blocks_reads_the_quantized_weights(propagate):
    """Autocast keeps casts of weights until its outermost region ends: those must not be stale."""

    class Around(Tiny):
        def forward(self, input_ids, use_cache):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(input_ids, use_cache)

    blocks = [Block(lambda self, h, ids: h + self.b(self.a(h)), a=linear(), b=linear())]
    model = Around(*blocks, plain())
    original = copy.deepcopy(model)
    run = Run(model, IDS, propagate=propagate)
    check_outcomes(run, original if propagate else None)
    assert not torch.is_autocast_enabled("cpu")


def test_no_gradients_inside_and_the_callers_mode_afterwards():
    inside = []

    def act(self, h, ids):
        inside.append(torch.is_grad_enabled() or torch.is_inference_mode_enabled())
        with torch.enable_grad():
            y = self.a(h)
            inside.append(not torch.is_grad_enabled())
        inside.append(torch.is_grad_enabled())
        return y.detach()

    grads = []
    run = Run(
        Tiny(Block(act, a=linear()), plain()),
        IDS,
        lambda site, inputs: grads.append(torch.is_grad_enabled()) or quantize(site, inputs),
    )
    assert not any(inside) and not any(grads) and torch.is_grad_enabled()
    assert not run.outcomes["quantized", 0].requires_grad


def test_matmul_precision_stays_the_callers():
    with exact_products():
        before = torch.get_float32_matmul_precision()
        Run(Tiny(plain()), IDS)
        assert torch.get_float32_matmul_precision() == before


def test_a_live_cache_is_refused():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = linear()

        def forward(self, h, ids, past=None):
            return self.a(h)

    class Model(Tiny):
        def forward(self, input_ids, use_cache):
            h = self.decoder.embed(input_ids)
            for block in self.decoder.blocks:
                h = block(h, input_ids, past=DynamicCache())
            return self.head(h)

    model = Model(Caching(), Caching())
    with pytest.raises(ModelError, match=r"decoder\.blocks\.0 is given a key-value cache"):
        Run(model, IDS)
    assert hook_count(model) == 0 and not living_batches()


@pytest.mark.parametrize("error", [RuntimeError("solver"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("when", [0, 3])
def test_an_error_in_solve_unwinds_every_batch(error, propagate, when):
    unwound = []

    def act(self, h, ids):
        try:
            h = self.b(self.a(h))
        finally:
            unwound.append(1)
        return h

    count = 0

    def solve(site, inputs):
        nonlocal count
        if count == when:
            raise error
        count += 1
        quantize(site, inputs)

    model = Tiny(*(Block(act, a=linear(), b=linear()) for _ in range(3)))
    with pytest.raises(type(error)) as caught:
        Run(model, IDS, solve, propagate)
    assert caught.value is error
    assert hook_count(model) == 0 and not living_batches()
    batches = len(IDS) * (2 if propagate else 1)
    # The scout is a block ahead of the batches.
    assert len(unwound) == (batches + 1) * (1 + when // 2)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [RuntimeError("model"), KeyboardInterrupt()], ids=repr)
def test_an_error_in_a_forward_unwinds_every_batch(error):
    def act(self, h, ids):
        if BRANCH in ids:
            raise error
        return self.a(h)

    model = Tiny(plain(), Block(act, a=linear()))
    with pytest.raises(type(error)):
        Run(model, [*IDS, ids_of([1, 2, BRANCH, 3])])
    assert hook_count(model) == 0 and not living_batches()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("propagate", [False, True])
def test_nan_in_an_activation_names_block_layer_and_sample(value, propagate):
    def act(self, h, ids):
        x = self.a(h)
        return self.b(torch.where((ids == BRANCH)[..., None], value, x))

    model = Tiny(plain(), Block(act, a=linear(), b=linear()))
    batches = [*IDS, ids_of([1, 2, 3, 4], [1, BRANCH, 3, 4])]
    with pytest.raises(NumericsError) as caught:
        Run(model, batches, propagate=propagate)
    assert "decoder.blocks.1.b (block 1)" in caught.value.cause
    assert "sample 4" in caught.value.cause
    assert not living_batches() and hook_count(model) == 0


def routed(self, h, ids):
    """Tokens BRANCH go through ``b``, all go through ``a`` and ``c``: the way of an expert."""
    h = h + self.a(h)
    chosen = ids == BRANCH
    if chosen.any():
        h = h.clone()
        h[chosen] = self.b(h[chosen])
    return h + self.c(h)


def routed_model():
    return Tiny(*(Block(routed, a=linear(), b=linear(), c=linear()) for _ in range(2)))


WITH_BRANCH = [
    ids_of([1, 2, BRANCH, 4], [5, 6, 8, 9]),
    ids_of([1, 2, 3, 4]),
    ids_of([10, BRANCH, BRANCH, 13]),
]


def test_nan_for_a_routed_token_is_named_too():
    model = routed_model()
    with torch.no_grad():
        model.decoder.embed.weight[BRANCH] = float("nan")

    def act(self, h, ids):
        chosen = ids == BRANCH
        if chosen.any():
            return h + 0 * self.b(h[chosen]).nansum()
        return h

    # Four tokens of three samples: they do not divide into samples.
    model.decoder.blocks = nn.ModuleList([Block(act, b=linear()), plain()])
    with pytest.raises(NumericsError, match=r"decoder\.blocks\.0\.b \(block 0\)"):
        Run(model, [ids_of([1, BRANCH, BRANCH, 4], [5, 6, BRANCH, 9], [BRANCH, 1, 2, 3])])


@pytest.mark.parametrize("propagate", [False, True])
def test_a_batch_that_never_reaches_a_site_holds_nobody_up(propagate):
    model = routed_model()
    original = copy.deepcopy(model)
    run = Run(model, WITH_BRANCH, propagate=propagate)
    for index in range(2):
        assert run.site_names(index) == (("a",), ("b",), ("c",))
    assert [inputs.tokens for inputs in run.inputs] == 2 * [16, 3, 16]
    check_outcomes(run, original if propagate else None)


def test_no_sample_reaches_a_layer():
    run = Run(routed_model(), IDS)
    assert [run.site_names(i) for i in range(2)] == [(("a",), ("c",))] * 2
    assert [layer.solved for layer in run.blocks[0].layers] == [True, False, True]
    check_outcomes(run)


def test_a_site_that_the_scout_did_not_see():
    """It is solved from the batches that reach it, and what comes after it still sees all."""
    batches = [IDS[0], *WITH_BRANCH]
    run = Run(routed_model(), batches)
    for index in range(2):
        assert sorted(run.site_names(index)) == [("a",), ("b",), ("c",)]
    tokens = {
        layer.name: inputs.tokens
        for site, inputs in zip(run.sites, run.inputs, strict=True)
        for layer in site.layers
    }
    for index in range(2):
        assert tokens[f"decoder.blocks.{index}.a"] == 24
        assert tokens[f"decoder.blocks.{index}.b"] == 3
        assert tokens[f"decoder.blocks.{index}.c"] == 24, "a batch at a late site was left out"
    check_outcomes(run)


def tokens_of_layers(run):
    """How many tokens each layer was solved from, by its name in the block."""
    return {
        layer.name.removeprefix("decoder.blocks.0."): inputs.tokens
        for site, inputs in zip(run.sites, run.inputs, strict=True)
        for layer in site.layers
    }


def two_ways(order):
    """A block that takes way ``a`` or, for a batch with BRANCH, way ``b``; then all take ``c``."""

    def act(self, h, ids):
        for name in ["b1", "b2", "b3", "b4"] if BRANCH in ids else ["a"]:
            h = h + getattr(self, name)(h)
        return self.c(h)

    names = {"a": ("a",), "b": ("b1", "b2", "b3", "b4"), "c": ("c",)}
    return Block(act, **{name: linear() for way in order for name in names[way]})


A_FIRST = [IDS[0], ids_of([1, BRANCH, 3, 4]), IDS[1], ids_of([BRANCH, 2, 3, 4])]
B_FIRST = [A_FIRST[1], A_FIRST[0], A_FIRST[3], A_FIRST[2]]


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("batches", [A_FIRST, B_FIRST], ids=["a", "b"])
@pytest.mark.parametrize("order", ["abc", "bac", "cba", "cab"])
def test_what_all_reach_is_solved_from_all_whichever_way_the_scout_took(order, batches, propagate):
    model = Tiny(two_ways(order))
    original = copy.deepcopy(model)
    run = Run(model, batches, propagate=propagate)
    assert tokens_of_layers(run) == {"a": 12, "b1": 8, "b2": 8, "b3": 8, "b4": 8, "c": 20}
    check_outcomes(run, original if propagate else None)


@pytest.mark.parametrize("batches, order", [(A_FIRST, "acb"), (B_FIRST, "bca")])
def test_an_order_that_neither_scout_nor_module_tree_tells_is_refused(batches, order):
    """The way not seen is registered behind what all take: it could as well come after it."""
    with pytest.raises(ModelError, match=r"blocks\.0\.c is reached by some samples after it was"):
        Run(Tiny(two_ways(order)), batches)
    assert not living_batches()


@pytest.mark.parametrize("missed", ["ab", "b", "a", ""])
def test_steps_that_only_some_batches_take_are_solved_from_all_that_take_them(missed):
    def act(self, h, ids):
        if 7 in ids:
            h = h + self.a(h)
        if 8 in ids:
            h = h + self.b(h)
        return self.c(h)

    first = {"ab": [1, 2], "b": [7, 2], "a": [1, 8], "": [7, 8]}[missed]
    batches = [ids_of(first), ids_of([1, 8]), ids_of([7, 1]), ids_of([7, 8])]
    run = Run(Tiny(Block(act, **{name: linear() for name in "abc"})), batches)
    expected = {"c": 8, "a": 4 + 2 * (7 in first), "b": 4 + 2 * (8 in first)}
    assert tokens_of_layers(run) == expected
    check_outcomes(run)


class Experts(nn.Module):
    """Top-1: each token goes to the expert of its number. ``order`` is that of registration."""

    def __init__(self, order):
        super().__init__()
        for name in order:
            experts = nn.ModuleList(
                nn.ModuleDict({"up": linear(), "down": linear()}) for _ in range(5)
            )
            self.add_module(name, experts if name == "experts" else linear())

    def forward(self, h, ids):
        h = h + self.o(h) * self.gate(h)
        for number, expert in enumerate(self.experts):
            chosen = ids % 5 == number
            if chosen.any():
                h = h.clone()
                h[chosen] += expert["down"](expert["up"](h[chosen]))
        return h + self.shared(h)


@pytest.mark.parametrize("seen", [[2], [0], [4], [1, 3]], ids=str)
@pytest.mark.parametrize(
    "order",
    [
        ("o", "gate", "experts", "shared"),
        ("o", "experts", "gate", "shared"),
        ("experts", "o", "shared", "gate"),
        ("shared", "o", "gate", "experts"),
    ],
    ids=lambda order: order[0] + order[1],
)
def test_experts_that_the_scout_missed_are_solved_from_all_their_tokens(order, seen):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.tensor([[*seen, seen[0] + 5]])]
    batches += [torch.randint(60, (1, 3), generator=generator) for _ in range(12)]
    run = Run(Tiny(Experts(order)), batches)
    numbers = torch.cat([ids.flatten() for ids in batches]) % 5
    expected = dict.fromkeys(("o", "gate", "shared"), len(numbers))
    for number in range(5):
        for name in ("up", "down"):
            expected[f"experts.{number}.{name}"] = int((numbers == number).sum())
    assert tokens_of_layers(run) == expected
    assert all(layer.calls == 1 for layer in run.blocks[0].layers)
    check_outcomes(run)


def test_an_order_that_depends_on_the_text_is_refused():
    def act(self, h, ids):
        return self.b(self.a(h)) if BRANCH in ids else self.a(self.b(h))

    with pytest.raises(
        ModelError, match=r"blocks\.0\.[ab] is reached by some samples after it was"
    ):
        Run(Tiny(Block(act, a=linear(), b=linear())), [IDS[0], ids_of([1, BRANCH])])
    assert not living_batches()


def test_calls_are_those_of_the_batch_that_makes_most():
    def act(self, h, ids):
        h = self.a(h)
        return self.b(self.b(self.a(h))) if BRANCH in ids else h

    block = Block(act, a=linear(), b=linear(), c=linear())
    run = Run(Tiny(block), [IDS[0], ids_of([1, BRANCH])])
    assert [layer.calls for layer in run.blocks[0].layers] == [2, 2, 0]
    assert [layer.solved for layer in run.blocks[0].layers] == [True, True, False]
    check_outcomes(run)


def test_a_layer_whose_first_call_is_outside_its_block_stays_dense():
    """It has no place among the sites of a block; all others are solved."""

    class Early(Tiny):
        def forward(self, input_ids, use_cache):
            h = self.decoder.embed(input_ids)
            h = h + self.decoder.blocks[0].a(h)
            for block in self.decoder.blocks:
                h = block(h, input_ids)
            return self.head(h)

    act = lambda self, h, ids: h + self.b(self.a(h))  # noqa: E731
    run = Run(Early(Block(act, a=linear(), b=linear()), plain()), IDS)
    assert [run.site_names(index) for index in range(2)] == [(("b",),), (("a",),)]
    check_outcomes(run)


def test_a_shared_module_that_its_own_block_does_not_call_is_solved_with_the_next():
    shared = linear()
    first = Block(lambda self, h, ids: h + self.a(h), a=linear(), b=shared)
    second = Block(lambda self, h, ids: h + self.a(self.b(h)), a=linear(), b=shared)
    run = Run(Tiny(first, second), IDS)
    names = [[layer.name for layer in site.layers] for site in run.sites]
    assert names == [["decoder.blocks.0.a"], ["decoder.blocks.0.b"], ["decoder.blocks.1.a"]]
    check_outcomes(run)


def test_the_input_of_a_layer_is_found_among_keywords_by_its_name():
    class Scaled(nn.Linear):
        def forward(self, input, scale):
            return super().forward(input) * scale

    layer = Scaled(WIDTH, WIDTH, bias=False)
    block = Block(lambda self, h, ids: self.a(scale=h.mean(), input=h), a=layer)
    run = Run(Tiny(block), IDS)
    assert [inputs.tokens for inputs in run.inputs] == [12]


def test_routed_tokens_without_names_have_no_drift():
    """As many in both streams, but which ones? Those of ``a`` and ``c`` are all of the batch."""
    run = Run(routed_model(), WITH_BRANCH, propagate=True)
    drifted = {
        layer.name.split(".", 2)[2]: bool(inputs.drift.any())
        for site, inputs in zip(run.sites, run.inputs, strict=True)
        for layer in site.layers
    }
    assert drifted == {
        "0.a": False,
        "0.b": False,
        "0.c": True,
        "1.a": True,
        "1.b": False,
        "1.c": True,
    }


def test_a_layer_that_only_the_full_precision_stream_reaches_is_not_solved():
    """Without inputs of the quantized model there is nothing to solve it from."""

    def act(self, h, ids):
        x = self.a(h)
        return self.c((self.b(h.clone()) if x.abs().sum() > 0 else h) + 1)

    def solve(site, inputs):
        assert inputs.tokens > 0
        for layer in site.layers:
            layer.put(torch.zeros_like(layer.weight))

    block = Block(act, a=linear(), b=linear(), c=linear())
    run = Run(Tiny(block), IDS, solve, propagate=True)
    assert [layer.solved for layer in run.blocks[0].layers] == [True, False, True]


def test_a_site_whose_layers_part_for_some_samples_is_refused():
    def act(self, h, ids):
        return self.a(h) + self.b(h.clone() if BRANCH in ids else h)

    with pytest.raises(ModelError, match=r"blocks\.0\.b reads another tensor than .*blocks\.0\.a"):
        Run(Tiny(Block(act, a=linear(), b=linear())), [IDS[0], ids_of([1, BRANCH])])


def test_a_block_called_again_after_others_is_refused():
    class Loop(Tiny):
        def forward(self, input_ids, use_cache):
            h = self.decoder(input_ids)
            for block in self.decoder.blocks:
                h = block(h, input_ids)
            return self.head(h)

    model = Loop(plain(), plain())
    with pytest.raises(ModelError, match=r"decoder\.blocks\.0 is called again"):
        Run(model, IDS)
    assert not living_batches()


def test_a_model_that_rescales_its_weights_is_refused():
    row = next(row for row in zoo.REFUSED if row.name == "rwkv")
    model = row.build()
    with pytest.raises(ModelError, match=r"the model changes .* while it runs"):
        Run(model, BATCHES)
    assert hook_count(model) == 0 and not living_batches()


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "llama_bfloat16"])
@pytest.mark.parametrize("propagate", [False, True])
def test_the_hessian_is_that_of_the_inputs(name, propagate):
    model = next(row for row in zoo.ROWS if row.name == name).build()
    reads = {}

    def watch(layer):
        def hook(module, args):
            kind = getcurrent().kind
            if kind != "scout":
                x = args[0].detach().double().reshape(-1, args[0].shape[-1])
                reads.setdefault((layer.name, kind), []).append(x)

        return hook

    handles = [
        layer.module.register_forward_pre_hook(watch(layer))
        for block in find_blocks(model)
        for layer in block.layers
    ]
    run = Run(model, BATCHES, propagate=propagate)
    for handle in handles:
        handle.remove()
    for site, inputs in zip(run.sites, run.inputs, strict=True):
        for layer in site.layers:
            X = torch.cat(reads[layer.name, "quantized"])
            assert inputs.tokens == len(X) == 72
            exact = X.T @ X / len(X)
            size = exact.diagonal().mean()
            assert inputs.H.dtype == torch.float32 and torch.equal(inputs.H, inputs.H.T)
            assert (inputs.H - exact).abs().max() < 1e-5 * size
            if propagate:
                full = torch.cat(reads[layer.name, "full"])
                drift = (full - X).T @ X / len(X)
                rounded = 2**-8 if name == "llama_bfloat16" else 1e-5
                assert (inputs.drift - drift).abs().max() <= rounded * drift.abs().max()


def test_skipped_layers_are_left_alone():
    row = next(row for row in zoo.ROWS if row.name == "llama")
    model = row.build()
    before = copy.deepcopy(model)
    run = Run(model, BATCHES, skip=r"k_proj|layers\.0\.mlp\.down")
    qv = ("self_attn.q_proj", "self_attn.v_proj")
    assert run.site_names(0) == (qv, *row.sites[1:3])
    assert run.site_names(1) == (qv, *row.sites[1:])
    for name, parameter in model.named_parameters():
        touched = any(
            name == f"{layer.name}.weight" for block in run.blocks for layer in block.layers
        )
        assert touched != torch.equal(parameter, before.get_parameter(name)), name
    check_outcomes(run)


def test_strides_of_weights_stay():
    model = next(row for row in zoo.ROWS if row.name == "gpt2").build()
    before = {name: (p.stride(), id(p)) for name, p in model.named_parameters()}
    Run(model, BATCHES)
    assert {name: (p.stride(), id(p)) for name, p in model.named_parameters()} == before


def test_hooks_do_nothing_outside_the_flow():
    """Another greenlet, or none, may use the model while the flow's hooks are on it."""
    model = Tiny(plain(), plain())
    seen = []

    def solve(site, inputs):
        seen.append(model(input_ids=IDS[0], use_cache=False))
        seen.append(greenlet(lambda: model(input_ids=IDS[0], use_cache=False)).switch())

    run = Run(model, IDS, solve)
    assert len(seen) == 4 and torch.equal(seen[0], seen[1])
    check_outcomes(run)


@every_model
def test_where_nothing_fits_into_memory_every_sum_is_the_same(row, tmp_path):
    plain = Run(row.build(), BATCHES, propagate=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SMALL", 1)
        held = activations.Activations(CPU, 0, tmp_path)
        away = Run(row.build(), BATCHES, propagate=True, activations=held)
    assert held.most["files"] > 0 and not any(tmp_path.iterdir())
    same_sums(plain, away)


@pytest.mark.parametrize("propagate", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon"])
def test_a_block_that_lacks_memory_is_called_again(name, propagate):
    (row,) = [row for row in zoo.ROWS if row.name == name]
    plain = Run(row.build(), BATCHES, propagate=propagate)
    model, failed = row.build(), []

    def lacking(module, args, output):
        batch = getcurrent()
        if isinstance(batch, Batch) and batch.kind != "scout" and batch.kind not in failed:
            failed.append(batch.kind)
            raise torch.OutOfMemoryError("CUDA out of memory")

    block = find_blocks(model)[0].module
    parts = [module for module in block.modules() if not list(module.children())]
    parts[-1].register_forward_hook(lacking)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SMALL", 1)
        again = Run(model, BATCHES, propagate=propagate)
    assert len(failed) == (2 if propagate else 1)
    same_sums(plain, again)


def test_a_block_that_lacks_memory_and_changes_its_input_is_not_called_again():
    model = zoo.ROWS[0].build()
    block = find_blocks(model)[0].module

    def lacking(module, args, output):
        if isinstance(getcurrent(), Batch) and getcurrent().kind == "quantized":
            args[0].mul_(2)
            raise torch.OutOfMemoryError("CUDA out of memory")

    first = next(module for module in block.modules() if not list(module.children()))
    first.register_forward_hook(lacking)  # a norm, which reads what the block was called with
    with pytest.raises(torch.OutOfMemoryError):
        Run(model, BATCHES)
    assert not living_batches() and "forward" not in block.__dict__


def same_sums(one, other):
    for before, after in zip(one.inputs, other.inputs, strict=True):
        assert torch.equal(before.H, after.H) and before.tokens == after.tokens
        assert (before.drift is None) or torch.equal(before.drift, after.drift)
    for key, value in one.outcomes.items():
        assert torch.equal(other.outcomes[key], value)
