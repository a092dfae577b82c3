"""Model cards, and the real huggingface_hub client pushing to a stand-in hub on 127.0.0.1."""

import json
import os
import re
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.numpy import load_file
from support.command_line import contents
from support.hub_uploads import READER, REPO, away, hub  # noqa: F401
from support.tiny_folder import write_model, write_rows

import mlx_qlora as mq
from mlx_qlora.adapters.origin import check_base
from mlx_qlora.adapters.push import Facts, model_card, push_to_hub, read_facts
from mlx_qlora.config import ModelConfig
from mlx_qlora.errors import AdapterWarning, ConfigError, SourceError
from mlx_qlora.loading import form_of_rows
from mlx_qlora.model.hub import resolve

BASE = "some-org/Tiny-Llama"
SECRET = "xyzzy"  # in every row of the data, and in every path

ADAPTER_FILES = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "mlx/adapter_config.json",
    "mlx/adapters.safetensors",
    *(
        f"plots/{plot}.svg"
        for plot in ("grad_norm", "learning_rate", "loss", "peak_memory_bytes", "tokens_per_second")
    ),
    "tokenizer.json",
    "tokenizer_config.json",
]


# ---- what is pushed ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The output folder of one real run, on data and under paths that nobody may see."""
    home = tmp_path_factory.mktemp(SECRET)
    write_model(home / "model")
    rows = write_rows(home / f"{SECRET}.jsonl", 40)
    rows.write_text(rows.read_text().replace("count", SECRET))
    model, tokenizer = mq.load(home / "model", quantize=mq.QuantConfig(4, 32))
    data = mq.DataConfig(path=str(rows), max_length=64)
    examples = mq.read_examples(rows, tokenizer, data)
    config = mq.RunConfig(
        model=mq.ModelConfig(
            source=str(home / "model"), base_model_name_or_path=BASE, group_size=32
        ),
        data=data,
        lora=mq.LoraConfig(r=4),
        training=mq.TrainingConfig(max_steps=6, warmup_steps=1, learning_rate=1e-2),
        checkpointing=mq.CheckpointingConfig(
            output_dir=str(home / "out"), save_steps=3, eval_steps=3
        ),
        logging=mq.LoggingConfig(logging_steps=2),
    )
    mq.fine_tune(model, tokenizer, examples, examples, config, console=Console(quiet=True))
    return home / "out"


@pytest.fixture
def out(run_folder, tmp_path):
    """A copy of it, to add to, with what else may lie in such a folder."""
    folder = tmp_path / SECRET / "out"
    shutil.copytree(run_folder, folder)
    for name in ("refused.jsonl", ".hidden", "notes.txt", "adapter.tmp", ".out-x.tmp/a.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)
    return folder


def test_a_run_arrives_whole_and_nothing_else_does(away, hub, out):
    with (out / "metrics.jsonl").open("a") as file:  # a step that was skipped names its rows
        file.write(json.dumps({"step": 7, "skipped": "loss nan", "rows": [SECRET]}) + "\n")
    before = contents(out)
    pushed = away.push(out)
    files = hub.repos[REPO]["branches"]["main"]
    assert sorted(files) == ADAPTER_FILES
    assert pushed["files"] == [[name, len(files[name])] for name in ADAPTER_FILES]
    assert pushed["url"] == f"{hub.url}/{REPO}/commit/{'b' * 40}"
    assert hub.commits[0]["summary"] == "Upload with mlx-qlora"
    assert hub.repos[REPO]["private"] is True
    for name in set(ADAPTER_FILES) - {"README.md", "metrics.jsonl"}:
        assert files[name] == before[name], name
    assert files["README.md"].decode() == model_card(read_facts(out, REPO))
    written = [json.loads(line) for line in before["metrics.jsonl"].splitlines()]
    written[-1] = {"step": 7}
    assert [json.loads(line) for line in files["metrics.jsonl"].splitlines()] == written
    assert len(hub.large) == 2
    assert SECRET in before["run.yaml"].decode()
    for name, body in files.items():
        assert SECRET.encode() not in body and str(Path.home()).encode() + b"/" not in body, name
    assert contents(out) == before
    stays = {"report.html", "run.yaml", "training_args.json", "refused.jsonl", ".hidden"}
    stays |= {"checkpoint-3/", "checkpoint-6/", "notes.txt", "adapter.tmp", ".out-x.tmp/"}
    assert set(pushed["left_out"]) == stays


def test_what_was_pushed_is_an_adapter_again(away, hub, out, tmp_path, run_folder):
    away.push(out)
    for name, body in hub.repos[REPO]["branches"]["main"].items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "again" / name).write_bytes(body)
    model, _ = mq.load(run_folder.parent / "model", adapter=tmp_path / "again")
    mq.save_adapter(model, tmp_path / "saved", BASE)
    name = "adapter_model.safetensors"
    # A run's record has its base's hash, an adapter saved from Python has it in the file.
    saved, of_run = (load_file(folder / name) for folder in (tmp_path / "saved", run_folder))
    assert {k: (x.shape, x.tobytes()) for k, x in saved.items()} == {
        k: (x.shape, x.tobytes()) for k, x in of_run.items()
    }


def test_again_to_a_branch_with_checkpoints_and_a_message(away, hub, out):
    away.push(out)
    pushed = away.push(out, include_checkpoints=True, revision="v2", commit_message="Second")
    extra = [
        f"checkpoint-{step}/{name}"
        for step in (3, 6)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    branches = hub.repos[REPO]["branches"]
    assert sorted(branches["v2"]) == sorted([*ADAPTER_FILES, *extra])
    assert sorted(branches["main"]) == ADAPTER_FILES
    assert hub.commits[1]["summary"] == "Second"
    for name in ("optimizer.safetensors", "resume_state.json", "trainer_state.json"):
        assert f"checkpoint-6/{name}" in pushed["left_out"]


def test_a_name_alone_is_a_repository_of_ones_own(away, hub, out):
    away.push(out, "alone", private=False)
    assert sorted(hub.repos["me/alone"]["branches"]["main"]) == ADAPTER_FILES
    assert not hub.repos["me/alone"]["private"]


def test_a_public_repository_needs_to_be_meant_and_a_private_one_stays_so(away, hub, out):
    hub.repos["me/open"] = {"private": False, "branches": {"main": {}}}
    hub.repos["me/closed"] = {"private": True, "branches": {"main": {}}}
    assert away.refused(out, "me/open") == (
        "me/open exists and is public; pass private=False to publish there, or name another "
        "repository"
    )
    assert not hub.repos["me/open"]["branches"]["main"] and not hub.large
    away.push(out, "me/closed", private=False)
    assert hub.repos["me/closed"]["private"] is True
    away.push(out, "me/open", private=False)
    assert sorted(hub.repos["me/open"]["branches"]["main"]) == ADAPTER_FILES


def test_a_dry_run_says_the_same_and_asks_nobody(away, hub, out):
    kind, dry = away.call(out, REPO, {"dry_run": True}, {"HF_TOKEN": ""})
    assert kind == "PUSHED" and dry["url"] is None and hub.log == []
    real = away.push(out)
    assert dry["files"] == real["files"] and dry["left_out"] == real["left_out"]
    shown = str(push_to_hub(out, REPO, dry_run=True))
    size = (out / "adapter_model.safetensors").stat().st_size
    assert re.search(rf"{size:,}  adapter_model.safetensors +the adapter's weights\n", shown)
    assert re.search(r"plots/loss.svg +plot\n", shown)
    assert f"{sum(n for _, n in dry['files']):,}  bytes in all" in shown
    assert "stays here  run.yaml" in shown


def test_a_merged_model_arrives_with_its_shards(away, hub, tmp_path):
    folder = write_model(tmp_path / "merged")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    card = "---\nlibrary_name: transformers\n---\nmerged by mlx-qlora, see https://x.org/a/b\n"
    (folder / "README.md").write_text(card)
    (folder / "optimizer.safetensors").write_bytes(b"x")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"name_or_path": f"/Users/{SECRET}/models/tiny"})
    )
    pushed = away.push(folder)
    files = hub.repos[REPO]["branches"]["main"]
    assert sorted(files) == sorted({*os.listdir(folder)} - {"optimizer.safetensors"})
    assert pushed["left_out"] == ["optimizer.safetensors"]
    assert files["model-00001-of-00001.safetensors"] == whole
    assert files["README.md"].decode() == card
    assert json.loads(files["tokenizer_config.json"]) == config | {"name_or_path": "tiny"}


def test_a_card_by_hand_goes_as_it_is_and_its_license_into_ours(out):
    (out / "README.md").write_text("---\nlicense: mit\n---\nMy own words.\n")
    assert dict(push_to_hub(out, REPO, dry_run=True).files)["README.md"] == 35
    (out / "README.md").write_text("---\nlicense: mit\n---\nA card by mlx-qlora.\n")
    assert "\nlicense: mit\n" in model_card(read_facts(out, REPO))


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("repo", ["a/b/c", "", "me/a--b", "me/x.git", "me/with space"])
def test_an_invalid_name_is_refused_before_anything_is_read(tmp_path, repo):
    with pytest.raises(
        ConfigError, match=r"cannot be the name of a repository .*; write it as org"
    ):
        push_to_hub(tmp_path / "nothing", repo)


def test_folders_that_hold_nothing_to_push(tmp_path, out):
    with pytest.raises(SourceError, match=r"no such folder: .*nothing; give the output folder"):
        push_to_hub(tmp_path / "nothing", REPO)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=r"neither an adapter .* nor a merged model .*; give"):
        push_to_hub(tmp_path / "empty", REPO)
    (out / "adapter_model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"for an adapter, adapter_model.safetensors is missing"):
        push_to_hub(out, REPO)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"is not a complete model; missing: \*.safetensors"):
        push_to_hub(tmp_path / "empty", REPO)


def test_a_base_that_nobody_else_has_and_paths_in_a_card_are_refused(out, tmp_path):
    (out / "README.md").write_text("My card. Begin with #!/usr/bin/env, see https://x.org/a/b.\n")
    assert push_to_hub(out, REPO, dry_run=True).files
    (out / "README.md").write_text(f"My card. The data is in {tmp_path}/{SECRET}.\n")
    with pytest.raises(ConfigError, match=rf"README.md names paths of this (?s:.*){SECRET}"):
        push_to_hub(out, REPO)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path)
    (out / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"is no repository on the hub.*save it again with model"):
        push_to_hub(out, REPO)


@pytest.mark.parametrize("name", ["plots/loss.svg", "tokenizer.json", "metrics.jsonl"])
def test_a_link_out_of_the_folder_is_not_followed(name, out, tmp_path):
    secret = tmp_path / "elsewhere"
    (out / name).rename(secret)
    (out / name).symlink_to(secret)
    with pytest.raises(mq.errors.ConfigError, match=r"is a link to .*elsewhere.*, outside of the"):
        mq.push_to_hub(out, "me/mine", dry_run=True)


@pytest.mark.parametrize("name", ["README.md", "metrics.jsonl"])
def test_two_gigabytes_for_a_person_to_read_are_refused(name, out):
    os.truncate(out / name, 2 << 30)
    with pytest.raises(mq.errors.UserError, match=f"{name} cannot be read .it is larger than"):
        mq.push_to_hub(out, "me/mine", dry_run=True)


def test_tokens_by_a_word_are_not_counted(out):
    (out / "checkpoint-9").mkdir()
    (out / "checkpoint-9" / "trainer_state.json").write_text('{"num_input_tokens_seen": "x"}')
    assert mq.push_to_hub(out, "me/mine", dry_run=True).files


def test_a_link_within_the_folder_is_as_good_as_its_file(out):
    (out / "plots" / "loss.svg").rename(out / "loss.svg")
    (out / "plots" / "loss.svg").symlink_to(out / "loss.svg")
    assert "plots/loss.svg" in dict(mq.push_to_hub(out, "me/mine", dry_run=True).files)


# Of a stranger's record; nothing of it is used but for the card.
RECORDS = [{"config": [1]}, {"versions": [1]}, {"data": [1]}, {"fingerprint": "x"}, [1]]


@pytest.mark.parametrize("wrong", RECORDS)
def test_a_record_that_no_run_wrote_is_named_or_not_used(wrong, out):
    file = out / "training_args.json"
    written = json.loads(file.read_text())
    file.write_text(json.dumps(written | wrong if isinstance(wrong, dict) else wrong))
    with warnings.catch_warnings(action="ignore", category=AdapterWarning):  # other weights
        check_base(resolve("smollm2-135m"), out, {})
    assert isinstance(form_of_rows(mq.RunConfig(model=ModelConfig(adapter=str(out)))), str)
    if "fingerprint" in wrong:
        push_to_hub(out, REPO, dry_run=True)
        return
    with pytest.raises(SourceError, match=f"{file} cannot be read"):
        push_to_hub(out, REPO, dry_run=True)


def test_a_damaged_history_is_named(out):
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')
    with pytest.raises(SourceError, match=r"metrics.jsonl, line \d+ is no JSON object"):
        push_to_hub(out, REPO, dry_run=True)


def test_not_logged_in_refused_and_not_allowed(away, hub, out):
    assert away.refused(out, environ={"HF_TOKEN": ""}) == (
        "not logged in to the hub; run `hf auth login` with a token that may write, or pass token="
    )
    assert hub.log == []
    told = f"the hub refuses your token (401 for {REPO}); "
    assert away.refused(out, environ={"HF_TOKEN": "hf_old"}) == told + "correct or unset HF_TOKEN"
    assert away.refused(out, token="hf_old") == told + "correct or leave out token="
    (away.home / "token").write_text("hf_old")
    assert away.refused(out, environ={"HF_TOKEN": ""}) == told + "run `hf auth login`"
    told = "your token may not write to {} (403); make one with write permission at "
    assert away.refused(out, token=READER).startswith(told.format(REPO))
    assert away.refused(out, "other/name").startswith(told.format("other/name"))
    hub.repos[REPO] = {"private": True, "branches": {"main": {}}}  # may be read, not written
    assert away.refused(out, token=READER).startswith(told.format(REPO))
    assert not hub.large and not hub.repos[REPO]["branches"]["main"]


def test_no_network_and_a_hub_that_breaks_down(away, hub, out):
    again = "run the same command again; what was uploaded already is not sent twice"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    message = away.refused(out, environ={"HF_ENDPOINT": closed})
    assert message.startswith(f"cannot push to {REPO}, {closed} cannot be reached (")
    assert message.endswith(f"); {again}")
    offline = away.refused(out, environ={"HF_HUB_OFFLINE": "1"})
    assert offline == f"cannot push to {REPO}, HF_HUB_OFFLINE is set; unset it and {again}"
    hub.broken = "large/"
    told = f"cannot push to {REPO}, {hub.url} answered 501; {again}"
    assert away.refused(out) == told
    assert not hub.repos[REPO]["branches"]["main"], "a commit is whole or not at all"
    hub.broken = ""
    away.push(out)
    sent = len([line for line in hub.log if line.startswith("PUT")])
    away.push(out, revision="again")
    assert len([line for line in hub.log if line.startswith("PUT")]) == sent


# ---- the card ----------------------------------------------------------------------------------


def test_huggingface_reads_the_card_and_it_says_what_the_run_was(run_folder):
    from huggingface_hub import ModelCard

    text = model_card(read_facts(run_folder, REPO))
    data = ModelCard(text).data.to_dict()
    assert data == {
        "base_model": BASE,
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": [f"base_model:adapter:{BASE}", "lora", "mlx-qlora"],
    }
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    for key, label in (("loss", "training loss"), ("eval_loss", "validation loss")):
        values = [(r[key], r["step"]) for r in records if key in r]
        shown = [f"{v:.4f} (step {s})" for v, s in (values[0], values[-1], min(values))]
        assert f"| {label} | {' | '.join(shown)} |" in text
    state = json.loads((run_folder / "checkpoint-6" / "trainer_state.json").read_text())
    for line in (
        "| `lora.r` | 4 |",
        "| `training.learning_rate` | 0.01 |",
        "| `training.max_steps` | 6 |",
        "| `model.bits` | 4 |",
        f"tokens trained on {state['num_input_tokens_seen']:,}",
        "![loss](plots/loss.svg)",
        f"- mlx-qlora {mq.__version__}",
        f'from_pretrained("{REPO}")',
        f"vllm serve {BASE} --enable-lora --max-lora-rank 8 --lora-modules tuned={REPO}",
        f'hf download {REPO} --include "mlx/*" --local-dir adapter',
        f"mlx_lm.generate --model {BASE} --adapter-path adapter/mlx",
    ):
        assert line in text, line
    assert SECRET not in text and str(run_folder.parent) not in text
    for plot in re.findall(r"\]\((plots/[^)]*)\)", text):
        assert (run_folder / plot).is_file()


def test_the_snippets_run(run_folder):
    """The Python of the card, on the folder itself, with the base's name led to the local one."""
    text = model_card(read_facts(run_folder))
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code and '"path/to/this/folder"' in code[1]
    folder = run_folder.parent / "snippet"
    shutil.copytree(run_folder, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(run_folder.parent / "model")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    scope: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(folder)), scope)
    ids = scope["tokenizer"]("count", return_tensors="pt").input_ids
    assert scope["model"](ids).logits.shape == (*ids.shape, 320)

    from mlx_lm import load

    shown = re.search(r"--model (\S+) --adapter-path (\S+)", text)
    assert shown and shown.groups() == (BASE, "path/to/this/folder/mlx")
    load(str(run_folder.parent / "model"), adapter_path=str(folder / "mlx"))


def test_a_folder_with_the_adapter_alone_has_a_shorter_card(run_folder, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run_folder / name, tmp_path / name)
    text = model_card(read_facts(tmp_path))
    assert re.findall("^## .*", text, re.MULTILINE) == ["## How to use it", "## Hyperparameters"]
    assert f'AutoTokenizer.from_pretrained("{BASE}")' in text and "mlx_lm" not in text
    shutil.copy(run_folder / "run.yaml", tmp_path / "run.yaml")  # says the settings as well
    assert "| `training.max_steps` | 6 |" in model_card(read_facts(tmp_path))


def test_a_card_of_what_vllm_does_not_compute_of_a_local_base_and_of_odd_values():
    adapter = {"base_model_name_or_path": f"/home/{SECRET}/tiny", "r": 600, "use_dora": True}
    text = model_card(Facts({**adapter, "target_modules": "a|b"}))
    assert SECRET not in text and "base_model" not in text and "A DoRA adapter" in text
    assert "vLLM does not support DoRA" in text and r"a\|b" in text
    assert "vllm serve" not in model_card(Facts({**adapter, "use_dora": False}))
    patterns = {**adapter, "use_dora": False, "r": 8, "alpha_pattern": {"q_proj": 3}}
    assert "does not support several ranks or scales" in model_card(Facts(patterns))
    counted = model_card(Facts(adapter, {"data": {"rows": 1234, "tokens": 56789}}))
    assert "data: rows 1,234; data: tokens 56,789." in counted
    for r, enough in ((1, 8), (9, 16), (300, 320), (512, 512)):
        text = model_card(Facts({"base_model_name_or_path": BASE, "r": r}))
        assert f"--max-lora-rank {enough} " in text


def test_a_run_of_a_hundred_thousand_records_has_a_card(tmp_path: Path) -> None:
    """Its history is longer than any other JSON may be."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "checkpoint-9").mkdir()
    state = '{"num_input_tokens_seen": 7}' + " " * (1 << 24)
    (tmp_path / "checkpoint-9" / "trainer_state.json").write_text(state)
    assert read_facts(tmp_path).tokens_seen == 7
