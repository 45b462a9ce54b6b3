"""Makes system calls of a process fail, as an unusual file system or a missing network does."""

import ctypes
import errno
import platform
import struct
import sys

import pytest

_NUMBERS = {
    "x86_64": {"socket": 41, "flock": 73, "symlink": 88, "symlinkat": 266, "link": 86, "linkat": 265},
    "aarch64": {"socket": 198, "flock": 32, "symlinkat": 36, "linkat": 37},
}
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000

needed = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in _NUMBERS, reason="needs Linux's seccomp"
)


def without(*calls: str, error: int | None = errno.EPERM) -> None:
    """From now on these calls fail with `error`. With 0 they seem to succeed, with None they end the process."""
    machine = platform.machine()
    action = _KILL if error is None else _ERRNO | error
    numbers = [_NUMBERS[machine][call] for call in calls if call in _NUMBERS[machine]]
    program = [(0x20, 0, 0, 4), (0x15, 1, 0, _AUDIT[machine]), (0x06, 0, 0, _ALLOW), (0x20, 0, 0, 0)]
    for number in numbers:
        program += [(0x15, 0, 1, number), (0x06, 0, 0, action)]
    program.append((0x06, 0, 0, _ALLOW))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in program))

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    libc = ctypes.CDLL(None, use_errno=True)
    filter = Program(len(program), ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # no new privileges
    assert libc.prctl(22, 2, ctypes.byref(filter), 0, 0) == 0, ctypes.get_errno()  # a filter
