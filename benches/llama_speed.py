"""llama.cpp for tokens_per_second.py and streams_together.py, in an environment that has llama-cpp-python.

Questions and answers are those of `our_speed.py` and `our_streams.py`. No token is sampled, which is to the advantage
of llama.cpp.
"""

import ctypes
import random
import time

import llama_cpp

from worker import AHEAD, ANSWER, SHORT_PROMPT, parser, private_bytes, serve

DECODED = 16
BATCH = 512


class Context:
    """One sequence of random tokens."""

    def __init__(self, model: llama_cpp.llama_model_p, positions: int, n_threads: int, flash_attention: bool) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = positions, BATCH, BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash_attention)  # LLAMA_FLASH_ATTN_TYPE_DISABLED, _ENABLED
        context = llama_cpp.llama_init_from_model(model, params)
        assert context is not None, f"llama.cpp cannot make a context of {positions} positions"
        self.context = context
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.ids = random.Random(0)
        self.length = 0

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0

    def seconds(self, *passes: int) -> float:
        """The time of passes over these numbers of tokens."""
        start = time.perf_counter()
        for tokens in passes:
            ids = (ctypes.c_int32 * tokens)(*(self.ids.randrange(self.n_vocab) for _ in range(tokens)))
            failed = llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, tokens))
            assert failed == 0, f"llama_decode returned {failed}"
            self.length += tokens
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


class Sequences:
    """Sequences of random tokens that share each batch, in a context with one KV cache for all of them."""

    def __init__(self, model: llama_cpp.llama_model_p, n: int, n_threads: int, flash_attention: bool) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = n * (SHORT_PROMPT + AHEAD + ANSWER)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max, params.kv_unified = n, True
        params.n_threads = params.n_threads_batch = n_threads
        params.flash_attn_type = int(flash_attention)
        context = llama_cpp.llama_init_from_model(model, params)
        assert context is not None, f"llama.cpp cannot make a context of {n} sequences"
        self.context, self.n = context, n
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.ids = random.Random(0)
        self.batch = llama_cpp.llama_batch_init(n * SHORT_PROMPT, 0, 1)
        self.length = 0

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.length = 0

    def decode(self, passes: int, tokens: int = 1) -> float:
        """Seconds of passes over this number of tokens of each sequence, with the logits of the last one of each."""
        start = time.perf_counter()
        for _ in range(passes):
            self.batch.n_tokens = self.n * tokens
            for row in range(self.n * tokens):
                sequence, token = divmod(row, tokens)
                self.batch.token[row] = self.ids.randrange(self.n_vocab)
                self.batch.pos[row] = self.length + token
                self.batch.n_seq_id[row], self.batch.seq_id[row][0] = 1, sequence
                self.batch.logits[row] = token == tokens - 1
            failed = llama_cpp.llama_decode(self.context, self.batch)
            assert failed == 0, f"llama_decode returned {failed}"
            self.length += tokens
        llama_cpp.llama_synchronize(self.context)
        return time.perf_counter() - start


def load(file: str) -> llama_cpp.llama_model_p:
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    assert model is not None, f"llama.cpp cannot load {file}"
    return model


def pieces(tokens: int) -> list[int]:
    """The lengths of passes of at most a batch."""
    return [min(BATCH, tokens - done) for done in range(0, tokens, BATCH)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--flash-attention", action="store_true")
    arguments = options.parse_args()

    @llama_cpp.llama_log_callback
    def quiet(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        pass

    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = load(arguments.model)

    def context(model: llama_cpp.llama_model_p, positions: int) -> Context:
        return Context(model, positions, arguments.n_threads, arguments.flash_attention)

    room = max([*arguments.prompts, 2 * DECODED])
    empty = context(model, room)
    loaded, decoding = private_bytes(), None
    empty.seconds(min(32, BATCH), 1, 1)  # the first passes touch everything once
    kept: dict[int, Context] = {}

    def prefill(tokens: int) -> dict[str, float]:
        empty.clear()
        return {f"prefill {tokens}": tokens / empty.seconds(*pieces(tokens))}

    def decode(at: int) -> dict[str, float]:
        """A long context is kept from turn to turn, from a tenth below it to a tenth above."""
        nonlocal decoding
        more = DECODED * max(at // 5 // DECODED, 1)
        first = max(at - more // 2, 1)
        if at > 1 and at not in kept:
            kept[at] = context(model, at + more)
        there = kept.get(at, empty)
        if not first <= there.length <= first + more - DECODED:
            there.clear()
            there.seconds(*pieces(first))
        speed = DECODED / there.seconds(*[1] * DECODED)
        decoding = max(private_bytes() or 0, decoding or 0) or None
        return {f"decode {at}": speed}

    kinds: dict[int, Sequences] = {}

    def sequences(n: int) -> Sequences:
        """Empty sequences."""
        if n not in kinds:
            kinds[n] = Sequences(model, n, arguments.n_threads, arguments.flash_attention)
            kinds[n].decode(1)  # the first pass touches everything once
        kinds[n].clear()
        return kinds[n]

    def together(n: int) -> dict[str, float]:
        found = sequences(n)
        found.decode(1, SHORT_PROMPT)
        found.decode(AHEAD)
        return {"decode together": n * ANSWER / found.decode(ANSWER)}

    def answers(n: int) -> dict[str, float]:
        found = sequences(n)
        seconds = found.decode(1, SHORT_PROMPT) + found.decode(ANSWER - 1)
        return {"answers together": n * ANSWER / seconds}

    def one(_: int) -> dict[str, float]:
        return {"one": together(1)["decode together"]}

    def load_again(_: int) -> dict[str, float]:
        start = time.perf_counter()
        again = load(arguments.model)
        another = context(again, room)
        seconds = time.perf_counter() - start
        llama_cpp.llama_free(another.context)
        llama_cpp.llama_model_free(again)
        return {"load": seconds}

    serve(
        {"left_out": {}, "system_info": llama_cpp.llama_print_system_info().decode()},
        {
            "prefill": prefill,
            "decode": decode,
            "load": load_again,
            "together": together,
            "answers": answers,
            "one": one,
            "memory": lambda _: {"private loaded": loaded, "private decoding": decoding},
        },
    )


if __name__ == "__main__":
    main()
