"""Mistakes in a command line, and how the command line spells the API's options."""

import contextlib
from collections.abc import Iterator

from ..errors import PhiError
from ..options import OptionError


class UsageError(Exception):
    """The command line has a mistake: exit code 2. The message is one line for the user."""


def spelled(name: str, value: str | None = None) -> str:
    """An option of the API as the command line has it: `max_tokens=5` is `--max-tokens 5`."""
    if name == "repo_id":
        return "REPO"
    flag = ("--no-" if name in ("mmap", "speculate") else "--") + name.replace("_", "-")
    return flag if value in (None, "True") else f"{flag} {value}"


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turns the API's errors about arguments into `UsageError`s: the arguments come from the command line."""
    try:
        yield
    except PhiError:
        raise
    except OptionError as error:
        raise UsageError(error.spelled(spelled)) from error
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


class AlreadySaid(Exception):
    """A failure whose message was printed."""
