"""Divergence and perplexity on general text against torch in float64."""

import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from support.models import our_logits, random_tokens, randomise_lora
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.adapters.drift import TEXTS, encode_texts
from mlx_qlora.after.advice import forgot
from mlx_qlora.after.answer_metrics import LOWER, NEITHER, Row, paired_row, perplexity_row
from mlx_qlora.after.bootstrap import NONE, STUDENTISED, Interval
from mlx_qlora.after.forgetting import BLOCK, Forgetting, degree, forgetting, read_texts


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    home = tmp_path_factory.mktemp("forgetting")
    base = write_model(home / "model")
    model, tokenizer = mq.load(base)
    mq.add_lora(model, mq.LoraConfig(r=4))
    randomise_lora(model)
    mq.save_adapter(model, home / "a", base_model_name_or_path=str(base))
    return model, tokenizer, home


def torch_figures(home: Path, rows: list[list[int]]) -> np.ndarray:
    """Means of the two losses and of KL(base || tuned) and KL(tuned || base), in float64."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(home / "model", dtype=torch.float64)
    theirs = PeftModel.from_pretrained(plain, home / "a").double().eval()
    sums, n = np.zeros(4), 0
    for ids in rows:
        tokens, labels = torch.tensor([ids[:-1]]), torch.tensor(ids[1:])
        with torch.no_grad():
            tuned = theirs(tokens).logits[0].log_softmax(-1)
            with theirs.disable_adapter():
                base = theirs(tokens).logits[0].log_softmax(-1)
        at = torch.arange(len(labels)), labels
        kl = torch.nn.functional.kl_div  # kl_div(q, p) is KL(p || q)
        forward = kl(tuned, base, reduction="sum", log_target=True)
        reverse = kl(base, tuned, reduction="sum", log_target=True)
        sums += [float(x) for x in (-base[at].sum(), -tuned[at].sum(), forward, reverse)]
        n += len(labels)
    return sums / n


def test_the_figures_are_torch_s_in_float64(made):
    model, tokenizer, home = made
    found = forgetting(model, tokenizer)
    rows = encode_texts(tokenizer, None)
    assert max(map(len, rows)) <= 512  # else they would be read in windows
    base, tuned, forward, reverse = torch_figures(home, rows)
    assert found.loss.tuned is not None and found.loss.change is not None
    assert found.loss.base.estimate == pytest.approx(base, abs=1e-5)
    assert found.loss.tuned.estimate == pytest.approx(tuned, abs=1e-5)
    assert found.kl.estimate == pytest.approx(reverse, rel=1e-4)
    assert found.kl_reverse.estimate == pytest.approx(forward, rel=1e-4)
    record = found.to_dict()
    assert record["kl_tuned_base"]["estimate"] == found.kl.estimate
    assert record["kl_base_tuned"]["estimate"] == found.kl_reverse.estimate
    assert abs(forward - reverse) > 1e-3 * forward  # the two directions are told apart
    assert found.tokens == sum(len(row) - 1 for row in rows)
    assert found.kl.n == sum(-(-(len(row) - 1) // BLOCK) for row in rows)
    assert found.kl.low < found.kl.estimate < found.kl.high
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == found.to_dict()


def test_the_model_leaves_as_it_came_and_the_figures_repeat(made):
    model, tokenizer, _ = made
    tokens = random_tokens(1, 12)
    before = our_logits(model, tokens)
    first = forgetting(model, tokenizer, [*TEXTS[:2]])
    assert forgetting(model, tokenizer, [*TEXTS[:2]]) == first
    assert np.array_equal(our_logits(model, tokens), before)


def test_logits_exist_for_a_slice_of_the_positions_and_slices_change_nothing(made, monkeypatch):
    model, tokenizer, _ = made
    wanted = forgetting(model, tokenizer, [*TEXTS[:1]])
    widths: list[int] = []
    real = type(model).logits

    def seen(self: Any, hidden: mx.array) -> mx.array:
        widths.append(hidden.shape[0])
        return real(self, hidden)

    monkeypatch.setattr(type(model), "logits", seen)
    monkeypatch.setattr("mlx_qlora.adapters.drift.POSITIONS", 16)
    found = forgetting(model, tokenizer, [*TEXTS[:1]])
    assert max(widths) == 16
    assert found.kl.estimate == pytest.approx(wanted.kl.estimate, rel=1e-5)


def test_texts_longer_than_the_model_are_read_in_windows_that_predict_every_token_once(tmp_path):
    model, tokenizer = mq.load(write_model(tmp_path / "model", max_position_embeddings=50))
    mq.add_lora(model, mq.LoraConfig(r=4))
    n = len(encode_texts(tokenizer, [TEXTS[0]])[0])
    assert n > 100 and forgetting(model, tokenizer, [TEXTS[0]]).tokens == n - 1


def test_an_adapter_that_does_nothing_forgets_nothing(made):
    _, tokenizer, home = made
    model, _ = mq.load(home / "model")
    with pytest.raises(mq.ConfigError, match="no adapter that is on"):
        forgetting(model, tokenizer)
    mq.add_lora(model, mq.LoraConfig(r=4))  # B is zero
    found = forgetting(model, tokenizer)
    assert found.kl.estimate == 0 == found.kl_reverse.estimate
    assert found.loss.change is not None and found.loss.change.estimate == 0
    assert "little was forgotten" in found.sentence


def made_up(rise: float, half: float, method: str = STUDENTISED) -> Forgetting:
    def interval(x: float, half: float) -> Interval:
        return Interval(x, x - half, x + half, 40, method)

    base, after = float(np.log(12.1)), float(np.log(12.1 * (1 + rise)))
    change = interval(after - base, half)
    loss = Row("loss", LOWER, interval(base, half), interval(after, half), change)
    kl = interval(0.01, 0.001)
    return Forgetting(loss, perplexity_row(loss), kl, kl, 900, "the text")


def sentence(*how: Any) -> str:
    return made_up(*how).sentence


def test_the_verdict_follows_the_interval():
    assert "rose from 12.1 to 12.34 (+2 %" in sentence(0.02, 0.01)
    assert sentence(0.02, 0.01).endswith("little was forgotten")
    assert sentence(0.08, 0.01).endswith(": something was forgotten")
    assert sentence(0.5, 0.01).endswith("much was forgotten")
    longer = "a longer text would tell (evaluate --general FILE)"
    assert sentence(0.04, 0.03).endswith(f"little, perhaps something, was forgotten; {longer}")
    fell = sentence(-0.1, 0.01)
    assert "fell from" in fell and fell.endswith("little was forgotten")
    assert sentence(0.5, 0.0, NONE).endswith("the text is too short to be sure")
    degrees = [degree(x) for x in (0.049, 0.051, 0.119, 0.121)]
    assert degrees == ["little", "something", "something", "much"]
    words = "(+2 %, 95 % interval +0.99 to +3 %; 900 tokens), KL(tuned || base) is 0.01 nats per "
    assert words + "token, 0.009 to 0.011: little" in sentence(0.02, 0.01)


@pytest.mark.parametrize(
    ("rise", "verdict", "tone"),
    [
        (0.02, "Little was forgotten", "good"),
        (0.08, "Something was forgotten", "note"),
        (0.5, "Much was forgotten", "bad"),
    ],
)
def test_the_report_answers_what_was_forgotten(rise, verdict, tone):
    random, tokens = np.random.default_rng(0), np.full(40, 20)
    kl = paired_row("kl", NEITHER, [np.zeros(40), random.gamma(4, 1, 40)], tokens)
    answer = forgot(made_up(rise, 0.005), kl)
    assert (answer.verdict, answer.tone) == (verdict, tone)
    assert kl.tuned is not None
    assert f"On the held-out answers KL is {kl.tuned.estimate:.4g}, +" in answer.why
    assert ("training.kl_weight" in answer.why) == (tone != "good")


def test_a_file_s_paragraphs_are_its_texts(tmp_path, monkeypatch):
    file = tmp_path / "t.txt"
    file.write_text("one\ntwo\n\n\n\n three \n\n" + "\n\n".join("x" * 10 for _ in range(9)))
    assert read_texts(file)[:2] == ["one\ntwo", "three"]
    monkeypatch.setattr("mlx_qlora.after.forgetting.MOST_CHARACTERS", 40)
    kept = read_texts(file)
    assert len(kept) == 4 and kept[0] == "one\ntwo"
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(mq.ConfigError, match="cannot be read as text"):
        read_texts(tmp_path / "b")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(mq.ConfigError, match="cannot be read as text: it is no file"):
        read_texts(tmp_path / "pipe")
