"""Adapters of the tiny models for tests: ours that have moved, PEFT's own, and what both say."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from support.models import load_folder, randomise_lora

from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora
from mlx_qlora.tree import flat, nested

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def adapted(
    base: Path, config: LoraConfig | None = None, seed: int = 1, scale: float = 0.05
) -> Any:
    """Our tiny model with an adapter that does something."""
    model = add_lora(load_folder(base), config or LoraConfig(r=4))
    randomise_lora(model, seed, scale)
    return model


def weights_of(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    return {name: np.array(w) for name, w in flat(model.trainable_parameters()).items()}


def move(model: LlamaForCausalLM, seed: int = 1, by: float = 0.03) -> LlamaForCausalLM:
    """Adds small numbers to all that is trained, the lengths of DoRA among it."""
    draw = np.random.default_rng(seed)
    new = {n: w + by * draw.normal(size=w.shape) for n, w in weights_of(model).items()}
    model.update(nested({name: mx.array(w.astype(np.float32)) for name, w in new.items()}))
    mx.eval(model.trainable_parameters())
    return model


def by_peft(hf: Any, **options: Any) -> Any:
    """A copy of a model with an adapter that PEFT has made."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    torch.manual_seed(3)
    options = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, **options}
    with warnings.catch_warnings():  # of a conversion on saving, which is not asked for
        warnings.filterwarnings("ignore", ".*post-training conversion", UserWarning)
        return get_peft_model(copy.deepcopy(hf), PeftConfig(**options)).eval()


def moved_by_peft(hf: Any, folder: Path, **options: Any) -> Any:
    """An adapter of PEFT's that does something, on its model and saved in a folder."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of patterns that match nothing
        model = by_peft(hf, **options)
    with torch.no_grad():
        for weight in (p for p in model.parameters() if p.requires_grad):
            weight.add_(torch.randn_like(weight) * 0.03)
    model.save_pretrained(folder)
    return model


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Fails on any warning, and on anything that transformers, peft or others log as one."""
    import transformers

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    handler = Collect(logging.WARNING)
    loggers = [logging.getLogger(n) for n in ("", "transformers", "peft", "huggingface_hub")]
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_warning()
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # PEFT's own call, which transformers 5 renames; it comes with every adapter.
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(before)
        for logger in loggers:
            logger.removeHandler(handler)
    assert not said


def largest(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference of two arrays."""
    return float(np.abs(a - b).max())
