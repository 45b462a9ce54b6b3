"""Sampled text, to the letter: the same on every platform, since `portable` leaves nothing to it.

The texts change when the bundled model, the sampler or the kernel does; a change of any other part must not touch them.
"""

from collections.abc import Iterator

import pytest

from candle_phi import Phi

PROMPT = "Write a haiku about ice hockey"
TEXTS = {
    1: "The Zamboni rolls\nshadows glide a final shift,\nsnow on the way home.",
    2: "Sleepy kids lace up —\neach stride throwing silver snow,\nwinter waits outside.",
    3: "A hush fills the rink\nwrists and shoulders coiled like springs\nthen the storm begins.",
}


@pytest.fixture(scope="module", params=[1, 2, 3], ids="{} threads".format)
def portable(request: pytest.FixtureRequest) -> Iterator[Phi]:
    with Phi.demo(kernel="portable", n_threads=request.param) as phi:
        yield phi


@pytest.mark.parametrize("seed", TEXTS)
def test_a_seed_gives_its_text_to_the_letter(portable: Phi, seed: int) -> None:
    assert portable.generate(PROMPT, seed=seed, temperature=1.0) == TEXTS[seed]


def test_different_seeds_write_different_haiku_of_three_lines(portable: Phi) -> None:
    haiku = [portable.generate(PROMPT, seed=seed) for seed in range(100, 120)]
    assert len(set(haiku)) == len(haiku)
    assert all(len(text.splitlines()) == 3 and text.finish_reason == "stop" for text in haiku)
