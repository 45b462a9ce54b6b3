"""Samples from the exported file, dequantized into PyTorch, at temperature 1.0.

`--penalty 1.2` adds the repeat penalty of Candle's tutorial. It covers the last 64 generated tokens.

    python sample.py ../python/candle_phi/demo/phi3-demo-q4_k_m.gguf --count 200

Prints the first haiku, and how many of them have three lines, of 5, 7 and 5 syllables, and of lines that the generator
knows.
"""

import argparse

import gguf
import numpy
import torch
from gguf.quants import dequantize

import haiku
from corpus import REQUEST
from export import name
from model import Config, Phi3
from vocabulary import Vocabulary, tokenizer


def load(path: str) -> tuple[Phi3, Vocabulary]:
    reader = gguf.GGUFReader(path)

    def value(key: str):
        return reader.fields[key].contents()

    config = Config(
        vocab=len(value("tokenizer.ggml.tokens")),
        hidden=value("phi3.embedding_length"),
        ff=value("phi3.feed_forward_length"),
        layers=value("phi3.block_count"),
        heads=value("phi3.attention.head_count"),
        kv_heads=value("phi3.attention.head_count_kv"),
        context=value("phi3.context_length"),
        window=value("phi3.attention.sliding_window"),
        eps=value("phi3.attention.layer_norm_rms_epsilon"),
        theta=value("phi3.rope.freq_base"),
    )
    tensors = {t.name: torch.from_numpy(numpy.array(dequantize(t.data, t.tensor_type))) for t in reader.tensors}
    model = Phi3(config)
    model.load_state_dict({parameter: tensors[name(parameter)] for parameter in model.state_dict()})
    words = Vocabulary(*(value(f"tokenizer.ggml.{key}") for key in ("tokens", "scores", "token_type")))
    return model.eval(), words


def prompt(messages: list[str], system: str | None = None) -> str:
    """What the user and the assistant said, in turn, as the chat template writes it."""
    roles = ["user", "assistant"] * len(messages)
    text = f"<|system|>\n{system}<|end|>\n" if system else ""
    return (
        text
        + "".join(f"<|{role}|>\n{said}<|end|>\n" for role, said in zip(roles, messages, strict=False))
        + "<|assistant|>\n"
    )


@torch.no_grad()
def generate(
    model: Phi3,
    ids: list[int],
    count: int,
    stops: set[int],
    temperature: float,
    penalty: float,
    generator: torch.Generator,
    most: int = 120,
) -> list[list[int]]:
    """`count` continuations of one prompt, side by side; each without the id that stopped it."""
    rows = torch.tensor([ids] * count)
    said: list[list[int]] = [[] for _ in range(count)]
    done = [False] * count
    while not all(done) and len(said[0]) < most:
        logits = model.lm_head(model.hidden(rows)[:, -1])  # (count, vocab)
        for row, before in enumerate(said):
            for i in set(before[-64:]):
                logits[row, i] *= penalty if logits[row, i] < 0 else 1 / penalty
        if temperature > 0:
            chosen = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            chosen = logits.argmax(-1, keepdim=True)
        for row, i in enumerate(chosen[:, 0].tolist()):
            done[row] |= i in stops
            said[row].append(i)
        rows = torch.cat((rows, chosen), 1)
    return [row[: next((k for k, i in enumerate(row) if i in stops), len(row))] for row in said]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("gguf")
    arguments.add_argument("prompt", nargs="*", default=[REQUEST], help="what the user and the assistant said, in turn")
    arguments.add_argument("--system")
    arguments.add_argument("--count", type=int, default=200)
    arguments.add_argument("--show", type=int, default=10)
    arguments.add_argument("--temperature", type=float, default=1.0)
    arguments.add_argument("--penalty", type=float, default=1.0)
    arguments.add_argument("--seed", type=int, default=1)
    options = arguments.parse_args()
    torch.set_num_threads(2)
    model, words = load(options.gguf)
    text = tokenizer(words)
    stops = {words.id(token) for token in ("<|end|>", "<|endoftext|>", "<|assistant|>")}
    rows = generate(
        model,
        text.encode(prompt(options.prompt, options.system)).ids,
        options.count,
        stops,
        options.temperature,
        options.penalty,
        torch.Generator().manual_seed(options.seed),
    )
    answers = [text.decode(row, skip_special_tokens=False) for row in rows]
    print("\n\n".join(answers[: options.show]))

    patterns = [pattern for parts in haiku.SCENES.values() for part in parts for pattern in part]
    known = {line.lower() for pattern in patterns for line in haiku.expansions(pattern)}
    lines = [answer.split("\n") for answer in answers]
    three = [poem for poem in lines if len(poem) == 3]
    counted = [poem for poem in three if [haiku.syllables(line) for line in poem] == [5, 7, 5]]
    told = [poem for poem in three if all(line.lower().rstrip(",.; \u2014") in known for line in poem)]
    print(
        f"\nof {len(answers)}: {len(three)} of three lines, {len(counted)} of 5-7-5 syllables, "
        f"{len(told)} of the corpus's lines throughout, {len(set(answers))} different"
    )


if __name__ == "__main__":
    main()
