"""`candle-phi bench` and the comparison: what they report. Speeds themselves are not tested."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn
from xml.etree import ElementTree

import pytest

from candle_phi import Phi, PhiError, _bench, cli
from conftest import ROOT
from test_cli import DEMO, failed, run


def is_speed(value: object) -> bool:
    return isinstance(value, float) and value > 0


def test_json_has_every_documented_key(phi: Phi) -> None:
    found = json.loads(run("bench", "--json", "--repeat=2", "--contexts=0,300,1500", "--n-threads=1", *DEMO).stdout)
    assert list(found) == list(_bench.Report.__dataclass_fields__)
    assert (found["model"], found["engine"], found["kernel"]) == (phi.path, phi.engine, phi.kernel)
    assert (found["n_threads"], found["repeat"]) == (1, 2)
    assert [entry["tokens"] for entry in found["prefill"]] == [32, 128, 512]
    assert [entry["context"] for entry in found["decode"]] == [0, 300]
    for entry in found["prefill"] + found["decode"]:
        assert is_speed(entry["tokens_per_second"])
        assert len(entry["samples"]) == 2
        assert all(map(is_speed, entry["samples"]))
    assert is_speed(found["load_seconds"])
    assert is_speed(found["bandwidth_bytes_per_second"])
    assert [entry["tokens"] for entry in found["pass_costs"]] == list(_bench.PASS_TOKENS)
    for entry in found["pass_costs"]:
        assert len(entry["samples"]) == 2
        assert min(entry["samples"]) <= entry["over_one"] <= max(entry["samples"])
        assert is_speed(entry["over_one"])
    (left_out,) = found["left_out"]  # the bundled model has 1024 positions
    assert "1500" in left_out
    assert str(phi.n_ctx) in left_out


def test_bytes_of_a_token(phi: Phi) -> None:
    """All of the file but its metadata and the embedding table, which has one row for each of the vocabulary."""
    weights, none = phi._model.bytes_per_token(0)
    assert none == 0
    assert 0.5 * Path(phi.path).stat().st_size < weights < Path(phi.path).stat().st_size
    _, one = phi._model.bytes_per_token(1)
    heads, width = phi.metadata["phi3.attention.head_count_kv"], phi.metadata["phi3.embedding_length"]
    assert isinstance(heads, int)
    assert isinstance(width, int)
    head_dim = width // int(str(phi.metadata["phi3.attention.head_count"]))
    assert one == 2 * int(str(phi.metadata["phi3.block_count"])) * heads * head_dim * 2  # keys and values in f16
    window = int(str(phi.metadata["phi3.attention.sliding_window"]))
    assert phi._model.bytes_per_token(window) == (weights, window * one)
    assert phi._model.bytes_per_token(window + 9) == (weights, window * one)
    with Phi.demo(kv_cache="f32") as wide:
        assert wide._model.bytes_per_token(1) == (weights, 2 * one)


def test_the_fraction_is_of_the_bytes_that_are_read() -> None:
    report = _bench.measure(Phi.demo, repeat=1, prompts=[], contexts=[0])
    (decode,) = report.decode
    expected = decode.tokens_per_second * decode.bytes_per_token / report.bandwidth_bytes_per_second
    assert decode.bandwidth_fraction == pytest.approx(expected)
    assert decode.bytes_per_token > report.weight_bytes_per_token


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell")
def test_private_memory_is_neither_the_file_nor_the_probes_buffer() -> None:
    # In a process of its own: others leave memory behind that a model then takes.
    done = run("bench", "--json", "--repeat=1", "--contexts=300", *DEMO)
    report = json.loads(done.stdout)
    assert 0 < report["private_bytes_loaded"] < report["private_bytes_decoding"] < 2**29


def test_the_table() -> None:
    shown = run("bench", "--repeat=1", *DEMO).stdout.decode()
    for words in ("GB/s", "prefill    512 tokens", "decode at    0 tokens", "load", "medians of 1 round", "left out"):
        assert words in shown
    (tokens,), (costs,) = (
        [line for line in shown.splitlines() if start in line] for start in ("in a decode", "over that")
    )
    assert tokens.split()[-10:] == ["1", *map(str, _bench.PASS_TOKENS)]
    assert len(costs.split()) == 5 + 10
    assert [len(tokens), costs.split()[5]] == [len(costs), "1.00"]


def test_candles_own_loop_is_measured_too() -> None:
    found = json.loads(run("bench", "--json", "--repeat=1", "--prompts=32,128", "--engine=candle", *DEMO).stdout)
    assert found["engine"] == "candle"
    assert [entry["tokens"] for entry in found["prefill"]] == [32]
    assert found["pass_costs"] == []
    assert any("sliding window" in what for what in found["left_out"])


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--repeat=0", "--repeat"),
        ("--repeat=two", "'two'"),
        ("--prompts=32,0", "--prompts"),
        ("--contexts=", "--contexts"),
        ("--contexts=-1", "'-1'"),
        ("--kernel=warp", "warp"),
        ("--max-tokens=5", "--max-tokens"),
        ("hello", "hello"),
    ],
)
def test_wrong_options_are_refused(argument: str, says: str) -> None:
    assert says in failed(run("bench", argument, *DEMO), 2)


def test_the_comparison(tmp_path: Path) -> None:
    """Without llama.cpp, which takes minutes to compile: a peer that does not run is left out, with its last words."""
    script = str(ROOT / "benches" / "tokens_per_second.py")
    options = ["--quick", "--model=demo", "--n-threads=2", "--kernels=portable", f"--out={tmp_path}"]
    options.append(f"--llama-python=native={sys.executable}")
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Left out: llama.cpp native flash attention off ended with 1" in done.stdout
    assert "No module named 'llama_cpp'" in done.stdout
    assert "| candle-phi portable / Candle |" in done.stdout
    assert "2 threads over one: prefill 512" in done.stdout
    assert "1500" in done.stdout  # is left out, and said so
    found = json.loads((tmp_path / "tokens_per_second.json").read_text(encoding="utf-8"))
    assert [runner["name"] for runner in found["runs"]] == ["candle-phi portable", "one thread", "Candle"]
    for runner in found["runs"]:
        assert all(is_speed(value) for value in runner["samples"]["decode 0"])
    chart = ElementTree.parse(tmp_path / "tokens_per_second.svg").getroot()
    texts = [text.text for text in chart.iter("{http://www.w3.org/2000/svg}text")]
    assert "Candle" in texts
    assert "prefill 512, tok/s" in texts


@pytest.mark.parametrize("option", ["--llama=sse", "--rounds=0", "--contexts=-1", "--llama-python=sse=/python"])
def test_the_comparison_refuses_wrong_options(option: str) -> None:
    script = str(ROOT / "benches" / "tokens_per_second.py")
    done = subprocess.run([sys.executable, script, "--model=demo", option], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2


def test_the_comparison_says_what_it_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    script = str(ROOT / "benches" / "tokens_per_second.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("there is no model to measure: Phi-3-mini-4k-instruct-q4.gguf is not in the cache.")
    for way in ("candle-phi pull phi-3-mini-4k", "MODEL=path/to/file.gguf", "MODEL=demo"):
        assert way in done.stderr


def test_the_model_as_an_argument(phi: Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def measure(open_model: Callable[[], Phi], **_: object) -> NoReturn:
        with open_model() as model:
            opened.append(model.path)
        raise PhiError("enough")

    monkeypatch.setattr(_bench, "measure", measure)
    assert [cli.main(["bench", "demo"]), cli.main(["bench", "-m", "demo"])] == [1, 1]
    assert opened == [phi.path, phi.path]


def test_other_engines_memory_is_counted_the_same_way() -> None:
    code = "import worker; print(worker.private_bytes.__code__.co_filename)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benches", capture_output=True, text=True, timeout=60
    )
    assert Path(done.stdout.strip()) == ROOT / "python" / "candle_phi" / "_private_memory.py", done.stderr
