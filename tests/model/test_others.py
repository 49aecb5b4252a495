"""Which tokens stand in for those that an expert lacks."""

import torch
import zoo
import zoo_configs as configs

from optq.model.blocks import Site, find_blocks
from optq.model.inputs import Handed, HandedExperts
from optq.model.others import Others


def others(router=True):
    """Two batches of ten tokens before the four experts of a Mixtral; expert 1 got 2 of each."""
    block = find_blocks(zoo.Row("mixtral", configs.mixtral, "", ()).build())[0]
    bank, generator = block.banks[0], torch.Generator().manual_seed(0)
    if not router:
        block.module.mlp.gate = torch.nn.Identity()
    handed = []
    for first in (0, 1):
        x, ids = torch.randn(1, 10, 64, generator=generator), torch.zeros(1, 10, dtype=torch.long)
        tokens = torch.tensor([3 + first, 7])
        own = Handed(first, ids, x, tokens, lambda x=x, tokens=tokens: x[0, tokens])
        handed.append(HandedExperts(Handed(first, ids, x), {1: own}))
    layers = [layer for own in bank.down for layer in own]
    return Others(Site(block, layers, bank=bank, experts=bank.down), handed), block, handed


def test_they_are_those_that_the_router_likes_best_and_did_not_send():
    found, block, handed = others()
    x = torch.cat([batch.every.x[0] for batch in handed])
    likes = (x @ block.module.mlp.gate.weight.T).softmax(-1)[:, 1].detach()
    likes[[3, 7, 14, 17]] = -1  # its own
    expected = x[likes.argsort(descending=True)[:5].sort().values]
    assert torch.equal(found.sample(1, 5), expected)
    assert len(found.sample(1, 100)) == 16
    assert len(found.sample(0, 100)) == 20  # it has none


def test_without_a_router_they_are_spread_evenly():
    found, _, handed = others(router=False)
    x = torch.cat([batch.every.x[0] for batch in handed])
    assert torch.equal(found.sample(1, 4), x[[0, 5, 10, 15]])
