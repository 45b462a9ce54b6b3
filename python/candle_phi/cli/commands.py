"""The names of the commands, and the messages for words that are commands of other programs."""

import difflib
import os
import re
from collections.abc import Mapping, Sequence

from .. import hub

COMMANDS: Mapping[str, str] = {
    "chat": "talk with a model on the terminal",
    "run": "answer a prompt; the same as candle-phi PROMPT",
    "pull": "download a model into the cache",
    "list": "list the models, their sizes, what is downloaded",
    "verify": "check the files in the cache against their checksums",
    "rm": "remove a model from the cache",
    "perplexity": "score a text: how well the model predicts its tokens",
    "bench": "measure a model's speed and memory on this machine",
    "tokenize": "print the token ids of a text",
    "doctor": "print what this build finds on this machine",
    "help": "print the help of a command: candle-phi help bench",
}
"""Commands, each with what it does."""

UNBUILT: Mapping[str, str] = {
    "serve": "a server",
    "batch": "files of prompts",
    "convert": "conversion of models",
}
"""Commands of a later version, each with its subject."""

_ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(("/list", "/show", "ls", "models", "tags", "show", "info", "ps"), "list"),
    **dict.fromkeys(("download", "get", "fetch", "install", "add"), "pull"),
    **dict.fromkeys(("remove", "delete", "del", "uninstall"), "rm"),
    **dict.fromkeys(("benchmark", "speed"), "bench"),
    **dict.fromkeys(("check", "diagnose", "status", "env"), "doctor"),
    **dict.fromkeys(("tokens", "encode"), "tokenize"),
    **dict.fromkeys(("ppl", "score", "eval"), "perplexity"),
    **dict.fromkeys(("repl", "interactive", "shell", "talk"), "chat"),
    **dict.fromkeys(("generate", "ask", "prompt", "complete", "completion", "exec"), '"PROMPT"'),
    "version": "--version",
    **dict.fromkeys(("usage", "man", "?", "/?", "/help", "/h"), "--help"),
}
"""Commands of other programs, each with what does the same here."""

_ABSENT: Mapping[str, str] = {
    **dict.fromkeys(("update", "upgrade"), "pip updates the package"),
    **dict.fromkeys(
        ("start", "stop", "create", "cp", "push", "quit", "exit", "/bye", "/exit", "/quit"),
        "no model stays loaded after an answer",
    ),
    **dict.fromkeys(("login", "signin", "auth"), "--token or HF_TOKEN sets the token for the Hub"),
    **dict.fromkeys(("logout", "signout"), "--token and HF_TOKEN set the token for the Hub"),
    **dict.fromkeys(("search", "find"), "candle-phi list shows the short names"),
    **dict.fromkeys(("config", "configure", "settings", "init"), "options and environment variables set everything"),
    **dict.fromkeys(("quantize", "train", "finetune"), "candle-phi runs models as they are"),
}
"""Commands of other programs that have no counterpart here, each with a hint."""

_LATER: Mapping[str, str] = {
    **dict.fromkeys(("server", "api", "web"), "serve"),
}
"""Other names of commands of a later version."""


def not_in_this_version(command: str) -> str:
    """The message for a command of `UNBUILT`."""
    return f"{command} ({UNBUILT[command]}) is not in this version{_as_prompt(command)}"


def mistaken_word(words: Sequence[str], *, commands: bool = True) -> str | None:
    """The message for a prompt that looks like a command or a model's name. None if it looks like a prompt.

    Args:
        words: the words in place of the prompt. More than two are a prompt without quotes.
        commands: False if a command's name is a prompt, as in `candle-phi run list`.
    """
    if not 1 <= len(words) <= 2:
        return None
    word, alone = words[0].lower(), len(words) == 1
    if commands and (answer := _mistaken_command(word, alone)):
        return answer + (_as_prompt(words[0]) if alone else "")
    if names_model(words[0]):
        prompt = '"PROMPT"' if alone else f'"{words[1]}"'
        return f"{words[0]} is a model: candle-phi --model {words[0]} {prompt}{_as_prompt(words[0]) if alone else ''}"
    return None


def _as_prompt(word: str) -> str:
    return f" (as a prompt: candle-phi -- {word})"


def _mistaken_command(word: str, alone: bool) -> str | None:
    if word in _ELSEWHERE:
        return f"did you mean candle-phi {_ELSEWHERE[word]}?"
    if word in _LATER:
        return f"{_LATER[word]} ({UNBUILT[_LATER[word]]}) is not in this version"
    if word in _ABSENT:
        return f"there is no command {word}: {_ABSENT[word]}"
    if word in UNBUILT:
        return f"{word} ({UNBUILT[word]}) is not in this version"
    if alone and word.isalpha() and (close := closest(word, [*COMMANDS, *UNBUILT], cutoff=0.7)):
        return f"did you mean candle-phi {close}?"
    return None


def similar_command(word: str) -> str | None:
    """The command that a word is similar to, or that does the same as this command of another program."""
    if (other := _ELSEWHERE.get(word, "")) in COMMANDS:
        return other
    return closest(word, list(COMMANDS))


def names_model(word: str) -> bool:
    """Whether a word is the name of a model: a short name, a .gguf file, a repository of such files."""
    if any(character.isspace() for character in word):
        return False
    if word.lower() == "demo" or word.lower().endswith(".gguf") or re.fullmatch(r"[\w.-]+/[\w.-]+-gguf", word.lower()):
        return True
    name, _, tag = word.partition(":")  # "phi3:mini", as Ollama writes it
    return hub.resolve(name) != name or (bool(tag) and hub.closest(name) is not None and not os.path.exists(word))


def closest(word: str, known: Sequence[str], *, cutoff: float = 0.6) -> str | None:
    """The known word that is most similar to a misspelt one."""
    return next(iter(difflib.get_close_matches(word, known, n=1, cutoff=cutoff)), None)
