"""The tuning panel as a page of its own, by Voila."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import nbformat
import pandas as pd

_TEMPLATES: Final = Path(__file__).with_name("share")
_CELL: Final = """\
import pandas as pd
from liqlab import settings, sizing, widgets, serve

chosen = settings.load()
with serve(settings=chosen) as server:
    async with server.connect() as redis:
        known = await sizing.calibrate(redis)
widgets.panel(pd.read_parquet({events!r}), chosen, calibration=known, export_to={export!r})
"""


def command(folder: Path, events: pd.DataFrame, export_to: Path, *, port: int, browser: bool) -> list[str]:
    """Lay out a folder with a notebook of one cell, and return the words after `python` that serve it."""
    events.to_parquet(folder / "events.parquet")
    cell = nbformat.v4.new_code_cell(  # type: ignore[no-untyped-call]
        _CELL.format(events=str(folder / "events.parquet"), export=str(export_to))
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    page = nbformat.v4.new_notebook(cells=[cell], metadata={**kernel, "title": "liqlab"})  # type: ignore[no-untyped-call]
    nbformat.write(page, folder / "liqlab.ipynb")  # type: ignore[no-untyped-call]
    words = ["-m", "voila", str(folder / "liqlab.ipynb"), "--template=liqlab", f"--port={port}", "--Voila.ip=127.0.0.1"]
    return words if browser else [*words, "--no-browser"]


def with_template(variables: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which Voila finds liqlab's template."""
    paths = [str(_TEMPLATES), *filter(None, [variables.get("JUPYTER_PATH")])]
    return {**variables, "JUPYTER_PATH": os.pathsep.join(paths)}
