"""What the package says to people: every message, in one list that is read as a whole when one of them changes.

`tests/messages.txt` has the literals of messages, file by file, with `{}` where a value goes. After a change:

    python tests/test_words.py > tests/messages.txt

Comments, docstrings and pages keep to plain words too: `HABITS` has turns of phrase that a reader must read twice.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / "tests" / "messages.txt"

LOGGING = {"debug", "info", "warning", "error", "exception"}
NO_MESSAGES = {"expect", "debug_assert", "assert", "assert_eq", "panic", "unreachable"}
"""Rust's macros and methods whose text is for us: a failure of one is a bug, and reaches users as an internal error."""

RUST_TOKENS = re.compile(
    r"""
      (?P<comment> //[^\n]* | /\*.*?\*/ )
    | r(?P<fence>\#*)"(?P<raw>.*?)"(?P=fence)
    | b?"(?P<text>(?:[^"\\]|\\.)*)"
    | '(?:\\.[^']*|[^'\\])'
    """,
    re.VERBOSE | re.DOTALL,
)


HABITS = {
    "stands there twice": r"\bstands? there\b",  # duplicate
    "as it stands": r"\bas (it|they) stands?\b",  # unchanged, as it is
    "two dimensions are due": r"\b(is|are|was|were) due\b",  # must be, expected
    "reports due now": r"\breports due now\b",  # the progress since the last report
    "what is no number": r"(?<!here )\b(is|are|was|were) no (?!longer\b|more\b|less\b|such\b)",  # is not a
    "so many elements": r"\bso many\b",  # this number of elements
    "nobody": r"\b(some|no|every|any)body\b",  # name the subject: no process, a caller
    "any machine in question": r"\bin question\b",
    "on the strength of": r"\bon the strength of\b",  # rely on
    "all jobs at hand": r"\bat hand\b",  # current
    "wait for ever": r"\bfor ever\b",  # forever
}
"""Examples of phrases to avoid, each with the pattern that finds it."""


def is_prose(text: str) -> bool:
    """Whether a literal is a message: two words at least, with a space between them."""
    return re.search(r"[a-z,:}] (\w|[\"'`{(])", text) is not None


def rust_messages(source: str) -> Iterator[str]:
    """The messages of a Rust file, its tests left out."""
    source = source.split("#[cfg(test)]\nmod tests {")[0]
    for token in RUST_TOKENS.finditer(source):
        literal = token["raw"] if token["raw"] is not None else token["text"]
        if literal is None:
            continue
        before = re.search(r"(\w+)!?\s*\(\s*$", source[: token.start()][-40:])
        if before is not None and before[1] in NO_MESSAGES:
            continue
        text = re.sub(r"\\\n\s*", "", literal) if token["raw"] is None else literal
        text = re.sub(r"\{[^{}]*\}", "{}", text.replace('\\"', '"'))
        if is_prose(text):
            yield text


def template(node: ast.expr) -> str | None:
    """A str, f-string or sum of both as a message with `{}` where a value goes; None for anything else."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(template(part) or "{}" for part in parts)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return (template(left) or "{}") + (template(right) or "{}")
    return None


def python_messages(source: str) -> Iterator[str]:
    """The messages of a Python file: its strings of prose, docstrings left out."""
    tree = ast.parse(source)
    skipped: set[ast.AST] = set()
    for node in ast.walk(tree):
        if node in skipped:
            skipped.update(ast.iter_child_nodes(node))
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            skipped.update(ast.walk(node))
        elif isinstance(node, ast.expr):
            text = template(node)
            if text is not None:
                skipped.update(ast.walk(node))
                if is_prose(text):
                    yield text


def listing() -> str:
    """All messages, as `tests/messages.txt` has them."""
    parts = []
    for folder, pattern, messages in [("src", "*.rs", rust_messages), ("python", "*.py", python_messages)]:
        for path in sorted((ROOT / folder).rglob(pattern)):
            if path.name == "tests.rs":
                continue
            found = list(dict.fromkeys(messages(path.read_text(encoding="utf-8"))))
            if found:
                name = path.relative_to(ROOT).as_posix()
                parts.append(f"# {name}\n" + "".join(f"{' '.join(text.split())}\n" for text in found))
    return "\n".join(parts)


def test_messages_are_those_that_were_read() -> None:
    assert listing() == KEPT.read_text(encoding="utf-8"), "read what changed; then see the first lines of this file"


def test_the_search_sees_messages_of_both_languages() -> None:
    rust = """fn f() { /* "a note" */ Err(format!("n_ctx must be {}, \\\n    not {n}", 1)), '"', "a b".len() }"""
    assert list(rust_messages(rust)) == ["n_ctx must be {}, not {}", "a b"]
    python = '"""A docstring."""\nraise ValueError(f"{name!r} is " + "too long")'
    assert list(python_messages(python)) == ["{} is too long"]


def prose(path: Path) -> str:
    """A file's text with line ends, and the marks of comments after them, as single spaces."""
    return re.sub(r"\n[ \t]*(//[/!]?|#|>)?[ \t]*", " ", path.read_text(encoding="utf-8"))


def test_words_are_plain() -> None:
    folders = [("src", "*.rs"), ("python", "*.py"), ("python", "*.pyi"), ("docs", "*.md")]
    files = [path for folder, pattern in folders for path in sorted((ROOT / folder).rglob(pattern))]
    files += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "Makefile")]
    found = [
        f"{path.relative_to(ROOT).as_posix()}: ...{text[max(0, match.start() - 40) : match.end() + 20]}..."
        for path in files
        for text in [prose(path)]
        for pattern in HABITS.values()
        for match in re.finditer(pattern, text)
    ]
    assert found == [], "say it in plain words"


def test_the_search_finds_its_examples() -> None:
    assert [example for example, pattern in HABITS.items() if not re.search(pattern, example)] == []


if __name__ == "__main__":
    print(listing(), end="")
