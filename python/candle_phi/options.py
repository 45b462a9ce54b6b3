"""The options of a model and of a generation: what each may be, and what other libraries' names are called here."""

import math
import numbers
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

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


Check = Callable[[str, object], Any]
"""Takes an option's name and value; returns the value as the engine wants it, or raises and names both."""


def _shown(value: object) -> str:
    """A value as a message shows it: on one line, and not a page of it."""
    try:
        text = repr(value)
    except ValueError:  # an int of more than 4300 digits has no repr
        text = f"{type(value).__name__} too large to print"
    return text if len(text) <= 80 else text[:77] + "..."


def _wrong_type(name: str, wanted: str, value: object) -> NoReturn:
    kind = type(value)
    shown = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    raise OptionTypeError(name, f"must be {wanted}, not {shown} ({_shown(value)})")


def _out_of_range(name: str, wanted: str, value: object) -> NoReturn:
    raise OptionValueError(name, f"must be {wanted}, not {_shown(value)}")


def _integer(low: int, high: int = 2**31 - 1) -> Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _wrong_type(name, "an int", value)
        integer = int(value)
        if not low <= integer <= high:
            _out_of_range(
                name, f"at least {low}" if integer < low and high == 2**31 - 1 else f"from {low} to {high}", value
            )
        return integer

    return check


def _number(low: float, high: float = math.inf, *, above_low: bool = False) -> Check:
    wanted = "a finite number"
    if math.isfinite(low):
        wanted += f" above {low:g}" if above_low else f" from {low:g}"
    if math.isfinite(high):
        wanted += f" to {high:g}"

    def check(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            _wrong_type(name, "a number", value)
        try:
            number = float(value)
            (single,) = struct.unpack("f", struct.pack("f", number))  # the engine's precision
        except OverflowError:
            _out_of_range(name, wanted, value)
        if math.isfinite(number) and not math.isfinite(single) and high == math.inf:
            _out_of_range(name, f"{wanted} to 3.4e38", value)
        if not math.isfinite(single) or not low <= number <= high or (above_low and single == low):
            _out_of_range(name, wanted, value)
        return number

    return check


def flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        _wrong_type(name, "True or False", value)
    return value


def _name(name: str, value: object) -> str:
    if not isinstance(value, str):
        _wrong_type(name, "a str", value)
    return encodable(name, value)


def _choice(*choices: str) -> Check:
    """Accepts these strings."""
    wanted = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"

    def check(name: str, value: object) -> str:
        if _name(name, value) not in choices:
            _out_of_range(name, wanted, value)
        return str(value)

    return check


def path(name: str, value: object) -> str:
    if not isinstance(value, (str, os.PathLike)):
        _wrong_type(name, "a str or os.PathLike", value)
    text = os.fspath(value)
    if not isinstance(text, str):
        _wrong_type(name, "a path of text", text)
    if "\0" in text:
        _out_of_range(name, "a path without NUL characters", text)
    return text


def _maybe(check: Check, absent: object = None) -> Check:
    """`check`, where None stands for `absent`."""
    return lambda name, value: absent if value is None else check(name, value)


def _callable(name: str, value: object) -> object:
    if not callable(value):
        _wrong_type(name, "a function", value)
    return value


def _token(name: str, value: object) -> str | bool:
    if not isinstance(value, (str, bool)):
        _wrong_type(name, "a str, True or False", value)
    return value if isinstance(value, bool) else encodable(name, value)


def _stop(name: str, value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, (bytes, bytearray, Mapping)) or not isinstance(value, Iterable):
        _wrong_type(name, "a str or several", value)
    strings = list(value)
    for i, string in enumerate(strings):
        if not isinstance(string, str):
            _wrong_type(f"{name}[{i}]", "a str", string)
        if not string:
            raise OptionValueError(f"{name}[{i}]", "is empty, and every text contains an empty string")
        encodable(f"{name}[{i}]", string)
    return strings


_bias = _number(-100, 100)
_token_id = _integer(0, 2**32 - 1)


def _logit_bias(name: str, value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        _wrong_type(name, "a mapping of token ids to numbers", value)
    biases: dict[int, float] = {}
    for key, bias in value.items():
        # OpenAI's JSON has the ids as strings of digits
        token = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12 else key
        if isinstance(token, int) and not 0 <= token < 2**32:
            raise OptionValueError(name, f"has the key {token}, and token ids are from 0 to {2**32 - 1}")
        token = _token_id(name, token)
        if token in biases:
            raise OptionValueError(name, f"has the token id {token} twice")
        biases[token] = _bias(f"{name}[{_shown(key)}]", bias)
    return biases


def encodable(name: str, text: str) -> str:
    """`text`, or ValueError where UTF-8 has no bytes for it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OptionValueError(
            name, f"has a lone surrogate, {text[error.start]!r}, at position {error.start}"
        ) from None
    return text


MODEL: dict[str, Check] = {
    "n_ctx": _maybe(_integer(1)),
    "n_threads": _maybe(_integer(1, 1024)),
    "device": _choice("auto", "cpu", "cuda", "metal"),
    "engine": _choice("native", "candle"),
    "kernel": _maybe(_name),
    "kv_cache": _choice("f16", "f32", "q8_0"),
    "mmap": flag,
    "tokenizer": _maybe(path),
    "chat_template": _maybe(_name),
    "max_concurrent": _maybe(_integer(1)),
    "on_progress": _maybe(_callable),
}
"""The options of `Phi`."""

HUB: dict[str, Check] = {
    "repo_id": _name,
    "filename": _maybe(_name),
    "revision": _maybe(_name),
    "cache_dir": _maybe(path),
    "token": _maybe(_token),
    "local_files_only": flag,
    "progress": _maybe(flag),
    "on_progress": _maybe(_callable),
}
"""Where a model comes from: the options of `Phi.from_pretrained` and of `candle_phi.hub`."""

PROMPT: dict[str, Check] = {"raw": flag, "parse_special": _maybe(flag), "add_bos": flag}
"""The options of a generation that say how a prompt is read."""

SAMPLING: dict[str, Check] = {
    "max_tokens": _maybe(_integer(1)),
    "temperature": _number(0),
    "top_k": _maybe(_integer(0), absent=0),
    "top_p": _maybe(_number(0, 1, above_low=True), absent=1.0),
    "min_p": _maybe(_number(0, 1), absent=0.0),
    "repeat_penalty": _maybe(_number(0, above_low=True)),
    "repeat_last_n": _integer(-1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "logit_bias": _logit_bias,
    "seed": _maybe(_integer(0, 2**64 - 1)),
    "stop": _stop,
    "ignore_eos": flag,
    "logprobs": flag,
    "top_logprobs": _integer(0, 20),
    "timeout": _maybe(_number(0)),
}
"""The options of a generation that the engine takes; "off" is what `absent` says."""

WATCH: dict[str, Check] = {"on_progress": _maybe(_callable)}
"""The option that everything has that takes long."""

GENERATION: dict[str, Check] = {**SAMPLING, **WATCH, **PROMPT}

RENAMED: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_length": "max_tokens",
    "temp": "temperature",
    "repetition_penalty": "repeat_penalty",
    "stop_sequences": "stop",
    "stop_seqs": "stop",
    "n_gpu_layers": "device",
    "num_ctx": "n_ctx",
    "context_length": "n_ctx",
    "json_schema": "response_format",
    "format": "response_format",
}
"""Names of other libraries' options, each with the option that does the same here."""

UNBUILT: Mapping[str, str] = {
    "response_format": "structured output",
    "grammar": "structured output",
    "tools": "tool calls",
    "adapter": "LoRA adapters",
    "speculate": "speculative decoding",
}
"""Options that a later version has, each with the feature that it belongs to."""

FOREIGN: Mapping[str, str] = {
    "do_sample": "temperature=0 is greedy, any other temperature samples",
    "stream": "use .stream(), which yields the text as it is made; .generate() returns it whole",
    "verbose": 'the library prints nothing; logging.getLogger("candle_phi") has its messages',
    "system": 'use a system message: {"role": "system", "content": ...} first in the messages',
}
"""Names that other libraries have, and the answer to each."""


def unknown_option(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not in `known`."""
    if name in FOREIGN:
        return f"unknown option {name!r}: {FOREIGN[name]}"
    if name in RENAMED:
        owner = ", an option of Phi()" if RENAMED[name] in MODEL else ""
        return f"unknown option {name!r}: use {RENAMED[name]}{owner}"
    close = _closest(name, [*known, *MODEL, *GENERATION])
    if close is None:
        return f"unknown option {name!r}"
    if close in known:
        return f"unknown option {name!r}; did you mean {close!r}?"
    owner = "Phi()" if close in MODEL else "stream() and generate()"
    meant = "it" if close == name else f"{close!r}"
    return f"unknown option {name!r} here: {meant} is an option of {owner}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'max_tokens'?"`, or nothing when no name is close."""
    close = _closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def _closest(name: str, known: Iterable[str]) -> str | None:
    import difflib  # not at import: only a mistake needs it

    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def checked(known: Mapping[str, Check], given: Mapping[str, object]) -> dict[str, Any]:
    """The options of `given`, each as the engine wants it.

    Raises:
        TypeError: a name that is not in `known`, or a value of the wrong type.
        ValueError: a value out of range.
    """
    for name in given:
        if name not in known:
            raise TypeError(unknown_option(name, known))
    values = {name: known[name](name, value) for name, value in given.items()}
    if known is GENERATION:
        if values.get("top_logprobs") and not values.get("logprobs"):
            raise OptionValueError(
                Option("top_logprobs", str(values["top_logprobs"])), "needs ", Option("logprobs", "True")
            )
        for name, default in (("parse_special", None), ("add_bos", False)):
            if values.get(name, default) is not default and not values.get("raw"):
                raise OptionValueError(name, "needs ", Option("raw", "True"))
    return values


def sampling(given: Mapping[str, object]) -> dict[str, Any]:
    """`checked`, for `SAMPLING` with all its names given; then what follows from several options together."""
    options = checked(SAMPLING, given)
    if options["top_logprobs"] and not options["logprobs"]:
        raise OptionValueError(
            Option("top_logprobs", str(options["top_logprobs"])), "needs ", Option("logprobs", "True")
        )
    if options["repeat_penalty"] is None:
        options["repeat_penalty"] = 1.0
    return options
