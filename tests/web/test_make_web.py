"""`make web` serves a page with what is here."""

import shlex
import subprocess
import urllib.request

import pytest
from serving import ROOT, served

PROGRAM = "-m osv_jax.serve "


def recipe():
    """The arguments of the server that make would start."""
    options = ["--dry-run", "--no-print-directory", "web"]
    printed = subprocess.run(["make", *options], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60)
    (line,) = [line for line in printed.stdout.splitlines() if PROGRAM in line]
    return shlex.split(line.split(PROGRAM)[1])


def test_it_serves_the_miniature_and_its_student_to_this_machine_alone():
    assert recipe() == ["--weights=miniature", "--lora=miniature/stage2"]


@pytest.mark.integration
def test_the_server_starts_with_that_command_line(tmp_path):
    with (
        served(*recipe(), f"--output={tmp_path}", log=tmp_path / "log.txt") as url,
        urllib.request.urlopen(url, timeout=60) as page,
    ):
        assert url.startswith("http://127.0.0.1:") and b"From an image to a video" in page.read()
