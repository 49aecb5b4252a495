"""Every command that the README and the pages write down.

A command is a line of a block of code that begins with a program's name. Those of ``optq``, also
behind ``torchrun`` or ``python -m``, are parsed by the command's own parser, wherever they stand,
and run here in the order of the page, in a folder of their own, with a tiny model as MODEL and as
``demo``, one of its checkpoints as OUT, and little text: ``small`` has what is put in. Behind
``torchrun`` they run in one process (what several do is for ``tests/test_ranks.py``). Not run are
blocks after ``<!-- needs: .. -->`` (``network``, ``gpu``, ``packages``, ``time``). Benchmarks take
minutes and are marked so: their words must be what the file's own parser takes, names that are
missing included. The log of experiments holds what was run then, and is left alone.
"""

import argparse
import ast
import json
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import typer
from docs.pages import PAGES, ROOT, Block, blocks
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from optq import GPTQ, ModelConfig, Runner, cli, compare, demo
from optq.evaluate import speed

OURS = {"optq", "torchrun"}
CHECKED = {"python", "make"}
OTHERS = {"pip", "git", "vllm", "llama-cli", "llama-server", "hf"}
NEEDS = {"network", "gpu", "packages", "time"}
PROGRAM = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S*/bin/)?(\S+)")
TEXT = "the other end of the theorem is not as near as it seems, and the rest is read then. " * 40
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
COMMANDS = typer.main.get_command(cli.app)


@dataclass(frozen=True)
class Command:
    block: Block
    words: list[str]

    @property
    def program(self) -> str:
        found = PROGRAM.match(shlex.join(self.words))
        return found[1] if found else ""

    @property
    def where(self) -> str:
        return f"{self.block.page.name}, line {self.block.line}: {shlex.join(self.words)}"

    @property
    def ours(self) -> list[str] | None:
        """The words after ``optq``, of ``optq`` and of ``-m optq``."""
        if self.program == "optq":
            return self.words[1:]
        pairs = list(zip(self.words, self.words[1:], strict=False))
        return self.words[pairs.index(("-m", "optq")) + 2 :] if ("-m", "optq") in pairs else None


def commands(page: Path) -> Iterator[Command]:
    for block in blocks(page):
        if block.language not in ("bash", "indented"):
            continue
        text = "\n".join(block.lines).replace("\\\n", " ")
        for line in map(str.strip, text.splitlines()):
            program = PROGRAM.match(line)
            if program is None or program[1] not in OURS | CHECKED | OTHERS:
                # Output and formulas are indented too; a fenced block is nothing but commands.
                assert block.language == "indented" or not line.strip(), (block.page, line)
                continue
            for words in parts(line):
                yield Command(block, words)


def parts(line: str) -> Iterator[list[str]]:
    """The words of each command of a line: ``;`` and ``&&`` end one, but not inside quotes."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if set(word) <= {";", "&"}:
            if words:
                yield words
            words = []
        else:
            words.append(word)


def test_a_line_is_split_where_a_shell_splits_it():
    assert list(parts("a 'b; c' && d --e \"f && g\"; h  # i; j && k")) == [
        ["a", "b; c"],
        ["d", "--e", "f && g"],
        ["h"],
    ]


WRITTEN = [page for page in PAGES if page.name != "log.md"]
EVERY = [command for page in WRITTEN for command in commands(page)]
RUN = [page for page in WRITTEN if any(c.ours and not c.block.needs for c in commands(page))]


def test_markers_are_known_and_other_programs_marked():
    for command in EVERY:
        assert set(command.block.needs) <= NEEDS, command.where
        if command.program in OTHERS:
            assert command.block.needs, f"{command.where}: say what it needs"
        if any(word.startswith("bench/") for word in command.words):
            assert command.block.needs, f"{command.where}: say that it needs time, or packages"


def test_our_commands_parse():
    seen = set()
    for command in EVERY:
        if (words := command.ours) is None:
            continue
        assert words[0] in COMMANDS.commands, command.where
        try:
            COMMANDS.commands[words[0]].make_context(words[0], words[1:])
        except Exception as error:
            pytest.fail(f"{command.where}\n{error}")
        seen.add(words[0])
    assert seen == set(COMMANDS.commands), "a command that no page shows"


def test_commands_inside_sentences_name_options_that_exist():
    seen = 0
    for page in WRITTEN:
        text = page.read_text(encoding="utf-8")
        for name, rest in re.findall(r"`optq ([a-z]+)([^`\n]*)`", text):
            options = {
                word
                for each in COMMANDS.commands[name].params
                for word in (*each.opts, *each.secondary_opts)
            }
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) <= options, (page.name, rest)
            seen += 1
    assert seen > 12


def test_benchmarks_and_targets_exist(capsys):
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    written = [(command.where, command.words) for command in EVERY]
    for page in WRITTEN:
        inside = re.findall(r"`((?:python|make) [^`]*)`", page.read_text(encoding="utf-8"))
        written += [(f"{page.name}: {text}", shlex.split(text)) for text in inside]
    seen = set()
    for where, words in written:
        if words[0] == "make":
            assert words[1] in targets, where
        script = next((word for word in words if word.startswith("bench/")), None)
        if script is not None:
            seen.add(script)
            if script == "bench/peers/transformers_check.py":  # a folder, read from sys.argv
                continue
            try:
                parser_of(script).parse_args(words[words.index(script) + 1 :])
            except SystemExit:
                pytest.fail(f"{where}\n{capsys.readouterr().err}")
    assert len(seen) > 15


def test_a_benchmark_without_what_it_needs_is_refused(capsys):
    for words in ([], ["demo", "--variant-of", "plain"], ["demo", "--seeds", "many"]):
        with pytest.raises(SystemExit):
            parser_of("bench/quality.py").parse_args(words)
    assert "the following arguments are required: models" in capsys.readouterr().err


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that a benchmark makes, from its source: it is not imported, nor run."""
    parser = argparse.ArgumentParser(script, allow_abbrev=False)
    for node in ast.walk(ast.parse((ROOT / script).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            names = [ast.literal_eval(each) for each in node.args]
            given = {each.arg: each.value for each in node.keywords}
            known = {
                name: ast.literal_eval(value)
                for name, value in given.items()
                if name in ("nargs", "action", "choices", "metavar", "help")
                and isinstance(value, ast.Constant | ast.Tuple)
            }
            kind = {"int": int, "float": float}.get(getattr(given.get("type"), "id", ""))
            parser.add_argument(*names, **known, **({"type": kind} if kind else {}))
    return parser


def test_the_readme_and_the_pages_show_what_they_should():
    assert len(EVERY) > 60 and len(RUN) > 8


def small(words: list[str]) -> list[str]:
    """The same command on little: model, text, sequences and tokens."""
    name, rest = words[0], list(words[1:])
    rest = ["1.25MB" if word == "4.2GB" else word for word in rest]

    def default(option: str, *value: str) -> None:
        if option not in rest:
            rest.extend([option, *value])

    if name in ("quantize", "prune", "compare"):
        default("--nsamples", "2")
        default("--seqlen", "64")
        default("--calib", "notes.txt")
    if name in ("eval", "compare"):
        default("--text", "notes.txt")
    if name == "eval":
        default("--seqlen", "64")
    if name == "compare":
        default("--methods", "rtn,plain")
    if name == "generate":
        default("--max-new-tokens", "4")
    return [name, *rest]


ALTERNATIVES = {"README.md", "large.md"}  # commands that are a list, not one after another


def make_room(words: list[str], page: Path, given: set[str]) -> None:
    """The folder that the page begins with is not in the way of the command that first writes it.

    ``given``: the places that no command of the page has written yet. After that a page has to say
    ``--force`` itself.
    """
    if words[0] in ("quantize", "prune") and (page.name in ALTERNATIVES or words[2] in given):
        shutil.rmtree(words[2], ignore_errors=True)
        Path(words[2]).unlink(missing_ok=True)
    if words[0] in ("quantize", "prune", "export") and "--dry-run" not in words:
        given.discard(words[2])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """MODEL: a Llama of random weights with the bundled model's tokenizer. OUT: it, quantized."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    tokenizer.chat_template = TEMPLATE
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place / "MODEL")
    tokenizer.save_pretrained(place / "MODEL")
    calib = torch.randint(len(tokenizer), (2, 64))
    config = ModelConfig(str(place / "MODEL"), "cpu")
    Runner(config, GPTQ(4, 128), calib=calib, output=place / "OUT").run()
    return place


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """Where a page's commands run: with the models and the files that the pages name."""
    shutil.copytree(models, tmp_path, dirs_exist_ok=True)
    for name in ("notes.txt", "held-out.txt", "calibration.txt"):
        (tmp_path / name).write_text(TEXT)
    turns = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    (tmp_path / "conversations.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "MODEL", tmp_path / "MODEL")
    monkeypatch.setattr(speed, "SECONDS", 0.01)
    monkeypatch.setattr(speed, "BUFFER", 2**20)
    everything = compare.evaluation_tokens
    monkeypatch.setattr(compare, "DEMO_SAMPLES", 2)
    monkeypatch.setattr(compare, "evaluation_tokens", lambda *args: everything(*args)[:2])
    return tmp_path


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_the_commands_of_a_page_run(page, folder, capfd, monkeypatch):
    on_term = signal.getsignal(signal.SIGTERM)
    given = {"OUT"}
    try:
        for command in commands(page):
            if command.ours is None or command.block.needs:
                continue
            make_room(command.ours, page, given)
            monkeypatch.setattr(sys, "argv", ["optq", *small(command.ours)])
            with pytest.raises(SystemExit) as end:
                cli.main()
            done = capfd.readouterr()
            assert end.value.code == 0, (command.where, sys.argv, done.err)
    finally:
        signal.signal(signal.SIGTERM, on_term)


PYTHON = [
    (page.stem, block)
    for page in WRITTEN
    if page.stem in ("README", "first", "api")
    for block in blocks(page)
    if block.language == "python"
]


@pytest.mark.parametrize("block", [block for _, block in PYTHON], ids=[name for name, _ in PYTHON])
def test_python_that_quantizes_runs(block, folder):
    code = "\n".join(block.lines)
    assert code.count("calib=") == 1 and '"MODEL"' in code
    shutil.rmtree(folder / "OUT")
    there: dict = {}
    exec(code.replace("calib=", "nsamples=2, seqlen=64, calib="), there)
    assert (folder / "OUT" / "optq.json").is_file()
    assert there["result"].bits_per_weight > 0
