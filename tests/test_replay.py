"""`candle-phi bench --replay`: known texts with and without speculation. Speeds themselves are not tested."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from candle_phi import Phi, PhiError, _replay
from conftest import ROOT
from test_cli import DEMO, failed, run

SENTENCE = "A long shot from one end of the ice to the other goes over the line. "
COPY = {"prompt": f"Say this again: {4 * SENTENCE}", "answer": 4 * SENTENCE}
OTHER = {"prompt": [{"role": "user", "content": "What is a goalie?"}], "answer": "The player who guards the net."}


def written(folder: Path, *lines: Mapping[str, object] | str) -> str:
    path = folder / "replay.jsonl"
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), encoding="utf-8"
    )
    return str(path)


def test_the_figures_are_those_of_the_answers(tmp_path: Path, phi: Phi) -> None:
    found = json.loads(run("bench", "--json", "--replay", written(tmp_path, COPY, "", OTHER), *DEMO).stdout)
    assert list(found) == list(_replay.Report.__dataclass_fields__)
    assert (found["model"], found["kernel"], found["repeat"], found["streams"]) == (phi.path, phi.kernel, 1, 1)
    copy, other = found["lines"]
    assert (copy["lines"], other["lines"], found["total"]["lines"]) == ([1], [3], [1, 3])
    for figures, line in ((copy, COPY), (other, OTHER)):
        assert figures["prompt_tokens"] == phi.count_tokens(line["prompt"])  # type: ignore[arg-type]  # a str or messages
        assert figures["answer_tokens"] == len(phi.tokenize(str(line["answer"])))
        assert figures["passes"] == figures["answer_tokens"] - 1 - figures["accepted_tokens"]
        assert figures["tokens_per_pass"] == pytest.approx((figures["answer_tokens"] - 1) / figures["passes"])
        assert figures["ratio"] == pytest.approx(figures["seconds_without"] / figures["seconds"])
        assert figures["tokens_per_second"] == pytest.approx(
            figures["tokens_per_second_without"] * figures["ratio"], rel=0.3
        )
    assert copy["tokens_per_pass"] > 1.5  # nearly all of it is copied
    assert 0 < copy["accepted_tokens"] <= copy["draft_tokens"]
    assert found["total"]["passes"] == copy["passes"] + other["passes"]


def test_lines_together_and_only_the_first(tmp_path: Path) -> None:
    file = written(tmp_path, COPY, OTHER, COPY, "no JSON, and not read")
    found = json.loads(run("bench", "--json", "--replay", file, "--lines=3", "--streams=2", "--repeat=2", *DEMO).stdout)
    assert [figures["lines"] for figures in found["lines"]] == [[1, 2], [3]]
    assert (found["streams"], found["repeat"]) == (2, 2)


def test_a_prediction_is_copied_too(phi: Phi) -> None:
    def accepted(prediction: str | None) -> int:
        line = _replay.Line(1, [("user", "Hello!")], "One puck, two nets and twelve players on the ice.", prediction)
        return _replay.run(phi, _replay.items(phi, [line], "file"), True).accepted

    assert accepted("One puck, two nets and twelve players on the ice.") > accepted(None)


def test_the_table(tmp_path: Path) -> None:
    shown = run("bench", "--repeat=2", "--replay", written(tmp_path, COPY, OTHER), *DEMO).stdout.decode()
    for words in ("tok/pass", "accepted", "ratio", "line 1", "line 2", "in all", "are equal", "medians of 2 rounds"):
        assert words in shown


def test_plain_figures_have_no_acceptance(tmp_path: Path) -> None:
    """A model that is measured holds and drafts nothing: its text may repeat itself as no real one does."""
    found = run("bench", "--json", "--repeat=1", "--prompts=32", "--contexts=0", *DEMO).stdout.decode()
    assert "draft" not in found
    assert "accept" not in found


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is not a JSON object"),
        ({"answer": "x"}, 'line 1 lacks "prompt"'),
        ({"prompt": "x"}, 'line 1 lacks "answer"'),
        ({"prompt": 5, "answer": "x"}, 'line 1: "prompt" must be a string or a list of messages'),
        ({"prompt": [{"role": "user"}], "answer": "x"}, "line 1: messages[0]"),
        ({"prompt": "x", "answer": ["x"]}, 'line 1: "answer" must be a string'),
        ({"prompt": "x", "answer": "x y z", "prediction": 5}, 'line 1: "prediction" must be a string'),
        ({"prompt": "x", "answer": ""}, "line 1: an answer needs at least 2 tokens, and this one has 0"),
        ({"prompt": "x", "answer": 600 * "ice hockey "}, "do not fit the context of 1024"),
        ("", "has no lines"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, line: Mapping[str, object] | str, says: str) -> None:
    assert says in failed(run("bench", "--replay", written(tmp_path, line), *DEMO), 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts=32"], "--prompts is not for --replay"),
        (["--contexts=0"], "--contexts is not for --replay"),
        (["--lines=0"], "--lines"),
        (["--streams=0"], "--streams"),
        (["--engine=candle"], 'the engine "candle" does not speculate'),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path: Path, options: list[str], says: str) -> None:
    assert says in failed(run("bench", "--replay", written(tmp_path, OTHER), *options, *DEMO), 2)


@pytest.mark.parametrize("option", ["--lines=1", "--streams=2"])
def test_options_of_a_replay_need_a_file(option: str) -> None:
    assert "is for --replay FILE" in failed(run("bench", option, *DEMO), 2)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in failed(run("bench", "--replay", str(tmp_path / "none"), *DEMO), 2)


def test_a_text_that_differs_is_an_error(phi: Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _replay.run

    def altered(phi: Phi, group: list[_replay.Item], speculate: bool) -> _replay.Run:
        found = run(phi, group, speculate)
        return found._replace(texts=["another"]) if speculate else found

    monkeypatch.setattr(_replay, "run", altered)
    line = _replay.Line(7, [("user", "Hello!")], "One puck and two nets.", None)
    with pytest.raises(PhiError, match="line 7: speculation changed the text"):
        _replay.measure(phi, _replay.items(phi, [line], "file"), streams=2)


def has_history() -> bool:
    known = ["git", "-C", str(ROOT), "cat-file", "-e", "58049ca2ce8b9ba9404b0b5474af213e7b49eecb"]
    return subprocess.run(known, capture_output=True).returncode == 0


def replays(folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "benches" / "replays.py"), "--model=demo", f"--out={folder}", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(not has_history(), reason="a shallow clone, or no clone")
def test_replays_of_the_history_are_the_same_each_time(tmp_path: Path, phi: Phi) -> None:
    found = []
    for name in ("one", "two"):
        done = replays(tmp_path / name, "--items=2", "--least=100", "--most=450")
        assert done.returncode == 0, done.stderr
        found.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert found[0] == found[1]
    assert list(map(len, map(bytes.splitlines, found[0].values()))) == [2, 2]
    for line in found[0]["edits.jsonl"].splitlines():
        edit = json.loads(line)
        before = edit["prompt"].partition("\n\n")[2]
        assert before != edit["answer"]
        assert 100 <= len(phi.tokenize(edit["answer"])) <= 450
        kept = set(before.splitlines()) & set(edit["answer"].splitlines())
        assert len(kept) > len(set(edit["answer"].splitlines())) / 2


@pytest.mark.skipif(not has_history(), reason="a shallow clone, or no clone")
def test_a_history_that_is_too_short_is_said(tmp_path: Path) -> None:
    done = replays(tmp_path, "--items=2", "--least=1", "--most=2")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("edits.jsonl: the history has 0 of 2 items")
    done = replays(tmp_path, "--until=0000000000000000000000000000000000000000")
    assert done.returncode == 1
    assert done.stderr.startswith("git log: fatal: ")


def test_the_comparison_goes_on_without_a_peer(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "benches" / "replay_peers.py"), written(tmp_path, COPY, OTHER)]
    options = ["--model=demo", "--kernels=portable", f"--out={tmp_path}", f"--llama-python=native={sys.executable}"]
    done = subprocess.run([*script, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Left out: llama-cpp-python native" in done.stdout
    assert "No module named 'llama_cpp'" in done.stdout
    found = json.loads((tmp_path / "replay_peers.json").read_text(encoding="utf-8"))
    assert [line[0] for line in found["lines"]] == [1, 2]
    [ours] = found["runs"]
    assert ours["samples"]["seconds 1"][0] > 0
