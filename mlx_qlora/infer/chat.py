"""A chat in the terminal: a person types, the model answers, and both stay in its context."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from mlx_qlora.adapters.several import active, adapter_names, switch
from mlx_qlora.data.rows import system_message
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError, UserError, visible
from mlx_qlora.folders import staged, user_path
from mlx_qlora.infer.generate import prompt_ids, room_for, stream
from mlx_qlora.infer.tokens import GenerationConfig, PromptCache
from mlx_qlora.model.llama import LlamaForCausalLM

HELP = """\
/reset           forget the conversation
/system TEXT     set the system message; without TEXT there is none
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
        seed: the answer to turn n of the chat draws with `seed + n`, n from 0.
        read: asks for a line; EOFError ends the chat.

    Raises:
        TokenizerError: the model has no chat template. A format of our own would look as if it
            worked, although the model never saw it: `Tokenizer.with_chat_template` takes the one
            that it was tuned with.
    """
    if tokenizer.chat_template is None:
        tokenizer.render_chat([])  # raises the one message about it
    talk = _Conversation(model, tokenizer, console, how, system, seed)
    adapter_before = active(model)
    console.print("/help lists the commands", style="dim")
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
                talk.command(line) if line.startswith("/") else line and talk.answer(line)
            except UserError as error:
                console.print(str(error), style="red", markup=False)
    finally:
        if active(model) != adapter_before:
            switch(model, adapter_before)


@dataclass
class _Conversation:
    """What was said, and the tokens that it was said with."""

    model: LlamaForCausalLM
    tokenizer: Tokenizer
    console: Console
    config: GenerationConfig
    system: str | None
    seed: int | None
    turns: list[dict[str, Any]] = field(default_factory=list)  # of user and assistant
    text: str = ""  # the last prompt as the template wrote it, and its answer
    ids: list[int] = field(default_factory=list)  # the tokens of `text`
    cache: PromptCache = field(default_factory=PromptCache)
    n_asked: int = 0
    adapter: str | None = None  # the name of the adapter that `/adapter on` means

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as the template takes it."""
        return [*system_message(self.system), *self.turns]

    def answer(self, question: str) -> None:
        """One turn: the answer is shown as it comes, and then how fast it was."""
        self.turns.append({"role": "user", "content": question})
        settings: Any = dataclasses.asdict(self.config) | {"prompt_cache": self.cache}
        settings["seed"] = None if self.seed is None else self.seed + self.n_asked
        try:
            text, ids = self._prompt()
            answer = stream(self.model, self.tokenizer, ids, **settings)
        except UserError:
            self.turns.pop()
            raise
        self.n_asked += 1
        reply = ""
        try:
            for piece in answer:
                reply += piece
                self.console.out(visible(piece), end="", highlight=False)
        except KeyboardInterrupt:
            self.console.out(" ...", end="")
        answer.close()
        self.console.out("")
        # An answer that Ctrl-C ended stays in the conversation: the user has read it.
        self.turns.append({"role": "assistant", "content": reply})
        self.text, self.ids = text + reply, ids + answer.ids
        speed = answer.speed
        cached = f" ({speed.cached_tokens:,} cached)" if speed.cached_tokens else ""
        self.console.print(
            f"prompt {speed.prompt_tokens:,} tokens{cached}, "
            f"{speed.prompt_tokens_per_second:,.0f}/s; "
            f"answer {speed.new_tokens:,} tokens, {speed.tokens_per_second:,.1f}/s; "
            f"peak {speed.peak_memory_bytes / 1e9:.2f} GB",
            style="dim",
            highlight=False,
            markup=False,
        )

    def _prompt(self) -> tuple[str, list[int]]:
        """Text and tokens of the conversation.

        The model's own tokens are kept as it chose them: the same text can be written in others,
        after which all keys and values would have to be computed again.
        """
        text = self.tokenizer.render_chat(self.messages, add_generation_prompt=True)
        if self.text and text.startswith(self.text):
            ids = self.ids + self.tokenizer.encode(text[len(self.text) :])
        else:
            ids = prompt_ids(self.tokenizer, text)
        room_for(self.model, self.tokenizer, ids, "the conversation", "/reset")
        return text, ids

    def command(self, line: str) -> None:
        """A line that begins with a slash."""
        name, _, rest = line.partition(" ")
        rest, say = rest.strip(), self.console.print
        if name == "/help":
            say(HELP, markup=False, highlight=False)
        elif name == "/reset":
            self.turns, self.text = [], ""
            self.cache.reset()
            say("the conversation is forgotten", style="dim")
        elif name == "/system":
            self.system = rest or None
            say(f"the system message is {'set' if rest else 'removed'}", style="dim")
        elif name == "/adapter":
            if rest not in ("on", "off"):
                raise ConfigError("/adapter needs on or off")
            names = adapter_names(self.model)
            if not names:
                raise ConfigError("the model has no adapter; start the chat with --adapter DIR")
            self.adapter = active(self.model) or self.adapter or names[0]
            switch(self.model, self.adapter if rest == "on" else None)
            self.cache.reset()
            also = "; what was said stays, until /reset" * bool(self.turns)
            say(f"the adapter is {rest}{also}", style="dim")
        elif name == "/save":
            self._save(rest)
            say(f"saved in {rest}", style="dim", markup=False)
        else:
            raise ConfigError(f"unknown command {name}; /help lists the commands")

    def _save(self, name: str) -> None:
        """Adds the conversation to a file of rows; a full disk leaves the file as it was."""
        if not name:
            raise ConfigError("/save needs the name of a file")
        if not self.turns:
            raise ConfigError("there is nothing to save yet")
        path = user_path(name)
        row = json.dumps({"messages": self.messages}, ensure_ascii=False).encode("utf-8", "replace")
        try:
            rows = path.read_bytes() if path.exists() else b""
            rows += b"\n" if rows and not rows.endswith(b"\n") else b""
            with staged(path.parent) as staging:
                (staging / path.name).write_bytes(rows + row + b"\n")
        except (OSError, ValueError) as error:  # such as a NUL
            said = getattr(error, "strerror", error)
            raise ConfigError(f"{path} cannot be written: {said}") from error
