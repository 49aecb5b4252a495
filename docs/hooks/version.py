"""The site carries the version of the package that it was built from."""

from typing import Any

from optq import __version__


def on_config(config: Any) -> Any:
    config["site_name"] = f"OPTQ {__version__}"
    config["copyright"] = f"OPTQ {__version__}, Apache License 2.0"
    return config
