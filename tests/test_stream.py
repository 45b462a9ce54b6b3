"""A stream yields right text, ends for the right reason, and can be ended from anywhere."""

import copy
import gc
import math
import os
import pickle
import shutil
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest

from candle_phi import ContextLengthError, Phi, Stream
from conftest import HAIKU, run_python


def test_a_haiku_has_three_lines(phi: Phi) -> None:
    lines = phi.generate(HAIKU, seed=1).strip().splitlines()
    assert len(lines) == 3
    assert all(len(line.split()) >= 2 for line in lines)


def test_seeds(phi: Phi) -> None:
    drawn = phi.generate(HAIKU)
    assert phi.generate(HAIKU, seed=drawn.seed) == drawn
    assert len({phi.generate(HAIKU, seed=seed) for seed in range(5)}) > 1
    assert phi.stream(HAIKU).seed != phi.stream(HAIKU).seed
    assert phi.stream(HAIKU, seed=2**64 - 1).seed == 2**64 - 1


def test_greedy_is_the_same_every_time(phi: Phi) -> None:
    assert len({phi.generate(HAIKU, temperature=0, seed=seed) for seed in range(3)}) == 1


def test_the_text_does_not_depend_on_threads(phi: Phi) -> None:
    with Phi.demo(n_threads=1) as one, Phi.demo(n_threads=3) as three:
        assert one.n_threads == 1
        assert three.n_threads == 3
        assert one.generate(HAIKU, seed=5) == three.generate(HAIKU, seed=5) == phi.generate(HAIKU, seed=5)


def test_ignore_eos_goes_on(phi: Phi) -> None:
    usual = phi.generate(HAIKU, temperature=0)
    longer = phi.generate(HAIKU, temperature=0, ignore_eos=True, max_tokens=usual.usage.completion_tokens + 5)
    assert usual.finish_reason == "stop"
    assert longer.finish_reason == "length"
    assert longer.usage.completion_tokens == usual.usage.completion_tokens + 5
    assert longer.token_ids[: len(usual.token_ids)] == usual.token_ids
    assert longer.token_ids[len(usual.token_ids)] in phi.eos_token_ids


def test_the_first_of_several_stop_strings_ends_it(phi: Phi) -> None:
    whole = phi.generate(HAIKU, seed=1)
    early, late = whole[4:7], whole[-3:]
    assert phi.generate(HAIKU, seed=1, stop=[late, early]) == whole[: min(whole.index(early), whole.index(late))]


def test_a_stop_string_that_only_begins_is_text(phi: Phi) -> None:
    whole = phi.generate(HAIKU, seed=1)
    held = phi.generate(HAIKU, seed=1, stop=[whole[-2:] + "never", whole[3:6] + "\x00"])
    assert held == whole
    assert held.token_ids == whole.token_ids


def test_logprobs_are_the_models_own(phi: Phi) -> None:
    prompt = phi.tokenize([{"role": "user", "content": HAIKU}])
    answer = phi.generate(prompt, temperature=2.0, seed=3, logprobs=True, top_logprobs=3, max_tokens=8)
    assert answer.logprobs is not None
    assert [entry.token_id for entry in answer.logprobs] == answer.token_ids
    for position, entry in enumerate(answer.logprobs):
        logits = np.asarray(phi.logits(prompt + answer.token_ids[:position])).astype(np.float64)
        expected = logits - logits.max()
        expected -= math.log(np.exp(expected).sum())
        assert entry.logprob == pytest.approx(expected[entry.token_id], abs=1e-3)
        assert [top.token_id for top in entry.top] == list(np.argsort(-logits, kind="stable")[:3])
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        assert entry.bytes.decode(errors="replace") == entry.text


def test_logit_bias(phi: Phi) -> None:
    (first,) = phi.generate(HAIKU, temperature=0, max_tokens=1, ignore_eos=True).token_ids
    other = (first + 1) % phi.n_vocab
    assert phi.generate(HAIKU, temperature=0, max_tokens=1, ignore_eos=True, logit_bias={first: -100}).token_ids != [
        first
    ]
    biased = phi.generate(HAIKU, temperature=0, max_tokens=1, ignore_eos=True, logit_bias={str(other): 100})
    assert biased.token_ids == [other]


def test_logits(phi: Phi) -> None:
    ids = phi.tokenize("ice hockey")
    last = phi.logits(ids)
    every = phi.logits(ids, every_position=True)
    assert (last.format, last.shape) == ("f", (phi.n_vocab,))
    assert every.shape == (len(ids), phi.n_vocab)
    assert np.allclose(np.asarray(every)[-1], np.asarray(last), atol=1e-3)
    assert np.isfinite(np.asarray(every)).all()
    with pytest.raises(ValueError, match="ids is empty"):
        phi.logits([])
    with pytest.raises(TypeError, match="str"):
        phi.logits("ice")  # type: ignore[arg-type]


def test_logits_outlive_their_model() -> None:
    with Phi.demo() as phi:
        logits = phi.logits([1, 2, 3])
        before = list(logits)
    gc.collect()
    assert list(logits) == before


def test_cancelled_before_its_first_read(phi: Phi) -> None:
    stream = phi.stream(HAIKU)
    stream.cancel()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"
    assert stream.timings.time_to_first_token is None


@pytest.mark.timing
def test_cancel_from_another_thread_returns_at_once(phi: Phi) -> None:
    stream = phi.stream(HAIKU, ignore_eos=True, temperature=0)
    reader = threading.Thread(target=lambda: [None for _ in stream])
    reader.start()
    while not stream.text:
        time.sleep(0.001)
    before = time.monotonic()
    stream.cancel()
    assert time.monotonic() - before < 0.25
    reader.join(5)
    assert not reader.is_alive()
    assert stream.finish_reason == "cancelled"


def test_throw(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1)
    next(stream)
    with pytest.raises(LookupError, match="enough"):
        stream.throw(LookupError("enough"))
    assert stream.finish_reason == "cancelled"
    assert list(stream) == []
    stream = phi.stream(HAIKU, seed=1)
    with pytest.raises(GeneratorExit):
        stream.throw(GeneratorExit)
    assert stream.finish_reason == "cancelled"


def test_threads_share_a_model(phi: Phi) -> None:
    expected = {seed: phi.generate(HAIKU, seed=seed) for seed in range(6)}
    found: dict[int, str] = {}

    def generate(seed: int) -> None:
        found[seed] = phi.generate(HAIKU, seed=seed)

    threads = [threading.Thread(target=generate, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == expected


def test_the_context_ends_it() -> None:
    with Phi.demo(n_ctx=40) as phi:
        assert phi.n_ctx == 40
        answer = phi.generate(HAIKU, seed=1, ignore_eos=True)
        assert answer.finish_reason == "length"
        assert answer.usage.total_tokens == 40
        assert phi.stream([5] * 39).usage.prompt_tokens == 39
        for length in (40, 41, 1000):
            with pytest.raises(ContextLengthError, match=str(length)) as raised:
                phi.stream([5] * length)
            assert (raised.value.prompt_tokens, raised.value.n_ctx) == (length, 40)


def test_dropped_streams_leave_the_model_usable(phi: Phi) -> None:
    before = phi.generate(HAIKU, seed=1)
    for seed in range(40):
        next(phi.stream(HAIKU, seed=seed))
    streams = [weakref.ref(phi.stream(HAIKU)) for _ in range(10)]
    assert not any(stream() for stream in streams)
    assert phi.generate(HAIKU, seed=1) == before


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="no /proc/self/maps here")
def test_a_closed_model_is_unmapped_though_its_streams_are_still_held(tmp_path: Path, phi: Phi) -> None:
    path = tmp_path / "copy.gguf"
    shutil.copy(phi.path, path)
    model = Phi(path)
    finished, unread = model.stream(HAIKU, seed=1, logprobs=True), model.stream(HAIKU)
    assert "".join(finished)
    unread.cancel()
    model.close()
    for _ in range(100):  # the compute thread lets go of it in its own time
        if str(path) not in Path("/proc/self/maps").read_text():
            break
        time.sleep(0.05)
    assert str(path) not in Path("/proc/self/maps").read_text()
    assert finished.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")
def test_a_child_forked_while_a_thread_reads_is_told() -> None:
    script = (
        "import os, sys, threading\n"
        "from candle_phi import ForkError, Phi\n"
        "phi = Phi.demo()\n"
        "stream = phi.stream('Hi', ignore_eos=True)\n"
        "next(stream)\n"
        "threading.Thread(target=lambda: list(stream), daemon=True).start()\n"
        "if os.fork() == 0:\n"
        "    try: next(stream)\n"
        "    except ForkError: os._exit(0)\n"
        "    os._exit(3)\n"
        "code = os.waitstatus_to_exitcode(os.wait()[1])\n"
        "stream.cancel()\n"
        "sys.exit(code)\n"
    )
    run_python(script, warnings="ignore")  # newer Pythons warn of a fork with threads


@pytest.mark.skipif(os.name != "posix", reason="signals as POSIX has them")
def test_a_signal_handler_cannot_read_the_stream_it_interrupts() -> None:
    script = (
        "import signal\n"
        "from candle_phi import Phi\n"
        "def handler(*_):\n"
        "    try: next(stream)\n"
        "    except ValueError as error: print(error)\n"
        "signal.signal(signal.SIGUSR1, handler)\n"
        "stream = Phi.demo().stream('Hi', on_progress=lambda _: signal.raise_signal(signal.SIGUSR1))\n"
        "next(stream)\n"
    )
    assert set(run_python(script).splitlines()) == {"this thread is reading the stream already"}


def test_leaving_with_closes() -> None:
    with Phi.demo() as phi:
        assert not phi.closed
    assert phi.closed


def test_ctrl_c_inside_next() -> None:
    # a process of its own: an interrupt that came late would end these tests
    script = (
        "import signal, threading, time\n"
        "from candle_phi import Phi\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background starts without
        "phi = Phi.demo()\n"
        "stream = phi.stream([5] * (phi.n_ctx - 1))\n"  # its prefill is what takes long
        "threading.Timer(0.02, signal.raise_signal, [signal.SIGINT]).start()\n"
        "try: next(stream); time.sleep(5)\n"
        "except KeyboardInterrupt: print(stream.finish_reason)\n"
        "print(phi.generate('Hi', max_tokens=2, ignore_eos=True).usage.completion_tokens)\n"
    )
    assert run_python(script) == "cancelled\n2\n"


def test_streams_are_not_pickled_or_copied(phi: Phi) -> None:
    stream = phi.stream(HAIKU)
    for again in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="Stream"):
            again(stream)
    assert isinstance(stream, Stream)


def test_a_models_options_are_part_of_its_recipe() -> None:
    with Phi.demo(n_ctx=64, n_threads=1) as phi, pickle.loads(pickle.dumps(phi)) as again:
        assert (again.path, again.n_ctx, again.n_threads) == (phi.path, 64, 1)
    with Phi(phi.path, n_ctx=64) as phi, copy.copy(phi) as again:
        assert (again.path, again.n_ctx) == (phi.path, 64)


def test_repr_is_one_line(phi: Phi) -> None:
    assert repr(phi).startswith(f"Phi({phi.path!r}, n_ctx={phi.n_ctx}, ")
    assert "\n" not in repr(phi)
    assert repr(phi.stream(HAIKU)) == "<Stream: 0 tokens, not finished>"
