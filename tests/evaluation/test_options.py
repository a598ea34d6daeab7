"""What a table compares, as its configuration says it."""

import runpy

import pytest

from osv_jax import evaluate
from osv_jax.errors import UserError
from osv_jax.evaluation.options import default_methods, methods_of, read_options


def test_defaults_are_the_papers_table():
    methods = default_methods(["a", "b"], ema=True)
    assert [m.name for m in methods[:4]] == [f"teacher, {k} step{'s' * (k > 1)}" for k in (25, 8, 2, 1)]
    assert all(m.sampler == "euler" and not m.lora for m in methods[:4])
    assert [(m.name, m.sampler, m.steps) for m in methods[4:8]] == [
        ("a, 1 step", "consistency", 1),
        ("a, 1 step + TTS", "tts", 1),
        ("a, 2 steps", "consistency", 2),
        ("a, 4 steps", "consistency", 4),
    ]
    assert len(methods) == 12 and methods[8].lora == "b" and methods[8].ema
    assert default_methods(["a"], ema=False)[4].name == "student, 1 step"


@pytest.mark.parametrize("variant", ["", "miniature", "tiny"])
def test_configurations_are_whole(variant):
    methods_of(read_options(runpy.run_path("configs/eval.py")["get_config"](variant)))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # in ml_collections
def test_the_program_reads_a_configuration_and_what_changes_it(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "_table", seen.append)
    with pytest.raises(UserError, match="required: --config"):
        evaluate.main(["table"])
    with pytest.raises(UserError, match="no key"):
        evaluate.main(["table", "--config=configs/eval.py:tiny", "--config.sed=1"])
    with pytest.raises(UserError, match="Unexpected argument 'x'"):
        evaluate.main(["table", "--config=configs/eval.py", "x"])
    with pytest.raises(UserError, match="variants '', 'miniature' and 'tiny', not 'huge'"):
        evaluate.main(["table", "--config=configs/eval.py:huge"])
