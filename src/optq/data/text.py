"""From the name of a text to its documents.

A spec is ``demo``, a ``.txt``, ``.jsonl`` or ``.json`` file, ``wikitext2``, ``ptb``, ``c4``, or
``NAME:SPLIT:COLUMN`` of the ``datasets`` package. The named sets are those of the GPTQ paper, read
and joined as its code does, so that perplexities can be held against published ones. For ``ptb``
that is the code's later form (test split, joined by spaces), which most papers since report.

A spec gives documents and the string that joins them, not one long string: the paper's recipe for
C4 draws single documents, a chat template wants one conversation at a time, and C4's documents are
read from disk as they are drawn.

``datasets`` no longer runs the script behind ``ptb_text_only``; the Hub's own Parquet export of the
same set is read instead. (Copies under other names exist, but anyone can change those.)
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from optq.boundary import library, short
from optq.errors import DataError

Use = Literal["calibration", "evaluation"]
Document = object  # text, or a conversation; files hold anything, so it is checked when it is used

CHOICES = "demo, wikitext2, ptb, c4, a .txt, .jsonl or .json file, or NAME:SPLIT:COLUMN of datasets"
_NO_NETWORK = "demo, a .txt file or a .jsonl file"

_C4 = {
    "train": "en/c4-train.00000-of-01024.json.gz",
    "validation": "en/c4-validation.00000-of-00008.json.gz",
}
# The split may be a slice: train[:10%]. A name may hold colons, and a slice does.
_DATASET = re.compile(r"(?P<name>.+):(?P<split>[\w.+-]+(\[[^\]]*\])?):(?P<column>[^:]+)")
_FILE_TYPES = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class Text:
    """The documents of a spec, and the string that stands between them in one stream.

    ``by_document``: calibration windows are drawn inside single documents, as the paper does for
    C4, instead of from the stream.
    """

    name: str
    documents: Sequence[Document]
    joint: str
    by_document: bool = False

    def whole(self) -> str:
        """All documents as one string. Raises ``DataError`` if there is nothing in it."""
        return require_text(self.name, self.joint.join(self.strings()))

    def strings(self) -> Iterable[str]:
        """The documents one by one; ``DataError`` names the first that is not text."""
        for index, document in enumerate(self.documents):
            yield self.string(document, index)

    def string(self, document: Document, index: int) -> str:
        """``document``, number ``index``, if it is text; ``DataError`` otherwise."""
        if isinstance(document, str):
            return document
        if isinstance(document, list):
            raise DataError(
                f"{self.name}: record {index + 1} is a conversation, not text",
                "use --chat, which takes conversations",
            )
        raise DataError(
            f"{self.name}: record {index + 1} is {type(document).__name__}, not text",
            "name a column of strings",
        )


def read_text(spec: str, use: Use, chat: bool = False) -> Text:
    """The documents that ``spec`` names, from its training or its held-out part.

    With ``chat``, a ``.jsonl`` record's ``messages`` are preferred to its ``text``. Raises
    ``DataError`` if the spec is unknown, or names what is missing, empty, broken or out of reach.
    """
    if spec == "demo":
        return Text(spec, [_demo(use)], "\n\n")
    split = "train" if use == "calibration" else "validation" if spec == "c4" else "test"
    if spec == "wikitext2":
        lines = _load(spec, "text", "Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
        return Text(spec, lines, "\n\n")
    if spec == "ptb":
        files = {split: f"penn_treebank/{split}/0000.parquet"}
        where = {"data_files": files, "revision": "refs/convert/parquet"}
        sentences = _load(spec, "sentence", "ptb-text-only/ptb_text_only", split=split, **where)
        return Text(spec, sentences, " ")
    if spec == "c4":
        # One file of a thousand is wanted, and is not the size that the set's card promises.
        where = {"data_files": {split: _C4[split]}, "verification_mode": "no_checks"}
        documents = _load(spec, "text", "allenai/c4", split=split, **where)
        return Text(spec, documents, "\n\n", by_document=True)
    if Path(spec).suffix == ".txt":
        return Text(spec, [_read(spec)], "\n\n")
    if Path(spec).suffix in (".json", ".jsonl"):
        return Text(spec, _records(spec, _read(spec), chat), "\n\n")
    if parts := _DATASET.fullmatch(spec):
        return Text(spec, _dataset(spec, parts["name"], parts["split"], parts["column"]), "\n\n")
    raise DataError(f"there is no text called {short(spec)!r}", f"choose {CHOICES}")


def require_text(name: str, text: str) -> str:
    """``text``, or ``DataError`` if there are only blanks in it."""
    if not text.strip():
        raise DataError(f"{name} has no text in it", f"choose {CHOICES}")
    return text


def _demo(use: Use) -> str:
    from optq.demo import corpus

    return corpus.calibration_text() if use == "calibration" else corpus.evaluation_text()


def _read(path: str) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"there is no file {short(path, 200)}", "check the path") from error
    except UnicodeDecodeError as error:
        cause = f"{path} is not UTF-8 text (byte {error.start})"
        raise DataError(cause, "save it as UTF-8") from error
    except OSError as error:
        cause = f"{short(path, 200)} cannot be read: {error.strerror}"
        raise DataError(cause, "name a file that can be read") from error
    return require_text(path, text)


def _records(path: str, content: str, chat: bool) -> list[Document]:
    if path.endswith(".json") and content.lstrip().startswith("["):  # else it holds lines too
        records = enumerate(_parsed(content, path), start=1)
        return [document_in(each, f"{path}, record {number}", chat) for number, each in records]
    documents: list[Document] = []
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it takes for ends.
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            documents.append(document_in(_parsed(line, where), where, chat))
    return documents


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{where} is not JSON", "write one JSON object per line") from error


def document_in(record: object, where: str, chat: bool) -> Document:
    """The text or, for ``chat``, the conversation of a record; ``DataError`` if it has neither."""
    if isinstance(record, str):
        return record
    fields = record if isinstance(record, Mapping) else {}
    if chat and isinstance(fields.get("messages"), list):
        return fields["messages"]
    if isinstance(fields.get("text"), str):
        return fields["text"]
    wanted = "`text` (a string) or `messages` (a list)" if chat else "`text` (a string)"
    raise DataError(
        f"{where} has no field {wanted}",
        'write records like {"text": "..."}'
        if chat or "messages" not in fields
        else "use --chat, which takes conversations",
    )


def _dataset(spec: str, name: str, split: str, column: str) -> Sequence[Document]:
    """A dataset of the Hub (``owner/name`` or ``owner/name/configuration``), a folder or a file."""
    path = Path(name)
    if path.is_file() and path.suffix in _FILE_TYPES:
        # A file has one split, which is called train unless it is named here.
        files = {re.split(r"\W", split)[0]: name}
        return _load(spec, column, _FILE_TYPES[path.suffix], data_files=files, split=split)
    if not path.exists() and name.count("/") == 2:
        name, configuration = name.rsplit("/", 1)
        return _load(spec, column, name, configuration, split=split)
    return _load(spec, column, name, split=split)


def _load(spec: str, column: str, *where: str, **options: Any) -> Sequence[Document]:
    """One column of ``datasets.load_dataset(*where, **options)``, read as it is indexed."""
    import datasets  # takes a second, and files need none of it

    # Half a minute of retries and their warnings say no more than the one error at the end.
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)
    remedy = f"check the name and the network, or use what needs none: {_NO_NETWORK}"
    try:
        with library(DataError, f"{short(spec, 200)} cannot be loaded", remedy):
            dataset = datasets.load_dataset(*where, **options)
    finally:
        hub.setLevel(level)
    if column not in dataset.column_names:
        raise DataError(
            f"{spec} has no column {column!r}",
            f"choose one of its columns: {short(', '.join(dataset.column_names), 200)}",
        )
    documents: Sequence[Document] = dataset[column]
    return documents
