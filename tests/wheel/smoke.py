"""Checks an installed candle-phi, with the Python that has it: `python smoke.py [FILE]`.

A seed must give its text to the letter under `portable`, and the kernel chosen here must write the same text as
`portable`. The result, as JSON, goes to FILE, or to stdout without one. It needs the package and the standard library,
but no standard streams.
"""

import json
import sys

from candle_phi import Phi, __version__

HAIKU = "The Zamboni rolls\nshadows glide a final shift,\nsnow on the way home."  # as tests/test_sampled.py has it
PROMPTS = ["Write a haiku about the rink", "Tell me about ice hockey", "What is a Zamboni?"]  # with clear best tokens


def greedy(phi: Phi) -> list[str]:
    return ["".join(phi.stream(prompt, temperature=0, max_tokens=24)) for prompt in PROMPTS]


def main(path: str | None = None) -> None:
    with Phi.demo(kernel="portable") as phi:
        haiku = "".join(phi.stream("Write a haiku about ice hockey", seed=1, temperature=1.0))
        texts = greedy(phi)
    with Phi.demo() as phi:
        kernel, same = phi.kernel, greedy(phi) == texts
    result = json.dumps({"version": __version__, "kernel": kernel, "haiku": haiku == HAIKU, "same": same})
    if path is not None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(result)
    else:
        print(result)
    if not (haiku == HAIKU and same):
        sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
