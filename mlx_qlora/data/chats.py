"""What a row says becomes text: prompts and answers, written as the model is asked for them.

A template writes a chat. Where the text before each answer is a prefix of the whole chat, one text
holds them all; where the template rewrites what came before, each answer gets a text of its own.
"""

import itertools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_qlora.data.rows import THOUGHTS, Chat, Instruction, Message, Pair, Said, as_chat
from mlx_qlora.data.tokenizer import GENERATED, Tokenizer, render_template
from mlx_qlora.errors import DataError, TokenizerError

# ---- a row as text -------------------------------------------------------------------------------

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
        return _with_thoughts(said, _as_asked(as_chat(said), self.source, tokenizer))

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
        return _chat_segments(as_chat(said), self.source, tokenizer)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The text before the response, in training and when asking the tuned model."""
    block = f"### Input:\n{input}\n\n" if input else ""
    return f"### Instruction:\n{instruction}\n\n{block}### Response:\n"


UNKNOWN_BEGIN = (
    "what the chat template writes before an answer is not how it begins the text with the answer "
    "or with all turns, and it has no {% generation %} markers: where the answers begin cannot be "
    "known"
)


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
        raise NotNestedError(UNKNOWN_BEGIN)
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
        raise NotNestedError(UNKNOWN_BEGIN)
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
