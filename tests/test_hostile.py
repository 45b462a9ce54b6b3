"""Files that are not models, that change while they are open, or that state absurd sizes. Each is an exception within
seconds, and the process lives on.
"""

import os
import shutil
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from candle_phi import InvalidModelError, ModelNotFoundError, Phi
from conftest import HAIKU, HANG, run_python

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX files")


@pytest.fixture
def soon() -> Iterator[None]:
    """Fails a test that waits for something that never comes."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < HANG


def model_file(path: Path, *, hidden: int = 2, feed_forward: int = 4, n_vocab: int = 300) -> Path:
    """Writes a sound model of one layer and one head. Its F16 weights are zero."""

    def string(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode()

    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3, *[6] * 256]
    numbers = {
        "phi3.block_count": 1,
        "phi3.embedding_length": hidden,
        "phi3.feed_forward_length": feed_forward,
        "phi3.attention.head_count": 1,
        "phi3.context_length": 131_072,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    keys = [
        *(string(name) + struct.pack("<II", 4, number) for name, number in numbers.items()),
        string("general.architecture") + struct.pack("<I", 8) + string("phi3"),
        string("tokenizer.ggml.model") + struct.pack("<I", 8) + string("llama"),
        string("tokenizer.chat_template") + struct.pack("<I", 8) + string("{{ messages[0].content }}"),
        string("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, len(tokens)) + b"".join(map(string, tokens)),
        string("tokenizer.ggml.scores") + struct.pack(f"<IIQ{len(tokens)}f", 9, 6, len(tokens), *[0] * len(tokens)),
        string("tokenizer.ggml.token_type") + struct.pack(f"<IIQ{len(types)}i", 9, 5, len(types), *types),
    ]
    shapes = {
        "token_embd.weight": (hidden, n_vocab),
        "blk.0.attn_norm.weight": (hidden,),
        "blk.0.attn_qkv.weight": (hidden, 3 * hidden),
        "blk.0.attn_output.weight": (hidden, hidden),
        "blk.0.ffn_norm.weight": (hidden,),
        "blk.0.ffn_up.weight": (hidden, 2 * feed_forward),
        "blk.0.ffn_down.weight": (feed_forward, hidden),
        "output_norm.weight": (hidden,),
    }
    table, offset = b"", 0
    for name, shape in shapes.items():
        table += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 1, offset)
        size = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        offset += (size + 31) // 32 * 32
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(keys)) + b"".join(keys) + table
    path.write_bytes(header.ljust((len(header) + 31) // 32 * 32, b"\0"))
    os.truncate(path, path.stat().st_size + offset)
    return path


def pipe(folder: Path) -> Path:
    path = folder / "pipe.gguf"
    os.mkfifo(path)
    return path


@posix
@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("mmap", [True, False])
def test_a_path_that_is_not_a_file_fails_at_once(tmp_path: Path, mmap: bool) -> None:
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    for path in [pipe(tmp_path), Path("/dev/zero"), Path("/dev/null"), loop]:
        with pytest.raises(InvalidModelError, match=path.name):
            Phi(path, mmap=mmap)
    with pytest.raises(ModelNotFoundError, match="folder"):
        Phi(tmp_path, mmap=mmap)


@posix
@pytest.mark.usefixtures("soon")
def test_a_tokenizer_that_is_not_a_file_fails_at_once(tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.touch()
    os.truncate(large, 1 << 40)  # a hole
    with pytest.raises(InvalidModelError, match="1099511627776 bytes"):
        Phi.demo(tokenizer=large)
    for path in [pipe(tmp_path), Path("/dev/zero"), tmp_path]:
        with pytest.raises((InvalidModelError, ModelNotFoundError), match=path.name):
            Phi.demo(tokenizer=path)


@posix
def test_a_file_without_read_permission() -> None:
    script = """
import encodings.ascii, os, tempfile  # a later import may need files of root
from pathlib import Path
from candle_phi import InvalidModelError, Phi
Phi.demo().close()
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "secret.gguf")
    path.write_bytes(b"GGUF")
    path.chmod(0)
    os.chmod(folder, 0o755)
    root = os.geteuid() == 0  # root reads everything
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
            with pytest.raises(InvalidModelError, match=r"model\.gguf: the file shrank .* 100000 bytes.*without mmap"):
                call()


@posix
def test_an_open_file_that_is_replaced_by_renaming_stays_open(tmp_path: Path, phi: Phi) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy(phi.path, path)
    other.write_bytes(b"something else")
    with Phi(path) as opened:
        text = opened.generate(HAIKU, seed=1)
        other.replace(path)
        assert opened.generate(HAIKU, seed=1) == text


def test_any_changed_bytes_are_an_error_or_text(tmp_path: Path, phi: Phi) -> None:
    # In a subprocess, which must not crash.
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


def test_a_feed_forward_length_beyond_any_model_is_named(tmp_path: Path) -> None:
    path = model_file(tmp_path / "wide.gguf", feed_forward=2**20)
    with pytest.raises(InvalidModelError, match=r"wide\.gguf: .*phi3\.feed_forward_length is 1048576"):
        Phi(path)


def test_a_wide_model_takes_bounded_memory_and_a_refusal_leaves_it_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # no address space that is reserved in advance
    path = model_file(tmp_path / "wide.gguf", feed_forward=2**18)
    script = f"""
import sys
from pathlib import Path
from candle_phi import Phi

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) << 10

ids = list(range(200))
with Phi({str(path)!r}, n_threads=2) as phi:
    expected = bytes(phi.logits([1, 2]))
    if sys.platform == "linux":
        import resource
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (taken + (16 << 20), before[1]))
        for refused in (lambda: phi.logits(ids), lambda: phi.generate("a" * 200, raw=True, max_tokens=1)):
            try:
                refused()
            except MemoryError as error:
                assert " bytes of memory" in str(error), error
            else:
                raise AssertionError(f"it fits: {{peak()}}")
        resource.setrlimit(resource.RLIMIT_AS, before)
        begin = peak()
    assert bytes(phi.logits([1, 2])) == expected
    phi.logits(ids)
    if sys.platform == "linux":
        assert peak() - begin < 160 << 20, peak() - begin
"""
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="the platform whose free memory the engine knows")
@pytest.mark.usefixtures("soon")
def test_logits_that_do_not_fit_the_memory_are_refused_at_the_call(tmp_path: Path) -> None:
    with Phi(model_file(tmp_path / "many.gguf", n_vocab=2**22)) as phi:
        ids = [5] * phi.n_ctx
        with pytest.raises(MemoryError, match=r"\(131072, 4194304\) needs 4398046511104 bytes .* bytes are available"):
            phi.logits(ids, every_position=True)
        assert phi.logits([1, 2]).shape == (2**22,)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_file_larger_than_the_address_space_is_a_memory_error_with_its_size(tmp_path: Path) -> None:
    path = model_file(tmp_path / "large.gguf")
    os.truncate(path, 1 << 36)  # a hole
    script = f"""
import resource
from candle_phi import Phi
resource.setrlimit(resource.RLIMIT_AS, (1 << 35,) * 2)
try:
    Phi({str(path)!r})
except MemoryError as error:
    assert "large.gguf: the file needs 68719476736 bytes of address space" in str(error), error
else:
    raise AssertionError("it opens")
with Phi.demo() as phi:
    assert phi.generate("Hi", max_tokens=1)
"""
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space and the number of threads")
def test_a_thread_that_the_system_refuses_is_a_memory_error_and_no_fault_of_the_file() -> None:
    script = """
import os, resource, shutil, tempfile
from pathlib import Path
from candle_phi import Phi

def refused(call, says):
    try:
        call()
    except MemoryError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)

with tempfile.TemporaryDirectory() as folder, Phi.demo() as phi:
    text = phi.render("Hi")
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (32 << 20), before[1]))
    refused(lambda: phi.render("Hi"), "the chat template needs a thread with 67108864 bytes of stack")
    resource.setrlimit(resource.RLIMIT_AS, before)
    assert phi.render("Hi") == text

    path = Path(folder, "model.gguf")
    shutil.copy(phi.path, path)
    os.chmod(folder, 0o755)
    root = os.geteuid() == 0  # root may have any number of threads
    if root:
        os.setresuid(65534, 65534, 0)
    most = resource.getrlimit(resource.RLIMIT_NPROC)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, most[1]))
    refused(lambda: Phi(path), "the system refused to start a thread")
    if root:
        os.setresuid(0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NPROC, most)
    Phi(path).close()
"""
    run_python(script)
