"""candle-phi for replay_peers.py: seconds of decoding known answers with speculation."""

import json
from pathlib import Path

from candle_phi import Phi, _engine, _replay
from candle_phi._bench import machine
from worker import parser, serve


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--kernel", required=True)
    options.add_argument("--items", type=Path, required=True, help="JSON: the prompts and answers as token ids")
    given = options.parse_args()
    items = [_replay.Item(*item) for item in json.loads(given.items.read_text(encoding="utf-8"))]
    with Phi(given.model, n_threads=given.n_threads, kernel=given.kernel, prefix_cache=_replay.HELD) as phi:

        def line(number: int) -> dict[str, float]:
            [item] = [item for item in items if item.number == number]
            phi.warm(item.prompt)
            found = _replay.run(phi, [item], True)
            return {f"seconds {number}": found.seconds * (len(item.answer) - 1) / found.tokens, "passes": found.passes}

        ready = {
            "left_out": {},
            "n_threads": phi.n_threads,
            "machine": machine(),
            "cpu": _engine.doctor()["cpu"],
        }
        serve(ready, {"line": line})


if __name__ == "__main__":
    main()
