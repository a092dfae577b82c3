"""`mlx-qlora inspect`: every figure it prints, counted again from the rows themselves."""

import io
import json
import re
import shutil
from html import unescape
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from rich.text import Text
from safetensors.numpy import load_file, save_file
from support.tiny_folder import CHAT, write_model, write_rows

from mlx_qlora.before.inspect import PICTURES, inspect_data, print_rows
from mlx_qlora.cli import main
from mlx_qlora.config import build
from mlx_qlora.data.batches import make_batches
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer

N_GOOD = 40
LONG = "left out " * 20  # context that does not fit into 64 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("inspect") / "model", chat=True)


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 rows, 2 copies of the first, 1 that is cut, and then 3 that cannot be used."""
    path = write_rows(tmp_path / "rows.jsonl", N_GOOD)
    first = path.read_text().splitlines()[0]
    more = [
        first,
        first,
        json.dumps({"instruction": "count", "input": LONG, "output": "on 1"}),
        '{"instruction": "x"}',
        "broken",
        json.dumps({"instruction": "count", "output": "fox " * 100}),
    ]
    path.write_text(path.read_text() + "\n".join(more) + "\n")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """Conversations of one to three turns, with signs of several bytes and line breaks."""
    rows = []
    for i in range(12):
        turns = [
            turn
            for k in range(i % 3 + 1)
            for turn in (
                {"role": "user", "content": f"question {i}.{k}\n[bold]é[/bold] :smile:"},
                {"role": "assistant", "content": f"ans{k}wer {i} 😀  漢字\n\n  end"},
            )
        ]
        rows.append({"messages": turns})
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_texts(path: Path, sizes: list[int]) -> Path:
    """Texts of so many tokens, BOS and EOS not counted."""
    path.write_text("".join(json.dumps({"text": "z" * n}) + "\n" for n in sizes))
    return path


def inspect(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, words)]) == 0
    said = capsys.readouterr()
    assert not said.err
    return said.out


def as_read(path: Path, tokenizer: Tokenizer, max_length: int = 64) -> Examples:
    config = DataConfig(max_length=max_length, cache_dir=None, num_workers=0)
    return read_examples(path, tokenizer, config)


def line_of(out: str, word: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(f"{word:10}")]
    return line.removeprefix(word).strip()


# ---- the report --------------------------------------------------------------------------------


def test_what_a_template_says_of_itself_is_told(folder, chats, tmp_path, capsys):
    last = "m.role == 'assistant' and loop.last"  # so each answer of a row is read alone
    thinks = f"{{{{ '<think>\n\n</think>\n\n' if {last} }}}}{{{{ m['content'] }}}}"
    own = "{{ '<|system|>You are Qwen.' ~ eos_token if messages[0].role != 'system' }}"
    template = own + CHAT
    qwen = Path(shutil.copytree(folder, tmp_path / "qwen"))
    (qwen / "chat_template.jinja").write_text(template.replace("{{ m['content'] }}", thinks))
    out = inspect(capsys, chats, "--model", qwen, "--show", 100)
    assert {*re.findall(r"jsonl:\d+(, answer.*?)?:", out)} == {
        "",
        *(f", answer {i + 1} of {n}" for n in (2, 3) for i in range(n)),
    }
    assert line_of(out, "system").startswith("'You are Qwen.', by the chat template")
    assert line_of(out, "thinking").startswith("an empty <think> is learned before answers")
    turns = [("user", "What is <think>\n\n</think>?"), ("assistant", "Nothing.")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    chats.write_text(f"{json.dumps(row)}\n" * 12)  # where it is asked about, and not learned
    out = inspect(capsys, chats, "--model", folder)
    assert "system  " not in out and "thinking" not in out


def test_the_report_counts_the_rows_and_names_what_is_wrong_with_the_others(
    folder, tokenizer, data, capsys
):
    out = inspect(capsys, data, "--model", folder, "--max-length", 64)
    examples = as_read(data, tokenizer)
    tokens = sum(len(example) for example in examples)
    share = sum(int(example.learned.sum()) for example in examples) / tokens
    assert line_of(out, "data") == (
        f"{data} (alpaca): 46 rows read, 43 kept, 3 refused; {tokens:,} tokens, "
        f"{share:.0%} supervised; 1 cut to data.max_length, before their answers; 2 repeat an "
        "earlier row"
    )
    n = len(tokenizer.encode("fox " * 100)) + 1
    whole = n + len(tokenizer.encode("### Instruction:\ncount\n\n### Response:\n")) + 1
    lines = out.splitlines()[1:4]
    assert lines[:2] == [
        "  line 44: field 'output' is missing",
        "  line 45: not JSON: Expecting value at column 1",
    ]
    assert lines[2].startswith(f"  line 46: {whole} tokens, {n} of them from the first answer on")


def test_the_lengths_add_up_to_the_kept_rows(folder, tokenizer, tmp_path, capsys):
    path = write_texts(tmp_path / "texts.jsonl", [*range(40), *[7] * 400])
    out = inspect(capsys, path, "--model", folder)
    lines = out.splitlines()
    (end,) = [i for i, line in enumerate(lines) if line.startswith("cost")]
    bars = lines[lines.index("lengths") + 1 : end]
    lengths = np.array([len(example) for example in as_read(path, tokenizer)])
    total, behind, longest = 0, 0, 0
    for bar in bars:
        low, high, drawn, n = re.fullmatch(r" *(\d+)-(\d+) ([█▏ ]{40}) +(\d+)", bar).groups()
        assert int(low) == behind + 1
        assert int(n) == ((lengths >= int(low)) & (lengths <= int(high))).sum()
        assert bool(drawn.strip()) == (int(n) > 0)
        total, behind, longest = total + int(n), int(high), max(longest, drawn.count("█"))
    assert len(bars) <= 10
    assert total == len(lengths) == 439  # one is empty
    assert behind >= lengths.max() == 41
    assert longest == 40


def test_the_split_and_the_cost_are_those_of_the_run(folder, tokenizer, data, capsys):
    words = ["--model", folder, "--max-length", 64, "data.split=[0.8, 0.1, 0.1]"]
    words += ["training.per_device_train_batch_size=4", "--epochs", 2]
    out = inspect(capsys, data, *words, "training.gradient_accumulation_steps=1")
    train, *held_out = as_read(data, tokenizer).split([0.8, 0.1, 0.1], seed=0)
    sizes = [len(train), *map(len, held_out)]
    assert sum(sizes) == 43 and min(sizes) > 0
    assert line_of(out, "split") == (
        "{} train, {} validation, {} test; copies of a row stay together".format(*sizes)
    )
    tokens = 2 * sum(len(example) - 1 for example in train)
    assert line_of(out, "cost") == (
        f"{-(-2 * len(train) // 4)} steps: 2.00 passes over {len(train)} examples, "
        f"{tokens:,} tokens"
    )


def test_files_of_their_own_for_validation_are_reported_too(folder, data, tmp_path, capsys):
    other = write_rows(tmp_path / "other.jsonl", 7)
    words = ["--model", folder, f"data.validation_path={other}", "data.split=[1, 0, 0]"]
    out = inspect(capsys, data, *words)
    reports = [line for line in out.splitlines() if line.startswith("data ")]
    assert f"{data} (alpaca): 46 rows read" in reports[0]
    assert f"{other} (alpaca): 7 rows read, 7 kept, 0 refused" in reports[1]
    assert line_of(out, "split") == "44 train, 7 validation, 0 test"


def test_the_file_may_be_named_in_any_way_and_read_again_from_the_cache(folder, data, capsys):
    out = inspect(capsys, data, "--model", folder, "--max-length", 64)
    for words in ([data], ["--data", data], [f"data.path={data}"]):
        assert inspect(capsys, *words, "--model", folder, "data.max_length=64") == out


# ---- refused rows ------------------------------------------------------------------------------


def test_strict_ends_with_the_lines_and_code_2(folder, data, tmp_path, capsys):
    words = ["inspect", str(data), "--model", str(folder), "--strict", "--max-length", "64"]
    capsys.readouterr()
    assert main(words) == 2
    said = capsys.readouterr()
    assert not said.out
    lines = said.err.splitlines()
    assert lines[0] == f"mlx-qlora: data.strict: {data} has 3 rows that cannot be used:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  line 44", "  line 45", "  line 46"]
    assert main(["inspect", str(write_rows(tmp_path / "good.jsonl", 9)), *words[2:]]) == 0


@pytest.mark.parametrize("strict", [[], ["--strict"]])
def test_refused_rows_are_written_with_where_why_and_what(strict, folder, data, tmp_path):
    refused = tmp_path / "refused.jsonl"
    refused.write_text("of an earlier run\n")
    words = ["--model", str(folder), "--max-length", "64", "--refused", str(refused)]
    for _ in range(2):  # the second time from the cache
        assert main(["inspect", str(data), *words, *strict]) == (2 if strict else 0)
        written = [json.loads(line) for line in refused.read_text().splitlines()]
        assert [row["line"] for row in written] == [44, 45, 46]
        assert {row["file"] for row in written} == {str(data)}
        assert [row["row"] for row in written] == data.read_text().splitlines()[43:]
        assert written[0]["reason"] == "field 'output' is missing"
        assert all(row.keys() == {"file", "line", "reason", "row"} for row in written)


# ---- rows as the model sees them ---------------------------------------------------------------


def shown_examples(out: str, path: Any) -> list[tuple[int, int, int, str]]:
    """(line, tokens, supervised, what is shown of it) for each example."""
    title = re.compile(rf"^{re.escape(str(path))}:(\d+): (\d+) tokens, (\d+) supervised\n", re.M)
    parts = title.split(out)[1:]
    return [
        (*map(int, parts[i : i + 3]), parts[i + 3].removesuffix("\n"))  # type: ignore[misc]
        for i in range(0, len(parts), 4)
    ]


@pytest.mark.parametrize("file", ["data", "chats"])
def test_shown_examples_are_the_tokens_and_their_brackets_what_is_learned(
    file, folder, tokenizer, request, capsys
):
    path = request.getfixturevalue(file)
    words = ["--model", folder, "--max-length", 256, "--show", 1000, "data.split=[1, 0, 0]"]
    out = inspect(capsys, path, *words, "training.per_device_train_batch_size=3")
    examples = {example.line: example for example in as_read(path, tokenizer, 256)}
    shown = shown_examples(out, path)
    for line, n, n_learned, text in shown:
        example = examples[line]
        assert (n, n_learned) == (len(example), example.learned.sum())
        assert text == bracketed(example, tokenizer) + "\n"
    batches = make_batches(as_read(path, tokenizer, 256), 3)
    in_order = [place for batch in batches for place in batch.places]
    assert [f"{path}:{line}" for line, *_ in shown] == in_order
    assert sorted(line for line, *_ in shown) == sorted(examples)


def bracketed(example: Any, tokenizer: Tokenizer) -> str:
    """A row's text, each learned stretch in brackets: written down token by token."""
    text, run = "", []
    for i, token in enumerate(example.tokens.tolist()):
        run.append(token)
        if i + 1 == len(example) or example.learned[i] != example.learned[i + 1]:
            words = tokenizer.decode(run)
            text, run = text + (f"⟦{words}⟧" if example.learned[i] else words), []
    return text


def test_as_many_examples_are_shown_as_asked_for(folder, data, capsys):
    words = [data, "--model", folder, "--max-length", 64]
    assert shown_examples(inspect(capsys, *words), data) == []
    for n in (1, 6, 7):  # a batch has 4
        assert len(shown_examples(inspect(capsys, *words, "--show", n), data)) == n


def test_the_page_has_the_same_in_colour(folder, chats, tmp_path, capsys):
    page, words = tmp_path / "rows.html", [chats, "--model", folder, "data.split=[1, 0, 0]"]
    out = inspect(capsys, *words, "--html", page)
    assert shown_examples(out, chats) == []
    html = page.read_text(encoding="utf-8")
    text = unescape(re.sub(r"<[^>]+>", "", html[html.index("<code") :]))
    for name in ("data", "cost"):
        assert line_of(text, name) == line_of(out, name)
    assert len(shown_examples(text, chats)) == 12  # all there are, below 50
    assert "[bold]é[/bold] :smile:" in text and "⟦" not in text
    styles = dict(re.findall(r"\.(r\d+) \{([^}]+)\}", html))
    spans = re.findall(r'<span class="(r\d+)">([^<]+)</span>', html)
    learned = {styles[name] for name, words in spans if "wer 0" in words}
    context = {styles[name] for name, words in spans if "tokens," in words}
    assert len(learned) == 1 and not learned & context and "bold" in learned.pop()
    assert len(shown_examples(inspect(capsys, *words, "--show", 2, "--html", page), chats)) == 2
    assert page.read_text(encoding="utf-8").count(" supervised") == 2 + 1
    assert main(["inspect", *map(str, words), "--html", str(tmp_path)]) == 2
    assert f"--html: {tmp_path} cannot be written: Is a directory" in capsys.readouterr().err
    before = chats.read_bytes()
    assert main(["inspect", *map(str, words), "--html", str(chats)]) == 2
    assert "exists and is no HTML page; name another file" in capsys.readouterr().err
    assert chats.read_bytes() == before


def on_terminal(folder: Path, path: Path, color_system: Any, show: int) -> tuple[Console, Examples]:
    console = Console(force_terminal=True, color_system=color_system, file=io.StringIO(), width=90)
    values = {
        "model": {"source": str(folder)},
        "data": {"path": str(path), "split": [1, 0, 0], "shuffle": False},
    }
    inspect_data(build(values), console, show)
    return console, read_examples(path, load_tokenizer(folder), DataConfig())


def test_a_colour_of_its_own_tells_what_is_learned(folder, tokenizer, chats):
    console, examples = on_terminal(folder, chats, "truecolor", show=2)
    shown = console.file.getvalue()
    assert "⟦" not in shown and "⟧" not in shown
    text = Text.from_ansi(shown[shown.index(f"{chats}:1:") :])
    coloured: dict[str, str] = {}
    for span in text.spans:
        style = str(span.style)
        coloured[style] = coloured.get(style, "") + text.plain[span.start : span.end]
    (learned,) = [style for style, words in coloured.items() if "wer 0" in words]
    (context,) = [style for style, words in coloured.items() if "question" in words]
    assert len({learned, context}) == 2
    wanted = ["".join(decoded(e, tokenizer, e.learned) for e in examples[:2])]
    wanted += ["".join(decoded(e, tokenizer, ~e.learned) for e in examples[:2])]
    assert [coloured[style].replace("\n", "") for style in (learned, context)] == wanted


def decoded(example: Any, tokenizer: Tokenizer, where: np.ndarray) -> str:
    return tokenizer.decode(example.tokens[where]).replace("\n", "")


def test_a_terminal_without_colours_gets_brackets(folder, chats):
    console, _ = on_terminal(folder, chats, None, show=3)
    shown = console.file.getvalue()
    assert shown.count("⟦") == shown.count("⟧") == 1 + 2 + 3
    assert "\x1b" not in shown


# ---- no weights, and what cannot be inspected --------------------------------------------------


def test_no_weight_is_loaded(tmp_path, data, capsys):
    broken = write_model(tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    words = [data, "--model", broken]
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    assert "46 rows read" in inspect(capsys, *words)
    assert mx.get_peak_memory() - before < 10_000
    assert sum(array.nbytes for array in weights.values()) > 100_000
    assert main(["train", "--data", *map(str, words), f"--output-dir={tmp_path / 'out'}"]) == 2
    assert "model.norm.weight is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("data.path=null", "data.path is missing; name a file or folder"),
        ("--data no.jsonl", "data file no.jsonl is missing"),
        ("--data empty.jsonl", "empty.jsonl is empty"),
        ("--data none.jsonl", "no usable row in"),
        ("model.source=null", "model.source is missing; name a model with --model SOURCE"),
        ("--model smollm2-136m", "did you mean 'smollm2-135m'"),
        ("--model bare", "bare is not a complete model; missing: *.safetensors"),
        ("--max-length 1", "data.max_length must be at least 2; got 1"),
        ("--max-length 3", "no usable row in"),
        ("--show -1", "--show must be at least 0; got -1"),
        ("--refused no/such/folder", "data.refused_path: no/such/folder cannot be written"),
        ("data.form=text", "unknown field data.form; did you mean data.format?"),
        ("data.format=text", "field 'text' is missing"),
        ("data.template=no.jinja", "'no.jinja' cannot be read"),
    ],
)
def test_what_cannot_be_inspected_is_one_message_and_code_2(
    words, said, folder, data, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("none.jsonl").write_text("{}\n")
    Path("bare").mkdir()
    Path("bare/config.json").write_text("{}")
    capsys.readouterr()
    whole = ["inspect", "--data", str(data), "--model", str(folder)]
    assert main([*whole, *words.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mlx-qlora: ") and error.count("mlx-qlora: ") == 1
    assert said in error
    assert "Traceback" not in error


# ---- signs that a terminal acts on ---------------------------------------------------------------


def first_row(examples: Examples, tokenizer: Tokenizer, colour: bool = False) -> str:
    """The first row of the first batch, without the colours that it has."""
    system = "truecolor" if colour else None
    console = Console(file=io.StringIO(), color_system=system, no_color=False, record=True)
    print_rows(make_batches(examples, 1), tokenizer, 1, console)
    return console.export_text()


@pytest.mark.parametrize(
    ("row", "objective", "headings"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "cd"}, "dpo", ["1 chosen", "1 rejected"]),
        ({"prompt": "a", "completion": "b", "label": False}, "kto", ["1 labelled false"]),
        ({"prompt": "a", "completion": "b", "label": True}, "kto", ["1 labelled true"]),
        ({"prompt": "a", "completion": "b", "weight": 0.5}, "sft", ["1, weight 0.5"]),
    ],
)
def test_a_heading_says_which_answer_it_is_and_what_it_weighs(tokenizer, row, objective, headings):
    shown = first_row(read_examples([row, row], tokenizer, objective=objective), tokenizer)
    assert re.findall(r"^rows:(1[^:]*): \d+ tokens, \d supervised$", shown, re.M) == headings
    assert shown.index("⟦b") < shown.find("⟦cd") or objective != "dpo"


def test_a_row_that_ends_in_context_is_shown_without_a_foreign_token(tokenizer):
    ids = [0, *tokenizer.encode("abc")]
    learned = np.array([False, True, True, False])
    assert len(ids) == 4
    examples = Examples.of([Example(np.array(ids, np.int32), learned, 1)])
    # The last id is not learned and no input: a batch does not hold it.
    assert first_row(examples, tokenizer) == ("rows:1: 4 tokens, 2 supervised\n<|bos|>⟦ab⟧\n\n")


@pytest.mark.parametrize(
    ("text", "pictures"),
    [
        ("if x:\n\treturn\t1", "if x:\n␉return␉1"),
        ("a\r\nb", "a␍\nb"),
        ("bell\x07 back\x08", "bell␇ back␈"),
        ("a\x0bb\x0c", "a␋b␌"),
        ("\x1b[31mred\x1b[0m", "␛[31mred␛[0m"),
        ("a\x00b\x1f\x7f", "a␀b␟␡"),
        ("é 漢字 😀 ␉", "é 漢字 😀 ␉"),
    ],
)
@pytest.mark.parametrize("colour", [False, True])
def test_signs_that_a_terminal_acts_on_are_shown_as_their_pictures(
    text, pictures, colour, tokenizer
):
    out = first_row(read_examples([{"text": text}], tokenizer), tokenizer, colour)
    learned = f"{pictures}<|eos|>"
    assert f" supervised\n<|bos|>{learned if colour else f'⟦{learned}⟧'}\n" in out


def test_every_control_sign_but_the_line_break_has_a_picture():
    codes = [*(code for code in range(32) if code != 10), 127]
    assert sorted(PICTURES) == [*codes, *range(0x80, 0xA0)]
    assert {PICTURES[code] for code in range(0x80, 0xA0)} == {0xFFFD}
    assert "".join(map(chr, codes)).translate(PICTURES) == "␀␁␂␃␄␅␆␇␈␉␋␌␍␎␏␐␑␒␓␔␕␖␗␘␙␚␛␜␝␞␟␡"
