"""Whatever a stranger's files hold, what is wrong with them is one line, said in time."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.command_line import ROOT, call
from support.tiny_folder import write_random_model
from support.tiny_gguf import write_tiny_gguf

from mlx_qlora.model import lora
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.readers import MOST_JSON, MOST_YAML

DEEP, DIGITS = "[" * 100_000, '{"a": ' + "1" * 6000 + "}"
INDEX = "model.safetensors.index.json"


def text(name: str, content: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_text(content)


def config(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def config_of_tokenizer(**fields: Any) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def header(content: bytes) -> Callable[[Path], Any]:
    whole = struct.pack("<Q", len(content)) + content
    return lambda folder: (folder / "model.safetensors").write_bytes(whole)


def entries(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Another header, in the place of that of the tensors."""

    def spoil(folder: Path) -> None:
        path = folder / "model.safetensors"
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        change(said := json.loads(content[8 : 8 + length]))
        text = json.dumps(said).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return spoil


def overlap(said: dict[str, Any]) -> None:
    said["model.layers.0.mlp.up_proj.weight"]["data_offsets"] = said[
        "model.layers.0.mlp.gate_proj.weight"
    ]["data_offsets"]


def number(name: str, value: float) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].reshape(-1)[-1] = value
        save_file(tensors, folder / "model.safetensors")

    return spoil


def tokenizer(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        path = folder / "tokenizer.json"
        change(said := json.loads(path.read_text()))
        path.write_text(json.dumps(said))

    return spoil


def replacing(pattern: dict[str, str], new: str, n: int) -> dict[str, Any]:
    return {
        "type": "Sequence",
        "normalizers": n * [{"type": "Replace", "content": new} | {"pattern": pattern}],
    }


def in_decoder(said: dict[str, Any]) -> None:
    grows = replacing({"Regex": "."}, "aa", 40)["normalizers"]
    said["decoder"] = {"type": "Sequence", "decoders": [said["decoder"], *grows]}


PIECES = ("SpecialToken", "<|x|>"), ("Sequence", "A")


def unknown_piece(said: dict[str, Any]) -> None:
    piece, text = ({kind: {"id": x, "type_id": 0}} for kind, x in PIECES)
    inner = {"single": [piece, text], "pair": [text, text], "special_tokens": {}}
    inner["type"] = "TemplateProcessing"
    said["post_processor"] = {"type": "Sequence", "processors": [inner]}


def distant_id(said: dict[str, Any]) -> None:
    vocabulary = said["model"]["vocab"]
    vocabulary[[*vocabulary][-1]] = 2**32 - 2


def pipe(name: str) -> Callable[[Path], Any]:
    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return spoil


NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
# What is done to a model's folder -> what is said.
MEMBERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "config nests": (text("config.json", DEEP), "config.json cannot be read (it is nested too"),
    "config of digits": (
        text("config.json", DIGITS),
        "config.json cannot be read (it has a number",
    ),
    "header nests": (header(DEEP.encode()), "model.safetensors is damaged (Error"),
    "header of digits": (header(DIGITS.encode()), "number out of range"),
    "index nests": (text(INDEX, DEEP), "index.json cannot be read: ValueError('it is nested"),
    "generation config nests": (text("generation_config.json", DEEP), "is nested too deeply"),
    "special tokens nest": (text("special_tokens_map.json", DEEP), "is nested too deeply"),
    "tokenizer's config nests": (text("tokenizer_config.json", DEEP), "is nested too deeply"),
    "added tokens nest": (text("added_tokens.json", DEEP), "is nested too deeply"),
    "tokenizer nests": (
        text("tokenizer.json", DEEP),
        "tokenizer.json is damaged, or needs a newer",
    ),
    "a billion layers": (
        config(num_hidden_layers=10**9),
        "config.json says 1,000,000,000 layers, and its files hold 2",
    ),
    "a wide head": (config(head_dim=10**9), "head_dim 1,000,000,000 is too large for a matrix"),
    "an endless vocabulary": (
        config(vocab_size=10**12),
        "vocab_size must be a positive integer of at most 2,147,483,647; got 1000000000000",
    ),
    "packing by a word": (config(quantization_config="x"), "quantization_config must be an obj"),
    "packing by a list": (config(quantization_config=[1]), "quantization_config must be an obj"),
    "positions by a word": (config(max_position_embeddings="x"), "must be a positive integer;"),
    "RoPE without a base": (config(rope_theta=0), "rope_theta must be a positive number; got 0"),
    "layers that are not there": (config(num_hidden_layers=9), "says 9 layers, and its files hold"),
    "a base beyond floats": (text("config.json", f'{{"rope_theta": 1{"0" * 400}}}'), "401 digits"),
    "objects in objects": (text("config.json", '{"a":' * 900 + "1" + "}" * 900), "nested too"),
    "many megabytes": (text("config.json", " " * (MOST_JSON + 1)), "it is larger than 16,777,216"),
    "no text": (
        lambda folder: (folder / "config.json").write_bytes(b"\xff{}"),
        "can't decode byte",
    ),
    "a pipe": (pipe("config.json"), "config.json is no file: put the file itself there"),
    "a pipe beside it": (pipe("generation_config.json"), "generation_config.json is no file"),
    "two tensors in one place": (entries(overlap), "invalid offset for tensor"),
    "a negative shape": (entries(lambda h: h[NORM].update(shape=[-64])), "invalid"),
    "a shape by a word": (entries(lambda h: h[NORM].update(shape="x")), "invalid"),
    "a shape of more": (entries(lambda h: h[NORM].update(shape=[65])), "invalid shape"),
    "an entry that is none": (
        entries(lambda h: h.update({NORM: 7})),
        "model.safetensors is damaged",
    ),
    "a norm of NaN": (number(NORM, np.nan), f"{NORM} in "),
    "a matrix of infinity": (number(UP, np.inf), f"{UP} in "),
    "added tokens by a list": (
        config_of_tokenizer(added_tokens_decoder=[1]),
        "added_tokens_decoder",
    ),
    "an added token by a word": (
        config_of_tokenizer(added_tokens_decoder={"1": "x"}),
        "cannot be read (string indices must be integers",
    ),
    "an end that is a half": (config_of_tokenizer(eos_token="\ud800"), "surrogates not allowed"),
    "a text twice as long, 40 times": (
        tokenizer(lambda t: t.update(normalizer=replacing({"String": "a"}, "aa", 40))),
        "tokenizer.json makes a text 1,099,511,627,776 times as long",
    ),
    "a text between all letters": (
        tokenizer(lambda t: t.update(normalizer=replacing({"String": ""}, "a" * 1000, 4))),
        "tokenizer.json makes a text 1,004,006,004,001 times as long",
    ),
    "an answer that grows": (tokenizer(in_decoder), "times as long; get it again"),
    "a token of no id": (tokenizer(unknown_piece), "cannot be read (no entry found for key)"),
    "a prefix longer than a token": (
        tokenizer(lambda said: said["model"].update(continuing_subword_prefix="y" * 50)),
        "cannot be read (range end index",
    ),
    "an id beyond all": (tokenizer(distant_id), "no model has the id 4,294,967,294"),
    "an end by a word": (config(eos_token_id="x"), "eos_token_id must be an id or a list of ids"),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_what_is_wrong_is_one_line(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spoil, said = MEMBERS[name]
    write_random_model(tmp_path)
    spoil(tmp_path)
    assert call("generate", "--model", tmp_path, "--prompt", "x") == 2
    out, err = capfd.readouterr()
    assert said in err and err.startswith("mlx-qlora: ") and not out, err


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_nan_in_a_matrix_that_is_streamed_is_named(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_random_model(tmp_path)
    number(UP, np.nan)(tmp_path)
    path = str(tmp_path / "model.safetensors")
    tensors = {k: v.astype(getattr(mx, kind)) for k, v in mx.load(path).items()}
    mx.save_safetensors(path, tensors)
    words = ["--prompt", "x", "model.residency=streamed", "model.bits=null"]
    assert call("generate", "--model", tmp_path, *words) == 2
    assert f"{UP} in {path} holds NaN or infinite numbers" in capfd.readouterr().err


# ---- GGUF ----------------------------------------------------------------------------------------


def dimensions(path: Path, n: int) -> None:
    """A tensor of so many dimensions, which ends the process in MLX's own reader."""
    said = b"".join(struct.pack("<Q", len(x)) + x for x in (b"general.architecture",))
    said += struct.pack("<I", 8) + struct.pack("<Q", 5) + b"llama"
    said += struct.pack("<Q", 18) + b"output_norm.weight" + struct.pack("<I", n)
    said += struct.pack(f"<{n}Q", 64, *[1] * (n - 1)) + struct.pack("<IQ", 0, 0)
    said = b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + said
    path.write_bytes(said + b"\0" * (-len(said) % 32) + b"\0" * 256)


def replaced(old: bytes, new: bytes) -> Callable[[Path], Any]:
    def spoil(path: Path) -> None:
        content = write_tiny_gguf(path).read_bytes()
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, new))

    return spoil


def pairs(**metadata: Any) -> Callable[[Path], Any]:
    return lambda path: write_tiny_gguf(
        path, {k.replace("__", "."): v for k, v in metadata.items()}
    )


KIND = struct.pack("<Q", 20) + b"general.architecture"
TOKENS = b"tokenizer.ggml.tokens" + struct.pack("<I", 9)
GGUFS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nine dimensions": (lambda path: dimensions(path, 9), "output_norm.weight has shape [64, 1, 1"),
    "four billion": (
        replaced(b"output_norm.weight\x01\0", b"output_norm.weight\xff\xff"),
        "truncated",
    ),
    "heads by a word": (pairs(attention__head_count="x"), "must be a positive integer; got 'x'"),
    "an epsilon by a word": (pairs(attention__layer_norm_rms_epsilon="x"), "rms_norm_eps must be"),
    "a base by a word": (pairs(rope__freq_base="x"), "rope_theta must be a positive number"),
    "a type by a number": (pairs(general__type=7), "general.type must be of the type str; got 7"),
    "parts by a word": (
        lambda path: write_tiny_gguf(path, {"general.alignment": "x"}),
        "is damaged or truncated",
    ),
    "a text of 2^62 bytes": (
        replaced(KIND + struct.pack("<IQ", 8, 5), KIND + struct.pack("<IQ", 8, 1 << 62)),
        "is damaged or truncated",
    ),
    "2^40 tokens": (
        replaced(TOKENS + struct.pack("<IQ", 8, 320), TOKENS + struct.pack("<IQ", 8, 1 << 40)),
        "is damaged or truncated",
    ),
}


@pytest.mark.parametrize("name", GGUFS)
def test_what_is_wrong_with_a_gguf_is_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = GGUFS[name]
    spoil(path := tmp_path / "model.gguf")
    assert call("generate", "--model", path, "--prompt", "x") == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("mlx-qlora: ") and not out, err


# ---- YAML ----------------------------------------------------------------------------------------

BOMB = "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(8 * [f'*{old}'])}]\n" for old, new in zip("abcdefgh", "bcdefghi")
)
MERGED = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join(8 * [f'*{old}'])}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi")
)
YAMLS = {
    "aliases": (BOMB, "it holds too many values"),
    "merged aliases": (MERGED, "it holds too many values"),
    "an alias of itself": ("lora: &a [*a]\n", "nested too deeply"),
    "brackets": ("lora: " + "[" * 3000, "nested too deeply"),
    "braces within limits": ("lora: " + "{a: " * 70 + "1" + "}" * 70, "nested too deeply"),
    "digits": (f"lora: {{r: {'9' * 6000}}}\n", "is not YAML"),
    "hexadecimal digits": (f"lora: {{r: 0x{'f' * 6000}}}\n", "it has a number of 6,002 digits"),
    "a number without digits": ('lora: {r: !!int ""}\n', "is not YAML"),
    "a day that is none": ("lora: {r: !!timestamp x}\n", "is not YAML"),
    "a flag that is none": ("lora: {r: !!bool x}\n", "is not YAML"),
    "a key that is a list": ("lora: {[a]: 1}\n", "found unhashable key in line 1, column 8"),
    "a megabyte": ("#" * (MOST_YAML + 1), "is larger than 262,144 bytes"),
}


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("way", ["config", "record"])
def test_what_is_wrong_with_yaml_is_one_line(
    name: str, way: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, said = YAMLS[name]
    (path := tmp_path / "run.yaml").write_text(content)
    words = {
        "config": ["train", "--config", path, "--print-config"],
        "record": ["generate", "--adapter", tmp_path, "--prompt", "x"],
    }
    assert call(*words[way]) == 2
    out, err = capsys.readouterr()
    assert said in err and err.startswith("mlx-qlora: ") and err.count("\n") == 1 and not out, err


# ---- beside an adapter ---------------------------------------------------------------------------


def write_adapter(folder: Path, base: Path, **fields: Any) -> Path:
    folder.mkdir()
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    said["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(said | fields))
    n = json.loads((base / "config.json").read_text())["num_hidden_layers"]
    name = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    pairs = {name.format(i, x): np.zeros(shapes[x], "f4") for i in range(n) for x in "AB"}
    save_file(pairs, folder / "adapter_model.safetensors")
    return folder


def hollow(name: str) -> Callable[[Path], Any]:
    """A file of 2 GB that takes no room."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            file.truncate(2 << 30)

    return make


TEMPLATE = "chat_template.jinja"
BESIDE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a template of bytes": (
        lambda folder: (folder / TEMPLATE).write_bytes(b"\xff"),
        "chat_template.jinja cannot be read ('utf-8' codec can't decode",
    ),
    "a template that is a pipe": (
        pipe(TEMPLATE),
        "chat_template.jinja cannot be read (it is no file",
    ),
    "a folder": (lambda folder: (folder / TEMPLATE).mkdir(), "cannot be read (it is no file"),
    "gigabytes": (hollow(TEMPLATE), "cannot be read (it is larger than 16,777,216 bytes"),
    "a template by a number": (text("tokenizer_config.json", '{"chat_template": 7}'), "got 7"),
    "a template that nests": (text("chat_template.json", DEEP), "is nested too deeply"),
    "a record of a list": (text("training_args.json", '{"data": []}'), ""),
    "a format of a list": (text("training_args.json", '{"data": {"format": [1]}}'), ""),
    "a record by a word": (text("training_args.json", '{"data": "x"}'), ""),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_is_wrong_beside_an_adapter_is_one_line_or_nothing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = BESIDE[name]
    (model := tmp_path / "model").mkdir()
    write_random_model(model)
    spoil(adapter := write_adapter(tmp_path / "adapter", model))
    words = ["--model", model, "--adapter", adapter, "--prompt", "x", "model.bits=null"]
    code = call("generate", *words, "generation.max_new_tokens=1")
    err = capsys.readouterr().err
    assert code == (2 if said else 0), err
    assert said in err and err.count("\n") == (1 if said else 0), err


def test_a_card_of_gigabytes_is_none_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model := tmp_path / "model").mkdir()
    write_random_model(model)
    hollow("README.md")(adapter := write_adapter(tmp_path / "adapter", model))

    def whole(*_: Any, **__: Any) -> str:
        raise MemoryError

    monkeypatch.setattr(Path, "read_text", whole)
    assert call("merge", "--model", model, "--adapter", adapter, "--output-dir", adapter) == 2
    assert "is not known to be from mlx-qlora" in capsys.readouterr().err


# What reads a whole file: our own, or one that has been found to be small or is a model's.
READ_WHOLE = {
    *("mlx_qlora/readers.py", "mlx_qlora/__init__.py", "mlx_qlora/adapters/drift.py"),
    *("mlx_qlora/adapters/peft.py", "mlx_qlora/adapters/push.py", "mlx_qlora/after/forgetting.py"),
    *("mlx_qlora/before/self_test.py", "mlx_qlora/cpu/blas.py", "mlx_qlora/data/store.py"),
    *("mlx_qlora/cli.py", "mlx_qlora/names.py"),  # tables of the package
    *("mlx_qlora/device.py", "mlx_qlora/distributed.py", "mlx_qlora/train/metrics.py"),
}


def test_no_other_door_to_a_text_of_any_size() -> None:
    """A stranger's file is read by `read_text` or `card_text`, which have limits."""
    found = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mlx_qlora").rglob("*.py")
        if ".read_text(" in path.read_text()
    }
    assert found <= READ_WHOLE, found - READ_WHOLE


# ---- patterns ------------------------------------------------------------------------------------

PATTERNS: dict[str, dict[str, Any]] = {
    "targets": {"target_modules": r"(([a-z._]+)+)+x"},
    "alternatives": {"target_modules": r"(a|[a-z]|.)*x"},
    "ranks": {"rank_pattern": {r"([a-z0-9._]*)*!": 3}},
    "factors": {"alpha_pattern": {r"(.*.*)*.*.*.*.*!": 3}},
    "exclusions": {"exclude_modules": r"((\w|\.)+)+!"},
    "layers": {"layers_to_transform": [0], "layers_pattern": [r"((\w|\.)+)+!"]},
}


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_would_never_end_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "SECONDS", 1)
    (model := tmp_path / "model").mkdir()
    write_random_model(model)
    (adapter := tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config | PATTERNS[name]))
    save_file({"x": np.zeros(1, "f4")}, adapter / "adapter_model.safetensors")
    assert call("generate", "--model", model, "--adapter", adapter, "--prompt", "x") == 2
    err = capsys.readouterr().err
    assert "takes more than 1 seconds, or all memory: list the modules' names" in err


NESTED = "(" * 5000 + "a" + ")" * 5000
# What an adapter's config says -> what is said of it.
BEYOND: dict[str, tuple[dict[str, Any], str]] = {
    "deep targets": ({"target_modules": NESTED}, "is no regex: maximum recursion depth"),
    "deep exclusions": ({"exclude_modules": NESTED}, "maximum recursion depth exceeded"),
    "alternatives": (
        {"target_modules": "|".join(f"a{i}" for i in range(1 << 17))},
        "it is larger than 131,072 bytes",
    ),
    "many layers": ({"layers_to_transform": [9] * (1 << 14)}, "it holds too many values"),
}


@pytest.mark.parametrize("name", BEYOND)
def test_patterns_beyond_what_a_model_needs_are_refused_at_once(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model := tmp_path / "model").mkdir()
    write_random_model(model)
    adapter = write_adapter(tmp_path / "adapter", model)
    changes, reason = BEYOND[name]
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | changes))
    assert call("generate", "--model", model, "--adapter", adapter, "--prompt", "x") == 2
    assert reason in capsys.readouterr().err


def test_a_pattern_is_compiled_once_for_all_paths() -> None:
    """An adapter may name a rank for each of its linears, more than `re` keeps."""
    config = LoraConfig(rank_pattern={f"layers.{i}.x": 2 for i in range(600)})
    before = lora.compiled.cache_info().misses
    assert {config.rank_of(f"model.layers.{i}.y") for i in range(5)} == {16}
    assert lora.compiled.cache_info().misses - before <= 600
