"""Imports point down in the picture of docs/architecture.md, and files stay short."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "osv_jax"
FILES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
# Where an import does not point down, and why it may.
EXCEPTIONS = {("compare", "sample"): "the options of a video are the same in both programs"}
MAX_LINES = 400
PROGRAMS = {
    path.relative_to(ROOT).as_posix(): path
    for folder in ("osv_jax", "benchmarks", "configs", "tools", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def layers():
    """Names of folders and modules, a set for each layer, from the top."""
    picture = re.search(r"```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)[1]
    lines = [re.findall(r"\b([a-z_]+)(?:/|\.py\b)", line) for line in picture.splitlines()]
    return [set(names) for names in lines if names]


def imported(source):
    """The names `osv_jax.A.B` that a file imports, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def pointing_up(room, source):
    """The rooms that a file of `room` imports and that do not stand below it."""
    height = {name: -number for number, names in enumerate(layers()) for name in names}
    parts = [name.split(".") for name in imported(source)]
    rooms = {part[1] for part in parts if part[0] == "osv_jax" and part[1:]} - {room}
    return {other for other in rooms if height[other] >= height[room] and (room, other) not in EXCEPTIONS}


def test_the_picture_names_everything():
    there = {name.split("/")[0].removesuffix(".py") for name in FILES} - {"__init__"}
    assert there <= set().union(*layers())
    assert sum(map(len, layers())) == len(set().union(*layers()))


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    room = name.split("/")[0].removesuffix(".py")
    if room != "__init__":
        assert pointing_up(room, FILES[name].read_text()) == set()


def test_what_points_up_is_noticed():
    source = "def f():\n    from osv_jax import codec, errors\n    import osv_jax.training.loop"
    assert pointing_up("objectives", source) == {"training"}
    assert pointing_up("data", source) == {"codec", "training"}
    assert pointing_up("inference", "from osv_jax.training import loop") == {"training"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_files_are_short(name):
    assert len(PROGRAMS[name].read_text().splitlines()) <= MAX_LINES
