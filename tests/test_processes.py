"""Models and other processes: fork, spawn, forkserver, pools, pickles, subinterpreters."""

import multiprocessing
import os
import pickle
import sys

import pytest

from candle_phi import Phi, Result
from conftest import HAIKU, run_python

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() here")

# What the scripts begin with. A child that hangs is ended by its alarm, and the script fails.
FORKING = """
import os, signal, sys, threading, time, warnings
HANG = 30
warnings.filterwarnings("ignore", "(?s).*fork", DeprecationWarning)  # Python 3.12: of a fork with threads
from candle_phi import ForkError, Phi
PROMPT = "Write a haiku about ice hockey"

def in_child(work):
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.setitimer(signal.ITIMER_REAL, HANG)
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code}"

def refused(call):
    try:
        call()
    except ForkError as error:
        assert "load it in the child, or use spawn or forkserver" in str(error), error
    else:
        raise AssertionError("no ForkError")
"""


@forks
def test_fork_before_load_works() -> None:
    script = """
def own():
    with Phi.demo() as phi:
        assert phi.generate(PROMPT, seed=1) == text
text = None
in_child(lambda: Phi.demo().generate(PROMPT, seed=1))
text = Phi.demo().generate(PROMPT, seed=1).text
in_child(own)
"""
    run_python(FORKING + script)


@forks
@pytest.mark.parametrize(
    "call",
    [
        "phi.generate('Hi', max_tokens=2)",
        "phi.stream('Hi')",
        "phi.stream([1, 2])",
        "next(started)",
        "next(untouched)",
        "list(started)",
        "started.usage",
        "started.token_ids",
        "started.timings",
        "started.finish_reason",
        "phi.logits([1, 2])",
        "phi.render('Hi')",
        "phi.tokenize('Hi')",
        "phi.tokenize([{'role': 'user', 'content': 'Hi'}])",
        "phi.detokenize([1])",
        "phi.metadata",
    ],
)
def test_a_model_from_before_the_fork_is_refused_at_once(call: str) -> None:
    script = f"""
phi = Phi.demo()
started, untouched = phi.stream(PROMPT, seed=1), phi.stream(PROMPT, seed=2)
next(started)
in_child(lambda: refused(lambda: {call}))
assert len("".join(started)) > 10  # the parent's is as it was
"""
    run_python(FORKING + script)


@forks
def test_ending_what_is_the_parents_does_nothing_at_once() -> None:
    script = """
phi = Phi.demo()
started, untouched = phi.stream(PROMPT, seed=1), phi.stream(PROMPT, seed=2)
first = next(started)

def end():
    global phi, started, untouched
    started.cancel()
    started.close()
    with untouched:
        pass
    assert "demo" in repr(phi)
    assert repr(started) == "<Stream: of another process>"
    assert (phi.n_ctx, phi.closed) == (n_ctx, False)
    phi.close()
    with phi:
        pass
    del started, untouched, phi
    import gc
    gc.collect()

n_ctx = phi.n_ctx
in_child(end)
assert not phi.closed
assert first + "".join(started) == phi.generate(PROMPT, seed=1)
"""
    run_python(FORKING + script)


@forks
def test_a_fork_in_a_callback() -> None:
    """The child comes back into a call whose work goes on in the parent alone."""
    script = """
def fork(p):
    if not children:
        children.append(os.fork())
        if children == [0]:
            signal.setitimer(signal.ITIMER_REAL, HANG)

with Phi.demo(kernel="portable", n_threads=1) as phi:
    children = []
    try: result = phi.generate([5] * 900, max_tokens=2, ignore_eos=True, on_progress=fork)
    except ForkError: os._exit(0 if children == [0] else 1)
    assert result.finish_reason == "length"
    assert os.waitpid(children[0], 0)[1] == 0
    # a load that takes a while
    path = os.path.join(tempfile.mkdtemp(), "large.gguf")
    shutil.copy(phi.path, path)
    os.truncate(path, 1 << 30)
    children = []
    try: Phi(path, mmap=False, on_progress=fork).close()
    except ForkError: os._exit(0 if children == [0] else 1)
    finally:
        if children != [0]: shutil.rmtree(os.path.dirname(path))
    assert os.waitpid(children[0], 0)[1] == 0
"""
    run_python(FORKING + "import shutil, tempfile\n" + script)


@forks
def test_a_child_loads_its_own_after_the_parent_computed() -> None:
    script = """
phi = Phi.demo(n_threads=3)
text = phi.generate(PROMPT, seed=1).text

def own():
    refused(lambda: phi.generate(PROMPT, seed=1))
    with Phi.demo(n_threads=3) as mine:
        assert mine.generate(PROMPT, seed=1) == text
        in_child(lambda: refused(lambda: mine.generate("Hi")))  # a grandchild

in_child(own)
assert phi.generate(PROMPT, seed=1) == text
"""
    run_python(FORKING + script)


@forks
def test_a_fork_in_the_middle_of_other_threads_work() -> None:
    script = """
phi = Phi.demo(n_threads=2)
text = phi.generate(PROMPT, seed=1).text
done = threading.Event()
wrong = []

def work():
    while not done.is_set():
        if phi.generate(PROMPT, seed=1) != text:
            wrong.append(1)

def own():
    refused(lambda: phi.generate(PROMPT, seed=1))
    phi.close()
    with Phi.demo(n_threads=2) as mine:
        assert mine.generate(PROMPT, seed=1) == text

threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads: thread.start()
try:
    for _ in range(12):
        in_child(own)
finally:
    done.set()
    for thread in threads: thread.join()
assert not wrong
"""
    run_python(FORKING + script)


# Runs work in the first process of a new pid namespace. That process ignores its own alarm, so its parent has one.
NAMESPACES = """
import ctypes
libc = ctypes.CDLL(None)
CLONE_NEWPID = 0x20000000

def in_namespace(work):
    if libc.unshare(CLONE_NEWPID) != 0:
        print("unshare is not allowed")
        sys.exit()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert os.getpid() == 1
            work()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, HANG)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0, f"the child ended with {code}"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pid namespaces")
def test_a_forked_child_with_its_parents_process_id_is_a_forked_child() -> None:
    script = """
def child():
    refused(lambda: phi.generate("Hi"))
    print("refused")

def parent():
    global phi
    phi = Phi.demo(n_threads=1)
    phi.generate("Hi", seed=1, max_tokens=2)
    in_namespace(child)

in_namespace(parent)
"""
    printed = run_python(FORKING + NAMESPACES + script)
    if printed != "refused\n":
        pytest.skip(printed.strip())


@forks
def test_candles_engine_is_not_used_on_both_sides_of_a_fork() -> None:
    script = """
Phi.demo(engine="candle").generate("Hi", seed=1, max_tokens=2)

def native_only():
    try: Phi.demo(engine="candle")
    except ForkError as error: assert "thread pool" in str(error)
    else: raise AssertionError("no ForkError")
    Phi.demo().generate("Hi", seed=1, max_tokens=2)

in_child(native_only)
"""
    run_python(FORKING + script)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads in /proc")
def test_the_native_engine_starts_its_own_threads_and_no_others() -> None:
    script = """
import time
from pathlib import Path
from candle_phi import Phi
def threads():
    names = []
    for name in Path("/proc/self/task").glob("*/comm"):
        try: names.append(name.read_text().strip())
        except OSError: pass  # the thread has just ended
    return sorted(name for name in names if name.startswith("candle-phi")), len(names)
def settled(expected):
    until = time.monotonic() + 60
    while threads() != expected and time.monotonic() < until:
        time.sleep(0.01)
    assert threads() == expected, (threads(), expected)
phi = Phi.demo(n_threads=3)
phi.generate("Write a haiku about ice hockey" * 20, seed=1)
phi.logits(range(200), every_position=True)
settled((["candle-phi", "candle-phi-1", "candle-phi-2"], 4))
phi.close()
settled(([], 1))
"""
    run_python(script)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mappings in /proc")
@pytest.mark.parametrize("last", ["model", "unread stream", "result of a load"])
def test_the_file_is_unmapped_when_its_last_holder_is_dropped(last: str) -> None:
    script = f"""
import time
from pathlib import Path
from candle_phi import Phi, _engine
def maps():
    return Path("/proc/self/maps").read_text().count(Path(path).name)
phi = Phi.demo()
path, stream = phi.path, phi.stream("Hi")
assert maps()
if {last!r} == "model":
    stream.close()
    del stream, phi
elif {last!r} == "unread stream":
    del phi
    assert maps()
    del stream
else:
    del stream, phi
    class Enough(Exception): pass
    def stop(p):
        raise Enough
    try: Phi(path, on_progress=stop)
    except Enough: pass
deadline = time.monotonic() + 60
while maps():
    assert time.monotonic() < deadline
    time.sleep(0.001)
"""
    run_python(script)


METHODS = [method for method in ("spawn", "forkserver") if method in multiprocessing.get_all_start_methods()]


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_processes_opens_what_it_is_sent(phi: Phi, method: str) -> None:
    # A bound method pickles with its model, which is opened anew in the child.
    script = f"""
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from candle_phi import Phi, Result
with Phi.demo(n_ctx=100) as phi:
    expected = [phi.generate("Write a haiku about ice hockey", seed=seed) for seed in (1, 2)]
    with ProcessPoolExecutor(1, multiprocessing.get_context({method!r})) as pool:
        jobs = [pool.submit(phi.generate, "Write a haiku about ice hockey", seed=seed) for seed in (1, 2)]
        for job, text in zip(jobs, expected, strict=True):
            result = job.result(60)
            assert type(result) is Result
            assert (result, result.token_ids) == (text, text.token_ids)
            assert result.system_fingerprint == text.system_fingerprint
    with multiprocessing.get_context({method!r}).Pool(1) as pool:
        assert pool.apply(phi.generate, ["Hi"], {{"seed": 3}}) == phi.generate("Hi", seed=3)
"""
    run_python(script)


def test_a_pickled_model_opens_with_its_options(phi: Phi) -> None:
    with Phi.demo(n_ctx=77, n_threads=1, kv_cache="f32", kernel="portable") as other:
        with pickle.loads(pickle.dumps(other)) as again:
            assert repr(again) == repr(other)
            assert (again.n_ctx, again.n_threads, again.kernel) == (77, 1, "portable")
            before, after = (model.generate(HAIKU, seed=1) for model in (other, again))
            assert (after, after.system_fingerprint) == (before, before.system_fingerprint)
        with pytest.raises(TypeError, match="cannot be pickled"):
            pickle.dumps(other.stream(HAIKU))
    with Phi(phi.path, mmap=False) as other, pickle.loads(pickle.dumps(other)) as again:
        assert again.path == os.path.abspath(other.path)


def test_pieces_and_results_go_through_a_pickle(phi: Phi) -> None:
    stream = phi.stream(HAIKU, seed=1, logprobs=True, top_logprobs=2)
    for chunk in stream:
        again = pickle.loads(pickle.dumps(chunk))
        assert (again, again.token_ids, again.logprobs) == (chunk, chunk.token_ids, chunk.logprobs)
    result = phi.generate(HAIKU, seed=1, logprobs=True)
    again = pickle.loads(pickle.dumps(result))
    assert type(again) is Result
    for name in ("text", "token_ids", "logprobs", "finish_reason", "usage", "timings", "seed", "system_fingerprint"):
        assert getattr(again, name) == getattr(result, name)


@pytest.mark.skipif(sys.version_info < (3, 12), reason="before 3.12 a module cannot refuse it")
def test_an_isolated_subinterpreter_is_refused() -> None:
    script = """
try:
    import _interpreters as interpreters
except ImportError:  # before Python 3.13
    import _xxsubinterpreters as interpreters
from candle_phi import Phi
other = interpreters.create()
try:
    failed = interpreters.run_string(other, "import candle_phi")
except Exception as error:  # what later Pythons return
    failed = error
interpreters.destroy(other)
assert "subinterpreters" in str(failed), failed
Phi.demo().generate("Hi", seed=1, max_tokens=1)
"""
    run_python(script, warnings="ignore")  # of an unfinished module
