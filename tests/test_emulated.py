"""On emulated CPUs the right kernel is chosen and the text is the same.

`qemu-x86_64` emulates CPUs with and without AVX2, but not AVX-512.
"""

import json
import platform
import shutil
import subprocess
import sys

import pytest

from candle_phi import Phi

EMULATOR = shutil.which("qemu-x86_64")
PROMPTS = ["Write a haiku about the rink", "Tell me about ice hockey", "What is a Zamboni?"]
# The least distance of the log probabilities of the two best tokens: quantized activations change logits by hundredths.
MIN_GAP = 0.2
SCRIPT = """
import json, sys
from candle_phi import Phi, _engine
with Phi.demo() as phi:
    texts = [phi.generate(prompt, temperature=0, max_tokens=24) for prompt in json.loads(sys.argv[1])]
    print(json.dumps([_engine.doctor()["kernel"], phi.kernel, *texts]))
"""

pytestmark = [
    pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64 (Debian: qemu-user)"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the interpreter is not x86-64"),
]


@pytest.fixture(scope="module")
def texts(phi: Phi) -> list[str]:
    results = [phi.generate(p, temperature=0, max_tokens=24, logprobs=True, top_logprobs=2) for p in PROMPTS]
    gaps = [step.top[0].logprob - step.top[1].logprob for result in results for step in result.logprobs or []]
    assert len(gaps) > 30
    assert min(gaps) > MIN_GAP, "choose prompts with a clearer best token"
    return [str(result) for result in results]


@pytest.mark.parametrize(("cpu", "kernel"), [("Nehalem", "portable"), ("Haswell", "avx2")])
def test_a_cpu_takes_its_kernel_and_writes_the_same(texts: list[str], cpu: str, kernel: str) -> None:
    assert EMULATOR is not None
    command = [EMULATOR, "-cpu", cpu, sys.executable, "-c", SCRIPT, json.dumps(PROMPTS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [kernel, kernel, *texts]
