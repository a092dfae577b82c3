"""Rows of every format, and every reason to refuse one."""

import functools
import json
import shlex
from collections import UserDict
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlx_qlora.data import rows
from mlx_qlora.data.rows import Chat, Instruction, Pair, detect_format, read_row, with_system
from mlx_qlora.errors import DataError, UserError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": [1, "é"]}}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

nonempty = st.text(min_size=1).filter(str.strip)


def refusal(row: Any, form: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read_row(row, form)
    return str(caught.value)


def chat(*messages: Any, **fields: Any) -> Chat:
    said = read_row({"messages": list(messages), **fields}, "messages")
    assert isinstance(said, Chat)
    return said


# ---- which format ------------------------------------------------------------------------------

TELLING = [
    ("messages", ["messages"]),
    ("sharegpt", ["conversations"]),
    ("alpaca", ["instruction", "output"]),
    ("prompt_completion", ["prompt", "completion"]),
    ("text", ["text"]),
]


@given(st.sets(st.sampled_from([field for _, fields in TELLING for field in fields]), min_size=1))
def test_the_surest_field_of_a_row_tells_its_format(fields: set[str]) -> None:
    wanted = next(form for form, telling in TELLING if fields & set(telling))
    assert detect_format({field: None for field in fields} | {"id": 7}) == wanted


def test_a_row_of_no_format_says_which_there_are_and_what_it_has(monkeypatch) -> None:
    in_python = "mq.DataConfig(columns={'prompt': 'q 1', 'completion': 'a'}, template='chat') would"
    assert in_python in refusal({"q 1": "?", "a": ""})
    monkeypatch.setattr(UserError, "in_command", True)
    formats = "messages; conversations; instruction, output; prompt, completion; text"
    said = f"its fields are those of no format that is known: {formats} (it has: "
    assert refusal({"question": 1, "answer": 2}) == said + "'question', 'answer')"
    fix = "; if 'wir sagen' answers 'sie', data.columns='{prompt: sie, completion: wir sagen}' "
    fix += "data.template=chat would read it"
    assert refusal({"id": 1, "sie": "?", "wir sagen": ""}).endswith(fix)
    assert fix[:5] not in refusal({"sie": "?"})
    shop = {"Date": "1 May", "Topic": "gift", "Customer questions": "?", "Our reply": "Yes."}
    assert "'Our reply' answers 'Customer questions', data.columns=" in refusal(shop)
    assert "data.columns" not in refusal({**shop, "Our reply": None})  # whose answer is missing
    long = {"id": "7", "q": "How long is it?", "kind": "size", "a": "It is a metre long."}
    assert "if 'a' answers 'q', data.columns=" in refusal(long)  # the longest ones
    for names in (("x,y", "z"), ("c: d", "e"), ("1", "2"), ("[a", "b")):
        word = refusal(dict.fromkeys(names, "x")).partition("data.columns=")[2]
        (value,) = shlex.split(word.partition(" data.template")[0])
        assert yaml.safe_load(value) == dict(zip(("prompt", "completion"), names))
    assert refusal({}) == said + "none)"
    assert refusal({i: i for i in range(9)}) == said + "0, 1, 2, 3, 4, 5)"
    keys = {"a\nb": 1, "\ud800": 1, "\x1b[2J": 1, "\u2028": 1, "k" * 1_000_000: 1}
    shown = r"'a\nb', '\ud800', '\x1b[2J', '\u2028', '" + "k" * 39
    assert refusal(keys) == f"{said}{shown})"


def test_a_named_format_is_not_guessed() -> None:
    row = {"messages": [USER, ANSWER], "text": "all"}
    assert read_row(row, "text") == Pair("", "all")
    assert read_row(row, "auto") == Chat([USER, ANSWER], [False, True])


@pytest.mark.parametrize("row", [[1], "text", None, 3, True])
def test_a_row_that_is_no_object_is_refused(row: Any) -> None:
    assert refusal(row) == f"not an object but {type(row).__name__}"


def test_a_row_that_could_not_be_read_keeps_its_reason() -> None:
    assert refusal(DataError("not JSON: bad")) == "not JSON: bad"


# ---- texts -------------------------------------------------------------------------------------


@given(nonempty, st.text(), nonempty)
def test_texts_are_taken_as_they_are(first: str, middle: str, last: str) -> None:
    row = UserDict(instruction=first, input=middle, output=last, id=7)
    assert read_row(row, "alpaca") == Instruction(first, middle, last)
    pair = {"prompt": first, "completion": last}
    assert read_row(pair, "prompt_completion") == Pair(first, last)
    assert read_row({"text": last}, "text") == Pair("", last)


@pytest.mark.parametrize("more", [{}, {"input": None}, {"input": ""}])
def test_input_may_be_left_out(more: dict[str, Any]) -> None:
    row = {"instruction": "a", "output": "b", **more}
    assert read_row(row, "auto") == Instruction("a", "", "b")


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        ("alpaca", ["instruction", "output"]),
        ("prompt_completion", ["prompt", "completion"]),
        ("text", ["text"]),
    ],
)
def test_each_text_must_be_there_a_string_and_not_blank(form: str, fields: list[str]) -> None:
    for field in fields:
        row: dict[str, Any] = dict.fromkeys(fields, "x")
        for value, kind in [(1, "int"), ({}, "dict")]:
            reason = f"field {field!r} must be a string, not {kind}"
            assert refusal({**row, field: value}, form) == reason
        for value in ("", " \n\t"):
            assert refusal({**row, field: value}, form) == f"field {field!r} is empty"
        for missing in ({**row, field: None}, {k: v for k, v in row.items() if k != field}):
            assert refusal(missing, form) == f"field {field!r} is missing"


def test_input_must_be_a_string() -> None:
    row = {"instruction": "a", "input": ["x"], "output": "b"}
    assert refusal(row) == "field 'input' must be a string, not list"


# ---- messages ----------------------------------------------------------------------------------

roles = st.sampled_from(["system", "developer", "user", "assistant", "tool", "ipython"])
weights = st.sampled_from([None, 0, 1])


@given(st.lists(st.tuples(roles, nonempty, weights), min_size=1))
def test_a_chat_ends_at_the_last_message_of_the_assistant_that_has_a_weight(
    turns: list[tuple[str, str, int | None]],
) -> None:
    messages = [
        {"role": r, "content": c} | ({} if w is None else {"weight": w}) for r, c, w in turns
    ]
    learned = [role == "assistant" and weight != 0 for role, _, weight in turns]
    if not any(learned):
        unwanted = any(weight == 0 for _, _, weight in turns)
        why = "no answer is to be learned" if unwanted else "there is no answer"
        assert refusal({"messages": messages}) == f"no supervised token: {why}"
        return
    end = max(i for i, is_learned in enumerate(learned) if is_learned) + 1
    plain = [{"role": role, "content": content} for role, content, _ in turns]
    assert chat(*messages) == Chat(plain[:end], learned[:end])


@pytest.mark.parametrize("weight", [-1, float("nan"), "0", "1", "", [], {}])
@pytest.mark.parametrize("i", [0, 1])
def test_a_weight_below_0_or_none_is_refused(weight: Any, i: int) -> None:
    messages: list[Any] = [dict(USER), dict(ANSWER), USER, ANSWER]
    messages[i]["weight"] = weight
    reason = f"weight of messages[{i}] must be at least 0; got {weight!r}"
    assert refusal({"messages": messages}) == reason


@pytest.mark.parametrize("name", ["train", "training", "loss", "trainable", "masked"])
def test_a_mark_other_than_0_and_1_is_refused(name: str) -> None:
    messages = [USER, {**ANSWER, name: 0.5}]
    assert refusal({"messages": messages}) == f"{name} of messages[1] must be 0 or 1; got 0.5"


@pytest.mark.parametrize("role", ["system", "developer", "tool", "ipython"])
@pytest.mark.parametrize(
    ("fields", "content"),
    [({}, ""), ({"content": None}, ""), ({"content": []}, ""), ({"content": " \n"}, " \n")],
)
def test_what_the_system_or_a_tool_says_may_be_empty(
    role: str, fields: dict[str, Any], content: str
) -> None:
    said = chat({"role": role, **fields}, USER, ANSWER)
    assert said.messages == [{"role": role, "content": content}, USER, ANSWER]


def test_a_row_is_not_changed_by_reading_it() -> None:
    row = {"messages": [USER, {**ANSWER, "weight": 1, "tool_calls": [CALL], "name": None}]}
    before = json.dumps(row)
    read_row(row, "auto")
    assert json.dumps(row) == before


def test_more_fields_of_a_message_are_kept_for_the_template() -> None:
    said = chat({**USER, "name": "Ann"}, {**ANSWER, "reasoning_content": "hm"})
    thoughts = {"reasoning_content": "hm", "thinking": "hm"}  # templates read either
    assert said.messages == [{**USER, "name": "Ann"}, {**ANSWER, **thoughts}]


def test_the_text_parts_of_a_content_are_joined() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b", "image_url": None}]
    assert chat({"role": "user", "content": parts}, ANSWER).messages[0]["content"] == "a b"


def test_calls_get_their_arguments_as_an_object() -> None:
    text = {**CALL, "function": {"name": "add", "arguments": '{"a": [1, "\\u00e9"]}'}}
    bare = {"name": "add", "arguments": {"a": [1, "é"]}}
    wrapped = {"type": "function", "function": bare}
    for written, wanted in [(CALL, CALL), (text, CALL), (bare, wrapped)]:
        said = chat(USER, {"role": "assistant", "content": None, "tool_calls": [written]})
        assert said.messages[1] == {"role": "assistant", "content": "", "tool_calls": [wanted]}
    for empty in ({"arguments": ""}, {}):
        said = chat(USER, {**ANSWER, "tool_calls": [{"function": {"name": "now", **empty}}]})
        (call,) = said.messages[1]["tool_calls"]
        assert call == {"type": "function", "function": {"name": "now", "arguments": {}}}


def test_an_empty_list_of_calls_is_none() -> None:
    assert chat(USER, {**ANSWER, "tool_calls": []}).messages == [USER, ANSWER]
    assert refusal({"messages": [USER, {"role": "assistant", "tool_calls": []}]}) == (
        "messages[1] has no content (field 'content', or 'value')"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"conversations": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
)
def test_openai_s_old_fields_for_calls_are_refused(row: dict[str, Any]) -> None:
    reason = "has OpenAI's old field 'functions'; write 'tools'"
    assert refusal({**row, "functions": [TOOL["function"]]}) == reason
    wanted = read_row(row, "auto")
    for none in (None, []):
        assert read_row({**row, "functions": none}, "auto") == wanted
    *_, (field, messages) = row.items()
    for old in ({"name": "add", "arguments": "{}"}, "add", {}):
        called = {**row, field: [*messages[:-1], {**ANSWER, "function_call": old}]}
        assert refusal(called) == (
            f"{field}[{len(messages) - 1}] has OpenAI's old field 'function_call'; "
            "write 'tool_calls'"
        )
    called = {**row, field: [*messages[:-1], {**ANSWER, "function_call": None}]}
    assert read_row(called, "auto") == wanted


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])])
def test_tools_may_be_schemas_or_their_json_text(tools: Any) -> None:
    assert chat(USER, ANSWER, tools=tools).tools == [TOOL]


@pytest.mark.parametrize("none", [None, [], "", "[]", "null"])
def test_no_tools_are_none(none: Any) -> None:
    assert chat(USER, ANSWER, tools=none).tools is None
    assert chat(USER, ANSWER).tools is None


NO_SCHEMAS = "field 'tools' must be a list of JSON schemas, each with a name"


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("[", "field 'tools' is not JSON: Expecting value at column 2"),
        ("[" * 100_000, "field 'tools' is not JSON: nested too deeply"),
        *((value, NO_SCHEMAS) for value in ('{"a": 1}', {"a": 1}, ["add"], 7, [{}])),
        *(([{"function": value}], NO_SCHEMAS) for value in ("add", None)),
    ],
)
def test_other_tools_are_refused(tools: Any, reason: str) -> None:
    assert refusal({"messages": [USER, ANSWER], "tools": tools}) == reason
    assert refusal({"conversations": [USER, ANSWER], "tools": tools}) == reason


PART = "part 0 of messages[1]"
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("Hi", "messages[1] is not an object but str"),
        (None, "messages[1] is not an object but NoneType"),
        ({1: "a", **USER}, "messages[1] has a field whose name is not text"),
        (
            {"content": "a", "who": "b"},
            "messages[1] has no role (field 'role', or 'from'); rename its fields ('content', "
            "'who') to 'role' and 'content'",
        ),
        ({}, "messages[1] has no role (field 'role', or 'from')"),
        ({"role": "", "content": "a"}, "messages[1] has no role (field 'role', or 'from')"),
        ({"role": ["user"], "content": "a"}, "messages[1] has no role (field 'role', or 'from')"),
        ({"role": "user"}, "messages[1] has no content (field 'content', or 'value')"),
        ({**USER, "content": " \n"}, "messages[1] has no content (field 'content', or 'value')"),
        ({**USER, "content": []}, "messages[1] has no content (field 'content', or 'value')"),
        ({**ANSWER, "content": ""}, "messages[1] has no content (field 'content', or 'value')"),
        ({**USER, "content": 5}, "messages[1] must have text as content, not int"),
        ({**USER, "content": {"a": 1}}, "messages[1] must have text as content, not dict"),
        ({**USER, "content": [IMAGE]}, f"{PART} is of type 'image_url'; only text can be learned"),
        ({**USER, "content": ["a"]}, f"{PART} is not an object but str"),
        ({**USER, "content": [{"type": "text"}]}, f"{PART} has no 'text'"),
        (
            {**USER, "content": [{"type": ["text"], "text": "a"}]},
            f"{PART} is of type \"['text']\"; only text can be learned",
        ),
        ({**ANSWER, "tool_calls": "add"}, "messages[1].tool_calls must be a list of calls"),
        ({**ANSWER, "tool_calls": ["add"]}, "messages[1].tool_calls has a call without a name"),
        ({**ANSWER, "tool_calls": [{}]}, "messages[1].tool_calls has a call without a name"),
        (
            {**ANSWER, "tool_calls": [{"name": "add", "arguments": "{a"}]},
            "messages[1].tool_calls has arguments that are not JSON: Expecting property name "
            "enclosed in double quotes at column 2",
        ),
        (
            {**ANSWER, "tool_calls": [{"name": "add", "arguments": "[" * 100_000}]},
            "messages[1].tool_calls has arguments that are not JSON: nested too deeply",
        ),
        (
            {**ANSWER, "tool_calls": [{"name": "add", "arguments": "[1]"}]},
            "messages[1].tool_calls has arguments that are not an object",
        ),
    ],
)
def test_a_message_that_cannot_be_used_is_named_by_its_place(message: Any, reason: str) -> None:
    assert refusal({"messages": [USER, message, ANSWER]}) == reason


@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_field_of_messages_must_be_a_list_of_some(field: str) -> None:
    form = {"messages": "messages", "conversations": "sharegpt"}[field]
    assert refusal({}, form) == refusal({field: None}, form) == f"field {field!r} is missing"
    assert refusal({field: []}, form) == f"field {field!r} is empty"
    for value, kind in [("Hi", "str"), ({"role": "user"}, "dict")]:
        assert refusal({field: value}, form) == (
            f"field {field!r} must be a list of messages, not {kind}"
        )


# ---- ShareGPT, and roles -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("chatgpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("assistant", "assistant"),
        ("function", "tool"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("ipython", "ipython"),
        ("system", "system"),
        ("developer", "developer"),
        ("Human", "user"),
        ("GPT", "assistant"),
        ("ASSISTANT", "assistant"),
        ("System", "system"),
    ],
)
def test_the_names_of_sharegpt_become_roles(name: str, role: str) -> None:
    row = {"conversations": [{"from": name, "value": "a"}, {"from": "gpt", "value": "b"}]}
    said = read_row(row, "auto")
    assert said == Chat(
        [{"role": role, "content": "a"}, {"role": "assistant", "content": "b"}],
        [role == "assistant", True],
    )


@pytest.mark.parametrize("role", ["narrator", "Critic", "users", "r" * 50])
def test_a_role_that_no_template_knows_is_refused(role: str) -> None:
    known = "rename it to one of system, developer, user, assistant, tool, ipython"
    reason = f"has the unknown role {role.lower()[:40]!r}; {known}"
    turn = {"role": role, "content": "a"}
    assert refusal({"messages": [USER, turn, ANSWER]}) == f"messages[1] {reason}"
    turn = {"from": role, "value": "a"}
    assert refusal({"conversations": [turn, ANSWER]}) == f"conversations[0] {reason}"


def test_system_and_tools_may_stand_beside_a_conversation() -> None:
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": None}]
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"conversations": turns, "system": "Be brief.", "tools": json.dumps([TOOL])}
    system = {"role": "system", "content": "Be brief."}
    assert read_row(row, "auto") == Chat([system, *plain], [False, False, True], [TOOL])
    for none in ("", None):
        assert read_row({"conversations": turns, "system": none}, "auto") == Chat(
            plain, [False, True]
        )
    reason = "field 'system' must be a string, not int"
    assert refusal({"conversations": turns, "system": 1}) == reason


def test_a_system_message_and_a_field_beside_it_must_agree() -> None:
    turns = [{"from": "system", "value": "Be brief."}, USER, ANSWER]
    system = {"role": "system", "content": "Be brief."}
    for field in ({}, {"system": "Be brief."}, {"system": ""}):
        wanted = Chat([system, USER, ANSWER], [False, False, True])
        assert read_row({"conversations": turns, **field}, "auto") == wanted
    reason = "field 'system' differs from the system message"
    assert refusal({"conversations": turns, "system": "Be long."}) == reason


def test_a_conversation_may_use_the_other_field_names() -> None:
    row = {"conversations": [USER, ANSWER]}
    assert read_row(row, "sharegpt") == Chat([USER, ANSWER], [False, True])
    row = {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}
    assert read_row(row, "messages") == Chat([USER, ANSWER], [False, True])


# ---- prompt and completion as messages ---------------------------------------------------------


def test_of_a_prompt_of_messages_only_the_completion_is_learned() -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, ANSWER], "tools": [TOOL]}
    assert read_row(row, "auto") == Chat(
        [USER, ANSWER, USER, ANSWER, USER, ANSWER], [False, False, False, True, False, True], [TOOL]
    )


def test_a_completion_without_an_answer_is_refused() -> None:
    reason = "no supervised token: no answer is to be learned"
    assert refusal({"prompt": [USER, ANSWER], "completion": [USER]}) == reason


def test_a_text_beside_a_list_of_messages_is_refused() -> None:
    assert refusal({"prompt": [USER], "completion": "Ho"}) == (
        "field 'completion' must be a list of messages, not str"
    )
    assert refusal({"prompt": "Hi", "completion": [ANSWER]}) == (
        "field 'prompt' must be a list of messages, not str"
    )
    assert refusal({"prompt": [USER]}) == "field 'completion' is missing"


# ---- fields of other names ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "said"),
    [
        (
            {"question": "a", "answer": "b", "text": "c"},
            {"instruction": "question", "output": "answer"},
            Instruction("a", "", "b"),
        ),
        ({"input": "a", "output": "b"}, {"output": "input", "instruction": "output"}, None),
        ({"q": "a", "r": "b"}, {"prompt": "q", "completion": "r"}, Pair("a", "b")),
        ({"body": "a", "messages": [USER]}, {"text": "body", "messages": "gone"}, "field 'gone'"),
        ({"turns": [USER, ANSWER]}, {"messages": "turns"}, Chat([USER, ANSWER], [False, True])),
        (
            {"turns": [USER, ANSWER]},
            {"conversations": "turns"},
            Chat([USER, ANSWER], [False, True]),
        ),
        ({"q": "a", "r": " "}, {"instruction": "q", "output": "r"}, "field 'r' is empty"),
        ({"q": "a", "r": 1}, {"instruction": "q", "output": "r"}, "field 'r' must be a string"),
    ],
)
def test_columns_say_which_field_of_a_row_is_which(
    row: dict[str, Any], columns: dict[str, str], said: Any
) -> None:
    if isinstance(said, str):
        with pytest.raises(DataError, match=said):
            read_row(row, "auto", columns)
    else:
        assert read_row(row, "auto", columns) == (said or Instruction("b", "", "a"))


def test_a_column_that_may_be_empty_may_be_missing() -> None:
    columns = {"instruction": "q", "output": "r", "input": "more", "system": "role"}
    assert read_row({"q": "a", "r": "b"}, "auto", columns) == Instruction("a", "", "b")


def test_a_system_message_of_a_row_makes_a_chat_of_it() -> None:
    columns = {"instruction": "q", "input": "about", "output": "r", "system": "role"}
    said = read_row({"q": "a", "about": "c", "r": "b", "role": "Be brief."}, "auto", columns)
    turns = [("system", "Be brief."), ("user", "a\n\nc"), ("assistant", "b")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert said == Chat(messages, [False, False, True])
    assert read_row({"messages": messages[1:], "system": "Be brief."}, "auto") == said


def test_a_system_message_of_all_rows_is_that_of_rows_without_one() -> None:
    own = Chat([{"role": "system", "content": "Be long."}, USER, ANSWER], [False, False, True])
    assert with_system(own, "Be brief.") == own
    assert with_system(Pair("a", "b"), None) == Pair("a", "b")
    said = with_system(Chat([USER, ANSWER], [False, True], [TOOL]), "Be brief.")
    brief = {"role": "system", "content": "Be brief."}
    assert said == Chat([brief, USER, ANSWER], [False, False, True], [TOOL])
    with pytest.raises(DataError, match="a text has no place for a system message"):
        with_system(Pair("", "b"), "Be brief.")


@pytest.mark.parametrize(
    ("row", "proposed"),
    [
        ({"question": "a", "answer": "b"}, "{instruction: question, output: answer}"),
        ({"Question": "a", "Answer": "b"}, "{instruction: Question, output: Answer}"),
        (
            {"instruction": "a", "context": "c", "response": "b"},
            "{output: response, input: context}",
        ),
        ({"prompt": "a", "response": "b"}, "{instruction: prompt, output: response}"),
        ({"dialog": [USER, ANSWER]}, "{messages: dialog}"),
        ({"content": "a"}, "{text: content}"),
        (
            {"system_prompt": "s", "query": "a", "solution": "b"},
            "{instruction: query, output: solution, system: system_prompt}",
        ),
    ],
)
def test_a_row_of_other_names_is_refused_with_the_columns_that_would_read_it(
    row: dict[str, Any], proposed: str
) -> None:
    reason = refusal(row)
    assert reason.endswith(f"; data.columns='{proposed}' would read it")
    read_row(row, "auto", yaml.safe_load(proposed))


def test_no_columns_are_proposed_for_what_no_columns_would_mend() -> None:
    for row in ({"a": "b"}, {"prompt": "a", "completion": " "}, {"question": "a", "answer": 2}):
        assert "data.columns" not in refusal(row)


def test_names_that_many_rows_share_are_compared_once(monkeypatch):
    """And not all of a million: what is unknown is said all the same."""
    compared: list[int] = []
    find = functools.cache(lambda *given: compared.append(len(given[1])) or [])
    monkeypatch.setattr(rows, "close_matches", find)
    row = {f"shared {i}": "a" for i in range(5000)}
    for _ in range(100):
        with pytest.raises(DataError, match="of no format that is known"):
            read_row(row, "auto")
    assert 0 < len(compared) < 20 and max(compared) <= 1000
