"""`candle-phi tokenize`: the token ids of a text."""

import json

from ..model import Phi
from . import output
from .mistakes import UsageError, usage_errors
from .model import add_model_options, choose_model, open_model
from .parser import Parser
from .prompt import read_text


def run(arguments: list[str]) -> None:
    """Prints token ids, or tokens one a line, or JSON."""
    parser = make_parser()
    typed, extra, unknown = parser.split(arguments)
    if unknown:
        raise UsageError(parser.unknown_option(unknown[0]))
    choice = choose_model(typed)
    text = read_text([*typed.text, *extra], command=parser.command)
    given = {name: True for name in ("parse_special", "add_bos") if name in typed}
    with open_model(choice) as phi:
        with usage_errors():
            ids = phi.tokenize(text, **given)
        output.status.clear()
        if typed.json:
            output.write_json({"ids": ids, "pieces": _pieces(phi, ids), "model": phi.path})
        elif typed.pieces:
            for token, piece in zip(ids, _pieces(phi, ids), strict=True):
                output.write(f"{token}\t{json.dumps(piece, ensure_ascii=False)}\n")
        else:
            output.write(" ".join(map(str, ids)) + "\n")


def make_parser() -> Parser:
    """The parser of `candle-phi tokenize`."""
    parser = Parser(
        "tokenize", "Prints the token ids of a text, typed or piped in, without a template.", '"TEXT" [OPTION...]'
    )
    parser.words("text", "TEXT")
    section = parser.section("options")
    section.add("--pieces", default=False, help="print one token a line: its id and its text")
    section.add("--json", default=False, help="print one JSON object: ids, pieces, model")
    section.add("--parse-special", help="read special tokens in the text as tokens")
    section.add("--add-bos", help="begin with the beginning-of-text token")
    parser.end_section()
    add_model_options(parser)
    return parser


def _pieces(phi: Phi, ids: list[int]) -> list[str]:
    """The text of each token. It is decoded after a letter, because decoding strips a space at the start."""
    letter = phi.tokenize("a")
    before = len(phi.detokenize(letter, skip_special=False))
    return [phi.detokenize([*letter, token], skip_special=False)[before:] for token in ids]
