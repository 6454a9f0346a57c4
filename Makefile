# The commands of Nexus; the first one makes .venv, and the later ones only when requirements.txt or the interpreter has changed.
.PHONY: help run demo test bench chaos faults lint clean venv peers browser
.DEFAULT_GOAL := help
.SILENT:
MAKEFLAGS += --no-builtin-rules

VENV := .venv/bin/python
# Their names hold the hash of what was to be installed, so that an unchanged file needs no pip at all. The shell makes them out, as
# it does what follows: an interrupt while make itself asks a shell makes it print nonsense.
STAMP = .venv/.installed-$$(cat requirements.txt 2>/dev/null | sha256sum | cut -c 1-16)
PEERS = .venv-bench/.installed-$$(sha256sum <benchmarks/requirements.txt | cut -c 1-16)
# Looked for only when .venv is made: one that can make it, before one that cannot. The distribution's own comes first: built with
# profile-guided optimisation, it takes a tenth less processor time than one that was merely compiled.
PYTHON ?= $$(for needed in venv,ensurepip sys; do \
	for p in /usr/bin/python3 python3 python3.14 python3.13 python3.12 python3.11; do \
	command -v $$p >/dev/null && $$p -c "import sys, $$needed; sys.exit(sys.version_info < (3, 11))" 2>/dev/null && echo $$p && exit; \
	done; done)
ARGS ?=

# exec: SIGTERM sent to make reaches the process itself, and make waits for its clean end. --tied: SIGINT and SIGHUP, which
# make keeps to itself, kill -9 of make and the end of its terminal stop it too.

help:
	echo 'make run    the embedded store, the Python service and Nexus; Ctrl-C stops them'
	echo 'make demo   the same with synthetic traffic'
	echo 'make test   every test (ARGS="-k name" for some)'
	echo 'make bench  the benchmarks'
	echo 'make chaos  load while parts are killed and stopped, then an audit (ARGS="--kills 200")'
	echo 'make faults writes docs/faults.md anew: each fault, what it shows, how long it lasts'
	echo 'make lint   ruff and mypy'
	echo 'make clean  removes .venv and caches; data and logs stay'

run: venv
	exec $(VENV) -m pipeline.supervisor --tied

demo: venv
	exec $(VENV) -m pipeline.supervisor --tied --demo

# Three files of tests at a time: most of them wait for processes rather than for a core.
test: venv browser
	exec $(VENV) -m pytest --headless -n 3 --dist loadfile $(ARGS)

bench: venv peers
	exec $(VENV) -m benchmarks $(ARGS)

chaos: venv
	exec $(VENV) -m chaos $(ARGS)

faults: venv
	exec $(VENV) -m chaos.table $(ARGS)

lint: venv
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter that is gone cannot import what is in .venv, nor can one that has another version now: then it is made anew.
venv:
	[ -e "$(STAMP)" ] && $(VENV) -Ic 'import pip' 2>/dev/null && exit; \
	ok=yes; missing() { echo "missing: $$1" >&2; ok=no; }; \
	python="$(PYTHON)"; \
	[ "$$(uname -s)" = Linux ] || missing 'Linux; Nexus does not run on other systems'; \
	command -v git >/dev/null || missing 'git (Debian: apt-get install git)'; \
	[ -s requirements.txt ] || missing 'requirements.txt; clone the project anew'; \
	if [ -z "$$python" ]; then missing 'Python 3.11 or later (Debian 12: apt-get install python3 python3-venv)'; \
	elif ! "$$python" -c 'import venv, ensurepip' 2>/dev/null; then \
		missing "Python's venv and ensurepip (Debian: apt-get install python3-venv)"; fi; \
	[ $$ok = yes ] || exit; \
	$(VENV) -m pip --version >/dev/null 2>&1 || { echo 'Making .venv' && "$$python" -m venv --clear .venv; } || exit; \
	echo 'Installing requirements.txt into .venv; this happens once'; \
	$(VENV) -m pip install --disable-pip-version-check -r requirements.txt || exit; \
	rm -f .venv/.installed-*; \
	touch "$(STAMP)"

# The peers get a venv of their own; where they cannot be installed, the table says so.
peers: venv
	[ -e "$(PEERS)" ] && exit; \
	echo 'Installing the peers of the benchmarks into .venv-bench; this happens once'; \
	$(VENV) -m venv --clear .venv-bench || exit; \
	if .venv-bench/bin/python -m pip install --disable-pip-version-check -q -r benchmarks/requirements.txt; then \
		touch "$(PEERS)"; else echo 'the peers cannot be installed here: the table will say so' >&2; fi

# The browser tests drive Chromium through chromedriver.
browser:
	has() { command -v "$$1" >/dev/null; }; \
	if has chromedriver && { has chromium || has google-chrome || has google-chrome-stable; }; then exit 0; fi; \
	as=''; [ "$$(id -u)" = 0 ] || as='sudo -n'; \
	if has apt-get && $$as true 2>/dev/null; then \
		echo 'Installing Chromium and its driver from the Debian packages'; \
		$$as apt-get update -qq && $$as env DEBIAN_FRONTEND=noninteractive apt-get install -y chromium chromium-driver; \
	else \
		echo 'missing: Chromium and chromedriver (Debian: apt-get install chromium chromium-driver)' >&2; exit 1; \
	fi
