"""What a row says, and the text that it becomes."""

import itertools
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_qlora.data.tokenizer import GENERATED, Tokenizer, render_template
from mlx_qlora.errors import DataError, TokenizerError

# ---- a row -> what it says -----------------------------------------------------------------------

Message = dict[str, Any]
# ShareGPT's names, and those of its descendants, for the roles that templates know.
ROLES = {"human": "user", "function": "tool", "observation": "tool"} | dict.fromkeys(
    ("gpt", "chatgpt", "bot", "model", "function_call"), "assistant"
)
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool", "ipython")
MAY_BE_EMPTY = ("system", "developer", "tool", "ipython")
# Marks of a message: 0 and false take it out of what is learned, and so does `masked`.
MARKS = ("weight", "train", "training", "loss", "trainable", "masked")
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
    learned: list[bool]  # one for each message; only the assistant's can be True
    tools: list[dict[str, Any]] | None = None  # JSON schemas of what the assistant may call
    options: dict[str, Any] | None = None  # of the template, such as `enable_thinking`


Said = Instruction | Pair | Chat


def _read_alpaca(row: Mapping[str, Any]) -> Instruction:
    instruction, output = _text_of(row, "instruction"), _text_of(row, "output")
    return Instruction(instruction, _text_of(row, "input", optional=True), output)


def _read_prompt_completion(row: Mapping[str, Any]) -> Pair | Chat:
    """Fields `prompt` and `completion`: two texts, or two lists of messages; the second learned."""
    if not isinstance(row.get("prompt"), list) and not isinstance(row.get("completion"), list):
        return Pair(_text_of(row, "prompt"), _text_of(row, "completion"))
    prompt, completion = _messages_of(row, "prompt"), _messages_of(row, "completion")
    return _chat([*({**m, "weight": 0} for m in prompt), *completion], row)


FORMATS: dict[str, Callable[[Mapping[str, Any]], Said]] = {
    "alpaca": _read_alpaca,
    "messages": lambda row: _chat(_messages_of(row, "messages"), row),  # OpenAI's
    "sharegpt": lambda row: _chat(_messages_of(row, "conversations"), row),
    "prompt_completion": _read_prompt_completion,
    "text": lambda row: Pair("", _text_of(row, "text")),  # no prompt: all of it is learned
}
# The fields that tell a format, the surest first: chats often carry a `prompt` or a `text` too.
TELLING = {
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "alpaca": {"instruction", "output"},
    "prompt_completion": {"prompt", "completion"},
    "text": {"text"},
}
# What `data.columns` may name -> what data sets often call it.
COLUMNS = {
    "messages": "conversation dialog dialogue chat turns",
    "instruction": "question query problem prompt user user_input",
    "output": "answer response solution completion reply target assistant",
    "input": "context",
    "system": "system_prompt system_message",
    "text": "content body document article",
} | dict.fromkeys(("prompt", "completion", "conversations", "tools"), "")
OPTIONAL_COLUMNS = ("input", "system", "tools")


def detect_format(row: Mapping[str, Any]) -> str:
    """The format whose fields a row has; a DataError if it has those of none."""
    for name, fields in TELLING.items():
        if fields & row.keys():
            return name
    has = ", ".join(repr(name)[:40] for name in list(row)[:6]) or "none"
    raise DataError(
        "has the fields of no format: messages; conversations; instruction, output; "
        f"prompt, completion; text (it has: {has})"
    )


def likely_columns(row: Mapping[str, Any]) -> dict[str, str]:
    """A `data.columns` that reads a row of other names; an empty one if none is likely."""
    if any(fields <= row.keys() for fields in TELLING.values()):
        return {}
    names = {str(name).lower(): name for name in row}
    found = {}
    for field, likely in COLUMNS.items():
        column = next((names[name] for name in (field, *likely.split()) if name in names), None)
        kind = (list, tuple) if field == "messages" else str
        if column is not None and isinstance(row[column], kind):
            found[field] = column
    for needed, more in (
        (1, "messages system"),
        (2, "instruction output input system"),
        (1, "text"),
    ):
        fields = [field for field in more.split() if field in found]
        if fields[:needed] == more.split()[:needed]:
            return {field: found[field] for field in fields if found[field] != field}
    return {}


def _renamed(row: Mapping[str, Any], columns: Mapping[str, str]) -> Mapping[str, Any]:
    """A row whose fields have our names; a DataError if one that must be there is not."""
    for field, column in columns.items():
        if column not in row and field not in OPTIONAL_COLUMNS:
            raise DataError(f"field {column!r}, which data.columns takes as {field}, is missing")
    rest = {k: v for k, v in row.items() if k not in columns.values() and k not in columns}
    return rest | {field: row[column] for field, column in columns.items() if column in row}


def read_row(row: Any, form: str, columns: Mapping[str, str] | None = None) -> Said:
    """What a row says, in one of FORMATS or, for "auto", in the one that its fields tell.

    Args:
        columns: our names of fields -> the row's.
    """
    if isinstance(row, DataError):
        raise row
    if not isinstance(row, Mapping):
        raise DataError(f"not an object but {type(row).__name__}")
    columns = columns or {}
    ours = _renamed(row, columns) if columns else row
    try:
        form = detect_format(ours) if form == "auto" else form
        said = FORMATS[form](ours)
        if form not in ("messages", "sharegpt") and "system" not in columns:
            return said
        system = _text_of(ours, "system", optional=True)
        said = with_system(said, system)
        if system and isinstance(said, Chat) and said.messages[0]["content"] != system:
            raise DataError("field 'system' says something else than the system message")
        return said
    except DataError as error:
        text = re.sub(r"field '(\w+)'", lambda m: f"field {columns.get(m[1], m[1])!r}", str(error))
        likely = {} if columns else likely_columns(row)
        if likely and re.search("no format|is missing", text):
            pairs = json.dumps(likely, ensure_ascii=False).replace('"', "")
            text += f"; data.columns={shlex.quote(pairs)} would read it"
        raise DataError(text) from None


def with_system(said: Said, system: str | None) -> Said:
    """As a chat that begins with a system message; as it is if it has one, or there is none."""
    if not system or (isinstance(said, Chat) and said.messages[0]["role"] == "system"):
        return said
    if isinstance(said, Pair) and not said.prompt:
        raise DataError("a text has no place for a system message")
    chat, first = _as_chat(said), {"role": "system", "content": system}
    return replace(chat, messages=[first, *chat.messages], learned=[False, *chat.learned])


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


def _messages_of(row: Mapping[str, Any], field: str) -> list[Message]:
    if field not in row:
        raise DataError(f"field {field!r} is missing")
    if not isinstance(values := row[field], (list, tuple)):
        raise DataError(f"field {field!r} must be a list of messages, not {type(values).__name__}")
    if not values:
        raise DataError(f"field {field!r} is empty")
    return [_message(value, f"{field}[{i}]") for i, value in enumerate(values)]


def _message(value: Any, where: str) -> Message:
    """One message with `role` and `content`, from OpenAI's fields or ShareGPT's."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where} is not an object but {type(value).__name__}")
    if not all(isinstance(key, str) for key in value):
        raise DataError(f"{where} has a field whose name is not text")
    rest = {k: v for k, v in value.items() if v is not None}
    if "function_call" in rest:
        raise DataError(f"{where} has OpenAI's old field 'function_call'; write 'tool_calls'")
    marks = {name: rest.pop(name) for name in MARKS if name in rest}
    for name, weight in marks.items():
        if not isinstance(weight, (int, float)) or weight not in (0, 1):
            raise DataError(f"{where} has the {name} {repr(weight)[:40]}; 0 and 1 are known")
    if "masked" in marks:
        marks["masked"] = not marks["masked"]
    if marks:
        rest["weight"] = min(map(int, marks.values()))
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
    content = "" if content is None else content
    if not isinstance(content, str):
        raise DataError(f"{where} must have text as content, not {type(content).__name__}")
    if not content.strip() and not optional:
        raise DataError(f"{where} has no content (field 'content', or 'value')")
    return content


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """OpenAI writes a call's arguments as JSON text, templates want them as an object."""
    if not isinstance(calls, (list, tuple)) or not calls:
        raise DataError(f"{where}.tool_calls must be a list of calls")
    parsed = []
    for call in calls:
        function = _function_of(call)
        if function is None:
            raise DataError(f"{where}.tool_calls has a call without a name")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _json(arguments or "{}", f"{where}.tool_calls has arguments that are")
        if not isinstance(arguments, Mapping) or not all(isinstance(k, str) for k in arguments):
            raise DataError(f"{where}.tool_calls has arguments that are not an object")
        function = {**function, "arguments": arguments}
        parsed.append({**call, "function": function} if "function" in call else function)
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
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"{what} not JSON") from None


def _chat(messages: list[Message], row: Mapping[str, Any]) -> Chat:
    """A chat up to the last message to learn; OpenAI's `weight` 0 takes one out."""
    options = row.get("chat_template_kwargs")
    if not isinstance(options or {}, Mapping):
        raise DataError("field 'chat_template_kwargs' must be an object")
    weights = [message.pop("weight", 1) for message in messages]
    learned = [m["role"] == "assistant" and w != 0 for m, w in zip(messages, weights)]
    if True not in learned:
        reason = "is not to be learned" if 0 in weights else "is missing"
        raise DataError(f"no supervised token: a message of the assistant {reason}")
    end = len(learned) - learned[::-1].index(True)  # what follows could teach nothing
    return Chat(messages[:end], learned[:end], _tools_of(row), dict(options or {}) or None)


# ---- what it says -> text ------------------------------------------------------------------------

Segments = list[tuple[str, bool]]  # (text, whether it is learned), in order
# A template that writes today's date would give a row other tokens tomorrow, so that a run could
# not be continued. This day is the one that Llama 3.1's template falls back to.
ROW_DATE = (2024, 7, 26)


@dataclass(frozen=True)
class Template:
    """How rows are written; "auto" is alpaca for instructions, chat for messages."""

    name: str  # "auto", "alpaca" or "chat"
    source: str | None  # the Jinja source that writes chats; None if the model has none
    history: str = "auto"  # "joint", "as_asked", or the first of them that a template allows

    def documents(self, said: Said, tokenizer: Tokenizer) -> list[Segments]:
        """The texts of one row, each of which attends to itself alone, or a DataError.

        A template that rewrites what came before (drops thoughts, for instance) writes no text in
        which every answer stands as the model was asked for it: then each answer gets a text.
        """
        apart = self.history != "joint" and self._writes_chat(said)
        if not apart or self.history == "auto":
            try:
                return _with_thoughts(said, [self.segments(said, tokenizer)])
            except NotNestedError:
                if not apart:
                    raise
        return _with_thoughts(said, _as_asked(_as_chat(said), self.source, tokenizer))

    def _writes_chat(self, said: Said) -> bool:
        if isinstance(said, Chat):
            return self.name != "alpaca"
        return self.name == "chat" and not (isinstance(said, Pair) and not said.prompt)

    def segments(self, said: Said, tokenizer: Tokenizer) -> Segments:
        """The text of one row, cut where learned and unlearned text meet, or a DataError."""
        if isinstance(said, Pair) and (self.name in ("auto", "alpaca") or not said.prompt):
            return [(said.prompt, False), (said.completion, True)]
        if isinstance(said, Instruction) and self.name in ("auto", "alpaca"):
            return [(alpaca_prompt(said.instruction, said.input), False), (said.output, True)]
        if self.name == "alpaca":
            raise DataError("data.template=alpaca cannot write messages; set data.template=chat")
        return _chat_segments(_as_chat(said), self.source, tokenizer)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The text before the response, in training and when asking the tuned model."""
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


def chat_question(instruction: str, input: str = "") -> str:
    """An instruction as the user of a chat puts it."""
    return f"{instruction}\n\n{input}" if input else instruction


def _as_chat(said: Said) -> Chat:
    """An instruction or a pair as one question and its answer."""
    if isinstance(said, Chat):
        return said
    if isinstance(said, Instruction):
        question, answer = chat_question(said.instruction, said.input), said.output
    else:
        question, answer = said.prompt, said.completion
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Chat(turns, [False, True])


class NotNestedError(DataError):
    """No one text of a chat holds every answer as the model is asked for it."""


Render = Callable[..., str]  # messages, and options of `render_template` -> text


def _renderer(chat: Chat, source: str | None, tokenizer: Tokenizer) -> Render:
    """How the template writes messages of a chat; a DataError for what it cannot write."""
    if source is None:
        raise DataError("the model has no chat template: set data.template to alpaca or to a file")
    source = tokenizer.template_for(source, chat.tools)

    def render(messages: list[Message], **how: Any) -> str:
        given = {"date": ROW_DATE, "options": chat.options, **how}
        try:
            return render_template(source, messages, chat.tools, tokenizer.special_tokens, **given)
        except TokenizerError as error:
            raise DataError(f"the chat template refuses it: {error}") from None

    speakers = (m["role"] for m in chat.messages if m["role"] != "system")
    if chat.tools and next(speakers) == "assistant":
        # Llama 3.1's template writes tools into the first turn, as the user's, whoever speaks.
        raise DataError("has tools but begins with the assistant; put the user's question first")
    return render


def _before(chat: Chat, i: int, after: str, render: Render) -> str:
    """The text that asks for message i, whose own text ends `after`."""
    if i:
        return render(chat.messages[:i], add_generation_prompt=True)
    # Most templates refuse no messages: what two first answers have in common.
    other = "B" if chat.messages[0]["content"].lstrip().startswith("A") else "A"
    return _common_start(after, render([{**chat.messages[0], "content": other}]))


def _common_start(first: str, second: str) -> str:
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second))
    return "".join(letter for letter, _ in same)


def _ended(text: str, message: Message, tokenizer: Tokenizer) -> str:
    """An answer without what a template adds after its end, such as the next answer's header."""
    visible = _visible(message["content"])
    start = text.rfind(visible) + len(visible) if visible and visible in text else 0
    ends = (text.find(end, start) + len(end) for end in tokenizer.end_texts if end in text[start:])
    end = min(ends, default=len(text))
    return text[:end] if text[end:].strip() else text


def _visible(content: str) -> str:
    """What a message says after its thoughts."""
    return content.rpartition("</think>")[2].strip()


def _as_asked(chat: Chat, source: str | None, tokenizer: Tokenizer) -> list[Segments]:
    """For each answer the text that the model is asked with, and what it is to answer."""
    render = _renderer(chat, source, tokenizer)
    _refuse_unwritten(chat, render(chat.messages))
    documents = []
    for i, message in enumerate(chat.messages):
        if chat.learned[i]:
            after = render(chat.messages[: i + 1])
            before = _before(chat, i, after, render)
            documents.append([(before, False), (_answer(before, after, message, tokenizer), True)])
    return documents


def _answer(before: str, after: str, message: Message, tokenizer: Tokenizer) -> str:
    """What the model is to write after `before`, of a text that ends with the answer."""
    if after.startswith(before) and after != before:
        return _ended(after[len(before) :], message, tokenizer)
    # DeepSeek-R1's template opens the thoughts itself and cuts them from what was said.
    opened = re.fullmatch(
        r"\s*<(think|thinking|reasoning)>\s*", before[len(_common_start(before, after)) :]
    )
    content, visible = message["content"], _visible(message["content"])
    if opened is None or not visible or visible not in after:
        raise NotNestedError(
            "what the chat template writes before an answer is not how it begins the text with "
            "the answer or with all turns, and it has no {% generation %} markers: where the "
            "answers begin cannot be known"
        )
    tag = opened[1]
    apart = next((message[name] for name in THOUGHTS if message.get(name)), "")
    thoughts = str(apart) or content.rpartition(f"</{tag}>")[0].strip().removeprefix(f"<{tag}>")
    rest = _ended(after[after.rindex(visible) :], {"content": visible}, tokenizer)
    return f"{thoughts.strip()}\n</{tag}>\n\n{rest}"


def _chat_segments(chat: Chat, source: str | None, tokenizer: Tokenizer) -> Segments:
    """The segments of a chat, found by prefixes or, where those fail, by generation markers."""
    render = _renderer(chat, source, tokenizer)
    whole = render(chat.messages)
    _refuse_unwritten(chat, whole)
    segments: Segments = []
    at = 0
    for i, learned in enumerate(chat.learned):
        if not learned:
            continue
        after = whole if i + 1 == len(chat.messages) else render(chat.messages[: i + 1])
        before = _before(chat, i, after, render)
        if after.startswith(before):
            after = before + _ended(after[len(before) :], chat.messages[i], tokenizer)
        # Templates that drop earlier thoughts, or open an answer with <think>, fail here.
        nested = whole.startswith(after) and after.startswith(before) and at <= len(before)
        if not nested or before == after:
            return _marked_segments(chat, str(source), render(chat.messages, mark=True))
        segments += [(whole[at : len(before)], False), (after[len(before) :], True)]
        at = len(after)
    return segments


def _marked_segments(chat: Chat, source: str, marked: str) -> Segments:
    """The segments that the template itself marks as the assistant's words."""
    if not re.search(r"\{%[-+]?\s*generation\b", source):
        raise NotNestedError(
            "what the chat template writes before an answer is not how it begins the text with "
            "the answer or with all turns, and it has no {% generation %} markers: where the "
            "answers begin cannot be known"
        )
    texts, turns = marked.split(GENERATED), zip(chat.messages, chat.learned)
    answers = [learned for message, learned in turns if message["role"] == "assistant"]
    if len(texts) != 2 * len(answers) + 1:
        raise DataError(
            f"the chat template marks {len(texts) // 2} answers of the {len(answers)} there are"
        )
    segments = [(text, i % 2 == 1 and answers[i // 2]) for i, text in enumerate(texts)]
    last = max(i for i, (_, learned) in enumerate(segments) if learned)
    return segments[: last + 1]


def _refuse_unwritten(chat: Chat, whole: str) -> None:
    """Raises a DataError that names the first message, call or tool that the template leaves out.

    Many templates ignore tools, and Llama 3.1's drops the text beside a call: the row would teach
    other words than it says.
    """
    for i, message in enumerate(chat.messages):
        if not _is_written(message["content"], whole):
            role = message["role"]
            raise DataError(f"the chat template does not write what messages[{i}] ({role}) says")
        for call in message.get("tool_calls", ()):
            function = call.get("function", call)
            if not all(name in whole for name in (function["name"], *function["arguments"])):
                raise DataError(f"the chat template does not write the call in messages[{i}]")
    for tool in chat.tools or ():
        name = tool.get("function", tool)["name"]
        if name not in whole:
            raise DataError(f"the chat template does not write the tool {name!r}")


def _with_thoughts(said: Said, documents: list[Segments]) -> list[Segments]:
    """The documents of a row; a NotNestedError for thoughts that are learned nowhere."""
    if not isinstance(said, Chat):
        return documents
    learned = "".join(text for segments in documents for text, is_learned in segments if is_learned)
    for i, message in enumerate(said.messages):
        thoughts = {name: message.get(name) for name in THOUGHTS}
        thoughts["content before </think>"] = message["content"].rpartition("</think>")[0]
        for name, text in thoughts.items() if said.learned[i] else ():
            if text and not _is_written(str(text).rstrip() + "\n", learned):
                raise NotNestedError(
                    f"the chat template does not write the {name} of messages[{i}]; leave it out, "
                    "put it into the content, between <think> and </think>, or name a template "
                    "for training with data.template"
                )
    return documents


def _is_written(content: str, whole: str) -> bool:
    """Whether the last line is there, as it is or as JSON; templates cut thoughts, and trim."""
    answer = content.rpartition("</think>")[2].strip()
    line = (answer.splitlines() or [""])[-1].strip()
    return line in whole or json.dumps(line, ensure_ascii=False)[1:-1] in whole
