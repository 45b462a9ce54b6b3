"""Any number of threads and streams share a model, and none of them blocks another for ever."""

import threading
import time

import pytest

from candle_phi import BusyError, Phi, Stream
from conftest import HAIKU, HANG, Stopwatch, wait_until


def test_many_threads_many_times(phi: Phi) -> None:
    """Every text equals that of a serial run."""
    seeds, threads = range(25), 8
    options = [{"seed": seed, "temperature": 0.5 + seed % 3, "max_tokens": 5 + seed} for seed in seeds]
    expected = [phi.generate(HAIKU, **given) for given in options]  # type: ignore[arg-type]  # a mixed mapping
    wrong: list[object] = []

    def generate(first: int) -> None:
        for i in seeds:
            turn = (i + 3 * first) % len(options)
            text = phi.generate(HAIKU, **options[turn])  # type: ignore[arg-type]  # a mixed mapping
            if (text, text.token_ids) != (expected[turn], expected[turn].token_ids):
                wrong.append((turn, text))
            if i % 5 == first % 5:  # some streams are abandoned
                next(phi.stream(HAIKU, seed=i))

    workers = [threading.Thread(target=generate, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(2 * HANG)
        assert not worker.is_alive(), "hangs"
    assert wrong == []


def test_more_threads_than_slots() -> None:
    with Phi.demo(max_concurrent=2) as phi:
        expected = {seed: phi.generate(HAIKU, seed=seed) for seed in range(8)}
        found: dict[int, str] = {}

        def generate(seed: int) -> None:
            found[seed] = phi.generate(HAIKU, seed=seed)

        workers = [threading.Thread(target=generate, args=(seed,)) for seed in expected]
        for worker in workers:
            worker.start()
        phi.logits([1, 2, 3])
        for worker in workers:
            worker.join(HANG)
        assert found == expected


def test_candles_loop_has_one_slot() -> None:
    with Phi.demo(engine="candle") as phi:
        expected = [phi.generate(HAIKU, seed=seed, max_tokens=5) for seed in range(4)]
        streams = [phi.stream(HAIKU, seed=seed, max_tokens=5) for seed in range(4)]
        found: dict[int, str] = {}

        def read(i: int) -> None:
            found[i] = "".join(streams[i])

        readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(HANG)
        assert [found[i] for i in range(4)] == expected


def test_a_complete_text_holds_no_slot() -> None:
    with Phi.demo(max_concurrent=1) as phi:
        unread = phi.stream(HAIKU, seed=1, max_tokens=3, ignore_eos=True)
        first = next(unread)
        assert phi.generate(HAIKU, seed=2)  # a BusyError after 10 s if the slot were held
        assert (first + "".join(unread), unread.finish_reason) == (unread.text, "length")


def test_unread_streams_do_not_block_for_ever(stopwatch: Stopwatch) -> None:
    """Three models at the same time, since each test case takes ten seconds."""
    models = [Phi.demo(max_concurrent=n) for n in (1, 1, 2)]
    raised: dict[str, BaseException] = {}
    took: dict[str, float] = {}

    def note(name: str, call: object) -> None:
        begin = time.monotonic()
        try:
            call()  # type: ignore[operator]  # one of `calls`
        except BaseException as error:
            raised[name] = error
        took[name] = time.monotonic() - begin

    def zipped() -> None:
        for _ in zip(models[0].stream(HAIKU, ignore_eos=True), models[0].stream(HAIKU), strict=True):
            pass

    left: list[Stream] = []

    def interrupted() -> None:
        stream = models[1].stream(HAIKU, ignore_eos=True)
        left.append(stream)
        try:
            for _ in stream:
                raise KeyboardInterrupt  # in the loop's body, where the stream does not see it
        except KeyboardInterrupt:
            models[1].generate(HAIKU)

    def two_unread() -> None:
        for stream in [models[2].stream(HAIKU, ignore_eos=True) for _ in range(2)]:
            left.append(stream)
            next(stream)
        models[2].logits([1, 2, 3])

    calls = {"zip": zipped, "interrupt": interrupted, "two": two_unread}
    threads = [threading.Thread(target=note, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG)
    assert {name: type(error) for name, error in raised.items()} == dict.fromkeys(calls, BusyError)
    assert all(seconds > 9 for seconds in took.values()), took
    stopwatch.check(max(took.values()), 20)
    for name in ("zip", "interrupt"):
        assert str(raised[name]).startswith("1 slot is held by a stream unread for ")
    assert str(raised["two"]).startswith("2 slots are held by streams unread for ")
    # the next call does not wait another ten seconds
    again = models[2].stream(HAIKU)
    begin = time.monotonic()
    with pytest.raises(BusyError):
        list(again)
    stopwatch.check(time.monotonic() - begin, 5)
    assert again.finish_reason == "error"
    assert list(again) == []
    for stream in left:
        stream.close()
    for model in models:
        assert model.generate(HAIKU, max_tokens=2, ignore_eos=True).finish_reason == "length"
        model.close()


def test_a_slot_in_use_is_no_error() -> None:
    """A stream that is read may hold its slot for over ten seconds: a second call waits until its own timeout."""
    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        stream = phi.stream(HAIKU, ignore_eos=True)
        stop = threading.Event()

        def read() -> None:
            while not stop.wait(0.02):  # a slow reader
                next(stream, None)

        reader = threading.Thread(target=read)
        reader.start()
        wait_until(lambda: stream.text)
        waited = phi.generate(HAIKU, timeout=1)
        assert waited.finish_reason == "timeout"
        assert waited.timings.prefill_seconds == 0
        stream.cancel()
        stop.set()
        reader.join()
