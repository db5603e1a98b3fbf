"""Run the notebooks on the sample feed and save them with their outputs: python tests/save_notebooks.py [NAME...].

What a saved notebook must not hold is taken out: pictures beside plotly's own JSON, widget state, times, versions of
the kernel. Cell ids stay.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
KERNEL = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def cleaned(notebook: NotebookNode) -> NotebookNode:
    for cell in notebook.cells:
        cell.metadata = {name: value for name, value in cell.metadata.items() if name == "tags"}
        for output in cell.get("outputs", []):
            if "application/vnd.plotly.v1+json" in output.get("data", {}):
                for beside in ("image/png", "application/vnd.jupyter.widget-view+json"):
                    output.data.pop(beside, None)
    notebook.metadata = {**KERNEL, "title": notebook.metadata["title"]}
    return notebook


def main(names: list[str]) -> None:
    # The user's settings are not the notebooks' business, and what they print must not depend on them.
    for name in [name for name in os.environ if name.startswith("LIQLAB_")]:
        del os.environ[name]
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
        nbformat.write(cleaned(notebook), path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
