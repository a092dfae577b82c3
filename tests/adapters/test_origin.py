"""The base that an adapter belongs to: by its name, by its weights, and from any folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.adapters import CONFIG, WEIGHTS
from support.models import quantise_with_mlx_lm
from support.tiny_folder import CHAT, write_model, write_random_model, write_rows, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.adapters.export import save_portable
from mlx_qlora.adapters.origin import original_base
from mlx_qlora.adapters.peft import save_mlx_lm
from mlx_qlora.cli import main
from mlx_qlora.config import build
from mlx_qlora.errors import AdapterError, AdapterWarning, TokenizerError
from mlx_qlora.loading import model_to_ask
from mlx_qlora.model.hub import ModelFiles, resolve

TRAIN = ["--max-steps", "2", "--batch-size", "2", "--quiet", "model.bits=null", "lora.r=2"]


def trained(model: Path, folder: Path, *words: str) -> Path:
    rows = write_rows(folder.with_name("rows.jsonl"), 12)
    data = ["--data", str(rows), "--output-dir", str(folder)]
    assert main(["train", "--model", str(model), *data, *TRAIN, *words]) == 0
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model's folder, and what a run of it left."""
    home = tmp_path_factory.mktemp("run")
    model = write_model(home / "model", chat=True)
    return model, trained(model, home / "out", "checkpointing.save_steps=1")


# ---- by its weights ------------------------------------------------------------------------------


def the_same(model: Path, place: Path) -> Path:
    return model


def a_copy(model: Path, place: Path) -> Path:
    return Path(shutil.copytree(model, place / "copy"))


def other_weights(model: Path, place: Path) -> Path:
    return write_model(place / "model", chat=True, seed=1)


def another_precision(model: Path, place: Path) -> Path:
    quantise_with_mlx_lm(model, place / "q", {"bits": 8, "group_size": 32})
    for path in model.glob("tokenizer*"):
        shutil.copyfile(path, place / "q" / path.name)
    return place / "q"


def one_number_changed(model: Path, place: Path) -> Path:
    copy = a_copy(model, place)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[len(content) // 2] ^= 1  # of a large file, only samples are hashed
    (copy / "model.safetensors").write_bytes(content)
    return copy


def foreign(out: Path, place: Path) -> Path:
    shutil.copytree(out, place / "foreign")
    for name in ("training_args.json", "run.yaml"):
        (place / "foreign" / name).unlink()
    weights = place / "foreign" / WEIGHTS
    save_file(load_file(weights), weights, metadata={"format": "pt"})
    return place / "foreign"


def older(out: Path, place: Path) -> Path:
    """As runs wrote it when only their record knew the base."""
    record = (out / "training_args.json").read_text()
    folder = foreign(out, place)
    (folder / "training_args.json").write_text(record)
    return folder


def by_python(save: Any, **options: Any) -> Any:
    """Written by a function in a notebook, from the run's model and adapter."""

    def write(out: Path, place: Path) -> Path:
        base = json.loads((out / CONFIG).read_text())["base_model_name_or_path"]
        model = mq.load(base, adapter=out)[0]
        return Path(save(model, place / "saved", **options))

    return write


def combined(model: Any, folder: Path) -> Path:
    mq.combine(model, {"default": 0.5}, "half")
    return mq.save_adapter(model, folder)


ADAPTERS: dict[str, Any] = {
    "the run's": lambda out, place: out,
    "a checkpoint": lambda out, place: out / "checkpoint-1",
    "mlx-lm's copy": lambda out, place: out / "mlx",
    "an older run's": older,
    "save_adapter's": by_python(mq.save_adapter),
    "save_portable's": by_python(save_portable),
    "save_mlx_lm's": by_python(save_mlx_lm),
    "a combined one": by_python(combined),
    "a foreign one": foreign,
}


@pytest.mark.parametrize("base", [the_same, a_copy, other_weights, another_precision])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_over_other_weights_than_its_own_is_said(
    run: tuple[Path, Path], tmp_path: Path, kind: str, base: Any
) -> None:
    model, out = run
    adapter, loaded = ADAPTERS[kind](out, tmp_path), base(model, tmp_path)
    if base in (the_same, a_copy) or kind == "a foreign one":
        mq.load(loaded, adapter=adapter)  # every warning is an error here
        return
    name = "not named" if kind == "save_mlx_lm's" else model
    said = rf"trained on other weights \({name}\) than those of {loaded}; .*same model in another"
    with pytest.warns(AdapterWarning, match=said):
        mq.load(loaded, adapter=adapter)
    with pytest.warns(AdapterWarning, match=said):
        mq.attach(mq.load(loaded)[0], adapter, "a")


def test_an_adapter_of_weights_that_no_file_has_says_nothing_of_its_base(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    model = mq.merge(mq.load(run[0], adapter=run[1])[0])
    merged = mq.save_adapter(mq.add_lora(model, mq.LoraConfig(r=2)), tmp_path / "merged")
    copy = a_copy(run[0], tmp_path)
    gone = mq.add_lora(mq.load(copy)[0], mq.LoraConfig(r=2))
    shutil.rmtree(copy)
    for folder in (merged, mq.save_adapter(gone, tmp_path / "gone")):
        with safe_open(folder / WEIGHTS, "np") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    "words",
    [
        "generate --prompt x generation.max_new_tokens=1",
        "evaluate --data ROWS --answers 0 --limit 2",
        "merge --output-dir OUT/merged",
        "export --output-dir OUT/exported",
        "export --gguf --output-dir OUT/gguf",
        "train --data ROWS --output-dir OUT/out " + " ".join(TRAIN),
    ],
)
@pytest.mark.parametrize("base", [the_same, one_number_changed])
def test_every_command_says_it_in_one_line(
    run: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: str,
    base: Any,
) -> None:
    model, out = run
    loaded = base(model, tmp_path)
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    argv = words.replace("ROWS", str(rows)).replace("OUT", str(tmp_path)).split()
    capsys.readouterr()
    argv += ["--model", str(loaded), "--adapter", str(out)]
    assert main([*argv, *([] if "model.bits=null" in argv else ["model.bits=null"])]) == 0
    shown = capsys.readouterr().err
    assert shown.count("trained on other weights") == (0 if base is the_same else 1)


def test_a_checkpoint_without_the_base_s_hash_is_continued(run: tuple[Path, Path]) -> None:
    record = json.loads((run[1] / "training_args.json").read_text())
    assert set(record["fingerprint"]) == {"config", "data", "model", "numerics", "base"}
    from mlx_qlora.train.checkpoint import RunState, _same_run

    theirs = {"fingerprint": {**record["fingerprint"]}, "config": {}}
    del theirs["fingerprint"]["base"]
    state = _same_run(run[1], theirs, RunState(fingerprint=record["fingerprint"]), {})
    assert state.fingerprint == record["fingerprint"]


# ---- by its name ---------------------------------------------------------------------------------

PARENT = "meta-llama/Llama-3.1-8B"
QUANTISED = {"quantization": {"bits": 4, "group_size": 64}}
FOLDER, ERROR = "<the folder>", "<an error>"


@pytest.mark.parametrize(
    ("config", "card", "source", "base", "said"),
    [
        ({}, "", None, FOLDER, None),
        ({"_name_or_path": PARENT}, "", None, FOLDER, f"if the weights are .*path={PARENT}"),
        ({"_name_or_path": PARENT}, f"base_model: {PARENT}", None, FOLDER, "config.json says"),
        ({"_name_or_path": "./out"}, "", None, FOLDER, None),
        ({"_name_or_path": 7}, "", None, FOLDER, None),
        ({"_name_or_path": PARENT}, "", "org/mine", "org/mine", None),
        ({"_name_or_path": PARENT}, "", PARENT, PARENT, None),
        (QUANTISED, "", None, ERROR, None),
        (QUANTISED, f"base_model: {PARENT}", None, PARENT, None),
        (QUANTISED | {"_name_or_path": PARENT}, f"base_model: {PARENT}", None, PARENT, None),
        (
            QUANTISED | {"_name_or_path": PARENT},
            "",
            None,
            PARENT,
            "was made from.*trained since then",
        ),
        (QUANTISED | {"_name_or_path": PARENT}, "", "org/4bit", PARENT, "org/4bit says that"),
    ],
)
def test_a_parent_s_name_is_never_taken_without_a_word(
    tmp_path: Path, config: dict[str, Any], card: str, source: str | None, base: str, said: str
) -> None:
    from mlx_qlora.model.hub import original_repository

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if card:
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    hf_id = original_repository(folder, source)
    files = ModelFiles(folder, hf_id, "c0ffee" if source else None, source or str(folder))
    wanted = str(folder) if base is FOLDER else base
    if base is ERROR:
        with pytest.raises(AdapterError, match=r"the Hugging Face repository of .* is unknown"):
            original_base(files)
    elif said:
        with pytest.warns(AdapterWarning, match=said):
            assert original_base(files) == wanted
    else:
        assert original_base(files) == wanted


def test_a_run_on_a_fine_tuned_folder_names_the_folder_and_says_so_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_random_model(tmp_path / "mine", _name_or_path=PARENT)
    out = trained(model, tmp_path / "out")
    assert capsys.readouterr().err.count(f"whose config.json says {PARENT}") == 1
    assert json.loads((out / CONFIG).read_text())["base_model_name_or_path"] == str(model)
    assert PARENT not in (out / "README.md").read_text()
    other = trained(model, tmp_path / "named", f"model.base_model_name_or_path={PARENT}")
    assert capsys.readouterr().err == ""
    assert json.loads((other / CONFIG).read_text())["base_model_name_or_path"] == PARENT


def test_a_gguf_s_parent_is_said_and_the_built_in_model_s_is_known() -> None:
    built_in = resolve("smollm2-135m")
    assert original_base(built_in) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    file = ModelFiles(built_in.path, PARENT, None, "mine.gguf")
    with pytest.warns(AdapterWarning, match=f"mine.gguf says that it was made from {PARENT}"):
        assert original_base(file) == PARENT


# ---- from any folder -----------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["model", "./model", "sub/../model", "~/model"])
def test_the_record_of_a_run_finds_its_files_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    write_random_model(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", 12)
    words = ["--data", "rows.jsonl", "--output-dir", "out", *TRAIN]
    assert main(["train", "--model", spelling, *words]) == 0
    again = ["train", "--model", spelling, "--adapter", "out", *words[:3], "again", *TRAIN]
    assert main(again) == 0
    monkeypatch.chdir(tmp_path / "sub")
    for out in ("../out", "../again"):
        ask = ["generate", "--adapter", out, "--prompt", "x", "generation.max_new_tokens=1"]
        assert main(ask) == 0
    record = (tmp_path / "again" / "run.yaml").read_text()
    for name in ("model", "out", "rows.jsonl"):
        assert f": {tmp_path / name}\n" in record
    # It repeats the run, too.
    repeat = ["train", "--config", "../out/run.yaml", "--output-dir", str(tmp_path / "repeated")]
    assert main(repeat) == 0
    weights = [tmp_path / out / "adapter_model.safetensors" for out in ("out", "repeated")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


# ---- with its tokenizer --------------------------------------------------------------------------

OWN = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"


def jinja(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(OWN)


def of_version_4(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": OWN}))


def of_a_processor(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": OWN}))


def whole(folder: Path) -> None:
    write_tokenizer(folder)
    jinja(folder)


def in_its_config(folder: Path) -> None:
    write_tokenizer(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": OWN}))


def with_an_end_of_its_own(folder: Path) -> None:
    in_its_config(folder)
    for name, key in (("tokenizer.json", "<|eos|>"), ("tokenizer_config.json", "<|eos|>")):
        path = folder / name
        path.write_text(path.read_text().replace(key, "<|im_end|>"))


def without_a_template(folder: Path) -> None:
    write_tokenizer(folder)


BROUGHT = [jinja, of_version_4, of_a_processor, whole, in_its_config, with_an_end_of_its_own]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("bring", [*BROUGHT, without_a_template])
def test_the_tokenizer_and_template_beside_an_adapter_are_used_by_all_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bring: Any, chat: bool
) -> None:
    base = write_model(tmp_path / "model", chat=chat)
    mq.save_adapter(mq.add_lora(mq.load(base)[0], mq.LoraConfig(r=2)), tmp_path / "a")
    plain = mq.load(base, adapter=tmp_path / "a")[1]
    bring(tmp_path / "a")
    tokenizer = mq.load(base, adapter=tmp_path / "a")[1]
    assert tokenizer.chat_template == (OWN if bring in BROUGHT else plain.chat_template)
    assert plain.chat_template == (CHAT if chat else None)
    assert plain.eos_ids <= tokenizer.eos_ids
    if bring is with_an_end_of_its_own:
        assert tokenizer.decode([tokenizer.eos_id]) == "<|im_end|>"
    if bring not in BROUGHT:
        return
    asked = ["--model", str(base), "--adapter", str(tmp_path / "a"), "model.bits=null", "--json"]
    words = ["--prompt", "Hi", "--seed", "1", "generation.max_new_tokens=6"]
    capsys.readouterr()
    assert main(["generate", *asked, *words]) == 0
    answer = json.loads(capsys.readouterr().out)["text"]
    model = mq.load(base, adapter=tmp_path / "a")[0]
    settings: Any = {"max_new_tokens": 6, "seed": 1}
    assert answer == mq.generate(model, tokenizer, "[user] Hi\n", **settings)

    rows = tmp_path / "rows.jsonl"
    turns = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    rows.write_text((json.dumps({"messages": turns}) + "\n") * 12)
    train = ["--data", str(rows), "--output-dir", str(tmp_path / "out"), "--dry-run"]
    assert main(["train", *asked[:-1], *train]) == 0
    assert "[assistant]" in capsys.readouterr().out
    merged = ["merge", *asked[:-1], "--output-dir", str(tmp_path / "merged")]
    assert main(merged) == 0
    assert mq.load(tmp_path / "merged")[1].chat_template == OWN


def test_a_run_s_tokenizer_is_the_base_s_as_long_as_nothing_else_was_saved(
    run: tuple[Path, Path],
) -> None:
    model, out = run
    assert mq.load(model, adapter=out)[1].source == model
    assert mq.load(model, adapter=out / "checkpoint-1")[1].source == model


@pytest.mark.parametrize("part", ["", "checkpoint-1", "mlx", ".", "link"])
def test_every_adapter_of_a_run_has_its_model_and_its_template(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_random_model(tmp_path / "model")
    template = tmp_path / "own.jinja"
    template.write_text(OWN + "{# mine #}")
    words = [f"data.template={template}", "checkpointing.save_steps=1"]
    out = trained(model, tmp_path / "out", *words)
    out = {".": Path(), "link": tmp_path / "best"}.get(part, out / part)
    (tmp_path / "best").symlink_to("out/checkpoint-1")
    monkeypatch.chdir(tmp_path / "out" / "checkpoint-1")
    template.unlink()
    config, loaded, tokenizer = model_to_ask(build({"model": {"adapter": str(out)}}))
    assert (str(loaded.source.path), tokenizer.chat_template) == (str(model), OWN + "{# mine #}")
    assert config.data.template == "chat"


def test_the_base_s_templates_serve_a_tokenizer_without_one_and_are_saved_with_it(
    tmp_path: Path,
) -> None:
    base = write_model(tmp_path / "model", chat=True)
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("TOOLS" + CHAT)
    mq.save_adapter(mq.add_lora(mq.load(base)[0], mq.LoraConfig(r=2)), tmp_path / "a")
    write_tokenizer(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    config["pad_token"] = "<|eos|>"
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = mq.load(base, adapter=tmp_path / "a")
    mq.save_merged(model, tokenizer, tmp_path / "merged")
    for each in (tokenizer, mq.load(tmp_path / "merged")[1]):
        assert (each.chat_template, each.tool_template) == (CHAT, "TOOLS" + CHAT)


def test_a_damaged_tokenizer_beside_an_adapter_is_named(
    run: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(run[1], tmp_path / "a")
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=str(tmp_path / "a" / "tokenizer.json")):
        mq.load(run[0], adapter=tmp_path / "a")


# ---- a finished adapter that changed -------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "evaluate", "merge", "export", "push", "train"])
def test_a_bit_that_flipped_in_a_finished_adapter_is_seen(
    command: str, run: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(run[1], out)
    content = bytearray((out / WEIGHTS).read_bytes())
    content[-1] ^= 0x40  # in the exponent of the last number
    (out / WEIGHTS).write_bytes(content)
    rows = ["--data", str(run[1].with_name("rows.jsonl"))]
    words = {
        "generate": ["--prompt", "x", "generation.max_new_tokens=2"],
        "evaluate": rows,
        "merge": ["--output-dir", str(tmp_path / "merged")],
        "export": ["--output-dir", str(tmp_path / "exported")],
        "push": [str(out), "me/mine", "--dry-run"],
        "train": ["--model", str(run[0]), *rows, "--output-dir", str(tmp_path / "next"), *TRAIN],
    }[command]
    words += [] if command == "push" else ["--adapter", str(out)]
    assert main([command, *words]) == 2
    assert "has changed since the run wrote it" in capsys.readouterr().err
    if command == "generate":
        record = json.loads((out / "training_args.json").read_text())
        del record["sha256"]  # the way out that the message names
        (out / "training_args.json").write_text(json.dumps(record))
        assert main([command, *words]) == 0
