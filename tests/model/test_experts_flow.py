"""Experts on awkward ways through a model: routers apart, stand-ins, banks met late or twice."""

import copy

import pytest
import torch
import transformers
import zoo
import zoo_configs as configs
from greenlet import getcurrent
from torch import nn

from optq import GPTQ, ModelConfig, Runner
from optq.errors import ModelError
from optq.model.batch import Batch
from optq.model.blocks import find_blocks
from optq.model.flow import Flow
from optq.model.inputs import SiteSums
from optq.model.others import Others
from optq.model.weights import Weights

CPU = torch.device("cpu")
WIDTH = 64


def mixtral(**changes):
    return zoo.Row("mixtral", lambda: configs.mixtral(**changes), "", ()).build()


@pytest.mark.parametrize(
    "config, routers",
    [
        (
            lambda: transformers.HunYuanMoEV1Config(
                **configs._COMMON, num_hidden_layers=2, num_experts=8, moe_topk=2, head_dim=16
            ),
            {"mlp.gate.wg"},
        ),
        (
            lambda: transformers.AfmoeConfig(
                **configs._COMMON,
                num_hidden_layers=2,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=32,
                num_dense_layers=0,
                layer_types=["full_attention"] * 2,
                head_dim=16,
            ),
            {"mlp.router.gate"},
        ),
        (
            lambda: transformers.ZayaConfig(**configs._COMMON, num_hidden_layers=2),
            {f"mlp.gate.{n}" for n in ("down_proj", "router_mlp.fc1", "router_mlp.fc2")}
            | {"mlp.gate.router_mlp.out_proj"},
        ),
    ],
    ids=["hunyuan", "afmoe", "zaya"],
)
def test_a_router_in_a_module_of_its_own_stays_dense(config, routers):
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config())
    block = find_blocks(model)[1]
    assert block.banks
    solved = {layer.name.removeprefix(f"{block.name}.") for layer in block.layers}
    linears = {name.removeprefix(f"{block.name}.") for name in block.linears}
    assert routers <= linears and linears - solved == routers


def test_a_token_of_no_weight_is_no_token_of_an_expert():
    bank = find_blocks(mixtral())[0].banks[0]
    index, weights = torch.tensor([[0, 2], [2, 1]]), torch.tensor([[0.0, 1.0], [0.5, 0.0]])
    index, weights = bank.routing(torch.zeros(2, WIDTH), index, weights)
    assert {e: own.tolist() for e, (_, own) in bank.routed(index).items()} == {2: [1, 0]}


def unreached(tmp_path, dtype):
    """A folder with a Mixtral whose expert 3 no token reaches."""
    model = zoo.without_tokens(mixtral())
    model.to(dtype).save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    return ModelConfig(str(tmp_path / "model"), "cpu")


def test_what_overflows_off_the_model_s_path_is_left_out(tmp_path, monkeypatch):
    sample = Others.sample
    monkeypatch.setattr(Others, "sample", lambda *arguments: 1e30 * sample(*arguments))
    run = Runner(unreached(tmp_path, torch.float32), GPTQ(4, 32), calib=zoo.token_ids(8, 48)).run()
    down = [layer for layer in run.layers if layer.name.endswith("experts.3.down_proj")]
    assert len(down) == 2 and all(layer.tokens == layer.borrowed == 0 for layer in down)


def test_a_float64_model_may_have_experts_without_tokens(tmp_path):
    run = Runner(unreached(tmp_path, torch.float64), GPTQ(4, 32), calib=zoo.token_ids(8, 48)).run()
    assert any(layer.tokens == 0 and layer.borrowed for layer in run.layers)
    assert all(0 < layer.error < layer.rtn_error for layer in run.layers if layer.borrowed)


def test_what_an_expert_borrows_are_not_its_own_tokens():
    sums, every = SiteSums(torch.ones(2, 2), 3), SiteSums(torch.zeros(2, 2), 5)
    mixed = sums.with_others(every, 4, free=2)
    assert mixed.borrowed == 1 and torch.equal(mixed.H, torch.full((2, 2), 0.75))
    assert sums.with_others(every, 100, free=2).borrowed == 2
    assert sums.with_others(SiteSums(sums.H, 3), 100, free=0) is sums  # all are its own


class Toy(nn.Module):
    """Two blocks with experts between two layers; ``call(x, moe, sample)`` calls them."""

    def __init__(self, call):
        super().__init__()
        self.call, self.emb = call, nn.Embedding(16, WIDTH)
        donor = mixtral().model.layers
        self.layers = nn.ModuleList()
        for block in donor:
            module = nn.Module()
            module.a, module.moe, module.c = nn.Linear(WIDTH, WIDTH), block.mlp, nn.Linear(64, 64)
            module.forward = lambda x, ids, m=module: m.c(call(x + m.a(x).tanh(), m.moe, ids))
            self.layers.append(module)
        self.head = nn.Linear(WIDTH, 16)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache=False):
        x = self.emb(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids)
        return self.head(x)


def once(x, moe, ids):
    return x + moe(x)


def twice(x, moe, ids):
    return x + moe(x) + moe(x + 0.1)


def some(x, moe, ids):  # the scout goes by
    return x + moe(x) if (ids == 7).any() else x


def twice_some(x, moe, ids):
    return twice(x, moe, ids) if (ids == 7).any() else once(x, moe, ids)


def run_toy(call):
    torch.manual_seed(0)
    model = Toy(call)
    for parameter in model.parameters():
        parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    ids = torch.randint(0, 6, (4, 8))
    ids[3, 2] = 7
    blocks, order, streams = find_blocks(model), [], {}
    weights = Weights(model, blocks, CPU)

    def solve(sites):
        for site, sums in sites:
            order.append((site.layers[0].name, sums.tokens, len(weights._originals)))
            for layer in site.layers:
                layer.put(layer.weight + 0.1 * layer.weight.std() * torch.randn(layer.shape))

    def at_head(module, args):
        if isinstance(batch := getcurrent(), Batch):
            streams[batch.kind, batch.first_sample] = args[0].clone()

    originals = {name: value.clone() for name, value in model.state_dict().items()}
    model.head.register_forward_pre_hook(at_head)
    Flow(model, blocks, [*ids.split(1)], weights, solve, propagate=True).run()
    with torch.no_grad():
        for kind, state in (("quantized", copy.deepcopy(model.state_dict())), ("full", originals)):
            model.load_state_dict(state)
            for sample in range(4):
                got, seen = streams[kind, sample], []
                hook = model.head.register_forward_pre_hook(lambda _, x, s=seen: s.append(x[0]))
                model(ids[sample : sample + 1])
                hook.remove()
                torch.testing.assert_close(got, seen[0], rtol=1e-4, atol=1e-5)
    return order


@pytest.mark.parametrize("call", [once, twice, some])
def test_both_streams_are_right_however_often_experts_are_called(call):
    order = run_toy(call)
    plain = [(name, tokens) for name, tokens, _ in order if ".moe." not in name]
    assert plain == [(f"layers.{i}.{part}", 32) for i in range(2) for part in "ac"]
    places = [order.index(next(o for o in order if o[0].startswith(f"layers.0.{p}"))) for p in "ac"]
    assert all(places[0] < i < places[1] for i, o in enumerate(order) if "layers.0.moe" in o[0])


def test_what_experts_held_goes_when_all_batches_have_passed_them():
    held = {name: originals for name, _, originals in run_toy(once) if name.startswith("layers.0")}
    bank = "layers.0.moe.experts.0"
    # a; a and the first projections; a and down: the first ones' are gone.
    assert [held[n] for n in ("layers.0.a", f"{bank}.gate_proj", f"{bank}.down_proj")] == [1, 2, 2]


def test_experts_that_only_some_samples_call_again_are_refused():
    with pytest.raises(ModelError, match="called again for some samples"):
        run_toy(twice_some)
