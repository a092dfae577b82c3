"""What a row says becomes text: stretches of context, and stretches to learn.

The two Alpaca forms below are Stanford's without its preamble; a row without `input` leaves the
whole Input block out. Chats are written by a chat template, and where the learned stretches are
is found by construction: what the template writes before an answer must be a prefix of what it
writes with it, and that of the whole conversation.
"""

import itertools
import json
from dataclasses import dataclass
from typing import Any

from mlx_qlora.data.chat_template import GENERATED, can_mark, render_template
from mlx_qlora.data.rows import Chat, Instruction, Pair, Said
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import DataError, TokenizerError

Segments = list[tuple[str, bool]]  # (text, whether it is learned), in order

# Templates that write today's date would give a row other tokens tomorrow, and a run that goes
# on then would have other data. This day is the one that Llama 3.1's template falls back to.
ROW_DATE = (2024, 7, 26)


@dataclass(frozen=True)
class Template:
    """How rows are written.

    Attributes:
        name: "alpaca", "chat", a file's name, or "auto": alpaca for instructions, texts as they
            are, the chat template for messages.
        source: the Jinja source that writes chats; None if the model has none.
    """

    name: str
    source: str | None

    def segments(self, said: Said, tokenizer: Tokenizer) -> Segments:
        """The text of one row, in stretches.

        Raises:
            DataError: the template refuses the row, or does not show which part is learned.
        """
        if isinstance(said, Pair) and (self.name in ("auto", "alpaca") or not said.prompt):
            return [(said.prompt, False), (said.completion, True)]
        if isinstance(said, Instruction) and self.name in ("auto", "alpaca"):
            return [(alpaca_prompt(said.instruction, said.input), False), (said.output, True)]
        if self.name == "alpaca":
            raise DataError("data.template=alpaca cannot write messages; set data.template=chat")
        return chat_segments(_as_chat(said), self.source, tokenizer)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """What stands before the response, in training and when asking the tuned model."""
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
    return Chat([_message("user", question), _message("assistant", answer)], [False, True])


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


# ---- chats -------------------------------------------------------------------------------------


def chat_segments(chat: Chat, source: str | None, tokenizer: Tokenizer) -> Segments:
    """The stretches of a chat, found by prefixes or, where those fail, by generation markers.

    Raises:
        DataError: the template refuses the messages, or shows neither.
    """
    if source is None:
        raise DataError("the model has no chat template: set data.template to alpaca or to a file")

    def render(messages: list[dict[str, Any]], **how: Any) -> str:
        try:
            return render_template(
                source, messages, chat.tools, tokenizer.special_tokens, date=ROW_DATE, **how
            )
        except TokenizerError as error:
            raise DataError(f"the chat template refuses it: {error}") from None

    roles = [message["role"] for message in chat.messages]
    if chat.tools and next(role for role in roles if role != "system") == "assistant":
        # Llama 3.1's template writes tools into the first turn, whoever's it is, as the user's.
        raise DataError("has tools but begins with the assistant; put the user's question first")
    whole = render(chat.messages)
    refuse_unwritten(chat, whole)
    segments: Segments = []
    at = 0
    for i, learned in enumerate(chat.learned):
        if not learned:
            continue
        after = whole if i + 1 == len(chat.messages) else render(chat.messages[: i + 1])
        if i:
            before = render(chat.messages[:i], add_generation_prompt=True)
        else:  # templates want a message: what two different first answers have in common
            other = "B" if chat.messages[0]["content"].lstrip().startswith("A") else "A"
            same = zip(after, render([{**chat.messages[0], "content": other}]))
            n = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same))
            before = after[:n]
        begun = whole.startswith(after) and after.startswith(before) and at <= len(before)
        if not begun or before == after:
            return _marked_segments(chat, source, render(chat.messages, mark=True))
        segments += [(whole[at : len(before)], False), (after[len(before) :], True)]
        at = len(after)
    return segments


def _marked_segments(chat: Chat, source: str, marked: str) -> Segments:
    """The stretches that the template itself marks as the assistant's words."""
    if not can_mark(source):
        raise DataError(
            "what the chat template writes before an answer is not how it begins the text with "
            "the answer or with all turns, and it has no {% generation %} markers: where the "
            "answers begin cannot be known"
        )
    texts = marked.split(GENERATED)
    answers = [
        learned for m, learned in zip(chat.messages, chat.learned) if m["role"] == "assistant"
    ]
    if len(texts) != 2 * len(answers) + 1:
        raise DataError(
            f"the chat template marks {len(texts) // 2} answers of the {len(answers)} there are"
        )
    segments = [(text, i % 2 == 1 and answers[i // 2]) for i, text in enumerate(texts)]
    last = max(i for i, (_, learned) in enumerate(segments) if learned)
    return segments[: last + 1]


def refuse_unwritten(chat: Chat, whole: str) -> None:
    """Refuses a chat of which the template leaves something out.

    Many templates know no tools, and Llama 3.1's writes no text beside a call: the row would
    teach other words than it says.

    Raises:
        DataError: naming the first message, or the tool, that is not in the text.
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
        name = tool.get("function", tool).get("name")
        if isinstance(name, str) and name not in whole:
            raise DataError(f"the chat template does not write the tool {name!r}")


def _is_written(content: str, whole: str) -> bool:
    """Whether the last line of a text is there, as it is or as JSON.

    The last line alone: templates cut thoughts from the front of an answer, and trim.
    """
    said = content.rpartition("</think>")[2].strip()
    line = (said.splitlines() or [""])[-1].strip()
    return line in whole or json.dumps(line, ensure_ascii=False)[1:-1] in whole
