"""The command line: `candle-phi "PROMPT"`."""
# Decisions: docs/design/python.md

import contextlib
import logging
import sys
from collections.abc import Callable, Mapping, Sequence

from ..errors import NotInThisVersionError, PhiError
from ..options import Option
from . import bench, cache, chat, commands, doctor, help, output, perplexity, run, tokenize
from .mistakes import AlreadySaid, UsageError, spelled

_COMMANDS: Mapping[str, Callable[[list[str]], None]] = {
    "chat": chat.run,
    "run": lambda arguments: run.run(arguments, command="run"),
    "pull": cache.pull,
    "list": cache.list_models,
    "verify": cache.verify,
    "rm": cache.remove,
    "perplexity": perplexity.run,
    "bench": bench.run,
    "doctor": doctor.run,
    "tokenize": tokenize.run,
    "help": help.run,
}


class _LogLines(logging.Handler):
    """Prints the library's warnings, one line each on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple):
            record.args = tuple(spelled(*arg) if isinstance(arg, Option) else arg for arg in record.args)
        output.say(record.getMessage())


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: the arguments; None: those of this process.

    Returns:
        The exit code: 0, 1 (failure), 2 (usage) or 130 (Ctrl-C).
    """
    output.start()
    log_lines = _LogLines()
    logger = logging.getLogger("candle_phi")
    logger.addHandler(log_lines)
    try:
        with contextlib.suppress(SystemExit):  # how argparse ends after --help and --version
            _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # here, where a closed pipe is expected
    except KeyboardInterrupt:
        output.status.end_interrupted()
        return 130
    except BrokenPipeError:
        pass  # the reader, such as head, has read enough
    except (UsageError, NotInThisVersionError) as error:
        output.say(str(error))
        return 2
    except AlreadySaid:
        return 1
    except (PhiError, OSError) as error:
        output.say(str(error) or type(error).__name__)
        return 1
    finally:
        logger.removeHandler(log_lines)
        output.finish()
    return 0


def _run(arguments: list[str]) -> None:
    for argument in arguments:
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise UsageError(f"an argument is not UTF-8 text: {argument!r}")
    first = arguments[0] if arguments else ""
    if first in _COMMANDS:
        _COMMANDS[first](arguments[1:])
    elif first in commands.UNBUILT:
        raise UsageError(commands.not_in_this_version(first))
    elif len(arguments) == 1 and first in ("-h", "--help"):
        help.run([])
    elif not arguments and output.is_terminal(sys.stdin) and output.is_terminal(sys.stdout):
        chat.run([])
    else:
        run.run(arguments, command="")
