"""What is installed from a wheel: commands, and the configurations under their names wherever one stands."""

import importlib
import importlib.metadata
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

from osv_jax.errors import UserError
from osv_jax.runtime import arguments
from osv_jax.training.config import read_config

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


def test_every_program_is_a_command():
    programs = {path.stem for path in (ROOT / "osv_jax").glob("*.py") if "\ndef run()" in path.read_text()}
    assert {target.removeprefix("osv_jax.").removesuffix(":run") for target in SCRIPTS.values()} == programs
    for command, target in SCRIPTS.items():
        module, function = target.split(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert command == f"osv-{module.removeprefix('osv_jax.').replace('_', '-')}" or command == "osv-convert"


@pytest.mark.parametrize("name", ["stage2", "stage2.py", "configs/stage2", "configs/stage2.py"])
def test_configurations_are_found_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert arguments.config_file(name) == ROOT / "configs" / "stage2.py"
    assert read_config(f"{name}:tiny").objective == "stage2"


def test_a_file_of_ones_own_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("stage2").write_text("")
    assert arguments.config_file("stage2") == pathlib.Path("stage2")


@pytest.mark.parametrize("name", ["stage3", "elsewhere/stage2.py", "../configs/stage2.py", "", "configs"])
def test_other_names_are_refused_with_those_there_are(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"does not exist; give the path of yours, or one of add, .*stage1, stage2"):
        arguments.config_file(name)


def test_the_container_file_installs_and_names_what_there_is():
    """There is no program here to build it with: what it copies, installs, sets and tells of is looked up."""
    text = (ROOT / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    assert [step for step, _ in steps] == ["FROM", "COPY", "RUN", "ENV", "WORKDIR"]
    (image, copied, command, variables, _) = (rest for _, rest in steps)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest, highest = re.search(r"Python 3\.(\d+) to 3\.(\d+)", (ROOT / "constraints.txt").read_text()).groups()
    assert int(lowest) <= int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1]) <= int(highest)
    assert copied == ". /osv_jax"
    pip, install, *given = shlex.split(command)
    assert (pip, install) == ("pip", "install")
    (constraints,) = [word for word in given if word.startswith("/osv_jax/")]
    assert (ROOT / constraints.removeprefix("/osv_jax/")).is_file()
    (extras,) = [re.fullmatch(r"/osv_jax\[(.*)\]", word)[1] for word in given if word.startswith("/osv_jax[")]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (cuda,) = [re.fullmatch(r"jax\[(.*)\]", word)[1] for word in given if word.startswith("jax[")]
    assert cuda in importlib.metadata.metadata("jax").get_all("Provides-Extra")
    launch = (ROOT / "launch" / "gpu_host.sh").read_text()
    for name, value in (variable.split("=", 1) for variable in variables.split()):
        assert re.search(rf"{name}.*{re.escape(value)}", launch), name
    commands = set(re.findall(r"\bosv-[a-z-]+", text))
    assert commands and commands <= set(SCRIPTS)
    for name in re.findall(r"--config=(\w+)", text):
        assert arguments.config_file(name).is_file()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"osv_jax", "configs", "setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"} & set(
        ignored
    )


@pytest.mark.integration
def test_the_wheel_holds_all_that_is_used(tmp_path):
    """Built of a copy, for a build leaves folders behind."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".cache", ".ruff_cache", "runs", "build", "*.egg-info", "__pycache__"
    )
    shutil.copytree(ROOT, tmp_path / "osv_jax", ignore=ignored)
    options = ["--no-deps", "--no-build-isolation", "--quiet", f"--wheel-dir={tmp_path}"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, tmp_path / "osv_jax"], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        (listed,) = (name for name in names if name.endswith("entry_points.txt"))
        commands = opened.read(listed).decode()
    used = [path for path in (ROOT / "osv_jax").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    wanted = {path.relative_to(ROOT).as_posix() for path in used}
    wanted |= {f"osv_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert all(f"{command} = {target}" in commands for command, target in SCRIPTS.items())
