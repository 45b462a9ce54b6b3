"""Mistyped and unlucky command lines: each gets one line on stderr and the right exit code, before any network."""

import contextlib
import io
import os
import shlex
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from candle_phi import cli

NAMES = "Short names: demo, phi-3-mini-4k, phi-3-mini-128k, phi-3-medium-4k, phi-3.5-mini, phi-4, phi-4-mini"
OTHERWISE = f"{NAMES.replace('S', 's', 1)}; or give a .gguf file or a repository of the Hub, ORGANISATION/NAME"

# The command line as a shell reads it; the exit code; what the line on stderr says, "..." stands for anything.
MISTAKES: list[tuple[str, int, str]] = [
    # no prompt, an empty one, one without quotes
    ("", 2, 'there is no prompt, stdin is empty: candle-phi "Why is the sky blue?"'),
    ("run", 2, 'there is no prompt, stdin is empty: candle-phi run "Why is the sky blue?"'),
    ("-", 2, "there is no prompt, stdin is empty"),
    ("--", 2, "there is no prompt, stdin is empty..."),
    ("--seed 1", 2, "there is no prompt, stdin is empty..."),
    ("''", 2, "the prompt is empty"),
    ("'  '", 2, "the prompt is empty"),
    ("run ''", 2, "the prompt is empty"),
    ("'' --raw", 2, "the prompt is empty"),
    ("Hi there", 2, 'put the prompt in quotes: "Hi there"'),
    ("run Why is the sky blue?", 2, 'put the prompt in quotes: "Why is the sky blue?"'),
    ("Write a haiku --seed 1 about ice", 2, 'put the prompt in quotes: "Write a haiku about ice"'),
    ("help me write a poem", 2, 'put the prompt in quotes: "help me write a poem"'),
    ("“Why is it?”", 2, 'the quotes around the prompt are typographic; the shell needs straight ones: "Why ..."'),
    ('"\'Why" "is" "it?\'"', 2, "the prompt is in single quotes, which this shell does not know; use double quotes"),
    ("- 'and more'", 2, "unexpected argument 'and more': with - the prompt is stdin alone"),
    ("Hi –model demo", 2, "'–model' begins with a long dash; an option begins with - or --"),
    ("–model", 2, "'–model' begins with a long dash; an option begins with - or --"),
    # words that are commands elsewhere, or nearly commands
    ("version", 2, "did you mean candle-phi --version? (as a prompt: candle-phi -- version)"),
    ("ls", 2, "did you mean candle-phi list? (as a prompt: candle-phi -- ls)"),
    ("models", 2, "did you mean candle-phi list? (as a prompt: candle-phi -- models)"),
    ("ls -l", 2, "did you mean candle-phi list?..."),
    ("LS", 2, "did you mean candle-phi list?..."),
    ("show phi3", 2, "did you mean candle-phi list?"),
    ("ps", 2, "did you mean candle-phi list?..."),
    ("stop", 2, "there is no command stop: no model stays loaded after an answer (as a prompt: candle-phi -- stop)"),
    ("update", 2, "there is no command update: pip updates the package (as a prompt: candle-phi -- update)"),
    ("login", 2, "there is no command login: --token or HF_TOKEN sets the token for the Hub..."),
    ("generate", 2, 'did you mean candle-phi "PROMPT"? (as a prompt: candle-phi -- generate)'),
    ("generate Hi", 2, 'did you mean candle-phi "PROMPT"?'),
    ("download phi-4", 2, "did you mean candle-phi pull?"),
    ("delete phi-4", 2, "did you mean candle-phi rm?"),
    ("lst", 2, "did you mean candle-phi list? (as a prompt: candle-phi -- lst)"),
    ("Doctr", 2, "did you mean candle-phi doctor? (as a prompt: candle-phi -- Doctr)"),
    ("tokenise --model none.gguf", 2, "did you mean candle-phi tokenize?..."),
    ("--model none.gguf benhc", 2, "did you mean candle-phi bench?..."),
    ("chat Hi", 2, 'candle-phi chat takes its messages from stdin; candle-phi "Hi" answers one prompt'),
    ("chat --load nowhere.chat", 2, "--load nowhere.chat: no such file"),
    ("serve --port 8080", 2, "serve (a server) is not in this version..."),
    ("batch in.jsonl", 2, "batch (files of prompts) is not in this version..."),
    ("convert a b.gguf", 2, "convert (conversion of models) is not in this version..."),
    ("perplexity none.txt", 2, "'none.txt' cannot be read: No such file or directory"),
    ("perplexity a.txt b.txt", 2, "unexpected argument 'b.txt': candle-phi perplexity takes one file"),
    ("perplexity a.txt --stride 0", 2, "--stride must be at least 1, not 0"),
    ("ppl a.txt", 2, "did you mean candle-phi perplexity?..."),
    ("server", 2, "serve (a server) is not in this version..."),
    # a model where the prompt belongs
    ("phi3", 2, 'phi3 is a model: candle-phi --model phi3 "PROMPT" (as a prompt: candle-phi -- phi3)'),
    ("run phi4-mini", 2, 'phi4-mini is a model: candle-phi --model phi4-mini "PROMPT"...'),
    ("run phi3 'Why is it?'", 2, 'phi3 is a model: candle-phi --model phi3 "Why is it?"'),
    ("/?", 2, "did you mean candle-phi --help? (as a prompt: candle-phi -- /?)"),
    ("/bye", 2, "there is no command /bye: no model stays loaded after an answer..."),
    ("phi3:mini", 2, 'phi3:mini is a model: candle-phi --model phi3:mini "PROMPT"...'),
    ("demo", 2, 'demo is a model: candle-phi --model demo "PROMPT"...'),
    ("model.gguf", 2, 'model.gguf is a model: candle-phi --model model.gguf "PROMPT"...'),
    ("microsoft/Phi-3-mini-4k-instruct-gguf", 2, "microsoft/Phi-3-mini-4k-instruct-gguf is a model: ..."),
    # options of other programs
    ("Hi -n 5", 2, "unknown option -n; did you mean --max-tokens?"),
    ("-p Hi", 2, 'unknown option -p: the prompt needs no option: candle-phi "PROMPT"'),
    ("--prompt Hi", 2, 'unknown option --prompt: the prompt needs no option: candle-phi "PROMPT"'),
    ("-f prompt.txt", 2, "unknown option -f: a prompt from a file: candle-phi - < FILE"),
    ("Hi -c 2048", 2, "unknown option -c; did you mean --n-ctx?"),
    ("Hi -t 4", 2, "unknown option -t; did you mean --n-threads?"),
    ("Hi --threads 4", 2, "unknown option --threads; did you mean --n-threads?"),
    ("Hi -ngl 99", 2, "unknown option -ngl; did you mean --device?"),
    ("Hi --n-gpu-layers 1", 2, "unknown option --n-gpu-layers; did you mean --device?"),
    ("Hi --hf-repo a/b", 2, "unknown option --hf-repo; did you mean --model?"),
    ("Hi -hf a/b", 2, "unknown option -hf; did you mean --model?"),
    ("Hi --temp 0.5", 2, "unknown option --temp; did you mean --temperature?"),
    ("Hi --num-predict 5", 2, "unknown option --num-predict; did you mean --max-tokens?"),
    ("Hi --max-new-tokens 5", 2, "unknown option --max-new-tokens; did you mean --max-tokens?"),
    ("Hi --repetition-penalty 1.1", 2, "unknown option --repetition-penalty; did you mean --repeat-penalty?"),
    ("Hi --num-ctx 4096", 2, "unknown option --num-ctx; did you mean --n-ctx?"),
    ("Hi --verbose", 2, "unknown option --verbose; did you mean --stats for speeds?"),
    ("Hi -v", 2, "unknown option -v; did you mean --version, or --stats for speeds?"),
    ("-V", 2, "unknown option -V; did you mean --version?"),
    ("Hi --stream", 2, "unknown option --stream: the answer always streams; --json prints it whole"),
    ("Hi --do-sample", 2, "unknown option --do-sample; did you mean --temperature 0 to take the most likely token?"),
    ("Hi -i", 2, "unknown option -i: candle-phi chat is a conversation"),
    ("Hi --format json", 2, "--format (structured output) is not in this version"),
    ("Hi --schema s.json", 2, "--schema (structured output) is not in this version"),
    ("Hi --guided-json s.json", 2, "--guided-json (structured output) is not in this version"),
    ("Hi --grammar g.gbnf", 2, "--grammar (structured output) is not in this version"),
    ("Hi --lora-path a.gguf", 2, "--lora-path (LoRA adapters) is not in this version"),
    ("Hi --tools t.py", 2, "--tools (tool calls) is not in this version"),
    ("Hi --flash-attn", 2, "unknown option --flash-attn: the engine chooses this itself"),
    ("Hi --output out.txt", 2, "unknown option --output; did you mean > FILE?"),
    ("Hi --think", 2, "--think (reasoning output) is not in this version"),
    ("Hi --assistant-model a/b", 2, "--assistant-model (draft models) is not in this version"),
    ("Hi --max-concurrent 5", 2, "unknown option --max-concurrent: the command line answers one prompt at a time"),
    # misspelt options
    ("Hi --max_tokens 5", 2, "unknown option --max_tokens; did you mean --max-tokens?"),
    ("Hi --max-token=5", 2, "unknown option --max-token; did you mean --max-tokens?"),
    ("Hi --MAX-TOKENS 5", 2, "unknown option --MAX-TOKENS; did you mean --max-tokens?"),
    ("Hi --temprature 1", 2, "unknown option --temprature; did you mean --temperature?"),
    ("Hi --mmap", 2, "unknown option --mmap; did you mean --no-mmap?"),
    ("Hi -model demo", 2, "unknown option -model; did you mean --model?"),
    ("--MODEL demo Hi", 2, 'demo is a model: candle-phi --model demo "Hi"'),
    ("--=", 2, "unknown option -- (see candle-phi --help)"),
    ("---", 2, "unknown option --- (see candle-phi --help)"),
    ("Hi -mdemo", 2, "unknown option -mdemo; did you mean -m demo?"),
    ("Hi -json", 2, "unknown option -json; did you mean --json?"),
    ("Hi -x", 2, "unknown option -x; a prompt that begins with a dash: candle-phi -- -x"),
    ("Hi --nonsense", 2, "unknown option --nonsense (see candle-phi --help)"),
    ("list --jsn", 2, "unknown option --jsn; did you mean --json?"),
    ("pull a/b --max-tokens 5", 2, "candle-phi pull has no option --max-tokens (see candle-phi pull --help)"),
    # values
    ("Hi --max-tokens", 2, "--max-tokens needs a value"),
    ("Hi -m", 2, "--model needs a value"),
    ("Hi --stop -x", 2, "--stop needs a value; one that begins with a dash: --stop=-x"),
    ("Hi --stop -foo", 2, "--stop needs a value; one that begins with a dash: --stop=-foo"),
    ("Hi --stop -json", 2, "--stop needs a value; one that begins with a dash: --stop=-json"),
    ("Hi --stop --json", 2, "--stop needs a value"),
    ("Hi --json=yes", 2, "--json takes no value"),
    ("Hi --max-tokens five", 2, "--max-tokens must be a whole number, not 'five'"),
    ("Hi --max-tokens 1_000", 2, "--max-tokens must be a whole number, not '1_000'"),
    ("Hi --max-tokens 5.5", 2, "--max-tokens must be a whole number, not '5.5'"),
    ("Hi --max-tokens ''", 2, "--max-tokens must be a whole number, not ''"),
    ("Hi --max-tokens 0", 2, "--max-tokens must be at least 1, not 0"),
    ("Hi --max-tokens -1", 2, "--max-tokens must be at least 1, not -1"),
    ("Hi --max-tokens 99999999999", 2, "--max-tokens must be ... 2147483647, not 99999999999"),
    ("Hi --n-ctx 0", 2, "--n-ctx must be at least 1, not 0"),
    ("Hi --n-threads 9999", 2, "--n-threads must be from 1 to 1024, not 9999"),
    ("Hi --temperature hot", 2, "--temperature must be a number, not 'hot'"),
    ("Hi --temperature 0,5", 2, "--temperature must be a number, not '0,5'; did you mean 0.5?"),
    ("Hi --temperature nan", 2, "--temperature must be a finite number ... 0, not nan"),
    ("Hi --temperature inf", 2, "--temperature must be a finite number ... 0, not inf"),
    ("Hi --temperature -1", 2, "--temperature must be a finite number ... 0, not -1.0"),
    ("Hi --top-p 0", 2, "--top-p must be ...above 0 ... 1, not 0.0"),
    ("Hi --top-p 95", 2, "--top-p must be ...above 0 ... 1, not 95.0"),
    ("Hi --min-p 2", 2, "--min-p must be ...from 0 to 1, not 2.0"),
    ("Hi --repeat-penalty 0", 2, "--repeat-penalty must be a finite number above 0, not 0.0"),
    ("Hi --presence-penalty 3", 2, "--presence-penalty must be ...from -2 to 2, not 3.0"),
    ("Hi --seed -1", 2, "--seed must be from 0 to 18446744073709551615, not -1"),
    ("Hi --seed 0x10", 2, "--seed must be a whole number, not '0x10'"),
    ("Hi --timeout -5", 2, "--timeout must be a finite number ... 0, not -5.0"),
    ("Hi --stop ''", 2, "--stop is empty, and every text contains an empty string"),
    ("Hi --logit-bias 5", 2, "--logit-bias needs a token id and a number, as in --logit-bias 13=-5, not '5'"),
    ("Hi --logit-bias a=b", 2, "--logit-bias needs a token id and a number, as in --logit-bias 13=-5, not 'a=b'"),
    ("Hi --logit-bias 5=1000", 2, "--logit-bias must be ...from -100 to 100, not 1000.0"),
    ("Hi --device gpu", 2, "--device must be 'auto', 'cpu', 'cuda' or 'metal', not 'gpu'..."),
    ("Hi --device CPU", 2, "--device must be 'auto', 'cpu', 'cuda' or 'metal', not 'CPU'"),
    ("Hi --kv-cache q4_0", 2, "--kv-cache must be 'f16', 'f32' or 'q8_0', not 'q4_0'"),
    ("Hi --engine llama", 2, "--engine must be 'native' or 'candle', not 'llama'"),
    ("Hi --kernel warp", 2, "--kernel must be one of portable, ..., not 'warp'"),
    (
        "Hi --chat-template chatml.jinja",
        2,
        '--chat-template takes the template itself: --chat-template "$(cat chatml.jinja)"',
    ),
    ("Hi --tokenizer nope.json", 1, "--tokenizer nope.json: no such file"),
    ("Hi --tokenizer models", 1, "--tokenizer models: a folder; give its tokenizer.json"),
    ("Hi --revision 'a b'", 2, '...revision must be a branch, a tag or a commit, not "a b"'),
    ("Hi --tokenizer ''", 2, "--tokenizer is empty"),
    ("Hi --chat-template ''", 2, "--chat-template is empty"),
    ("Hi --cache-dir ''", 2, "--cache-dir is empty"),
    ("Hi --cache-dir notes.txt", 2, "--cache-dir is not a folder: notes.txt"),
    ("list --cache-dir notes.txt", 2, "--cache-dir is not a folder: notes.txt"),
    ("pull phi-4 --cache-dir notes.txt", 2, "--cache-dir is not a folder: notes.txt"),
    ("Hi --max-tokens 1e3", 2, "--max-tokens must be a whole number, not '1e3'"),
    ("Hi --max-tokens --seed 1", 2, "--max-tokens needs a value"),
    ("Hi --temperature 1e39", 2, "--temperature must be at most 3.4e38, not 1e+39"),
    ("Hi --timeout 5s", 2, "--timeout must be a number, not '5s'"),
    ("Hi --logit-bias 5:3", 2, "--logit-bias needs a token id and a number, as in --logit-bias 13=-5, not '5:3'"),
    ("Hi --logit-bias -1=5", 2, "--logit-bias needs a value; one that begins with a dash: --logit-bias=-1=5"),
    ("Hi --n-ctx 4k", 2, "--n-ctx must be a whole number, not '4k'"),
    ("Hi --device cuda:0", 2, "--device must be 'auto', 'cpu', 'cuda' or 'metal', not 'cuda:0'"),
    ("Hi --kernel ''", 2, "--kernel must be one of ..., not ''"),
    ("Hi --no-mmap=1", 2, "--no-mmap takes no value"),
    # options that contradict each other
    ("Hi --raw --system x", 2, "--system needs the chat template, and --raw leaves it out"),
    ("Hi --logprobs", 2, "--logprobs needs --json"),
    ("Hi --top-logprobs 3 --json", 2, "--top-logprobs 3 needs --logprobs"),
    ("Hi --add-bos", 2, "--add-bos needs --raw"),
    ("Hi --no-parse-special", 2, "--parse-special needs --raw"),
    ("Hi -m demo --revision v1", 2, "--revision is for models of the Hub, and demo is bundled"),
    ("Hi -m demo --filename x.gguf", 2, "--filename is for models of the Hub, and demo is bundled"),
    ("Hi -m notes.txt --revision v1", 2, "--revision is for models of the Hub, and notes.txt is a file"),
    # models
    ("Hi -m ''", 2, "--model is empty"),
    ("Hi -m phi-4-mni", 2, f"unknown model 'phi-4-mni'; did you mean phi-4-mini? {NAMES}"),
    ("Hi -m phi-3-mini", 2, f"unknown model 'phi-3-mini'; did you mean phi-3-mini-4k? {NAMES}"),
    ("Hi -m Phi-4", 2, f"unknown model 'Phi-4'; did you mean phi-4? {NAMES}"),
    ("Hi -m phi3:huge", 2, f"unknown model 'phi3:huge'; did you mean phi3? {NAMES}"),
    ("Hi -m Demo", 2, f"unknown model 'Demo'; did you mean demo? {NAMES}"),
    ("Hi '-m demo'", 2, f"unknown model ' demo'; did you mean demo? {NAMES}"),
    (f"Hi -m {'x' * 100_000}", 2, f"unknown model '{'x' * 77}...'; {OTHERWISE}"),
    ("Hi -m '{{ messages }}'", 2, f"unknown model '{{{{ messages }}}}'; {OTHERWISE}"),
    ("Hi -m -", 2, f"unknown model '-'; {OTHERWISE}"),
    ("Hi -m list", 2, f"unknown model 'list'; {OTHERWISE}"),
    ("Hi -m --json", 2, "--model needs a value"),
    ("Hi -m s3://bucket/phi.gguf", 2, "s3://bucket/phi.gguf is a URL, and a model is a short name, ..."),
    ("Hi -m models/model.gguf --revision v1", 1, "models/model.gguf: no such file"),
    ("Hi -m llama3", 2, f"unknown model 'llama3'; {OTHERWISE}"),
    ("Hi -m temperature", 2, f"unknown model 'temperature'; {OTHERWISE}"),
    ("Hi -m max_tokens", 2, f"unknown model 'max_tokens'; {OTHERWISE}"),
    ("Hi -m a/b/c", 2, f"unknown model 'a/b/c'; {OTHERWISE}"),
    ("Hi -m 'my model'", 2, f"unknown model 'my model'; {OTHERWISE}"),
    ("Hi -m /data/cache_dir/phi.gguf", 1, "/data/cache_dir/phi.gguf: no such file"),
    ("Hi -m chat_template.gguf", 1, "chat_template.gguf: no such file"),
    ("Hi -m 'my n_ctx model.gguf'", 1, "my n_ctx model.gguf: no such file"),
    ("Hi -m 'C:\\models\\phi.gguf'", 1, "C:\\models\\phi.gguf: no such file"),
    ("Hi -m models/tyni.gguf", 1, "models/tyni.gguf: no such file; did you mean models/tiny.gguf?"),
    ("Hi -m models", 1, "models is a folder with a .gguf file; did you mean --model models...tiny.gguf?"),
    ("Hi -m empty", 1, "empty is a folder without .gguf files"),
    ("Hi -m notes.txt", 1, "notes.txt... GGUF..."),
    ("Hi -m models/tiny.gguf", 1, "models/tiny.gguf..."),
    ("Hi -m https://huggingface.co/a/b", 2, "https://huggingface.co/a/b is a URL; did you mean --model a/b?"),
    (
        "Hi -m https://huggingface.co/a/b/resolve/main/x.gguf?download=true",
        2,
        "https://huggingface.co/a/b/resolve/main/x.gguf?download=true is a URL; did you mean --model a/b --filename...",
    ),
    ("Hi -m hf.co/a/b:Q4_K_M", 2, "hf.co/a/b:Q4_K_M is a URL; did you mean --model a/b --filename '*Q4_K_M*'?"),
    ("Hi -m https://example.com/x.gguf", 2, "https://example.com/x.gguf is a URL, and a model is a short name, ..."),
    (
        "Hi --local-files-only",
        1,
        "Phi-3-mini-4k-instruct-q4.gguf of microsoft/... is not in the cache ..., and --local-files-only is set; "
        "--model demo needs no download",
    ),
    ("Hi -m org/name --local-files-only", 1, "org/name is not in the cache ..., and --local-files-only is set"),
    # the other commands
    ("pull", 2, "which model? candle-phi pull REPO, where REPO is a repository or a short name"),
    ("pull -m phi-4", 2, "unknown option -m: the model needs no option: candle-phi pull REPO"),
    ("rm --model phi-4", 2, "unknown option --model: the model needs no option: candle-phi rm REPO"),
    ("pull demo", 2, "demo is bundled with the package, and the cache has no such model"),
    ("pull phi-4-mni", 2, f"unknown model 'phi-4-mni'; did you mean phi-4-mini? {NAMES}"),
    ("pull ./x.gguf", 2, "./x.gguf is a path, and pull takes a repository of the Hub or a short name"),
    (
        "pull https://hf.co/a/b/blob/main/x.gguf",
        2,
        "https://hf.co/a/b/blob/main/x.gguf is a URL; did you mean candle-phi pull a/b x.gguf?",
    ),
    ("pull org/name a b", 2, "unexpected argument 'b' (see candle-phi pull --help)"),
    ("rm", 2, "which model? candle-phi rm REPO, where REPO is a repository or a short name"),
    ("rm '*'", 2, f"unknown model '*'; {OTHERWISE}"),
    ("rm -rf phi-4", 2, "unknown option -rf (see candle-phi rm --help)"),
    ("rm phi-4 '../../*'", 1, "../../* of bartowski/phi-4-GGUF is not in the cache..."),
    ("rm demo", 2, "demo is bundled with the package, and the cache has no such model"),
    ("rm phi-4", 1, "phi-4-Q4_K_M.gguf of bartowski/phi-4-GGUF is not in the cache..."),
    ("verify nope", 2, f"unknown model 'nope'; {OTHERWISE}"),
    ("verify phi-4", 1, "phi-4-Q4_K_M.gguf of bartowski/phi-4-GGUF is not in the cache..."),
    ("list phi3", 2, "unexpected argument 'phi3' (see candle-phi list --help)"),
    ("bench demo extra", 2, "unexpected argument 'extra': bench measures one model"),
    ("bench demo -m phi-4", 2, "unexpected argument 'demo': bench measures one model"),
    ("bench dmo", 2, "unknown model 'dmo'; ..."),
    ("bench --repeat 0", 2, "--repeat needs whole numbers from 1 to 999999999, not '0'"),
    ("bench --prompts 32,x", 2, "--prompts needs whole numbers from 1 to 999999999, not 'x'"),
    ("tokenize", 2, 'there is no text, stdin is empty: candle-phi tokenize "Why is the sky blue?"'),
    ("tokenize ''", 2, "the text is empty"),
    ("tokenize two words", 2, 'put the text in quotes: "two words"'),
    ("doctor now", 2, "unexpected argument 'now' (see candle-phi doctor --help)"),
    ("help lst", 2, "there is no command 'lst'; did you mean candle-phi help list?"),
    (
        "help xyzzy",
        2,
        "there is no command 'xyzzy'; the commands: chat, run, pull, list, verify, rm, perplexity, bench, tokenize, "
        "doctor",
    ),
    ("help serve", 2, "serve..."),
    ("help run pull", 2, "unexpected argument 'pull': candle-phi help COMMAND"),
    ("help --max-tokens", 2, "candle-phi help run lists all options"),
]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A Hub that fails the test if it is asked, an empty cache, and a folder with some files."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "TRANSFORMERS_", "CANDLE_PHI_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for folder in ("models", "empty"):
        Path(folder).mkdir()
    Path("models/tiny.gguf").write_bytes(b"GGUF")
    Path("notes.txt").write_text("Not a model.", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as hub:
        hub.setblocking(False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        for variable in ("HF_HUB_ETAG_TIMEOUT", "HF_HUB_DOWNLOAD_TIMEOUT"):
            monkeypatch.setenv(variable, "1")
        yield
        with contextlib.suppress(BlockingIOError):
            hub.accept()
            pytest.fail("the network was asked")


def outcome(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stdin: bytes | None = b""
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command line in this process. `stdin` None: it is closed."""
    monkeypatch.setattr("sys.stdin", None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
    code = cli.main(arguments)
    return code, *capsys.readouterr()


def matches(pattern: str, text: str) -> bool:
    """Whether a text has the parts of a pattern in order, with anything where "..." stands."""
    first, *others = pattern.split("...")
    if not text.startswith(first):
        return False
    at = len(first)
    for part in others:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return pattern.endswith("...") or text.endswith(pattern.rpartition("...")[2])


def test_there_are_enough() -> None:
    assert len({line for line, _, _ in MISTAKES}) == len(MISTAKES) > 150


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("line", "code", "says"), MISTAKES, ids=[line for line, _, _ in MISTAKES])
def test_a_mistake_gets_one_line(
    line: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    returned, out, err = outcome(shlex.split(line), monkeypatch, capsys)
    assert out == ""
    (said,) = err.splitlines()
    assert matches(f"candle-phi: {says}", said), said
    assert returned == code


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("arguments", "stdin", "says"),
    [
        (["-"], b"\n", "there is no prompt, stdin is empty"),
        (["-"], b"a\xff", "stdin is not UTF-8 text: byte 0xff at 1"),
        (["Summarize:"], b"a\xff", "stdin is not UTF-8 text: byte 0xff at 1"),
        ([], b"\xff\xfeH\x00i\x00", "stdin is not UTF-8 text: byte 0xff at 0"),
        (["-"], None, "stdin is closed"),
        ([], None, 'there is no prompt: candle-phi "Why is the sky blue?" (see candle-phi --help)'),
        (["tokenize"], None, 'there is no text: candle-phi tokenize "Why is the sky blue?"...'),
        (["Hi\udcff"], b"", "an argument is not UTF-8 text: 'Hi\\udcff'"),
        (["Hi", "-m", "a\nb"], b"", "--model has a control character: 'a\\nb'"),
        (["Hi", "-m", "a\x1b[31mb"], b"", "unknown model 'a\\x1b[31mb'; ..."),
        (["Hi", "--nonsense\x1b[31m"], b"", "unknown option --nonsense\\x1b[31m..."),
        (["Hi", "-m", "~/x.gguf"], b"", "~/x.gguf: no such file"),
    ],
)
def test_unlucky_input_gets_one_line(
    arguments: list[str],
    stdin: bytes | None,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = outcome(arguments, monkeypatch, capsys, stdin)
    (said,) = err.splitlines()
    assert matches(f"candle-phi: {says}", said), said
    assert out == ""
    assert code == (1 if "no such file" in says else 2)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "line", ["Hi -m phi-4-mni", "Hi --seed x", "- -m none.gguf", "tokenize -m none.gguf", "Hi there"]
)
def test_mistakes_are_found_before_stdin_is_read(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unread(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            pytest.fail("stdin was read")

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(Unread(), encoding="utf-8"))
    assert cli.main(shlex.split(line)) in (1, 2)
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ("phi9", 2, f"CANDLE_PHI_MODEL: unknown model 'phi9'; did you mean phi4? {NAMES}"),
        ("none.gguf", 1, "CANDLE_PHI_MODEL: none.gguf: no such file"),
    ],
)
def test_a_wrong_default_model_is_named(
    value: str, code: int, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CANDLE_PHI_MODEL", value)
    assert outcome(["Hi"], monkeypatch, capsys) == (code, "", f"candle-phi: {says}\n")


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(("variable", "value"), [("CANDLE_PHI_KERNEL", "warp"), ("CANDLE_PHI_NUM_THREADS", "many")])
def test_a_wrong_variable_is_found_before_a_download(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    code, out, err = outcome(["Hi", "-m", "phi-4"], monkeypatch, capsys)
    (said,) = err.splitlines()
    assert (code, out) == (2, "")
    assert variable in said
    assert value in said


@pytest.mark.usefixtures("no_network")
def test_a_home_folder_that_the_shell_did_not_expand(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", os.getcwd())
    monkeypatch.setenv("USERPROFILE", os.getcwd())
    code, _, err = outcome(["Hi", "--model=~/models/tiny.gguf"], monkeypatch, capsys)
    assert code == 1
    assert f"no such file; did you mean {os.getcwd()}/models/tiny.gguf?" in err


@pytest.mark.usefixtures("no_network")
def test_stats_beside_json_are_one_line_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = outcome(["Hi", "-m", "demo", "--json", "--stats"], monkeypatch, capsys)
    assert (code, out[0]) == (0, "{")
    assert len(err.splitlines()) == 1
    assert matches("(prompt: ... tokens, ... tok/s; answer: ...; first token: ... s)", err.strip())


@pytest.mark.usefixtures("no_network")
def test_prompts_that_look_like_options_or_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        ["- milk, eggs: what is this list?"],
        ["--temperature is what?"],
        ["-rf means what?"],
        ["-5"],
        ["--", "-x"],
        ["--", "ls"],
        ["--", "phi3"],
        ["hello"],
        ["What is n_ctx=5, max_tokens and phi.gguf?"],
    ]
    options = ["-m", "demo", "--max-tokens", "2"]
    for arguments in [*([*options, *line] for line in lines), ["run", "list", *options], ["run", "version", *options]]:
        code, out, err = outcome(arguments, monkeypatch, capsys)
        assert (code, err) == (0, "(stopped: --max-tokens 2 is reached)\n"), arguments
        assert out.endswith("\n")
