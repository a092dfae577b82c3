"""What a row says as text, byte for byte, and which stretches of it are learned."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_folder import CHAT

from mlx_qlora.data.chats import Segments, Template, alpaca_prompt
from mlx_qlora.data.rows import Chat, Instruction, Pair, read_row
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError

WITH = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
WITHOUT = "### Instruction:\n{instruction}\n\n### Response:\n{output}"
# Writes an earlier answer otherwise than the last one; MARKED says where answers are.
FORGETFUL = (
    "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' %}"
    "{{ m.content if loop.last else m.content.replace('\\n', ' ') }};"
    "{% else %}{{ m.content }};{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MARKED = FORGETFUL.replace("{{ m.content if", "{% generation %}{{ m.content if").replace(
    "' ') }};", "' ') }};{% endgeneration %}"
)
MESSAGES = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "Two."}]
TURNS = [
    ("system", "s"),
    ("user", "u"),
    ("assistant", "t\na"),
    ("user", "v"),
    ("assistant", "w\nb"),
]


def chat(*turns: tuple[str, str], learned: list[bool] | None = None, tools: Any = None) -> Chat:
    messages = [{"role": role, "content": content} for role, content in turns]
    return Chat(messages, learned or [role == "assistant" for role, _ in turns], tools)


def segments_of(template: Template, said: Any, tokenizer: Tokenizer) -> Segments:
    """The one text of a row."""
    return replace(template, history="joint").documents(said, tokenizer)[0][0]


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


def alpaca(row: dict[str, Any], chatty: Tokenizer) -> Segments:
    return segments_of(Template("auto", None), read_row(row, "alpaca"), chatty)


def fill(form: str, **texts: str) -> str:
    """Fills a form in one pass, so that texts which hold `{input}` stay as they are."""
    parts = []
    for piece in form.replace("}", "{").split("{"):
        parts.append(texts.get(piece, piece))
    return "".join(parts)


@settings(deadline=None)
@given(st.text(), st.text(min_size=1), st.text())
def test_a_row_is_exactly_one_of_the_two_forms(
    chatty: Tokenizer, instruction: str, input: str, output: str
) -> None:
    instruction, output = "x" + instruction, "y" + output
    row = {"instruction": instruction, "input": input, "output": output}
    whole = fill(WITH, **row)
    assert alpaca(row, chatty) == [
        (whole[: len(whole) - len(output)], False),
        (output, True),
    ]
    row = {"instruction": instruction, "output": output}
    assert "".join(text for text, _ in alpaca(row, chatty)) == fill(WITHOUT, **row)


@pytest.mark.parametrize(
    "text", ["{input}", "{}", "{0}", "{{", "%s", "$x", "{instruction!r}", "\\n"]
)
def test_braces_and_other_marks_are_text(chatty: Tokenizer, text: str) -> None:
    row = {"instruction": text, "input": text, "output": text}
    assert alpaca(row, chatty) == [
        (f"### Instruction:\n{text}\n\n### Input:\n{text}\n\n### Response:\n", False),
        (text, True),
    ]
    assert merged(segments_of(Template("chat", CHAT), Pair(text, text), chatty)) == [
        (f"<|user|>{text}<|eos|><|assistant|>", False),
        (f"{text}<|eos|>", True),
    ]


def test_the_prompt_of_training_is_the_prompt_of_asking(chatty: Tokenizer) -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert alpaca(row, chatty)[0] == (alpaca_prompt("Add.", "1 2"), False)
    assert alpaca_prompt("Add.") == "### Instruction:\nAdd.\n\n### Response:\n"


def test_whitespace_is_kept(chatty: Tokenizer) -> None:
    row = {"instruction": " a\n", "input": " ", "output": "\tb "}
    assert alpaca(row, chatty) == [
        ("### Instruction:\n a\n\n\n### Input:\n \n\n### Response:\n", False),
        ("\tb ", True),
    ]


# ---- which template writes what ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["auto", "alpaca"])
def test_instructions_and_texts_are_written_without_the_chat_template(
    chatty: Tokenizer, name: str
) -> None:
    plain = Template(name, CHAT)
    assert segments_of(plain, Instruction("a", "", "b"), chatty) == [
        (alpaca_prompt("a"), False),
        ("b", True),
    ]
    assert segments_of(plain, Pair(" a ", "b\n"), chatty) == [(" a ", False), ("b\n", True)]
    assert segments_of(plain, Pair("", "all of it"), chatty) == [("", False), ("all of it", True)]


@pytest.mark.parametrize("name", ["auto", "chat"])
def test_messages_are_written_by_the_chat_template(chatty: Tokenizer, name: str) -> None:
    said = chat(("user", "a"), ("assistant", "b"))
    assert merged(segments_of(Template(name, CHAT), said, chatty)) == [
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
    chatty: Tokenizer, said: Instruction | Pair, question: str, answer: str
) -> None:
    assert merged(segments_of(Template("chat", CHAT), said, chatty)) == [
        (f"<|user|>{question}<|eos|><|assistant|>", False),
        (f"{answer}<|eos|>", True),
    ]


def test_a_plain_text_stays_plain_under_a_chat_template(chatty: Tokenizer) -> None:
    said = Pair("", "all of it")
    assert segments_of(Template("chat", CHAT), said, chatty) == [("", False), ("all of it", True)]


def test_the_template_of_the_recipe_counts_and_not_the_model_s(chatty: Tokenizer) -> None:
    assert chatty.chat_template == CHAT
    own = CHAT.replace("<|", "<").replace("|>", ">")
    assert merged(segments_of(Template("chat", own), Pair("a", "b"), chatty)) == [
        ("<user>a<|eos|><assistant>", False),
        ("b<|eos|>", True),
    ]
    with pytest.raises(DataError, match="the model has no chat template"):
        segments_of(Template("auto", None), chat(("user", "a"), ("assistant", "b")), chatty)
    with pytest.raises(DataError, match="alpaca cannot write messages; leave it out, or name"):
        segments_of(Template("alpaca", CHAT), chat(("user", "a"), ("assistant", "b")), chatty)


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
    chatty: Tokenizer, said: Chat
) -> None:
    expected: Segments = []
    for message, learned in zip(said.messages, said.learned):
        head, body = f"<|{message['role']}|>", message["content"] + "<|eos|>"
        expected += [(head, False), (body, learned)]
    segments = segments_of(Template("chat", CHAT), said, chatty)
    assert merged(segments) == merged(expected)
    whole = chatty.render_chat(said.messages)
    assert "".join(text for text, _ in segments) == whole


@pytest.mark.parametrize("answer", ["b", "A", "Apple", " A", "<|assistant|>", "<"])
def test_a_chat_may_begin_with_an_answer(chatty: Tokenizer, answer: str) -> None:
    source = "{{ raise_exception('no message') if not messages }}" + CHAT
    said = chat(("assistant", answer), ("user", "go on"), ("assistant", "c"))
    assert merged(segments_of(Template("chat", source), said, chatty)) == [
        ("<|assistant|>", False),
        (f"{answer}<|eos|>", True),
        ("<|user|>go on<|eos|><|assistant|>", False),
        ("c<|eos|>", True),
    ]


def test_what_a_template_writes_behind_the_last_answer_is_no_part_of_the_row(
    chatty: Tokenizer,
) -> None:
    marked = MARKED + "(end)"
    segments = merged(segments_of(Template("chat", marked), chat(*TURNS), chatty))
    assert segments[-1] == ("w\nb;", True)


@pytest.mark.parametrize(
    ("learned", "expected"),
    [
        (
            (True, True, True),
            [
                ("[system]s;[user]u;[assistant]", False),
                ("t a;", True),
                ("[user]v;[assistant]", False),
                ("w b;", True),
                ("[user]x;[assistant]", False),
                ("y\nc;", True),
            ],
        ),
        (
            (False, True, True),
            [
                ("[system]s;[user]u;[assistant]t a;[user]v;[assistant]", False),
                ("w b;", True),
                ("[user]x;[assistant]", False),
                ("y\nc;", True),
            ],
        ),
    ],
)
def test_a_template_that_rewrites_earlier_turns_is_followed_by_its_markers(
    chatty: Tokenizer, learned: tuple[bool, ...], expected: Segments
) -> None:
    turns = [*TURNS, ("user", "x"), ("assistant", "y\nc")]
    answers = iter(learned)
    said = chat(*turns, learned=[role == "assistant" and next(answers) for role, _ in turns])
    for source in (MARKED, MARKED.replace("{% generation", "{%- generation")):
        assert merged(segments_of(Template("chat", source), said, chatty)) == expected


def test_without_markers_such_a_template_is_refused_but_for_single_answers(
    chatty: Tokenizer,
) -> None:
    template = Template("chat", FORGETFUL)
    with pytest.raises(DataError, match="it is not known where answers begin"):
        segments_of(template, chat(*TURNS), chatty)
    assert merged(segments_of(template, chat(*TURNS[:3]), chatty)) == [
        ("[system]s;[user]u;[assistant]", False),
        ("t\na;", True),
    ]
    last_alone = chat(*TURNS, learned=[False] * 4 + [True])
    assert merged(segments_of(template, last_alone, chatty))[-1] == ("w\nb;", True)


def test_an_answer_that_does_not_begin_as_it_is_asked_for_is_refused(chatty: Tokenizer) -> None:
    source = CHAT.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    with pytest.raises(DataError, match="it is not known where answers begin"):
        segments_of(Template("chat", source), Pair("a", "b"), chatty)
    segments = segments_of(Template("chat", source), Pair("a", "<think>b"), chatty)
    assert segments[-1] == ("b<|eos|>", True)


def test_markers_for_another_number_of_answers_are_refused(chatty: Tokenizer) -> None:
    once = MARKED.replace("{% generation %}", "{% if loop.last %}{% generation %}").replace(
        "{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content[-1] }};{% endif %}"
    )
    with pytest.raises(DataError, match="marks 1 answers, and the row has 2"):
        segments_of(Template("chat", once), chat(*TURNS), chatty)


def test_a_template_that_asks_for_the_day_always_gets_the_same(chatty: Tokenizer) -> None:
    source = "{{ strftime_now('%d %b %Y') }}" + CHAT
    segments = merged(segments_of(Template("chat", source), Pair("a", "b"), chatty))
    assert segments[0] == ("26 Jul 2024<|user|>a<|eos|><|assistant|>", False)


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
    chatty: Tokenizer, row: dict[str, Any], words: str
) -> None:
    deaf = CHAT.replace(
        "{% for m in messages %}",
        "{% for m in messages if m['role'] in ('user', 'assistant') %}",
    )
    with pytest.raises(DataError) as caught:
        segments_of(Template("chat", deaf), read_row(row, "auto"), chatty)
    assert str(caught.value) == f"the chat template {words}"
    assert segments_of(Template("chat", deaf), read_row({"messages": MESSAGES}, "auto"), chatty)


def test_a_chat_with_tools_that_begins_with_the_assistant_is_refused(chatty: Tokenizer) -> None:
    said = chat(("assistant", "a"), tools=[{"name": "add"}])
    with pytest.raises(DataError) as caught:
        segments_of(Template("chat", CHAT), said, chatty)
    assert str(caught.value) == (
        "has tools but begins with the assistant; put the user's question first"
    )


def test_what_a_template_trims_or_writes_as_json_is_not_left_out(chatty: Tokenizer) -> None:
    said = chat(("user", " a\n"), ("assistant", 'thought\n"é"\n'))
    for written, text in (("content.strip()", 'thought\n"é"'), ("content | tojson", None)):
        source = CHAT.replace("m['content']", f"m.{written}")
        segments = merged(segments_of(Template("chat", source), said, chatty))
        expected = text or json.dumps(said.messages[1]["content"], ensure_ascii=False)
        assert segments[-1] == (f"{expected}<|eos|>", True)


def test_the_system_message_that_a_template_writes_of_itself_is_known(smollm2) -> None:
    tokenizer = smollm2[1]
    own = tokenizer.own_system
    assert own.startswith("You are a helpful AI assistant named SmolLM")
    assert own in tokenizer.render_chat([{"role": "user", "content": "Hello?"}])
    silent = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert tokenizer.with_chat_template(silent).own_system == ""
    assert tokenizer.with_chat_template("{{ raise_exception('no') }}").own_system == ""
