"""Nothing of a row is dropped without a word: it is used, the row is refused, or it is counted.

Each table has the members of one kind of public bug report; any other belongs into it.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import pandas
import pyarrow
import pytest
from support import npm_tokenizers
from support.tiny_folder import CHAT

from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, DataError

Row = dict[str, Any]
# As Llama 3.1's, it writes no text beside a call, and no thoughts.
CALLING = CHAT.replace(
    "{{ m['content'] }}",
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}'
    "{% endfor %}{% else %}{{ m['content'] }}{% endif %}",
)
THINKING = CHAT.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m['content'] }}",
)
NAMING = CHAT.replace("|>{{ m['content'] }}", "{{ ' ' + m.name if m.name }}|>{{ m['content'] }}")
CUTTING = CHAT.replace("m['content']", "m['content'].split('</think>')[-1]")


def turn(role: str, content: Any, **fields: Any) -> Row:
    return {"role": role, "content": content, **fields}


def call(name: str, arguments: Any, **fields: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **fields}


ASK, ANSWER = turn("user", "What time is it?"), turn("assistant", "Noon.")


def chat(*turns: Row, **fields: Any) -> Row:
    return {"messages": [*turns], **fields}


def read(source: Any, tokenizer: Tokenizer, chat_template: str = "", **config: Any) -> Any:
    if chat_template:
        tokenizer = tokenizer.with_chat_template(chat_template)
    return read_examples(source, tokenizer, DataConfig(cache_dir=None, **config))


def texts(examples: Any, tokenizer: Tokenizer) -> list[str]:
    """Each row, with brackets around what is learned."""
    shown = []
    for example in examples:
        text, before = "", False
        for token, learned in zip([*example.tokens, None], [*example.learned.tolist(), False]):
            text += "[" * (learned and not before) + "]" * (before and not learned)
            text += "" if token is None else tokenizer.decode([token])
            before = learned
        shown.append(text.replace("<|bos|>", ""))
    return shown


def parts(*pieces: tuple[str, str]) -> list[Row]:
    return [{"type": kind, "value": text} for kind, text in pieces]


# ---- what is used --------------------------------------------------------------------------------

USED: dict[str, tuple[Row, str, str]] = {
    "system beside messages": (
        chat(ASK, ANSWER, system="Be brief."),
        "",
        "<|system|>Be brief.<|eos|><|user|>What time is it?<|eos|><|assistant|>[Noon.<|eos|>]",
    ),
    "system of an instruction": (
        {"instruction": "Go.", "output": "Gone.", "system": "Be brief."},
        "",
        "<|system|>Be brief.<|eos|><|user|>Go.<|eos|><|assistant|>[Gone.<|eos|>]",
    ),
    "system of a prompt": (
        {"prompt": "Go.", "completion": "Gone.", "system": "Be brief."},
        "",
        "<|system|>Be brief.<|eos|><|user|>Go.<|eos|><|assistant|>[Gone.<|eos|>]",
    ),
    "history of an instruction": (
        {"instruction": "And b?", "input": "", "output": "2", "history": [["a?", "1"]]},
        "",
        "<|user|>a?<|eos|><|assistant|>[1<|eos|>]<|user|>And b?<|eos|><|assistant|>[2<|eos|>]",
    ),
    "no history": ({"prompt": "a", "completion": "b", "history": []}, "", "a[b<|eos|>]"),
    "thoughts": (
        chat(ASK, {**ANSWER, "reasoning_content": "hm"}),
        THINKING,
        "<|user|>What time is it?<|eos|><|assistant|>[<think>hm</think>Noon.<|eos|>]",
    ),
    "the same thoughts in two fields": (
        chat(ASK, {**ANSWER, "reasoning": "hm", "reasoning_content": "hm"}),
        THINKING,
        "<|user|>What time is it?<|eos|><|assistant|>[<think>hm</think>Noon.<|eos|>]",
    ),
    "thoughts as a part": (
        chat(ASK, turn("assistant", parts(("reasoning", "hm"), ("text", "Noon.")))),
        THINKING,
        "<|user|>What time is it?<|eos|><|assistant|>[<think>hm</think>Noon.<|eos|>]",
    ),
    "the name of who speaks": (
        chat({**ASK, "name": "Eve"}, ANSWER),
        NAMING,
        "<|user Eve|>What time is it?<|eos|><|assistant|>[Noon.<|eos|>]",
    ),
    "parts with a value": (
        chat(turn("user", parts(("text", "Say "), ("text", "1."))), turn("assistant", "1!")),
        "",
        "<|user|>Say 1.<|eos|><|assistant|>[1!<|eos|>]",
    ),
    "a call as a part": (
        chat(ASK, turn("assistant", parts(("tool_call", '{"name": "time", "arguments": {}}')))),
        CALLING,
        '<|user|>What time is it?<|eos|><|assistant|>[{"name": "time", "parameters": {}}<|eos|>]',
    ),
    "a call as ShareGPT has it": (
        {
            "conversations": [
                {"from": "human", "value": "Warm?"},
                {"from": "function_call", "value": '{"name": "w", "arguments": {"city": "Oslo"}}'},
                {"from": "observation", "value": "1 C"},
                {"from": "gpt", "value": "No."},
            ]
        },
        CALLING,
        '<|user|>Warm?<|eos|><|assistant|>[{"name": "w", "parameters": {"city": "Oslo"}}<|eos|>]'
        "<|tool|>1 C<|eos|><|assistant|>[No.<|eos|>]",
    ),
    "an answer that is marked not to train": (
        chat(ASK, {**ANSWER, "loss_weight": 0.0}, ASK, {**ANSWER, "loss_weight": 1.0}),
        "",
        "<|user|>What time is it?<|eos|><|assistant|>Noon.<|eos|>"
        "<|user|>What time is it?<|eos|><|assistant|>[Noon.<|eos|>]",
    ),
    "what the template reads of a row": (
        chat(ASK, ANSWER, chat_template_kwargs={"short": True}),
        "{{ 'Be brief. ' if short }}" + CHAT,
        "Be brief. <|user|>What time is it?<|eos|><|assistant|>[Noon.<|eos|>]",
    ),
    "a system message that stands where the user speaks last": (  # as Mistral's template has it
        chat(turn("system", "Be brief."), ASK, ANSWER, turn("user", "b"), turn("assistant", "c")),
        "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}<|user|>"
        "{{ messages[0].content ~ ' ' if loop.last and messages[0].role == 'system' }}"
        "{{ m.content }}{{ eos_token }}<|assistant|>{% else %}{{ m.content }}{{ eos_token }}"
        "{% endif %}{% endfor %}",
        "<|user|>Be brief. What time is it?<|eos|><|assistant|>[Noon.<|eos|>]"
        "<|user|>What time is it?<|eos|><|assistant|>Noon.<|eos|>"
        "<|user|>Be brief. b<|eos|><|assistant|>[c<|eos|>]",
    ),
    "an argument that is read by its name": (
        chat(ASK, turn("assistant", None, tool_calls=[call("run", {"code": "1 + 1"})])),
        CALLING.replace("| tojson", ".code | tojson").replace(" .code", ".code"),
        '<|user|>What time is it?<|eos|><|assistant|>[{"name": "run", "parameters": "1 + 1"}'
        "<|eos|>]",
    ),
    "an argument that spells an end": (
        chat(ASK, turn("assistant", None, tool_calls=[call("run", {"code": "a<|eos|>b"})])),
        CALLING,
        '<|user|>What time is it?<|eos|><|assistant|>[{"name": "run", "parameters": '
        '{"code": "a<|eos|>b"}}<|eos|>]',
    ),
    "who judged the answer": (
        chat(ASK, ANSWER, reward_model="org/name"),
        "",
        "<|user|>What time is it?<|eos|><|assistant|>[Noon.<|eos|>]",
    ),
    "a null within the text of a call": (
        chat(ASK, turn("assistant", None, tool_calls=[call("time", '{"zone": null}')])),
        CALLING,
        '<|user|>What time is it?<|eos|><|assistant|>[{"name": "time", "parameters": '
        '{"zone": null}}<|eos|>]',
    ),
}


@pytest.mark.parametrize("name", USED)
def test_what_a_row_says_is_written(name: str, chatty: Tokenizer) -> None:
    row, template, expected = USED[name]
    examples = read([row], chatty, template)
    assert texts(examples, chatty) == [expected]
    assert examples.report.unread == {}


# ---- what is refused -----------------------------------------------------------------------------

NOT_WRITTEN = "the chat template does not write "
REFUSED: dict[str, tuple[Row, str, str]] = {
    "thoughts": (chat(ASK, {**ANSWER, "thinking": "hm"}), "", NOT_WRITTEN + "the thinking of"),
    "thoughts that the template cuts": (
        chat(ASK, turn("assistant", "<think>\nhm\n</think>\n\nNoon.")),
        CUTTING,
        NOT_WRITTEN + "the content before </think> of messages[1]",
    ),
    "a call whose name stands in the question": (
        chat(ASK, turn("assistant", None, tool_calls=[call("time", "{}")]), ASK, ANSWER),
        "",
        NOT_WRITTEN + "the call in messages[1]",
    ),
    "text beside a call that stands in the question": (
        chat(
            turn("user", "one moment"),
            turn("assistant", "one moment", tool_calls=[call("time", {})]),
        ),
        CALLING,
        NOT_WRITTEN + "what messages[1] (assistant) says",
    ),
    "the arguments of a call": (
        chat(ASK, turn("assistant", None, tool_calls=[call("time", {"zone": "x"})])),
        CALLING.replace(" | tojson }}", " and '' }}"),
        NOT_WRITTEN + "the arguments of the call in messages[1]",
    ),
    "a beginning that is cut off": (
        chat(ASK, turn("assistant", "Let me see.\n<answer>Noon.")),
        CHAT.replace("m['content']", "m['content'].split('<answer>')[-1]"),
        NOT_WRITTEN + "what messages[1] (assistant) says",
    ),
    "an end that is cut off": (
        chat(turn("user", "What time is it in the capital of Peru?"), ANSWER),
        CHAT.replace("m['content']", "m['content'][:20]"),
        NOT_WRITTEN + "what messages[0] (user) says",
    ),
    "the parameters of a tool": (
        chat(ASK, ANSWER, tools=[{"name": "f", "parameters": {"properties": {"a": {}}}}]),
        "{% for t in tools or [] %}{{ t.name }}{% endfor %}" + CHAT,
        NOT_WRITTEN + "the parameters of the tool 'f'",
    ),
    "a blank answer in a history": (
        {"instruction": "a", "output": "b", "history": [["q", " "]]},
        "",
        "field 'history' must be a list of pairs",
    ),
    "a row whose loss is off": (
        {"text": "a", "loss": False},
        "",
        "no supervised token: the loss of the row is False",
    ),
    "the second of two calls": (
        chat(ASK, turn("assistant", None, tool_calls=[call("time", {}), call("day", {})])),
        CALLING.replace("in m.tool_calls %}", "in m.tool_calls[:1] %}"),
        NOT_WRITTEN + "the call in messages[1]",
    ),
    "a tool whose name stands in the question": (
        chat(ASK, ANSWER, tools=[{"name": "time"}]),
        "",
        NOT_WRITTEN + "the tool 'time'",
    ),
    "an answer that stands in another": (
        chat(ASK, ANSWER, turn("tool", "Noon."), ASK, ANSWER),
        CHAT.replace("in messages %}", "in messages if m.role != 'tool' %}"),
        NOT_WRITTEN + "what messages[2] (tool) says",
    ),
    "arguments in which a field appears twice": (
        chat(ASK, turn("assistant", None, tool_calls=[call("w", '{"a": 1, "a": 2}')])),
        CALLING,
        "messages[1].tool_calls has arguments that are not JSON: field 'a' appears twice",
    ),
    "arguments with a number that JSON does not have": (
        chat(ASK, turn("assistant", None, tool_calls=[call("w", '{"limit": NaN}')])),
        CALLING,
        "arguments that are not JSON: NaN is no JSON number",
    ),
    "a call of ShareGPT that is no JSON": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "b"},
            ]
        },
        CALLING,
        "conversations[1] is a call that is not JSON",
    ),
    "a field of a call": (
        chat(ASK, turn("assistant", None, tool_calls=[call("w", {}, result="1 C")])),
        CALLING,
        "messages[1].tool_calls has an unknown field 'result'",
    ),
    "an image": (
        chat(turn("user", [{"type": "image_url", "image_url": {"url": "a"}}]), ANSWER),
        "",
        "part 0 of messages[0] is of type 'image_url'; only text can be learned",
    ),
    "a picture that is read already": (
        chat(ASK, ANSWER, image=b"\x89PNG"),
        "",
        "is more than text ('image')",
    ),
    "images beside": (chat(ASK, ANSWER, images=["a.png"]), "", "is more than text ('images')"),
    "a part without text": (
        chat(turn("user", [{"type": "text"}]), ANSWER),
        "",
        "part 0 of messages[0] has no 'text'",
    ),
    "a field of a part": (
        chat(turn("user", [{"type": "text", "text": "a", "voice": "b"}]), ANSWER),
        "",
        "part 0 of messages[0] has a field that no template reads: 'voice'",
    ),
    "a judged answer": (
        {"prompt": "a", "completion": "b", "label": False},
        "",
        "is a labelled answer ('label'), not an answer",
    ),
    "a judged chat": (chat(ASK, ANSWER, kto_tag=True), "", "is a labelled answer"),
    "a preference pair": (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        "",
        "is a preference pair ('chosen', 'rejected')",
    ),
    "a preference beside messages": (
        chat(ASK, ANSWER, rejected="c"),
        "",
        "is a preference pair ('rejected')",
    ),
    "rewards": (
        {"prompt": "a", "completion": "b", "reward_model": {"style": "rule"}},
        "",
        "is rewards for answers ('reward_model')",
    ),
    "classification": ({"text": "a", "label": 1}, "", "is classification ('label')"),
    "a row that is marked not to train": (
        {"prompt": "a", "completion": "b", "weight": 0},
        "",
        "no supervised token: the weight of the row is 0",
    ),
    "a system message that contradicts": (
        chat(turn("system", "a"), ASK, ANSWER, system="b"),
        "",
        "field 'system' differs from the system message",
    ),
    "a history that is none": (
        {"instruction": "a", "output": "b", "history": ["c"]},
        "",
        "field 'history' must be a list of pairs of a question and its answer",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_row_of_which_something_would_be_lost_is_refused(name: str, chatty: Tokenizer) -> None:
    row, template, reason = REFUSED[name]
    with pytest.raises(DataError) as caught:
        read([row], chatty, template)
    assert reason in str(caught.value)


def test_with_columns_it_is_the_user_who_says_which_answer_is_wanted(chatty: Tokenizer) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    examples = read([row], chatty, columns={"prompt": "prompt", "completion": "chosen"})
    assert texts(examples, chatty) == ["a[b<|eos|>]"]
    assert examples.report.unread == {"rejected": 1}


# ---- what is counted -----------------------------------------------------------------------------

COUNTED: dict[str, tuple[Row, dict[str, int]]] = {
    "another text": ({"instruction": "a", "output": "b", "text": "c"}, {"text": 1}),
    "the prompt of a chat": (chat(ASK, ANSWER, prompt="a"), {"prompt": 1}),
    "tools of an instruction": ({"instruction": "a", "output": "b", "tools": [1]}, {"tools": 1}),
    "options of a text": (
        {"text": "a", "chat_template_kwargs": {"b": 1}},
        {"chat_template_kwargs": 1},
    ),
    "long sources in a list": ({"text": "a", "sources": ["b" * 200]}, {"sources": 1}),
    "a long context among the facts": (
        {"text": "a", "metadata": {"context": "b" * 200}},
        {"metadata": 1},
    ),
    "a refusal beside an answer": (
        chat(ASK, {**ANSWER, "refusal": "No."}),
        {"messages[].refusal": 1},
    ),
    "options that the template does not read": (
        chat(ASK, ANSWER, chat_template_kwargs={"style": "short", "think": False}),
        {"chat_template_kwargs.style": 1, "chat_template_kwargs.think": 1},
    ),
    "an array of numpy's": ({"text": "a", "vector": numpy.ones(3)}, {"vector": 1}),
    "a long source": ({"text": "a", "source": "b" * 200}, {"source": 1}),
    "a label of an instruction": ({"instruction": "a", "output": "b", "label": "c"}, {"label": 1}),
    "a weight that is text": ({"text": "a", "weight": "0.5 kg"}, {"weight": 1}),
    "a field of a message": (chat({**ASK, "mood": "glad"}, ANSWER), {"messages[].mood": 1}),
    "the name of who speaks": (chat({**ASK, "name": "Eve"}, ANSWER), {"messages[].name": 1}),
    "a list in a message": (
        chat(ASK, {**ANSWER, "quotes": ["a"]}),
        {"messages[].quotes": 1},
    ),
    "harmless fields": (
        {
            "text": "a",
            "id": 7,
            "ID": 7,
            "score": 0.5,
            "source": "web",
            "meta": {"a": 1},
            "weight": 1,
        },
        {},
    ),
    "a reward": ({"prompt": "a", "completion": "b", "reward": -1.0}, {"reward": 1}),
    "no pair": (chat(ASK, ANSWER, rejected=False, image=0), {"rejected": 1, "image": 1}),
    "empty fields": ({"text": "a", "b": None, "c": "", "d": [], "e": {}}, {}),
    "harmless fields of a message": (
        chat({**ASK, "id": 1, "timestamp": 2}, {**ANSWER, "model": "x", "refusal": None}),
        {},
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_field_that_nothing_is_made_of_is_counted_by_name(name: str, chatty: Tokenizer) -> None:
    row, unread = COUNTED[name]
    examples = read([row, row], chatty)
    assert len(examples) == 2
    assert examples.report.unread == {field: 2 * n for field, n in unread.items()}
    for field in unread:
        shown = str(examples.report)
        assert "not used: field " in shown and f"field {field!r} in 2 rows" in shown
    if unread:
        with pytest.raises(DataError, match=r"data\.strict: rows: not used: field "):
            read([row], chatty, strict=True)
    else:
        assert read([row], chatty, strict=True)


def test_a_column_that_gives_way_to_another_is_counted(chatty: Tokenizer) -> None:
    row = {"question": "a", "answer": "b", "instruction": "As a pirate."}
    examples = read([row], chatty, columns={"instruction": "question", "output": "answer"})
    assert examples.report.unread == {"instruction": 1}
    swapped = {"instruction": "input", "input": "instruction"}
    row = {"instruction": "a", "input": "b", "output": "c"}
    assert read([row], chatty, columns=swapped).report.unread == {}


@pytest.mark.parametrize("field", ["input", "system", "tools"])
def test_an_optional_column_that_no_row_has_is_misspelt(
    field: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    path, columns = tmp_path / "rows.jsonl", {"instruction": "q", "output": "a", field: "misspelt"}
    path.write_text('{"q": "a", "a": "b", "spelt": "c"}\n' * 3)
    config = DataConfig(cache_dir=str(tmp_path / "cache"), columns=columns)
    for _ in range(2):  # anew, and from the cache
        with pytest.raises(ConfigError, match=f"no row of .* has 'misspelt', given as {field}"):
            read_examples(path, chatty, config)
    rows = [{"q": "a", "a": "b"}, {"q": "a", "a": "b", "c": "d"}]
    named = {"instruction": "q", "output": "a", "input": "c"}
    assert read(rows, chatty, columns=named).report.unread == {}


def test_all_cannot_be_learned_where_an_answer_is_marked(chatty: Tokenizer) -> None:
    marked = chat(ASK, {**ANSWER, "weight": 0}, ASK, ANSWER)
    with pytest.raises(DataError, match=r"marked not to be learned; leave out data\.train_on=all"):
        read([marked], chatty, train_on="all")


def test_fields_are_counted_by_workers_and_from_the_cache_too(
    chatty: Tokenizer, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "mood": "glad"}\n' * 3 + '{"text": 1, "mood": "sad"}\n')
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    for is_cached in (False, True):
        report = read_examples(path, chatty, config).report
        assert (report.cached, report.unread) == (is_cached, {"mood": 3})


# ---- one door ------------------------------------------------------------------------------------

CALLS = [
    chat(ASK, turn("assistant", "", tool_calls=[call("weather", {"city": "Oslo"})])),
    chat(ASK, turn("assistant", "", tool_calls=[call("stock", {"ticker": "ABC"})])),
]


def in_jsonl(rows: list[Row], folder: Path) -> Path:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "a.jsonl"


def in_json(rows: list[Row], folder: Path) -> Path:
    (folder / "a.json").write_text(json.dumps(rows))
    return folder / "a.json"


def an_array_in_jsonl(rows: list[Row], folder: Path) -> Path:
    (folder / "b.jsonl").write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    return folder / "b.jsonl"


def with_nulls(rows: list[Row], folder: Path) -> Path:
    """As `Dataset.to_json` writes rows."""
    datasets.Dataset.from_list(rows).to_json(folder / "c.jsonl")
    return folder / "c.jsonl"


def in_parquet(rows: list[Row], folder: Path) -> Path:
    datasets.Dataset.from_list(rows).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def saved_to_disk(rows: list[Row], folder: Path) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_in_parts(rows: list[Row], folder: Path) -> Path:
    parts = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows)}
    datasets.DatasetDict(parts).save_to_disk(folder / "parts")
    return folder / "parts"


DOORS: list[Any] = [
    lambda rows, _: rows,
    lambda rows, _: iter(rows),
    lambda rows, _: datasets.Dataset.from_list(rows),
    lambda rows, _: pandas.DataFrame(rows),
    lambda rows, _: pyarrow.Table.from_pylist(rows),
    lambda rows, _: {name: [row[name] for row in rows] for name in rows[0]},
    *(in_jsonl, in_json, an_array_in_jsonl, with_nulls, in_parquet, saved_to_disk, saved_in_parts),
]


@pytest.mark.parametrize("door", DOORS)
def test_the_same_rows_say_the_same_wherever_they_come_from(
    door: Any, chatty: Tokenizer, tmp_path: Path
) -> None:
    examples = read(door(CALLS, tmp_path), chatty, CALLING)
    assert [text.partition("assistant|>")[2] for text in texts(examples, chatty)] == [
        '[{"name": "weather", "parameters": {"city": "Oslo"}}<|eos|>]',
        '[{"name": "stock", "parameters": {"ticker": "ABC"}}<|eos|>]',
    ]


def test_a_table_with_holes_says_what_is_there(chatty: Tokenizer) -> None:
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "output": "e"}]
    frame = pandas.DataFrame(rows)  # has nan where the second row has no input
    assert texts(read(frame, chatty), chatty) == texts(read(rows, chatty), chatty)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ({"instruction": "a", "output": "b"}, "rows must be a list or a table, not one object of"),
        ({"text": ["a"], "id": [1, 2]}, "rows given as columns must be lists of the same length"),
        (
            datasets.DatasetDict({"train": datasets.Dataset.from_list([{"text": "a"}])}),
            "not one object of train; put a single row into a list, or name one of the parts",
        ),
    ],
)
def test_what_is_no_list_of_rows_is_refused(source: Any, reason: str, chatty: Tokenizer) -> None:
    with pytest.raises(DataError) as caught:
        read(source, chatty)
    assert reason in str(caught.value)


# ---- files that are something else ---------------------------------------------------------------

MISTAKEN: dict[str, tuple[str, bytes, str]] = {
    "objects over several lines": (
        "a.jsonl",
        b'{\n  "text": "a"\n}\n',
        "line 1: a JSON object continues on the next line; write each row on one line",
    ),
    "a pointer of Git LFS": (
        "a.parquet",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "is Git LFS's pointer to the file; run `git lfs pull`",
    ),
    "another format in between": (
        "a.jsonl",
        b'{"instruction": "a", "output": "b"}\n{"messages": []}\n',
        "line 2: is 'messages' in a file of 'alpaca' (",
    ),
    "rows that are arrays": ("a.jsonl", b'["a"]\n["b"]\n', "line 1 and 1 more: not an object"),
    "an Arrow file cut short": ("a.arrow", b"\xff\xff\xff\xff\x10", "is damaged"),
}


@pytest.mark.parametrize("name", MISTAKEN)
def test_a_file_that_is_something_else_is_named_as_that(
    name: str, chatty: Tokenizer, tmp_path: Path
) -> None:
    file, content, reason = MISTAKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(tmp_path / file, chatty, strict=True)
    assert reason in str(caught.value)


def test_records_of_datasets_are_no_rows(chatty: Tokenizer, tmp_path: Path) -> None:
    examples = read(saved_to_disk([{"text": "a"}], tmp_path), chatty)
    (file,) = examples.report.files
    assert file.name.endswith(".arrow") and file.refused == []


# ---- what a template adds ------------------------------------------------------------------------

UNASKED = "{{% if not add_generation_prompt %}}{}{{% endif %}}"
BREAK = CHAT.replace("{% for", "\n{{ bos_token }}{% for", 1)
ADDED: dict[str, tuple[str, str]] = {
    "a header whatever is asked": (
        CHAT.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", ""),
        "<|user|>a<|eos|><|assistant|>[b<|eos|>]",
    ),
    "a mark of the file's editor": ("\ufeff" + CHAT, "<|user|>a<|eos|><|assistant|>[b<|eos|>]"),
    "line breaks of another system": (
        CHAT.replace("{% if", "\r\n{% if") + "\r\n",
        "<|user|>a<|eos|><|assistant|>[b<|eos|>]",
    ),
    "words after the last answer": (
        CHAT + UNASKED.format("Bye."),
        "<|user|>a<|eos|><|assistant|>[b<|eos|>]",
    ),
    "a second end": (CHAT + UNASKED.format("<|eos|>"), "<|user|>a<|eos|><|assistant|>[b<|eos|>]"),
    "a break before the first token": (BREAK, "\n<|user|>a<|eos|><|assistant|>[b<|eos|>]"),
    "a line break after the end": (
        CHAT.replace("{{ eos_token }}", "{{ eos_token }}\n\n"),
        "<|user|>a<|eos|>\n\n<|assistant|>[b<|eos|>]",
    ),
}


@pytest.mark.parametrize("name", ADDED)
def test_what_a_template_adds_behind_the_answer_is_not_learned(
    name: str, chatty: Tokenizer
) -> None:
    template, expected = ADDED[name]
    assert texts(
        read([chat(turn("user", "a"), turn("assistant", "b"))], chatty, template), chatty
    ) == [expected]


@pytest.mark.parametrize("answer", ["a", "e", "is", "eos", "o", "<", "|", "<|", ">"])
def test_an_answer_that_its_end_or_the_next_header_spells_ends_where_it_ends(
    answer: str, chatty: Tokenizer
) -> None:
    always_asks = CHAT.replace("{% if add_generation_prompt %}", "").replace("{% endif %}", "")
    row = chat(turn("user", "q"), turn("assistant", answer))
    (text,) = texts(read([row], chatty, always_asks), chatty)
    assert text == f"<|user|>q<|eos|><|assistant|>[{answer}<|eos|>]"


@pytest.mark.parametrize("answer", ["of", "c", "e", "B", "<b>", "think"])
@pytest.mark.parametrize("thoughts", ["", "hm of e"])
def test_an_answer_of_r1_ends_where_it_ends(answer: str, thoughts: str) -> None:
    """Its template opens the thoughts, and cuts them from what was said."""
    r1 = npm_tokenizers.chat_tokenizer("r1")
    content = f"<think>\n{thoughts}\n</think>\n\n{answer}" if thoughts else answer
    (text,) = texts(read([chat(ASK, turn("assistant", content))], r1), r1)
    end = r1.decode([r1.eos_id])
    assert text.endswith(f"<think>\n[{thoughts}\n</think>\n\n{answer}{end}]")


def test_an_answer_may_end_where_the_next_turn_begins() -> None:
    """As in GLM-4: the header of the user is an end token."""
    qwen = npm_tokenizers.chat_tokenizer("qwen3")
    start = qwen.encode("<|im_start|>")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    glm = replace(qwen, eos_ids=frozenset([*start, qwen.eos_id]))
    row = chat(ASK, turn("assistant", "Noon."), turn("user", "And now?"), ANSWER)
    (text,) = texts(read([row], glm, template), glm)
    assert text == (
        "<|im_start|>user What time is it?<|im_start|>assistant [Noon.<|im_start|>]"
        f"user And now?<|im_start|>assistant [Noon.{qwen.decode([qwen.eos_id])}]"
    )


@pytest.mark.parametrize("thinks", [True, False])
def test_an_option_that_moves_what_is_learned_is_used(thinks: bool) -> None:
    qwen = npm_tokenizers.chat_tokenizer("qwen3")
    row = chat(ASK, ANSWER, chat_template_kwargs={"enable_thinking": thinks, "style": "short"})
    assert read([row], qwen).report.unread == {"chat_template_kwargs.style": 1}


def test_a_template_s_own_thoughts_are_closed_once(chatty: Tokenizer) -> None:
    """As in Nemotron's: an answer is asked for with <think>, and written after an empty thought."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ '<think></think>' if m.role == 'assistant' }}"
        "{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    )
    (text,) = texts(read([chat(ASK, ANSWER)], chatty, template), chatty)
    assert text.endswith("<|assistant|><think>\n[</think>Noon.<|eos|>]")


def test_a_template_s_file_writes_rows_with_tools_too(chatty: Tokenizer, tmp_path: Path) -> None:
    mine = tmp_path / "mine.jinja"
    mine.write_text("MINE {{ tools | tojson if tools }}" + CHAT)
    with_tools = replace(chatty, tool_template="MODEL'S {{ tools | tojson }}" + CHAT)
    row = chat(ASK, ANSWER, tools=[{"name": "f"}])
    (text,) = texts(read([row], with_tools, template=str(mine)), chatty)
    assert text.startswith('MINE [{"name": "f"}]<|user|>')


@pytest.mark.parametrize("template", ["auto", "alpaca", "chat"])
def test_messages_for_a_base_model_get_one_way_out(template: str, tokenizer: Tokenizer) -> None:
    with pytest.raises((DataError, ConfigError), match=r"name a file with (one|a chat)"):
        read([chat(ASK, ANSWER)], tokenizer, template=template)
