"""What pages name exists: files, modules, links, targets of make, keys of configurations."""

import pathlib
import re
import runpy

import pytest
from flax.traverse_util import flatten_dict

from osv_jax.objectives import objective
from osv_jax.training.config import default_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/RESULTS.md",
]
# (`COMMIT:PATH` is a file that is no longer there.)
FILE = re.compile(r"(?<![\w./:])(?:osv_jax|benchmarks|configs|docs|launch|tests|tools)/[\w/]+\.\w+")
MODULE = re.compile(r"(?<![\w/])osv_jax((?:\.[a-z]\w*)+)")
KEY = re.compile(r"(?<![\w./])config((?:\.[a-z]\w*)+)")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")


def module_exists(dotted):
    path = ROOT / "osv_jax"
    for part in dotted.split(".")[1:]:
        if (path / f"{part}.py").exists():
            return True  # What follows is a name in it.
        path /= part
    return path.is_dir()


def anchors(page):
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def configuration_keys():
    """Every key, and every part of one that holds others."""
    objective.is_known("")
    configs = [default_config(name) for name in objective._REGISTRY if name != "autoencoder"]
    configs += [runpy.run_path(str(ROOT / "configs" / name))["get_config"]() for name in ("vae.py", "eval.py")]
    keys = {path for config in configs for path in flatten_dict(config.to_dict(), keep_empty_nodes=True)}
    return {path[:length] for path in keys for length in range(1, len(path) + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists() and "NAME" not in name]
    missing += [f"osv_jax{name}" for name in MODULE.findall(text) if not module_exists(name)]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    missing += [f"make {name}" for name in re.findall(r"`make ([a-z-]+)", text) if name not in targets]
    for file, anchor in LINK.findall(text):
        linked = page.parent / file if file else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            missing.append(f"{file}#{anchor}")
    assert missing == []


def test_keys_that_pages_name_exist():
    keys = configuration_keys()
    named = {name for page in PAGES for name in KEY.findall(page.read_text())} - {".json", ".yaml"}
    assert len(named) > 20
    assert {name for name in named if tuple(name.split(".")[1:]) not in keys} == set()
