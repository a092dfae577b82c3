"""Pairs, judged answers and weights: read as what they are, or refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.tiny_folder import write_rows

import mlx_qlora as mq
from mlx_qlora.data.batches import IGNORE, make_batches
from mlx_qlora.data.preferences import read_judgement, read_pair
from mlx_qlora.data.read import DataConfig
from mlx_qlora.data.rows import Chat, Instruction, Pair, read_row
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError

ASK, GOOD, BAD = (
    {"role": r, "content": c}
    for r, c in (("user", "Hi"), *[("assistant", x) for x in ("Ho", "No")])
)
CHAT = [Chat([ASK, answer], [False, True]) for answer in (BAD, GOOD)]
EARLIER = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PAIRS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "texts": (
        {"prompt": "a ", "chosen": "b", "rejected": "c"},
        [Pair("a ", "c"), Pair("a ", "b")],
    ),
    "an instruction": (
        {"instruction": "a", "input": "x", "chosen": "b", "rejected": "c"},
        [Instruction("a", "x", "c"), Instruction("a", "x", "b")],
    ),
    "messages": ({"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    "whole conversations": ({"chosen": [ASK, GOOD], "rejected": [ASK, BAD]}, CHAT),
    "whole conversations beside their question": (
        {"prompt": "Hi", "chosen": [ASK, GOOD], "rejected": [ASK, BAD], "score_chosen": 8.0},
        CHAT,
    ),
    "a question and messages": ({"prompt": "Hi", "chosen": [GOOD], "rejected": [BAD]}, CHAT),
    "LLaMA-Factory's": (
        {
            "conversations": [{"from": "human", "value": "Hi"}],
            "chosen": gpt("Ho"),
            "rejected": gpt("No"),
        },
        CHAT,
    ),
    "messages and texts": ({"messages": [ASK], "chosen": "Ho", "rejected": "No"}, CHAT),
    "OpenAI's": (
        {"input": {"messages": [ASK]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
        CHAT,
    ),
    "transcripts": (
        {"chosen": "Human: Hi Assistant: Hello", "rejected": "Human: Hi Assistant: Hey"},
        [Pair("Human: Hi Assistant: ", "Hey"), Pair("Human: Hi Assistant: ", "Hello")],
    ),
    "transcripts whose answers begin alike": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: I can",
            "rejected": "\n\nHuman: Hi\n\nAssistant: I do",
        },
        [Pair("\n\nHuman: Hi\n\nAssistant: ", x) for x in ("I do", "I can")],
    ),
    "an earlier answer": (
        {"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD], "system": "S"},
        [
            Chat([{"role": "system", "content": "S"}, *EARLIER, ASK, x], [False] * 4 + [True])
            for x in (BAD, GOOD)
        ],
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_its_rejected_side_and_its_chosen_one(name):
    row, wanted = PAIRS[name]
    assert read_pair(row, {}) == (wanted, set())


def test_what_a_pair_says_besides_is_counted():
    row = {"prompt": "a ", "chosen": "b", "rejected": "c", "completion": "d", "mood": "good"}
    assert read_pair(row, {}) == (PAIRS["texts"][1], {"completion", "mood"})
    row = {"messages": [ASK], "prompt": "p", "chosen": "Ho", "rejected": "No", "weight": 2}
    assert read_pair(row, {}) == (CHAT, {"prompt", "weight"})


NOT_PAIRS: dict[str, tuple[Any, str]] = {
    "an answer": (
        {"prompt": "a", "completion": "b"},
        "has no 'chosen' and no 'rejected'; set training.objective=sft",
    ),
    "half a pair": ({"prompt": "a", "chosen": "b"}, "field 'rejected' is missing"),
    "an empty side": ({"prompt": "a", "chosen": "b", "rejected": ""}, "field 'rejected' is empty"),
    "a judged answer": (
        {"prompt": "a", "completion": "b", "label": True},
        "is a labelled answer ('label'), not an answer; training.objective=kto reads",
    ),
    "twice the same": (
        {"prompt": "a", "chosen": "b", "rejected": "b"},
        "fields 'chosen' and 'rejected' are equal",
    ),
    "no text": (
        {"prompt": "a", "chosen": "b", "rejected": 7},
        "rejected[0] is not an object but int",
    ),
    "another question": (
        {"prompt": "What?", "chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
        "field 'prompt' differs from how both conversations begin",
    ),
    "no object": ([1], "not an object but list"),
}


@pytest.mark.parametrize("name", NOT_PAIRS)
def test_what_is_no_pair_says_why(name):
    row, reason = NOT_PAIRS[name]
    with pytest.raises(DataError) as caught:
        read_pair(row, {})
    assert str(caught.value).startswith(reason)


def test_columns_name_the_sides_of_a_pair():
    row = {"question": "a", "winner": "b", "loser": "c"}
    columns = {"instruction": "question", "chosen": "winner", "rejected": "loser"}
    wanted = [Instruction("a", "", "c"), Instruction("a", "", "b")]
    assert read_pair(row, columns) == (wanted, set())


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (
            {"question": "a", "better": "b", "worse": "c"},
            "{chosen: better, rejected: worse, instruction: question}",
        ),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "{chosen: choosen}"),
        ({"prompt": "a", "Chosen": "b", "Rejected": "c"}, "{chosen: Chosen, rejected: Rejected}"),
        (
            {"messages": [ASK], "winner": [GOOD], "loser": BAD},
            "{chosen: winner, rejected: loser}",
        ),
    ],
)
def test_a_pair_of_other_names_is_refused_with_the_columns_that_would_read_it(row, columns):
    with pytest.raises(DataError) as caught:
        read_pair(row, {})
    assert str(caught.value).endswith(f"; data.columns='{columns}' would read it")
    read_pair(row, yaml.safe_load(columns))


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "1", "0"])
def test_a_judged_answer_is_its_answer_and_its_label(label):
    row = {"prompt": "a", "completion": "b", "label": label}
    good = label in (True, "true", "1")
    assert read_judgement(row, "auto", {}) == (Pair("a", "b"), good, set())
    said = read_judgement({"messages": [ASK, GOOD], "kto_tag": label}, "auto", {})
    assert said == (CHAT[1], good, set())


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "field 'label' is missing"),
        (
            {"prompt": "a", "completion": "b", "label": "x"},
            "field 'label' must be true or false, not 'x'",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "is a preference pair ('chosen', 'rejected')",
        ),
    ],
)
def test_what_nobody_judged_is_refused(row, reason):
    with pytest.raises(DataError) as caught:
        read_judgement(row, "auto", {})
    assert str(caught.value).startswith(reason)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "is a preference pair ('chosen', 'rejected'), not an answer; "
            "training.objective=dpo, orpo or simpo reads it; ",
        ),
        (PAIRS["OpenAI's"][0], "is a preference pair ('preferred_output', 'non_preferred_output')"),
        (
            {"prompt": "a", "completion": "b", "label": 1},
            "is a labelled answer ('label'), not an answer; training.objective=kto reads it; ",
        ),
        (
            {"prompt": "a", "completions": ["b"], "labels": [True]},
            "is rewards for steps ('labels')",
        ),
    ],
)
def test_of_rows_for_sft_each_says_which_objective_reads_it(row, reason):
    with pytest.raises(DataError) as caught:
        read_row(row, "auto")
    assert str(caught.value).startswith(reason)


# ---- as tokens -----------------------------------------------------------------------------------


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_two_answers_are_documents_of_one_example(chatty: Tokenizer, tmp_path: Path):
    path = write(tmp_path / "rows.jsonl", [{"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]}])
    sides = [{"prompt": [ASK], "completion": [answer]} for answer in (BAD, GOOD)]
    alone = mq.read_examples(write(tmp_path / "sides.jsonl", sides), chatty)
    for config in (DataConfig(), DataConfig(cache_dir=None)):
        (pair,) = mq.read_examples(path, chatty, config, objective="dpo")
        for (tokens, learned, _), side in zip(pair.documents, alone):
            assert tokens.tolist() == side.tokens.tolist()
            assert learned.tolist() == side.learned.tolist()
        assert len(pair.documents) == 2 and pair.weights is None
    refused = "training.objective=dpo, orpo or simpo reads it"
    with pytest.raises(DataError, match=refused):  # the cache knows what it was read for
        mq.read_examples(path, chatty)


def test_a_bad_answer_has_negative_weights(tokenizer: Tokenizer, tmp_path: Path):
    rows = [{"prompt": "a", "completion": "b", "label": label} for label in (True, False)]
    path = write(tmp_path / "rows.jsonl", rows)
    for _ in range(2):  # read, and then from the cache
        good, bad = mq.read_examples(path, tokenizer, objective="kto")
        assert good.weights is None
        assert bad.weights.tolist() == (-1.0 * bad.learned).tolist()
    assert len({*mq.read_examples(path, tokenizer, objective="kto").contents.tolist()}) == 2


# ---- weights -------------------------------------------------------------------------------------


def weighed(tokenizer: Tokenizer, row: dict[str, Any], **config: Any) -> Any:
    (example,) = mq.read_examples([row], tokenizer, DataConfig(**config))
    return example


def test_weights_of_rows_messages_and_prompts_are_those_of_their_tokens(chatty: Tokenizer):
    turns = [ASK, {**GOOD, "weight": 0.5}, ASK, {**BAD, "loss_weight": 2}]
    plain = weighed(chatty, {"messages": [ASK, GOOD, ASK, BAD]})
    made = weighed(chatty, {"messages": turns, "weight": 3})
    assert made.tokens.tolist() == plain.tokens.tolist()
    assert made.learned.tolist() == plain.learned.tolist()
    assert {*made.weights[~plain.learned].tolist()} == {0.0}
    values = made.weights[plain.learned].tolist()
    assert values == sorted(values) and {*values} == {1.5, 6.0}
    prompted = weighed(chatty, {"messages": turns}, prompt_loss_weight=0.25)
    assert {*prompted.weights[1:][~plain.learned[1:]].tolist()} == {0.25}
    assert prompted.weights[0] == 0 and {*prompted.weights[plain.learned].tolist()} == {0.5, 2.0}


@pytest.mark.parametrize("field", [{"weight": 1}, {"loss_weight": 1.0}, {"train": True}])
def test_weights_of_one_are_none(chatty: Tokenizer, field):
    rows = [{"messages": [ASK, {**GOOD, **field}]}, {"messages": [ASK, GOOD], **field}]
    plain = mq.read_examples([{"messages": [ASK, GOOD]}], chatty)
    for row in rows:
        made = mq.read_examples([row], chatty)
        assert made[0].weights is None and made.digest == plain.digest


def test_of_all_tokens_answers_keep_their_weights(chatty: Tokenizer):
    made = weighed(chatty, {"messages": [ASK, {**GOOD, "weight": 0.5}]}, train_on="all")
    plain = weighed(chatty, {"messages": [ASK, GOOD]})
    assert {*made.weights[1:][~plain.learned[1:]].tolist()} == {1.0}
    assert {*made.weights[plain.learned].tolist()} == {0.5}
    assert weighed(chatty, {"messages": [ASK, GOOD]}, train_on="all").weights is None


@pytest.mark.parametrize("truncation", ["left-context", "right"])
def test_weights_are_cut_with_their_tokens(chatty: Tokenizer, truncation):
    row = {
        "messages": [
            {**ASK, "content": "a b c d e f g h"},
            {**GOOD, "content": "one two", "weight": 2},
        ]
    }
    whole = weighed(chatty, row, prompt_loss_weight=0.5)
    short = weighed(
        chatty, row, prompt_loss_weight=0.5, truncation=truncation, max_length=len(whole) - 2
    )
    if truncation == "right":
        wanted = whole.weights[: len(short)]
    else:
        kept = (
            np.r_[:1, 3 : len(whole)] if whole.tokens[0] == chatty.bos_id else np.r_[2 : len(whole)]
        )
        wanted = whole.weights[kept]
        wanted[0] = 0
    assert short.weights.tolist() == wanted.tolist()


def test_weights_are_numbers_in_text_too(chatty: Tokenizer, tmp_path: Path):
    rows = ["prompt,completion,weight,train", "a,b,0.5,true", "a,c,,", "a,d,0,", "a,e,1,False"]
    (tmp_path / "rows.csv").write_text("\n".join([*rows, 'a,f,"0,5",', "a,g,-1,"]))
    config = DataConfig(cache_dir=None, template="chat")
    examples = mq.read_examples(tmp_path / "rows.csv", chatty, config)
    report = examples.report
    assert [row.weights is None for row in examples] == [False, True]
    assert {*examples[0].weights[examples[0].learned].tolist()} == {0.5}
    reasons = {line: reason for line, reason in report.refused}
    assert reasons[4].startswith("no supervised token: the weight") and report.unread == {}
    assert reasons[5].startswith("no supervised token: the train")
    assert "must be at least 0; got '0,5'" in reasons[6] and "got -1.0" in reasons[7]
    columns = DataConfig(cache_dir=None, columns={"completion": "weight", "prompt": "prompt"})
    as_text = mq.read_examples([{"prompt": "a", "weight": "2"}], chatty, columns)
    assert as_text[0].weights is None and chatty.decode([as_text[0].tokens[-2]]) == "2"


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_refused(weight):
    with pytest.raises(DataError, match=r"messages\[1\] must be at least 0; got"):
        read_row({"messages": [ASK, {**GOOD, "weight": weight}]}, "auto")


def test_a_row_of_a_weight_that_is_none_is_refused(tokenizer: Tokenizer):
    with pytest.raises(DataError, match="the weight of the row must be at least 0; got -1"):
        mq.read_examples([{"text": "a", "weight": -1}], tokenizer)
    report = mq.read_examples([{"text": "a", "weight": "much"}], tokenizer).report
    assert report.unread == {"weight": 1}


def test_a_batch_has_the_weights_of_its_labels(chatty: Tokenizer):
    rows = [{"messages": [ASK, {**GOOD, "weight": w}]} for w in (1, 0.5)]
    examples = mq.read_examples(rows, chatty, DataConfig(prompt_loss_weight=0.1))
    batch = next(iter(make_batches(examples, 2, shuffle=False)))
    labels: Any = np.array(batch.labels)
    assert batch.weights is not None and batch.answers is not None
    assert ((batch.weights != 0) == (labels != IGNORE)).all()
    for row, example in enumerate(examples):
        n = len(example) - 1
        assert batch.weights[row, :n].tolist() == example.weights[1:].tolist()
        assert batch.answers[row, :n].tolist() == example.learned[1:].tolist()
    unweighted = mq.read_examples(rows[:1], chatty)
    batch = next(iter(make_batches(unweighted, 1)))
    assert batch.weights is None and batch.answers is None


def test_values_that_exclude_each_other_are_refused(tokenizer: Tokenizer, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"data.train_on=all gives prompts a weight of 1, and"):
        DataConfig(train_on="all", prompt_loss_weight=0.1)
    with pytest.raises(ConfigError, match=r"data.prompt_loss_weight must be at least 0"):
        DataConfig(prompt_loss_weight=-0.1)
    path = write_rows(tmp_path / "rows.jsonl", 3)
    with pytest.raises(ConfigError, match=r"data.train_on=all is for training.objective=sft"):
        mq.read_examples(path, tokenizer, DataConfig(train_on="all"), objective="dpo")
    with pytest.raises(ConfigError, match="objective must be one of 'sft', 'dpo'"):
        mq.read_examples(path, tokenizer, objective="ppo")
