"""The benchmark that plans one network, for this machine and a small picture."""

import runpy
import sys

import pytest


@pytest.mark.integration  # Of the real width, which takes long to compile.
def test_a_network_is_planned(tmp_path, monkeypatch, capsys):
    size = ["--num_frames=2", "--height=64", "--width=64"]
    monkeypatch.setattr(
        sys, "argv", ["network_traffic.py", "encode", "--topology=cpu", *size, f"--save={tmp_path / 'hlo'}"]
    )
    runpy.run_path("benchmarks/network_traffic.py", run_name="__main__")
    output = capsys.readouterr().out
    assert "encode, 2 x 64 x 64, bfloat16, one of cpu:" in output
    assert "traffic" in output and "Compiled in" in output
    assert "HloModule" in (tmp_path / "hlo").read_text()
