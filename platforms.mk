# The other platforms, on Linux x86-64: built here, and run where an emulator exists. Packages have
# Debian's names.
# Decisions: docs/design/tests-and-benchmarks.md

.PHONY: wheel-aarch64 test-aarch64 tools-aarch64 test-windows test-musl check-platforms

# $(call need,COMMAND,PACKAGE) and $(call target,TRIPLE) stop with an error that names what to install.
need = @command -v $(1) > /dev/null || { echo "make: $(1) is missing: apt install $(2)" >&2; exit 1; }
target = @test -d "$$(rustc --print target-libdir --target $(1))" || \
	{ echo "make: Rust's library for $(1) is missing: rustup target add $(1)" >&2; exit 1; }

# ---- Linux on aarch64: qemu and Debian's CPython ----

AARCH64 := aarch64-unknown-linux-gnu
PLAYED := target/aarch64# a virtual environment
PLAYED_SITE := $(PLAYED)/lib/python3.11/site-packages
# CPython and the libraries that it loads
PLAYED_PACKAGES := python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libgcc-s1 zlib1g libexpat1 \
	libffi8 libssl3 liblzma5 libbz2-1.0 libsqlite3-0 libuuid1 libcrypt1 libncursesw6 libtinfo6 libreadline8

wheel-aarch64: require .venv/wheel ## the wheel for Linux on aarch64 as a release builds it, in dist
	$(call target,$(AARCH64))
	rm -f dist/*_aarch64.whl
	$(MATURIN_WHEEL) --target $(AARCH64) --out dist

# Not run: tests that take minutes under emulation; fork(), which qemu does not survive in a process with threads; and a panic
# for lack of memory, since qemu ignores memory limits.
test-aarch64: tools-aarch64 $(PLAYED)/made wheel-aarch64 engine ## the same text, goldens and more on emulated aarch64 CPUs
	rm -rf $(PLAYED)/fp16 $(PLAYED)/from-source $(PLAYED_SITE)/candle_phi*
	$(AARCH64_CARGO) $(BIN)/maturin build --target $(AARCH64) --auditwheel skip --out $(PLAYED)/from-source
	$(PLAYED_PIP) --target $(PLAYED)/fp16 --no-deps $(PLAYED)/from-source/*.whl
	$(PLAYED_PIP) --target $(PLAYED_SITE) --no-deps dist/*_aarch64.whl
	$(BIN)/python -m pytest tests/platforms/aarch64.py
	for cpu in cortex-a53 cortex-a76 max; do \
		CPU=$$cpu $(PLAYED)/bin/python -m pytest -p no:cacheprovider tests/test_golden.py \
			-k "(every_kernel or llama_cpp) and not past2047" || exit 1; \
	done
	CPU=cortex-a76 $(PLAYED)/bin/python -m pytest -p no:cacheprovider $(PLAYED_TESTS) -k "not fork and not a_panic"
	$(AARCH64_CARGO) cargo test --target $(AARCH64) --lib --test kernels --test demo

# Debian's compiler links the build from source, as it would there. zig links the wheel, for its old glibc.
AARCH64_CARGO = env CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -cpu max -L $(CURDIR)/$(PLAYED)/root"
PLAYED_TESTS := $(addprefix tests/test_,options.py errors.py messages.py results.py api_contract.py)
PLAYED_PIP = $(BIN)/python -m pip install --quiet --no-warn-script-location --only-binary :all: --python-version 3.11 \
	$(addprefix --platform ,manylinux_2_28_aarch64 manylinux_2_17_aarch64 manylinux2014_aarch64 linux_aarch64)

tools-aarch64:
	$(call need,qemu-aarch64,qemu-user)
	$(call need,aarch64-linux-gnu-gcc,gcc-aarch64-linux-gnu libc6-dev-arm64-cross)

$(PLAYED)/made: platforms.mk tests/platforms/python | .venv/made
	@dpkg --print-foreign-architectures | grep -qx arm64 || \
		{ echo "make: apt knows no arm64 packages: dpkg --add-architecture arm64 && apt-get update" >&2; exit 1; }
	rm -rf $(PLAYED) && mkdir -p $(PLAYED)/{bin,packages,root}
	cd $(PLAYED)/packages && apt-get download --quiet=2 $(addsuffix :arm64,$(PLAYED_PACKAGES))
	for package in $(PLAYED)/packages/*.deb; do dpkg-deb -x $$package $(PLAYED)/root; done
	cp tests/platforms/python $(PLAYED)/bin
	echo "home = $(CURDIR)/$(PLAYED)/root/usr/bin" > $(PLAYED)/pyvenv.cfg
	$(PLAYED_PIP) --target $(PLAYED_SITE) numpy pytest
	touch $@

# ---- Windows: MinGW and Wine ----

WINDOWS := x86_64-pc-windows-gnu
WINE ?= $(or $(shell command -v wine64 || command -v wine || ls /usr/lib/wine/wine64 2> /dev/null),wine64)

test-windows: export WINEPREFIX := $(CURDIR)/target/windows/wine
test-windows: export WINEPATH := Z:$(CURDIR)/target/windows
test-windows: export WINEDEBUG := -all
test-windows: export CARGO_TARGET_X86_64_PC_WINDOWS_GNU_RUNNER := $(WINE)
test-windows: require target/windows/bcryptprimitives.dll ## the engine's tests for Windows, under Wine
	$(call need,$(WINE),wine64)
	$(call target,$(WINDOWS))
	cargo test --target $(WINDOWS) --tests

target/windows/%.dll: tests/platforms/%.c
	$(call need,x86_64-w64-mingw32-gcc,gcc-mingw-w64-x86-64-posix)
	mkdir -p $(@D)
	x86_64-w64-mingw32-gcc -shared -Os -o $@ $<

# ---- musl, and what is only compiled ----

MUSL := x86_64-unknown-linux-musl

# Static, so that any Linux runs it. The wheels for musl are not static.
test-musl: require ## the engine's tests for musl
	$(call need,musl-gcc,musl-tools)
	$(call target,$(MUSL))
	RUSTFLAGS= cargo test --target $(MUSL) --tests

CHECKED := aarch64-apple-darwin x86_64-apple-darwin aarch64-pc-windows-msvc x86_64-pc-windows-msvc

# Without the feature `hub`: its TLS is the only part that needs a C compiler for the platform.
check-platforms: require ## type-checks the module for Python as macOS and Windows compile it
	$(foreach triple,$(CHECKED),$(call target,$(triple))$(newline))
	for triple in $(CHECKED); do \
		PYO3_NO_PYTHON=1 cargo check --lib --no-default-features --features python --target $$triple || exit 1; \
	done

define newline


endef
