"""The command line, as a shell sees it."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import candle_phi
from candle_phi import Phi, cli, options
from candle_phi.cli import commands, prompt
from conftest import HAIKU, HANG
from terminal import on_terminal

COMMAND = [sys.executable, "-m", "candle_phi"]
DEMO = ["--model", "demo"]
posix = pytest.mark.skipif(os.name != "posix", reason="pipes, signals and terminals as POSIX has them")


def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    options = {"capture_output": True, "timeout": 60, "stdin": subprocess.DEVNULL} | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run([*COMMAND, *arguments], **options)  # type: ignore[return-value]  # bytes: no option asks for text


def failed(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The one line that a failure says, on stderr."""
    assert done.returncode == code, done.stderr
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("candle-phi: ")
    return line


def test_a_prompt_streams_its_answer(phi: Phi) -> None:
    done = run(HAIKU, "--seed", "1", *DEMO)
    assert done.returncode == 0
    assert done.stderr == b""
    assert done.stdout.decode().rstrip("\n") == phi.generate(HAIKU, seed=1).rstrip("\n")
    assert done.stdout.endswith(b"\n")
    assert run("run", HAIKU, "--seed", "1", *DEMO).stdout == done.stdout


def test_a_timeout_ends_the_answer() -> None:
    done = run(HAIKU, "--json", "--timeout", "0", *DEMO)
    assert (done.returncode, done.stderr) == (0, b"")
    found = json.loads(done.stdout)
    assert (found["text"], found["finish_reason"]) == ("", "timeout")


@pytest.mark.parametrize("line_end", [b"", b"\n", b"\r\n"])
def test_a_prompt_from_stdin(phi: Phi, line_end: bytes) -> None:
    done = run("-", "--seed=1", *DEMO, input=b"\xef\xbb\xbf" + HAIKU.encode() + line_end)
    assert done.stdout.decode().rstrip("\n") == phi.generate(HAIKU, seed=1).rstrip("\n")


def test_stdin_is_the_prompt_where_none_is_typed(phi: Phi) -> None:
    assert run("--seed=1", *DEMO, input=HAIKU.encode()).stdout.decode() == phi.generate(HAIKU, seed=1) + "\n"
    assert "stdin is empty" in failed(run(*DEMO), 2)


@pytest.mark.parametrize(
    ("piped", "prompt"),
    [
        ("Ice.\nMore ice.\n\n", "Ice.\nMore ice.\n\nSummarize:"),
        ("\ufeffIce.", "Ice.\n\nSummarize:"),
        ("\r\n", "Summarize:"),
        ("", "Summarize:"),
    ],
)
def test_stdin_comes_before_a_prompt(phi: Phi, piped: str, prompt: str) -> None:
    done = run("Summarize:", "--json", "--max-tokens=1", "--seed=1", *DEMO, input=piped.encode())
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == len(phi.tokenize([{"role": "user", "content": prompt}]))
    raw = run("Summarize:", "--raw", "--json", "--max-tokens=1", *DEMO, input=piped.encode())
    assert json.loads(raw.stdout)["usage"]["prompt_tokens"] == len(phi.tokenize(prompt))


class Stderr(io.StringIO):
    """Knows when something was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = threading.Event()

    def write(self, text: str) -> int:
        self.written.set()
        return super().write(text)


class Endless(io.RawIOBase):
    """Stdin that ends only when there is a line about it on stderr."""

    def __init__(self, stderr: Stderr) -> None:
        self.stderr = stderr

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        assert self.stderr.written.wait(HANG)
        return 0


def test_stdin_that_stays_open_is_remarked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Stderr()
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Endless(stderr))))
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setattr(prompt, "_PATIENCE", 0)
    assert cli.main(["Hi", *DEMO]) == 0
    assert stderr.getvalue() == "(reading stdin to its end; < /dev/null leaves it out)\n"


@posix
@pytest.mark.parametrize("mode", [os.O_WRONLY, None])
def test_stdin_that_cannot_be_read_beside_a_prompt(phi: Phi, mode: int | None) -> None:
    """nohup gives a stdin that is open for writing only; a service may have none at all."""
    answer = phi.generate(HAIKU, seed=1) + "\n"
    if mode is None:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *COMMAND, HAIKU, "--seed=1", *DEMO]
        done = subprocess.run(command, capture_output=True, timeout=60)
    else:
        stdin = os.open(os.devnull, mode)
        done = run(HAIKU, "--seed=1", *DEMO, stdin=stdin)
        os.close(stdin)
    assert (done.returncode, done.stderr, done.stdout.decode()) == (0, b"", answer)


def test_options_are_the_apis(phi: Phi) -> None:
    done = run(HAIKU, "--json", "--max-tokens", "5", "--temperature", "0.5", "--top-k", "50", "--seed", "3", *DEMO)
    whole = phi.generate(HAIKU, max_tokens=5, temperature=0.5, top_k=50, seed=3)
    found = json.loads(done.stdout)
    assert found["text"] == whole
    assert found["token_ids"] == whole.token_ids
    assert found["finish_reason"] == whole.finish_reason
    assert found["seed"] == 3
    assert found["model"] == phi.path
    assert found["system_fingerprint"] == whole.system_fingerprint
    assert found["usage"]["completion_tokens"] == len(whole.token_ids)
    assert found["timings"]["time_to_first_token"] > 0
    assert found["logprobs"] is None


def test_json_logprobs() -> None:
    done = run(HAIKU, "--json", "--max-tokens=2", "--logprobs", "--top-logprobs", "2", "--seed", "1", *DEMO)
    (first, *_) = json.loads(done.stdout)["logprobs"]
    assert first["logprob"] <= 0
    assert bytes(first["bytes"]).decode(errors="replace") == first["text"]
    assert len(first["top"]) == 2
    assert "--json" in failed(run(HAIKU, "--logprobs", *DEMO), 2)


def test_stop_and_bias_are_repeatable(phi: Phi) -> None:
    whole = phi.generate(HAIKU, seed=1)
    done = run(HAIKU, "--seed", "1", "--stop", "\x01", "--stop", whole[5:8], *DEMO)
    assert done.stdout.decode().rstrip("\n") == whole[: whole.index(whole[5:8])].rstrip("\n")
    biased = run(HAIKU, "--temperature=0", "--max-tokens=1", "--logit-bias=9=100", "--logit-bias=8=1", "--json", *DEMO)
    assert json.loads(biased.stdout)["token_ids"] == [9]
    assert "--logit-bias" in failed(run(HAIKU, "--logit-bias=9", *DEMO), 2)


def test_system_and_raw(phi: Phi) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    done = run("Hi", "--system", "Be brief.", "--json", "--max-tokens=1", *DEMO)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == len(phi.tokenize(messages))
    done = run("Hi\n", "--raw", "--add-bos", "--json", "--max-tokens=1", *DEMO)
    assert json.loads(done.stdout)["usage"]["prompt_tokens"] == len(phi.tokenize("Hi\n", add_bos=True))
    assert "--raw" in failed(run("Hi", "--raw", "--system", "x", *DEMO), 2)


def test_model_options(phi: Phi) -> None:
    done = run(
        "Hi", "--model", phi.path, "--n-ctx=40", "--n-threads=1", "--no-mmap", "--kv-cache=f32", "--max-tokens=1"
    )
    assert done.returncode == 0
    assert "--kv-cache" in failed(run("Hi", "--kv-cache=q1", *DEMO), 2)
    assert "--n-ctx" in failed(run("Hi", "--n-ctx=0", *DEMO), 2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "there is no prompt"),
        (["Hi", "--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["Hi", "--max-tokens", "x"], "--max-tokens"),
        (["Hi", "--temperature", "nan"], "nan"),
        (["Hi", "--max-new-tokens", "5"], "did you mean --max-tokens?"),
        (["Hi", "--temprature", "5"], "did you mean --temperature?"),
        (["Hi", "--max_tokens", "5"], "did you mean --max-tokens?"),
        (["Hi", "--mmap"], "did you mean --no-mmap?"),
        (["Hi", "--add-bos"], "--add-bos needs --raw"),
        (["Hi", "--n-gpu-layers", "1"], "did you mean --device?"),
        (["Hi", "--timeout", "-5"], "--timeout must be a finite number of at least 0"),
        (["Hi", "--max-concurrent", "5"], "--max-concurrent"),
        (["Hi", "there"], "put the prompt in quotes"),
        (["Hi", "--top-logprobs", "3", "--json"], "needs --logprobs"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], says: str) -> None:
    assert says in failed(run(*arguments, *(DEMO if arguments else [])), 2)


@pytest.mark.parametrize("name", ["serve", "batch", "convert", "Serve"])
def test_reserved_commands(name: str) -> None:
    line = failed(run(name), 2)
    assert name.lower() in line
    assert "not in this version" in line


@pytest.mark.parametrize("word", ["lst", "chta", "docter", "tokenise"])
def test_a_word_close_to_a_command(word: str) -> None:
    # an unreadable model shows that none is looked for
    assert "did you mean candle-phi" in failed(run(word, "--model", "none.gguf"), 2)


def test_a_commands_name_as_a_prompt(phi: Phi) -> None:
    answer = phi.generate("list", seed=1, max_tokens=3).rstrip("\n")
    options = [*DEMO, "--seed=1", "--max-tokens=3"]
    for arguments in (["run", "list", *options], [*options, "--", "list"], ["run", *options, "--", "list"]):
        done = run(*arguments)
        assert done.stdout.decode().rstrip("\n") == answer
    done = run("--", "list")
    assert b"not in this version" not in done.stderr


def test_failures_are_one_line(tmp_path: Path, phi: Phi) -> None:
    assert "none.gguf" in failed(run("Hi", "--model", str(tmp_path / "none.gguf")), 1)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"<html>")
    assert "HTML" in failed(run("Hi", "--model", str(bad)), 1)
    assert "40" in failed(run("Hi " * 200, "--n-ctx", "40", *DEMO), 1)


def test_without_a_model(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    line = failed(run("Hello there", env=env), 1)
    assert "Phi-3-mini-4k-instruct-q4.gguf of microsoft/Phi-3-mini-4k-instruct-gguf is not in the cache" in line
    assert "--model demo" in line


def test_version_and_help() -> None:
    assert run("--version").stdout.decode().strip() == f"candle-phi {candle_phi.__version__}"
    shown = run("--help").stdout.decode()
    assert run("help").stdout.decode() == run("-h").stdout.decode() == shown
    for word in ("--max-tokens", "--model", "--json", "--stats", *commands.COMMANDS, *commands.COMMANDS.values()):
        assert word in shown
    assert len(shown.splitlines()) < 50


def test_the_help_of_each_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # the width is ours
    for command in commands.COMMANDS:
        assert cli.main(["help", command]) == 0
        shown = capsys.readouterr().out
        assert cli.main([command, "--help"]) == 0
        assert capsys.readouterr().out == shown
        assert max(map(len, shown.splitlines())) < 80
        assert shown.startswith(f"usage: candle-phi {command}" if command != "help" else "usage: candle-phi")
    assert len(shown.splitlines()) < 60


def test_the_command_line_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Options of the API that it lacks have a reason: one prompt, callbacks, a bar that it draws by itself."""
    absent = {"max_concurrent", "on_progress", "progress", "repo_id", "cache_scope", "speculate"}
    assert cli.main(["help", "run"]) == 0
    shown = set(re.findall(r"--(?:\[no-\])?([\w-]+)", capsys.readouterr().out))
    expected = {*options.GENERATION, *options.MODEL, *options.HUB} - absent
    assert {name.replace("_", "-") for name in expected} - shown == {"mmap"}
    assert "no-mmap" in shown


def test_the_model_option_and_the_variable(phi: Phi, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = phi.generate(HAIKU, seed=1) + "\n"
    assert run(HAIKU, "--seed=1", "-m", "demo").stdout.decode() == answer
    monkeypatch.setenv("CANDLE_PHI_MODEL", "demo")
    assert run(HAIKU, "--seed=1").stdout.decode() == answer
    monkeypatch.setenv("CANDLE_PHI_MODEL", phi.path)
    assert run(HAIKU, "--seed=1").stdout.decode() == answer
    assert b"none.gguf" in run(HAIKU, "-m", "none.gguf").stderr  # the option comes first


def test_stats(phi: Phi) -> None:
    done = run(HAIKU, "--seed=1", "--stats", *DEMO)
    whole = phi.generate(HAIKU, seed=1)
    assert done.stdout.decode() == whole + "\n"
    counts = f"prompt: {whole.usage.prompt_tokens} tokens, .* tok/s; answer: {whole.usage.completion_tokens} tokens, "
    assert re.fullmatch(rf"\({counts}.* tok/s; first token: .* s\)\n", done.stderr.decode())


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--n-ctx=12", "(stopped: the context of 12 tokens is full)"),
        ("--max-tokens=3", "(stopped: --max-tokens 3 is reached)"),
        ("--timeout=0", "(stopped: the timeout of 0 s is over)"),
        ("--max-tokens=500", ""),
    ],
)
def test_what_ended_an_answer_early_is_said(option: str, says: str) -> None:
    done = run("Hi", option, "--seed=1", *DEMO)
    assert (done.returncode, done.stderr.decode().strip()) == (0, says)
    assert run("Hi", option, "--seed=1", "--json", *DEMO).stderr == b""


def test_doctor() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert {"version", "cpu", "kernels", "kernel", "n_threads", "cache_dir"} <= set(found)
    assert found["version"] == candle_phi.__version__
    assert found["kernel"] in found["kernels"]
    assert found["n_threads"] >= 1
    text = run("doctor").stdout.decode()
    assert found["kernel"] in text
    assert len(text.splitlines()) >= 6


@pytest.mark.parametrize(("variable", "value"), [("CANDLE_PHI_KERNEL", "warp"), ("CANDLE_PHI_NUM_THREADS", "many")])
def test_doctor_names_a_variable_that_is_wrong(variable: str, value: str) -> None:
    line = failed(run("doctor", "--json", env={**os.environ, variable: value}), 2)
    assert variable in line
    assert value in line


def test_the_librarys_warnings_are_lines_on_stderr() -> None:
    done = run("<|user|> Hi", "--max-tokens=1", *DEMO)
    assert done.returncode == 0
    assert done.stderr.decode().startswith("candle-phi: the prompt has <|user|>")
    assert "--raw" in done.stderr.decode()


def test_names_of_options_in_other_texts_stay_as_they_are(tmp_path: Path, phi: Phi) -> None:
    """Only options are spelled for the shell: not files, not folders, not what a template says."""
    for name in ("cache_dir/phi.gguf", "chat_template.gguf", "use stop.gguf", "max_tokens must be.gguf", "a  b.gguf"):
        path = str(tmp_path / name)
        assert failed(run("Hi", "--model", path), 1) == f"candle-phi: {path}: no such file"
    bad = tmp_path / "n_ctx=True.gguf"
    bad.write_bytes(b"<html>")
    assert str(bad) in failed(run("Hi", "--model", str(bad)), 1)
    template = "{{ raise_exception('use stop, not max_tokens=True') }}"
    assert "use stop, not max_tokens=True" in failed(run("Hi", "--chat-template", template, *DEMO), 2)


def test_tokenize(phi: Phi) -> None:
    ids = phi.tokenize(" ice hockey")
    assert run("tokenize", " ice hockey", *DEMO).stdout.decode().split() == [str(token) for token in ids]
    found = json.loads(run("tokenize", "-", "--json", *DEMO, input=b" ice hockey").stdout)
    assert found["ids"] == ids
    assert len(found["pieces"]) == len(ids)
    assert "".join(found["pieces"]).strip() == "ice hockey"
    lines = run("tokenize", "<|end|>", "--parse-special", "--add-bos", "--pieces", *DEMO).stdout.decode().splitlines()
    assert lines[0].startswith(f"{phi.bos_token_id}\t")
    assert lines[1].endswith('\t"<|end|>"')


def test_redirected_output_is_utf8_whatever_the_locale(phi: Phi) -> None:
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    done = run("tokenize", "-", "--json", *DEMO, input="氷 🏒".encode(), env=env)
    found = json.loads(done.stdout.decode("utf-8"))
    assert found["ids"] == phi.tokenize("氷 🏒")
    done = run("tokenize", "-", "--pieces", *DEMO, input="é".encode(), env=env)
    assert done.returncode == 0
    assert done.stderr == b""


@posix
def test_a_closed_pipe_ends_quietly() -> None:
    arguments = [HAIKU, "--ignore-eos", *DEMO]
    with subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3)
        process.stdout.close()
        assert process.wait(30) == 0
        assert process.stderr.read() == b""


@posix
@pytest.mark.parametrize("arguments", [["--help"], ["doctor"]])
def test_a_pipe_that_nobody_reads(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, timeout=30)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


@posix
def test_ctrl_c() -> None:
    arguments = [HAIKU, "--ignore-eos", *DEMO]
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background starts without
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() is not None
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


@posix
def test_it_streams() -> None:
    """The first text is there while the generation goes on."""
    with subprocess.Popen([*COMMAND, HAIKU, "--ignore-eos", *DEMO], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)


@posix
def test_control_characters_are_escaped_on_a_terminal() -> None:
    # a model that is made to say ESC: its byte token gets all the bias there is
    with Phi.demo() as phi:
        escape = phi.tokenize("\x1b")[-1]
    arguments = [HAIKU, "--temperature=0", "--max-tokens=2", f"--logit-bias={escape}=100", *DEMO]
    assert run(*arguments).stdout == b"\x1b\x1b\n"
    code, sent, _ = on_terminal([*COMMAND, *arguments], "stdout")
    assert (code, sent) == (0, b"\\x1b\\x1b\r\n")


@posix
def test_a_terminal_that_cannot_show_a_character() -> None:
    arguments = ["tokenize", "氷é", "--pieces", *DEMO]
    code, sent, _ = on_terminal([*COMMAND, *arguments], "stdout", PYTHONIOENCODING="ascii")
    assert code == 0
    assert b'\t"?"\r\n' in sent


def test_the_default_model_is_the_one_in_the_hubs_cache(tmp_path: Path, phi: Phi) -> None:
    repository = tmp_path / "hub" / "models--microsoft--Phi-3-mini-4k-instruct-gguf"
    snapshot = repository / "snapshots" / "a64113399c2f6b8ad3e11c394733a2ddadaa7f33"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(snapshot.name)
    (snapshot / "Phi-3-mini-4k-instruct-q4.gguf").symlink_to(phi.path)
    env = {name: value for name, value in os.environ.items() if name != "HF_HUB_CACHE"} | {"HF_HOME": str(tmp_path)}
    done = run("--seed=1", HAIKU, env=env)
    assert (done.returncode, done.stdout.decode().rstrip("\n")) == (0, phi.generate(HAIKU, seed=1))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_is_said_and_a_full_log_changes_nothing(unbuffered: str) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full:
        for arguments in (["--version"], ["--help"], ["list"], ["Hi", "--max-tokens", "1", *DEMO]):
            done = run(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE, env=env)
            assert (done.returncode, done.stderr) == (1, b"candle-phi: [Errno 28] No space left on device\n"), arguments
        answered = run("Hi", "--max-tokens", "1", *DEMO, capture_output=False, stdout=-1, stderr=full, env=env)
        assert (answered.returncode, answered.stdout.endswith(b"\n")) == (0, True)
        assert run("Hi", "--nope", capture_output=False, stderr=full, env=env).returncode == 2


@pytest.mark.parametrize("arguments", [[], ["-"], ["Hi"], ["tokenize"]])
def test_endless_stdin_takes_bounded_memory(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Endless(io.RawIOBase):
        count = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            self.count += len(buffer)
            assert self.count < 4 << 20, "it is read without end"
            buffer[:] = b"y" * len(buffer)
            return len(buffer)

    monkeypatch.setattr(prompt, "_MOST", 1 << 20)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Endless()), encoding="utf-8"))
    assert cli.main([*arguments, *DEMO]) == 2
    assert capsys.readouterr().err == "candle-phi: stdin has more than 1 MiB of text, which is the limit\n"
