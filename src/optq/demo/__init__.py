"""The bundled model and its texts, so that a first run needs no network."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
