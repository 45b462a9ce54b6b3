"""Texts for `candle-phi bench --replay`, from this repository's own history.

Usage: python benches/replays.py --model MODEL.gguf [--out FOLDER] [--items N] [--least TOKENS] [--most TOKENS]

- edits.jsonl: whole files that a commit changed a little. The prompt is the commit's subject and the file before it,
  the answer the file after it. The parts that stay are copied.
- prose.jsonl: paragraphs of the documents. The prompt is the text before them. Nothing is copied on purpose.

The history ends at one commit, and the items are drawn by their hashes: every clone makes the same files with the same
tokenizer. The model counts the tokens; nothing is computed. A clone without that history gets an error.
"""

import argparse
import difflib
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from candle_phi import Phi
from engines import model_path

ROOT = Path(__file__).resolve().parents[1]
UNTIL = "58049ca2ce8b9ba9404b0b5474af213e7b49eecb"
KINDS = (".rs", ".py", ".md", ".toml", ".yml")
CHANGED = 0.2
"""The part of a file's lines that an edit changes at most."""
BEFORE, AFTER = 250, 200
"""Tokens of prose in a prompt and in an answer, at least: a paragraph is not cut."""


class Edit(NamedTuple):
    """A file before and after a commit."""

    subject: str
    path: str
    before: str
    after: str

    @property
    def prompt(self) -> str:
        task = f"Change the file {self.path}: {self.subject}. Answer with the whole file."
        return f"{task}\n\n{self.before}"


def git(*arguments: str) -> str:
    """The output of git. Exits with its message if it fails."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True)
    if done.returncode:
        sys.exit(f"git {arguments[0]}: {done.stderr.decode(errors='replace').strip()}{about_the_clone()}")
    return done.stdout.decode("utf-8")


def about_the_clone() -> str:
    """What to do about a clone that lacks the history."""
    shallow = ["git", "-C", str(ROOT), "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, capture_output=True, text=True).stdout.strip() == "true":
        return "; this clone is shallow: git fetch --unshallow brings the history"
    return ""


def order(*names: str) -> str:
    """A key that has nothing to do with the text, and is the same everywhere."""
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


def edits(phi: Phi, until: str, least: int, most: int) -> Iterator[Edit]:
    """Edits of files of `least` to `most` tokens, one of each path."""
    log = git("log", "--no-merges", "--diff-filter=M", "--raw", "--no-abbrev", "--no-renames", "--format=%x00%s", until)
    found = []
    for commit in log.split("\0")[1:]:
        subject, *lines = commit.strip().splitlines()
        for line in lines:
            if line.startswith(":"):
                facts, path = line.split("\t")
                _, _, before, after, _ = facts.split()
                found.append((order(before, after, path), subject, path, before, after))
    taken = set()
    for _, subject, path, old, new in sorted(found):
        if path in taken or not path.endswith(KINDS):
            continue
        before, after = git("cat-file", "blob", old), git("cat-file", "blob", new)
        if not least < len(after) < 8 * most or not 0 < changed(before, after) <= CHANGED:
            continue
        if all(least <= len(phi.tokenize(text)) <= most for text in (before, after)):
            taken.add(path)
            yield Edit(subject, path, before, after)


def changed(before: str, after: str) -> float:
    """The part of the lines that differ."""
    a, b = before.splitlines(), after.splitlines()
    return 1 - difflib.SequenceMatcher(None, a, b, autojunk=False).ratio()


def prose(phi: Phi, until: str) -> Iterator[tuple[str, str]]:
    """Of each document the beginning, and what follows it."""
    paths = git("ls-tree", "-r", "--name-only", until).splitlines()
    documents = [path for path in paths if path.endswith(".md") and path.split("/")[0] in ("README.md", "docs")]
    for path in sorted(documents, key=order):
        parts = paragraphs(git("show", f"{until}:{path}"))
        before, rest = cut(phi, parts, BEFORE)
        after, rest = cut(phi, rest, AFTER)
        if before and after:
            yield f"Continue this text:\n\n{before}", after


def paragraphs(text: str) -> list[str]:
    """The sentences of a document: without headings, tables, images, links and code."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = re.split(r"\n\s*\n|\n(?=- )", text)
    kept = [block.strip() for block in blocks if not re.match(r"\s*(#|\||!|<|\[|Code:)", block)]
    return [" ".join(block.split()) for block in kept if len(block.split()) > 12]


def cut(phi: Phi, parts: list[str], tokens: int) -> tuple[str, list[str]]:
    """The first paragraphs that have at least this many tokens together, and the others; "" if there are too few."""
    for i in range(1, len(parts) + 1):
        text = "\n\n".join(parts[:i])
        if len(phi.tokenize(text)) >= tokens:
            return text, parts[i:]
    return "", []


def write(path: Path, items: list[tuple[str, str]], wanted: int, phi: Phi) -> None:
    """Writes a file, and says what it has. Exits if there are too few items."""
    if len(items) < wanted:
        sys.exit(f"{path.name}: the history has {len(items)} of {wanted} items{about_the_clone()}")
    lines = [json.dumps({"prompt": prompt, "answer": answer}, ensure_ascii=False) for prompt, answer in items]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    counts = [(phi.count_tokens(prompt), len(phi.tokenize(answer))) for prompt, answer in items]
    prompts, answers = (sum(column) for column in zip(*counts, strict=True))
    print(f"{path}: {len(items)} items, {prompts} tokens of prompts, {answers} of answers")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help='a GGUF file, or "demo" (default: the command line\'s model)')
    parser.add_argument("--out", type=Path, default=ROOT / "target" / "replays", help="default: target/replays")
    parser.add_argument("--items", type=int, default=10, metavar="N", help="of each file (default: 10)")
    parser.add_argument("--least", type=int, default=500, metavar="TOKENS", help="of an edited file (default: 500)")
    parser.add_argument("--most", type=int, default=900, metavar="TOKENS", help="of an edited file (default: 900)")
    parser.add_argument("--until", default=UNTIL, metavar="COMMIT", help="the end of the history")
    typed = parser.parse_args()
    typed.out.mkdir(parents=True, exist_ok=True)
    with Phi(str(model_path(typed.model))) as phi:
        found = zip(range(typed.items), edits(phi, typed.until, typed.least, typed.most), strict=False)
        write(typed.out / "edits.jsonl", [(edit.prompt, edit.after) for _, edit in found], typed.items, phi)
        pieces = zip(range(typed.items), prose(phi, typed.until), strict=False)
        write(typed.out / "prose.jsonl", [piece for _, piece in pieces], typed.items, phi)


if __name__ == "__main__":
    main()
