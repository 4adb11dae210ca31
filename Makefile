# The work is done by run.sh; these are its commands for those who type make.
PYTHON_ENV ?= $(or $(NEUCORE_VENV),.venv)

.PHONY: help setup emoji test docs format clean

help:
	@sh run.sh help
	@echo "make setup | emoji | test | docs | format | clean"

setup emoji test docs:
	@sh run.sh $@

format: setup
	$(PYTHON_ENV)/bin/python -m ruff check --fix .
	$(PYTHON_ENV)/bin/python -m ruff format .

# What building and testing leave behind; neither the environment nor results.
clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache
	find neucore_plugin lavis tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
