"""Make the golden files: tiny Phi-3 models as GGUF, with the logits and greedy ids of Hugging Face transformers.

    python tests/make_golden.py [--llama-python PYTHON] [CASE ...]

Needs torch, transformers and gguf; the K-quant cases also need llama-cpp-python, in this Python or in PYTHON
(golden/README.md has the versions). Weights and prompts are drawn from numpy generators seeded by the case's name, so
a run on the same versions writes the same bytes. Reference: `Phi3ForCausalLM`, float32, eager attention, on exactly the
weights the file holds (dequantized).
"""

import argparse
import ctypes
import json
import pathlib
import subprocess
import sys
import tempfile
import zlib
from dataclasses import dataclass

import numpy as np

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
# between the two best logits of every greedy step, so that the rounding of an f16 KV cache cannot change an id
MIN_GAP = 0.2

SPECIALS = [
    f"<|{name}|>" for name in ["endoftext", "assistant", "placeholder1", "placeholder2", "placeholder3", "placeholder4"]
]
SPECIALS += [f"<|{name}|>" for name in ["system", "end", "placeholder5", "placeholder6", "user"]]
PIECES = ["▁t", "he", "▁the", "in", "er", "▁a", "▁", "t", "h", "e", "i", "n", "r", "a", "o", "s", "l", "d"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *PIECES, *SPECIALS]
TYPES = [2, 3, 3] + [6] * 256 + [1] * len(PIECES) + [3] * len(SPECIALS)  # unknown, control, byte, normal
SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES))] + [-1000.0] * len(SPECIALS)
FIRST_SPECIAL = TOKENS.index(SPECIALS[0])
N_VOCAB = len(TOKENS)  # 288


@dataclass(frozen=True)
class Prompt:
    """`length` random ids, then `n_greedy` greedy ones; logits of the last `keep` positions are kept (None: all)."""

    length: int
    n_greedy: int
    keep: int | None = None


@dataclass(frozen=True)
class LongRope:
    original: int
    attn_factor: float | None  # None: the file has no such key, and the factor follows from the two context lengths


@dataclass(frozen=True)
class Case:
    name: str
    prompts: dict[str, Prompt]
    type: str = "F32"  # of every matrix; for `mix`, the type of what llama.cpp quantizes from
    mix: dict[str, int] | None = None  # tensor name pattern -> ggml type, on top of Q4_K_M; quantized by llama.cpp
    hidden: int = 32
    heads: int = 2
    kv_heads: int = 2
    ff: int = 64
    layers: int = 2
    context: int = 256
    rope_dims: int | None = None  # None: the whole head
    base: float = 10000.0
    window: int = 0
    eps: float = 1e-5
    tied: bool = False
    longrope: LongRope | None = None
    bare: bool = False  # without the keys that Microsoft's file lacks too

    @property
    def head_dim(self):
        return self.hidden // self.heads

    @property
    def n_rot(self):
        return self.rope_dims or self.head_dim

    def rng(self, purpose):
        return np.random.default_rng(zlib.crc32(f"{self.name}/{purpose}".encode()))


SHORT = {"short": Prompt(7, 12)}
K_PROMPTS = {f"p{i}": Prompt(8 + i, 1) for i in range(8)}
K_SIZE = {"hidden": 256, "heads": 4, "kv_heads": 1, "ff": 256}
GGML = {"Q2_K": 10, "Q3_K": 11, "Q5_K": 13}

CASES = [
    Case("plain", {"one": Prompt(1, 24), "many": Prompt(33, 24)}, hidden=40, heads=5, kv_heads=5, ff=56),
    Case(
        "window",
        {"shorter": Prompt(5, 2), "equal": Prompt(8, 8), "longer": Prompt(21, 40), "far": Prompt(700, 4, keep=2)},
        context=1024,
        window=8,
    ),
    Case("gqa", {"one": Prompt(1, 16), "many": Prompt(25, 24)}, heads=4, kv_heads=2, eps=1e-2),
    Case("bare", {"many": Prompt(9, 16), "past2047": Prompt(2100, 4, keep=2)}, kv_heads=1, context=4096, bare=True),
    Case("rope_base", {"many": Prompt(40, 16)}, kv_heads=1, base=250000.0),
    Case(
        "longrope",
        {"short": Prompt(5, 12), "exact": Prompt(20, 8), "long": Prompt(26, 12), "crossing": Prompt(11, 24)},
        context=131072,
        longrope=LongRope(20, 1.19),
    ),
    Case("partial_tied", {"one": Prompt(1, 16), "many": Prompt(29, 16)}, rope_dims=12, tied=True),
    # as Phi-4-mini, with its window longer than the context; the factor follows from the file's 64, whatever n_ctx is
    Case(
        "partial_tied_longrope",
        {"long": Prompt(18, 8), "crossing": Prompt(10, 20)},
        kv_heads=1,
        context=64,
        window=128,
        rope_dims=12,
        tied=True,
        longrope=LongRope(16, None),
    ),
    Case("f16", SHORT, type="F16", rope_dims=12),
    Case("bf16", SHORT, type="BF16"),
    *(
        Case(kind.lower(), SHORT, type=kind, hidden=64, heads=4, kv_heads=4, layers=1)
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
    ),
    # Microsoft's mix: Q5_K qkv, Q4_K elsewhere, Q6_K output and (with two layers) the second ffn_down
    Case("k_official", K_PROMPTS, **K_SIZE, mix={"attn_qkv": GGML["Q5_K"]}),
    # tied, so token_embd is Q6_K and is the head too
    Case(
        "k_low",
        K_PROMPTS,
        layers=1,
        tied=True,
        **K_SIZE,
        mix={"attn_qkv": GGML["Q3_K"], "attn_output": GGML["Q2_K"], "ffn_up": GGML["Q2_K"], "ffn_down": GGML["Q3_K"]},
    ),
]


# ---- the model ----

HF_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
HF_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def hf_name(name):
    if name in HF_TOP:
        return HF_TOP[name]
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{HF_LAYER[part]}.weight"


def draw_weights(case):
    """GGUF name -> float32 array, rows first. The scales give scores and logits the spread of a trained model:
    attention looks at a few keys, and the best logit stands clear of the second."""
    rng = case.rng("weights")

    def matrix(rows, cols, gain):
        return (rng.standard_normal((rows, cols)) * gain / np.sqrt(cols)).astype(np.float32)

    def norm(n):
        return rng.uniform(0.6, 1.4, n).astype(np.float32)

    hidden, kv = case.hidden, case.kv_heads * case.head_dim
    w = {"token_embd.weight": matrix(N_VOCAB, hidden, 3.5 if case.tied else np.sqrt(hidden))}
    # random signs: else a tied head sees the current token's own embedding in x, and repeats it for ever
    w["output_norm.weight"] = norm(hidden) * rng.choice(np.float32([-1, 1]), hidden)
    if not case.tied:
        w["output.weight"] = matrix(N_VOCAB, hidden, 3.5)
    head = w["token_embd.weight" if case.tied else "output.weight"]
    head[:3] *= 0.05  # control tokens are never the best, so no stop id cuts a greedy path
    head[FIRST_SPECIAL:] *= 0.05
    for i in range(case.layers):
        w[f"blk.{i}.attn_norm.weight"] = norm(hidden)
        w[f"blk.{i}.attn_qkv.weight"] = np.concatenate([matrix(hidden + kv, hidden, 1.1), matrix(kv, hidden, 1.3)])
        w[f"blk.{i}.attn_output.weight"] = matrix(hidden, hidden, 1.2)
        w[f"blk.{i}.ffn_norm.weight"] = norm(hidden)
        w[f"blk.{i}.ffn_up.weight"] = matrix(2 * case.ff, hidden, 1.3)
        w[f"blk.{i}.ffn_down.weight"] = matrix(hidden, case.ff, 1.6)
    return w


def rope_factors(case):
    """(short, long), each (n_rot / 2,): ascending, as in the published files."""
    rng = case.rng("rope factors")
    short = np.sort(rng.uniform(1.0, 2.5, case.n_rot // 2)).astype(np.float32)
    long = np.sort(rng.uniform(1.0, 12.0, case.n_rot // 2)).astype(np.float32)
    return short, long


def hf_model(case, weights):
    import torch
    from transformers import Phi3Config, Phi3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": case.base, "partial_rotary_factor": case.n_rot / case.head_dim}
    original = case.context
    if case.longrope:
        original = case.longrope.original
        short, long = rope_factors(case)
        rope |= {
            "rope_type": "longrope",
            "short_factor": short.tolist(),
            "long_factor": long.tolist(),
            "original_max_position_embeddings": original,
        }
        if case.longrope.attn_factor is not None:
            rope["attention_factor"] = case.longrope.attn_factor
    config = Phi3Config(
        vocab_size=N_VOCAB,
        hidden_size=case.hidden,
        intermediate_size=case.ff,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        max_position_embeddings=case.context,
        original_max_position_embeddings=original,
        rms_norm_eps=case.eps,
        tie_word_embeddings=case.tied,
        rope_parameters=rope,
        sliding_window=case.window or None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        attn_implementation="eager",
    )
    model = Phi3ForCausalLM(config).to(torch.float32).eval()
    state = {hf_name(name): torch.from_numpy(np.array(array, np.float32)) for name, array in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected, unexpected
    assert set(missing) == ({"lm_head.weight"} if case.tied else set()), missing
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == case.tied
    model.generation_config.eos_token_id = None
    return model


# ---- the file ----


def write_gguf(path, case, weights):
    """Write the file and return what it holds: GGUF name -> float32 array."""
    from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, quants

    w = GGUFWriter(path, "phi3")
    w.add_name("Phi3")
    w.add_context_length(case.context)
    w.add_embedding_length(case.hidden)
    w.add_feed_forward_length(case.ff)
    w.add_block_count(case.layers)
    w.add_head_count(case.heads)
    w.add_head_count_kv(case.kv_heads)
    w.add_layer_norm_rms_eps(case.eps)
    w.add_rope_dimension_count(case.n_rot)
    w.add_file_type(LlamaFileType.ALL_F32 if case.type == "F32" else LlamaFileType[f"MOSTLY_{case.type}"])
    w.add_quantization_version(2)
    if not case.bare:
        w.add_rope_freq_base(case.base)
        w.add_sliding_window(case.window)
        w.add_rope_scaling_orig_ctx_len(case.longrope.original if case.longrope else case.context)
    if case.longrope and case.longrope.attn_factor is not None:
        w.add_rope_scaling_attn_factors(case.longrope.attn_factor)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list(TOKENS)
    w.add_token_scores(SCORES)
    w.add_token_types(TYPES)
    w.add_bos_token_id(1)
    w.add_eos_token_id(FIRST_SPECIAL)
    w.add_unk_token_id(0)
    w.add_pad_token_id(FIRST_SPECIAL)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)

    kind = GGMLQuantizationType[case.type]
    held = {}
    for name, array in weights.items():
        if array.ndim == 1 or case.type == "F32":
            w.add_tensor(name, array)
            held[name] = array
        else:
            data = quants.quantize(array, kind)
            w.add_tensor(name, data, raw_dtype=kind)
            held[name] = quants.dequantize(data, kind)
    if case.longrope:
        short, long = rope_factors(case)
        w.add_tensor("rope_factors_long.weight", long)
        w.add_tensor("rope_factors_short.weight", short)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return held


def read_weights(path):
    """GGUF name -> dequantized float32 array, and the names of the tensor types in use."""
    from gguf import GGUFReader, quants

    tensors = GGUFReader(path).tensors
    weights = {t.name: quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in tensors}
    return weights, sorted({t.tensor_type.name for t in tensors})


# ---- llama.cpp: quantizing and logits run in a process of their own, by the Python that has llama-cpp-python ----


def llama_quantize(source, destination, mix):
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    params.nthread = 1
    overrides = (llama_cpp.llama_model_tensor_override * (len(mix) + 1))()
    for slot, (pattern, kind) in zip(overrides, mix.items(), strict=False):
        slot.pattern, slot.type = pattern.encode(), kind
    params.tt_overrides = overrides
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(destination).encode(), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize returned {status}"


def llama_logits(path, prompts, out):
    """Logits of every position, (len(ids), N_VOCAB), with an f32 and with an f16 KV cache."""
    import llama_cpp

    results = {"version": np.array(llama_cpp.__version__)}
    for kv, kind in (("f32", llama_cpp.GGML_TYPE_F32), ("f16", llama_cpp.GGML_TYPE_F16)):
        llama = llama_cpp.Llama(
            str(path),
            n_ctx=256,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=kind,
            type_v=kind,
            verbose=False,
        )
        for name, ids in prompts.items():
            llama.reset()
            llama.eval(ids)
            results[f"{kv}/{name}"] = np.array(llama.scores[: len(ids)], np.float32)
    np.savez(out, **results)


def in_llama(python, call, source, out, value):
    arguments = json.dumps([call, str(source), str(out), value])
    subprocess.run([python, __file__, "--llama-call", arguments], check=True)


# ---- the reference ----


def greedy(model, prompts, n):
    """prompts (batch, length) -> through HF's cache, ids (batch, n) and the logits behind them (batch, n, N_VOCAB)."""
    import torch

    ids = torch.tensor(prompts)
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=n,
            use_cache=True,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return out.sequences[:, ids.shape[1] :].numpy(), torch.stack(out.logits, 1).numpy()


def forward(model, ids):
    """ids: (length,) -> logits (length, N_VOCAB) of one pass without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def draw_prompt(case, model, name):
    """The first random prompt whose greedy path has wide gaps and does not run in a small circle."""
    prompt = case.prompts[name]
    rng = case.rng(name)
    batch = 512 if prompt.length < 100 else 16
    for _ in range(64):
        prompts = rng.integers(3, FIRST_SPECIAL, (batch, prompt.length))
        chosen, steps = greedy(model, prompts, prompt.n_greedy)
        best = np.sort(steps, -1)[..., -2:]
        gap = (best[..., 1] - best[..., 0]).min(1)
        distinct = np.array([len(set(row)) for row in chosen.tolist()])
        good = np.flatnonzero((gap > MIN_GAP) & (distinct >= prompt.n_greedy * 0.6))
        if good.size:
            return prompts[good[0]].tolist()
    raise SystemExit(f"{case.name}/{name}: no prompt of {64 * batch} has greedy gaps over {MIN_GAP}")


def reference(case, model):
    """Prompt name -> {ids, first, logits, greedy, steps}; `logits` are those of positions first.. of the prompt."""
    golden = {}
    for name, prompt in case.prompts.items():
        ids = draw_prompt(case, model, name)
        chosen, steps = (a[0] for a in greedy(model, [ids], prompt.n_greedy))
        logits = forward(model, ids)
        # generating through HF's cache is one pass over everything so far, also where LongRoPE drops the cache
        for k in range(prompt.n_greedy):
            again = forward(model, ids + chosen[:k].tolist())[-1]
            assert np.abs(again - steps[k]).max() < 3e-4, (case.name, name, k, np.abs(again - steps[k]).max())
        first = 0 if prompt.keep is None else prompt.length - prompt.keep
        golden[name] = {
            "ids": np.array(ids, np.int32),
            "first": np.int32(first),
            "logits": logits[first:].astype(np.float32),
            "greedy": chosen.astype(np.int32),
            "steps": steps.astype(np.float32),
        }
    return golden


def rmse(a, b):
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


def make(case, llama_python):
    """Write golden/NAME.gguf and golden/NAME.npz, and return the case's entry of golden.json."""
    path = GOLDEN / f"{case.name}.gguf"
    entry = {"original_context": case.longrope.original if case.longrope else None, "window": case.window or None}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = pathlib.Path(scratch)
        if case.mix is None:
            held = write_gguf(path, case, draw_weights(case))
        else:
            write_gguf(scratch / "f32.gguf", case, draw_weights(case))
            in_llama(llama_python, "quantize", scratch / "f32.gguf", path, case.mix)
            held = read_weights(path)[0]
        model = hf_model(case, held)
        golden = reference(case, model)
        if case.mix is not None:
            prompts = {name: g["ids"].tolist() for name, g in golden.items()}
            in_llama(llama_python, "logits", path, scratch / "llama.npz", prompts)
            theirs = np.load(scratch / "llama.npz")
            entry["llama_cpp"] = {"version": str(theirs["version"])} | {
                f"rmse_kv_{kv}": {
                    name: round(rmse(theirs[f"{kv}/{name}"], g["logits"]), 6) for name, g in golden.items()
                }
                for kv in ("f32", "f16")
            }
    np.savez_compressed(
        GOLDEN / f"{case.name}.npz", **{f"{name}/{key}": a for name, g in golden.items() for key, a in g.items()}
    )
    entry["types"] = read_weights(path)[1]
    entry["prompts"] = {name: [p.length, p.n_greedy] for name, p in case.prompts.items()}
    spread = np.concatenate([g["logits"] for g in golden.values()]).std()
    print(
        f"{case.name:24} logits std {spread:4.1f}  {path.stat().st_size:7} bytes  {' '.join(entry['types'])}",
        flush=True,
    )
    return entry


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all")
    parser.add_argument("--llama-python", default=sys.executable, help="the Python that has llama-cpp-python")
    parser.add_argument("--llama-call", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.llama_call:
        call, source, out, value = json.loads(args.llama_call)
        llama_quantize(source, out, value) if call == "quantize" else llama_logits(source, value, out)
        return

    import gguf  # noqa: F401  # fail before anything is written
    import torch
    import transformers

    unknown = set(args.cases) - {case.name for case in CASES}
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # one order of summation
    GOLDEN.mkdir(exist_ok=True)
    manifest = GOLDEN / "golden.json"
    entries = json.loads(manifest.read_text())["cases"] if args.cases and manifest.exists() else {}
    for case in CASES:
        if not args.cases or case.name in args.cases:
            entries[case.name] = make(case, args.llama_python)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "numpy": np.__version__}
    ordered = {case.name: entries[case.name] for case in CASES if case.name in entries}
    manifest.write_text(json.dumps({"made_with": versions, "cases": ordered}, indent=1) + "\n")


if __name__ == "__main__":
    main()
