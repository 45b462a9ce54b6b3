"""A command on a pseudo-terminal."""

import os
import subprocess
from typing import Literal


def on_terminal(
    command: list[str], stream: Literal["stdout", "stderr"], *, columns: int = 80, **env: str
) -> tuple[int, bytes, bytes]:
    """Runs a command with one of its streams on a terminal. Returns the exit code, the bytes that the terminal received
    and those of the other stream, which is a pipe."""
    import pty  # POSIX has it

    master, slave = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=slave if stream == "stdout" else subprocess.PIPE,
        stderr=slave if stream == "stderr" else subprocess.PIPE,
        env={**os.environ, "COLUMNS": str(columns), **env},
    )
    os.close(slave)
    received = b""
    try:
        while data := os.read(master, 4096):
            received += data
    except OSError:  # Linux reports the end of a terminal this way
        pass
    os.close(master)
    out, err = process.communicate(timeout=60)
    return process.returncode, received, err if stream == "stdout" else out
