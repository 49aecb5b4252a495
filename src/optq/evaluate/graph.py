"""Greedy decoding with a fixed place for every key and value, and one CUDA graph to a token.

A decoding step of a small batch is hundreds of short kernels: launched one by one, the launches
take longer than the kernels. A CUDA graph records them once and replays them with one launch. It
replays the same kernels on the same addresses, so everything that changes from token to token must
be the contents of a tensor: the token and its position here, keys, values and their number in
transformers' ``StaticCache``, whose attention runs over all ``longest`` places under a mask made
from the position. The prompt is run as usual, outside the graph.

On a CPU the same object runs the same step without a graph. Rejected: ``torch.compile``'s own
graphs, which compile the model for tens of seconds before the first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WARM_UP = 3  # steps before the capture: lazy set-up and tuning of kernels happen in them


def capturable(model: Any) -> bool:
    """Whether a step of ``model`` can be replayed; where it cannot, use ``model.generate``.

    Decided by trying: a step must read no number back from a tensor, which would stop a capture,
    and be old in a replay. Every layer of the cache must be a plain ``StaticLayer``: recurrent
    layers keep no keys and values, and sliding windows count tokens in a Python number that a
    replay would not advance. With transformers 5.23 Llama, Qwen3, GPT-2, OPT, Bloom, GPT-NeoX,
    GPT-J, Cohere, Phi, OLMo 2, Granite, GLM 4 and Nemotron can; Gemma and others with sliding
    windows, Falcon with rotary positions, MPT, GPT-Neo, and rotary tables that depend on the
    length (``dynamic``, ``longrope``) cannot. Runs two steps of the model on its own device.
    """
    from transformers.cache_utils import StaticLayer

    if not getattr(model, "_can_compile_fullgraph", False) or model.config.is_encoder_decoder:
        return False
    try:
        decoder = GraphDecoder(model, longest=3)
    except (KeyError, AttributeError):  # a kind of layer without a static form
        return False
    layers = decoder.cache.layers
    if not layers or any(type(layer) is not StaticLayer for layer in layers):
        return False
    decoder.graphs = False
    decoder.prefill(decoder.token)
    with _Reads() as watch:
        decoder.step(decoder.token)
    return not watch.seen


class _Reads(TorchDispatchMode):
    """Notes whether a number or a shape was read from a tensor's contents."""

    READS = ("_local_scalar_dense", "equal", "is_nonzero", "lift_fresh", "masked_select", "nonzero")

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


class GraphDecoder:
    """Decodes one sequence of at most ``longest`` tokens, greedily or as the caller picks.

    ``prefill`` starts a sequence, ``step`` continues it; a decoder may serve many sequences, one
    after the other. The logits they return, float ``[vocab]``, are overwritten by the next step.
    """

    def __init__(self, model: Any, longest: int) -> None:
        from transformers.cache_utils import StaticCache

        self.model, self.longest, self.length = model, longest, 0
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        self.token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        # No padding. Given nevertheless: without it some models look for padding, token by token.
        self.mask = torch.ones(1, longest, dtype=torch.long, device=model.device)
        self.graphs = self.token.is_cuda
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Logits ``[vocab]`` after the prompt ``ids [1, n]``, which begins a new sequence.

        Raises ``ValueError`` where the prompt leaves no room for a token, and does so in ``step``
        where the sequence is full: the cache would be written outside its places.
        """
        if ids.shape[1] >= self.longest:
            raise ValueError(f"{ids.shape[1]} tokens leave no room among {self.longest}")
        if self.length:
            self.cache.reset()
        self.length = ids.shape[1]
        positions = torch.arange(self.length, device=ids.device)[None]
        logits = self.model(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[0, -1]
        self.position.fill_(self.length)
        if self.graphs and self.graph is None:
            self._capture()
        return logits

    @torch.no_grad()
    def step(self, token: int | Tensor) -> Tensor:
        """Logits ``[vocab]`` after one more token: a number, or a tensor of one, not copied back.

        A tensor on the model's device is what keeps a loop free of synchronisation.
        """
        if self.length >= self.longest:
            raise ValueError(f"the sequence is full: {self.longest} tokens")
        self.length += 1
        if isinstance(token, Tensor):
            self.token.copy_(token.view(1, 1))
        else:
            self.token.fill_(token)
        if self.graph is None:
            return self._forward()
        self.graph.replay()
        assert self.logits is not None
        return self.logits

    def _forward(self) -> Tensor:
        """The step itself: reads the token and its position, and moves the position on."""
        logits = self.model(
            input_ids=self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[0, -1]
        self.position.add_(1)
        return logits

    def _capture(self) -> None:
        """Record the step after a warm-up on a side stream, and put back what that moved."""
        counts = [layer.cumulative_length for layer in self.cache.layers]
        before = [count.clone() for count in counts] + [self.position.clone()]
        stream = torch.cuda.Stream(self.token.device)
        stream.wait_stream(torch.cuda.current_stream(self.token.device))
        # Warm-up steps write behind the prompt, where the sequence's own tokens will be written,
        # and always to the first free place: there may be no second.
        with torch.cuda.device(self.token.device):
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    self._forward()
                    self._restore(counts, before)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._forward()
        self._restore(counts, before)

    def _restore(self, counts: list[Tensor], before: list[Tensor]) -> None:
        for count, value in zip([*counts, self.position], before, strict=True):
            count.copy_(value)
