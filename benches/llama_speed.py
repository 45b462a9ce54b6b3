"""One round of llama.cpp for tokens_per_second.py, in an environment that has llama-cpp-python; prints JSON.

The keys are those of `candle-phi bench --json`. Nothing is sampled, which is to this peer's advantage.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path

import llama_cpp

DECODED = 16


def private_bytes() -> int | None:
    """As `candle-phi bench` counts it."""
    try:
        rollup = Path("/proc/self/smaps_rollup").read_text(encoding="ascii")
    except OSError:
        return None
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB$", rollup, re.MULTILINE))
    return 1024 * max(int(kilobytes["Private_Dirty"]), int(kilobytes["Anonymous"]))


def counts(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--n-threads", type=int, required=True)
    parser.add_argument("--prompts", type=counts, required=True)
    parser.add_argument("--contexts", type=counts, required=True)
    parser.add_argument("--flash-attention", action="store_true")
    typed = parser.parse_args()

    start = time.perf_counter()
    llama = llama_cpp.Llama(
        typed.model,
        n_ctx=max([*typed.prompts, *typed.contexts]) + DECODED + 8,
        n_batch=512,
        n_threads=typed.n_threads,
        n_threads_batch=typed.n_threads,
        flash_attn=typed.flash_attention,
        use_mmap=True,
        verbose=False,
    )
    load_seconds = time.perf_counter() - start
    loaded = private_bytes()
    ids = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [ids.randrange(llama.n_vocab()) for _ in range(n)]

    def seconds(*passes: list[int]) -> float:
        start = time.perf_counter()
        for given in passes:
            llama.eval(given)
        llama_cpp.llama_synchronize(llama.ctx)
        return time.perf_counter() - start

    seconds(tokens(32), *(tokens(1) for _ in range(2)))  # the first passes touch everything once
    prefill, decode = [], {}
    for n in typed.prompts:
        llama.reset()
        prefill.append({"tokens": n, "tokens_per_second": n / seconds(tokens(n))})
    decoding = None
    # A longer context goes on where the last prompt ended, which saves most of the time; the empty one comes last.
    for context in sorted(typed.contexts, key=lambda n: n or 10**9):
        if not 0 < llama.n_tokens <= context:
            llama.reset()
        if more := max(context, 1) - llama.n_tokens:
            seconds(tokens(more))
        decode[context] = DECODED / seconds(*(tokens(1) for _ in range(DECODED)))
        decoding = private_bytes()
    report = {
        "prefill": prefill,
        "decode": [{"context": context, "tokens_per_second": decode[context]} for context in typed.contexts],
        "load_seconds": load_seconds,
        "private_bytes_loaded": loaded,
        "private_bytes_decoding": decoding,
        "system_info": llama_cpp.llama_print_system_info().decode(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
