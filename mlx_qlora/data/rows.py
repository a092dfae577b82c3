"""What a row says."""

import contextlib
import difflib
import functools
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_qlora.data.formats import object_of, parse_json
from mlx_qlora.data.marks import (
    EMPTY,
    HARMLESS,
    MARKS,
    ROW_MARKS,
    WEIGHTS,
    is_harmless,
    is_mark,
    is_weight,
    refuse_other_tasks,
)
from mlx_qlora.errors import DataError, did_you_mean

Message = dict[str, Any]
# ShareGPT's names, and those of its descendants, for the roles that templates know.
ROLES = {"human": "user", "function": "tool", "observation": "tool"} | dict.fromkeys(
    ("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"
)
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
MAY_BE_EMPTY = ("system", "developer", "tool", "ipython")
RESERVED = {"messages", "tools", "documents", "add_generation_prompt"}  # what a template is given
# Fields in which a message has its thoughts apart from what it says.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Instruction:
    """A task, something it is about (possibly empty), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Pair:
    """Two texts that are used as they are; a plain text has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages in order, ending with the last one to learn."""

    messages: list[Message]  # with `role` and `content`, and more where the template reads it
    # One for each message: the weight of its labels. Only an assistant's is not 0 (False).
    learned: list[float]
    tools: list[dict[str, Any]] | None = None  # JSON schemas of what the assistant may call
    options: dict[str, Any] | None = None  # of the template, such as `enable_thinking`


Said = Instruction | Pair | Chat


def _read_alpaca(row: Mapping[str, Any]) -> Instruction | Chat:
    instruction, output = _text_of(row, "instruction"), _text_of(row, "output")
    said = Instruction(instruction, _text_of(row, "input", optional=True), output)
    history: Any = row.get("history")
    if history in EMPTY:
        return said
    # LLaMA-Factory's: earlier questions and answers, which are learned like the last one.
    pairs: Any = history if isinstance(history, (list, tuple)) else [None]
    texts: Any = [x for x in pairs if isinstance(x, (list, tuple)) and [*map(type, x)] == [str] * 2]
    if len(texts) < len(pairs) or not all(text.strip() for pair in texts for text in pair):
        raise DataError("field 'history' must be a list of pairs of a question and its answer")
    chats = [as_chat(Pair(*pair)) for pair in pairs] + [as_chat(said)]
    return Chat([m for c in chats for m in c.messages], [x for c in chats for x in c.learned])


def _read_prompt_completion(row: Mapping[str, Any]) -> Pair | Chat:
    """Fields `prompt` and `completion`: two texts, or two lists of messages; the second learned."""
    if not isinstance(row.get("prompt"), list) and not isinstance(row.get("completion"), list):
        return Pair(_text_of(row, "prompt"), _text_of(row, "completion"))
    prompt, completion = messages_of(row, "prompt"), messages_of(row, "completion")
    return _chat([*({**m, "weight": 0} for m in prompt), *completion], row)


# What each format reads, `system` besides; a chat reads CHAT_FIELDS, too. The first two fields
# tell the format, the surest one first: chats often carry a `prompt` or a `text` too.
FIELDS = {
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output", "input", "history"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
}
CHAT_FIELDS = ("tools", "functions", "chat_template_kwargs")
FORMATS: dict[str, Callable[[Mapping[str, Any]], Said]] = {
    "alpaca": _read_alpaca,
    "messages": lambda row: _chat(messages_of(row, "messages"), row),  # OpenAI's
    "sharegpt": lambda row: _chat(messages_of(row, "conversations"), row),
    "prompt_completion": _read_prompt_completion,
    "text": lambda row: Pair("", _text_of(row, "text")),  # no prompt: all of it is learned
}
# What `data.columns` may name -> what data sets often call it.
COLUMNS = {
    "messages": "conversation dialog dialogue chat turns",
    "instruction": "question query problem prompt user user_input wrote",
    "output": "answer response solution completion reply target assistant replied",
    "input": "context",
    "system": "system_prompt system_message",
    "text": "content body document article",
    "chosen": "better preferred winner accepted",
    "rejected": "worse dispreferred loser declined",
} | dict.fromkeys(("prompt", "completion", "conversations", "tools", "label"), "")
# All rows of a file may be refused, and have the same names.
close_matches = functools.lru_cache(1024)(difflib.get_close_matches)
NEAR = 0.85  # likeness of a misspelt name to the one that is meant
OPTIONAL_COLUMNS = ("input", "system", "tools")
SYSTEM = "data.system: "  # before the system message that a row has itself
ABSENT = "data.columns."  # before the name of an optional one that a row does not have


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields a row has; a DataError if it has those of none."""
    for name, fields in FIELDS.items():
        if not row.keys().isdisjoint(fields[:2]):
            return name
    raise DataError(
        "its fields are those of no format that is known: messages; conversations; instruction, "
        f"output; prompt, completion; text (it has: {names_of(row)})"
    )


def names_of(row: Mapping[str, Any]) -> str:
    """The first of a row's fields, for a message."""
    return ", ".join(repr(name)[:40] for name in list(row)[:6]) or "none"


def columns_hint(row: Mapping[str, Any], is_pair: bool = False, is_whole: bool = True) -> str:
    """The remedy `data.columns=...` for a row of other names; empty if none is likely.

    Of a row that is not whole, as some of its values are null or empty, one may be the answer.
    """

    def field(columns: Mapping[str, str]) -> str:
        pairs = json.dumps(columns, ensure_ascii=False)
        if all(re.fullmatch(r"[^\W\d][\w -]*", name) for name in columns.values()):
            pairs = pairs.replace('"', "")  # which YAML reads alike
        return f"data.columns={shlex.quote(pairs)}"

    if columns := likely_columns(row, is_pair):
        return f"; {field(columns)} would read it"
    strings = ((name, value) for name, value in row.items() if isinstance(name, str))
    texts = [name for name, value in strings if isinstance(value, str)]
    known = {name for fields in FIELDS.values() for name in fields[:2]}
    if is_pair or len(texts) < 2 or known & row.keys():
        return ""
    by_length = sorted(texts, key=lambda name: -len(row[name]))[:2]
    has_gap = not is_whole and len(texts) > 2
    if has_gap and not all(" " in row[name].strip() for name in by_length):
        by_length = []  # dates and topics ask nothing
    asked, answer = (
        next((name for name in texts if _words(name) & _words(f"{field} {COLUMNS[field]}")), None)
        for field in ("instruction", "output")
    )
    if not asked or not answer or asked == answer:
        if not by_length:
            return ""
        asked, answer = sorted(by_length, key=texts.index)
    both = field({"prompt": asked, "completion": answer})
    return f"; if {answer!r} answers {asked!r}, {both} data.template=chat would read it"


def _words(name: str) -> set[str]:
    """The words of a field's name, each as if it were one alone: `Customer questions`."""
    return {word.removesuffix("s") for word in re.findall(r"[^\W_]+", name.lower())}


def likely_columns(row: Mapping[str, Any], is_pair: bool = False) -> dict[str, str]:
    """A `data.columns` that reads a row of other names; an empty one if none is likely."""
    if not is_pair and any(row.keys() >= {*fields[:2]} for fields in FIELDS.values()):
        return {}
    names = {str(name).lower(): name for name in row}
    found = {}
    for field, likely in COLUMNS.items():
        near = close_matches(field, tuple(itertools.islice(names, 1000)), 1, NEAR)
        column = next((names[n] for n in (field, *likely.split(), *near) if n in names), None)
        kind: Any = (list, tuple) if field == "messages" else str
        kind = (str, list, tuple, Mapping) if field in ("chosen", "rejected") else kind
        if column is not None and isinstance(row[column], kind):
            found[field] = column
    asks = any(name in row for name in ("prompt", "messages", "conversations"))
    answers = ((1, "messages system"), (2, "instruction output input system"), (1, "text"))
    pairs = ((2, f"chosen rejected {'' if asks else 'instruction input '}system"),)
    for needed, more in pairs if is_pair else answers:
        fields = [field for field in more.split() if field in found]
        if fields[:needed] == more.split()[:needed]:
            return {field: found[field] for field in fields if found[field] != field}
    return {}


def renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row whose fields have our names; a DataError if one that must be there is not."""
    for field, column in columns.items():
        if column not in row and field not in OPTIONAL_COLUMNS:
            near = did_you_mean(column, map(str, row)) or f"; the row has {names_of(row)}"
            raise DataError(
                f"field {column!r}, which data.columns takes as {field}, is missing or null{near}"
            )
    rest = {k: v for k, v in row.items() if k not in columns.values() and k not in columns}
    return rest | {field: row[column] for field, column in columns.items() if column in row}


def read_row(row: Any, form: str, columns: Mapping[str, str] | None = None) -> Said:
    """What a row says, in one of FORMATS or, for "auto", in the one that its fields tell."""
    columns, given, row = columns or {}, row, object_of(row)
    ours = renamed(row, columns)
    try:
        refuse_other_tasks(ours, columns)
        said = FORMATS[detect_format(ours) if form == "auto" else form](ours)
        system = _text_of(ours, "system", optional=True)
        said = with_system(said, system)
        if system and isinstance(said, Chat) and said.messages[0]["content"] != system:
            raise DataError("field 'system' differs from the system message")
        return said
    except DataError as error:
        text = re.sub(r"field '(\w+)'", lambda m: f"field {columns.get(m[1], m[1])!r}", str(error))
        is_unknown = not columns and re.search("no format|is missing", text)
        if is_unknown and (
            hint := columns_hint(row, is_whole=len(row) == len(given) and "" not in row.values())
        ):
            text += hint
        elif form != "auto" and "is missing" in text:
            with contextlib.suppress(DataError):
                if (other := detect_format(ours)) != form:
                    text = (
                        f"is {other!r} in a file of {form!r} ({text}); split the file by format, "
                        "or set data.format"
                    )
        raise DataError(text) from None


def unread_fields(
    row: Mapping[str, Any], form: str, said: Said, columns: Mapping[str, str] | None = None
) -> set[str]:
    """Fields of a row that hold something, and of which `read_row` made nothing."""
    columns = columns or {}
    ours = renamed(row, columns)
    # One of our names for another column of the row.
    hidden = [k for k in columns if k not in columns.values() and not is_harmless("", row.get(k))]
    read = {"system", *FIELDS[detect_format(ours) if form == "auto" else form]}
    if isinstance(said, Chat):
        read.update(CHAT_FIELDS)
    others = [
        name
        for name, value in ours.items()
        if name not in read
        and not is_harmless(name, value)
        and not (name in ROW_MARKS and (is_mark(value) or is_weight(name, value)))
    ]
    absent = [ABSENT + k for k in OPTIONAL_COLUMNS if k in columns and columns[k] not in row]
    return {str(name) for name in (*hidden, *others, *absent)}


def with_system(said: Said, system: str | None) -> Said:
    """As a chat that begins with a system message; as it is if it has one, or there is none."""
    if not system or (isinstance(said, Chat) and said.messages[0]["role"] == "system"):
        return said
    if isinstance(said, Pair) and not said.prompt:
        raise DataError("a text has no place for a system message")
    chat = as_chat(said)
    messages = [*system_message(system), *chat.messages]
    return replace(chat, messages=messages, learned=[False, *chat.learned])


def system_message(text: str | None) -> list[Message]:
    """A chat's first message, if there is a text for it."""
    return [{"role": "system", "content": text}] if text else []


def _text_of(row: Mapping[str, Any], field: str, optional: bool = False) -> str:
    """A field that must be text, and not blank unless it is optional; a DataError if it is not."""
    value = row.get(field)
    if optional and value is None:
        return ""
    if field not in row:
        raise DataError(f"field {field!r} is missing")
    if not isinstance(value, str):
        raise DataError(f"field {field!r} must be a string, not {type(value).__name__}")
    if not optional and not value.strip():
        raise DataError(f"field {field!r} is empty")
    return value


def messages_of(row: Mapping[str, Any], field: str, asked: bool = False) -> list[Message]:
    """The messages of a field, in OpenAI's shape; a DataError that names one that is none.

    Of a model that is `asked` an answer may have been empty, and roles are the template's matter.
    """
    if field not in row:
        raise DataError(f"field {field!r} is missing")
    if not isinstance(values := row[field], (list, tuple)):
        raise DataError(f"field {field!r} must be a list of messages, not {type(values).__name__}")
    if not values:
        raise DataError(f"field {field!r} is empty")
    return [_message(value, f"{field}[{i}]", asked) for i, value in enumerate(values)]


def _message(value: Any, where: str, asked: bool = False) -> Message:
    """One message with `role` and `content`, from OpenAI's fields or ShareGPT's."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object but {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise DataError(f"{where} has a field whose name is not text")
    rest = dict(value)
    if "function_call" in rest:
        raise DataError(f"{where} has OpenAI's old field 'function_call'; write 'tool_calls'")
    marks = {name: rest.pop(name) for name in MARKS if name in rest}
    for name, weight in marks.items() if not asked else ():
        if not is_mark(weight) and not is_weight(name, weight):
            rule = "at least 0" if name in WEIGHTS else "0 or 1"
            raise DataError(f"{name} of {where} must be {rule}; got {repr(weight)[:40]}")
    if "masked" in marks:
        marks["masked"] = not marks["masked"]
    if marks and not asked:
        rest["weight"] = math.prod(marks.values())
    role = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content", None)
    content = rest.pop("value", None) if content is None else content
    if not isinstance(role, str) or not role:
        there = ", ".join(repr(name[:40]) for name in [*value][:5])
        fix = f"; rename its fields ({there}) to 'role' and 'content'"
        is_named = not value or not {"role", "from"}.isdisjoint(value)
        raise DataError(f"{where} has no role (field 'role', or 'from'){'' if is_named else fix}")
    if role.lower() == "function_call":  # ShareGPT's: the message is the call
        rest["tool_calls"], content = _calls_in(content, where), None
    role = ROLES.get(role.lower(), role if asked else role.lower())
    if role not in KNOWN_ROLES and not asked:
        fix = f"rename it to one of {', '.join(KNOWN_ROLES)}"
        raise DataError(f"{where} has the unknown role {role[:40]!r}; {fix}")
    if isinstance(content, (list, tuple)):
        content = _text_of_parts(content, rest, where)
    if calls := rest.pop("tool_calls", None):
        rest["tool_calls"] = _tool_calls(calls, where)
    content = _content(content, where, asked or bool(calls) or role in MAY_BE_EMPTY)
    if thoughts := next((rest[name] for name in THOUGHTS if rest.get(name)), None):
        # As transformers does: templates read either.
        rest = {**rest, "reasoning_content": thoughts}
        rest.setdefault("thinking", thoughts)
    return {"role": role, "content": content, **rest}


def _text_of_parts(parts: Any, message: dict[str, Any], where: str) -> str:
    """The text of OpenAI's or LLaMA-Factory's parts; thoughts and calls go into the message."""
    texts = {"text": "", "reasoning": ""}
    for i, part in enumerate(parts):
        place = f"part {i} of {where}"
        if not isinstance(part, Mapping):
            raise DataError(f"{place} is not an object but {type(part).__name__}")
        kind = str(part.get("type"))
        kind = "reasoning" if kind == "thinking" else kind.removeprefix("output_")
        if kind not in (*texts, "tool_call"):
            raise DataError(f"{place} is of type {kind[:40]!r}; only text can be learned")
        names = ("text", "value", "thinking")
        value = next((part[name] for name in names if isinstance(part.get(name), str)), None)
        if value is None:
            raise DataError(f"{place} has no 'text'")
        rest = {k for k, v in part.items() if v not in EMPTY} - {"type", *names} - HARMLESS
        if rest:
            raise DataError(f"{place} has a field that no template reads: {sorted(rest)[0]!r}")
        if kind == "tool_call":
            message["tool_calls"] = [*message.get("tool_calls", []), *_calls_in(value, where)]
        else:
            texts[kind] += value
    if texts["reasoning"]:
        message.setdefault("reasoning_content", texts["reasoning"])
    return texts["text"]


def _calls_in(content: Any, where: str) -> list[Any]:
    """The calls that a message, or a part of one, consists of, as JSON."""
    calls = _json(content, f"{where} is a call that is") if isinstance(content, str) else content
    return calls if isinstance(calls, list) else [calls]


def _content(content: Any, where: str, optional: bool) -> str:
    content = "" if content is None else content
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as content, not {type(content).__name__}")
    if not content.strip() and not optional:
        raise DataError(f"{where} has no content (field 'content', or 'value')")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's shape, but with arguments as an object, as templates want them."""
    if not isinstance(calls, (list, tuple)) or not calls:
        raise DataError(f"{where}.tool_calls must be a list of calls")
    parsed = []
    for call in calls:
        function = _function_of(call)
        if function is None:
            raise DataError(f"{where}.tool_calls has a call without a name")
        rest = {k for x in (call, function) for k, v in x.items() if v not in EMPTY}
        if unknown := rest - {"function", "name", "arguments"} - HARMLESS:
            raise DataError(f"{where}.tool_calls has an unknown field {sorted(unknown)[0]!r}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{where}.tool_calls has arguments that are")
        if not isinstance(arguments, Mapping) or not all(isinstance(k, str) for k in arguments):
            raise DataError(f"{where}.tool_calls has arguments that are not an object")
        function = {**function, "arguments": arguments}
        rest = {k: v for k, v in call.items() if k not in function}
        parsed.append({"type": "function", **rest, "function": function})
    return parsed


def _tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if row.get("functions"):
        raise DataError("has OpenAI's old field 'functions'; write 'tools'")
    if isinstance(tools, str) and tools:  # a column of a table cannot hold schemas of many shapes
        tools = _json(tools, "field 'tools' is")
    if not tools:
        return None
    if not isinstance(tools, list) or None in map(_function_of, tools):
        raise DataError("field 'tools' must be a list of JSON schemas, each with a name")
    return tools


def _function_of(tool: Any) -> Mapping[str, Any] | None:
    """The named function of a tool, or of a call; None if it has no name."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    named = isinstance(function, Mapping) and isinstance(function.get("name"), str)
    return function if named else None


def _json(text: str, what: str) -> Any:
    value = parse_json(text)
    if isinstance(value, DataError):
        raise DataError(f"{what} not JSON: {str(value).removeprefix('not JSON: ')}")
    return value


def _chat(messages: list[Message], row: Mapping[str, Any]) -> Chat:
    """A chat up to the last message to learn; OpenAI's `weight` 0 takes one out."""
    options = row.get("chat_template_kwargs")
    if not isinstance(options or {}, Mapping) or not all(isinstance(k, str) for k in options or {}):
        raise DataError("field 'chat_template_kwargs' must be an object")
    if reserved := RESERVED & (options or {}).keys():
        raise DataError(f"field 'chat_template_kwargs' may not hold {', '.join(sorted(reserved))}")
    weights = [message.pop("weight", 1) for message in messages]
    learned: list[float] = [
        m["role"] == "assistant" and (w if w not in (0, 1) else w == 1)
        for m, w in zip(messages, weights)
    ]
    if not any(learned):
        reason = "no answer is to be learned" if 0 in weights else "there is no answer"
        raise DataError(f"no supervised token: {reason}")
    end = max(i for i, weight in enumerate(learned) if weight) + 1  # the rest would teach nothing
    return Chat(messages[:end], learned[:end], _tools_of(row), dict(options or {}) or None)


def n_alike(first: Any, second: Any) -> int:
    """How many items two sequences have in common at their beginning."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second)))


def chat_question(instruction: str, input: str = "") -> str:
    """An instruction as the user of a chat puts it."""
    return f"{instruction}\n\n{input}" if input else instruction


def as_chat(said: Said) -> Chat:
    """An instruction or a pair as one question and its answer."""
    if isinstance(said, Chat):
        return said
    if isinstance(said, Instruction):
        question, answer = chat_question(said.instruction, said.input), said.output
    else:
        question, answer = said.prompt, said.completion
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(turns, [False, True])
