# Every command of the project. Each makes what it needs: a virtual environment in .venv with the newest Python found
# (PYTHON=... picks another), the tools from the registries, and the build.

SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help demo build test test-timing test-together test-chats asan miri tsan fuzz soak lint bench bench-streams wheel test-wheel baseline sdist require engine rust-version bench-replay

BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
export VIRTUAL_ENV := $(CURDIR)/.venv# maturin installs here, even if another environment is active
unexport CONDA_PREFIX
export MATURIN_NO_MISSING_BUILD_BACKEND_WARNING := 1# the build backend is in packaging/
RUST_VERSION := $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## build, and stream a haiku from the bundled model
	$(BIN)/candle-phi "Write a haiku about ice hockey" --model demo

build: require .venv/build ## the optimized build, installed in .venv
	$(BIN)/maturin develop --release

# The tests of the engine and the module for Python share a profile and the default features, so that the dependencies
# are compiled once.
engine: require .venv/test
	$(BIN)/maturin develop

test: engine ## the tests of the engine (cargo) and of the package (pytest), with both totals at the end
	@set -o pipefail; \
	cargo test 2>&1 | tee .venv/cargo.log && cargo=0 || cargo=1; \
	$(BIN)/python -m pytest 2>&1 | tee .venv/pytest.log && pytest=0 || pytest=1; \
	awk '/^test result:/ { passed += $$4; failed += $$6 } END { printf "\ncargo:  %d passed, %d failed\n", passed, failed }' \
		.venv/cargo.log; \
	echo "pytest: $$(tail -n 1 .venv/pytest.log | tr -d '=' | xargs)"; \
	test $$cargo$$pytest = 00

# The tests whose subject is time, and the limits of those that also check something else. One test at a time, since they
# would slow each other down. A busy machine may fail them; it must not fail `make test`.
test-timing: engine ## the tests that measure time, with wide limits
	$(BIN)/python -m pytest --timing

TOGETHER_CASES := 20

# The same tests with other cases and more of them. MODEL=... has them on that file alone, with prompts and answers of at most
# TOGETHER_PROMPT (300) and TOGETHER_TOKENS (40) tokens. TOGETHER_FIRST is the number of the first case.
test-together: export TOGETHER_CASES := $(TOGETHER_CASES)
test-together: export TOGETHER_MODEL := $(MODEL)
test-together: engine ## TOGETHER_CASES (20) random sets of streams for each model, kernel and KV type
	$(if $(MODEL),,TOGETHER_CASES=$$((100 * TOGETHER_CASES)) cargo test --test together)
	$(BIN)/python -m pytest -s tests/test_together.py -k $(if $(MODEL),your_own,alone) $(TOGETHER_OPTIONS)

test-chats: engine ## CHAT_STEPS (3000) random calls of chats for each model, or on MODEL=...
	CHAT_STEPS=$(or $(CHAT_STEPS),3000) CHAT_MODEL=$(MODEL) $(BIN)/python -m pytest -s tests/test_chat_states.py

# With --target, even this machine's own, build scripts and derive macros are built without the sanitizer.
asan: require ## the tests of kernels, files and tokenizers under AddressSanitizer (Linux and macOS)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --no-default-features \
		--target $$(rustc --print host-tuple) --lib --test kernels --test gguf --test tokenizer --test chat --test attacks

# Portable alone: Miri reports none of the other kernels' instructions. It reads every block format, packs activations, and runs the
# pool and the ranges that its tasks write.
miri: require ## the portable kernel and the thread pool under Miri (takes a nightly Rust with the component miri)
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --no-default-features --test kernels -- \
		products_are_as_near packing_of positions_and
	MIRIFLAGS=-Zmiri-disable-isolation cargo +nightly miri test --no-default-features --lib -- \
		pool::tests::every pool::tests::a_panic ops::cpu

# It needs a standard library built with the sanitizer, and so the source of rustc's standard library.
tsan: require ## the engine's threads under ThreadSanitizer (Linux; takes `rustup component add rust-src`)
	RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=thread cargo test --no-default-features -Zbuild-std \
		--target $$(rustc --print host-tuple) --lib --test generate --test phi3

FUZZ_SECONDS := 60
FUZZ_TARGETS := gguf hub kv_file listing template text tokenizer

# libFuzzer's instrumentation, as `cargo fuzz` sets it, with AddressSanitizer and the versions of Cargo.lock. More than 512 MiB
# or 5 seconds is a find. Inputs that reach new code are kept in fuzz/corpus, finds in fuzz/artifacts.
fuzz: export RUSTC_BOOTSTRAP := 1
fuzz: export RUSTFLAGS := --cfg fuzzing -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-,level=4 \
	inline-8bit-counters pc-table trace-compares) -Zsanitizer=address
fuzz: export ASAN_OPTIONS := quarantine_size_mb=16
fuzz: require ## FUZZ_SECONDS (60) of every fuzz target, or of FUZZ_TARGETS=... (Linux; takes a C++ compiler)
	cp Cargo.lock fuzz/Cargo.lock
	@set -e; cd fuzz; host=$$(rustc --print host-tuple); \
	cargo build --release --target $$host; \
	built=$${CARGO_TARGET_DIR:-target}/$$host/release; \
	$$built/seeds corpus; \
	for target in $(FUZZ_TARGETS); do \
		mkdir -p artifacts/$$target; \
		$$built/$$target corpus/$$target -artifact_prefix=artifacts/$$target/ -max_total_time=$(FUZZ_SECONDS) \
			-rss_limit_mb=512 -timeout=5 -max_len=65536 -print_final_stats=1; \
	done

SOAK_SECONDS := 60

soak: engine ## SOAK_SECONDS (60) of generations by eight threads, a fifth of them cancelled (Linux)
	$(BIN)/python tests/soak.py --seconds $(SOAK_SECONDS)

lint: engine .venv/lint ## formats, clippy, ruff, mypy, the stubs against the compiled module, and the workflows
	cargo fmt --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --all-targets -- -D warnings
	cargo clippy --lib --no-default-features -- -D warnings
	cargo clippy --all-targets --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest candle_phi._engine
	$(BIN)/python packaging/third_party.py --check
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/zizmor --offline --quiet .

bench: build ## compare with Candle and llama.cpp on the file MODEL=...; the result is in target/bench
	$(BIN)/python benches/tokens_per_second.py $(if $(MODEL),--model "$(MODEL)") $(BENCH_OPTIONS)

bench-streams: build ## 8 streams together and in turn, their waits and memory, on MODEL=...; the result is in target/bench
	$(BIN)/python benches/streams_together.py $(if $(MODEL),--model "$(MODEL)") $(BENCH_OPTIONS)

REPLAY_MODEL := $(if $(MODEL),--model "$(MODEL)")
REPLAY_LINES := 4
REPLAY_KERNELS := avx512 avx2

# Of each file the first lines: an edit has some 700 tokens, which are generated with and without speculation.
bench-replay: build ## REPLAY_LINES (4) known texts with and without speculation, then llama.cpp's prompt lookup, on MODEL=...
	$(BIN)/python benches/replays.py $(REPLAY_MODEL)
	$(BIN)/python benches/replays.py $(REPLAY_MODEL) --items 8 --least 200 --most 500 --out target/replays/short
	for kernel in $(REPLAY_KERNELS); do for texts in edits prose; do \
		$(BIN)/candle-phi bench $(REPLAY_MODEL) --kernel $$kernel --n-threads 2 \
			--replay target/replays/$$texts.jsonl --lines $(REPLAY_LINES) || exit; \
	done; done
	$(BIN)/candle-phi bench $(REPLAY_MODEL) --n-threads 2 --replay target/replays/short/edits.jsonl --lines 8 --streams 8
	$(BIN)/python benches/replay_peers.py target/replays/edits.jsonl $(REPLAY_MODEL) --lines 2 $(BENCH_OPTIONS)

# As in .github/workflows/release.yml: without the flags for builds from source (.cargo/config.toml) and without RUSTFLAGS of the
# environment. zig, which maturin looks for on PATH, links against glibc 2.17.
MATURIN_WHEEL := RUSTFLAGS= PATH="$(CURDIR)/$(BIN):$$PATH" maturin build --release \
	$(if $(filter Linux,$(shell uname)),--zig)

wheel: require .venv/wheel ## this machine's wheel as a release builds it, in dist
	$(MATURIN_WHEEL) --out dist

test-wheel: .venv/wheel ## installs dist's wheel in bare environments, on emulated CPUs and in a frozen app
	$(BIN)/python -m pytest --confcutdir tests/wheel tests/wheel

baseline: wheel ## checks that the wheel's code runs on any x86-64 CPU, or is chosen at run time (Linux; needs binutils)
	rm -rf target/unstripped
	$(MATURIN_WHEEL) --out target/unstripped -- -C strip=none
	$(BIN)/python packaging/baseline.py target/unstripped/*.whl dist/$$(ls target/unstripped)

sdist: require .venv/build ## the source distribution, in dist, and a build from it in a bare environment
	rm -f dist/*.tar.gz
	$(BIN)/maturin sdist --out dist
	$(BIN)/python tests/wheel/install.py dist/*.tar.gz

rust-version:
	@echo $(RUST_VERSION)

# One line says what is missing or too old.
require:
	@command -v cargo > /dev/null && command -v rustc > /dev/null || \
		{ echo "make: Rust is missing: install $(RUST_VERSION) or later, see https://rustup.rs" >&2; exit 1; }
	@found=$$(rustc --version | awk '{ print $$2 }'); \
	printf '%s\n' $(RUST_VERSION) "$${found%%-*}" | sort -V -C || \
		{ echo "make: Rust $$found is too old: $(RUST_VERSION) or later is needed (rustup update)" >&2; exit 1; }

# A Python counts when it is 3.11 or later and can make virtual environments (a package of its own on Debian).
.venv/made:
	@for python in $(or $(PYTHON),python3.15 python3.14 python3.13 python3.12 python3.11 python3 python); do \
		if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2> /dev/null; then \
			"$$python" -m venv .venv && $(BIN)/python -m pip install --quiet --upgrade pip && touch $@ && exit 0; \
		fi; \
	done; \
	echo "make: Python 3.11 or later is missing, or its venv module is (python3-venv on Debian)" >&2; exit 1

# The dependency groups of pyproject.toml.
.venv/build .venv/test .venv/lint .venv/wheel: .venv/%: .venv/made pyproject.toml
	$(BIN)/python -m pip install --quiet --group $*
	@touch $@

include platforms.mk
