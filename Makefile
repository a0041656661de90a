# make demo: train a small network with and without WWPGD; make test: the whole test suite.
PYTHON ?= python3
# What to install as PyTorch first; for a particular build: make test TORCH=torch==2.13.0
TORCH ?= torch
PIP = .venv/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: demo test lint clean

demo: .venv/demo.done
	.venv/bin/python examples/quickstart_lightning.py $(ARGS)

# A worker for each core, one thread each: waiting threads would only take turns.
test: .venv/test.done
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto --dist loadfile $(ARGS)

lint: .venv/test.done
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/torch.done:
	$(PYTHON) -m venv .venv
	$(PIP) install --upgrade "pip>=25.1"
	$(PIP) install "$(TORCH)"
	touch $@

.venv/demo.done: pyproject.toml | .venv/torch.done
	$(PIP) install --editable ".[lightning]" scikit-learn
	touch $@

.venv/test.done: pyproject.toml | .venv/torch.done
	$(PIP) install --editable ".[lightning,huggingface]" --group dev
	touch $@ .venv/demo.done

clean:
	rm -rf .venv build dist *.egg-info
