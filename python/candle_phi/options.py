"""The options of a model and of a generation: what each may be."""
# Decisions: docs/design/python.md

import math
import numbers
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal, NamedTuple, NoReturn, get_args

from .errors import NotInThisVersionError
from .option_names import FOREIGN, RENAMED, UNBUILT, closest, not_in_this_version

Device = Literal["auto", "cpu", "cuda", "metal"]
Engine = Literal["native", "candle"]
KvCache = Literal["f16", "f32", "q8_0"]

Check = Callable[[str, object], Any]
"""Takes an option's name and value. Returns the value for the engine, or raises an `OptionError` that names both."""

Spelling = Callable[[str, str | None], str]
"""Spells an option for a front end. Takes the option's name and its value, if the message has one."""


class Option(NamedTuple):
    """An option inside a message, and its value where the message has one: `top_logprobs=3`."""

    name: str
    value: str | None = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value}"


class OptionError(Exception):
    """An option has a value that it cannot have. Raised as `OptionTypeError` or `OptionValueError`.

    Args:
        option: the option, a str or an `Option`. A str may have an index: `"stop[0]"`.
        problem: what is wrong. Every option that it mentions is an `Option`, so that a front end can spell it.

    Attributes:
        name: the option's name in the Python API, without an index.
    """

    def __init__(self, option: str | Option, *problem: str | Option) -> None:
        self._option = Option(option) if isinstance(option, str) else option
        self._problem = problem
        self.name = self._option.name.partition("[")[0]
        super().__init__(f"{self._option} {''.join(map(str, problem))}")

    def spelled(self, spell: Spelling) -> str:
        """The message with each option spelled by `spell`. Indices are left out."""
        problem = "".join(part if isinstance(part, str) else spell(*part) for part in self._problem)
        return f"{spell(self.name, self._option.value)} {problem}"

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return type(self), (self._option, *self._problem)


class OptionTypeError(OptionError, TypeError):
    """An option has a value of the wrong type."""


class OptionValueError(OptionError, ValueError):
    """An option has a value that is out of range, or that another option rules out."""


def _abbreviate(value: object) -> str:
    """A value's repr, cut to one short line."""
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # an int of more than 4300 digits, or a class whose `__repr__` fails
        text = f"{type(value).__name__} too large to print" if isinstance(value, int) else f"no repr: {error}"
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong_type(name: str, wanted: str, value: object) -> NoReturn:
    kind = type(value)
    shown = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    raise OptionTypeError(name, f"must be {wanted}, not {shown} ({_abbreviate(value)})")


def _out_of_range(name: str, wanted: str, value: object) -> NoReturn:
    raise OptionValueError(name, f"must be {wanted}, not {_abbreviate(value)}")


def _integer(low: int, high: int | None = None, *, wanted: str = "an int") -> Check:
    """Accepts ints from `low` to `high`. None stands for the engine's own limit, 2**31 - 1."""
    limit = 2**31 - 1 if high is None else high

    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _wrong_type(name, wanted, value)
        integer = int(value)
        if not low <= integer <= limit:
            one_sided = f"at least {low}" if integer < low else f"at most {limit}"
            _out_of_range(name, one_sided if high is None else f"from {low} to {high}", value)
        return integer

    return check


def _number(low: float, high: float = math.inf, *, above_low: bool = False) -> Check:
    if math.isfinite(high):
        wanted = f"above {low:g} and at most {high:g}" if above_low else f"from {low:g} to {high:g}"
    else:
        wanted = f"a finite number {'above' if above_low else 'of at least'} {low:g}"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _wrong_type(name, "a number", value)
        try:
            number = float(value)
            (single,) = struct.unpack("f", struct.pack("f", number))  # the engine's precision
        except OverflowError:
            _out_of_range(name, wanted, value)
        if math.isfinite(number) and not math.isfinite(single) and high == math.inf:
            _out_of_range(name, "at most 3.4e38", value)
        if not math.isfinite(single) or not low <= number <= high or (above_low and single == low):
            _out_of_range(name, wanted, value)
        return number

    return check


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        _wrong_type(name, "True or False", value)
    return value


seconds = _number(0)
"""Accepts a length of time."""


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        _wrong_type(name, "a str", value)
    if fault := _surrogate(value):
        raise OptionValueError(name, fault)
    return value


def _choice(choices: tuple[str, ...], hints: Mapping[str, str] | None = None) -> Check:
    """Accepts these strings. `hints` has a word more for some of the others."""
    *most, last = map(repr, choices)
    wanted = f"{', '.join(most)} or {last}"

    def check(name: str, value: object) -> str:
        if not isinstance(value, str):
            _wrong_type(name, wanted, value)
        if value not in choices:
            hint = (hints or {}).get(value)
            raise OptionValueError(name, f"must be {wanted}, not {_abbreviate(value)}{'; ' + hint if hint else ''}")
        return value

    return check


def path(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        _wrong_type(name, "a str or os.PathLike", value)
    text = os.fspath(value)
    if not isinstance(text, str):
        _wrong_type(name, "a path of type str", text)
    if "\0" in text:
        _out_of_range(name, "a path without NUL characters", text)
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        at = error.start
        raise OptionValueError(name, f"has a lone surrogate, {text[at]!r}, at position {at}") from None
    return text


def _file(name: str, value: object) -> str:
    """Accepts the path of a file, or the name of a repository."""
    if not (text := path(name, value)):
        raise OptionValueError(name, "is empty")
    return text


def _folder(name: str, value: object) -> str:
    """Accepts a folder that exists, or the path of one to be made."""
    text = _file(name, value)
    if os.path.exists(text) and not os.path.isdir(text):
        raise OptionValueError(name, f"is not a folder: {text}")
    return text


def _template(name: str, value: object) -> str:
    if not (text := _text(name, value)).strip():
        raise OptionValueError(name, "is empty")
    return text


def _optional(check: Check, absent: object = None) -> Check:
    """Accepts None too, and returns `absent` for it."""
    return lambda name, value: absent if value is None else check(name, value)


def _function(name: str, value: object) -> object:
    if not callable(value):
        _wrong_type(name, "a function", value)
    return value


def _token(name: str, value: object) -> str | bool:
    if isinstance(value, bool):
        return value
    if not isinstance(value, str):  # the message is without the value, which may be a secret
        raise OptionTypeError(name, f"must be a str, True or False, not {type(value).__name__}")
    return _text(name, value)


def _values(name: str, wanted: str, value: object) -> list[Any]:
    """The values of an iterable that is neither bytes nor a mapping."""
    if isinstance(value, (bytes, bytearray, memoryview, Mapping)) or not isinstance(value, Iterable):
        _wrong_type(name, wanted, value)
    try:
        return list(value)
    except TypeError:  # an array without dimensions
        _wrong_type(name, wanted, value)


def _stop(name: str, value: object) -> list[str]:
    if value is None:
        return []
    values = [value] if isinstance(value, str) else _values(name, "a str or a list of str", value)
    strings = [_text(f"{name}[{i}]", string) for i, string in enumerate(values)]
    for i, string in enumerate(strings):
        if not string:
            raise OptionValueError(f"{name}[{i}]", "is empty, and every text contains an empty string")
    return strings


def _scope(name: str, value: object) -> str:
    if not (text := _text(name, value)):
        raise OptionValueError(name, "is empty; None is the scope of all calls without one")
    return text


def _prediction(name: str, value: object) -> str | list[int]:
    """Accepts a text, token ids, or OpenAI's `{"type": "content", "content": ...}`."""
    if isinstance(value, Mapping):
        if value.get("type") != "content" or set(value) != {"type", "content"}:
            wanted = '{"type": "content", "content": ...}'
            raise OptionValueError(name, f"must be {wanted} if it is a mapping, not {_abbreviate(value)}")
        value = value["content"]
        if isinstance(value, (list, tuple)) and all(isinstance(part, Mapping) for part in value):
            texts = [part.get("text") for part in value if part.get("type") == "text"]
            if len(texts) < len(value):
                raise OptionValueError(name, 'has a part whose type is not "text"')
            return "".join(_text(name, text) for text in texts)
    if isinstance(value, str):
        return _text(name, value)
    values = _values(name, "a str or token ids", value)
    for i, token in enumerate(values):
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            _wrong_type(f"{name}[{i}]", "a token id, an int", token)
        if not 0 <= int(token) < 2**32:
            _out_of_range(f"{name}[{i}]", f"a token id, from 0 to {2**32 - 1}", token)
    return [int(token) for token in values]


_bias = _number(-100, 100)


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _wrong_type(name, "a mapping of token ids to numbers", value)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # OpenAI's JSON has the ids as strings of digits
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12 else key
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise OptionTypeError(name, f"needs token ids as its keys, not {_abbreviate(key)}")
        token = int(token)
        if not 0 <= token < 2**32:
            raise OptionValueError(name, f"has the key {_abbreviate(key)}, and token ids are from 0 to {2**32 - 1}")
        if token in biases:
            raise OptionValueError(name, f"has the token id {token} twice")
        biases[token] = _bias(f"{name}[{_abbreviate(key)}]", bias)
    return biases


def _surrogate(text: str) -> str | None:
    """Why UTF-8 has no bytes for a text, or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has a lone surrogate, {text[error.start]!r}, at position {error.start}"
    return None


def encodable(name: str, text: str) -> str:
    """Returns `text`. Raises ValueError if it has characters that UTF-8 has no bytes for."""
    if fault := _surrogate(text):
        raise ValueError(f"{name} {fault}")
    return text


MODEL: dict[str, Check] = {
    "n_ctx": _optional(_integer(1)),
    "n_threads": _optional(_integer(1, 1024)),
    "device": _choice(get_args(Device), {"mps": "Apple's GPUs are 'metal'", "gpu": "NVIDIA's GPUs are 'cuda'"}),
    "engine": _choice(get_args(Engine)),
    "kernel": _optional(_text),
    "kv_cache": _choice(get_args(KvCache)),
    "mmap": flag,
    "tokenizer": _optional(_file),
    "chat_template": _optional(_template),
    "max_concurrent": _optional(_integer(1)),
    "max_batch": _integer(1, 16),
    "prefix_cache": _optional(_integer(0, 2**63 - 1, wanted="a number of bytes, such as 2 * 2**30")),
    "prefix_cache_dir": _optional(_folder),
    "speculate": flag,
    "on_progress": _optional(_function),
}
"""The options of `Phi`."""

HUB: dict[str, Check] = {
    "repo_id": _text,
    "filename": _optional(_text),
    "revision": _optional(_text),
    "cache_dir": _optional(_folder),
    "token": _optional(_token),
    "local_files_only": flag,
    "progress": _optional(flag),
    "on_progress": _optional(_function),
}
"""The options of `Phi.from_pretrained` and of `candle_phi.hub` that say where a model comes from."""

PROMPT: dict[str, Check] = {"raw": flag, "parse_special": _optional(flag), "add_bos": flag}
"""The options of a generation that say how its prompt is read."""

SAMPLING: dict[str, Check] = {
    "max_tokens": _optional(_integer(1)),
    "temperature": _number(0),
    "top_k": _optional(_integer(0), absent=0),
    "top_p": _optional(_number(0, 1, above_low=True), absent=1.0),
    "min_p": _optional(_number(0, 1), absent=0.0),
    "repeat_penalty": _optional(_number(0, above_low=True), absent=1.0),
    "repeat_last_n": _integer(-1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "seed": _optional(_integer(0, 2**64 - 1)),
    "stop": _stop,
    "ignore_eos": flag,
    "logprobs": flag,
    "top_logprobs": _integer(0, 20),
    "timeout": _optional(seconds),
    "cache_scope": _optional(_scope),
    "speculate": _optional(flag),
    "prediction": _optional(_prediction),
}
"""The options of a generation that the engine takes. `absent` is the value that turns an option off."""

GENERATION: dict[str, Check] = {**SAMPLING, "on_progress": _optional(_function), **PROMPT}
"""The options of `Phi.stream`, `generate`, `astream` and `agenerate`."""


def _template_only(check: Check, default: object) -> Check:
    """Accepts the default of an option for prompts without a template, which the messages of a chat have."""

    def checked(name: str, value: object) -> object:
        if check(name, value) is not default:
            raise OptionValueError(name, "is for a prompt without a template, and a chat has messages")
        return value

    return checked


CHAT: dict[str, Check] = {
    **{name: check for name, check in GENERATION.items() if name not in PROMPT},
    "exact": flag,
    "raw": _template_only(flag, False),
    "parse_special": _template_only(PROMPT["parse_special"], None),
    "add_bos": _template_only(flag, False),
}
"""The options of a chat and of its calls."""

MAP: dict[str, Check] = {"ordered": flag, "return_exceptions": flag, "max_pending": _optional(_integer(1))}
"""The options of `Phi.map` and `amap`, beside those of a generation."""

LOGITS: dict[str, Check] = {"every_position": flag, "on_progress": _optional(_function)}
"""The options of `Phi.logits`."""

SCORE: dict[str, Check] = {
    "start": _integer(1),
    "top_logprobs": SAMPLING["top_logprobs"],
    "on_progress": _optional(_function),
}
"""The options of `Phi.score`."""

PERPLEXITY: dict[str, Check] = {"stride": _optional(_integer(1))}
"""The options of `Phi.perplexity`."""

WARM: dict[str, Check] = {"pin": flag}
"""The options of `Phi.warm`."""

SYSTEM: dict[str, Check] = {"system": _optional(_text)}
"""The argument of `Phi.chat`."""

REWIND: dict[str, Check] = {"turns": _integer(1)}
"""The argument of `Chat.rewind`."""

SAVE: dict[str, Check] = {"kv": flag}
"""The options of `Chat.save`."""

LOAD: dict[str, Check] = {"strict": flag}
"""The options of `Phi.load_chat`."""

_OWNERS = (
    (MODEL, "Phi()"),
    (GENERATION, "stream() and generate()"),
    (HUB, "Phi.from_pretrained()"),
    (MAP, "map()"),
    (LOGITS, "logits()"),
    (SCORE, "score()"),
    (PERPLEXITY, "perplexity()"),
    (CHAT, "a chat, such as phi.chat() and chat.send()"),
    (WARM, "warm()"),
    (SAVE, "chat.save()"),
    (LOAD, "load_chat()"),
)


def unknown_option(name: str, known: Collection[str]) -> str:
    """The message for a name that is not in `known`."""
    if name in FOREIGN:
        return f"unknown option {name!r}: {FOREIGN[name]}"
    if name in RENAMED:
        right = RENAMED[name]
        if right in UNBUILT:
            return f"unknown option {name!r}: the name is {right} here, and this version does not have it"
        return f"unknown option {name!r}: use {right}{'' if right in known else ', an option of ' + _owner(right)}"
    elsewhere = any(name in options for options, _ in _OWNERS)
    close = name if elsewhere else closest(name, [*known, *MODEL, *GENERATION, *HUB, *LOGITS])
    if close is None:
        return f"unknown option {name!r}"
    if close in known:
        return f"unknown option {name!r}; did you mean {close!r}?"
    meant = "it" if close == name else f"{close!r}"
    return f"unknown option {name!r} here: {meant} is an option of {_owner(close)}"


def _owner(name: str) -> str:
    return next(owner for options, owner in _OWNERS if name in options)


def checked(known: Mapping[str, Check], given: Mapping[str, object]) -> dict[str, Any]:
    """The options in `given`, each as the engine wants it.

    Raises:
        NotInThisVersionError: an option that a later version has.
        TypeError: a name that is not in `known`, or a value of the wrong type.
        ValueError: a value out of range, or one that another option rules out.
    """
    for name in given:
        if name not in known:
            if name in UNBUILT:
                raise NotInThisVersionError(not_in_this_version(name))
            raise TypeError(unknown_option(name, known))
    values = {name: known[name](name, value) for name, value in given.items()}
    if known is GENERATION or known is CHAT:
        _check_together(values)
    return values


def _check_together(values: Mapping[str, Any]) -> None:
    if values.get("top_logprobs") and not values.get("logprobs"):
        option = Option("top_logprobs", str(values["top_logprobs"]))
        raise OptionValueError(option, "needs ", Option("logprobs", "True"))
    if not values.get("raw"):
        for name, default in (("parse_special", None), ("add_bos", False)):
            if values.get(name, default) is not default:
                raise OptionValueError(name, "needs ", Option("raw", "True"))


class Generation(NamedTuple):
    """The options of a call, by the part of this package that takes them."""

    prompt: dict[str, Any]
    sampling: dict[str, Any]
    on_progress: Any
    exact: bool
    """Of a chat's call."""


def generation(given: Mapping[str, object], table: Mapping[str, Check] = GENERATION) -> Generation:
    """`checked`, for `GENERATION` or `CHAT`, with all names of `GENERATION` given."""
    values = checked(table, given)
    return Generation(
        {name: values[name] for name in PROMPT},
        {name: values[name] for name in SAMPLING},
        values["on_progress"],
        values.get("exact", False),
    )
