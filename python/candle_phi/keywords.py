"""Keyword arguments that several functions take, as type checkers and completion see them."""

import os
from collections.abc import Iterable, Mapping
from typing import TypedDict

from .messages import Prediction
from .options import Device, Engine, KvCache
from .progress import OnProgress


class ModelOptions(TypedDict, total=False):
    """The options of `Phi`, which `Phi.demo` and `Phi.from_pretrained` take too."""

    n_ctx: int | None
    n_threads: int | None
    device: Device
    engine: Engine
    kernel: str | None
    kv_cache: KvCache
    mmap: bool
    tokenizer: str | os.PathLike[str] | None
    chat_template: str | None
    max_concurrent: int | None
    max_batch: int
    prefix_cache: int | None
    prefix_cache_dir: str | os.PathLike[str] | None
    speculate: bool
    on_progress: OnProgress | None


class SharedOptions(TypedDict, total=False):
    """The options of `Phi.stream` that `Phi.map`, `amap` and chats take too."""

    max_tokens: int | None
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repeat_penalty: float | None
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | Mapping[str, float] | None
    seed: int | None
    stop: str | Iterable[str] | None
    ignore_eos: bool
    logprobs: bool
    top_logprobs: int
    timeout: float | None
    cache_scope: str | None
    speculate: bool | None
    prediction: Prediction | None


class GenerationOptions(SharedOptions, total=False):
    """The options of `Phi.stream` that `Phi.map` and `amap` take too."""

    raw: bool
    parse_special: bool | None
    add_bos: bool


class ChatOptions(SharedOptions, total=False):
    """The options of a chat and of its calls, without `exact`."""

    on_progress: OnProgress | None
