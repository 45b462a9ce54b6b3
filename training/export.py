"""Writes model.pt as GGUF: F32, then the mix of types of Microsoft's Q4_K_M file.

python export.py model.pt ../python/candle_phi/demo/phi3-demo-q4_k_m.gguf
"""

import argparse
import ctypes
import hashlib
import os
import tempfile
from collections import Counter

import gguf
import llama_cpp
import numpy
import torch

from model import Config
from vocabulary import Vocabulary

# As Microsoft's file has it: no branch for system messages, and the assistant's turn opened after every user's.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') %}{{'<|user|>' + '\\n' + "
    "message['content'] + '<|end|>' + '\\n' + '<|assistant|>' + '\\n'}}{% elif (message['role'] == 'assistant') %}"
    "{{message['content'] + '<|end|>' + '\\n'}}{% endif %}{% endfor %}"
)

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def name(parameter: str) -> str:
    if parameter in NAMES:
        return NAMES[parameter]
    layer, rest = parameter.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[rest]}"


def write_f32(config: Config, words: Vocabulary, weights: dict[str, torch.Tensor], path: str) -> None:
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_name("candle-phi demo, a tiny Phi-3")  # llama.cpp strips after special tokens where the name says phi-3
    writer.add_description("A small Phi-3 that writes haiku about ice hockey: a demonstration, not an assistant")
    writer.add_license("MIT OR Apache-2.0")
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ff)
    writer.add_block_count(config.layers)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.theta)
    writer.add_sliding_window(config.window)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    end = words.id("<|endoftext|>")
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(end)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for parameter, tensor in weights.items():
        writer.add_tensor(name(parameter), numpy.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: str, target: str) -> None:
    """Q4_K_M with attn_qkv in Q5_K in every layer, as in Microsoft's file; today's llama.cpp would mix Q4_K and Q6_K."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    parameters.nthread = 1
    overrides = (llama_cpp.llama_model_tensor_override * 2)()
    overrides[0].pattern, overrides[0].type = b"attn_qkv", int(gguf.GGMLQuantizationType.Q5_K)
    overrides[1].pattern = None
    parameters.tt_overrides = overrides
    failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("model")
    arguments.add_argument("gguf")
    arguments.add_argument("--f32", help="keep the unquantized file here")
    options = arguments.parse_args()
    saved = torch.load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        f32 = options.f32 or os.path.join(folder, "f32.gguf")
        write_f32(Config(**saved["config"]), Vocabulary(**saved["vocabulary"]), saved["weights"], f32)
        quantize(f32, options.gguf)
    types = Counter(tensor.tensor_type.name for tensor in gguf.GGUFReader(options.gguf).tensors)
    with open(options.gguf, "rb") as file:
        data = file.read()
    print(f"{options.gguf}: {len(data):,} bytes, {dict(types)}, sha256 {hashlib.sha256(data).hexdigest()}")


if __name__ == "__main__":
    main()
