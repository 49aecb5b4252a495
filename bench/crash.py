"""Runs that are killed and continued, beside one that was left alone: are the bytes the same?

A small Llama with random weights is quantized once, undisturbed. Then again and again: a run is
ended by SIGKILL, the same run is started once more, and every file of what it writes is compared.
Half of the kills come at a moment drawn uniformly over the run's length; the others at one of the
system calls that open, rename or remove something in the hidden folder, drawn uniformly as well.
Every second run writes a shard for each block, the others one file. A trace that outlives the kill
says which blocks were solved in both runs.

    python bench/crash.py [--kills 30] [--seed 0]      appends a record to bench/results/crash.jsonl
"""

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from machine import append, machine

RESULTS = Path(__file__).parent / "results" / "crash.jsonl"
BLOCKS, HIDDEN, INNER, VOCABULARY = 8, 128, 384, 512
SAMPLES, SEQLEN = 16, 64
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "os.rmdir", "os.chmod"}


def make(folder: Path) -> None:
    """The model, in several files."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": BLOCKS},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="2MB")


def quantize(model: Path, out: Path, shards: bool, trace: Path, last: int | None) -> None:
    """One run; it writes its sites to ``trace`` and kills itself at event ``last``."""
    import torch

    from optq import GPTQ, ModelConfig, Runner
    from optq.formats import writer

    torch.set_num_threads(1)
    if shards:
        writer.SHARD_BYTES = 2**17
    lines = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    count = 0

    def event(name: str, arguments: tuple) -> None:
        nonlocal count
        if name in EVENTS and ".partial" in str(arguments[0]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(event)
    tokens = torch.randint(
        VOCABULARY, (SAMPLES, SEQLEN), generator=torch.Generator().manual_seed(0)
    )
    config = ModelConfig(str(model), "cpu")
    Runner(
        config,
        GPTQ(4, 128),
        qep=True,
        calib=tokens,
        output=out,
        progress=lambda step: os.write(lines, f"{step.block} {step.site}\n".encode()) and None,
        notice=lambda line: os.write(lines, f"# {line}\n".encode()) and None,
    ).run()
    os.write(lines, f"# events {count}\n".encode())


def child(*arguments: object) -> int:
    """A run in a process of its own, without the time that imports take; its number."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        from optq.errors import OutputError

        try:
            quantize(*arguments)
            status = 0
        except OutputError as error:
            print(error.cause, file=sys.stderr, flush=True)
            status = 2
    finally:
        os._exit(status)


def ended(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "optq_times.json"
    }


def solved(trace: Path) -> tuple[list[str], list[str]]:
    """The sites that a run solved, and what it said."""
    lines = trace.read_text().splitlines() if trace.exists() else []
    return [x for x in lines if not x.startswith("#")], [x[2:] for x in lines if x.startswith("#")]


def crash(
    scratch: Path, model: Path, shards: bool, expected: dict[str, str], moment: float, last: int
) -> dict[str, object] | None:
    """One run that is killed after ``moment`` seconds, or at event ``last``, and continued.

    None where it was done before.
    """
    place = Path(tempfile.mkdtemp(dir=scratch))
    out, first, second = place / "out", place / "first", place / "second"
    process = child(model, out, shards, first, last or None)
    if not last:
        time.sleep(moment)
        os.kill(process, signal.SIGKILL)
    if ended(process) != -signal.SIGKILL:
        return None
    status = ended(child(model, out, shards, second, None))
    before, after = solved(first)[0], solved(second)[0]
    blocks = [{site.split()[0] for site in sites} for sites in (before, after)]
    left = sorted({path.name for path in place.iterdir()} - {"first", "second"})
    return {
        "kill": f"event {last}" if last else f"{moment:.2f} s",
        "shards": shards,
        "done_before": len(before),
        "done_after": len(after),
        "blocks_twice": len(blocks[0] & blocks[1]),
        # Killed after the last rename, it is done: the second run says that OUT exists.
        "status": status,
        "identical": left == ["out"] and sums(out) == expected,
        "said": [line.replace(f"{place}/", "") for line in solved(second)[1][:1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    import torch  # noqa: F401  imported once, for all runs to come
    import transformers
    from transformers import LlamaForCausalLM  # noqa: F401

    import optq.runner  # noqa: F401

    transformers.logging.disable_progress_bar()
    generator, rows = random.Random(given.seed), []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = scratch / "model"
        if (process := os.fork()) == 0:
            make(model)
            os._exit(0)
        assert ended(process) == 0
        expected, events, lengths = {}, {}, {}
        for shards in (False, True):
            out, trace, start = scratch / f"alone{shards}", scratch / f"t{shards}", time.time()
            assert ended(child(model, out, shards, trace, None)) == 0
            lengths[shards], expected[shards] = time.time() - start, sums(out)
            events[shards] = int(solved(trace)[1][-1].split()[1])
            sites = len(solved(trace)[0])
        print(f"alone: {lengths[True]:.1f} s, {sites} sites, {events[True]} events", flush=True)
        while len(rows) < given.kills:
            shards, by_event = len(rows) % 2 == 1, len(rows) // 2 % 2 == 1
            moment = generator.uniform(0, lengths[shards])
            last = generator.randint(1, events[shards])
            row = crash(scratch, model, shards, expected[shards], moment, last * by_event)
            if row is not None:
                rows.append(row)
                print(*row.values(), flush=True)
    record = machine() | {
        "model": f"llama, {BLOCKS} blocks of {HIDDEN} x {INNER}, gptq 4 bits with qep",
        "tokens": SAMPLES * SEQLEN,
        "seed": given.seed,
        "seconds_alone": round(lengths[True], 1),
        "files_alone": {"one": len(expected[False]), "shards": len(expected[True])},
        "kills": len(rows),
        "identical": sum(bool(row["identical"]) for row in rows),
        "blocks_twice_at_most": max(int(str(row["blocks_twice"])) for row in rows),
        "rows": rows,
    }
    append(RESULTS, record)
    print({key: value for key, value in record.items() if key != "rows"})


if __name__ == "__main__":
    main()
