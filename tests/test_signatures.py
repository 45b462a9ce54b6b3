"""Tables, signatures, docstrings and completion have the same names. Wrong calls and foreign names are answered."""

import copy
import inspect
import pickle
import re
import typing
from typing import Any

import pytest

import candle_phi
from candle_phi import Chat, Phi, hub
from candle_phi import options as tables
from candle_phi.cli import main
from candle_phi.keywords import ChatOptions, GenerationOptions, ModelOptions
from candle_phi.testing import FakePhi
from conftest import run_python
from test_api_contract import CHAT, GENERATION, HUB, MAP, MODEL


def test_the_tables_have_the_options_of_the_signatures() -> None:
    assert list(tables.MODEL) == list(MODEL)
    assert list(tables.GENERATION) == list(GENERATION)
    assert set(tables.HUB) == {*HUB, "repo_id", "filename", "on_progress"}
    assert set(ModelOptions.__annotations__) == set(MODEL)
    assert list(tables.MAP) == list(MAP)
    assert set(tables.CHAT) == {*GENERATION, "exact"}
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (tables.MODEL, MODEL),
        (tables.GENERATION, GENERATION),
        (tables.HUB, HUB),
        (tables.MAP, MAP),
    ]
    for table, values in kept:
        for name, value in values.items():
            table[name](name, value)  # each default passes its own check


def test_type_checkers_see_the_options_of_a_generation() -> None:
    hints = typing.get_type_hints(Phi.stream)
    expected = {name: hints[name] for name in GENERATION if name != "on_progress"}
    assert typing.get_type_hints(GenerationOptions) == expected
    assert typing.get_type_hints(ChatOptions) == {name: hints[name] for name in CHAT}


def documented(docstring: str | None) -> list[str]:
    """The names in a docstring's Args, in order."""
    assert docstring is not None
    lines = inspect.cleandoc(docstring).partition("\nArgs:\n")[2].partition("\n\n")[0]
    return [name for names in re.findall(r"^    (\w[\w, ]*):", lines, re.MULTILINE) for name in names.split(", ")]


@pytest.mark.parametrize(
    "function",
    [
        *(Phi.stream, Phi.generate, Phi.astream, Phi.agenerate, Phi.map, Phi.amap, Phi.demo, Phi.from_pretrained),
        *(FakePhi.stream, Phi.chat, Chat.stream, Chat.send, Chat.astream, Chat.asend),
    ],
)
def test_docstrings_have_the_options_of_the_signatures(function: Any) -> None:
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert documented(function.__doc__) == names
    assert "**" not in str(inspect.signature(function))
    assert function.__doc__.count("\nRaises:\n") + function.__doc__.count("    Raises:\n") == 1


def test_the_class_documents_its_options() -> None:
    assert documented(Phi.__doc__) == list(inspect.signature(Phi).parameters) == ["model_path", *MODEL]


@pytest.mark.parametrize(
    "function",
    [
        *(hub.download, hub.cached, hub.info, hub.list_cached, hub.verify, hub.remove),
        *(Phi.logits, Phi.score, Phi.perplexity, Phi.tokenize, Phi.count_tokens, Phi.warm, Phi.load_chat),
        *(Chat.rewind, Chat.save),
    ],
)
def test_functions_document_their_options(function: Any) -> None:
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    assert sorted(documented(function.__doc__)) == sorted(names)


def test_the_command_line_has_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["run", "--help"])
    shown = set(re.findall(r"--(?:no-|\[no-\])?([a-z-]+)", capsys.readouterr().out))
    for name in {*MODEL, *HUB, *GENERATION, "filename"} - {"on_progress", "progress", "max_concurrent", "cache_scope"}:
        assert name.replace("_", "-") in shown, name


METHODS = ["stream", "generate", "astream", "agenerate"]


@pytest.mark.parametrize("opens", [Phi.demo, lambda: FakePhi(["a"])], ids=["demo", "fake"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((), {"messages": [{"role": "user", "content": "Hi"}]}, "takes messages as its first argument: {}(messages)"),
        (("Hi", 50), {}, "options by name, such as max_tokens=50; 2 arguments came by position"),
        ((), {}, "needs a prompt"),
        ((), {"max_tokens": 5}, "needs a prompt"),
        (("Hi",), {"prompt": "Hi"}, "got the prompt twice"),
    ],
)
def test_a_wrong_call_is_explained_by_the_methods_own_name(
    opens: Any, method: str, args: Any, options: Any, says: str
) -> None:
    with opens() as phi, pytest.raises(TypeError) as raised:
        getattr(phi, method)(*args, **options)
    assert str(raised.value).startswith(f"{method}() ")
    assert says.format(method) in str(raised.value)


@pytest.mark.parametrize("opens", [Phi.demo, lambda: FakePhi(["a"])], ids=["demo", "fake"])
@pytest.mark.parametrize("method", ["map", "amap"])
@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((), {}, "needs an iterable of prompts"),
        ((), {"seed": 5}, "needs an iterable of prompts"),
        ((), {"prompt": "Hi"}, "takes several prompts as its first argument: {}([prompt])"),
        ((), {"messages": []}, "takes several prompts as its first argument: {}([prompt])"),
        (("Hi", "there"), {}, "takes all prompts as its first argument and options by name: {}([prompt, prompt])"),
        ((["Hi"],), {"prompts": ["Hi"]}, "got the prompts twice"),
        (("Hi",), {}, "takes several prompts, not a str: {}([prompt])"),
        ((b"Hi",), {}, "takes several prompts, not bytes"),
        ((5,), {}, "takes an iterable of prompts, not int"),
        (({"role": "user", "content": "Hi"},), {}, "takes several prompts, not the messages of one: {}([messages])"),
        (([{"role": "user", "content": "Hi"}],), {}, "takes several prompts, not the messages of one: {}([messages])"),
        (([5, 6],), {}, "takes several prompts, not the token ids of one: {}([ids])"),
        ((["Hi"],), {"on_progress": print}, "has no option 'on_progress'"),
    ],
)
def test_a_wrong_call_with_several_prompts_is_explained(
    opens: Any, method: str, args: Any, options: Any, says: str
) -> None:
    with opens() as phi, pytest.raises(TypeError) as raised:
        getattr(phi, method)(*args, **options)
    assert str(raised.value).startswith(f"{method}() ")
    assert says.format(method) in str(raised.value)


@pytest.mark.parametrize(
    ("args", "options", "says"),
    [
        ((), {"model": "a.gguf"}, r"as its first argument, not as model: Phi\('a.gguf'\)"),
        ((), {"filename": "a.gguf", "n_ctx": 5}, r"not as filename: Phi\('a.gguf'\)"),
        (("a.gguf", 512), {}, "options by name, such as n_ctx=4096"),
        ((), {}, r"needs the path.*Phi\.demo\(\)"),
        (("a.gguf",), {"model": "b"}, "give the path first"),
    ],
)
def test_a_wrong_constructor_call_is_explained(args: Any, options: Any, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Phi(*args, **options)


LATER = ["accepts", "adapters"]


@pytest.mark.parametrize("name", LATER)
def test_methods_of_later_versions(phi: Phi, name: str) -> None:
    assert not hasattr(phi, name)
    with pytest.raises(candle_phi.NotInThisVersionError, match=f"Phi.{name} is not in this version") as raised:
        getattr(phi, name)
    assert isinstance(raised.value, AttributeError)


@pytest.mark.parametrize("name", ["partial", "reasoning", "events"])
def test_stream_attributes_of_later_versions(phi: Phi, name: str) -> None:
    for stream in (phi.stream("Hi"), phi.astream("Hi")):
        assert not hasattr(stream, name)
        with pytest.raises(candle_phi.NotInThisVersionError, match=f"Stream.{name} is not in this version"):
            getattr(stream, name)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("create_chat_completion", r"\.generate\(messages\)"),
        ("create_completion", "raw=True"),
        ("encode", r"\.tokenize\(text\)"),
        ("decode", r"\.detokenize\(ids\)"),
        ("tokenizer", r"\.tokenize\(text\)"),
        ("embed", "no embeddings"),
        ("eval", r"\.logits\(ids\)"),
        ("batch", r"\.map\(prompts\)"),
        ("chat_session", r"use \.chat\(\)"),
        ("save_state", r"\.save\(path\)"),
        ("abatch", r"\.amap\(prompts\)"),
        ("zebra", "'zebra'$"),
    ],
)
def test_other_libraries_methods_are_answered(phi: Phi, name: str, answer: str) -> None:
    with pytest.raises(AttributeError, match=f"'Phi' object has no attribute '{name}'.*|{answer}") as raised:
        getattr(phi, name)
    assert re.search(answer, str(raised.value))


def test_a_model_that_is_called_is_answered(phi: Phi) -> None:
    with pytest.raises(TypeError, match=r"\.generate\(prompt\)"):
        phi("Hi")  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("stream", "phi.stream"),
        ("generate", "phi.generate"),
        ("load", r"Phi\(path\)"),
        ("Llama", "the class is Phi"),
        ("chat", r"phi\.chat\(\)"),
        ("zebra", "'zebra'$"),
    ],
)
def test_other_libraries_module_names_are_answered(name: str, answer: str) -> None:
    with pytest.raises(AttributeError, match=answer):
        getattr(candle_phi, name)


def test_completion_shows_what_is_public() -> None:
    assert dir(candle_phi) == sorted(candle_phi.__all__)
    assert dir(hub) == sorted(hub.__all__)
    assert all(hasattr(hub, name) for name in hub.__all__)


def test_testing_is_imported_at_its_first_use() -> None:
    script = "import candle_phi, sys; before = set(sys.modules); candle_phi.testing.FakePhi; "
    script += "print('candle_phi.testing' in before, 'candle_phi.testing' in sys.modules, candle_phi.testing.__name__)"
    assert run_python(script) == "False True candle_phi.testing\n"
    assert run_python("from candle_phi import testing, FinishReason; print(testing.__name__)") == "candle_phi.testing\n"


def test_the_metadata_is_a_dict_with_a_short_repr(phi: Phi) -> None:
    metadata = phi.metadata
    assert isinstance(metadata, dict)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    assert len(tokens) == phi.n_vocab
    assert len(repr(metadata)) < 4000
    assert f"'tokenizer.ggml.tokens': ['<unk>', '<s>', '</s>', ... {phi.n_vocab} items]" in repr(metadata)
    assert "'general.architecture': 'phi3'" in repr(metadata)
    for again in (copy.copy(metadata), copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))):
        assert again == metadata == dict(metadata)
        assert repr(again) == repr(metadata)


def test_a_coroutine_that_is_not_awaited_has_the_methods_name() -> None:
    coroutine = FakePhi(["a"]).agenerate("Hi")
    assert coroutine.__qualname__ == "agenerate"  # type: ignore[attr-defined]
    coroutine.close()


@pytest.mark.parametrize(
    ("owner", "name"), [(owner, name) for owner in (Phi, Chat) for name in dir(owner) if not name.startswith("_")]
)
def test_annotations_can_be_read_at_run_time(owner: type, name: str) -> None:
    # as pydantic, typer and other libraries read them
    method = inspect.getattr_static(owner, name)
    function = method.fget if isinstance(method, property) else getattr(owner, name)
    assert "return" in typing.get_type_hints(function)
