"""Every Python example of README and docs runs; every public name stands somewhere in them."""

import ast
import inspect
import re
import shutil
from pathlib import Path

import pytest

import liqlab
from tests.test_cli import FRAME

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Blocks in doctest form are run by the test of their module.
EXAMPLES = {page.name: re.findall(r"```python\n(?!>>>)(.*?)```", page.read_text(), re.DOTALL) for page in PAGES}


@pytest.mark.parametrize("page", [name for name, blocks in EXAMPLES.items() if blocks])
async def test_the_examples_of_a_page_run_in_turn(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recordings").mkdir()
    frames = "".join(FRAME % ("BTCUSDT", 1568014460893 + i * 977) for i in range(20))
    (tmp_path / "recordings" / "day.jsonl").write_text(frames)
    (tmp_path / "mine.csv").write_text("when,direction,price,n\n1700000000000,sell,37000,12\n")
    (tmp_path / "data").mkdir()
    shutil.copy(ROOT / "data" / "normal-6h.jsonl.gz", tmp_path / "data")
    names: dict[str, object] = {"liqlab": liqlab}
    for block in EXAMPLES[page]:
        code = compile(block, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        result = eval(code, names)
        if inspect.isawaitable(result):
            await result
    if page == "README.md":
        assert names["budget"].table["bytes"].sum() == names["budget"].used_memory  # type: ignore[attr-defined]


def test_every_public_name_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in liqlab.__all__ if name not in text] == []


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"
