"""A model on the hub comes shard by shard, as its blocks are read; the hub is on this machine."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import zoo
from safetensors.torch import load_file

from optq import RTN, ModelConfig, Runner

COMMIT = "c" * 40
BY_NAME = {row.name: row for row in zoo.ROWS}
RUN = """
import sys, zoo
from optq import ModelConfig, RTN, Runner
from optq.errors import OptqError
from optq.model.shards import Shards

read = Shards.read
def told(shards, block):
    print("block", block.index, sorted(p.name for p in shards.checkpoint.folder.glob("*.safe*rs")))
    return read(shards, block)
Shards.read = told
try:
    Runner(ModelConfig("some/model", "cpu"), RTN(4, 32), calib=zoo.token_ids(2, 16),
           output=sys.argv[1]).run()
    print("done")
except OptqError as error:
    print("cause", error.cause, "remedy", error.remedy)
"""


@pytest.fixture
def hub(tmp_path):
    """A folder served as the model some/model; what of it was got, and what is refused."""
    folder = tmp_path / "model"
    got, refused = [], set()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            found = re.fullmatch(rf"/some/model/resolve/(?:main|{COMMIT})/([^/?]+)", self.path)
            if found is None:
                siblings = [{"rfilename": path.name} for path in sorted(folder.iterdir())]
                about = {"id": "some/model", "sha": COMMIT, "siblings": siblings, "private": False}
                tree = [
                    {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                    for p in sorted(folder.iterdir())
                ]
                self.answer(200, json.dumps(tree if "/tree/" in self.path else about).encode())
                return
            path, span = folder / found[1], self.headers["Range"]
            if not path.is_file() or (path.name in refused and self.command == "GET" and not span):
                self.answer(404 if not path.is_file() else 403, b"")
                return
            data = path.read_bytes()
            more = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
            if self.command == "GET":
                got.append((path.name, span))
            if span:
                first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups()
                data = data[int(first) : int(last or len(data)) + 1]
            self.answer(206 if span else 200, data, more)

        def answer(self, status, data, more=None):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(more or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    where |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    here = os.pathsep.join([str(p) for p in sys.path if p])

    def run(*words, **changes):
        environment = os.environ | where | {"PYTHONPATH": here} | changes
        command = [sys.executable, *map(str, words)]
        done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    yield folder, got, refused, run
    server.shutdown()


def test_shards_come_as_blocks_are_read_and_a_run_goes_on_where_one_fails(hub, tmp_path):
    folder, got, refused, run = hub
    BY_NAME["llama"].build().save_pretrained(folder, max_shard_size="150kB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    where = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    early = {file for name, file in where.items() if ".layers." not in name or ".0." in name}
    before = {file for name, file in where.items() if ".layers." not in name}
    late = {*shards} - early
    assert late and len(shards) > 3

    said = run("-m", "optq", "inspect", "some/model")
    assert re.search(r"tensors +30\b", said) and re.search(r"size +510 kB\b", said), said
    assert {name for name, span in got if span is None}.isdisjoint(shards)  # the headers alone

    refused |= late
    said = run("-c", RUN, tmp_path / "out")
    assert f"the hub does not give {min(late)} of some/model: 403" in said, said
    assert "run again: the files that are here already stay" in said
    assert f"block 0 {sorted(before)}" in said and "block 1 " in said, said
    assert not (tmp_path / "out").exists()
    assert {name for name, span in got if span is None and name in shards} <= early

    refused.clear()
    said = run("-c", RUN, tmp_path / "out")
    assert "\ndone\n" in said, said
    whole = [name for name, span in got if span is None]
    assert all(whole.count(name) == 1 for name in shards)

    config = ModelConfig(str(folder), "cpu")
    Runner(config, RTN(4, 32), calib=zoo.token_ids(2, 16), output=tmp_path / "here").run()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    said = run("-c", RUN, tmp_path / "again", HF_HUB_OFFLINE="1")
    assert "\ndone\n" in said, said


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_one_file_alone(hub, tmp_path, kind):
    folder, got, _, run = hub
    zoo.save(BY_NAME["llama"], folder)
    if kind == "bin":
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    for offline in "01":
        out = tmp_path / offline
        said = run("-c", RUN, out, HF_HUB_OFFLINE=offline)
        assert "\ndone\n" in said, said
        assert (out / "tokenizer.json").is_file()
    whole = [name for name, span in got if span is None]
    assert whole.count("model.safetensors" if kind == "safetensors" else "pytorch_model.bin") == 1
