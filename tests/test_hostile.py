"""Files that are no models, or that change under us: always an exception, soon, and never the end of the process."""

import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from candle_phi import InvalidModelError, ModelNotFoundError, Phi
from conftest import HAIKU, run_python

posix = pytest.mark.skipif(os.name != "posix", reason="takes POSIX files")


@pytest.fixture
def soon() -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 5


def pipe(folder: Path) -> Path:
    path = folder / "pipe.gguf"
    os.mkfifo(path)
    return path


@posix
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("mmap", [True, False])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, mmap: bool) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    for path in [pipe(tmp_path), Path("/dev/zero"), Path("/dev/null"), loop]:
        with pytest.raises(InvalidModelError, match=path.name):
            Phi(path, mmap=mmap)
    with pytest.raises(ModelNotFoundError, match="folder"):
        Phi(tmp_path, mmap=mmap)


@posix
@pytest.mark.usefixtures("soon")
def test_what_is_no_tokenizer_is_not_waited_for(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, 1 << 40)  # a hole
    with pytest.raises(InvalidModelError, match="1099511627776 bytes"):
        Phi.demo(tokenizer=large)
    for path in [pipe(tmp_path), Path("/dev/zero"), tmp_path]:
        with pytest.raises((InvalidModelError, ModelNotFoundError), match=path.name):
            Phi.demo(tokenizer=path)


@posix
def test_a_file_that_may_not_be_read() -> None:
    script = """
import encodings.ascii, os, tempfile  # what is imported later may be root's
from pathlib import Path
from candle_phi import InvalidModelError, Phi
Phi.demo().close()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "secret.gguf")
    path.write_bytes(b"GGUF")
    path.chmod(0)
    os.chmod(folder, 0o755)
    root = os.geteuid() == 0  # who may read everything
    if root: os.seteuid(65534)
    try: Phi(path)
    except InvalidModelError as error: assert "secret.gguf: cannot be read: Permission denied" in str(error), error
    else: raise AssertionError("it opens")
    finally:
        if root: os.seteuid(0)
"""
    run_python(script)


@posix
def test_a_mapped_file_that_shrank_is_refused_and_a_copy_is_whole(tmp_path: Path, phi: Phi) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(phi.path, path)
    text = phi.generate(HAIKU, seed=1)
    with Phi(path, mmap=False) as copied, Phi(path) as mapped:
        assert mapped.generate(HAIKU, seed=1) == text
        os.truncate(path, 100_000)
        assert copied.generate(HAIKU, seed=1) == text
        for call in (lambda: mapped.generate(HAIKU), lambda: mapped.logits([1, 2])):
            with pytest.raises(InvalidModelError, match=r"model\.gguf: the file shrank .* to 100000 bytes.*mmap=False"):
                call()


@posix
def test_a_file_that_is_replaced_by_renaming_stays_what_it_was(tmp_path: Path, phi: Phi) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(phi.path, path)
    other.write_bytes(b"something else")
    with Phi(path) as opened:
        text = opened.generate(HAIKU, seed=1)
        other.replace(path)
        assert opened.generate(HAIKU, seed=1) == text


def test_any_changed_bytes_are_an_error_or_text(tmp_path: Path, phi: Phi) -> None:
    # In a process of its own: what must not happen is its end.
    script = f"""
import random
from pathlib import Path
from candle_phi import Phi, PhiError
whole = Path({phi.path!r}).read_bytes()
path = Path({str(tmp_path / "changed.gguf")!r})
draw = random.Random(5)
texts = errors = 0
for i in range(60):
    changed = bytearray(whole)
    for _ in range([1, 30, 3000][i % 3]):
        at = draw.randrange(70_000 if i % 2 else len(changed))
        changed[at] = draw.randrange(256)
    path.write_bytes(changed)
    try:
        with Phi(path, n_threads=1) as phi:
            result = phi.generate("Write a haiku", max_tokens=5, seed=i, logprobs=True, top_logprobs=2)
            assert result.finish_reason in ("stop", "length")
            result.encode()
            texts += 1
    except PhiError as error:
        assert str(error) and "internal" not in str(error) and "\\n" not in str(error), error
        errors += 1
assert texts > 5 and errors > 5, (texts, errors)
"""
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_small_file_takes_no_memory_that_it_does_not_justify(tmp_path: Path) -> None:
    script = f"""
import resource, struct
from pathlib import Path
from candle_phi import Phi, PhiError
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (512 << 20),) * 2)
key = struct.pack("<Q", 1) + b"k"
for tail in [
    key + struct.pack("<IIQ", 9, 8, 2**26),  # an array of 2^26 strings
    key + struct.pack("<IIQ", 9, 12, 2**26),
    key + struct.pack("<IIQ", 9, 8, 2**63),
    key + struct.pack("<IQ", 8, 2**24),
    key + struct.pack("<IQ", 8, 2**63),
    struct.pack("<Q", 2**40) + b"k",
]:
    for counts in [(0, 1), (2**16, 1), (2**62, 2**62)]:
        path = Path({str(tmp_path / "m.gguf")!r})
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)
        try:
            Phi(path)
        except PhiError:
            pass
        else:
            raise AssertionError(tail)
"""
    run_python(script)
