"""How every tool in the pipeline benchmark is timed and weighed, ours included.

It uses only the standard library, so it runs under any tool's own Python.
"""

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

GB = 1e9


class Measurement:
    """The numbers of one run of one tool.

    Memory is the kernel's own high-water mark of resident memory (``VmHWM``), set back to the
    current value before loading through ``/proc/self/clear_refs`` and read after quantizing, so
    no short peak is missed, as a sampling thread would. Tools differ in when they bring the
    weights in, so what was resident before loading and the size of the weights on disk are
    subtracted, rather than what is resident after loading.
    """

    def __init__(self, model: Path) -> None:
        self.numbers: dict[str, object] = {}
        self._weights = sum(file.stat().st_size for file in model.glob("*.safetensors"))
        self._before = _resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")

    @contextmanager
    def seconds(self, phase: str) -> Iterator[None]:
        """Record the wall-clock time of the block as ``{phase}_seconds``."""
        start = time.perf_counter()
        yield
        self.numbers[f"{phase}_seconds"] = round(time.perf_counter() - start, 3)

    def peak(self) -> None:
        """Record the peak so far; call it between quantizing and saving."""
        peak = _resident("VmHWM")
        self.numbers["peak_memory_over_model_gb"] = round(
            (peak - self._before - self._weights) / GB, 3
        )
        self.numbers["peak_resident_gb"] = round(peak / GB, 3)

    def print(self, tool: str, version: str, torch: str) -> None:
        """Print the record as the last line of stdout."""
        print(
            json.dumps({"tool": tool, "version": version, "torch": torch, **self.numbers}),
            flush=True,
        )


def arguments() -> argparse.Namespace:
    """The command line every tool's script shares."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--tokens", type=Path, required=True, help="int64 [sequences, length] .pt")
    parser.add_argument("--out", type=Path, required=True, help="where the quantized model goes")
    parser.add_argument("--wbits", type=int, default=4)
    parser.add_argument("--groupsize", type=int, default=128)
    parser.add_argument("--best", help="the tool's settings for quality instead of speed, by name")
    parser.add_argument(
        "--iters", type=int, default=200, help="steps a block, of a tool that tunes"
    )
    return parser.parse_args()


def _resident(field: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)
