"""Adapter folders with every tensor spoilt in turn: all is named, and the model stays as it was."""

import json
import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import CONFIG, WEIGHTS, by_peft, move, weights_of
from support.models import load_folder, make_hf_model, our_logits, random_tokens, save_hf

from mlx_qlora.adapters.peft import load_adapter, save_adapter
from mlx_qlora.adapters.several import detach
from mlx_qlora.errors import AdapterError, AdapterWarning
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.lora import LoraConfig, add_lora, lora_layers
from mlx_qlora.tree import flat

TOKENS = random_tokens(2, 13)
Arrays = dict[str, np.ndarray]
CONFIGS = {
    "lora": LoraConfig(r=4, rank_pattern={"up_proj": 6}),
    "dora": LoraConfig(r=4, use_dora=True),
}
# A second, smaller one: of its header every single bit is turned over.
SMALL = LoraConfig(r=2, use_dora=True, target_modules=["down_proj"], layers_to_transform=[0])


class Whole:
    """A saved adapter, and a base that must not change; `check` says whether it did."""

    def __init__(self, base: Path, folder: Path, config: LoraConfig) -> None:
        self.base, self.folder = base, folder
        made = move(add_lora(load_folder(base), config))
        save_adapter(made, folder)
        self.logits, self.trained = our_logits(made, TOKENS), weights_of(made)
        self.bytes = (folder / WEIGHTS).read_bytes()
        self.arrays: Arrays = load_file(folder / WEIGHTS)
        self.model = load_folder(base)
        self.before = fingerprint(self.model)

    def refused(self, folder: Path) -> str:
        """The one message with which a folder is refused; the model is as it was."""
        with pytest.raises(AdapterError) as caught:
            load_adapter(self.model, folder)
        assert fingerprint(self.model) == self.before
        return str(caught.value)

    def spoilt(self, folder: Path, arrays: Arrays) -> str:
        """The same for other tensors in the folder's place."""
        save_file(arrays, folder / WEIGHTS, metadata={"format": "pt"})
        return self.refused(folder)

    def assert_still_loads(self) -> None:
        """The good folder still makes, of the very model that refused others, the adapter."""
        load_adapter(self.model, self.folder)
        np.testing.assert_array_equal(our_logits(self.model, TOKENS), self.logits)
        assert same(weights_of(self.model), self.trained)


def fingerprint(model: LlamaForCausalLM) -> tuple[list[str], dict[str, bytes], int, bool]:
    """Modules, every bit of every array, what is trainable, and whether there is a config."""
    arrays = {name: np.array(array.view(mx.uint8)).tobytes() for name, array in arrays_of(model)}
    modules = [f"{path} {type(module).__name__}" for path, module in model.named_modules()]
    return modules, arrays, len(flat(model.trainable_parameters())), hasattr(model, "lora_config")


def arrays_of(model: LlamaForCausalLM) -> Iterator[tuple[str, mx.array]]:
    for name, array in flat(model.parameters()).items():
        yield name, array.reshape(-1)


def same(one: Arrays, two: Arrays) -> bool:
    return one.keys() == two.keys() and all(
        one[name].tobytes() == two[name].tobytes() and one[name].shape == two[name].shape
        for name in one
    )


@pytest.fixture(params=CONFIGS)
def whole(request: pytest.FixtureRequest, hf_tiny: tuple[Any, Path], tmp_path: Path) -> Whole:
    return Whole(hf_tiny[1], tmp_path / "good", CONFIGS[request.param])


@pytest.fixture
def bad(whole: Whole, tmp_path: Path) -> Path:
    """A folder with the good config, for other tensors."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / CONFIG).write_bytes((whole.folder / CONFIG).read_bytes())
    return tmp_path / "bad"


# ---- one tensor at a time, and many at once ----------------------------------------------------


def drop(arrays: Arrays, name: str) -> list[str]:
    del arrays[name]
    return [f"{name} is missing"]


def rename(arrays: Arrays, name: str) -> list[str]:
    arrays[f"{name}.default"] = arrays.pop(name)
    return [f"{name} is missing", f"{name}.default belongs to no target of this model"]


def transpose(arrays: Arrays, name: str) -> list[str]:
    was = list(arrays[name].shape)
    if len(was) == 1:  # a column, as torch might keep a vector
        arrays[name] = arrays[name][:, None]
    else:
        assert was[0] != was[1]
        arrays[name] = np.ascontiguousarray(arrays[name].T)
    return [f"{name} has shape {list(arrays[name].shape)}, not {was}"]


def cut(arrays: Arrays, name: str) -> list[str]:
    was = list(arrays[name].shape)
    arrays[name] = arrays[name][:-1].copy()
    return [f"{name} has shape {[was[0] - 1, *was[1:]]}, not {was}"]


def to_int(arrays: Arrays, name: str) -> list[str]:
    arrays[name] = arrays[name].astype(np.int32)
    return [f"{name} has dtype I32"]


def to_double(arrays: Arrays, name: str) -> list[str]:
    arrays[name] = arrays[name].astype(np.float64)
    return [f"{name} has dtype F64"]


def add(arrays: Arrays, name: str) -> list[str]:
    unknown = name.replace("model.layers.", "model.layers.9")
    arrays[unknown] = arrays[name]
    return [f"{unknown} belongs to no target of this model"]


MUTATIONS: list[Callable[[Arrays, str], list[str]]] = [
    drop, rename, transpose, cut, to_int, to_double, add
]  # fmt: skip


def lines_of(message: str) -> list[str]:
    """What a message lists, after its first line."""
    return [line.strip() for line in message.splitlines()[1:]]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_every_tensor_that_is_spoilt_alone_is_named(
    whole: Whole, bad: Path, mutate: Callable[[Arrays, str], list[str]]
) -> None:
    per_linear = 3 if "lora_magnitude" in "".join(whole.arrays) else 2
    assert len(whole.arrays) == 14 * per_linear
    for name in whole.arrays:
        arrays = dict(whole.arrays)
        wanted = mutate(arrays, name)
        message = whole.spoilt(bad, arrays)
        assert str(bad / WEIGHTS) in message.splitlines()[0]
        assert sorted(lines_of(message)) == sorted(wanted), name
    np.testing.assert_array_equal(
        our_logits(whole.model, TOKENS), our_logits(load_folder(whole.base), TOKENS)
    )
    whole.assert_still_loads()


@pytest.mark.parametrize("seed", range(8))
def test_several_that_are_spoilt_at_once_are_all_named_by_one_message(
    whole: Whole, bad: Path, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    names = draw.choice(sorted(whole.arrays), len(MUTATIONS) + seed % 4, replace=False)
    arrays, wanted = dict(whole.arrays), []
    for i, name in enumerate(names):
        wanted += MUTATIONS[i % len(MUTATIONS)](arrays, str(name))
    assert sorted(lines_of(whole.spoilt(bad, arrays))) == sorted(wanted)
    whole.assert_still_loads()


def test_a_long_list_is_cut_and_says_how_many_more_there_are(whole: Whole, bad: Path) -> None:
    lines = lines_of(whole.spoilt(bad, {}))
    assert len(lines) == 21
    assert lines[-1] == f"... and {len(whole.arrays) - 20} more"
    assert lines[:20] == [f"{name} is missing" for name in ordered(whole)[:20]]
    whole.assert_still_loads()


def ordered(whole: Whole) -> list[str]:
    """The names in the model's order, layer by layer."""
    added = add_lora(load_folder(whole.base), CONFIGS["dora"])
    paths = [path for path, _ in lora_layers(added)]
    parts = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    names = [f"base_model.model.{path}.{part}" for path in paths for part in parts]
    return [name for name in names if name in whole.arrays]


def test_lora_s_file_is_refused_as_dora_and_dora_s_as_lora(whole: Whole, bad: Path) -> None:
    (bad / WEIGHTS).write_bytes(whole.bytes)
    config = json.loads((bad / CONFIG).read_text())
    (bad / CONFIG).write_text(json.dumps({**config, "use_dora": not config["use_dora"]}))
    lines = lines_of(whole.refused(bad))
    assert len(lines) == 14
    problem = "belongs to no target of this model" if config["use_dora"] else "is missing"
    assert all(line.endswith(f"lora_magnitude_vector {problem}") for line in lines)
    whole.assert_still_loads()


# ---- the bytes of the file ---------------------------------------------------------------------


def end_of_header(data: bytes) -> int:
    return 8 + struct.unpack("<Q", data[:8])[0]


def test_a_file_that_is_cut_anywhere_is_refused(whole: Whole, bad: Path) -> None:
    data = whole.bytes
    start = end_of_header(data)
    header = json.loads(data[8:start])
    ends = [start + header[name]["data_offsets"][1] for name in whole.arrays]
    places = {0, 1, 7, 8, 9, start - 1, start, start + 1, len(data) - 1}
    places |= {at for end in ends for at in (end - 1, end, end + 1)}
    places |= set(np.linspace(8, len(data) - 1, 60).astype(int).tolist())
    for at in sorted(place for place in places if place < len(data)):
        (bad / WEIGHTS).write_bytes(data[:at])
        assert str(bad / WEIGHTS) in whole.refused(bad), at
    whole.assert_still_loads()


def test_no_bit_of_the_header_can_turn_over_and_change_what_is_loaded(
    hf_tiny: tuple[Any, Path], tmp_path: Path
) -> None:
    """Refused by name; or, in the metadata that means nothing, the same adapter to the bit."""
    whole = Whole(hf_tiny[1], tmp_path / "good", SMALL)
    (tmp_path / "bad").mkdir()
    bad = tmp_path / "bad"
    (bad / CONFIG).write_bytes((whole.folder / CONFIG).read_bytes())
    data, harmless, escaped = whole.bytes, [], []
    for at in range(end_of_header(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            (bad / WEIGHTS).write_bytes(flipped)
            try:
                with warnings.catch_warnings():  # the base's hash is part of the metadata
                    warnings.simplefilter("ignore", AdapterWarning)
                    load_adapter(whole.model, bad)
            except AdapterError as error:
                assert str(bad / WEIGHTS) in str(error), (at, bit)
                assert not lora_layers(whole.model)
            except Exception as error:
                escaped.append(f"{at}.{bit} {chr(flipped[at])!r}: {error!r}")
            else:
                assert same(weights_of(whole.model), whole.trained), (at, bit)
                harmless.append(at)
                detach(whole.model, "default")
    assert not escaped
    metadata = data.index(b'"__metadata__"'), data.index(b"}") + 1
    assert harmless and all(metadata[0] <= at < metadata[1] for at in harmless)
    assert fingerprint(whole.model) == whole.before
    whole.assert_still_loads()


OFFSETS = [[0], [], [0, 1, 2], [0.5, 4], [None, 4], {}, "04", 3, None, [0, 4], [-4, 0]]


@pytest.mark.parametrize("changes", [{"dtype": "F99"}, *({"data_offsets": o} for o in OFFSETS)])
def test_an_entry_of_the_header_that_says_something_else_is_refused(
    whole: Whole, bad: Path, changes: dict[str, Any]
) -> None:
    start = end_of_header(whole.bytes)
    header = json.loads(whole.bytes[8:start])
    header[next(iter(whole.arrays))] |= changes
    text = json.dumps(header).encode()
    (bad / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + whole.bytes[start:])
    assert str(bad / WEIGHTS) in whole.refused(bad)
    whole.assert_still_loads()


# ---- what PEFT can and we cannot ---------------------------------------------------------------

BEYOND: dict[str, tuple[dict[str, Any], list[str]]] = {
    "embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, ["'embed_tokens'"]),
    "modules to save": (
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        ["modules_to_save is ['lm_head']"],
    ),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, ["'lm_head'"]),
    "lora_bias": (
        {"target_modules": ["q_proj"], "lora_bias": True},
        ["lora_bias is True; supported: False"],
    ),
    "trainable tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
        ["trainable_token_indices"],
    ),
    "several": (
        {
            "target_modules": ["q_proj"],
            "lora_bias": True,
            "modules_to_save": ["embed_tokens"],
            "use_dora": False,
        },
        ["lora_bias is True", "modules_to_save is ['embed_tokens']"],
    ),
}


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings=True:UserWarning")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter .default.* LoRA tensor")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", BEYOND)
def test_what_we_cannot_compute_is_refused_by_one_message(
    tmp_path: Path, name: str, tied: bool
) -> None:
    options, words = BEYOND[name]
    hf = make_hf_model(tie_word_embeddings=tied)
    folder = save_hf(hf, tmp_path / "model")
    by_peft(hf, r=2, **options).save_pretrained(tmp_path / "a")
    model = load_folder(folder)
    before = fingerprint(model)
    with pytest.raises(AdapterError) as caught:
        load_adapter(model, tmp_path / "a")
    assert str(tmp_path / "a" / CONFIG) in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    assert fingerprint(model) == before
    by_peft(hf, r=2, target_modules=["q_proj"]).save_pretrained(tmp_path / "good")
    assert len(lora_layers(load_adapter(model, tmp_path / "good"))) == 2
