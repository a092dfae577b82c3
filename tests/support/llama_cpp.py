"""llama.cpp itself, through `xllamacpp`: its server with a Python door, for every system."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xllamacpp
from support.models import our_logits

GREEDY = 20  # tokens
PLAIN = 300  # a token with whole letters in every tokenizer of the tests


def open_server(model: Path, adapter: Path | None = None, exact: bool = True) -> Any:
    """A server that computes with one thread; `exact` keeps keys and values in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_gpu_layers, params.n_ctx, params.n_parallel = 0, 512, 1
    # One thread: more would spin on cores that other work needs.
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup, params.verbosity = False, -1
    if exact:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    return xllamacpp.Server(params)


def ask(server: Any, path: str, **body: Any) -> Any:
    """What the server answers at a path of its own HTTP interface."""
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def llama_cpp(
    base: Path, prompts: list[list[int]], adapter: Path | None = None, top: int = 320
) -> Iterator[dict[int, float]]:
    """Log-probabilities, in nats, of the `top` likeliest next tokens after each prompt."""
    yield from next_tokens(open_server(base, adapter), prompts, top)


def next_tokens(server: Any, prompts: list[list[int]], top: int) -> Iterator[dict[int, float]]:
    """As `llama_cpp`, of a server that is there."""
    # Of a token without text, or with a part of a letter, it tells nothing, so another one is
    # taken; the probabilities are those before that.
    how = {"n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False}
    how["logit_bias"] = [[PLAIN, 1000]]
    for prompt in prompts:
        answer: Any = server.handle_completions({"prompt": prompt, **how})
        likeliest = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        yield {token["id"]: token["logprob"] for token in likeliest}


def ours(model: Any, prompts: list[list[int]]) -> list[np.ndarray]:
    """Log-probabilities (V,), in nats, of the next token after each prompt."""
    logits = [our_logits(model, np.array([p]))[0, -1].astype(np.float64) for p in prompts]
    return [row - row.max() - np.log(np.exp(row - row.max()).sum()) for row in logits]


def differences(theirs: list[dict[int, float]], mine: list[np.ndarray]) -> np.ndarray:
    """(prompts,): the largest difference of a token's log-probability, of those that they list."""
    assert len(theirs) == len(mine)
    return np.array([max(abs(a[i] - b[i]) for i in a) for a, b in zip(theirs, mine)])


def greedy_texts(base: Path, prompts: list[list[int]]) -> Iterator[list[int]]:
    """The token ids of llama.cpp's greedy texts."""
    server = open_server(base, exact=False)
    for prompt in prompts:
        how = {"prompt": prompt, "n_predict": GREEDY, "temperature": 0.0, "n_probs": 1}
        answer: Any = server.handle_completions({**how, "cache_prompt": False})
        yield [token["id"] for token in answer["choices"][0]["logprobs"]["content"]]
