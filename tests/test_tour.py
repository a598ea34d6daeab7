"""The notebook runs from its first cell to its last, and is stored without what it printed."""

import json
import pathlib
import re
import subprocess
import sys

import pytest
import run_notebook

NOTEBOOK = pathlib.Path(__file__).parents[1] / "docs" / "tour.ipynb"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


@pytest.mark.integration
def test_every_cell_runs(tmp_path, monkeypatch):
    """In a process of its own, with the options of XLA that it sets itself."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    command = [sys.executable, run_notebook.__file__, str(NOTEBOOK)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    # The image, the teacher's clip, both, the losses, all four.
    assert len(re.findall(r"cell \d+ shows [1-9]\d{3,}", result.stdout)) == 5, result.stdout
    errors = [float(value) for value in re.findall(r"25 steps (\d\.\d+)", result.stdout)]
    assert len(errors) == 3 and errors[2] < errors[0]
