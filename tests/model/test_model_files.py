"""Which files of a folder are the model: what lies beside it, and what stands in its place."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.models import our_logits, random_tokens
from support.tiny_gguf import write_tiny_gguf

import mlx_qlora as mq
from mlx_qlora.errors import UserError
from mlx_qlora.model.hub import resolve, sample_of

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENS = random_tokens(1, 9)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def logits(source: Path) -> np.ndarray:
    return our_logits(mq.load(source)[0], TOKENS)


def shards(folder: Path, n: int, kept: int | None = None) -> None:
    """The weights of a folder in n files beside the whole one, of which some are left out."""
    names = sorted(weights := load_file(folder / WHOLE))
    for i in range(n if kept is None else kept):
        part = {name: weights[name] for name in names[i::n]}
        save_file(part, folder / f"model-{i + 1:05}-of-{n:05}.safetensors", {"format": "pt"})


def index(folder: Path, n: int) -> None:
    """An index of n files, whether they are there or not."""
    names = sorted(load_file(folder / WHOLE))
    files = {name: f"model-{i % n + 1:05}-of-{n:05}.safetensors" for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))


def without_whole(folder: Path) -> None:
    (folder / WHOLE).unlink()


def beside(name: str, tensor: str = "step") -> Callable[[Path], Any]:
    return lambda folder: save_file({tensor: np.zeros((2, 2), np.float32)}, folder / name)


def twin(*names: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        for name in names:
            (folder / f"._{name}").write_bytes(b"\0\5\x16\7" + bytes(80))

    return write


def steps(*each: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda folder: [step(folder) for step in each]


IGNORED: dict[str, Callable[[Path], Any]] = {
    "an adapter of PEFT's": beside("adapter_model.safetensors"),
    "an adapter of mlx-lm's": beside("adapters.safetensors"),
    "Meta's format": beside("consolidated.safetensors", "tok_embeddings.weight"),
    "a part of Meta's": beside("consolidated.00.safetensors", "tok_embeddings.weight"),
    "an optimiser": beside("optimizer.safetensors"),
    "a schedule": beside("scheduler.safetensors"),
    "a value head": beside("value_head.safetensors"),
    "macOS's twins": twin(WHOLE, "config.json", "tokenizer.json"),
    "a stale index of one file": lambda folder: index(folder, 2),
    "a stale index of parts": steps(lambda f: shards(f, 3), lambda f: index(f, 10), without_whole),
    "parts without an index": steps(lambda f: shards(f, 3), without_whole),
    "an index and what it does not name": steps(
        lambda f: shards(f, 2),
        lambda f: index(f, 2),
        without_whole,
        beside("model-ema.safetensors"),
    ),
    "another format": lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
}


@pytest.mark.parametrize("what", IGNORED)
def test_what_lies_beside_a_model_does_not_change_it(what: str, folder: Path, plain: Path) -> None:
    IGNORED[what](folder)
    np.testing.assert_array_equal(logits(folder), logits(plain))
    if (folder / WHOLE).exists():
        assert sample_of(folder) == sample_of(plain)


def backup(name: str) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        weights = load_file(folder / WHOLE)
        save_file({k: v.astype(np.float16) for k, v in weights.items()}, folder / name)

    return write


def content(name: str, data: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(data)


def retyped(dtype: str, itemsize: int) -> Callable[[Path], Any]:
    def write(folder: Path) -> None:
        whole = (folder / WHOLE).read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        entries = json.loads(whole[8 : 8 + length])
        entry = next(entry for entry in entries.values() if "dtype" in entry)
        first, end = entry["data_offsets"]
        entry |= {"dtype": dtype, "shape": [(end - first) // itemsize]}
        header = json.dumps(entries).encode()
        (folder / WHOLE).write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])

    return write


def only(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / WHOLE).rename(folder / name)


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a backup": (backup("model_old.safetensors"), r"is in model.safetensors and in model_old.saf"),
    "a copy in 16 bits": (backup("model.fp16.safetensors"), r"is in model.fp16.* and in model.saf"),
    "parts and the whole": (lambda f: shards(f, 2), r"is in model-0.* and in model.safetensors"),
    "parts, their index and the whole": (
        steps(lambda f: shards(f, 2), lambda f: index(f, 2)),
        r"is in model-0.* and in model.safetensors; keep the files of one copy",
    ),
    "parts of two ways to cut": (
        steps(lambda f: shards(f, 2), lambda f: shards(f, 3), without_whole),
        r"is in model-00001-of-00002.* and in model-00001-of-00003",
    ),
    "some parts and the whole": (
        steps(lambda f: shards(f, 3, 1), lambda f: index(f, 3)),
        r"missing: model-00002-of-00003.* if model.safetensors is the whole model, delete model",
    ),
    "a part is missing": (
        steps(lambda f: shards(f, 3, 2), without_whole),
        r"missing: model-00003-of-00003.safetensors$",
    ),
    "only macOS's twin": (steps(twin(WHOLE), without_whole), r"missing: \*.safetensors"),
    "only torch's format": (
        only("pytorch_model.bin"),
        r"only as pytorch_model.bin; convert to saf",
    ),
    "only a checkpoint": (only("model.ckpt"), r"only as model.ckpt; convert to safetensors"),
    "only MLX's old format": (only("weights.npz"), r"only as weights.npz; convert the original ag"),
    "only Flax's format": (only("flax_model.msgpack"), r"only as flax.*; use the model's copy for"),
    "only ONNX": (only("model.onnx"), r"only as model.onnx; use the model's copy for PyTorch"),
    "64 bits": (retyped("F64", 8), r"dtype F64; save the model in bfloat16"),
    "8 bits": (retyped("F8_E4M3", 1), r"dtype F8_E4M3; use the original 16-bit repository"),
    "8 bits of range": (
        retyped("F8_E5M2", 1),
        r"dtype F8_E5M2; use the original 16-bit repository",
    ),
    "empty weights": (content(WHOLE, b""), r"model.safetensors is empty"),
    "an empty config": (content("config.json", b""), r"config.json is empty"),
    "an empty tokenizer": (content("tokenizer.json", b""), r"tokenizer.json is empty"),
    "an empty index": (content(INDEX, b""), r"index.json is empty"),
    "a pointer to weights": (content(WHOLE, POINTER), r"is Git LFS's pointer .*git lfs pull"),
    "a pointer to a tokenizer": (
        content("tokenizer.json", POINTER),
        r"tokenizer.json is Git LFS's",
    ),
    "a pointer to SentencePiece": (
        content("tokenizer.model", POINTER),
        r"r.model is Git LFS's poi",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_model_or_two_is_refused_by_name(what: str, folder: Path) -> None:
    change, message = REFUSED[what]
    change(folder)
    with pytest.raises(UserError, match=message):
        mq.load(folder)


NAMES = ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
NAMES += [WHOLE, INDEX, "special_tokens_map.json", "chat_template.jinja", ""]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_may_not_be_read_is_not_called_damaged(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = folder / name
    if not denied.exists():
        denied.write_text("{}")

    def as_the_system(real: Any) -> Any:
        def call(path: Any, *args: Any, **how: Any) -> Any:
            if Path(path) == denied:
                raise PermissionError(13, "Permission denied", str(path))
            return real(path, *args, **how)

        return call

    # Whoever runs the tests may be one who reads everything.
    monkeypatch.setattr(Path, "open", as_the_system(Path.open))
    monkeypatch.setattr("os.scandir", as_the_system(__import__("os").scandir))
    with pytest.raises(UserError) as raised:
        mq.load(folder)
    said = f"{denied} cannot be read (Permission denied); give yourself read permission"
    assert str(raised.value) == said


# ---- GGUF ----------------------------------------------------------------------------------------


def write_parts(folder: Path, whole: Path, names: list[str], **metadata: Any) -> list[Path]:
    """A GGUF file's tensors in one or more files; only the first has the model's metadata."""
    reader = gguf.GGUFReader(whole)
    for part, name in enumerate(names):
        writer = gguf.GGUFWriter(folder / name, "llama")
        for key, value in {"count": len(names), "no": part, **metadata}.items():
            (writer.add_int32 if "." in key else writer.add_uint16)(f"split.{key}", value)
        for key, field in reader.fields.items() if part == 0 else ():
            if not key.startswith("GGUF.") and not key.endswith("architecture"):
                kind = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(key, field.contents(), field.types[0], kind)
        for tensor in reader.tensors[part :: len(names)]:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return [folder / name for name in names]


PARTS = ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")


def gguf_logits(path: Path) -> np.ndarray:
    from mlx_qlora.model.weights import load_model, open_checkpoint

    return our_logits(load_model(open_checkpoint(resolve(path)), None, mx.float32), TOKENS)


def test_a_folder_with_the_parts_of_one_gguf_is_the_model(whole_gguf: Path, tmp_path: Path) -> None:
    write_parts(tmp_path, whole_gguf, PARTS)
    (tmp_path / "._m-00001-of-00002.gguf").write_bytes(bytes(80))
    np.testing.assert_array_equal(gguf_logits(tmp_path), gguf_logits(whole_gguf))
    parts = [(tmp_path / name).read_bytes() for name in PARTS]
    before = sample_of(tmp_path / PARTS[0])
    (tmp_path / PARTS[1]).write_bytes(parts[1] + b"more")
    assert sample_of(tmp_path / PARTS[0]) != before


BROKEN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a part under another name": (
        lambda at, whole: write_parts(at, whole, PARTS)[0].rename(at / PARTS[0].replace("-of", "")),
        r"says that it is part 1 of 2.*llama-gguf-split --merge",
    ),
    "a second part under another name": (
        lambda at, whole: write_parts(at, whole, PARTS)[1].rename(at / "headless.gguf"),
        r"says that it is part 2 of 2",
    ),
    "parts in the wrong order": (
        lambda at, whole: write_parts(at, whole, [*reversed(PARTS)])[0],
        r"says that it is part 2 of 2",
    ),
    "one part twice": (
        lambda at, whole: (
            write_parts(at, whole, PARTS),
            shutil.copy(at / PARTS[0], at / PARTS[1]),
        ),
        r"00002-of-00002.gguf says that it is part 1 of 2",
    ),
    "parts of three": (lambda at, whole: write_parts(at, whole, PARTS, count=3), r"part 1 of 3"),
    "too few tensors": (
        lambda at, whole: write_parts(at, whole, PARTS, **{"tensors.count": 99}),
        r"lacks tensors, or holds some twice",
    ),
    "a part is missing": (
        lambda at, whole: write_parts(at, whole, PARTS)[1].unlink(),
        r"is one of 2 parts; fetch the others: m-00002-of-00002.gguf",
    ),
    "a pointer": (lambda at, _: (at / "m.gguf").write_bytes(POINTER), r"is Git LFS's pointer"),
    "an empty file": (lambda at, _: (at / "m.gguf").write_bytes(b""), r"m.gguf is empty"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_part_of_a_gguf_is_never_taken_for_the_whole(
    what: str, whole_gguf: Path, tmp_path: Path
) -> None:
    write, message = BROKEN[what]
    write(tmp_path, whole_gguf)
    with pytest.raises(UserError, match=message):
        gguf_logits(sorted(tmp_path.glob("*.gguf"))[0])
