"""Run a notebook in this interpreter, with settings, progress and errors that are one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from liqlab import clock
from liqlab.report.cells import CURABLE, JSON, ReportError, check_names, notebook
from liqlab.report.page import to_html
from liqlab.server import redact
from liqlab.settings import ENV_PREFIX, Settings, load

CELL_TIMEOUT_S: Final = 3_600

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Report:
    """A finished report.

    Attributes
    ----------
    html : pathlib.Path
        The page.
    feed, ingested, budget, server : dict
        The figures of `liqlab.report.summary`.
    """

    html: Path
    feed: dict[str, Any]
    ingested: dict[str, Any]
    budget: dict[str, Any]
    server: dict[str, Any]

    @property
    def over(self) -> list[str]:
        """The shares that use more than their budget."""
        return list(self.budget["over"])


def run(
    feed: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str] = "build/report.html",
    *,
    settings: Settings | None = None,
    parameters: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run `notebooks/report.ipynb` on a feed and write it as one HTML page.

    The notebook runs in a process of its own, with a private Redis of its own. `out` is replaced at the very end and
    in one step; a run that fails leaves it as it was.

    Parameters
    ----------
    feed : str, path, or several of them
        Files, folders and globs.
    out : path
        The page; its folder is made.
    settings : Settings, optional
        `liqlab.settings.load()` when absent. They reach the notebook through its environment, without `redis_url`.
    parameters : mapping, optional
        Other parameters of the notebook.
    progress : callable, optional
        Called with (cells done, cells in all).

    Returns
    -------
    Report

    Raises
    ------
    ReportError
        A parameter is unknown or a secret, or a cell failed; then the notebook, as far as it came, lies beside `out`
        under a name that ends in ``.failed.ipynb``.
    """
    try:
        import nbformat
        import papermill
        from nbclient.exceptions import CellTimeoutError
    except ImportError as error:
        raise ReportError(f"{error.name} is not installed; run pip install 'liqlab[lab]'") from None
    paths = [os.fspath(path) for path in ([feed] if isinstance(feed, str | os.PathLike) else feed)]
    values = {"feed": paths[0] if len(paths) == 1 else paths, **(parameters or {})}
    source = notebook("report")
    check_parameters(source, values)
    cells = nbformat.read(source, as_version=4)  # type: ignore[no-untyped-call]
    out = Path(out).absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = out.with_name(f"{out.stem}.failed.ipynb")
    working = out.with_name(f".{out.stem}.{clock.token()}.ipynb")
    page = working.with_suffix(".html")

    def step(cell_index: int, **_: Any) -> None:
        if progress:
            progress(cell_index + 1, len(cells.cells) + 2)  # papermill adds a cell, and the page comes last

    try:
        executed = papermill.execute_notebook(
            cells,
            str(working).replace("{", "{{").replace("}", "}}"),  # papermill fills in what is between braces
            values,
            kernel_name="python3",
            kernel_manager_class=_kernel(environment(settings or load())),
            execution_timeout=CELL_TIMEOUT_S,
            store_widget_state=False,
            progress_bar=False,
            on_cell_executed=step,
        )
        report = Report(out, **_summary(executed))
        page.write_text(to_html(executed), encoding="utf-8")
        os.replace(page, out)
        failed.unlink(missing_ok=True)
    except (papermill.PapermillExecutionError, CellTimeoutError, RuntimeError) as error:  # a dead kernel is the last
        os.replace(working, failed)
        raise ReportError(f"{redact(_sentence(error))} (the notebook, as far as it came: {failed})") from None
    finally:
        working.unlink(missing_ok=True)
        page.unlink(missing_ok=True)
    if progress:
        progress(1, 1)
    return report


def check_parameters(path: str | os.PathLike[str], values: Mapping[str, Any]) -> None:
    """Check that a notebook has the parameters that it is to be given, and that none of them is a secret.

    Raises
    ------
    ReportError
        A name is unknown, or a value holds a password: papermill writes values into the notebook.
    """
    from papermill import inspect_notebook

    check_names(values, inspect_notebook(os.fspath(path)))


def _sentence(error: Exception) -> str:
    kind, text = getattr(error, "ename", type(error).__name__), getattr(error, "evalue", str(error)).strip()
    # An error with a cure speaks for itself; of any other the kind says more than the text.
    return text if kind in {curable.__name__ for curable in CURABLE} else f"{kind}: {text.partition(chr(10))[0]}"


def environment(settings: Settings) -> dict[str, str]:
    """Return this process's environment, with `settings` in the place of its own."""
    sections = settings.model_dump(mode="json", exclude={"redis_url"})
    ours = {f"{ENV_PREFIX}{name.upper()}": json.dumps(value) for name, value in sections.items()}
    return {name: value for name, value in os.environ.items() if not name.upper().startswith(ENV_PREFIX)} | ours


def _kernel(variables: dict[str, str]) -> type:
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """Starts this interpreter, whatever kernel is installed under the name python3, or none."""

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(**get_kernel_dict(extra_arguments=["--log-level=ERROR"]))

        async def start_kernel(self, **kw: Any) -> None:  # type: ignore[override]
            await AsyncKernelManager.start_kernel(self, **kw, env=variables)

    return ThisPython


def _summary(executed: Any) -> dict[str, Any]:
    for cell in reversed(executed.cells):
        for output in cell.get("outputs", []):
            if JSON in output.get("data", {}):
                return dict(output["data"][JSON])
    raise ReportError("the notebook has no output of liqlab.report.summary, which its last cell should show")
