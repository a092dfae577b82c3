"""Token ids that a tokenizer knows and the model's embedding has no row for, and the reverse."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step
from support.command_line import call
from support.tiny_folder import write_random_model, write_rows

import mlx_qlora as mq
from mlx_qlora.data.batches import Batch
from mlx_qlora.data.codecs import SplitCodec
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.model import llama

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
    assert f"token 320 ({NEW}) is not in the model's embedding" in message
    assert "resize_token_embeddings" in message
    assert ("the prompt: " if command == "generate" else "rows.jsonl:10: ") in message


def test_ids_that_no_text_becomes_hinder_nothing(folder: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", 12)
    run = ["--data", data, "--output-dir", tmp_path / "out", "--max-steps", 1, "model.bits=null"]
    assert call("train", "--model", folder, *run) == 0
    assert call("evaluate", "--model", folder, "--data", data, "--answers", 0) == 0
    assert call("generate", "--model", folder, "--prompt", "hi", "generation.max_new_tokens=2") == 0


def drawn(token: int) -> Callable[[mx.array], mx.array]:
    """A sampler that always draws this token."""
    return lambda logprobs: mx.full(logprobs.shape[:1], token, mx.int32)


def by_mlx_lm(model: Any, prompt: list[int], n: int = 8, **how: Any) -> list[int]:
    steps: Any = generate_step(mx.array(prompt), model, max_tokens=n, **how)
    return [token for token, _ in steps]


def in_a_batch(model: Any, *prompts: list[int]) -> None:
    generator = BatchGenerator(model, max_tokens=8)
    try:
        for prompt in prompts:  # those after the first join it while it is answered
            generator.insert([prompt])
            for _ in range(3):
                generator.next_generated()
        while generator.next_generated():
            pass
    finally:
        generator.close()


def one_by_one(model: Any, tokens: list[int]) -> None:
    cache = model.make_cache()
    for token in tokens:
        model(mx.array([[token]]), cache)


def by_draft(model: Any) -> None:
    list(speculative_generate_step(mx.array([5, 6, ROWS]), model, model, max_tokens=4))


MLX_LM_WAYS: dict[str, Callable[[Any], Any]] = {
    "the last token of a prompt": lambda model: by_mlx_lm(model, [5, 6, ROWS]),
    "one wanted": lambda model: by_mlx_lm(model, [5, 6, ROWS], 1),
    "far beyond": lambda model: by_mlx_lm(model, [5, 6, 10**9]),
    "negative": lambda model: by_mlx_lm(model, [5, 6, -1]),
    "the first of a prompt": lambda model: by_mlx_lm(model, [ROWS, 5, 6]),
    "the only one": lambda model: by_mlx_lm(model, [ROWS]),
    "the last of a chunk": lambda model: by_mlx_lm(model, [5, ROWS, 6, 7], prefill_step_size=2),
    "a quantised cache": lambda m: by_mlx_lm(m, [5, 6, ROWS], kv_bits=8, kv_group_size=32),
    "a cache of a fixed size": lambda model: by_mlx_lm(model, [5, 6, ROWS], max_kv_size=16),
    "drawn by a sampler": lambda model: by_mlx_lm(model, [5, 6], sampler=drawn(ROWS)),
    "a draft model": by_draft,
    "a batch": lambda model: in_a_batch(model, [5, 6, ROWS]),
    "a batch of one token": lambda model: in_a_batch(model, [ROWS]),
    "joining a batch": lambda model: in_a_batch(model, [5, 6], [7, ROWS]),
    "one by one": lambda model: one_by_one(model, [5, 6, 7, ROWS, 8, 9]),
    "one by one, the second": lambda model: one_by_one(model, [5, ROWS, 6, 7]),
}


@pytest.fixture(scope="module")
def wide_heads(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model whose heads are as wide as a quantised cache needs."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return mq.load(write_random_model(tmp_path_factory.mktemp("wide"), **heads))[0]


@pytest.mark.parametrize("way", MLX_LM_WAYS)
def test_an_id_without_a_row_is_refused_in_mlx_lm_s_loops(way: str, wide_heads: Any) -> None:
    with pytest.raises(mq.DataError, match=r"320 rows \(0 to 319\)"):
        MLX_LM_WAYS[way](wide_heads)


@pytest.mark.parametrize("token", [ROWS, 10**9, -1, -100])
def test_an_id_that_cannot_be_looked_at_in_time_becomes_nan(token: int, loaded: Any) -> None:
    model, _ = loaded
    cache = model.make_cache()
    for earlier in (5, 6):  # a token after single ones is what a sampler has drawn
        model(mx.array([[earlier], [earlier]]), cache)
    logits = model(mx.array([[7], [token]]), cache)
    assert mx.isnan(logits[1]).all() and not mx.isnan(logits[0]).any()
    compiled = mx.compile(lambda tokens: model(tokens))
    logits = compiled(mx.array([[5, 6], [5, token]]))
    assert mx.isnan(logits[1, 1]).all()
    assert mx.allclose(logits[0], model(mx.array([[5, 6]]))[0], 1e-4, 1e-4)


def test_mlx_lm_s_loops_are_not_waited_for(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is looked at once whoever drew it has read it, and its successor is drawn."""
    model, _ = loaded
    looked_at: list[list[int]] = []
    monkeypatch.setattr(
        llama, "check_ids", lambda ids, *_: looked_at.append(ids.flatten().tolist())
    )
    seen: list[int] = []
    steps: Any = generate_step(mx.array([5, 6, 7]), model, max_tokens=6)
    for token, _ in steps:
        assert all(ids in ([5, 6], [7], *([each] for each in seen)) for ids in looked_at)
        seen.append(token)
    assert looked_at == [[5, 6], [7], *([each] for each in seen[:4])]


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
