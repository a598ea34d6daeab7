"""Files that are damaged in any way are refused in a sentence, or read as what they have become; see `fuzz.py`."""

import subprocess
import sys

import damage
import fuzz
import pytest

FEW, MANY = 40, 1000


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_files_are_refused_or_read(kind, tmp_path):
    fuzz.KINDS[kind].make(tmp_path)
    failures = [failure for seed in range(FEW) if (failure := fuzz.run(kind, tmp_path, seed))]
    assert not failures, "\n".join(failures)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_ten_thousand_damaged_files(kind):
    """A process for each kind, so that a crash in a decoder is a failure like others."""
    command = [sys.executable, "-X", "faulthandler", fuzz.__file__, kind, "0", str(MANY)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    assert f"{MANY} cases of {kind}, 0 failed" in result.stdout


def test_all_kinds_are_ten_thousand_cases():
    assert MANY * len(fuzz.KINDS) >= 10_000


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.bin", bytes(range(256))),
        ("a.json", b'{"a": [1, {"b": null}], "c": "x"}'),
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n'),
    ],
)
def test_the_same_seed_is_the_same_damage(name, data):
    damaged = [damage.damage(name, data, seed) for seed in range(200)]
    assert damaged == [damage.damage(name, data, seed) for seed in range(200)]
    assert data not in damaged and len(set(damaged)) > 100


@pytest.mark.parametrize(
    ("use", "words"),
    [
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: ["two\nlines"], "not one line"),
        (lambda *_: (_ for _ in ()).throw(fuzz.UserError("something is wrong")), "names no file"),
        (lambda folder, _: (_ for _ in ()).throw(fuzz.UserError(f"{folder}\nis wrong")), "lines"),
        (lambda *_: [str(bytearray(2 * fuzz.BYTES).count(1))], "GiB of memory"),
    ],
)
def test_what_is_wrong_is_noticed(use, words, monkeypatch, tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    monkeypatch.setitem(fuzz.KINDS, "toy", fuzz.Kind(None, use))
    monkeypatch.setattr(fuzz, "BYTES", 2**27)
    assert words in fuzz.run("toy", tmp_path, 0)


def test_what_takes_too_long_is_noticed(monkeypatch, tmp_path):
    def spin(*_):
        while True:
            pass

    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    monkeypatch.setitem(fuzz.KINDS, "toy", fuzz.Kind(None, spin))
    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    assert "TooLong" in fuzz.run("toy", tmp_path, 0)
