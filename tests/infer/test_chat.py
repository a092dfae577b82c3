"""A chat, played by a script: what is typed, what the model answers, and what it remembers."""

import dataclasses
import io
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.models import randomise_lora
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora.infer.chat import chat
from mlx_qlora.infer.generate import generate
from mlx_qlora.infer.tokens import GenerationConfig, generate_tokens

HOW = GenerationConfig(temperature=0, repetition_penalty=1.0, max_new_tokens=8)


@pytest.fixture
def model(chat_folder: Path) -> tuple[Any, Any]:
    return mq.load(chat_folder)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every answer that a chat streams."""
    answers: list[Any] = []

    def recorded(*args: Any, **settings: Any) -> Any:
        answers.append(mq.stream(*args, **settings))
        return answers[-1]

    monkeypatch.setattr("mlx_qlora.infer.chat.stream", recorded)
    return answers


def play(model: tuple[Any, Any], *lines: Any, **how: Any) -> str:
    """Types lines, then Ctrl-D; an exception in the place of a line is raised."""
    script, out = iter([*lines, EOFError()]), io.StringIO()

    def read(_: str) -> str:
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    console = how.pop("console", Console)(file=out, width=200)
    chat(*model, console, how.pop("how", HOW), read=read, **how)
    return out.getvalue()


def test_an_answer_is_the_generated_one_with_its_speed(model):
    answer = generate(*model, [{"role": "user", "content": "Hi"}], **dataclasses.asdict(HOW))
    out = play(model, "Hi")
    assert answer in out
    assert "answer 8 tokens" in out and "/s; peak" in out and "GB" in out


def test_only_the_new_turn_is_computed(model, asked):
    play(model, "Hi", "Name a colour.", "And the fox?")
    for before, after in itertools.pairwise(asked):
        held = before.prompt + before.ids
        assert after.prompt[: len(held)] == held
        assert after.speed.cached_tokens >= len(held) - 1
        assert after.speed.cached_tokens < after.speed.prompt_tokens == len(after.prompt)
    play(model, "Hi", "/reset", "Hi")
    assert asked[-1].prompt == asked[-2].prompt and asked[-1].speed.cached_tokens == 0


def test_a_kept_cache_gives_the_answers_of_none(model, asked):
    play(model, "Hi", "Name a colour.", how=GenerationConfig(0, max_new_tokens=8))
    for made in asked:
        how = GenerationConfig(0, max_new_tokens=8)
        fresh = list(generate_tokens(model[0], made.prompt, how))
        assert made.ids == fresh[: len(made.ids)] and made.ids


def test_the_system_message_comes_first(model, asked):
    play(model, "Hi", "/system Be kind.", "Hi", "/system", "Hi", system="Be brief.")
    begun = [model[1].decode(made.prompt) for made in asked]
    assert begun[0].startswith("<|bos|><|system|>Be brief.<|eos|><|user|>Hi")
    assert begun[1].startswith("<|bos|><|system|>Be kind.<|eos|><|user|>Hi<|eos|><|assistant|>")
    assert begun[2].startswith("<|bos|><|user|>Hi")


def test_the_adapter_goes_off_and_on_and_is_as_before_afterwards(model, asked):
    llama, tokenizer = model
    base = generate(*model, "x", **dataclasses.asdict(HOW))
    mq.add_lora(llama, mq.LoraConfig(r=4))
    randomise_lora(llama, scale=0.5)
    tuned = generate(*model, "x", **dataclasses.asdict(HOW))
    assert base != tuned
    lines = ["Hi", "/reset", "/adapter off", "Hi", "/reset", "/adapter on", "Hi", "/adapter off"]
    out = play(model, *lines)
    assert "the adapter is off" in out and "the adapter is on" in out
    texts = [tokenizer.decode(made.ids) for made in asked]
    assert texts[0] == texts[2] != texts[1]
    assert [made.speed.cached_tokens for made in asked] == [0, 0, 0]
    assert (
        mq.active(llama) is not None and generate(*model, "x", **dataclasses.asdict(HOW)) == tuned
    )


def test_no_adapter_and_wrong_words_are_one_message(model):
    out = play(model, "/adapter off", "/adapter", "/nonsense", "/save", "/save x.jsonl", "/help")
    for words in (
        "the model has no adapter; start the chat with mq.load(adapter='DIR')",
        "/adapter needs on or off",
        "unknown command /nonsense; /help lists the commands",
        "/save needs the name of a file",
        "there is nothing to save yet",
        "/save FILE       add the conversation to FILE",
    ):
        assert words in out
    assert not Path("x.jsonl").exists()


def test_a_saved_conversation_is_a_row_that_the_data_reader_takes(model, tmp_path):
    file = tmp_path / "chats.jsonl"
    play(model, "Hi [bold]猫[/bold]", f"/save {file}", "More", f"/save {file}", system="Be brief.")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    roles = [[message["role"] for message in row["messages"]] for row in rows]
    assert roles == [["system", "user", "assistant"], ["system", *["user", "assistant"] * 2]]
    assert rows[0]["messages"][1]["content"] == "Hi [bold]猫[/bold]"
    examples = mq.read_examples(file, model[1], mq.DataConfig(format="messages"))
    assert len(examples) == 2
    text = model[1].decode(examples[0].tokens.tolist())
    assert rows[0]["messages"][2]["content"] in text
    out = play(model, "Hi", f"/save {tmp_path}")
    assert "cannot be written" in out


class Impatient(Console):
    """Whoever sits here presses Ctrl-C at the third piece of an answer."""

    pieces = 0

    def out(self, *objects: Any, **how: Any) -> None:
        self.pieces += 1
        if self.pieces == 3:
            raise KeyboardInterrupt
        super().out(*objects, **how)


def test_ctrl_c_ends_the_answer_and_keeps_the_chat(model, asked):
    out = play(model, "Hi", "Go on", KeyboardInterrupt(), "And?", console=Impatient)
    assert len(asked) == 3 and len(asked[0].ids) < 8 and " ..." in out
    said = model[1].decode(asked[1].prompt)
    assert said.startswith("<|bos|><|user|>Hi<|eos|><|assistant|>")
    assert asked[1].speed.cached_tokens > 0 and len(asked[2].ids) > 0


def test_quit_ends_at_once_and_blank_lines_ask_nothing(model, asked):
    play(model, "", "   ", "/quit", "never")
    assert not asked


def test_a_seed_repeats_a_chat_and_each_turn_draws_differently(model, asked):
    how = GenerationConfig(max_new_tokens=8, temperature=2.0)
    for _ in range(2):
        play(model, "Hi", "/reset", "Hi", how=how, seed=5)
    texts = [made.ids for made in asked]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]


def test_a_conversation_longer_than_the_model_is_refused(model):
    out = play(model, "the fox " * 300, "Hi")
    assert "tokens, and the model was made for 512; /reset" in out
    assert out.count("/s; peak") == 1


def test_a_model_without_a_template_is_refused(tmp_path):
    with pytest.raises(mq.TokenizerError, match="no chat template"):
        play(mq.load(write_model(tmp_path / "plain")), "Hi")
