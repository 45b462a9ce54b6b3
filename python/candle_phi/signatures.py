"""Signatures and docstrings that several methods share, and answers to calls that do not fit them."""

import functools
import inspect
import re
from collections.abc import Callable, Collection
from typing import Any, ParamSpec, TypeVar, cast

_Parameters = ParamSpec("_Parameters")
_Returned = TypeVar("_Returned")
_Function = TypeVar("_Function", bound=Callable[..., Any])

_PATH_NAMES = ("model", "path", "model_file", "filename", "gguf")
"""What other libraries call the path of a model."""


def takes_prompt(method: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """For a method whose only positional argument is `prompt`. Explains a wrong call by the method's own name."""
    return _takes_one("prompt", _prompt_fault)(method)


def takes_prompts(method: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The same for `prompts`."""
    return _takes_one("prompts", _prompts_fault)(method)


def takes_message(method: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
    """The same for the `message` of a chat."""
    return _takes_one("message", _message_fault)(method)


def _takes_one(
    argument: str, fault: Callable[[str, tuple[object, ...], dict[str, object]], str]
) -> Callable[[Callable[_Parameters, _Returned]], Callable[_Parameters, _Returned]]:
    """For a method whose only positional argument is `argument`. `fault` explains a wrong call."""

    def decorate(method: Callable[_Parameters, _Returned]) -> Callable[_Parameters, _Returned]:
        @functools.wraps(method)
        def call(self: Any, /, *args: Any, **options: Any) -> Any:
            if len(args) + (argument in options) != 1:
                raise TypeError(fault(method.__name__, args, options))
            return cast(Any, method)(self, *args, **options)

        _set_signature(call, _without_var_keyword(inspect.signature(method)))
        return cast(Callable[_Parameters, _Returned], call)

    return decorate


def _prompt_fault(name: str, args: tuple[object, ...], options: dict[str, object]) -> str:
    if len(args) > 1:
        return (
            f"{name}() takes the prompt by position and options by name, such as max_tokens=50; "
            f"{len(args)} arguments came by position"
        )
    if args:
        return f"{name}() got the prompt twice, by position and by name"
    if "messages" in options:
        return f"{name}() takes messages as its first argument: {name}(messages)"
    return f"{name}() needs a prompt: a str, messages or token ids"


def _prompts_fault(name: str, args: tuple[object, ...], options: dict[str, object]) -> str:
    if len(args) > 1:
        return f"{name}() takes all prompts as its first argument and options by name: {name}([prompt, prompt])"
    if args:
        return f"{name}() got the prompts twice, by position and by name"
    if "prompt" in options or "messages" in options:
        return f"{name}() takes several prompts as its first argument: {name}([prompt])"
    return f"{name}() needs an iterable of prompts, each a str, messages or token ids"


def _message_fault(name: str, args: tuple[object, ...], options: dict[str, object]) -> str:
    if len(args) > 1:
        return (
            f"{name}() takes the message by position and options by name, such as max_tokens=50; "
            f"{len(args)} arguments came by position"
        )
    if args:
        return f"{name}() got the message twice, by position and by name"
    for other in ("prompt", "messages", "content", "text"):
        if other in options:
            return f"{name}() takes the message as its first argument: {name}({other})"
    return f"{name}() needs a message: a str, or messages"


def same_options(
    method: Callable[_Parameters, object], takes: Callable[[Callable[..., Any]], Callable[..., Any]] = takes_prompt
) -> Callable[[Callable[..., _Returned]], Callable[_Parameters, _Returned]]:
    """Gives a function the parameters of `method`, a generation, and the rest of its docstring from `Args:` on.

    `takes`: explains a wrong call.
    """

    def decorate(function: Callable[..., _Returned]) -> Callable[_Parameters, _Returned]:
        returned = inspect.signature(function).return_annotation
        call = takes(function)
        _set_signature(call, inspect.signature(method).replace(return_annotation=returned))
        if function.__doc__ and method.__doc__:  # python -OO has none
            _, args, rest = inspect.cleandoc(method.__doc__).partition("\nArgs:")
            call.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n{args}{rest}"
        return cast(Callable[_Parameters, _Returned], call)

    return decorate


def takes_path(init: Callable[_Parameters, None]) -> Callable[_Parameters, None]:
    """For a constructor whose only positional argument is `model_path`. A wrong call is explained."""

    @functools.wraps(init)
    def call(self: Any, /, *args: Any, **options: Any) -> None:
        if len(args) + ("model_path" in options) != 1:
            raise TypeError(_path_fault(type(self).__name__, args, options))
        cast(Any, init)(self, *args, **options)

    _set_signature(call, _without_var_keyword(inspect.signature(init)))
    return cast(Callable[_Parameters, None], call)


def _path_fault(name: str, args: tuple[object, ...], options: dict[str, object]) -> str:
    if len(args) > 1:
        return (
            f"{name}() takes the path by position and options by name, such as n_ctx=4096; "
            f"{len(args)} arguments came by position"
        )
    if args:
        return f"{name}() got the path twice, by position and by name"
    for other in _PATH_NAMES:
        if other in options:
            return f"{name}() takes the path as its first argument, not as {other}: {name}({options[other]!r})"
    return f"{name}() needs the path of a GGUF file; {name}.demo() opens the bundled model"


def adds_options(
    other: Callable[..., object], doc: str | None, *, without: Collection[str] = ()
) -> Callable[[_Function], _Function]:
    """Replaces a function's `**options` by the keyword arguments of `other`, and adds their lines of `doc`.

    Completion and `help()` then show them. `without`: options to leave out.
    """

    def decorate(function: _Function) -> _Function:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        others = [p for p in inspect.signature(other).parameters.values() if p.kind is p.KEYWORD_ONLY]
        options = [p for p in others if p.name not in without]
        _set_signature(function, inspect.signature(function).replace(parameters=[*own, *options]))
        if function.__doc__ and doc:
            entries = inspect.cleandoc(doc).partition("\nArgs:\n")[2].partition("\n\n")[0]
            for name in without:
                entries = re.sub(rf"^    {name}:.*\n?(     .*\n?)*", "", entries, flags=re.MULTILINE)
            lines = entries.splitlines()
            first = next(i for i, line in enumerate(lines) if line.startswith(f"    {options[0].name}:"))
            head, args, rest = inspect.cleandoc(function.__doc__).partition("\n\nRaises:")
            heading = "" if "\nArgs:\n" in head else "\n\nArgs:"
            function.__doc__ = "\n".join([head + heading, *lines[first:]]) + args + rest
        return function

    return decorate


def hides_unknown(function: _Function) -> _Function:
    """Leaves `**unknown` out of completion and `help()`."""
    _set_signature(function, _without_var_keyword(inspect.signature(function)))
    return function


def _without_var_keyword(signature: inspect.Signature) -> inspect.Signature:
    """Leaves out `**unknown`, which collects names only to explain them."""
    return signature.replace(parameters=[p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD])


def _set_signature(function: Callable[..., Any], signature: inspect.Signature) -> None:
    function.__signature__ = signature  # type: ignore[attr-defined]  # what inspect and help() read
