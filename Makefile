# The project's commands: `make` lists them.
.DEFAULT_GOAL := help
.PHONY: help image demo capture test interop chaos bench docs reference lint build package install lock clean
PYTHON ?= python3
MAJORS := $(shell awk '/^[0-9]/ { print $$1 }' docker/majors)
PG ?= $(firstword $(MAJORS))
IMAGE = autoembed:$(PG)
TEST_ENV = AUTOEMBED_TEST_IMAGE=$(IMAGE) TESTCONTAINERS_RYUK_DISABLED=true TESTCONTAINERS_CONNECTION_MODE=docker_host TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1
VERSION = $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" extension/autoembed.control)
PYTHON_SOURCES = $(wildcard plpy_src build.py docker/*.py packaging/*.py demo/capture.py docs/*.py docs/images/draw.py tests bench)
LOCK = .venv/lock/bin/uv pip compile --quiet --universal --fork-strategy fewest --generate-hashes --upgrade --custom-compile-command 'make lock'
SHELL_SCRIPTS = $(wildcard .ci/run docker/*.sh docker/*/*.sh packaging/*.sh demo/*.sh docs/*.sh)

help: ## list the commands
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

image: ## build the image autoembed:18, or of another major (PG=17), with what it takes: a Docker engine, a base image (or name one: BASE_IMAGE=)
	@docker/engine.sh
	base=$${BASE_IMAGE:-$$(docker/base.sh $(PG))} && docker build -f Dockerfile.postgres --build-arg BASE_IMAGE=$$base --build-arg VERSION=$(VERSION) -t $(IMAGE) .
	$(if $(filter $(firstword $(MAJORS)),$(PG)),docker tag $(IMAGE) autoembed)

demo: ## build the image, start it, and watch it embed and search real text
	@demo/build.sh $(PG)
	@demo/run.sh

capture: image ## run the demo, and draw what it prints into docs/images
	$(PYTHON) demo/capture.py

test: lint image ## run every check and test, on a major (PG=17), or some of the tests (TESTS=)
	$(TEST_ENV) .venv/bin/pytest --numprocesses=3 --dist=loadfile $(TESTS)

interop: image .interop/stamp ## test with Django, SQLAlchemy and an embedding server, in a venv of its own
	$(TEST_ENV) .interop/bin/pytest tests/interop

chaos: image .venv/stamp ## random work, kills and faults for MINUTES=10, then what it did and whether a promise broke
	$(TEST_ENV) .venv/bin/pytest -s tests/extension/test_chaos.py --chaos-minutes=$(or $(MINUTES),10)

bench: image .bench/stamp ## measure autoembed and its rivals side by side, into docs/bench (ROWS=2000 RUNS=3)
	@# An index that search() is compared with is there for PostgreSQL 17 alone.
	$(MAKE) image PG=17
	.bench/venv/bin/python -m bench --rows $(or $(ROWS),2000) --runs $(or $(RUNS),3)

docs: .docs/stamp ## build the site of docs/ into build/site, and check its links
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --quiet --strict

reference: image ## write docs/reference.md out of the COMMENTs in sql/
	docs/reference.sh $(IMAGE)

lint: .venv/stamp build ## check style, types, and the safety of the SQL
	.venv/bin/ruff check && .venv/bin/ruff format --check
	.venv/bin/mypy --strict $(PYTHON_SOURCES)
	.venv/bin/shellcheck $(SHELL_SCRIPTS)
	@# A test knows the functions without a search_path (PS005). The one unknown is a DO block in Python.
	@# It fails for the one that is unknown, too.
	.venv/bin/pgspot --no-plpgsql --ignore-lang plpython3u --ignore PS005 \
		build/autoembed--$(VERSION).sql > build/pgspot.txt || true
	@cat build/pgspot.txt
	@grep --quiet "Errors: 0 Warnings: 0 Unknown: 1" build/pgspot.txt

build: ## make the extension's SQL scripts out of sql/ and plpy_src/, into build/
	$(PYTHON) build.py

package: build ## make Debian packages for a major (PG=17), of the model too, and the archive for PGXN, into build/packages/
	@docker/engine.sh
	base=$${BASE_IMAGE:-$$(docker/base.sh $(PG))} && docker build --target scripts -f Dockerfile.postgres --build-arg BASE_IMAGE=$$base -t autoembed:packages-$(PG) .
	mkdir -p build/packages
	tar -c LICENSE packaging | docker run --rm --interactive --entrypoint bash autoembed:packages-$(PG) -c \
		'mkdir /package && tar -x -C /package && /package/packaging/deb.sh /packages && tar -c -C /packages .' | tar -x -C build/packages
	$(PYTHON) packaging/pgxn.py build build/packages

install: build ## install the extension into the PostgreSQL that pg_config names
	install -m 644 extension/autoembed.control build/autoembed--*.sql "$$(pg_config --sharedir)/extension/"

lock: ## choose the tests' packages anew: requirements-dev.txt from requirements-dev.in
	$(PYTHON) -m venv .venv/lock && .venv/lock/bin/pip install --quiet uv
	$(LOCK) --python-version 3.11 --constraint docker/requirements.txt -o requirements-dev.txt requirements-dev.in
	$(LOCK) --python-version 3.11 --constraint requirements-dev.txt -o tests/interop/requirements.txt tests/interop/requirements.in
	$(LOCK) --python-version 3.11 -o docs/requirements.txt docs/requirements.in
	$(LOCK) --python-version 3.11 -o bench/requirements.txt bench/requirements.in
	$(LOCK) --python-version 3.11 --override bench/pgai/unused.txt -o bench/pgai/requirements.txt bench/pgai/requirements.in
	$(LOCK) --python-version 3.12 --no-deps -o bench/pg_textsearch/requirements.txt bench/pg_textsearch/requirements.in

clean: ## remove the demo's container, the images and .venv
	docker rm --force --volumes autoembed-demo
	-docker rmi $$(docker images --quiet --filter reference=autoembed --filter reference=autoembed-base | sort -u) --force
	docker image prune --force --filter label=autoembed
	rm -rf .venv .interop .bench .docs

# Debian's own Python keeps venv in a package apart.
.venv/stamp: requirements-dev.txt
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { apt-get update -qq && apt-get install -qq -y python3-venv; }
	rm -rf .venv && $(PYTHON) -m venv .venv && .venv/bin/pip install --quiet --require-hashes -r requirements-dev.txt
	touch $@

.interop/stamp: tests/interop/requirements.txt
	rm -rf .interop && $(PYTHON) -m venv .interop && .interop/bin/pip install --quiet --require-hashes -r tests/interop/requirements.txt
	touch $@

.docs/stamp: docs/requirements.txt
	rm -rf .docs && $(PYTHON) -m venv .docs && .docs/bin/pip install --quiet --require-hashes -r docs/requirements.txt
	touch $@

.bench/stamp: bench/requirements.txt
	rm -rf .bench/venv && $(PYTHON) -m venv .bench/venv && .bench/venv/bin/pip install --quiet --require-hashes -r bench/requirements.txt
	touch $@
