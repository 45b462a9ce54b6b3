"""candle-phi or Candle's own loop for tokens_per_second.py: one figure at a time, measured as by `candle-phi bench`."""

from typing import Any

from candle_phi import Phi, _engine
from candle_phi._bench import COMPUTING, Bench, load_seconds, machine
from worker import parser, serve


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kernel")
    arguments.add_argument("--engine", choices=["native", "candle"])
    values = vars(arguments.parse_args())
    model, prompts, contexts = (values.pop(name) for name in ("model", "prompts", "contexts"))
    options: dict[str, Any] = COMPUTING | {name: value for name, value in values.items() if value is not None}

    def open_model() -> Phi:
        return Phi(model, **options)

    with open_model() as phi:
        bench = Bench(phi, prompts=prompts, contexts=contexts)

        def decode(context: int) -> dict[str, float]:
            turn = bench.decode(context)
            return {
                f"decode {context}": turn.tokens_per_second,
                f"fraction {context}": turn.bandwidth_fraction,
                "bandwidth": turn.bandwidth,
            }

        ready = {
            "left_out": bench.left_out,
            "bytes_per_token": {n: sum(phi._model.bytes_per_token(max(n, 1))) for n in bench.contexts},
            "n_threads": phi.n_threads,
            "machine": machine(),
            "cpu": _engine.doctor()["cpu"],
        }
        serve(
            ready,
            {
                "prefill": lambda n: {f"prefill {n}": bench.prefill(n)},
                "decode": decode,
                "passes": lambda _: {"four over one": bench.pass_cost(4), "bandwidth": bench.bandwidth()},
                "load": lambda _: {"load": load_seconds(open_model)},
                "memory": lambda _: {
                    "private loaded": bench.private_loaded,
                    "private decoding": bench.private_decoding,
                },
            },
        )


if __name__ == "__main__":
    main()
