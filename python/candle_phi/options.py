"""The options of a model and of a generation: what each may be, and what other libraries' names are called here."""

import math
import numbers
import os
import struct
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NoReturn

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
    raise TypeError(f"{name} must be {wanted}, not {shown} ({_shown(value)})")


def _out_of_range(name: str, wanted: str, value: object) -> NoReturn:
    raise ValueError(f"{name} must be {wanted}, not {_shown(value)}")


def _integer(low: int, high: int = 2**31 - 1) -> Check:
    def check(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            _wrong_type(name, "an int", value)
        integer = int(value)
        if not low <= integer <= high:
            _out_of_range(name, f"from {low} to {high}", value)
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
            raise ValueError(f"{name}[{i}] is empty: every text contains it")
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
        token = _token_id(f"{name}: a token id", token)
        if token in biases:
            raise ValueError(f"{name} names the token id {token} twice")
        biases[token] = _bias(f"{name}[{_shown(key)}]", bias)
    return biases


def encodable(name: str, text: str) -> str:
    """`text`, or ValueError where UTF-8 has no bytes for it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has a lone surrogate, {text[error.start]!r}, at position {error.start}: it is not text"
        ) from None
    return text


MODEL: dict[str, Check] = {
    "n_ctx": _maybe(_integer(1)),
    "n_threads": _maybe(_integer(1, 1024)),
    "device": _name,
    "engine": _name,
    "kernel": _maybe(_name),
    "kv_cache": _name,
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

_FOREIGN = {
    "max_new_tokens": "use max_tokens",
    "num_predict": "use max_tokens",
    "max_length": "use max_tokens",
    "temp": "use temperature",
    "repetition_penalty": "use repeat_penalty",
    "stop_sequences": "use stop",
    "stop_seqs": "use stop",
    "do_sample": "temperature=0 is greedy, any other temperature samples",
    "stream": "use .stream(), which yields the text as it is made; .generate() returns it whole",
    "n_gpu_layers": "use device, an option of Phi()",
    "verbose": 'the library prints nothing; logging.getLogger("candle_phi") has its messages',
    "num_ctx": "use n_ctx, an option of Phi()",
    "context_length": "use n_ctx, an option of Phi()",
    "system": 'use a system message: {"role": "system", "content": ...} first in the messages',
}
"""Names that other libraries have, and the answer to each."""


def unknown_option(name: str, known: Collection[str]) -> str:
    """What to say of a name that is not in `known`."""
    if name in _FOREIGN:
        return f"unknown option {name!r}: {_FOREIGN[name]}"
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
    return {name: known[name](name, value) for name, value in given.items()}


def sampling(given: Mapping[str, object]) -> dict[str, Any]:
    """`checked`, for `SAMPLING` with all its names given; then what follows from several options together."""
    options = checked(SAMPLING, given)
    if options["top_logprobs"] and not options["logprobs"]:
        raise ValueError(f"top_logprobs={options['top_logprobs']} needs logprobs=True")
    if options["repeat_penalty"] is None:
        options["repeat_penalty"] = 1.0 if options["temperature"] == 0 else 1.2
    return options
