"""Read from the folder, without a server: browsers let no page of ``file://`` fetch another file.

The theme fetches the index of the search, and its scripts end where that fails: with them the
switch between light and dark. As a script the index may be loaded, and the theme takes it.
"""

from pathlib import Path
from typing import Any


def on_post_build(config: Any) -> None:
    folder = Path(config["site_dir"]) / "search"
    index = (folder / "search_index.json").read_text(encoding="utf-8")
    (folder / "search_index.js").write_text(f"var __index = {index}\n", encoding="utf-8")
