"""An executed notebook as one HTML page that asks no network for anything."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from typing import Any, Final

from liqlab.report.cells import JSON
from liqlab.server import redact

_TEMPLATE: Final = str(files("liqlab.report").joinpath("page.html.j2"))
_PLOTLY: Final = "application/vnd.plotly.v1+json"
_HTML: Final = "text/html"
_CONFIG: Final = {"responsive": True, "displaylogo": False, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


def to_html(executed: Any) -> str:
    """Turn an executed notebook into a page. It holds plotly.js, once, and folds the code away.

    Figures become what plotly.js draws, and the JSON of `liqlab.report.summary` a script element that a program can
    read: ``script#liqlab-summary``.

    Parameters
    ----------
    executed : nbformat.NotebookNode
        It is left as it is.
    """
    from nbconvert import HTMLExporter
    from plotly.io import to_html as drawn
    from plotly.offline import get_plotlyjs

    page = copy.deepcopy(executed)
    page.metadata.pop("widgets", None)
    for cell in page.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if _PLOTLY in data:
                figure = drawn(
                    data[_PLOTLY], config=_CONFIG, full_html=False, include_plotlyjs=False, include_mathjax=False
                )
                output["data"] = {_HTML: figure}
            elif JSON in data:
                text = json.dumps(data[JSON]).replace("<", "\\u003c")
                output["data"] = {_HTML: f'<script type="{JSON}" id="liqlab-summary">{text}</script>'}
    exporter = HTMLExporter(  # type: ignore[no-untyped-call]
        template_file=_TEMPLATE, exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True
    )
    html: str = exporter.from_notebook_node(page, resources={"plotlyjs": get_plotlyjs()})[0]
    return redact(html)
