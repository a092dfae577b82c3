"""The adapter for tools that read less than PEFT, and for llama.cpp."""

import importlib.util
import zlib
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qlora.adapters.origin import base_hash, original_base
from mlx_qlora.adapters.peft import (
    PREFIX,
    layers_of,
    peft_config,
    uniform_updates,
    write_peft,
)
from mlx_qlora.adapters.push import render
from mlx_qlora.errors import AdapterError, WeightsError, require, visible
from mlx_qlora.folders import ADAPTER_FOLDER, check_writable, staged, user_path
from mlx_qlora.model.gguf import read_header
from mlx_qlora.model.gguf_terms import ARCHITECTURES, gguf_name, permute
from mlx_qlora.model.hub import HUB_ID, ModelFiles
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.lora import LoRALinear
from mlx_qlora.readers import card_text

DTYPES = {"float16": np.float16, "float32": np.float32}
UNKNOWN_BASE = "./base.gguf"

# ---- plain LoRA ----------------------------------------------------------------------------------


def save_portable(
    model: LlamaForCausalLM, folder: str | Path, base_model_name_or_path: str | None = None
) -> Path:
    """Write the adapter as a PEFT folder of uniform rank whose scaling is exactly 1.

    Every reader computes from it what PEFT computes from `save_adapter`'s folder. Continue training
    from that one: here A and B are rescaled.

    Args:
        folder: made if it does not exist; an earlier export in it is replaced as a whole.
        base_model_name_or_path: as in `save_adapter`.

    Raises:
        AdapterError: the model has no LoRA layers or has DoRA's, or nothing says what the base is.
        ConfigError: the folder holds anything but an adapter of ours, or is the current folder.
    """
    _refuse_dora(model, "vLLM and llama.cpp do not support DoRA")
    base = base_model_name_or_path or original_base(model.source)
    folder = user_path(folder)
    check_writable(folder, ADAPTER_FOLDER, whole=True)
    rank, updates = uniform_updates(model, 1.0)
    tensors = {}
    for path, (A, B) in updates.items():
        tensors |= {f"{PREFIX}{path}.lora_A.weight": A, f"{PREFIX}{path}.lora_B.weight": B}
    config = peft_config(model, base) | {"r": rank, "lora_alpha": rank, "use_rslora": False}
    config |= {"rank_pattern": {}, "alpha_pattern": {}}
    if isinstance(config["target_modules"], str):  # a regex; not every reader has Python's
        config["target_modules"] = [*updates]
    with staged(folder.resolve(), replace=True) as staging:  # a link stays one
        write_peft(staging, tensors, config, base_hash(model))
    return folder


def _refuse_dora(model: LlamaForCausalLM, why: str) -> list[tuple[str, LoRALinear]]:
    """The LoRA layers; an AdapterError if they are DoRA's, which says why."""
    layers = layers_of(model)
    if model.lora_config.use_dora:
        raise AdapterError(f"{why}; merge the adapter into its base instead (mlx-qlora merge)")
    return layers


# ---- GGUF ----------------------------------------------------------------------------------------


def save_gguf_adapter(
    model: LlamaForCausalLM,
    file: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    dtype: str = "float16",
    ollama_base: str | None = None,
) -> Path:
    """Write the adapter as a GGUF file, and a `Modelfile` beside it.

    Args:
        file: `*.gguf`; an older adapter of this name is replaced, any other file is not.
        base_model_name_or_path: as in `save_adapter`, for the metadata; it may stay unknown.
        dtype: of the tensors, float16 or float32.
        ollama_base: what the Modelfile begins FROM, a GGUF file or a name in Ollama; by default
            the file that the model was loaded from, if it is a GGUF file.

    Raises:
        AdapterError: the model has no LoRA layers or has DoRA's, a weight is beyond float16, the
            Modelfile says something else or cannot name the base, or the package `gguf` is missing.
        ConfigError: another dtype, or a file would be overwritten that is no adapter.
    """
    require(dtype in DTYPES, "dtype", f"be one of {', '.join(DTYPES)}", dtype)
    require_gguf(model)
    layers = _refuse_dora(model, "llama.cpp does not support DoRA")
    file = user_path(file)
    source: ModelFiles | None = model.source
    base = base_model_name_or_path or (source.hf_id if source else None)
    text = modelfile(file, source, base, ollama_base)
    # The file has one alpha, the first layer's; zero would mean a scale of 1.
    first = layers[0][1]
    alpha = float(np.float32(first.scale * len(first.factors()[0])))
    tensors = _gguf_tensors(layers, alpha, model.config, DTYPES[dtype])
    if file.suffix.lower() != ".gguf":
        raise AdapterError(f"{file} must end in .gguf; choose another name")
    # A base model has the same ending.
    is_ours = lambda old: gguf_field(old, "general.type") == "adapter"  # noqa: E731
    check_writable(file.parent, [file.name], "file", is_ours=is_ours)
    with staged(file.parent) as staging:
        pairs = {"general.type": "adapter", "general.name": file.stem}
        pairs |= {"adapter.type": "lora", "adapter.lora.alpha": alpha}
        infos = [(name, x.shape, x.dtype, x.nbytes, None) for name, x in tensors.items()]
        write_gguf(staging / file.name, model, base, pairs, infos, tensors.values())
        if text is not None:
            (staging / "Modelfile").write_text(text, encoding="utf-8")
    return file


def _gguf_tensors(
    layers: list[tuple[str, LoRALinear]],
    alpha: float,
    config: LlamaConfig,
    dtype: type[np.floating],
) -> dict[str, np.ndarray]:
    """`blk.N.attn_q.weight.lora_a` (r, d_in) and `.lora_b` (d_out, r), in the model's order."""
    tensors = {}
    for path, layer in layers:
        A, B = map(np.array, layer.factors())
        factor = layer.scale * len(A) / alpha
        if not np.isclose(factor, 1, rtol=1e-6, atol=0):
            B = B * np.float32(factor)
        name = gguf_name(f"{path}.weight", config)
        tensors[f"{name}.lora_a"] = A.astype(np.float32)
        tensors[f"{name}.lora_b"] = permute(B, f"{path}.weight", config)
    limit = np.finfo(dtype).max
    for name, array in tensors.items():
        if not np.all(np.abs(array) <= limit):  # NaN is not, either
            raise AdapterError(
                f"{name} has values that are not finite, or too large for {dtype.__name__} "
                f"({limit:g}); if the adapter is sound, write it with dtype='float32'"
            )
    return {name: np.ascontiguousarray(array.astype(dtype)) for name, array in tensors.items()}


def write_gguf(
    file: Path,
    model: LlamaForCausalLM,
    base: str | None,
    pairs: dict[str, Any],
    infos: list[tuple[Any, ...]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Write what llama.cpp's converter writes, tensor by tensor, and read it back.

    `infos` are name, shape, dtype, bytes and GGML's type of each of `arrays`.
    """
    import gguf

    writer = gguf.GGUFWriter(file, ARCHITECTURES[model.config.model_type][0])
    if base is not None:
        organisation, _, title = base.rpartition("/")
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, title)
        if HUB_ID.fullmatch(base):
            writer.add_base_model_organization(0, organisation)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{base}")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array}
    for key, value in pairs.items():
        add[value.__class__](key, value)
    for info in infos:
        writer.add_tensor_info(*info)
    checksums = []
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in arrays:
            writer.write_tensor_data(array)
            checksums.append((array.nbytes, zlib.crc32(array.data)))
    (read, _, start), data = read_header(file), np.memmap(file, np.uint8, "r")
    for (name, *_, offset), (n_bytes, checksum) in zip(read, checksums, strict=True):
        if zlib.crc32(data[start + offset :][:n_bytes].data) != checksum:
            raise WeightsError(f"{file.name}: what was read back of {name} is not what was written")


def require_gguf(model: LlamaForCausalLM) -> None:
    """Raise an AdapterError unless the package is there, and llama.cpp knows the model's family."""
    if (kind := model.config.model_type) not in ARCHITECTURES:
        raise AdapterError(f"no GGUF can be written of model_type {kind!r}; merge the adapter")
    if importlib.util.find_spec("gguf") is None:
        raise AdapterError("a GGUF needs the package gguf; run: pip install 'mlx-qlora[gguf]'")


def gguf_field(file: Path, key: str) -> Any:
    """A value of a GGUF file's metadata; None if it has none, or is no such file."""
    with suppress(WeightsError, OSError):
        return read_header(file)[1].get(key)
    return None


# ---- Ollama --------------------------------------------------------------------------------------


def modelfile(
    file: Path, source: ModelFiles | None, original: str | None, base: str | None = None
) -> str | None:
    """The Ollama Modelfile beside an adapter's `file`; None if one of the user's says all of it.

    It begins FROM a `base`, by default the GGUF file that is the source. TEMPLATE is the base's. An
    AdapterError for one of the user's that says something else, or a name that no line can hold.
    """
    if base is None and source is not None and source.path.suffix.lower() == ".gguf":
        base = str(source.path.absolute())
    for name in filter(None, (base, file.name, original)):
        if visible(name) != name or "\n" in name:
            what = "has characters that no Modelfile can hold"
            raise AdapterError(f"{name!r} {what}; rename it, or export with --gguf-model")
    values = {"base": base, "file": file.name, "original": original, "unknown": UNKNOWN_BASE}
    text = render("adapters/Modelfile.adapter.jinja", **values)
    return None if keeps_modelfile(file.parent / "Modelfile", text) else text


def keeps_modelfile(path: Path, text: str) -> bool:
    """Whether a Modelfile of the user's already says all that `text` does; if not, refuse it."""
    if not path.exists():
        return False
    present = set(card_text(path).splitlines())
    needed = [line for line in text.splitlines() if line and not line.startswith("#")]
    if set(needed) - {f"FROM {UNKNOWN_BASE}"} <= present:
        return True
    raise AdapterError(
        f"{path} exists, without these lines: {', '.join(needed)}; add them, move the file away, "
        "or choose another folder"
    )
