"""The pictures of the documentation: `python bench/pictures.py` makes docs/pictures/*.png.

Quantizes the bundled model to 3 bits, measures it against what it was, and photographs its report
in headless Chromium: the first screen and one layer, light and dark, and the top alone for the
README. Needs Chromium and playwright.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from playwright.sync_api import Page, sync_playwright

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
MOST = 200_000  # bytes of a picture
SCREEN = {"width": 1280, "height": 800}
LONG = {"width": 1280, "height": 910}
TOP = {"width": 1280, "height": 420}  # the four answers alone: the README has two screens


def optq(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "optq", *map(str, words)], check=True)


def report(folder: Path) -> Path:
    """A report of a real run, evaluated."""
    out = folder / "demo-3bit"
    optq("quantize", "demo", out, "--wbits", 3, "--nsamples", 64, "--seqlen", 512)
    optq("eval", out, "--against", "demo", "--text", "demo")
    optq("report", out, "--against", "demo", "--out", folder / "report.html")
    return folder / "report.html"


def photograph(page: Page, name: str, top: str | None = None) -> None:
    """What is on the screen; with ``top``, from that element downward."""
    path = PICTURES / f"{name}.png"
    if top is not None:
        page.evaluate("id => document.getElementById(id).scrollIntoView()", top)
    page.mouse.move(0, 0)
    page.screenshot(path=path)
    size = path.stat().st_size
    print(f"{path.relative_to(PICTURES.parents[1])}  {size / 1000:.0f} kB")
    if size > MOST:
        raise SystemExit(f"{path} is larger than {MOST // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--of", type=Path, help="a report that is there, in place of a new one")
    given = parser.parse_args().of
    PICTURES.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_of = (given or report(Path(folder))).resolve().as_uri()
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SCREEN, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto(page_of)
            page.wait_for_selector("html[data-drawn]")
            photograph(page, f"report-{scheme}")
            if scheme == "light":
                page.set_viewport_size(TOP)  # type: ignore[arg-type]
                photograph(page, "readme")
            page.set_viewport_size(LONG)  # type: ignore[arg-type]
            photograph(page, f"layer-{scheme}", "chosen")
        browser.close()


if __name__ == "__main__":
    main()
