"""A chat in the terminal: a person types, the model answers, and both stay in its memory."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from mlx_qlora.adapters.several import active, adapter_names, switch
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, UserError
from mlx_qlora.folders import staged
from mlx_qlora.infer.generate import (
    GenerationConfig,
    PromptCache,
    Speed,
    Stream,
    prompt_ids,
    room_for,
)
from mlx_qlora.model.llama import LlamaForCausalLM

HELP = """\
/reset           forget the conversation
/system TEXT     what the model is told first; without TEXT nothing
/adapter on|off  answer with the adapter, or with the base alone
/save FILE       add the conversation to FILE, as a JSONL row to train on
/help            this list
/quit            end; so does Ctrl-D. Ctrl-C ends an answer"""


def chat(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    console: Console,
    how: GenerationConfig,
    system: str | None = None,
    seed: int | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talks until `/quit` or Ctrl-D; afterwards the adapter is on or off as it was before.

    Args:
        model: base or tuned.
        tokenizer: the model's, with a chat template.
        console: where answers go.
        how: how tokens are chosen.
        system: what the model is told first.
        seed: the answer to turn n of the chat draws with `seed + n`, n from 0.
        read: asks for a line; EOFError ends the chat.

    Raises:
        TokenizerError: the model has no chat template. A format of our own would look as if it
            worked, and the model never saw it: `Tokenizer.with_chat_template` takes the one it
            was tuned with.
    """
    if tokenizer.chat_template is None:
        tokenizer.render_chat([])  # raises the one message about it
    talk, before = _Talk(model, tokenizer, console, how, system, seed), active(model)
    console.print("/help lists what can be typed besides", style="dim")
    try:
        while True:
            try:
                line = read("> ").strip()
            except KeyboardInterrupt:
                console.print()
                continue
            except EOFError:
                console.print()
                return
            if line == "/quit":
                return
            try:
                _obey(talk, line) if line.startswith("/") else line and _answer(talk, line)
            except UserError as error:
                console.print(str(error), style="red", markup=False)
    finally:
        if active(model) != before:
            switch(model, before)


@dataclass
class _Talk:
    """A conversation, and the tokens that it was made with.

    Attributes:
        turns: messages of user and assistant.
        text: the last prompt as the template wrote it, and the answer behind it.
        ids: the tokens of that.
        adapter: the name of the adapter that `/adapter on` means.
    """

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    console: Console
    how: GenerationConfig
    system: str | None
    seed: int | None
    turns: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    ids: list[int] = field(default_factory=list)
    cache: PromptCache = field(default_factory=PromptCache)
    asked: int = 0
    adapter: str | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the template takes it."""
        told = [{"role": "system", "content": self.system}] if self.system else []
        return told + self.turns


def _answer(talk: _Talk, line: str) -> None:
    """One turn: the question, the answer as it comes, and how fast it was."""
    talk.turns.append({"role": "user", "content": line})
    try:
        text, ids = _prompt(talk)
        seed = None if talk.seed is None else talk.seed + talk.asked
        answer = Stream(talk.model, talk.tokenizer, ids, talk.how, seed, None, None, talk.cache)
    except UserError:
        talk.turns.pop()
        raise
    talk.asked += 1
    said = ""
    try:
        for piece in answer:
            said += piece
            talk.console.out(piece, end="", highlight=False)
    except KeyboardInterrupt:
        talk.console.out(" ...", end="")
    answer.close()
    talk.console.out("")
    # What was said before Ctrl-C is remembered: the user has read it.
    talk.turns.append({"role": "assistant", "content": said})
    talk.text, talk.ids = text + said, ids + answer.ids
    talk.console.print(_figures(answer.speed), style="dim", highlight=False, markup=False)


def _prompt(talk: _Talk) -> tuple[str, list[int]]:
    """Text and tokens of the conversation.

    The model's own tokens are kept as it chose them: the same text can be written in others,
    behind which all keys and values would have to be computed again.

    Raises:
        TokenizerError: the template refuses the messages.
        ConfigError: the conversation has outgrown the model.
    """
    text = talk.tokenizer.render_chat(talk.messages, add_generation_prompt=True)
    if talk.text and text.startswith(talk.text):
        ids = talk.ids + talk.tokenizer.encode(text[len(talk.text) :])
    else:
        ids = prompt_ids(talk.tokenizer, text)
    room_for(talk.model, ids, "the conversation", "/reset")
    return text, ids


def _figures(speed: Speed) -> str:
    cached = f" ({speed.cached_tokens:,} cached)" if speed.cached_tokens else ""
    return (
        f"prompt {speed.prompt_tokens:,} tokens{cached}, {speed.prompt_tokens_per_second:,.0f}/s; "
        f"answer {speed.new_tokens:,} tokens, {speed.tokens_per_second:,.1f}/s; "
        f"peak {speed.peak_memory_bytes / 1e9:.2f} GB"
    )


def _obey(talk: _Talk, line: str) -> None:
    """A line that begins with a slash."""
    command, _, rest = line.partition(" ")
    rest, say = rest.strip(), talk.console.print
    if command == "/help":
        say(HELP, markup=False, highlight=False)
    elif command == "/reset":
        _forget(talk)
        talk.turns = []
        say("the conversation is forgotten", style="dim")
    elif command == "/system":
        talk.system = rest or None
        _forget(talk)
        say("the model will be told so" if rest else "the model is told nothing", style="dim")
    elif command == "/adapter":
        _switch(talk, rest)
        say(f"the adapter is {rest}", style="dim")
    elif command == "/save":
        _save(talk, rest)
        say(f"saved in {rest}", style="dim", markup=False)
    else:
        raise ConfigError(f"there is no {command}; /help lists what there is")


def _forget(talk: _Talk) -> None:
    """Drops what was computed; the turns stay."""
    talk.text, talk.ids = "", []
    talk.cache.reset()


def _switch(talk: _Talk, state: str) -> None:
    if state not in ("on", "off"):
        raise ConfigError("/adapter wants on or off")
    names = adapter_names(talk.model)
    if not names:
        raise ConfigError("the model has no adapter: start the chat with --adapter DIR")
    talk.adapter = active(talk.model) or talk.adapter or names[0]
    switch(talk.model, talk.adapter if state == "on" else None)
    talk.cache.reset()


def _save(talk: _Talk, name: str) -> None:
    """Adds a row to a file of them, which appears whole or not at all."""
    if not name:
        raise ConfigError("/save wants the name of a file")
    if not talk.turns:
        raise ConfigError("there is nothing to save yet")
    path = Path(name).expanduser()
    row = json.dumps({"messages": talk.messages}, ensure_ascii=False).encode("utf-8", "replace")
    try:
        rows = path.read_bytes() if path.exists() else b""
        rows += b"\n" if rows and not rows.endswith(b"\n") else b""
        with staged(path.parent) as staging:
            (staging / path.name).write_bytes(rows + row + b"\n")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
