import ast

import margins
import numpy as np
import pytest


@pytest.mark.parametrize(
    ("statement", "margin"),
    [
        ("assert 0.5 < 2.0", 0.25),
        ("assert np.all(np.array([0.1, 0.4, 0.2]) <= 0.5)", 0.8),
        ("assert 3 > 1.5", 0.5),
        ("assert 1.0 < 2.0 < 8.0, 'a chain'", 0.5),
        ("assert 3 < 4 and 2 != 2.5", None),
    ],
)
def test_every_comparison_of_numbers_in_an_assert_is_recorded(statement, margin, monkeypatch):
    monkeypatch.setattr(margins, "_worst", {})
    program = compile(margins._Recorder().visit(ast.parse(statement)), "<test>", "exec")
    exec(program, {"np": np})
    assert [place["margin"] for place in margins._worst.values()] == ([] if margin is None else [margin])


def test_what_does_not_hold_still_fails(monkeypatch):
    monkeypatch.setattr(margins, "_worst", {})
    program = compile(margins._Recorder().visit(ast.parse("assert 3.0 < 2.0 < 4.0")), "<test>", "exec")
    with pytest.raises(AssertionError):
        exec(program, {})
    assert [place["margin"] for place in margins._worst.values()] == [1.5]
