"""What a row says becomes text: prompts and answers, written as the model is asked for them.

A template writes a chat. Where the text before each answer is a prefix of the whole chat, one text
holds them all; where the template rewrites what came before, each answer gets a text of its own.
"""

import bisect
import contextlib
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_qlora.data.marks import is_harmless
from mlx_qlora.data.rows import THOUGHTS, Chat, Instruction, Message, Pair, Said, as_chat, n_alike
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError, TokenizerError

# ---- a row as text -------------------------------------------------------------------------------

ALPACA = ("alpaca", "alpaca-preamble")  # templates of ours
NAMED = ("auto", *ALPACA, "chat")  # any other template is a file
NO_TEMPLATE = (
    "the model has no chat template; name a file with one (data.template=FILE), or train the "
    "instruct model of its family"
)
CANNOT_WRITE = (
    "cannot write messages; leave it out, or name a file with a chat template if the model has none"
)
Segments = list[tuple[str, float]]  # (text, weight of its labels; False is not learned), in order
# A template that writes today's date would give a row other tokens tomorrow, so that a run could
# not be continued. This day is the one that Llama 3.1's template falls back to.
ROW_DATE = (2024, 7, 26)


@dataclass(frozen=True)
class Template:
    """How rows are written; "auto" is alpaca for instructions, chat for messages."""

    name: str  # "auto", "alpaca", "alpaca-preamble" or "chat"
    source: str | None  # the Jinja source that writes chats; None if the model has none
    history: str = "auto"  # "joint", "as_asked", or the first of them that a template allows

    def documents(self, said: Said, tokenizer: Tokenizer) -> tuple[list[Segments], set[str]]:
        """The texts of one row, each of which attends to itself alone, or a DataError.

        A template that rewrites what came before (drops thoughts, for instance) writes no text in
        which every answer stands as the model was asked for it: then each answer gets a text. The
        second value is the names of fields of messages that the template does not read.
        """
        if self.history != "joint" and self._writes_chat(said):
            chat = as_chat(said)
            if self.history == "auto":
                with contextlib.suppress(NotNestedError):
                    return self._joint(chat, tokenizer)
            return _complete(chat, self.source, tokenizer, _as_asked)
        return self._joint(said, tokenizer)

    def _joint(self, said: Said, tokenizer: Tokenizer) -> tuple[list[Segments], set[str]]:
        if self._writes_chat(said):
            return _complete(as_chat(said), self.source, tokenizer, _in_one_text)
        if isinstance(said, Pair):
            return [[(said.prompt, False), (said.completion, True)]], set()
        if isinstance(said, Instruction):
            prompt = alpaca_prompt(said.instruction, said.input, self.name == ALPACA[1])
            return [[(prompt, False), (said.output, True)]], set()
        raise DataError(f"data.template={self.name} {CANNOT_WRITE}")

    def _writes_chat(self, said: Said) -> bool:
        if isinstance(said, Chat):
            return self.name not in ALPACA
        return self.name == "chat" and not (isinstance(said, Pair) and not said.prompt)


# What the Stanford project, and most trainers after it, write before an instruction.
PREAMBLE = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n"
)


def alpaca_prompt(instruction: str, input: str = "", preamble: bool = False) -> str:
    """The text before the response, in training and when asking the tuned model."""
    before = ", paired with an input that provides further context" if input else ""
    block = f"### Input:\n{input}\n\n" if input else ""
    task = f"### Instruction:\n{instruction}\n\n{block}### Response:\n"
    return PREAMBLE.format(before) + task if preamble else task


MARK = "\N{WHITE SQUARE}"  # in the place of a question


def alpaca_template(bos: bool, name: str = ALPACA[0]) -> str:
    """A chat template (Jinja) that writes each question as `alpaca_prompt` does, after a BOS."""
    before, after = alpaca_prompt(MARK, preamble=name == ALPACA[1]).split(MARK)
    return (
        "{{ bos_token }}" * bos + "{% for message in messages %}"
        "{% if message['role'] == 'user' %}"
        f"{{{{ {before!r} + message['content'] + {after!r} }}}}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
    )


UNKNOWN_BEGIN = (
    "the chat template writes a prompt in another way once its answer follows, and has no "
    "{% generation %} markers, so it is not known where answers begin; name a template for "
    "training with data.template"
)


class NotNestedError(DataError):
    """No one text of a chat holds every answer as the model is asked for it."""


Render = Callable[..., str]  # messages, and options of `render_template` -> text


def _renderer(chat: Chat, source: str | None, tokenizer: Tokenizer) -> Render:
    """How the template writes messages of a chat; a DataError for what it cannot write."""
    # Here, as Jinja takes a moment to import.
    from mlx_qlora.data.templates import EndlessTemplate, render_template

    source = tokenizer.template_for(source, chat.tools)
    if source is None:
        raise DataError(NO_TEMPLATE)

    def render(messages: list[Message], **how: Any) -> str:
        given = {"date": ROW_DATE, "options": chat.options, **how}
        try:
            return render_template(source, messages, chat.tools, tokenizer.special_tokens, **given)
        except EndlessTemplate as error:
            raise TokenizerError(f"the chat template does not end: {error.args[0]}") from None
        except TokenizerError as error:
            raise DataError(f"the chat template refuses it: {error.args[0]}") from None

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
    return after[: n_alike(after, render([{**chat.messages[0], "content": other}]))]


def _ended(text: str, message: Message, tokenizer: Tokenizer) -> str:
    """An answer without what a template adds after its end, such as the next answer's header."""
    visible = _visible(message["content"])
    if visible and visible in text:
        start = text.index(visible) + len(visible)
        ends = [text.find(end, start) for end in tokenizer.end_texts if end in text[start:]]
        at = min(ends, default=-1)
    else:  # a call, whose arguments may spell an end
        at = max((text.rfind(end) for end in tokenizer.end_texts), default=-1)
    if at < 0:
        return text
    end = at + max(len(end) for end in tokenizer.end_texts if text.startswith(end, at))
    return text[:end] if text[end:].strip() else text


def _visible(content: str) -> str:
    """What a message says after its thoughts."""
    return content.rpartition("</think>")[2].strip()


def _as_asked(chat: Chat, source: str | None, tokenizer: Tokenizer) -> list[Segments]:
    """For each answer the text that the model is asked with, and what it is to answer."""
    render = _renderer(chat, source, tokenizer)
    documents = []
    for i, message in enumerate(chat.messages):
        if chat.learned[i]:
            after = render(chat.messages[: i + 1])
            before = _before(chat, i, after, render)
            try:
                answer = _answer(before, after, message, tokenizer)
            except NotNestedError:
                answer = _answer_to_another(chat, i, before, after, render, tokenizer)
            if not any(end in answer for end in tokenizer.end_texts):
                answer += _end_of_call(chat, i, render, tokenizer)
            documents.append([(before, False), (answer, chat.learned[i])])
    return documents


def _answer_to_another(
    chat: Chat, i: int, before: str, after: str, render: Render, tokenizer: Tokenizer
) -> str:
    """What message i is as the answer to fewer turns, where it decides how those are written."""
    turns, message = chat.messages[:i], chat.messages[i]
    n_asked = next((n for n in range(i, 0, -1) if turns[n - 1]["role"] != "assistant"), 0)
    if 0 < n_asked < i:
        # Qwen 3's template writes empty thoughts into an answer unless another one follows it.
        header = before.removeprefix(render(turns))
        asked = render(turns[:n_asked], add_generation_prompt=True)
        alone = render([*turns[:n_asked], message])
        answer = alone.removeprefix(asked)
        if header not in ("", before) and answer != alone and after.endswith(header + answer):
            return _ended(answer, message, tokenizer)
    if i > 1 and turns[0]["role"] == "system":
        # Mistral's template writes the system message where the user speaks last.
        asked = render(turns[1:], add_generation_prompt=True)
        return _answer(asked, render([*turns[1:], message]), message, tokenizer)
    raise NotNestedError(UNKNOWN_BEGIN)


def _end_of_call(chat: Chat, i: int, render: Render, tokenizer: Tokenizer) -> str:
    """The end token of a call that the template writes as the header of its result, or nothing.

    GLM-4's answers have no end of their own: a call ends with <|observation|>.
    """
    turns = chat.messages[: i + 1]
    if turns[-1].get("tool_calls"):
        with contextlib.suppress(DataError):
            after, answered = render(turns), render([*turns, {"role": "tool", "content": "A"}])
            ends = (end for end in tokenizer.end_texts if answered.startswith(after + end))
            return next(ends, "")
    return ""


def _answer(before: str, after: str, message: Message, tokenizer: Tokenizer) -> str:
    """What the model is to write after `before`, of a text that ends with the answer."""
    if after.startswith(before) and after != before:
        return _ended(after[len(before) :], message, tokenizer)
    # DeepSeek-R1's template opens the thoughts itself and cuts them from what was said.
    opened = re.search(r"\s*<(think|thinking|reasoning)>\s*$", before)
    content, visible = message["content"], _visible(message["content"])
    if opened is None or not visible or not after.startswith(before[: opened.start()]):
        raise NotNestedError(UNKNOWN_BEGIN)
    tag = opened[1]
    apart = next((message[name] for name in THOUGHTS if message.get(name)), "")
    thoughts = str(apart) or content.rpartition(f"</{tag}>")[0].strip().removeprefix(f"<{tag}>")
    rest = _ended(after[opened.start() :].lstrip(), {"content": visible}, tokenizer)
    if rest.startswith(f"<{tag}>"):  # the template writes thoughts of its own
        return rest.removeprefix(f"<{tag}>")
    return f"{thoughts.strip()}\n</{tag}>\n\n{rest}"


def _in_one_text(chat: Chat, source: str | None, tokenizer: Tokenizer) -> list[Segments]:
    """The text of a chat, cut by prefixes or, where those fail, by generation markers."""
    render = _renderer(chat, source, tokenizer)
    whole = render(chat.messages)
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
            return [_marked_segments(chat, str(source), render(chat.messages, mark=True))]
        ends = tokenizer.end_texts
        if not any(end in after[len(before) :] for end in ends):
            # GLM-4's answers end where the next turn begins.
            if end := _end_of_call(chat, i, render, tokenizer):
                ends = [end]
            rest = whole[len(after) :] or end
            after += next((end for end in ends if rest.startswith(end)), "")
        segments += [(whole[at : len(before)], False), (after[len(before) :], learned)]
        at = len(after)
    return [segments]


def _marked_segments(chat: Chat, source: str, marked: str) -> Segments:
    """The segments that the template itself marks as the assistant's words."""
    from mlx_qlora.data.templates import GENERATED

    if not re.search(r"\{%[-+]?\s*generation\b", source):
        raise NotNestedError(UNKNOWN_BEGIN)
    texts, turns = marked.split(GENERATED), zip(chat.messages, chat.learned)
    answers = [learned for message, learned in turns if message["role"] == "assistant"]
    if len(texts) != 2 * len(answers) + 1:
        raise DataError(
            f"the chat template marks {len(texts) // 2} answers, and the row has {len(answers)}"
        )
    segments = [(text, i % 2 == 1 and answers[i // 2]) for i, text in enumerate(texts)]
    last = max(i for i, (_, learned) in enumerate(segments) if learned)
    return segments[: last + 1]


# ---- whether all that a chat says is there -------------------------------------------------------

Write = Callable[[Chat], list[Segments]]
WORD = re.compile(r"[^<>\s]+(?![^<>\n]{0,40}>)")  # outside of tags
TAIL = 200  # characters in which the last word is looked for
SIGN = re.compile("\U000f1a2b\\d+\U000f1a2b")  # private use: in no text of a person
# What a template answers to, or what only says where a message is from.
ROUTING = {"role", "content", "tool_calls", "tool_call_id"}


@dataclass(frozen=True)
class _Part:
    """Something that a chat says."""

    name: str
    mark: str  # stands within it in a marked copy of the chat
    learned: bool  # whether it must be among the learned words
    field: str | None = None  # of a message, that a template may leave out: it is counted


def _complete(
    chat: Chat, source: str | None, tokenizer: Tokenizer, write: Callable[..., list[Segments]]
) -> tuple[list[Segments], set[str]]:
    """The documents of a chat, and the fields of messages that the template does not read.

    Many templates ignore tools, Llama 3.1's drops the text beside a call, R1's cuts thoughts: the
    row would teach other words than it says. What is written is decided by marks within each part:
    the same words may stand elsewhere, too. A NotNestedError names what is written nowhere.
    """

    def everything(chat: Chat) -> list[Segments]:
        return [[(_renderer(chat, source, tokenizer)(chat.messages), True)]]

    def written(chat: Chat) -> list[Segments]:
        return write(chat, source, tokenizer)

    try:
        documents = written(chat)
    except NotNestedError:  # it says more if something is not written at all
        _unread(chat, everything, everything(chat), everything)
        raise
    return documents, _unread(chat, written, documents, everything)


def _unread(chat: Chat, write: Write, documents: list[Segments], everything: Write) -> set[str]:
    marked, parts = _marked(chat)
    try:
        seen = _marks_in(_texts(everything(marked))[0], documents)
        if seen is None:
            seen = [set(SIGN.findall(text)) for text in _texts(write(marked))]
    except DataError:  # of a template that looks into what it writes
        seen = [set(), set()]
    unread = set[str]()
    for i, part in enumerate(parts):
        if part.mark in seen[part.learned] or (part.field or "") in unread:
            continue
        if _matters(i, chat, write, documents):
            continue
        if part.field is None:
            raise NotNestedError(f"the chat template does not write {part.name}")
        unread.add(part.field)
    return unread


def _marks_in(text: str, documents: list[Segments]) -> list[set[str]] | None:
    """The marks in the document, and in its learned words, by their places in the marked text.

    None if that is not the text of the document but for the marks, or if there are several: then
    the document has to be made again with the marks, which takes several times as long.
    """
    pieces, marks, whole = SIGN.split(text), SIGN.findall(text), _texts(documents)[0]
    if len(documents) > 1 or not "".join(pieces).startswith(whole):
        return None
    ends = [*itertools.accumulate(len(segment) for segment, _ in documents[0])]
    seen: list[set[str]] = [set(), set()]
    for place, mark in zip(itertools.accumulate(map(len, pieces)), marks):
        if place < len(whole):
            seen[0].add(mark)
            if documents[0][bisect.bisect_right(ends, place)][1]:
                seen[1].add(mark)
    return seen


def _texts(documents: list[Segments]) -> tuple[str, str]:
    """All text, and the learned text."""
    pieces = [piece for segments in documents for piece in segments]
    return "".join(x for x, _ in pieces), "".join(x for x, is_learned in pieces if is_learned)


def _matters(i: int, chat: Chat, write: Write, documents: list[Segments]) -> bool:
    """Whether part i, changed alone, changes what is written."""
    changed, parts = _marked(chat, only=i)
    try:
        texts = write(changed)
        if parts[i].learned:
            return _texts(texts)[True] != _texts(documents)[True]
        return texts != documents  # an option may move what is learned alone
    except DataError:
        return True


def _marked(chat: Chat, only: int | None = None) -> tuple[Chat, list[_Part]]:
    """A copy of a chat with a mark in each of its parts, or in one alone; and the parts."""
    parts: list[_Part] = []

    def mark(
        value: Any,
        name: str,
        learned: bool = False,
        field: str | None = None,
        place: int | None = None,
    ) -> Any:
        sign = f"\U000f1a2b{len(parts)}\U000f1a2b"
        parts.append(_Part(name, sign, learned, field))
        if only not in (None, len(parts) - 1):
            return value
        if isinstance(value, Mapping):
            return {**value, sign: sign}
        return sign if place is None else value[:place] + sign + value[place:]

    def mark_text(text: str, *how: Any) -> str:
        """With marks at its beginning, middle and end: a template may cut it anywhere."""
        # Within words: templates look for tags, and trim.
        tail = [*WORD.finditer(text, max(0, len(text) - TAIL))][-1:]
        words = [WORD.search(text), WORD.search(text, len(text) // 2), *tail]
        places = {sum(word.span()) // 2 for word in words if word} or {len(text) // 2}
        for place in sorted(places, reverse=True):
            text = mark(text, *how, place=place)
        return text

    def any_value(value: Any, *how: Any) -> Any:
        return mark_text(value, *how) if isinstance(value, str) and value else mark(value, *how)

    def call(entry: Any, name: str, learned: bool) -> Any:
        named = dict(entry["function"])
        named["name"] = mark_text(named["name"], name, learned)
        what = f"the arguments of {name}"
        named["arguments"] = {k: any_value(v, what, learned) for k, v in named["arguments"].items()}
        return {**entry, "function": named}

    def tool(entry: Any) -> Any:
        named = dict(entry.get("function", entry))
        name = f"the tool {named['name']!r}"
        named["name"] = mark_text(named["name"], name)
        if about := named.get("description"):
            named["description"] = mark_text(str(about), f"the description of {name}")
        parameters, what = named.get("parameters"), f"the parameters of {name}"
        if isinstance(parameters, Mapping) and parameters:
            properties = parameters.get("properties", parameters)
            if properties and "properties" in parameters:
                named["parameters"] = {**parameters, "properties": mark(properties, what)}
            elif properties:
                named["parameters"] = mark(parameters, what)
        return {**entry, "function": named} if "function" in entry else named

    def message(i: int) -> Message:
        copy, learned = dict(chat.messages[i]), bool(chat.learned[i])
        where, seen = f"messages[{i}]", set[str]()
        thoughts, end, visible = copy["content"].rpartition("</think>")
        if thoughts.strip() and learned:
            what = f"the content before </think> of {where}{WAYS_OUT}"
            thoughts = mark_text(thoughts, what, True)
        if visible.strip():
            visible = mark_text(visible, f"what {where} ({copy['role']}) says", learned)
        copy["content"] = thoughts + end + visible
        for name in [name for name in copy if name not in ROUTING]:
            if is_harmless(name, copy[name]):
                continue
            if name not in THOUGHTS:
                copy[name] = any_value(copy[name], name, False, f"messages[].{name}")
            elif learned and name not in seen:
                thought = any_value(copy[name], f"the {name} of {where}{WAYS_OUT}", True)
                # The same thoughts may be in several fields, of which a template reads one.
                alike = [x for x in THOUGHTS if copy.get(x) == chat.messages[i][name]]
                copy |= dict.fromkeys(alike, thought)
                seen.update(alike)
        if calls := copy.get("tool_calls"):
            copy["tool_calls"] = [call(each, f"the call in {where}", learned) for each in calls]
        return copy

    messages = [message(i) for i in range(len(chat.messages))]
    tools, options = [tool(each) for each in chat.tools or ()], dict(chat.options or {})
    for name, value in options.items():
        # Of these each alone: most are switches, and would turn the whole text round.
        n, field = len(parts), f"chat_template_kwargs.{name}"
        changed = not value if isinstance(value, bool) else mark(value, name, False, field)
        if isinstance(value, bool):
            mark(value, name, False, field)
        options[name] = changed if only == n else value
    copy = replace(chat, messages=messages, tools=tools or chat.tools, options=options or None)
    return copy, parts


WAYS_OUT = (
    "; leave it out, put it into the content, between <think> and </think>, or name a template for "
    "training with data.template"
)
