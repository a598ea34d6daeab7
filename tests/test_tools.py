"""Programs of the checkout."""

import runpy
import sys

import pytest


def test_the_converter_runs_from_a_checkout(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert_weights.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path("tools/convert_weights.py", run_name="__main__")
    assert ended.value.code == 0 and "export-lora" in capsys.readouterr().out
