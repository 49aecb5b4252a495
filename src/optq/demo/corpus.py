"""The bundled model's text: the Python standard library's own source.

Every Python installation has it, so training, calibration and evaluation need no download.
Two named lists of modules are held out of training: calibration text for a solver, and
evaluation text for perplexity. They are disjoint, and the tests of held-out modules are held
out with them. All listed modules exist, little changed, from Python 3.10 to 3.14; the text is
that of the running Python, so numbers move slightly from one Python version to the next.
"""

import hashlib
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from optq.errors import DataError

CALIBRATION_MODULES = (
    "calendar",
    "configparser",
    "difflib",
    "fractions",
    "optparse",
    "selectors",
    "smtplib",
)
EVALUATION_MODULES = (
    "argparse",
    "ftplib",
    "heapq",
    "plistlib",
    "shlex",
    "statistics",
    "textwrap",
)

# Third-party code, codec and documentation tables, and files the build of Python generates.
_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
_EXCLUDED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")
# Above this share of digits and backslashes a file is a table of data, not code.
_DATA_SHARE = 0.15


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def calibration_text() -> str:
    """The source of ``CALIBRATION_MODULES``, joined by blank lines."""
    return _text(CALIBRATION_MODULES)


def evaluation_text() -> str:
    """The source of ``EVALUATION_MODULES``, joined by blank lines."""
    return _text(EVALUATION_MODULES)


def training_files() -> list[Path]:
    """Every other ``.py`` file of the standard library, sorted by path.

    The library's own tests are included where they are installed, except the tests of held-out
    modules. Left out: third-party packages, generated files, tables of data, files that are not
    UTF-8, and second copies of a file.
    """
    folder = stdlib_folder()
    held_out = set(CALIBRATION_MODULES + EVALUATION_MODULES)
    seen: set[bytes] = set()
    chosen = []
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        if _EXCLUDED_FOLDERS.intersection(parts) or parts[-1].startswith(_EXCLUDED_PREFIXES):
            continue
        if parts[0] in held_out or any(_is_test_of(part, held_out) for part in parts):
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not _is_code(content):
            continue
        seen.add(digest)
        chosen.append(path)
    return chosen


def _text(modules: Iterable[str]) -> str:
    folder = stdlib_folder()
    sources = []
    for module in modules:
        path = folder / f"{module}.py"
        try:
            sources.append(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(
                f"the demo text needs the standard library's source, and {path} cannot be read",
                "use a Python installed with its .py files, or name another text file",
            ) from error
    return "\n\n".join(sources)


def _is_test_of(part: str, modules: Iterable[str]) -> bool:
    """Whether a path's part names a test of one of ``modules``, as in ``test_heapq``."""
    return any(part == f"test_{name}" or part.startswith(f"test_{name}_") for name in modules)


def _is_code(content: bytes) -> bool:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return sum(text.count(c) for c in "0123456789\\") <= _DATA_SHARE * len(text)
