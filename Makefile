# `make demo` and `make test` need Python 3.11 or newer and make, nothing else; both do only what has not been done yet.
PYTHON ?= python3
VENV := .venv
# pip compiles what it installs on one core, which takes longer than the rest of it; of what is not compiled nearly
# nothing is imported.
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
COMPILE := $(VENV)/bin/python -m compileall -q -j 0 -x '/tests/|transformers/models/' $(VENV)/lib >/dev/null || true

.PHONY: demo web test test-integration test-slow test-portable docs lint clean

# Compiling is a third of the demo: less optimisation costs it less than it saves.
demo: export XLA_FLAGS ?= --xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true
demo: $(VENV)/.demo
	$(VENV)/bin/python -m osv_jax.prepare --config=configs/stage2.py:miniature --source=demo --stride=0.5 \
	    --output=runs/demo/latents
	$(VENV)/bin/python -m osv_jax.train --config=configs/stage2.py:miniature --workdir=runs/demo/stage2
	test -e runs/demo/compared/comparison.mp4 || $(VENV)/bin/python -m osv_jax.compare --weights=miniature \
	    --lora runs/demo/stage2 miniature/stage2 --videos=miniature --clips=2 --output=runs/demo/compared
	@echo "runs/demo/stage2 was trained just now, from the stored LoRA of stage 1 (miniature/stage1);"
	@echo "miniature/stage2 is stored, too: a longer run of stage 2, see docs/miniature.md."

# The page that makes videos, with the miniature and its stored student: http://127.0.0.1:7860.
web: $(VENV)/.web
	$(VENV)/bin/python -m osv_jax.serve --weights=miniature --lora=miniature/stage2

# A process waits for the disk and for its children now and then: three keep two cores busy. A file stays in one, for its
# fixtures, and the shortest files come last, so that all end together.
PYTEST := $(VENV)/bin/pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder
test: $(VENV)/.test
	$(PYTEST) tests/objectives tests/test_*.py tests/models tests/convert tests/diffusion tests/data tests/training \
	    tests/evaluation tests/runtime tests/web

# Whole programs that are killed, continued, run by two processes or on several devices, what others make of theirs, and
# what compiles for long.
test-integration: $(VENV)/.test
	$(PYTEST) -m integration

# The full-size UNet against diffusers, which takes 16 GiB of memory, a real UNet on every mesh, and damaged files. XLA
# has one thread for each fake device by default; where all of them wait for one another, none is left for what they
# wait for.
test-slow: $(VENV)/.test
	NPROC=16 $(VENV)/bin/pytest -m slow

# The numeric tests as other machines would run them, and how much room their bounds leave.
test-portable: $(VENV)/.test
	$(VENV)/bin/python tests/portable.py

# The hooks of .pre-commit-config.yaml; where there is no git, as in an unpacked archive, those that need none.
lint: export PRE_COMMIT_HOME ?= $(CURDIR)/.cache/pre-commit
lint: $(VENV)/.test
	if test -e .git; then $(VENV)/bin/pre-commit run --all-files --show-diff-on-failure; \
	else $(VENV)/bin/ruff check && $(VENV)/bin/ruff format --check && $(VENV)/bin/mypy; fi

# The pages as a site, in build/site; a link that leads nowhere is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) .cache runs/demo

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "osv_jax needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.docs: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[docs]'
	touch $@

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[demo]'
	$(COMPILE)
	touch $@

$(VENV)/.web: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[web]'
	$(COMPILE)
	touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) --editable '.[test]'
	$(PIP) --no-deps open-clip-torch  # a vocabulary is all that is read of it, and what it depends on is a gigabyte
	$(COMPILE)
	touch $@
