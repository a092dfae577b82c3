"""Scores against the definition in numpy, float64, from the model's own logits."""

import functools
from typing import Any

import numpy as np
import pytest
from support.models import our_logits, randomise_lora
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.data.batches import evaluation_batches
from mlx_qlora.data.examples import Example
from mlx_qlora.infer import evaluate as of_evaluate
from mlx_qlora.infer.evaluate import score_examples
from mlx_qlora.train.score import score

ROWS = [
    {"instruction": f"Repeat the word fox {n} times.", "output": " ".join(["fox"] * n)}
    for n in range(1, 12)
]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model, tokenizer = mq.load(write_model(tmp_path_factory.mktemp("evaluate") / "model"))
    mq.add_lora(model, mq.LoraConfig(r=4, lora_dropout=0.5))
    randomise_lora(model)
    return model, tokenizer


def test_scores_do_not_depend_on_the_batch_size_and_repeat_exactly(tuned):
    model, tokenizer = tuned
    examples = mq.read_examples(ROWS, tokenizer, mq.DataConfig())
    wanted = mq.evaluate(model, tokenizer, examples, batch_size=8)
    assert mq.evaluate(model, tokenizer, examples, batch_size=8) == wanted
    for size in (1, 3, 100):
        scores = mq.evaluate(model, tokenizer, examples, batch_size=size)
        assert scores.loss == pytest.approx(wanted.loss, rel=1e-6)
        assert scores.token_accuracy == wanted.token_accuracy
        assert scores.n_tokens == wanted.n_tokens


def test_sets_that_cannot_be_scored_are_refused(tuned, tmp_path):
    model, tokenizer = tuned
    examples = mq.read_examples(ROWS, tokenizer, mq.DataConfig())
    with pytest.raises(mq.DataError, match="no examples to evaluate"):
        mq.evaluate(model, tokenizer, examples[:0])
    with pytest.raises(mq.ConfigError, match="batch_size must be at least 1; got 0"):
        mq.evaluate(model, tokenizer, examples, batch_size=0)
    smaller, _ = mq.load(write_model(tmp_path / "small", vocab_size=200))
    with pytest.raises(mq.DataError, match=r"rows:1: token \d+ .* has 200 rows \(0 to 199\)"):
        mq.evaluate(smaller, tokenizer, examples)


# ---- example by example ------------------------------------------------------------------------


@pytest.mark.parametrize("train_on", ["response", "all"])
def test_scores_are_the_definition_s_of_each_example_and_add_up_to_those_of_the_set(
    tuned, train_on
):
    model, tokenizer = tuned
    rows = [*ROWS[::-1], *ROWS]
    examples = mq.read_examples(rows, tokenizer, mq.DataConfig(train_on=train_on))
    scores = score_examples(model, tokenizer, examples)
    for i, example in enumerate(examples):  # one row at a time, without padding
        logits = our_logits(model, example.tokens[None, :-1])[0].astype(np.float64)
        chances = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        at, wanted = example.learned[1:], example.tokens[1:]
        assert scores.nats[i] == pytest.approx(-chances[at, wanted[at]].sum(), rel=1e-5)
        assert scores.hits[i] == (logits.argmax(axis=-1) == wanted)[at].sum()
        assert scores.tokens[i] == at.sum()
        assert (train_on == "response") == (not at.all())
    whole = mq.evaluate(model, tokenizer, examples)
    assert whole.n_tokens == scores.tokens.sum()
    assert whole.loss == pytest.approx(scores.nats.sum() / whole.n_tokens, rel=1e-6)
    assert whole.perplexity == pytest.approx(np.exp(whole.loss), rel=1e-6)
    assert whole.token_accuracy == scores.hits.sum() / whole.n_tokens
    again = score_examples(model, tokenizer, examples)
    assert np.array_equal(again.nats, scores.nats) and np.array_equal(again.hits, scores.hits)


def test_many_examples_go_in_several_groups_and_keep_their_places(tuned, monkeypatch):
    model, tokenizer = tuned
    examples = mq.read_examples(ROWS, tokenizer, mq.DataConfig())
    wanted = score_examples(model, tokenizer, examples)
    few = functools.partial(evaluation_batches, batch_size=3)
    monkeypatch.setattr(of_evaluate, "evaluation_batches", few)
    found = score_examples(model, tokenizer, examples)
    assert np.allclose(found.nats, wanted.nats, rtol=1e-5)
    assert np.array_equal(found.tokens, wanted.tokens)


def test_the_loss_is_the_trainer_s_and_that_of_torch_and_peft(tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = write_model(tmp_path / "model")
    model, tokenizer = mq.load(base)
    mq.add_lora(model, mq.LoraConfig(r=4))
    randomise_lora(model)
    mq.save_adapter(model, tmp_path / "a", base_model_name_or_path=str(base))
    examples = mq.read_examples(ROWS, tokenizer, mq.DataConfig())
    ours = score_examples(model, tokenizer, examples)
    held_out = evaluation_batches(examples)
    trainer = score(model, held_out)  # what `train.loop` takes its validation loss from
    assert trainer.tokens == ours.tokens.sum()
    assert ours.nats.sum() / ours.tokens.sum() == pytest.approx(
        trainer.nats / trainer.tokens, abs=1e-5
    )

    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "a")
    theirs.eval()
    nats = []
    for example in examples:
        ids = torch.from_numpy(example.tokens.astype(np.int64))[None]
        labels = torch.where(torch.from_numpy(example.learned), ids[0], -100)[None]
        with torch.no_grad():
            mean = theirs(input_ids=ids, labels=labels).loss
        nats.append(float(mean) * int(example.learned[1:].sum()))
    assert ours.nats == pytest.approx(nats, rel=1e-5)
    assert ours.nats.sum() / ours.tokens.sum() == pytest.approx(
        sum(nats) / ours.tokens.sum(), abs=1e-5
    )


def test_an_example_that_teaches_nothing_is_named(tuned):
    model, tokenizer = tuned
    blank = Example(np.arange(5, dtype=np.int32), np.zeros(5, bool), 3, "x.jsonl")
    with pytest.raises(mq.DataError, match=r"x\.jsonl:3 has no supervised token"):
        score_examples(model, tokenizer, mq.Examples.of([blank]))
