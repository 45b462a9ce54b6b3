"""Installs a wheel or a source distribution as a user would, and streams: `PYTHON install.py FILE`.

It uses the Python that runs it and an empty virtual environment. A wheel is installed without an index and without Rust
on PATH. Then it runs `smoke.py` and the command line, and checks the sizes. The time to import is reported only: it
depends on the machine.
"""
# Decisions: docs/design/packaging.md

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

MAX_WHEEL, MAX_INSTALLED = 12_000_000, 30_000_000  # bytes
SMOKE = Path(__file__).resolve().with_name("smoke.py")


def main(distribution: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        scripts = Path(folder, "Scripts" if os.name == "nt" else "bin")
        python = scripts / "python"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        is_wheel = distribution.suffix == ".whl"
        if is_wheel:
            environment["PATH"] = os.pathsep.join(folder for folder in os.get_exec_path() if not has_rust(folder))
            assert shutil.which("cargo", path=environment["PATH"]) is None

        def run(*command: str | os.PathLike[str]) -> str:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", check=False
            )
            if done.returncode != 0:
                raise SystemExit(f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}")
            return done.stdout

        run(python, "-m", "pip", "install", "--quiet", *(["--no-index"] if is_wheel else []), distribution.resolve())
        packages = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
        parts = [packages / "candle_phi", *packages.glob("candle_phi-*.dist-info")]
        files = [path for part in parts for path in part.rglob("*") if path.suffix != ".pyc"]
        found = json.loads(run(python, SMOKE))
        found["python"] = sys.version
        found["file_mb"] = distribution.stat().st_size / 1e6
        found["installed_mb"] = sum(path.stat().st_size for path in files) / 1e6
        found["import_ms"] = import_ms(run, python)
        haiku = run(scripts / "candle-phi", "Write a haiku about ice hockey", "--model", "demo", "--seed", "1")
        assert len(haiku.split("\n")) >= 3, haiku
        print(json.dumps({"file": distribution.name, **found}, indent=2))
        assert found["haiku"], "the sampled text under `portable` differs from the expected one"
        assert found["same"], f"{found['kernel']} and portable write different texts"
        assert found["installed_mb"] * 1e6 < MAX_INSTALLED
        if is_wheel:
            assert found["file_mb"] * 1e6 < MAX_WHEEL


def has_rust(folder: str) -> bool:
    return any(Path(folder, name).exists() for name in ("cargo", "cargo.exe", "rustc", "rustc.exe"))


def import_ms(run: Callable[..., str], python: Path) -> float:
    """The processor time of an import, which does not count other processes: the least of ten measurements."""
    script = "import time; s = time.process_time(); import candle_phi; print(1e3 * (time.process_time() - s))"
    return min(float(run(python, "-c", script)) for _ in range(10))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
