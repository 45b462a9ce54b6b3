"""Any number of threads and streams share a model, and none makes another wait for ever."""

import threading
import time

import pytest

from candle_phi import BusyError, Phi, Stream
from conftest import HAIKU


def test_many_threads_many_times(phi: Phi) -> None:
    """The texts are those of a serial run, whatever else is going on."""
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
            if i % 5 == first % 5:  # some are left in the middle
                next(phi.stream(HAIKU, seed=i))

    workers = [threading.Thread(target=generate, args=(first,)) for first in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert wrong == []


def test_slots_are_given_in_order() -> None:
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
            worker.join(60)
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
            reader.join(60)
        assert [found[i] for i in range(4)] == expected


def test_a_complete_text_holds_no_slot() -> None:
    with Phi.demo(max_concurrent=1) as phi:
        unread = phi.stream(HAIKU, seed=1, max_tokens=3, ignore_eos=True)
        first = next(unread)
        begin = time.monotonic()
        assert phi.generate(HAIKU, seed=2)
        assert time.monotonic() - begin < 5
        assert (first + "".join(unread), unread.finish_reason) == (unread.text, "length")


def test_streams_that_nobody_reads_do_not_block_for_ever() -> None:
    """Three models at once, since each takes its ten seconds."""
    models = [Phi.demo(max_concurrent=n) for n in (1, 1, 2)]
    raised: dict[str, BaseException] = {}
    took: dict[str, float] = {}

    def note(name: str, call: object) -> None:
        begin = time.monotonic()
        try:
            call()  # type: ignore[operator]  # what is to be tried
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
                raise KeyboardInterrupt  # in the loop's body: the stream knows nothing of it
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
        thread.join(60)
    assert {name: type(error) for name, error in raised.items()} == dict.fromkeys(calls, BusyError)
    assert all(9 < seconds < 20 for seconds in took.values()), took
    for name in ("zip", "interrupt"):
        assert "1 slot is held by a stream unread for 1" in str(raised[name])
    assert "2 slots are held by streams unread for 1" in str(raised["two"])
    # at once, now that it is known
    again = models[2].stream(HAIKU)
    begin = time.monotonic()
    with pytest.raises(BusyError):
        list(again)
    assert time.monotonic() - begin < 5
    assert again.finish_reason == "error"
    assert list(again) == []
    for stream in left:
        stream.close()
    for model in models:
        assert model.generate(HAIKU, max_tokens=2, ignore_eos=True).finish_reason == "length"
        model.close()


def test_a_reader_that_waits_is_no_idle_one() -> None:
    """A slot that is in use for longer than ten seconds is no error: the other waits, or its own time is over."""
    with Phi.demo(max_concurrent=1, kernel="portable", n_threads=1) as phi:
        stream = phi.stream(HAIKU, ignore_eos=True)
        stop = threading.Event()

        def read() -> None:
            while not stop.wait(0.02):
                next(stream, None)

        reader = threading.Thread(target=read)
        reader.start()
        while not stream.text:
            time.sleep(0.01)
        waited = phi.generate(HAIKU, timeout=1)
        assert waited.finish_reason == "timeout"
        assert waited.timings.prefill_seconds == 0
        stream.cancel()
        stop.set()
        reader.join()
