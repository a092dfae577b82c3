"""What a row says as text, byte for byte, and which stretches of it are learned."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_folder import CHAT, write_tokenizer

from mlx_qlora.data.rows import Chat, Instruction, Pair, Segments, Template, alpaca_prompt, read_row
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import DataError

WITH = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
WITHOUT = "### Instruction:\n{instruction}\n\n### Response:\n{output}"
# Writes an earlier answer without its thoughts, as Qwen 3 does; MARKED says where answers are.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content.split('\\n')[-1] }};"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = FORGETFUL.replace("{{ m.content if", "{% generation %}{{ m.content if").replace(
    "[-1] }};", "[-1] }};{% endgeneration %}"
)
MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two."}]
TURNS = [
    ("system", "s"),
    ("user", "u"),
    ("assistant", "t\na"),
    ("user", "v"),
    ("assistant", "w\nb"),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))


def chat(*turns: tuple[str, str], learned: list[bool] | None = None, tools: Any = None) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Chat(messages, learned or [role == "assistant" for role, _ in turns], tools)


def merged(segments: Segments) -> Segments:
    """Neighbours of one kind joined, empty ones left out."""
    joined: Segments = []
    for text, learned in segments:
        if joined and joined[-1][1] == learned:
            joined[-1] = (joined[-1][0] + text, learned)
        elif text:
            joined.append((text, learned))
    return joined


# ---- alpaca ------------------------------------------------------------------------------------


def alpaca(row: dict[str, Any], tokenizer: Tokenizer) -> Segments:
    return Template("auto", None).segments(read_row(row, "alpaca"), tokenizer)


def fill(form: str, **texts: str) -> str:
    """Fills a form in one pass, so that texts which hold `{input}` stay as they are."""
    parts = []
    for piece in form.replace("}", "{").split("{"):
        parts.append(texts.get(piece, piece))
    return "".join(parts)


@settings(deadline=None)
@given(st.text(), st.text(min_size=1), st.text())
def test_a_row_is_exactly_one_of_the_two_forms(
    tokenizer: Tokenizer, instruction: str, input: str, output: str
) -> None:
    instruction, output = "x" + instruction, "y" + output
    row = {"instruction": instruction, "input": input, "output": output}
    whole = fill(WITH, **row)
    assert alpaca(row, tokenizer) == [
        (whole[: len(whole) - len(output)], False),
        (output, True),
    ]
    row = {"instruction": instruction, "output": output}
    assert "".join(text for text, _ in alpaca(row, tokenizer)) == fill(WITHOUT, **row)


@pytest.mark.parametrize(
    "text", ["{input}", "{}", "{0}", "{{", "%s", "$x", "{instruction!r}", "\\n"]
)
def test_braces_and_other_marks_are_text(tokenizer: Tokenizer, text: str) -> None:
    row = {"instruction": text, "input": text, "output": text}
    assert alpaca(row, tokenizer) == [
        (f"### Instruction:\n{text}\n\n### Input:\n{text}\n\n### Response:\n", False),
        (text, True),
    ]
    assert merged(Template("chat", CHAT).segments(Pair(text, text), tokenizer)) == [
        (f"<|user|>{text}<|eos|><|assistant|>", False),
        (f"{text}<|eos|>", True),
    ]


@pytest.mark.parametrize("input", ["", None, ...])
def test_a_row_without_input_leaves_the_whole_block_out(tokenizer: Tokenizer, input: Any) -> None:
    row = {"instruction": "Say hi.", "input": input, "output": "Hi."}
    if input is ...:
        del row["input"]
    assert alpaca(row, tokenizer) == [
        ("### Instruction:\nSay hi.\n\n### Response:\n", False),
        ("Hi.", True),
    ]


def test_the_prompt_of_training_is_the_prompt_of_asking(tokenizer: Tokenizer) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert alpaca(row, tokenizer)[0] == (alpaca_prompt("Add.", "1 2"), False)
    assert alpaca_prompt("Add.") == "### Instruction:\nAdd.\n\n### Response:\n"


def test_whitespace_is_kept(tokenizer: Tokenizer) -> None:
    row = {"instruction": " a\n", "input": " ", "output": "\tb "}
    assert alpaca(row, tokenizer) == [
        ("### Instruction:\n a\n\n\n### Input:\n \n\n### Response:\n", False),
        ("\tb ", True),
    ]


# ---- which template writes what ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "alpaca"])
def test_instructions_and_texts_are_written_without_the_chat_template(
    tokenizer: Tokenizer, name: str
) -> None:
    plain = Template(name, CHAT)
    assert plain.segments(Instruction("a", "", "b"), tokenizer) == [
        (alpaca_prompt("a"), False),
        ("b", True),
    ]
    assert plain.segments(Pair(" a ", "b\n"), tokenizer) == [(" a ", False), ("b\n", True)]
    assert plain.segments(Pair("", "all of it"), tokenizer) == [("", False), ("all of it", True)]


@pytest.mark.parametrize("name", ["auto", "chat"])
def test_messages_are_written_by_the_chat_template(tokenizer: Tokenizer, name: str) -> None:
    said = chat(("user", "a"), ("assistant", "b"))
    assert merged(Template(name, CHAT).segments(said, tokenizer)) == [
        ("<|user|>a<|eos|><|assistant|>", False),
        ("b<|eos|>", True),
    ]


@pytest.mark.parametrize(
    ("said", "question", "answer"),
    [
        (Instruction("Add.", "1 2", "3"), "Add.\n\n1 2", "3"),
        (Instruction("Say hi.", "", "Hi."), "Say hi.", "Hi."),
        (Pair("a", "b"), "a", "b"),
    ],
)
def test_a_named_chat_template_writes_a_question_and_its_answer(
    tokenizer: Tokenizer, said: Instruction | Pair, question: str, answer: str
) -> None:
    assert merged(Template("chat", CHAT).segments(said, tokenizer)) == [
        (f"<|user|>{question}<|eos|><|assistant|>", False),
        (f"{answer}<|eos|>", True),
    ]


def test_a_plain_text_stays_plain_under_a_chat_template(tokenizer: Tokenizer) -> None:
    said = Pair("", "all of it")
    assert Template("chat", CHAT).segments(said, tokenizer) == [("", False), ("all of it", True)]


def test_the_template_of_the_recipe_counts_and_not_the_model_s(tokenizer: Tokenizer) -> None:
    assert tokenizer.chat_template == CHAT
    own = CHAT.replace("<|", "<").replace("|>", ">")
    assert merged(Template("chat", own).segments(Pair("a", "b"), tokenizer)) == [
        ("<user>a<|eos|><assistant>", False),
        ("b<|eos|>", True),
    ]
    with pytest.raises(DataError, match="the model has no chat template"):
        Template("auto", None).segments(chat(("user", "a"), ("assistant", "b")), tokenizer)
    with pytest.raises(DataError, match="alpaca cannot write messages; set"):
        Template("alpaca", CHAT).segments(chat(("user", "a"), ("assistant", "b")), tokenizer)


# ---- chats -------------------------------------------------------------------------------------


@st.composite
def chats(draw: Any) -> Chat:
    """Any roles in any order, some answers not to be learned."""
    roles = draw(st.lists(st.sampled_from(["user", "assistant", "tool"]), max_size=6))
    turns = [(role, draw(st.text(max_size=8))) for role in [*roles, "assistant"]]
    learned = [role == "assistant" and draw(st.booleans()) for role, _ in turns[:-1]]
    return chat(*turns, learned=[*learned, True])


@settings(deadline=None)
@given(chats())
def test_answers_and_the_ends_of_their_turns_are_learned_and_nothing_else(
    tokenizer: Tokenizer, said: Chat
) -> None:
    expected: Segments = []
    for message, learned in zip(said.messages, said.learned):
        head, body = f"<|{message['role']}|>", message["content"] + "<|eos|>"
        expected += [(head, False), (body, learned)]
    segments = Template("chat", CHAT).segments(said, tokenizer)
    assert merged(segments) == merged(expected)
    whole = tokenizer.render_chat(said.messages)
    assert "".join(text for text, _ in segments) == whole


@pytest.mark.parametrize("answer", ["b", "A", "Apple", " A", "<|assistant|>", "<"])
def test_a_chat_may_begin_with_an_answer(tokenizer: Tokenizer, answer: str) -> None:
    source = "{{ raise_exception('no message') if not messages }}" + CHAT
    said = chat(("assistant", answer), ("user", "go on"), ("assistant", "c"))
    assert merged(Template("chat", source).segments(said, tokenizer)) == [
        ("<|assistant|>", False),
        (f"{answer}<|eos|>", True),
        ("<|user|>go on<|eos|><|assistant|>", False),
        ("c<|eos|>", True),
    ]


def test_what_a_template_writes_behind_the_last_answer_is_no_part_of_the_row(
    tokenizer: Tokenizer,
) -> None:
    marked = MARKED + "(end)"
    segments = merged(Template("chat", marked).segments(chat(*TURNS), tokenizer))
    assert segments[-1] == ("w\nb;", True)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        (
            (True, True, True),
            [
                ("[system]s;[user]u;[assistant]", False),
                ("a;", True),
                ("[user]v;[assistant]", False),
                ("b;", True),
                ("[user]x;[assistant]", False),
                ("y\nc;", True),
            ],
        ),
        (
            (False, True, True),
            [
                ("[system]s;[user]u;[assistant]a;[user]v;[assistant]", False),
                ("b;", True),
                ("[user]x;[assistant]", False),
                ("y\nc;", True),
            ],
        ),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_followed_by_its_markers(
    tokenizer: Tokenizer, learned: tuple[bool, ...], expected: Segments
) -> None:
    turns = [*TURNS, ("user", "x"), ("assistant", "y\nc")]
    answers = iter(learned)
    said = chat(*turns, learned=[role == "assistant" and next(answers) for role, _ in turns])
    for source in (MARKED, MARKED.replace("{% generation", "{%- generation")):
        assert merged(Template("chat", source).segments(said, tokenizer)) == expected


def test_without_markers_such_a_template_is_refused_but_for_single_answers(
    tokenizer: Tokenizer,
) -> None:
    template = Template("chat", FORGETFUL)
    with pytest.raises(DataError, match="where the answers begin cannot be known"):
        template.segments(chat(*TURNS), tokenizer)
    assert merged(template.segments(chat(*TURNS[:3]), tokenizer)) == [
        ("[system]s;[user]u;[assistant]", False),
        ("t\na;", True),
    ]
    last_alone = chat(*TURNS, learned=[False] * 4 + [True])
    assert merged(template.segments(last_alone, tokenizer))[-1] == ("w\nb;", True)


def test_an_answer_that_does_not_begin_as_it_is_asked_for_is_refused(tokenizer: Tokenizer) -> None:
    source = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(DataError, match="where the answers begin cannot be known"):
        Template("chat", source).segments(Pair("a", "b"), tokenizer)
    segments = Template("chat", source).segments(Pair("a", "<think>b"), tokenizer)
    assert segments[-1] == ("b<|eos|>", True)


def test_markers_for_another_number_of_answers_are_refused(tokenizer: Tokenizer) -> None:
    once = MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content[-1] }};{% endif %}"
    )
    with pytest.raises(DataError, match="marks 1 answers of the 2 there are"):
        Template("chat", once).segments(chat(*TURNS), tokenizer)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{% for", "the chat template refuses it: "),
        ("{{ messages[9].content }}", "the chat template refuses it: "),
        ("{{ messages.__class__.__mro__ }}", "the chat template refuses it: "),
    ],
)
def test_a_refusal_of_the_template_is_the_row_s(
    tokenizer: Tokenizer, source: str, words: str
) -> None:
    with pytest.raises(DataError) as caught:
        Template("chat", source).segments(Pair("a", "b"), tokenizer)
    assert words in str(caught.value)


def test_a_template_that_asks_for_the_day_always_gets_the_same(tokenizer: Tokenizer) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + CHAT
    segments = merged(Template("chat", source).segments(Pair("a", "b"), tokenizer))
    assert segments[0] == ("26 Jul 2024<|user|>a<|eos|><|assistant|>", False)


def test_tools_and_special_tokens_reach_the_template(tokenizer: Tokenizer) -> None:
    source = "{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    said = chat(("user", "a"), ("assistant", "b"), tools=[{"name": "f<>"}])
    assert merged(Template("chat", source).segments(said, tokenizer)) == [
        ('<|bos|>[{"name": "f<>"}]<|user|>a<|eos|><|assistant|>', False),
        ("b<|eos|>", True),
    ]


def test_a_call_of_a_tool_is_learned_and_what_the_tool_says_is_not(tokenizer: Tokenizer) -> None:
    """The words in which Llama 3.1's template writes a call."""
    source = (
        "{%- for m in messages %}{{ '<|' + m.role + '|>' }}"
        "{%- if 'tool_calls' in m %}{%- set call = m.tool_calls[0].function %}"
        """{{- '{"name": "' + call.name + '", "parameters": ' }}"""
        "{{- (call.arguments | tojson) + '}' }}"
        "{%- else %}{{- m.content }}{%- endif %}{{- '<|eot|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
    )
    row = {
        "messages": [
            {"role": "user", "content": "1 + 1?"},
            {
                "role": "assistant",
                "tool_calls": [{"function": {"name": "add", "arguments": '{"a": [1, 1]}'}}],
            },
            {"role": "tool", "content": "2"},
            {"role": "assistant", "content": "Two."},
        ]
    }
    assert merged(Template("chat", source).segments(read_row(row, "auto"), tokenizer)) == [
        ("<|user|>1 + 1?<|eot|><|assistant|>", False),
        ('{"name": "add", "parameters": {"a": [1, 1]}}<|eot|>', True),
        ("<|tool|>2<|eot|><|assistant|>", False),
        ("Two.<|eot|>", True),
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]},
            "does not write what messages[0] (system) says",
        ),
        (
            {"messages": [*MESSAGES, {"role": "tool", "content": "2"}, *MESSAGES[1:]]},
            "does not write what messages[2] (tool) says",
        ),
        (
            {"messages": [MESSAGES[0], {"role": "assistant", "tool_calls": [{"name": "add"}]}]},
            "does not write the call in messages[1]",
        ),
        (
            {"messages": MESSAGES, "tools": [{"function": {"name": "add"}}]},
            "does not write the tool 'add'",
        ),
    ],
)
def test_a_row_of_which_the_template_leaves_something_out_is_refused(
    tokenizer: Tokenizer, row: dict[str, Any], words: str
) -> None:
    deaf = CHAT.replace(
        "{% for m in messages %}",
        "{% for m in messages if m['role'] in ('user', 'assistant') %}",
    )
    with pytest.raises(DataError) as caught:
        Template("chat", deaf).segments(read_row(row, "auto"), tokenizer)
    assert str(caught.value) == f"the chat template {words}"
    assert Template("chat", deaf).segments(read_row({"messages": MESSAGES}, "auto"), tokenizer)


def test_a_chat_with_tools_that_begins_with_the_assistant_is_refused(tokenizer: Tokenizer) -> None:
    said = chat(("assistant", "a"), tools=[{"name": "add"}])
    with pytest.raises(DataError) as caught:
        Template("chat", CHAT).segments(said, tokenizer)
    assert str(caught.value) == (
        "has tools but begins with the assistant; put the user's question first"
    )


def test_what_a_template_trims_or_writes_as_json_is_not_left_out(tokenizer: Tokenizer) -> None:
    said = chat(("user", " a\n"), ("assistant", 'thought\n"é"\n'))
    for written, text in (("content.strip()", 'thought\n"é"'), ("content | tojson", None)):
        source = CHAT.replace("m['content']", f"m.{written}")
        segments = merged(Template("chat", source).segments(said, tokenizer))
        expected = text or json.dumps(said.messages[1]["content"], ensure_ascii=False)
        assert segments[-1] == (f"{expected}<|eos|>", True)


def test_a_folder_s_own_template_file_is_the_one_that_is_used(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path / "model", chat=True)
    (folder / "chat_template.jinja").write_text(CHAT.replace("<|", "(").replace("|>", ")"))
    loaded = load_tokenizer(folder)
    said = chat(("user", "a"), ("assistant", "b"))
    assert merged(Template("auto", loaded.chat_template).segments(said, loaded))[0] == (
        "(user)a<|eos|>(assistant)",
        False,
    )
