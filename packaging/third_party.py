"""Writes THIRD_PARTY.md: the crates in the wheels, with the licences that must be passed on.

`python packaging/third_party.py` writes it; `--check` compares it with Cargo.lock. The texts come from the crates. Of
several licences to choose from, the first in `CHOICE` is taken.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "THIRD_PARTY.md"
SHIPPED = [  # what .github/workflows/release.yml builds
    "x86_64-unknown-linux-gnu",
    "aarch64-unknown-linux-gnu",
    "x86_64-unknown-linux-musl",
    "aarch64-unknown-linux-musl",
    "x86_64-pc-windows-msvc",
    "aarch64-pc-windows-msvc",
    "x86_64-apple-darwin",
    "aarch64-apple-darwin",
]
CHOICE = {  # SPDX name: words that identify its text
    "MIT": "Permission is hereby granted, free of charge",
    "Apache-2.0": "Apache License",
    "BSD-3-Clause": "Redistribution and use in source",
    "ISC": "Permission to use, copy, modify, and",
    "Zlib": "This software is provided 'as-is'",
    "Unicode-3.0": "UNICODE LICENSE V3",
    "CDLA-Permissive-2.0": "Community Data License Agreement",  # Mozilla's certificates
    "MPL-2.0": "Mozilla Public License",  # requires a pointer to the source: the heading gives it
}
HEAD = """\
# Third-party software in the wheels

The compiled module contains these crates, unmodified; the source of each is published by its name and version in the
registry of Rust's crates. It also contains parts of the Rust standard library, under MIT or Apache-2.0. Written by
`packaging/third_party.py` from `Cargo.lock`.
"""


def main() -> int:
    written = document(linked())
    if sys.argv[1:] != ["--check"]:
        TARGET.write_text(written, encoding="utf-8", newline="\n")
    elif not TARGET.exists() or TARGET.read_text(encoding="utf-8") != written:
        print("THIRD_PARTY.md does not match Cargo.lock: run python packaging/third_party.py", file=sys.stderr)
        return 1
    return 0


def linked() -> list[dict[str, Any]]:
    """The crates that are linked into some wheel: normal dependencies, and no macros."""
    command = ["cargo", "metadata", "--locked", "--format-version=1", "--features=python"]
    platforms = [f"--filter-platform={target}" for target in SHIPPED]
    metadata = json.loads(subprocess.run(command + platforms, cwd=ROOT, check=True, capture_output=True).stdout)
    packages = {package["id"]: package for package in metadata["packages"]}
    uses = {node["id"]: node["deps"] for node in metadata["resolve"]["nodes"]}
    found, ahead = set(), [metadata["resolve"]["root"]]
    while ahead:
        package = ahead.pop()
        is_macro = any("proc-macro" in target["kind"] for target in packages[package]["targets"])
        if package not in found and not is_macro:
            found.add(package)
            ahead += [use["pkg"] for use in uses[package] if any(kind["kind"] is None for kind in use["dep_kinds"])]
    found.remove(metadata["resolve"]["root"])
    return sorted((packages[id] for id in found), key=lambda package: (package["name"], package["version"]))


def document(crates: list[dict[str, Any]]) -> str:
    names: dict[str, list[str]] = {}  # by text: many crates carry the same one
    texts: dict[str, str] = {}
    carried: dict[str, list[Path]] = {}  # by repository: some of its crates carry no text
    for crate in crates:
        carried.setdefault(str(crate["repository"]), []).extend(licence_files(crate))
    for crate in crates:
        for text in licences(crate, licence_files(crate) or carried[str(crate["repository"])]):
            key = " ".join(text.split())
            texts.setdefault(key, text.strip())
            names.setdefault(key, []).append(f"{crate['name']} {crate['version']}")
    ordered = sorted(texts, key=names.__getitem__)
    parts = [f"## {', '.join(names[key])}\n\n```text\n{texts[key]}\n```\n" for key in ordered]
    return "\n".join([HEAD, *parts])


def licence_files(crate: dict[str, Any]) -> list[Path]:
    folder = Path(crate["manifest_path"]).parent
    name = re.compile(r"(licen[sc]e|copying|notice)", re.IGNORECASE)
    return [path for path in sorted(folder.iterdir()) if name.match(path.name) and path.is_file()]


def licences(crate: dict[str, Any], files: list[Path]) -> list[str]:
    """The texts that a crate's licence expression requires, and its notices."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in files]
    texts = ["\n".join(line.rstrip() for line in text.splitlines()) for text in texts]
    needed = [text for path, text in zip(files, texts, strict=True) if path.name.upper().startswith("NOTICE")]
    expression = (crate["license"] or "").replace("/", " OR ").replace(" WITH LLVM-exception", "")
    for clause in expression.split(" AND "):
        offered = [name for name in CHOICE if name in clause.strip("( )").split(" OR ")]
        carried = [[text for text in texts if CHOICE[name] in text] for name in offered]
        if any(carried):
            needed += next(filter(None, carried))
        elif "Apache-2.0" in offered:  # the one text without a copyright holder
            needed.append((ROOT / "LICENSE-APACHE").read_text(encoding="utf-8"))
        else:
            raise SystemExit(f"{crate['name']} {crate['version']}: no text for its licence {crate['license']!r}")
    return list(dict.fromkeys(needed))


if __name__ == "__main__":
    sys.exit(main())
