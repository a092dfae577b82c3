"""A whole model, its adapter folded in, as one GGUF file: for llama.cpp, Ollama and LM Studio."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import __version__
from mlx_qlora.adapters.calibration import Calibrated
from mlx_qlora.adapters.drift import Drift
from mlx_qlora.adapters.export import gguf_field, keeps_modelfile, require_gguf, write_gguf
from mlx_qlora.adapters.merge import Tensors, check_disk, same_value, shapes_of
from mlx_qlora.adapters.requantize import Grid, Rounded
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.gguf_tokenizer import gguf_tokenizer
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import (
    AdapterError,
    ConfigError,
    TokenizerError,
    WeightsError,
    listing,
    require,
    waiting,
)
from mlx_qlora.folders import check_writable, staged, user_path
from mlx_qlora.model.families import LlamaConfig
from mlx_qlora.model.gguf_terms import (
    ARCHITECTURES,
    FACTORS,
    as_llama_cpp_says,
    config_of,
    gguf_name,
    pairs_of,
    permute,
)
from mlx_qlora.model.hub import HUB_ID
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import lora_layers
from mlx_qlora.progress import each
from mlx_qlora.readers import card_text, json_value

TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "bf16", "f16", "f32")  # those that we write
K_QUANTS = ("q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "q3_k_m", "q2_k")
QUANTIZE = "llama-quantize"  # llama.cpp's program, which makes these of a 16-bit file
ROWS = 4096  # of a matrix that are quantised at a time
OURS = "general.quantized_by"
MADE_BY = "# By mlx-qlora. Use: ollama create NAME -f Modelfile"


@dataclass(frozen=True)
class GgufModel:
    """What an export left on disk."""

    file: Path
    bytes: int
    command: str | None = None  # that makes the K-quant which was asked for, where we could not
    drift: Drift | None = None  # what rounding changed; None if that was not measured


def save_gguf_model(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    folder: str | Path,
    base_model_name_or_path: str | None = None,
    *,
    type: str = "q8_0",
    rows: tuple[Examples, Examples | None] | None = None,
) -> GgufModel:
    """Write a model, with its adapter folded in if it has one, as `model-TYPE.gguf`.

    The file holds the tokenizer and its chat template; a `Modelfile` for Ollama is beside it. An
    older file of this name is replaced. The model keeps its LoRA layers.

    Args:
        tokenizer: the model's, which must have a `tokenizer.json` or come from a GGUF file.
        base_model_name_or_path: as in `save_adapter`, for the metadata.
        type: of the matrices: q8_0, q5_1, q5_0, q4_1, q4_0, bf16, f16 or f32, where those of 4
            and 5 bits keep embedding and head in q8_0; or a K-quant such as q4_k_m, which
            llama.cpp's `llama-quantize` makes. Where that is not on the PATH, the file is in
            bf16, and `command` says how to go on.
        rows: as in `save_merged`, for the types of 8 bits and fewer.

    Raises:
        WeightsError: llama.cpp would compute another model, or a number is beyond f16.
        TokenizerError: llama.cpp has no name for what the tokenizer does.
        AdapterError: the `gguf` package is missing, `llama-quantize` fails, or there is a
            Modelfile of the user's that says something else.
        ConfigError: another type, too little disk, or a file would be overwritten that is not ours.
    """
    check_type(type)
    require_gguf(model)
    from gguf import LlamaFileType as kinds

    folder, written = user_path(folder), type if type in TYPES else "bf16"
    quantizer = shutil.which(QUANTIZE) if written != type else None
    file = folder / f"model-{type if quantizer else written}.gguf"
    check_writable(folder, [file.name], is_ours=is_ours)
    base = base_model_name_or_path or (model.source.hf_id if model.source else None)
    tensors = _layout(model, written)
    pairs = gguf_tokenizer(tokenizer, model.config.vocab_size)
    of_model, factors = _checked_pairs(model.config, pairs, [tensor.name for tensor in tensors])
    text = modelfile_of_model(file.name, tokenizer)
    modelfile = folder / "Modelfile"
    is_old = card_text(modelfile).startswith(MADE_BY)
    keeps = not is_old and keeps_modelfile(modelfile, text)
    check_disk(folder.absolute(), sum(tensor.nbytes for tensor in tensors))
    with staged(folder) as staging:
        plain = staging / f"model-{written}.gguf"
        calibrated = None
        if rows is not None and written in TYPES[:5] and lora_layers(model):
            calibrated = _calibrated(model, tensors, rows)
        infos = [(f"{n}.weight", x.shape, x.dtype, x.nbytes, None) for n, x in factors.items()]
        infos += [(x.name, x.shape, x.dtype, x.nbytes, x.kind) for x in tensors]
        arrays = chain(factors.values(), _arrays(model, tensors, calibrated))
        type_of_most = kinds.ALL_F32 if written == "f32" else kinds[f"MOSTLY_{written.upper()}"]
        pairs |= {OURS: f"mlx-qlora {__version__}", "general.file_type": int(type_of_most)}
        # Some readers look for a family's name in it.
        name = (base or "").rpartition("/")[2] or plain.stem
        pairs |= of_model | {"general.type": "model", "general.name": name}
        write_gguf(plain, model, base, pairs, infos, arrays)
        drift = calibrated.verdict(written) if calibrated else None
        if quantizer:
            _run([quantizer, plain.name, file.name, type.upper()], staging)
            plain.unlink()
        if not keeps:
            (staging / "Modelfile").write_text(text, encoding="utf-8")
    goal = folder / f"model-{type}.gguf"
    command = shlex.join([QUANTIZE, str(file), str(goal), type.upper()]) if file != goal else None
    return GgufModel(file, file.stat().st_size, command, drift)


def check_type(type: str) -> None:
    """Raise a ConfigError unless it is one of the types that a file can have."""
    require(type in TYPES + K_QUANTS, "type", f"be one of {', '.join(TYPES + K_QUANTS)}", type)


def is_ours(file: Path) -> bool:
    """Whether a GGUF file is one that we have written."""
    return str(gguf_field(file, OURS)).startswith("mlx-qlora ")


# ---- what the file will say ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Tensor:
    name: str  # llama.cpp's
    weight: str  # ours
    shape: tuple[int, ...]  # in the file: of a packed matrix (rows, bytes of a row)
    kind: Any  # of gguf.GGMLQuantizationType
    nbytes: int
    dtype: Any  # of its arrays; of packed ones bytes


def _layout(model: LlamaForCausalLM, type: str) -> list[_Tensor]:
    """Every tensor of the file in the model's order. Vectors are in float32."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import quant_shape_to_byte_shape

    kinds, tensors = GGMLQuantizationType, []
    for weight, shape in shapes_of(model).items():
        kind = kinds[type.upper()] if len(shape) == 2 else kinds.F32
        if type[:2] in ("q4", "q5") and weight.startswith(("model.embed_tokens", "lm_head")):
            kind = kinds.Q8_0 if len(shape) == 2 else kind  # what is lost there is lost everywhere
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = kinds.F16  # whole groups of 32 columns are packed
        in_bytes = quant_shape_to_byte_shape(shape, kind)
        packed = kind not in (kinds.F32, kinds.F16)
        name = gguf_name(weight, model.config)
        n = int(np.prod(in_bytes, dtype=np.int64))
        dtype = np.dtype(np.uint8 if packed else np.float32)
        tensors.append(_Tensor(name, weight, in_bytes if packed else shape, kind, n, dtype))
    return tensors


def _checked_pairs(
    config: LlamaConfig, pairs: dict[str, Any], names: list[str]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The file's pairs about the model, and RoPE's factors; read again, they are the model."""
    said, architecture = as_llama_cpp_says(config), ARCHITECTURES[config.model_type][0]
    own, factors = pairs_of(said)
    of_model = {f"{architecture}.{key}": value for key, value in own.items() if value is not None}
    arrays: dict[str, Any] = dict.fromkeys(FACTORS)
    arrays |= {name: mx.array(array) for name, array in factors.items()}
    metadata = {"general.architecture": architecture, **pairs, **of_model}
    try:
        read = LlamaConfig.from_hf(config_of(Path("model.gguf"), metadata, names, arrays))
    except WeightsError as error:
        raise WeightsError(f"llama.cpp cannot compute this model: {error}") from None
    problems = [
        f"{field} = {value!r}; it would compute with {getattr(read, field)!r}"
        for field, value in vars(said).items()
        if field != "model_type" and not same_value(getattr(read, field), value)
    ]
    if problems:
        raise WeightsError(
            f"a GGUF file of llama.cpp's architecture {architecture!r} cannot describe this "
            f"model; merge the adapter instead (mlx-qlora merge):\n{listing(problems)}"
        )
    return of_model, factors


# ---- the file ------------------------------------------------------------------------------------


def _arrays(
    model: LlamaForCausalLM, tensors: list[_Tensor], calibrated: Calibrated | None
) -> Iterator[np.ndarray]:
    """The tensors as they are in the file, from one dense matrix at a time."""
    from gguf import GGMLQuantizationType

    merged = Tensors(dict(model.named_modules()), None, None, mx.float32)
    for tensor in each(tensors, "writing", "weights"):
        mx.clear_cache()
        path = tensor.weight.removesuffix(".weight")
        if calibrated is not None and path.startswith("model.layers.") and tensor.kind in LEVELS:
            yield permute(blocks(calibrated[path], tensor.kind), tensor.weight, model.config)
            continue
        array = np.array(merged.make(tensor.weight)[0], copy=False)
        if tensor.weight.endswith("norm.weight"):
            array = array + np.float32(model.config.norm_offset)
        array = permute(array, tensor.weight, model.config)
        if tensor.kind == GGMLQuantizationType.F16 and np.abs(array).max() > np.finfo("f2").max:
            raise WeightsError(f"{tensor.weight} is too large for f16; choose the type bf16")
        yield _quantized(array, tensor.kind)


def _quantized(array: np.ndarray, kind: Any) -> np.ndarray:
    from gguf.quants import quantize

    parts = [quantize(array[i : i + ROWS], kind) for i in range(0, len(array), ROWS)]
    return np.concatenate(parts)


# ---- rounding by rows ----------------------------------------------------------------------------

# ggml's number of a type -> its levels; two types add a number of each group's own.
LEVELS = {2: (-8, 7), 3: (0, 15), 6: (-16, 15), 7: (0, 31), 8: (-127, 127)}
OFFSET = (3, 7)


def _calibrated(
    model: LlamaForCausalLM, tensors: list[_Tensor], rows: tuple[Examples, Examples | None]
) -> Calibrated:
    from gguf.quants import dequantize

    merged = Tensors(dict(model.named_modules()), None, None, mx.float32)
    kinds = {tensor.weight.removesuffix(".weight"): tensor.kind for tensor in tensors}

    def grid(path: str) -> Grid | None:
        if kinds[path] not in LEVELS:
            return None
        first, last = LEVELS[kinds[path]]
        levels = np.arange(first, last + 1, dtype=np.float32)
        return Grid(levels, 32, kinds[path] in OFFSET, lambda x: x.astype("f2").astype("f4"))

    def plain(path: str, W: mx.array) -> mx.array:
        return mx.array(dequantize(_quantized(np.array(W), kinds[path]), kinds[path]))

    return Calibrated(model, merged.matrix, grid, plain, rows)


def blocks(rounded: Rounded, kind: Any) -> np.ndarray:
    """A matrix as ggml stores it, (n, bytes of a row) uint8: exactly these numbers.

    A block is scale, offset, the fifth bits, and codes: of 32 weights the last 16 above the others.
    """
    codes = rounded.codes.T.reshape(-1, len(rounded.scales), 32)
    numbers = [rounded.scales, rounded.offsets] if kind in OFFSET else [rounded.scales]
    parts: list[Any] = [x.T.astype("<f2")[..., None].view(np.uint8) for x in numbers]
    if kind == 8:  # signed
        parts.append(codes - np.uint8(127))
    else:
        if kind in (6, 7):
            parts.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        low = codes & 15
        parts.append(low[..., :16] | low[..., 16:] << 4)
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


# Ends a program when standard input does, which the death of the process that asks for it closes.
WATCHED = 'exec 3<&0; "$@" </dev/null & child=$!; (read _ <&3; kill $child) & '
WATCHED += "wait $child; code=$?; kill $!; exit $code"


def _run(command: list[str], folder: Path) -> None:
    """Run a program in a folder; an AdapterError with its last words if it fails."""
    end, ours = os.pipe()
    try:
        with waiting(Path(command[0]).name):
            words = ["sh", "-c", WATCHED, "sh", *command]
            kept = {"capture_output": True, "text": True, "errors": "replace"}
            done = subprocess.run(words, cwd=folder, stdin=end, **kept)
    finally:
        os.close(end)
        os.close(ours)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines()
        what = f"{Path(command[0]).name} failed ({done.returncode}): {' '.join(words[-1:])}"
        raise AdapterError(f"{what}; the command was {shlex.join(command)} in {folder}")


# ---- Ollama and LM Studio ------------------------------------------------------------------------


def modelfile_of_model(file: str, tokenizer: Tokenizer) -> str:
    """The text of an Ollama Modelfile: the template if Go can say it, and what ends an answer.

    Without a TEMPLATE Ollama takes the one of its own that is most like the file's chat template,
    which may lack a few words, such as a default system prompt, or reads the file's own.
    """
    lines = [MADE_BY, f"FROM ./{file}"]
    if (template := go_template(tokenizer)) is not None:
        lines.append(f'TEMPLATE """{template}"""')
    ends = (text for text in tokenizer.end_texts if '"' not in text and "\n" not in text)
    return "\n".join([*lines, *(f'PARAMETER stop "{text}"' for text in ends), ""])


def go_template(tokenizer: Tokenizer) -> str | None:
    """A chat template as Ollama's Go template; None if it does more than put words around texts.

    What is around the texts is read off chats that the tokenizer writes, and a longer chat must
    come out the same. Spaces around a text may be cut by the one and not by the other.
    """

    def between(*texts: str) -> list[str]:
        roles = ["system"] * texts[0].startswith("sys") + ["user", "assistant"] * len(texts)
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts)]
        rest, parts = tokenizer.render_chat(chat, add_generation_prompt=True), []
        for text in texts:
            part, here, rest = rest.partition(text)
            parts.append(part if here else "{{")
        return [*parts, rest]

    try:
        start, _ = between("usr1")
        opened, closed, _ = between("sys0", "usr1")
        _, answer, turn, ask = between("usr1", "ans1", "usr2")
        longer = between("sys0", "usr1", "ans1", "usr2", "ans2", "usr3")
    except TokenizerError:
        return None
    source = tokenizer.chat_template or ""
    same = longer == [opened, closed, answer, turn, answer, turn, ask]
    if not same or "strftime_now" in source:  # a date that would stay today's
        return None
    bos = tokenizer.special_tokens.get("bos_token", "") if tokenizer.adds_bos else ""
    start, opened = start.removeprefix(bos), opened.removeprefix(bos)
    after = ask
    if answer != ask:  # of the last message, and of those that an answer follows
        after = (
            f"{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{ask}{{{{ else }}}}{answer}{{{{ end }}}}"
        )
    words = [start, opened, closed, turn, ask, answer]
    if any("{{" in word or '"""' in word for word in words):
        return None
    return (
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "system" }}'
        f"{opened}{{{{ .Content }}}}{closed}{{{{ else }}}}"
        f"{{{{ if eq $i 0 }}}}{start}{{{{ end }}}}{{{{ .Content }}}}"
        f'{{{{ if eq .Role "assistant" }}}}{turn}{{{{ else }}}}{after}'
        "{{ end }}{{ end }}{{ end }}"
    )


def find_ollama() -> str:
    """The path of Ollama's program; a ConfigError if it is not installed."""
    if (program := shutil.which("ollama")) is None:
        raise ConfigError(
            "--ollama: the program ollama is not on the PATH; install it (https://ollama.com), "
            "or leave --ollama out, and run `ollama create NAME -f Modelfile` later"
        )
    return program


def create_in_ollama(folder: Path, name: str) -> None:
    """Give Ollama the model whose Modelfile is in a folder, under a name."""
    _run([find_ollama(), "create", name, "-f", "Modelfile"], folder)


def lm_studio_folder(name: str) -> Path:
    """The folder in which LM Studio looks for the model `PUBLISHER/MODEL`."""
    if not HUB_ID.fullmatch(name):
        raise ConfigError(f"--lmstudio must name PUBLISHER/MODEL; got {name!r}")
    home, pointer = Path.home() / ".lmstudio", Path.home() / ".lmstudio-home-pointer"
    home = Path(card_text(pointer).strip() or home)
    models = json_value(home / "settings.json", "downloadsFolder")
    return (Path(models) if isinstance(models, str) else home / "models") / name
