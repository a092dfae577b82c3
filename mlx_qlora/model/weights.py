"""Files -> a frozen model, one tensor at a time.

Everything that can be wrong with the files is found from their headers first, and reported at
once. Then each tensor is read, cast or quantised, and put in its place before the next is read,
so the peak is the finished model plus one tensor, not the whole dense checkpoint.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.device import free_at_once, frozen_matmul, this_machine
from mlx_qlora.errors import ConfigError, SourceError, StreamedWarning, WeightsError, listing, size
from mlx_qlora.model.families import LAYERS
from mlx_qlora.model.gguf import BITS, GgufMatrix, read_gguf, source_repository
from mlx_qlora.model.hub import ModelFiles, check_readable, explain, hub_errors, weight_files
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.model.quantize import FLOAT_MODES, PARTS, FrozenMatrix, QuantConfig, cast
from mlx_qlora.model.stored import StoredMatrix, StoredTensor, check_finite, tensors_in
from mlx_qlora.model.streaming import LayerReader, PackedCopy
from mlx_qlora.progress import doing, each
from mlx_qlora.readers import read_object, reading
from mlx_qlora.tree import flat

# ---- from files to a frozen model ----------------------------------------------------------------

FLOATS = ("F32", "F16", "BF16")
REMEDIES = {"F8": "use the original 16-bit repository", "F64": "save the model in bfloat16"}
REQUESTS = 8  # at once; the largest models have hundreds of files on the hub
# Old Llama 2 checkpoints store a buffer that every reader computes itself.
HEAD = "lm_head."
IGNORED_ENDING = "rotary_emb.inv_freq"


@dataclass
class Checkpoint:
    """A model's files, opened: what they hold is known, but no tensor is in its place.

    Tensors are not read until they are used (`as_array`). Without them, as the weights were left on
    the hub, it is enough for a plan.
    """

    files: ModelFiles
    config: dict[str, Any]  # a Hugging Face `config.json`
    found: dict[str, StoredTensor]  # by tensor name
    packing: dict[str, QuantConfig]  # by the path of each matrix that the files hold quantised
    tensors: dict[str, Any]  # by name: a `StoredTensor`; of a GGUF a `GgufMatrix`, or an array
    metadata: dict[str, Any] | None = None  # a GGUF's key-value pairs, its tokenizer among them


def open_checkpoint(files: ModelFiles) -> Checkpoint:
    """Open a folder of safetensors or a GGUF file; a WeightsError if they cannot be read."""
    with reading(files.path, WeightsError):
        return _open(files)


def _open(files: ModelFiles) -> Checkpoint:
    if files.path.is_file():
        config, tensors, metadata = read_gguf(files.path)
        found = {n: StoredTensor(files.path, 0, x.shape, "F16") for n, x in tensors.items()}
        files = replace(files, hf_id=files.hf_id or source_repository(metadata))
        return Checkpoint(files, config, found, _packing_in_gguf(tensors), tensors, metadata)
    config = _read_config(files.path)
    if files.left_on_hub:
        found = _headers_on_hub(files)
        _check_layers(files, config, found)
        return Checkpoint(files, config, found, _packing_in_config(config, found), {})
    found = _read_headers(weight_files(files.path))
    _check_layers(files, config, found)
    packing = _packing_in_config(config, found)
    return Checkpoint(files, config, found, packing, dict(found))


def load_model(
    checkpoint: Checkpoint,
    quantize: QuantConfig | None,
    dtype: mx.Dtype,
    matmul: str = "auto",
    residency: str = "resident",
) -> LlamaForCausalLM:
    """Build a frozen model and move a checkpoint's tensors into it, which uses the checkpoint up.

    Args:
        quantize: packs every matrix that the files hold dense, embedding and head included, as
            MLX's converters do; matrices that are packed already stay as they are.
        dtype: of everything that is not packed, and of the scales of what is.
        matmul: how packed matrices will be multiplied; see `mlx_qlora.device`.
        residency: resident, or streamed: the matrices stay in their files, or in a packed copy of
            them that is made once. auto streams what would fill the memory by itself.

    Raises:
        WeightsError: an unsupported architecture, or tensors that do not fit it.
        ConfigError: `quantize` does not divide a matrix's columns; a packed copy is needed and
            cannot be written; a dense copy in memory is asked for of streamed weights.
    """
    model = LlamaForCausalLM(LlamaConfig.from_hf(checkpoint.config))
    model.hf_config = checkpoint.config
    model.source = checkpoint.files
    model.quantized_to = quantize
    _check_tensors(model, checkpoint, quantize)
    if model.config.tie_word_embeddings:
        _check_head(checkpoint)
    n_bytes, here = frozen_bytes(model, checkpoint, quantize, dtype.size), this_machine()
    is_large = n_bytes > here.device.memory_share * here.working_set_bytes
    streams = residency == "streamed" or (residency == "auto" and is_large)
    dense_bytes = dtype.size * packed_size(model, checkpoint, quantize)
    strategy = frozen_matmul(matmul, dense_bytes, here, streams)
    for path, matrix in _matrices(model).items():
        packing = checkpoint.packing.get(path)
        matrix.quant, matrix.matmul, matrix.dtype = packing, strategy, dtype
    if streams:
        _stream(model, checkpoint, quantize, dtype, n_bytes)
    else:
        _place(model, checkpoint, quantize, dtype)
    model.freeze()
    if strategy == "resident":
        for matrix in each([*_matrices(model).values()], "dequantising", "matrices"):
            matrix.make_resident()
    return model


def _place(
    model: LlamaForCausalLM,
    checkpoint: Checkpoint,
    quantize: QuantConfig | None,
    dtype: mx.Dtype,
    matrices_too: bool = True,
    then: Callable[[str, FrozenMatrix], None] = lambda path, matrix: None,
) -> None:
    """Move a checkpoint's tensors into a model, or all but those of matrices.

    `then` is called with each matrix, and its path, when a tensor of it is in its place.
    """
    packing, modules, matrices = checkpoint.packing, dict(model.named_modules()), _matrices(model)
    what = "quantising" if quantize and not packing and matrices_too else "loading"
    with doing(what, len(checkpoint.tensors), "tensors") as task:
        for name in list(checkpoint.tensors):
            path, _, leaf = name.rpartition(".")
            array = checkpoint.tensors.pop(name)  # or what was read of the file would stay
            info = checkpoint.found[name]
            task.advance()
            is_matrix = path in matrices and leaf in PARTS
            if path not in modules or (is_matrix and not matrices_too):
                continue
            is_gguf = isinstance(array, GgufMatrix)
            if is_gguf and (path in packing or (quantize and array.is_packed)):
                (weight, *groups), quant = array.pack()
                check_finite(name, info.path, *groups)
                matrices[path].put((weight, *groups), quant)
            elif is_matrix and leaf == "weight" and path not in packing and quantize:
                dense = as_array(array)
                check_finite(name, info.path, dense)
                matrices[path].pack(dense, quantize)
                del dense
            else:
                modules[path][leaf] = cast(as_array(array), dtype)
                check_finite(name, info.path, modules[path][leaf])
            del array
            if is_matrix:
                then(path, matrices[path])


def _stream(
    model: LlamaForCausalLM,
    checkpoint: Checkpoint,
    quantize: QuantConfig | None,
    dtype: mx.Dtype,
    n_bytes: int,
) -> None:
    """Leave the matrices in their files, or in a packed copy of `n_bytes`, which may be made."""
    free_at_once()
    files, matrices = checkpoint.files, _matrices(model)
    packing, stored = checkpoint.packing, checkpoint.found
    if files.path.is_dir() and (quantize is None or packing.keys() >= matrices.keys()):
        _place(model, checkpoint, quantize, dtype, matrices_too=False)
    else:
        copy = PackedCopy(files, quantize, dtype)
        with copy.there(n_bytes) as is_missing:
            if is_missing:
                warnings.warn(
                    f"the weights of {files.source} are packed once, and streamed from the copy: "
                    f"{size(n_bytes)} in {copy.folder}; mlx-qlora cache lists and clears such "
                    "copies",
                    StreamedWarning,
                    stacklevel=3,
                )
            for matrix in matrices.values():  # zeros, which a part of one would be written with
                matrix.drop()
            _place(model, checkpoint, quantize, dtype, is_missing, copy.take)
        packing, stored = copy.packing, _read_headers(copy.files)
    for path, matrix in matrices.items():
        matrix.quant = packing.get(path)
        names = {part: f"{path}.{part}" for part in PARTS}
        parts = {part: stored[name] for part, name in names.items() if name in stored}
        matrix.stream_from(StoredMatrix(parts))
    model.model.reader = LayerReader(model.layers)


def as_array(tensor: Any) -> mx.array:
    """A tensor of a checkpoint as an array, read if need be; a GGUF's matrix dense in float32."""
    if isinstance(tensor, StoredTensor):
        # By numbers: unlike one that is streamed, whoever loads it looks for what is not finite.
        array = tensor.read(np.arange(tensor.shape[0]))
        return array.view(mx.bfloat16) if tensor.kind == "BF16" else array
    return mx.array(tensor.dense()) if isinstance(tensor, GgufMatrix) else tensor


def frozen_bytes(
    model: LlamaForCausalLM,
    checkpoint: Checkpoint,
    quantize: QuantConfig | None,
    itemsize: int,
    streamed: bool = False,
) -> int:
    """Bytes of the frozen matrices in memory, with `itemsize` bytes of each dense number.

    Streamed, those of two layers. The model needs no weights.
    """
    total = 0
    for path, matrix in _matrices(model).items():
        if streamed and not path.startswith(("model.layers.0.", "model.layers.1.")):
            continue
        quant, n = checkpoint.packing.get(path) or quantize, matrix.weight.size
        if quant is None:
            total += n * itemsize
            continue
        scale_bytes = 2 * itemsize if quant.mode == "affine" else 1
        total += n * quant.bits // 8 + n // quant.group_size * scale_bytes
    return total


def packed_size(
    model: LlamaForCausalLM, checkpoint: Checkpoint, quantize: QuantConfig | None
) -> int:
    """Numbers in all matrices that are packed in the files, or will be while they are loaded."""
    matrices = _matrices(model).items()
    packed = [m for path, m in matrices if checkpoint.packing.get(path) or quantize]
    return sum(matrix.weight.size for matrix in packed)


# ---- what the files hold -------------------------------------------------------------------------


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    check_readable(path, WeightsError)
    config = read_object(path, WeightsError)
    for name in ("quantization", "quantization_config"):
        if not isinstance(config.get(name), dict | None):
            raise WeightsError(f"{path}: {name} must be an object; got {config[name]!r}")
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and "quantization" not in config:
        raise WeightsError(
            f"{path}: weights quantised by {method!r} cannot be read; use the original 16-bit "
            "repository, to be quantised while it is loaded, or one in MLX's format"
        )
    return config


def _read_headers(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """What safetensors files hold, by name; checks that each is as long as it says."""
    return _as_one_model(x for file in files for x in tensors_in(file, WeightsError).items())


def _as_one_model(tensors: Iterable[tuple[str, StoredTensor]]) -> dict[str, StoredTensor]:
    """Tensors by name, each of one file alone, and of a type that MLX opens."""
    found: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, info in tensors:
        if (other := found.setdefault(name, info)) is not info:
            raise WeightsError(
                f"{info.path.parent}: {name} is in {other.path.name} and in {info.path.name}; keep "
                "the files of one copy of the model there, and move the others away"
            )
        if remedy := REMEDIES.get(info.kind.partition("_")[0]):
            problems.append(f"{name} in {info.path.name} has dtype {info.kind}; {remedy}")
    if problems:
        raise WeightsError(f"the weights cannot be read:\n{listing(problems)}")
    return found


def _check_layers(
    files: ModelFiles, config: dict[str, Any], found: dict[str, StoredTensor]
) -> None:
    """Compare the number of layers before anybody builds as many."""
    held = {name.split(".", 3)[2] for name in found if re.match(r"model\.layers\.\d+\.", name)}
    said = config.get(LAYERS)
    if isinstance(said, int) and held and said > len(held):
        raise WeightsError(
            f"{files.path} does not hold this model: config.json says {said:,} layers, and its "
            f"files hold {len(held):,}"
        )


def _headers_on_hub(files: ModelFiles) -> dict[str, StoredTensor]:
    """Name -> header entry of the files that were left on the hub."""
    from huggingface_hub import HfApi, errors

    api, repo = HfApi(), {"repo_id": files.source, "revision": files.revision}

    def header(shard: str) -> dict[str, Any]:
        return api.parse_safetensors_file_metadata(filename=shard, **repo).tensors

    try:
        with ThreadPoolExecutor(REQUESTS) as pool:
            headers = dict(zip(files.left_on_hub, pool.map(header, files.left_on_hub)))
    except errors.SafetensorsParsingError as error:
        raise WeightsError(f"{files.source} on the hub is damaged: {error}") from None
    except hub_errors() as error:
        raise SourceError(explain(error, files.source, files.revision)) from error
    return _as_one_model(
        (name, StoredTensor(files.path / shard, 0, tuple(entry.shape), entry.dtype))
        for shard, entries in headers.items()
        for name, entry in entries.items()
    )


def _packing_in_config(
    config: dict[str, Any], found: dict[str, StoredTensor]
) -> dict[str, QuantConfig]:
    """Matrix path -> how the file packs it; what `quantization` leaves out is its mode's own."""
    entry = config.get("quantization") or config.get("quantization_config") or {}
    packing = {}
    for name in found:
        if name.endswith(".scales"):
            path = name.removesuffix(".scales")
            try:
                override = entry.get(path)
                chosen = override if isinstance(override, dict) else entry
                stated = {k: v for k, v in chosen.items() if not isinstance(v, dict | bool | None)}
                stated.pop("quant_method", None)
                bits, size = FLOAT_MODES.get(str(stated.get("mode")), (4, 64))
                packing[path] = QuantConfig(**{"bits": bits, "group_size": size, **stated})
            except (TypeError, ConfigError) as error:
                raise WeightsError(
                    f"config.json: `quantization` does not say how {path} is quantised: {error}"
                ) from None
    return packing


def _packing_in_gguf(tensors: dict[str, Any]) -> dict[str, QuantConfig]:
    """Matrix path -> how the file packs it, if MLX has all of its types."""
    matrices = ((n, x) for n, x in tensors.items() if isinstance(x, GgufMatrix))
    packed = {n.removesuffix(".weight"): x.kind for n, x in matrices if x.is_packed and x.is_mlx}
    return {path: QuantConfig(BITS[kind], 32) for path, kind in packed.items()}


def _check_tensors(
    model: LlamaForCausalLM, checkpoint: Checkpoint, quantize: QuantConfig | None
) -> None:
    """Compare names, shapes and dtypes with the model's; all differences are one error."""
    found, packing = checkpoint.found, checkpoint.packing
    expected = _expected(model, {} if checkpoint.metadata else packing)  # a GGUF's are by shape
    problems = [f"{name} is missing" for name in expected if name not in found]
    for name, info in found.items():
        where = f"{name} in {info.path.name}"
        if name not in expected:
            tied = name.startswith(HEAD) and model.config.tie_word_embeddings
            if not tied and not name.endswith(IGNORED_ENDING):
                problems.append(f"{where} belongs to no module of this architecture")
            continue
        shape, dtypes = expected[name]
        if info.shape != shape:
            problems.append(f"{where} has shape {info.shape}; config.json asks for {shape}")
        elif info.kind not in dtypes:
            problems.append(f"{where} has dtype {info.kind}; supported: {', '.join(dtypes)}")
    if problems:
        raise WeightsError(
            f"{checkpoint.files.path} does not hold this model:\n{listing(problems)}"
        )
    if quantize is not None:
        for path, matrix in _matrices(model).items():
            if path not in packing and not quantize.fits(matrix.shape):
                raise ConfigError(
                    f"group_size {quantize.group_size} does not divide the {matrix.shape[1]} "
                    f"columns of {path}; choose a smaller group_size"
                )


def _check_head(checkpoint: Checkpoint) -> None:
    """Refuse a head beside the embedding that it is tied to, unless both are the same."""
    tensors = checkpoint.tensors
    for name in [name for name in tensors if name.startswith(HEAD)]:
        embedding = tensors.get(name.replace(HEAD, "model.embed_tokens."))
        if embedding is None or not mx.array_equal(as_array(tensors[name]), as_array(embedding)):
            raise WeightsError(
                f"{name} in {checkpoint.found[name].path} differs from the embedding, though tied "
                "to it; set tie_word_embeddings to false in config.json, or remove the tensor"
            )


def _expected(
    model: LlamaForCausalLM, packing: dict[str, QuantConfig]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Tensor name -> its shape, and the dtypes that it may have."""
    expected: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for name, array in flat(model.parameters()).items():
        path, _, leaf = name.rpartition(".")
        quant = packing.get(path)
        if quant is None or leaf == "bias":
            expected[name] = tuple(array.shape), FLOATS
            continue
        rows, columns = array.shape
        groups = rows, columns // quant.group_size
        expected[name] = (rows, columns * quant.bits // 32), ("U32",)
        expected[f"{path}.scales"] = groups, FLOATS if quant.mode == "affine" else ("U8",)
        if quant.mode == "affine":
            expected[f"{path}.biases"] = groups, FLOATS
    return expected


def _matrices(model: nn.Module) -> dict[str, FrozenMatrix]:
    return {path: m for path, m in model.named_modules() if isinstance(m, FrozenMatrix)}
