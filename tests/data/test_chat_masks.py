"""Chats as templates write them, token for token, and exactly the assistant's words learned."""

import json
import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import llama31_instruct

from mlx_qlora.data.examples import Example
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.tokenizer import Tokenizer

Message = dict[str, Any]
Runs = list[tuple[str, bool]]

LONG = DataConfig(max_length=100_000)
slowly = settings(deadline=None, max_examples=50)


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def call(name: str, **arguments: Any) -> Message:
    calls = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return answer("", tool_calls=calls)


def result(text: str) -> Message:
    return {"role": "tool", "content": text}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather <now> & here, in °C",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def read(tokenizer: Tokenizer, messages: list[Message], **row: Any) -> Example:
    return read_examples([{"messages": messages, **row}], tokenizer, LONG)[0]


def runs(tokenizer: Tokenizer, example: Example) -> Runs:
    """Neighbours that are both learned, or both not, as text."""
    pairs = zip(example.learned.tolist(), example.tokens.tolist())
    grouped = groupby(pairs, key=lambda pair: pair[0])
    return [(tokenizer.decode([i for _, i in group]), learned) for learned, group in grouped]


def learned(tokenizer: Tokenizer, example: Example) -> list[str]:
    return [text for text, is_learned in runs(tokenizer, example) if is_learned]


# ---- Llama 3.1 ---------------------------------------------------------------------------------

HEADER = [128006, 78191, 128007, 271]  # <|start_header_id|> assistant <|end_header_id|> and \n\n
END = 128009  # <|eot_id|>


@pytest.fixture(scope="module")
def hf_ids() -> Callable[..., list[int]]:
    """What transformers makes of messages with the template shipped beside the tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama31_instruct.folder())

    def ids(messages: list[Message], tools: Any = None) -> list[int]:
        return tokenizer.apply_chat_template(messages, tools=tools, return_dict=False)

    return ids


def turns_of_the_assistant(ids: list[int]) -> list[bool]:
    """A slow look for headers: what stands behind one, to the end of its turn, is learned."""
    made, inside = [False] * len(ids), False
    for i, token in enumerate(ids):
        if ids[max(0, i - 4) : i] == HEADER:
            inside = True
        made[i] = inside
        inside = inside and token != END
    return made


CHATS = {
    "one turn": ([user("Hi!"), answer("Ho.")], None),
    "system": ([system("Be brief."), user("Hi!"), answer("Ho.")], None),
    "several turns": (
        [user("a"), answer("one"), user("b"), answer("two\n\nlines"), user("c"), answer("3")],
        None,
    ),
    "system and several turns": (
        [system("  Du bist nett. "), user("é\n"), answer(" ü "), user("日本"), answer("語 😀")],
        None,
    ),
    "the assistant alone": ([answer("All of it.")], None),
    "the assistant begins": ([answer("A tree?"), user("a"), answer("b")], None),
    "the assistant begins twice": ([answer(" B"), answer("B"), user("a"), answer("A")], None),
    "the assistant answers the system": (
        [system("s"), answer("Hi."), user("a"), answer("b")],
        None,
    ),
    "tools": ([user("Warm?"), answer("No idea.")], [TOOL]),
    "system and tools": ([system("Be brief."), user("Warm?"), answer("No.")], [TOOL, TOOL]),
    "a call": ([user("Warm?"), call("weather", city="Köln", days=[1, None])], [TOOL]),
    "a call and its result": (
        [
            *(system("s"), user("Warm?"), call("weather", city="Köln"), result('{"t": 21.5}')),
            *(answer("Yes, 21.5 °C."), user("And Paris?"), call("weather", city="Paris")),
        ],
        [TOOL],
    ),
    "the system and a tool say nothing": (
        [system(""), user("Warm?"), call("weather", city="Rome"), result(""), answer("No.")],
        [TOOL],
    ),
    "calls without tools": ([user("Warm?"), call("weather"), result("cold"), answer("No.")], None),
}


@pytest.mark.parametrize("name", CHATS)
def test_llama_31_is_written_as_its_own_template_writes_it(
    llama31: Tokenizer, hf_ids: Callable[..., list[int]], name: str
) -> None:
    messages, tools = CHATS[name]
    example = read(llama31, messages, tools=tools)
    wanted = hf_ids(messages, tools)
    assert example.tokens.tolist() == wanted
    assert example.learned.tolist() == turns_of_the_assistant(wanted)
    told = [
        m["content"].strip() if "tool_calls" not in m else said_call(m["tool_calls"][0])
        for m in messages
        if m["role"] == "assistant"
    ]
    assert learned(llama31, example) == [text + "<|eot_id|>" for text in told]


def said_call(call: Any) -> str:
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f'{{"name": "{function["name"]}", "parameters": {arguments}}}'


# Nothing that may spell a special token.
some_text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda text: text.strip() and not re.search(r"<\|?/?\w+\|?>", text)
)
some_turns = st.lists(st.tuples(some_text, some_text, st.booleans()), min_size=1, max_size=4)


@slowly
@given(first=st.none() | some_text, turns=some_turns, with_tools=st.booleans())
def test_any_chat_is_written_so_and_turns_without_weight_are_context(
    llama31: Tokenizer,
    hf_ids: Callable[..., list[int]],
    first: str | None,
    turns: list[tuple[str, str, bool]],
    with_tools: bool,
) -> None:
    tools = [TOOL] if with_tools else None
    turns[-1] = (*turns[-1][:2], True)
    messages = [system(first)] if first else []
    weighed = list(messages)
    for asked, said, kept in turns:
        messages += [user(asked), answer(said)]
        weighed += [user(asked), answer(said, weight=int(kept))]
    example = read(llama31, weighed, tools=json.dumps(tools))
    wanted = hf_ids(messages, tools)
    assert example.tokens.tolist() == wanted
    said = [text.strip() + "<|eot_id|>" for _, text, kept in turns if kept]
    assert learned(llama31, example) == said
    if len(said) == len(turns):
        assert example.learned.tolist() == turns_of_the_assistant(wanted)


def test_a_text_beside_a_call_is_refused_as_the_template_leaves_it_out(llama31: Tokenizer) -> None:
    silent = [user("Warm?"), call("weather", city="Rome"), result("21"), answer("Yes.")]
    telling = [silent[0], {**silent[1], "content": "I will look."}, *silent[2:]]
    examples = read_examples([{"messages": m} for m in (silent, telling)], llama31, LONG)
    reason = "the chat template does not write what messages[1] (assistant) says"
    assert examples.report.refused == [(2, reason)]
    assert [example.line for example in examples] == [1]


# ---- ChatML ------------------------------------------------------------------------------------

DEFAULT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


@slowly
@given(first=st.none() | some_text, turns=some_turns)
def test_chatml_is_learned_to_the_end_of_each_turn(
    smollm2: tuple[Any, Tokenizer], first: str | None, turns: list[tuple[str, str, bool]]
) -> None:
    tokenizer = smollm2[1]
    wanted: Runs = []
    context = f"<|im_start|>system\n{first or DEFAULT}<|im_end|>\n"
    messages = [system(first)] if first else []
    for asked, said, _ in turns:
        # A text that begins with a line break would be one token with the break of its header.
        said = said.lstrip()
        messages += [user(asked), answer(said)]
        context += f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        wanted += [(context, False), (f"{said}<|im_end|>", True)]
        context = "\n"
    example = read(tokenizer, messages)
    assert example.tokens.tolist() == tokenizer.encode("".join(text for text, _ in wanted))
    ids = [(tokenizer.decode(tokenizer.encode(text)), learned) for text, learned in wanted]
    assert runs(tokenizer, example) == ids


# ---- other templates ---------------------------------------------------------------------------

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set first = '' %}{% endif %}"
    "{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (first if loop.first else '') + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_PROMPT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
)
# Reasoning is taken out of all turns but the last.
FORGETS = (
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' %}BEGIN"
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}{{ eos_token }}END"
    "{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = FORGETS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
REASONS = (
    "the chat template writes a prompt in another way once its answer follows, and has no "
    "{% generation %} markers, so it is not known where answers begin; name a template for "
    "training with data.template"
)
# An answer is its calls, or its text.
CALLS = FORGETS.replace(
    "{{ m['content'] if loop.last else m['content'].split('</think>')[-1] }}",
    "{{ m.tool_calls | tojson if m.tool_calls else m['content'] }}",
)
MESSAGES = [user("a"), answer("<think>x</think>b"), user("c"), answer("<think>y</think>d")]


def spelled(text: str) -> str:
    return text.replace("<s>", "<|bos|>").replace("</s>", "<|eos|>")


def test_llama_2_s_style_has_one_bos_and_one_eos_to_a_turn(tokenizer: Tokenizer) -> None:
    messages = [system("S"), user("a"), answer("b"), user("c"), answer("d")]
    example = read(tokenizer.with_chat_template(LLAMA2), messages)
    assert runs(tokenizer, example) == [
        (spelled("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\na [/INST]"), False),
        (spelled(" b </s>"), True),
        (spelled("<s>[INST] c [/INST]"), False),
        (spelled(" d </s>"), True),
    ]


def test_rows_that_a_template_refuses_are_named_by_number(tokenizer: Tokenizer) -> None:
    good, twice = [user("a"), answer("b")], [user("a"), user("b"), answer("c")]
    rows = [{"messages": messages} for messages in (twice, good, twice)]
    examples = read_examples(rows, tokenizer.with_chat_template(LLAMA2), LONG)
    reason = "the chat template refuses it: roles must alternate user/assistant/user/assistant/..."
    assert examples.report.refused == [(1, reason), (3, reason)]
    assert [example.line for example in examples] == [2]


def test_a_template_without_a_generation_prompt_leaves_the_header_to_the_model(
    tokenizer: Tokenizer,
) -> None:
    example = read(
        tokenizer.with_chat_template(NO_PROMPT), [user("a"), answer("b"), user("c"), answer("d")]
    )
    assert runs(tokenizer, example) == [
        (spelled("<s><|user|>a</s>"), False),
        (spelled("<|assistant|>b</s>"), True),
        (spelled("<|user|>c</s>"), False),
        (spelled("<|assistant|>d</s>"), True),
    ]


def test_the_end_of_the_last_answer_is_learned_though_no_marker_holds_it(
    tokenizer: Tokenizer,
) -> None:
    narrow = MARKED.replace("{{ eos_token }}{% endg", "{% endg").replace(
        "{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    )
    narrow = narrow.replace("<|assistant|>{% endif %}", "<|bot|>{% endif %}")  # markers must serve
    messages = [user("a"), answer("b"), *MESSAGES[2:]]  # whose first thoughts would be lost
    got = runs(tokenizer, read(tokenizer.with_chat_template(narrow), messages))
    assert got[1:] == [
        ("b", True),
        (spelled("</s><|user|>c</s><|assistant|>"), False),
        (spelled("<think>y</think>d</s>"), True),
    ]


def test_a_call_that_begins_a_chat_is_learned_by_markers_or_the_chat_refused(
    tokenizer: Tokenizer,
) -> None:
    messages = [call("weather", city="Rome"), user("b"), answer("c")]
    marked = CALLS.replace("BEGIN", "{% generation %}").replace("END", "{% endgeneration %}")
    assert runs(tokenizer, read(tokenizer.with_chat_template(marked), messages)) == [
        (spelled("<s><|assistant|>"), False),
        (spelled(json.dumps(messages[0]["tool_calls"]) + "</s>"), True),
        (spelled("<|user|>b</s><|assistant|>"), False),
        (spelled("c</s>"), True),
    ]
    plain = tokenizer.with_chat_template(CALLS.replace("BEGIN", "").replace("END", ""))
    rows = [{"messages": m} for m in (messages, messages[1:])]
    assert read_examples(rows, plain, LONG).report.refused == [(1, REASONS)]
