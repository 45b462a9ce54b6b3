"""Names of options: those of later versions, and what other libraries' names are called here."""
# Decisions: docs/design/python.md

from collections.abc import Iterable, Mapping

UNBUILT: Mapping[str, str] = {
    "draft": "draft models",
    "response_format": "structured output",
    "regex": "structured output",
    "grammar": "structured output",
    "choices": "structured output",
    "tools": "tool calls",
    "tool_choice": "tool calls",
    "parallel_tool_calls": "tool calls",
    "raise_tool_errors": "tool calls",
    "reasoning": "reasoning output",
    "max_steps": "tool calls",
    "adapters": "LoRA adapters",
    "adapter": "LoRA adapters",
    "quantize": "conversion",
}
"""Options that a later version has, each with the feature that it belongs to."""

RENAMED: Mapping[str, str] = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_length": "max_tokens",
    "max_len": "max_tokens",
    "max_gen_len": "max_tokens",
    "max_output_tokens": "max_tokens",
    "temp": "temperature",
    "repetition_penalty": "repeat_penalty",
    "stop_sequences": "stop",
    "stop_seqs": "stop",
    "stop_strings": "stop",
    "random_seed": "seed",
    "random_state": "seed",
    "n_probs": "top_logprobs",
    "max_time": "timeout",
    "n_gpu_layers": "device",
    "num_gpu": "device",
    "main_gpu": "device",
    "gpu_layers": "device",
    "device_map": "device",
    "num_ctx": "n_ctx",
    "context_length": "n_ctx",
    "max_model_len": "n_ctx",
    "max_seq_len": "n_ctx",
    "num_thread": "n_threads",
    "type_k": "kv_cache",
    "type_v": "kv_cache",
    "cache": "cache_dir",
    "hf_token": "token",
    "use_auth_token": "token",
    "model_id": "repo_id",
    "json_schema": "response_format",
    "format": "response_format",
    "guided_json": "response_format",
    "response_model": "response_format",
    "output_type": "response_format",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "grammar",
    "functions": "tools",
    "function_call": "tool_choice",
    "think": "reasoning",
    "enable_thinking": "reasoning",
    "reasoning_effort": "reasoning",
    "prompt_lookup_num_tokens": "speculate",
    "assistant_model": "draft",
    "draft_model": "draft",
    "max_num_seqs": "max_batch",
    "enable_prefix_caching": "prefix_cache",
    "cache_prompt": "prefix_cache",
    "lora_path": "adapters",
    "lora_base": "adapters",
    "lora_request": "adapter",
}
"""Names of other libraries' options, each with the option that does the same here."""

FOREIGN: Mapping[str, str] = {
    "messages": "give the messages as the prompt, the first argument",
    "do_sample": "temperature=0 is greedy, any other temperature samples",
    "stream": "use .stream(), which yields the text piece by piece; .generate() returns it whole",
    "streamer": "use .stream(), which yields the text piece by piece",
    "stopping_criteria": "use stop, or leave the loop over .stream()",
    "logits_processor": "use logit_bias; for a sampler of your own, .logits() returns the logits",
    "sampler": "use temperature, top_k, top_p and min_p; for a sampler of your own, .logits() returns the logits",
    "n": "call generate() once per answer, each with a seed of its own",
    "num_return_sequences": "call generate() once per answer, each with a seed of its own",
    "model": "give the path first, Phi(path); one Phi is one model",
    "verbose": 'the library prints nothing; logging.getLogger("candle_phi") has its messages',
    "n_batch": "leave it out, since the engine chooses the size of its steps",
    "batch_size": "leave it out, since the engine chooses the size of its steps",
    "flash_attn": "leave it out, since attention is computed in blocks already",
    "torch_dtype": "leave it out, since weights keep the type that the file has",
    "dtype": "leave it out, since weights keep the type that the file has",
    "use_mmap": "use mmap, an option of Phi()",
    **dict.fromkeys(
        ("min_tokens", "min_new_tokens", "min_length"),
        "there is no least length; ignore_eos=True with max_tokens gives an exact one",
    ),
    **dict.fromkeys(
        ("num_beams", "beam_size", "use_beam_search", "best_of"), "there is no beam search; temperature=0 is greedy"
    ),
    "logits_all": "use .logits(ids, every_position=True)",
    "prompt_logprobs": "use .score(prompt)",
    "prompts": "use .map(prompts)",
    **dict.fromkeys(
        ("use_cache", "n_keep", "num_keep"), "leave it out, a prompt takes what is kept of the same beginning anyway"
    ),
    "cache_salt": "use cache_scope, a name for each tenant",
    **dict.fromkeys(
        ("num_pred_tokens", "speculative_config", "num_assistant_tokens"),
        "leave it out, speculate=True is the default, and the length of a guess follows what was right so far",
    ),
    **dict.fromkeys(("verbosity", "echo"), "leave it out, the result is the answer alone"),
    **dict.fromkeys(("input", "question", "query", "text"), "give the prompt first, by position"),
    **dict.fromkeys(("pad_token_id", "eos_token_id", "bos_token_id"), "leave it out, the model file has it"),
    "stop_token_ids": "use stop, with the tokens' text",
    "detokenize": "leave it out, the result has both, .text and .token_ids",
    "proxies": "set HTTPS_PROXY",
    "vocab_only": "leave it out, a mapped file is read as it is needed",
    "system": 'use a system message: {"role": "system", "content": ...} first in the messages',
}
"""Names of other libraries' options that have no counterpart of one name here, each with what to do instead."""


def not_in_this_version(name: str) -> str:
    """The message for an option of `UNBUILT`."""
    return f"option {name!r} is not in this version ({UNBUILT[name]})"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'max_tokens'?"`, or nothing when no name is close."""
    close = closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar of some names; None when none is close."""
    import difflib  # not at import: only a mistake needs it

    # at the default cutoff, 0.6, "main_gpu" would be close to "min_p"
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=0.7)), None)
