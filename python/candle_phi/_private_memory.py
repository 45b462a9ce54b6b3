"""The private memory of a process.

Standard library only: the benchmarks of other engines read this file, too.
"""

import re
from pathlib import Path


def private_bytes() -> int | None:
    """Memory of this process that no other shares and no file backs. None where the system, not Linux, does not say."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    # the two overlap: an anonymous page is dirty as soon as it was written
    return 1024 * max(int(kilobytes["Private_Dirty"]), int(kilobytes["Anonymous"]))
