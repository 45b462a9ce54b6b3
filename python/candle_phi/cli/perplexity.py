"""`candle-phi perplexity`: how well a model predicts a text."""

from .. import options
from ..scores import perplexity_of
from . import output
from .mistakes import UsageError, usage_errors
from .model import add_model_options, choose_model, open_model
from .parser import Parser, whole_number
from .prompt import read_file


def run(arguments: list[str]) -> None:
    """Scores a text and prints the figure, or JSON."""
    parser = make_parser()
    typed, extra, unknown = parser.split(arguments)
    if unknown:
        raise UsageError(parser.unknown_option(unknown[0]))
    with usage_errors():
        options.checked(options.PERPLEXITY, {"stride": typed.stride})
    choice = choose_model(typed)
    text = read_file([*typed.file, *extra], command=parser.command)
    with open_model(choice) as phi:
        with usage_errors():
            ids = phi.tokenize(text)
            figure = perplexity_of(
                phi._model,
                ids,
                typed.stride,
                lambda scored: output.status.draw(f"{scored} of {len(ids) - 1} tokens"),
            )
        output.status.clear()
        if typed.json:
            result = {"perplexity": figure, "scored_tokens": len(ids) - 1, "tokens": len(ids), "n_ctx": phi.n_ctx}
            output.write_json({**result, "model": phi.path})
        else:
            output.write(f"{figure:.4f} over {len(ids) - 1} tokens\n")


def make_parser() -> Parser:
    """The parser of `candle-phi perplexity`."""
    parser = Parser(
        "perplexity",
        "Scores a text: e to the power of the mean negative log probability of its tokens. The text is taken without "
        "a template; each token but the first is scored once.",
        "FILE [OPTION...]",
    )
    parser.words("file", "FILE")
    section = parser.section("options")
    section.add(
        "--stride",
        type=whole_number,
        default=None,
        metavar="N",
        help="for a text longer than the context: move it by N tokens at a time (default: half of the context)",
    )
    section.add("--json", default=False, help="print one JSON object: perplexity, scored_tokens, tokens, n_ctx, model")
    parser.end_section()
    add_model_options(parser)
    return parser
