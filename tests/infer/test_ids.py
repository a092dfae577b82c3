"""Token ids that a tokenizer knows and the model's embedding has no row for, and the reverse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from support.command_line import call
from support.tiny_folder import write_random_model, write_rows

import mlx_qlora as mq
from mlx_qlora.data.batches import Batch
from mlx_qlora.data.codecs import SplitCodec
from mlx_qlora.data.examples import Example, Examples

ROWS = 320  # of the embedding
NEW = "<|new|>"  # the tokenizer's token 320


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer has one id more than the embedding has rows."""
    folder = write_random_model(tmp_path_factory.mktemp("model"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": ROWS, "content": NEW, "special": True, **flags})
    path.write_text(json.dumps(tokenizer))
    return folder


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    model, tokenizer = mq.load(folder)
    return mq.add_lora(model, mq.LoraConfig(r=2)), tokenizer


def a_batch(tokens: list[int], labels: list[int]) -> Batch:
    return Batch(mx.array([tokens], mx.int32), mx.array([labels], mx.int32))


def rows_with(text: str, tokenizer: Any) -> Examples:
    return mq.read_examples([{"prompt": "a", "completion": text}] * 8, tokenizer, mq.DataConfig())


def of_other_tokenizer() -> Examples:
    return Examples.of([Example(np.array([5, 9999, 7], np.int32), np.array([False, True, True]))])


def of_any(ids: Any) -> Any:
    return ids


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "the call": lambda model, _: model(mx.array([[5, ROWS]])),
    "the call, far beyond": lambda model, _: model(mx.array([[5, 10**9]])),
    "the call, negative": lambda model, _: model(mx.array([[5, -1]])),
    "the call, a label's mark": lambda model, _: model(mx.array([[-100, 5]])),
    "the call with a cache": lambda model, _: model(mx.array([[5, ROWS]]), model.make_cache()),
    "the hidden states": lambda model, _: model.model(mx.array([[ROWS]])),
    "training, a token": lambda model, _: mq.loss_and_grads(model, a_batch([5, ROWS], [6, 7])),
    "training, a label": lambda model, _: mq.loss_and_grads(model, a_batch([5, 6], [7, ROWS])),
    "training, a wrong mark": lambda model, _: mq.loss_and_grads(model, a_batch([5, 6], [7, -1])),
    "evaluation": lambda model, t: mq.evaluate(model, t, rows_with(NEW, t)),
    "evaluation, another tokenizer": lambda m, t: mq.evaluate(m, t, of_other_tokenizer()),
    "generation": lambda model, t: mq.generate(model, t, f"hello {NEW}"),
    "generation, ids": lambda model, t: mq.generate(model, t, [5, ROWS]),
    "generation, one id": lambda model, t: mq.generate(model, t, [ROWS]),
    "generation, negative": lambda model, t: mq.generate(model, t, [5, -3]),
    "generation, a numpy id": lambda model, t: mq.generate(model, t, of_any([np.int64(10**12), 5])),
    "generation, no ids": lambda model, t: mq.generate(model, t, of_any([5, 1.5])),
    "a batch of prompts": lambda model, t: mq.generate_batch(model, t, ["a", NEW]),
    "fine_tune": lambda model, t: mq.fine_tune(model, t, rows_with(NEW, t)),
    "fine_tune, validation": lambda m, t: mq.fine_tune(m, t, rows_with("b", t), rows_with(NEW, t)),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_id_without_a_row_is_refused(
    way: str, loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(mq.DataError, match=r"320 rows \(0 to 319\)|must be whole numbers"):
        WAYS[way](*loaded)


@pytest.mark.parametrize("command", ["train", "inspect", "generate"])
def test_a_command_names_the_row_or_the_prompt_the_token_and_the_remedy(
    command: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b"}] * 9 + [{"prompt": "a", "completion": NEW}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how = ["--prompt", NEW] if command == "generate" else ["--data", data]
    how += ["--output-dir", tmp_path / "out", "--max-steps", 1] if command == "train" else []
    assert call(command, "--model", folder, *how) == 2
    message = capsys.readouterr().err
    assert f"token 320 ({NEW}) has no row in the model's embedding" in message
    assert "resize_token_embeddings" in message
    assert ("the prompt: " if command == "generate" else "rows.jsonl:10: ") in message


def test_ids_that_no_text_becomes_hinder_nothing(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    run = ["--data", data, "--output-dir", tmp_path / "out", "--max-steps", 1, "model.bits=null"]
    assert call("train", "--model", folder, *run) == 0
    assert call("evaluate", "--model", folder, "--data", data, "--answers", 0) == 0
    assert call("generate", "--model", folder, "--prompt", "hi", "generation.max_new_tokens=2") == 0


def test_mlx_lm_s_loops_and_a_compiled_model_stay_within_the_embedding(loaded: Any) -> None:
    model, _ = loaded
    last = model(mx.array([[5, ROWS - 1]]), model.make_cache())
    cache = model.make_cache()
    model(mx.array([[5]]), cache)
    for token in (ROWS, 10**9, -1):  # one token after others is what a sampler has drawn
        rewound = [layer.trim(layer.offset - 1) for layer in cache]
        assert rewound and mx.allclose(model(mx.array([[token]]), cache)[0, -1], last[0, -1], 1e-4)
    compiled = mx.compile(lambda tokens: model(tokens))
    wanted = model(mx.array([[5, ROWS - 1]]))
    assert mx.allclose(compiled(mx.array([[5, 10**9]])), wanted, 1e-4)
    with pytest.raises(mq.DataError, match="token 1000"):
        next(generate_step(mx.array([5, 1000, 6]), model))


def test_ids_without_a_token_become_nothing(loaded: Any) -> None:
    tokenizer = loaded[1]
    ids = tokenizer.encode("on the mat")
    for extra in (ROWS + 1, 10**6, 10**12, -1, -100):
        assert tokenizer.decode([extra, *ids, extra]) == tokenizer.decode(ids)
    letters = "abc"
    gap = SplitCodec({}, {"<end>": 7}, 3, lambda text: [*map(letters.index, text)],
                     lambda ids: "".join(letters[i] for i in ids))  # fmt: skip
    assert gap.decode([0, 5, 7, 6, 1], False) == "a<end>b"


def test_the_size_of_a_vocabulary_with_gaps_is_beyond_its_highest_id(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 500
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert mq.load(folder)[1].vocab_size == 501
