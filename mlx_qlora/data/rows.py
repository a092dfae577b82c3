"""What a row says, whatever its format: an instruction, a prompt and its completion, or a chat.

The formats are those that people have: Alpaca's fields, OpenAI's `messages`, ShareGPT's
`conversations`, `prompt` / `completion` (texts or messages), and plain `text`.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qlora.errors import DataError

Message = dict[str, Any]

# ShareGPT's names, and those of its descendants, for the roles that templates know.
ROLES = {
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"},
    **{"model": "assistant", "function_call": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
MAY_BE_EMPTY = ("system", "developer", "tool", "ipython")


@dataclass(frozen=True)
class Instruction:
    """A task, something it is about (possibly empty), and the answer."""

    instruction: str
    input: str
    output: str


@dataclass(frozen=True)
class Pair:
    """Two texts that are taken as they are; a plain text has an empty prompt."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages in order, ending with the last one to learn.

    Attributes:
        messages: with `role` and `content`, and more where the template reads it.
        learned: for each message, whether it is to be learned; only the assistant's can be.
        tools: JSON schemas of functions that the assistant may call.
    """

    messages: list[Message]
    learned: list[bool]
    tools: list[dict[str, Any]] | None = None


Said = Instruction | Pair | Chat


# ---- one reader for each format ----------------------------------------------------------------


def read_alpaca(row: Mapping[str, Any]) -> Instruction:
    """Fields `instruction`, `input` (may be left out) and `output`."""
    instruction, output = text_of(row, "instruction"), text_of(row, "output")
    return Instruction(instruction, text_of(row, "input", optional=True), output)


def read_messages(row: Mapping[str, Any]) -> Chat:
    """Field `messages`, and `tools` if there are any; OpenAI's format for fine-tuning."""
    return _chat(_messages_of(row, "messages"), _tools_of(row))


def read_sharegpt(row: Mapping[str, Any]) -> Chat:
    """Field `conversations` with `from` and `value`; `system` and `tools` may stand beside it."""
    messages = _messages_of(row, "conversations")
    system = {"role": "system", "content": text_of(row, "system", optional=True)}
    if system["content"] and system != messages[0]:
        if messages[0]["role"] == "system":
            raise DataError("field 'system' says something else than the system message")
        messages = [system, *messages]
    return _chat(messages, _tools_of(row))


def read_prompt_completion(row: Mapping[str, Any]) -> Pair | Chat:
    """Fields `prompt` and `completion`: two texts, or two lists of messages.

    Of messages only the completion's are learned.
    """
    if not isinstance(row.get("prompt"), list) and not isinstance(row.get("completion"), list):
        return Pair(text_of(row, "prompt"), text_of(row, "completion"))
    prompt, completion = _messages_of(row, "prompt"), _messages_of(row, "completion")
    return _chat([*({**m, "weight": 0} for m in prompt), *completion], _tools_of(row))


def read_text(row: Mapping[str, Any]) -> Pair:
    """Field `text`: it has no prompt, all of it is learned."""
    return Pair("", text_of(row, "text"))


FORMATS: dict[str, Callable[[Mapping[str, Any]], Said]] = {
    "alpaca": read_alpaca,
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "prompt_completion": read_prompt_completion,
    "text": read_text,
}
# The fields that tell a format, the surest first: chats often carry a `prompt` or a `text` too.
TELLING = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields a row has.

    Raises:
        DataError: it has those of none.
    """
    for name, fields in TELLING.items():
        if fields & row.keys():
            return name
    has = ", ".join(repr(name)[:40] for name in list(row)[:6]) or "none"
    raise DataError(
        "has the fields of no format: messages; conversations; instruction, output; "
        f"prompt, completion; text (it has: {has})"
    )


def read_row(row: Any, form: str) -> Said:
    """What a row says, in a format of FORMATS or, for "auto", in the one that its fields tell.

    Raises:
        DataError: the reason for which it cannot be used; also if the row is a DataError.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"not an object but {type(row).__name__}")
    return FORMATS[detect_format(row) if form == "auto" else form](row)


# ---- fields ------------------------------------------------------------------------------------


def text_of(row: Mapping[str, Any], field: str, optional: bool = False) -> str:
    """A field that must be text.

    Raises:
        DataError: the field is missing, empty or of another type.
    """
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


def _messages_of(row: Mapping[str, Any], field: str) -> list[Message]:
    values = row.get(field)
    if field not in row:
        raise DataError(f"field {field!r} is missing")
    if not isinstance(values, (list, tuple)):
        raise DataError(f"field {field!r} must be a list of messages, not {type(values).__name__}")
    if not values:
        raise DataError(f"field {field!r} is empty")
    return [_message(value, f"{field}[{i}]") for i, value in enumerate(values)]


def _message(value: Any, where: str) -> Message:
    """One message with `role` and `content`, from OpenAI's fields or ShareGPT's."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object but {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise DataError(f"{where} has a field whose name is no text")
    rest = {k: v for k, v in value.items() if v is not None}
    if "function_call" in rest:
        raise DataError(f"{where} has OpenAI's old field 'function_call'; write 'tool_calls'")
    weight = rest.get("weight", 1)
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise DataError(f"{where} has the weight {repr(weight)[:40]}; 0 and 1 are known")
    role = rest.pop("role", None) or rest.pop("from", None)
    content = rest.pop("content", None)
    content = rest.pop("value", None) if content is None else content
    if not isinstance(role, str) or not role:
        raise DataError(f"{where} has no role (field 'role', or 'from')")
    role = ROLES.get(role.lower(), role.lower())
    if role not in KNOWN_ROLES:
        raise DataError(f"{where} has the role {role[:40]!r}; known: {', '.join(KNOWN_ROLES)}")
    if calls := rest.pop("tool_calls", None):
        rest["tool_calls"] = _tool_calls(calls, where)
    content = _content(content, where, bool(calls) or role in MAY_BE_EMPTY)
    return {"role": role, "content": content, **rest}


def _content(content: Any, where: str, optional: bool) -> str:
    if isinstance(content, (list, tuple)):  # OpenAI's parts; only text is known to a Llama
        parts = [part for part in content if isinstance(part, Mapping)]
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        known = [text for text in texts if isinstance(text, str)]
        if len(known) < len(content):
            raise DataError(f"{where} has content that is not text")
        content = "".join(known)
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as content, not {type(content).__name__}")
    if not content.strip() and not optional:
        raise DataError(f"{where} has no content (field 'content', or 'value')")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI writes a call's arguments as JSON text, templates want them as an object."""
    if not isinstance(calls, (list, tuple)) or not calls:
        raise DataError(f"{where}.tool_calls must be a list of calls")
    made = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}.tool_calls has a call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{where}.tool_calls has arguments that are")
        if not isinstance(arguments, Mapping) or not all(isinstance(k, str) for k in arguments):
            raise DataError(f"{where}.tool_calls has arguments that are no object")
        function = {**function, "arguments": arguments}
        made.append({**call, "function": function} if "function" in call else function)
    return made


def _tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if row.get("functions"):
        raise DataError("has OpenAI's old field 'functions'; write 'tools'")
    if isinstance(tools, str) and tools:  # a column of a table cannot hold schemas of many shapes
        tools = _json(tools, "field 'tools' is")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(map(_is_schema, tools)):
        raise DataError("field 'tools' must be a list of JSON schemas, each with a name")
    return tools


def _is_schema(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str)


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{what} not JSON") from None


def _chat(messages: list[Message], tools: list[dict[str, Any]] | None) -> Chat:
    """A chat up to the last message to learn; OpenAI's `weight` 0 takes one out."""
    weights = [message.pop("weight", 1) for message in messages]
    learned = [m["role"] == "assistant" and w != 0 for m, w in zip(messages, weights)]
    if True not in learned:
        reason = "is not to be learned" if 0 in weights else "is missing"
        raise DataError(f"no supervised token: a message of the assistant {reason}")
    end = len(learned) - learned[::-1].index(True)  # what follows could teach nothing
    return Chat(messages[:end], learned[:end], tools)
