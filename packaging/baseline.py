"""Lists the code that needs more than plain x86-64: `python packaging/baseline.py UNSTRIPPED [WHEEL]`. UNSTRIPPED is a
wheel whose library has its symbols; WHEEL is the one to be published, whose code must be the same to the byte.

A wheel runs on every x86-64 CPU if each function with newer instructions is called after the CPU was asked. So every
function with an instruction in the VEX or EVEX encoding (AVX and all that came after) has to be in
`candle_phi::kernels`, or in a crate of `DISPATCHING`. The disassembly is objdump's (binutils, 2.37 or later).
"""

import collections
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

DISPATCHING = {  # each asks when it runs, here:
    "aho_corasick": "Teddy's searchers are made after is_x86_feature_detected!",
    "candle_core": 'cpu::features and quantized::k_quants; only `engine="candle"` comes here',
    "compiler_builtins": "fma and fmaf look at CPUID once",
    "core_arch": "intrinsics that were not inlined: whoever calls one is counted as if it had the instruction",
    "gemm_common": "gemm's tables of kernels are filled after feature_detected!",
    "gemm_f16": "as gemm_common",
    "gemm_f32": "as gemm_common",
    "gemm_f64": "as gemm_common",
    "half": "its conversions ask for f16c",
    "memchr": "each function's first call leaves a pointer to the variant that fits",
    "rand_chacha": "ppv-lite86's dispatch! asks",
    "ring": "the callers of its assembly look at what CPUID said",
}
# The assembly's own labels; ring's other functions have its prefix.
RING = re.compile(r"ring_core_|_*(aesni|bn|ecp_nistz256|mulx4x)_")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        unstripped, *published = [library(Path(path), Path(folder, str(i))) for i, path in enumerate(sys.argv[1:])]
        if published and code(unstripped) != code(published[0]):
            print(f"the code of {sys.argv[2]} is not that of {sys.argv[1]}", file=sys.stderr)
            return 1
        functions = beyond(unstripped)
    if not functions:
        print("no function has a VEX or EVEX instruction: has the library its symbols?", file=sys.stderr)
        return 1
    for crate, count in sorted(collections.Counter(map(home, functions)).items()):
        print(f"{count:4} functions in {crate}: {DISPATCHING.get(crate, 'chosen when a model is opened')}")
    strangers = [name for name in functions if home(name) not in ("candle_phi::kernels", *DISPATCHING)]
    for name in strangers:
        print(f"beyond x86-64, and not known to ask the CPU: {name}", file=sys.stderr)
    return 1 if strangers else 0


def library(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(next(name for name in archive.namelist() if name.endswith(".so")), folder))


def code(library: Path) -> bytes:
    text = library.with_suffix(".text")
    subprocess.run(["objcopy", "--output-target=binary", "--only-section=.text", library, text], check=True)
    return text.read_bytes()


def beyond(library: Path) -> list[str]:
    """The names of the functions that have such an instruction, demangled."""
    command = ["objdump", "--disassemble", "--wide", "--insn-width=16", "--no-addresses", str(library)]
    function, found, callers = "", set(), set()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace") as objdump:
        assert objdump.stdout is not None
        # 0xC4, 0xC5 and 0x62 open the encodings, after prefixes for a segment or the size of an address.
        encoding = re.compile(r"\s+(?:(?:26|2e|36|3e|64|65|67) )*(?:c4|c5|62) ")
        for line in objdump.stdout:
            if line.startswith("<"):
                function = line[1 : line.rindex(">")]
            elif encoding.match(line):
                found.add(function)
            elif intrinsic := re.search(r"<(\w*core_arch\w*)>", line):
                callers.add((function, intrinsic[1]))
    found.update(caller for caller, intrinsic in callers if intrinsic in found)
    names = "".join(name + "\n" for name in sorted(found))
    demangled = subprocess.run(["c++filt"], input=names, capture_output=True, text=True, check=True).stdout
    return demangled.splitlines()


def home(name: str) -> str:
    """The crate of a function, and of our own the module too: the first path in a name like `<&a::B as c::D>::e`."""
    if RING.match(name):
        return "ring"
    path = re.search(r"\w+(::\w+)+", re.sub(r"\[[0-9a-f]+\]", "", name))  # a crate may have a number: core[c1f1a4]
    parts = path[0].split("::") if path else [name]
    if parts[:2] == ["core", "core_arch"]:
        return "core_arch"
    return "::".join(parts[: 2 if parts[0] == "candle_phi" else 1])


if __name__ == "__main__":
    sys.exit(main())
