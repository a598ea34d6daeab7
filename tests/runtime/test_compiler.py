"""XLA's options for CPUs are set where they are known and the user has not said otherwise."""

import jax
import jax.numpy as jnp
import pytest

from osv_jax.runtime import compiler

NAMES = sorted(compiler.CPU_OPTIONS)


def test_all_are_known_to_the_installed_xla(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert sorted(compiler.compiler_options()) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_what_the_environment_says_stays(monkeypatch, name):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_backend_optimization_level=0 --{name}=")
    assert sorted(compiler.compiler_options()) == [other for other in NAMES if other != name]


def test_what_xla_does_not_know_is_left_out(monkeypatch):
    monkeypatch.setattr(compiler, "CPU_OPTIONS", {"xla_cpu_of_another_version": "", **compiler.CPU_OPTIONS})
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert sorted(compiler.compiler_options()) == NAMES


def test_other_platforms_have_none(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler.compiler_options() == {}


def test_products_are_xlas_own(monkeypatch):
    """What the option is for: by XLA's default they are fusions for YNNPACK, unless the environment says otherwise."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    lowered = jax.jit(lambda x: jax.nn.gelu(x @ x)).lower(jnp.ones((64, 64)))
    assert "ynn" in lowered.compile({"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}).as_text()
    assert "ynn" not in lowered.compile(compiler.compiler_options()).as_text()
