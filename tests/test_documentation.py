"""What pages name exists: files, modules, links, targets of make, keys of configurations, functions, tests."""

import ast
import pathlib
import re
import runpy
import shlex

import pytest
from flax.traverse_util import flatten_dict

from osv_jax.objectives import objective
from osv_jax.runtime import command_line
from osv_jax.training.config import check_config, default_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "benchmarks/RESULTS.md",
]
# (`COMMIT:PATH` is a file that is no longer there.)
FILE = re.compile(r"(?<![\w./:])(?:osv_jax|benchmarks|configs|docs|launch|tests|tools)/[\w/]+\.\w+")
MODULE = re.compile(r"(?<![\w/])osv_jax((?:\.[a-z]\w*)+)")
KEY = re.compile(r"(?<![\w./])config((?:\.[a-z]\w*)+)")
# `ONE`, `OTHER` in `FILE`
DEFINED = re.compile(r"((?:`\w+`, )*`\w+`) in `(\w+/[\w/]+\.py)`")
TEST = re.compile(r"`(test_\w+)`")
OVERRIDE = re.compile(r"`--(config\.[^`]+)`")
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
    missing += [
        f"{name} in {file}"
        for names, file in DEFINED.findall(text)
        for name in re.findall(r"\w+", names)
        if not re.search(rf"\b(?:def|class) {name}\b", (ROOT / file).read_text())
    ]
    tests = {
        name for file in (ROOT / "tests").rglob("*.py") for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    missing += set(TEST.findall(text)) - tests
    assert missing == []


def test_every_page_is_in_the_sites_menu():
    menu = re.search(r"^nav:\n(.*)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE | re.DOTALL)[1]
    assert {page.name for page in (ROOT / "docs").glob("*.md")} <= set(re.findall(r"[\w-]+\.md", menu))


def test_the_cost_of_the_real_run_follows_from_the_plans():
    row = r"^\| stage [12], [\dx ]+ \| ([\d,]+) \| (\d+), [^|]* \| ([\d.]+ GB)[^|]* \| ([\d.]+) s \| ([\d.]+) \|$"
    text = (ROOT / "docs" / "install.md").read_text()
    plans = (ROOT / "docs" / "scaling.md").read_text().splitlines()
    rows = re.findall(row, text, re.MULTILINE)
    assert len(rows) == 3
    whole = 0.0
    for steps, clips, memory, seconds, hours in rows:
        assert any(f"**{memory}**" in line and line.endswith(f"{seconds} s |") for line in plans)
        bound = int(steps.replace(",", "")) * int(clips) * float(seconds) / 3600
        assert round(bound, 1) == float(hours)
        whole += bound
    (total,) = re.findall(r"^\| together [| ]+ ([\d.]+) \|$", text, re.MULTILINE)
    assert round(whole, 1) == float(total)
    (slowness, cost) = re.findall(rf"{total} x ([\d.]+) x 1 = (\d+)", text)[0]
    assert round(whole * float(slowness)) == int(cost)


def texts():
    """Every text in the package, with a 0 where a value is put in."""
    for file in sorted((ROOT / "osv_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_in_troubleshooting_are_those_of_the_programs():
    rows = re.findall(r"^\| `([^`]+)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    known = "\n".join(texts())
    assert len(rows) > 20
    assert [row for row in rows for part in row.split("...") if part.strip() not in known] == []


def test_keys_that_pages_name_exist():
    keys = configuration_keys()
    named = {name for page in PAGES for name in KEY.findall(page.read_text())} - {".json", ".yaml"}
    assert len(named) > 20
    assert {name for name in named if tuple(name.split(".")[1:]) not in keys} == set()


def overrides_of(section):
    """Those in the tables of a section of docs/training.md, each as arguments."""
    _, text = (ROOT / "docs/training.md").read_text().split(f"\n## {section}\n")
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("|")]
    return [shlex.split(f"--{found}") for row in rows for found in OVERRIDE.findall(row)]


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
@pytest.mark.parametrize(
    ("section", "file", "count"),
    [("SF-V", "sf_v.py", 6), ("ADD", "stage2.py", 2)],
)
def test_ablations_are_overrides_that_a_run_takes(section, file, count):
    overrides = overrides_of(section)
    assert len(overrides) >= count
    plain = command_line.read_config([f"--config={ROOT / 'configs' / file}"]).to_dict()
    for override in overrides:
        config = command_line.read_config([f"--config={ROOT / 'configs' / file}", *override])
        assert config.to_dict() != plain, override
        check_config(config)
