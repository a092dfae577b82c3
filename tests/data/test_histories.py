"""Chats whose template rewrites what came before: each answer is learned as it is asked for.

With the real tokenizers and templates of several families, against transformers.
"""

import json
from dataclasses import replace
from typing import Any

import pytest
from support import npm_tokenizers

import mlx_qlora as mq
from mlx_qlora.data.batches import IGNORE, make_batches
from mlx_qlora.data.chats import ROW_DATE, Template
from mlx_qlora.data.encode import encode_rows
from mlx_qlora.data.rows import Chat, read_row
from mlx_qlora.data.templates import render_template
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.errors import DataError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


def said(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calls(*cities: str) -> dict[str, Any]:
    """Calls with their arguments as text, as OpenAI has them."""
    functions = [{"name": "weather", "arguments": json.dumps({"city": c})} for c in cities]
    made = [
        {"id": f"call0000{i}", "type": "function", "function": f} for i, f in enumerate(functions)
    ]
    return said("assistant", "", tool_calls=made)


HI, AND = said("user", "Hi?"), said("user", "And?")
WET = said("tool", "wet", name="weather", tool_call_id="call00000")
ROWS: dict[str, dict[str, Any]] = {
    "one turn": {"messages": [HI, said("assistant", "Hello.")]},
    "several turns": {
        "messages": [HI, said("assistant", "Hello."), AND, said("assistant", "More.")]
    },
    "system": {"messages": [said("system", "Be brief."), HI, said("assistant", "Hello.")]},
    "thoughts": {
        "messages": [
            *(HI, said("assistant", "<think>\nhm\n</think>\n\nHello.")),
            *(AND, said("assistant", "<think>\nso\n</think>\n\nMore.")),
        ]
    },
    "thoughts apart": {
        "messages": [
            *(HI, said("assistant", "Hello.", reasoning_content="hm")),
            *(AND, said("assistant", "More.", reasoning_content="so")),
        ]
    },
    "tool": {
        "messages": [said("user", "Rain?"), calls("Oslo"), WET, said("assistant", "Yes.")],
        "tools": TOOLS,
    },
    "parallel calls": {
        "messages": [said("user", "Rain?"), calls("Oslo", "Rome"), WET, said("assistant", "Yes.")],
        "tools": TOOLS,
    },
    "two answers": {"messages": [HI, said("assistant", "Hello."), said("assistant", "More.")]},
    "three answers after another": {
        "messages": [
            *(said("system", "Be brief."), HI, said("assistant", "Hello."), AND),
            *(said("assistant", text) for text in ("One.", "Two.", "Three.")),
        ]
    },
    "two answers and another": {
        "messages": [
            *(HI, said("assistant", "Hello."), said("assistant", "More.")),
            *(AND, said("assistant", "Three.")),
        ]
    },
    "two answers, the second with thoughts": {
        "messages": [
            *(HI, said("assistant", "Hello.")),
            said("assistant", "<think>\nhm\n</think>\n\nMore."),
        ]
    },
    "an answer and a call": {
        "messages": [
            *(said("user", "Rain?"), said("assistant", "Wait."), calls("Oslo"), WET),
            said("assistant", "Yes."),
        ],
        "tools": TOOLS,
    },
}
# Turns of the assistant that follow each other, without tools and with them.
TWO = tuple(name for name in ROWS if name.startswith(("two", "three")))
CALL_AFTER = "an answer and a call"
NO_TOOLS = "does not write the call in messages|roles must alternate"
NO_THOUGHTS = "does not write the reasoning_content of messages"
DEAF = ("llama3", "gemma3", "deepseek_v3", "r1")  # to tools
THOUGHTLESS = [x for x in npm_tokenizers.CHATS if x not in ("qwen3", "r1", "gptoss")]
REFUSED = {
    **{(name, "thoughts apart"): NO_THOUGHTS for name in THOUGHTLESS},
    **{(name, row): NO_TOOLS for name in DEAF for row in ("tool", "parallel calls", CALL_AFTER)},
    **{("gemma3", row): "roles must alternate" for row in TWO},
    ("gptoss", "parallel calls"): "does not write the call in messages",  # but the first
    **{(f"llama3_{i}", "parallel calls"): "supports single tool-calls at once" for i in (1, 2)},
}
APART = {
    "qwen3": (
        "several turns",
        "thoughts",
        "thoughts apart",
        "tool",
        "parallel calls",
        *TWO,
        CALL_AFTER,
    ),
    "r1": ("several turns", "thoughts", "thoughts apart", *TWO),
    "gptoss": ("several turns", "thoughts", "thoughts apart", *TWO, CALL_AFTER),
}


@pytest.fixture(scope="module", params=npm_tokenizers.CHATS)
def tokenizer(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    return request.param, npm_tokenizers.chat_tokenizer(request.param)


def documents(row: dict[str, Any], tokenizer: Tokenizer, history: str = "auto") -> list[Any]:
    template = Template("auto", tokenizer.chat_template, history)
    return template.documents(read_row(row, "auto"), tokenizer)[0]


@pytest.mark.parametrize("row", ROWS)
def test_answers_are_learned_as_the_model_is_asked_for_them(tokenizer, row):
    """Their contexts are what `chat` sends, and transformers' ids."""
    name, ours = tokenizer
    if (name, row) in REFUSED:
        with pytest.raises(DataError, match=REFUSED[name, row]):
            documents(ROWS[row], ours)
        return
    found = documents(ROWS[row], ours)
    chat = read_row(ROWS[row], "auto")
    assert isinstance(chat, Chat)
    answers = [i for i, learned in enumerate(chat.learned) if learned]
    assert len(found) == (len(answers) if row in APART.get(name, ()) else 1)
    theirs = npm_tokenizers.of_transformers(name)
    if len(found) == 1:
        answers = answers[-1:]
        *context, (text, _) = found[0]
        found = [[("".join(text for text, _ in context), False), (text, True)]]
    for i, segments in zip(answers, found):
        (context, _), (text, is_learned) = segments
        asked: dict[str, Any] = {"add_generation_prompt": True, "date": ROW_DATE}
        how = (str(ours.chat_template), chat.messages[:i], chat.tools, ours.special_tokens)
        assert is_learned and context == render_template(*how, **asked)
        asked = {"add_generation_prompt": True, "tools": chat.tools, "date_string": "26 Jul 2024"}
        if name == "gptoss":  # its template asks for today
            continue
        ids = theirs.apply_chat_template(
            chat.messages[:i], tokenize=True, return_dict=False, **asked
        )
        (encoded,) = encode_rows(ours, [segments])
        assert encoded.ids[: encoded.context].tolist() == list(ids)
        assert encoded.learned[encoded.context :].all() and not encoded.learned[: len(ids)].any()
        assert encoded.ids[-1] in ours.eos_ids
        learned = ours.decode(encoded.ids[encoded.context :])
        assert chat.messages[i]["content"].rpartition("</think>")[2].strip() in learned
        thought = {"thoughts": ("hm", "so"), "thoughts apart": ("hm", "so")}.get(row)
        if thought is not None:
            assert thought[i // 2] in learned and learned.count("</think>") == 1


EMPTY, THOUGHT = "<think>\n\n</think>\n\n", "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ("two answers", [EMPTY + "Hello.", EMPTY + "More."]),
        ("three answers after another", [EMPTY + x for x in ("Hello.", "One.", "Two.", "Three.")]),
        ("two answers and another", [EMPTY + x for x in ("Hello.", "More.", "Three.")]),
        ("two answers, the second with thoughts", [EMPTY + "Hello.", THOUGHT + "More."]),
    ],
)
def test_an_answer_after_an_answer_begins_where_it_is_asked_for(row, answers):
    """Qwen 3's template writes the first one otherwise once there is a second."""
    qwen = npm_tokenizers.chat_tokenizer("qwen3")
    found = documents(ROWS[row], qwen)
    assert [text for *_, (text, _) in found] == [f"{answer}<|im_end|>\n" for answer in answers]
    with pytest.raises(DataError, match="where answers begin; name a template for training"):
        documents(ROWS[row], qwen, "joint")


USER, OBSERVATION, EOS = "<|box_start|>", "<|box_end|>", "<|endoftext|>"
YES, RAIN = said("assistant", "Yes."), said("user", "Rain?")
ENDS: dict[str, tuple[list[dict[str, Any]], str, list[str]]] = {
    "a call at the end": ([RAIN, calls("Oslo")], "auto", [OBSERVATION]),
    "calls at the end": ([RAIN, calls("Oslo", "Rome")], "auto", [OBSERVATION]),
    "an answer and a call": ([RAIN, YES, calls("Oslo")], "auto", [OBSERVATION]),
    "a call and its result": ([RAIN, calls("Oslo"), WET, YES], "auto", [OBSERVATION, EOS]),
    "as asked": ([RAIN, calls("Oslo"), WET, YES], "as_asked", [OBSERVATION, EOS]),
    "a call that the user follows": ([RAIN, calls("Oslo"), AND, YES], "auto", [EOS]),
    "answers": ([HI, YES, AND, YES], "auto", [USER, EOS]),
    "answers as asked": ([HI, YES, AND, YES], "as_asked", [EOS, EOS]),
}


@pytest.mark.parametrize("name", ENDS)
def test_a_call_ends_with_the_header_of_its_result_where_that_is_an_end_token(name):
    """GLM-4's turns have no end of their own, and its generation config has three end tokens."""
    messages, history, ends = ENDS[name]
    glm = npm_tokenizers.of_trl("glm4moe").replace("<|user|>", USER)
    qwen = npm_tokenizers.chat_tokenizer("qwen3")
    qwen = qwen.with_chat_template(glm.replace("<|observation|>", OBSERVATION))
    ids = [qwen.encode(end)[0] for end in (EOS, USER, OBSERVATION)]
    tokenizer = replace(qwen, eos_id=ids[0], eos_ids=frozenset(ids))
    learned = []
    for document in documents({"messages": messages, "tools": TOOLS}, tokenizer, history):
        (encoded,) = encode_rows(tokenizer, [document])
        learned += encoded.ids[encoded.learned].tolist()
    assert [tokenizer.decode([i]) for i in learned if i in ids] == ends
    # Where it is none, a call ends as any answer does.
    alone = replace(tokenizer, eos_ids=frozenset(ids[:1]))
    (encoded,) = encode_rows(alone, documents({"messages": messages[:2]}, alone))
    assert encoded.ids[-1] == ids[0]


def test_what_a_template_adds_after_the_last_answer_is_not_learned():
    """Llama 3's first template always ends in the assistant's header."""
    llama3 = npm_tokenizers.opened("llama3")
    whole = llama3.render_chat(ROWS["several turns"]["messages"])
    assert whole.endswith("assistant<|end_header_id|>\n\n"), "the template is the first one"
    ((*_, (text, is_learned)),) = documents(ROWS["several turns"], llama3)
    assert (text, is_learned) == ("More.<|eot_id|>", True)


def test_history_decides_how_a_chat_is_written(tokenizer):
    name, ours = tokenizer
    row = ROWS["several turns"]
    assert len(documents(row, ours, "as_asked")) == 2
    if name in APART:
        with pytest.raises(DataError, match="it is not known where answers begin"):
            documents(row, ours, "joint")
    else:
        assert len(documents(row, ours, "joint")) == 1


def test_a_row_stays_one_example_whatever_it_becomes():
    """Its documents lie in one row of a batch, one after another, and count once."""
    qwen = npm_tokenizers.opened("qwen3")
    rows = [ROWS["several turns"], ROWS["one turn"], ROWS["thoughts"]]
    examples = mq.read_examples(rows, qwen, mq.DataConfig(cache_dir=None))
    assert len(examples) == examples.report.kept == 3
    batch = make_batches(examples, 3, shuffle=False)[0]
    assert batch.documents is not None and batch.rows == (0, 1, 2)
    assert batch.documents[:, 0].tolist() == [0, 0, 1, 2, 2]
    assert batch.places == ("rows:1", "rows:1", "rows:2", "rows:3", "rows:3")
    tokens, labels = batch.tokens.tolist(), batch.labels.tolist()
    texts = ("Hello.", "More.", "Hello.", "Hello.", "More.")
    for (b, start, end), text in zip(batch.documents.tolist(), texts):
        assert qwen.decode(tokens[b][start:end]).startswith("<|im_start|>user\nHi?")
        learned = [label for label in labels[b][start:end] if label != IGNORE]
        assert text in qwen.decode(learned)
    assert batch.real_tokens == int(examples.lengths.sum()) - 5


def test_marks_of_a_message_take_it_out_and_fractions_are_refused():
    for mark in (
        {"weight": 0},
        {"train": False},
        {"training": False},
        {"loss": 0},
        {"masked": True},
    ):
        messages = [HI, said("assistant", "No.", **mark), AND, said("assistant", "Yes.")]
        chat = read_row({"messages": messages}, "auto")
        assert isinstance(chat, Chat) and chat.learned == [False, False, False, True]
    with pytest.raises(DataError, match=r"loss of messages.* must be 0 or 1; got 0\.5"):
        read_row({"messages": [HI, said("assistant", "No.", loss=0.5)]}, "auto")


def test_a_row_may_say_what_the_template_reads():
    qwen = npm_tokenizers.opened("qwen3")
    row = {**ROWS["one turn"], "chat_template_kwargs": {"enable_thinking": False}}
    (((context, _), (text, _)),) = documents(row, qwen)
    assert context.endswith("assistant\n<think>\n\n</think>\n\n") and text == "Hello.<|im_end|>\n"
    with pytest.raises(DataError, match="'chat_template_kwargs' must be an object"):
        read_row({**row, "chat_template_kwargs": [1]}, "auto")


def test_a_template_named_tool_use_writes_rows_with_tools(tmp_path, chat_folder):
    import shutil

    for how in ("list", "folder"):
        place = shutil.copytree(chat_folder, tmp_path / how)
        config = json.loads((place / "tokenizer_config.json").read_text())
        plain = config.pop("chat_template", None) or (place / "chat_template.jinja").read_text()
        with_tools = "T{{ tools | tojson }}" + plain.replace(
            "{{ m.content", "{{ (m.tool_calls or '') | string }}{{ m.content"
        ).replace("{{ message", "{{ (message.tool_calls or '') | string }}{{ message")
        if how == "list":
            (place / "chat_template.jinja").unlink(missing_ok=True)
            entries = {"default": plain, "tool_use": with_tools}
            config["chat_template"] = [{"name": n, "template": t} for n, t in entries.items()]
        else:
            (place / "additional_chat_templates").mkdir()
            (place / "additional_chat_templates" / "tool_use.jinja").write_text(with_tools)
            config["chat_template"] = plain
        (place / "tokenizer_config.json").write_text(json.dumps(config))
        ours = load_tokenizer(place)
        assert ours.tool_template == with_tools and ours.chat_template == plain
        assert ours.render_chat([HI], tools=TOOLS).startswith("T[")
        ours.save(tmp_path / f"{how} saved")
        assert load_tokenizer(tmp_path / f"{how} saved").tool_template == with_tools


def test_what_is_shown_of_a_row_is_each_of_its_documents():
    """`inspect` and `--dry-run` show rows; the longest document decides what fits."""
    import io

    from rich.console import Console

    from mlx_qlora.before.inspect import print_rows

    qwen = npm_tokenizers.opened("qwen3")
    rows = [ROWS["several turns"], ROWS["one turn"], ROWS["thoughts"]]
    examples = mq.read_examples(rows, qwen, mq.DataConfig(cache_dir=None))
    shown = io.StringIO()
    print_rows(make_batches(examples, 2, shuffle=False), qwen, 3, Console(file=shown, width=200))
    text = shown.getvalue()
    places = [line.split(": ")[0] for line in text.splitlines() if line.startswith("rows:")]
    of_two = (", answer 1 of 2", ", answer 2 of 2")
    assert places == [
        *(f"rows:1{of}" for of in of_two),
        "rows:2",
        *(f"rows:3{of}" for of in of_two),
    ]
    for learned in ("Hello.<|im_end|>⟧", "More.<|im_end|>⟧", "⟦<think>\nhm", "⟦<think>\nso"):
        assert learned in text
    assert examples.longest < examples.lengths.max()
    assert examples.positions == examples.lengths.sum() - 5
    assert examples.document_lengths[:, 0].tolist() == [2, 1, 2]


def test_what_a_row_may_not_give_the_template_is_refused():
    row = {**ROWS["one turn"], "chat_template_kwargs": {"messages": []}}
    with pytest.raises(DataError, match="may not hold messages"):
        read_row(row, "auto")
