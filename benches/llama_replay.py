"""llama-cpp-python's prompt lookup for replay_peers.py: seconds of decoding known answers, greedily.

`LlamaPromptLookupDecoding` with 2 and 10, which are its defaults. Each id is sampled, then replaced by that of the
answer. No text is made of the ids, which is to the advantage of llama.cpp.
"""

import json
import time
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from worker import parser, serve

NGRAM, DRAFT = 2, 10
SPARE = 16
"""Positions beyond the longest line: drafts need some."""


class Replay(llama_cpp.Llama):
    """A model whose answer is known."""

    answer: list[int]
    sampled = 0
    passes = 0

    def begin(self, answer: list[int]) -> None:
        self.answer, self.sampled, self.passes = answer, 0, 0

    def sample(self, *positional: Any, **options: Any) -> int:
        super().sample(*positional, **options)
        self.sampled += 1
        return self.answer[self.sampled - 1]

    def eval(self, tokens: Any) -> None:
        self.passes += 1
        super().eval(tokens)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--items", type=Path, required=True, help="JSON: the prompts and answers as token ids")
    options.add_argument("--flash-attention", action="store_true")
    given = options.parse_args()
    items = {number: (prompt, answer) for number, prompt, answer, _ in json.loads(given.items.read_text("utf-8"))}
    llama = Replay(
        given.model,
        n_ctx=max(len(prompt) + len(answer) for prompt, answer in items.values()) + SPARE,
        n_threads=given.n_threads,
        n_threads_batch=given.n_threads,
        flash_attn=given.flash_attention,
        logits_all=True,  # else its array of scores has 512 rows, and the drafts of longer prompts fail
        draft_model=LlamaPromptLookupDecoding(max_ngram_size=NGRAM, num_pred_tokens=DRAFT),
        verbose=False,
    )

    def line(number: int) -> dict[str, float]:
        prompt, answer = items[number]
        llama.reset()
        llama.begin(answer)
        tokens = llama.generate(prompt, temp=0.0)
        said = [next(tokens)]
        start = time.perf_counter()
        said += [next(tokens) for _ in answer[1:]]
        seconds = time.perf_counter() - start
        assert said == answer
        return {f"seconds {number}": seconds, "passes": llama.passes - 1}

    serve({"left_out": {}, "system_info": llama_cpp.llama_print_system_info().decode()}, {"line": line})


if __name__ == "__main__":
    main()
