"""Bare containers: no home, a user whom no file names, and not a byte to write."""

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from candle_phi import Phi, hub
from conftest import HAIKU
from fake_hub import FakeHub

# All mounts but /proc become read-only for the command that follows, and it runs as user 12345.
BARE = (
    'for mount in $(cut -d " " -f 2 /proc/mounts | grep -v ^/proc); '
    "do mount -o remount,bind,ro $mount; done 2> /dev/null;"
    'exec unshare --user --map-user=12345 --map-group=12345 "$@"'
)
UNSHARE = ["unshare", "--mount", "sh", "-c", BARE, "sh"]


def allowed() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*UNSHARE, "true"], capture_output=True, timeout=60).returncode == 0


pytestmark = pytest.mark.skipif(not allowed(), reason="takes Linux's unshare, as root, with user namespaces")


def bare(script: str, home: Path | None = None) -> str:
    checks = """
        import os, pwd
        for folder in (".", "/tmp", "/var/tmp", "/dev/shm", os.environ.get("HF_HOME", "/")):
            try:
                open(os.path.join(folder, "written"), "w")
            except OSError as error:
                assert error.errno in (2, 13, 30), error  # missing, forbidden, read-only
            else:
                raise AssertionError(f"{folder} can be written")
        try:
            raise AssertionError(pwd.getpwuid(os.getuid()))
        except KeyError:
            assert "HOME" not in os.environ
    """
    environment = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    if home is not None:
        environment |= {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [*UNSHARE, sys.executable, "-W", "error", "-c", textwrap.dedent(checks) + textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_the_demo_runs() -> None:
    script = """
        from candle_phi import Phi
        with Phi.demo() as phi:
            print("".join(phi.stream("Write a haiku about ice hockey", seed=1)))
    """
    assert len(bare(script).splitlines()) == 3


def test_a_model_in_a_read_only_cache_opens(use: Callable[[FakeHub], Path], phi: Phi) -> None:
    server = FakeHub({"model.gguf": Path(phi.path).read_bytes()})
    try:
        home = use(server)
        hub.download(server.repo)
    finally:
        server.close()
    script = f"""
        from candle_phi import Phi, hub
        with Phi.from_pretrained({server.repo!r}) as phi:
            print(len(phi.generate({HAIKU!r}, seed=1).splitlines()), [file.filename for file in hub.list_cached()])
    """
    assert bare(script, home) == "3 ['model.gguf']\n"


def test_without_any_cache_the_error_says_what_to_set() -> None:
    script = """
        from candle_phi import Phi
        import os
        os.environ["HF_HUB_OFFLINE"] = "1"
        try:
            Phi.from_pretrained("org/model", "model.gguf")
        except Exception as error:
            print(type(error).__name__, error)
    """
    assert "HF_HOME" in bare(script)
