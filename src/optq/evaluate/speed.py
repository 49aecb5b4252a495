"""How fast a quantized model runs, beside the same model with its weights dequantized."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from torch.nn.functional import linear

from optq.errors import ModelError
from optq.evaluate.generate import decode
from optq.model.linear import QuantizedLinear, make_dense
from optq.model.source import positions

PROMPT, NEW_TOKENS = 128, 32
RUNS = 3
BUFFER = 2**28  # bytes: more than any cache holds
COPIES = 64  # of one layer at most
SECONDS = 0.5  # for each layer shape


@dataclass(frozen=True)
class ShapeSpeed:
    """One product with one row of activations, for all layers of a shape in turn."""

    rows: int
    cols: int
    layers: int
    kernel: str
    microseconds: float
    dense_microseconds: float
    bandwidth: float  # share of the machine's that reading the packed weight reaches


@dataclass(frozen=True)
class ModelSpeed:
    """Tokens per second, and the bytes of the quantized layers' weights."""

    prefill: float
    decode: float
    bytes: int


@dataclass(frozen=True)
class SpeedReport:
    """``bandwidth`` is the machine's, in bytes per second, as measured in this run."""

    device: str
    dtype: str
    bandwidth: float
    packed: ModelSpeed
    dense: ModelSpeed
    shapes: list[ShapeSpeed]


@dataclass
class Arrivals:
    """A streamer that keeps the time of each token."""

    times: list[float] = field(default_factory=list)

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


@torch.no_grad()
def measure_speed(model: Any, progress: Callable[[float, float, str], None]) -> SpeedReport:
    """Measure ``model`` packed, then dequantize it in place and measure it again.

    Raises :class:`ModelError` for a model without quantized layers.
    """
    layers = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    if not layers:
        raise ModelError("the model has no quantized layers", "give what optq quantize wrote")
    device, dtype = model.device, model.dtype
    progress(0, 4, "memory bandwidth")
    bandwidth = _bandwidth(device)
    progress(1, 4, "packed model")
    packed = model_speed(model, sum(_packed_bytes(layer) for layer in layers))
    progress(2, 4, "packed layers")
    by_shape: dict[tuple[int, int], list[QuantizedLinear]] = {}
    for layer in layers:
        by_shape.setdefault((layer.out_features, layer.in_features), []).append(layer)
    shapes = [_shape_speed(members, dtype, device, bandwidth) for members in by_shape.values()]
    progress(3, 4, "dense model")
    make_dense(model)
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    dense = model_speed(model, weights * dtype.itemsize)
    name = str(dtype).removeprefix("torch.")
    return SpeedReport(str(device), name, bandwidth, packed, dense, shapes)


def model_speed(model: Any, size: int) -> ModelSpeed:
    """Of greedy generation after a prompt; ``size`` bytes are only told on."""
    longest = positions(model) or PROMPT + NEW_TOKENS
    new = max(2, min(NEW_TOKENS, longest // 2))
    prompt = max(1, min(PROMPT, longest - new))
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (1, prompt), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prefills, rates = [], []
    for run in range(RUNS + 1):
        clock = Arrivals()
        decode(model, inputs, new, clock, ends=False)
        if run:  # the first warms up
            prefills.append(prompt / (clock.times[1] - clock.times[0]))
            rates.append((new - 1) / (clock.times[-1] - clock.times[1]))
    return ModelSpeed(statistics.median(prefills), statistics.median(rates), size)


def _shape_speed(
    layers: list[QuantizedLinear], dtype: torch.dtype, device: torch.device, bandwidth: float
) -> ShapeSpeed:
    """Of layers of one shape: copies of the first take turns, so that no cache serves them."""
    product = layers[0].product
    assert product is not None
    size, weight = _packed_bytes(layers[0]), product.dense()
    x = torch.randn(1, product.cols, dtype=dtype, device=device)
    products = cycle([deepcopy(product) for _ in range(min(COPIES, 1 + BUFFER // size))])
    weights = cycle([weight.clone() for _ in range(min(COPIES, 1 + BUFFER // weight.nbytes))])
    seconds = _time(lambda: next(products)(x), device)
    plain = _time(lambda: linear(x, next(weights)), device)
    return ShapeSpeed(
        product.rows,
        product.cols,
        len(layers),
        product.name,
        seconds * 1e6,
        plain * 1e6,
        size / seconds / bandwidth,
    )


def _packed_bytes(layer: QuantizedLinear) -> int:
    return sum(buffer.nbytes for buffer in layer.buffers())


def _bandwidth(device: torch.device) -> float:
    """Bytes per second: the better of summing a long buffer and copying one to another."""
    source = torch.ones(BUFFER // 4, device=device)
    target = torch.empty_like(source)
    reading = source.nbytes / _time(source.sum, device)
    copying = 2 * source.nbytes / _time(lambda: target.copy_(source), device)
    return max(reading, copying)


def _time(function: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call; on a GPU, of one among many in a graph, without the launches."""
    function()
    many, run = 1, function
    if device.type == "cuda":
        many, run = 20, _graph(function, 20)
    times: list[float] = []
    stop = time.perf_counter() + SECONDS
    while time.perf_counter() < stop or len(times) < 3:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / many)
    return statistics.median(times)


def _graph(function: Callable[[], object], many: int) -> Callable[[], object]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(many):
            function()
    return graph.replay
