"""From a config to an output folder, through the public calls and the command line's `run`."""

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console
from support.command_line import contents
from support.models import random_tokens, torch_logits
from support.tiny_folder import write_model, write_rows
from support.training import train_run

import mlx_qlora as mq
from mlx_qlora.cli import main
from mlx_qlora.config import build, read_yaml
from mlx_qlora.errors import AdapterWarning
from mlx_qlora.run import open_inputs

PLOTS = ["grad_norm", "learning_rate", "loss", "peak_memory_bytes", "tokens_per_second"]
LAYOUT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "metrics.jsonl",
    "mlx/adapter_config.json",
    "mlx/adapters.safetensors",
    *(f"plots/{name}.svg" for name in PLOTS),
    "report.html",
    "run.yaml",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.json",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One real run of the whole path on a tiny model; (its folder, its values, its result)."""
    folder = tmp_path_factory.mktemp("run")
    write_model(folder / "model")
    rows = write_rows(folder / "rows.jsonl", 60)
    values = {
        "model": {"source": str(folder / "model"), "bits": 4, "group_size": 32},
        "data": {"path": str(rows), "max_length": 64, "split": [0.8, 0.1, 0.1]},
        "lora": {"r": 4, "lora_alpha": 8},
        "training": {
            "max_steps": 12,
            "warmup_steps": 2,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 5,
            "gradient_accumulation_steps": 1,
        },
        "checkpointing": {"output_dir": str(folder / "out"), "save_steps": 6, "eval_steps": 6},
        "logging": {"logging_steps": 4},
        "generation": {"max_new_tokens": 4},
    }
    return folder, values, train_run(values)


def into(out, finished, **model):
    """The values of the finished run, for one into another folder; keywords are of the model."""
    values = finished[1]
    where = {"output_dir": str(out), "save_steps": 6}
    return {**values, "model": {**values["model"], **model}, "checkpointing": where}


def test_the_output_folder_is_the_promised_one(finished):
    out = finished[0] / "out"
    files = sorted(
        str(path.relative_to(out))
        for path in out.rglob("*")
        if path.is_file() and not path.relative_to(out).parts[0].startswith("checkpoint-")
    )
    assert files == LAYOUT


def test_the_run_learned(finished):
    losses = [r["loss"] for r in finished[2].log_history if "loss" in r]
    assert losses[-1] < losses[0] - 0.5


def test_the_record_has_the_run_s_config(finished):
    """From which tests/train/test_invariants.py repeats a run to the bit."""
    folder, values, _ = finished
    assert build(read_yaml(folder / "out" / "run.yaml")) == build(values)
    record = json.loads((folder / "out" / "training_args.json").read_text())
    assert record["versions"]["mlx-qlora"] == mq.__version__
    assert record["config"]["training"]["max_steps"] == 12
    assert len(record["fingerprint"]["data"]) == 64


def test_the_adapter_on_disk_is_the_trained_one(finished):
    """Our loader and PEFT agree on the folder that the run left."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, *_ = finished
    tokens = random_tokens(2, 20)
    with pytest.warns(AdapterWarning, match="trained over weights of 4 bits, and these are not"):
        model, _ = mq.load(folder / "model", adapter=folder / "out")
    base, _ = mq.load(folder / "model")
    ours = np.array(model(mx.array(tokens)))
    assert np.abs(ours - np.array(base(mx.array(tokens)))).max() > 1e-2
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()
    theirs = PeftModel.from_pretrained(theirs, folder / "out")
    np.testing.assert_allclose(ours, torch_logits(theirs, tokens), atol=1e-5)


def test_an_adapter_can_be_trained_on_and_its_own_config_stands(finished, tmp_path):
    folder, values, _ = finished
    more = into(tmp_path / "more", finished, adapter=str(folder / "out"))
    more["lora"] = {}  # the defaults give way to the adapter's
    more["training"] = {**values["training"], "max_steps": 2, "learning_rate": 1e-6}
    train_run(more)
    assert read_yaml(tmp_path / "more" / "run.yaml")["lora"]["r"] == 4
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    first, _ = mq.load(adapter=folder / "out")
    second, _ = mq.load(adapter=tmp_path / "more")
    tokens = mx.array(random_tokens(1, 12))
    assert mx.abs(first(tokens) - second(tokens)).max().item() < 1e-2


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"quantize": mq.QuantConfig(bits=8, group_size=32)},
        {"quantize": mq.QuantConfig(bits=4, group_size=32, mode="mxfp4"), "dtype": "float16"},
    ],
    ids=["dense", "8 bits", "mxfp4"],
)
def test_the_record_opens_the_model_that_a_notebook_has_trained_on(finished, tmp_path, how):
    """With objects of its own: nothing of the config says how it was loaded, or from where."""
    folder, *_ = finished
    model, tokenizer = mq.load(folder / "model", **how)
    examples = mq.read_examples(folder / "rows.jsonl", tokenizer, mq.DataConfig(max_length=64))
    out = tmp_path / "out"
    config = mq.RunConfig(
        training=mq.TrainingConfig(max_steps=2, warmup_steps=1, learning_rate=1e-2),
        checkpointing=mq.CheckpointingConfig(output_dir=str(out)),
    )
    quiet = Console(quiet=True)
    result = mq.fine_tune(model, tokenizer, examples, config=config, console=quiet)
    assert result.eval_loss is None and result.steps == 2
    scored = mq.evaluate(model, tokenizer, examples)
    assert scored.n_tokens == examples.report.supervised

    recorded = mq.config.build({"model": read_yaml(out / "run.yaml")["model"]}).model
    assert recorded.source == str(folder / "model")
    again, _ = mq.load(
        recorded.source, recorded.quantize(), out, recorded.revision, dtype=recorded.dtype
    )
    assert mq.evaluate(again, tokenizer, examples) == scored
    ask = ["generate", "--adapter", str(out), "--prompt", "Hi", "generation.max_new_tokens=4"]
    assert main(ask) == 0


def test_an_unknown_base_is_refused_before_training(finished, tmp_path):
    folder, *_ = finished
    model, tokenizer = mq.load(folder / "model")
    examples = mq.read_examples(folder / "rows.jsonl", tokenizer, mq.DataConfig(max_length=64))
    model.source = type(model.source)(folder / "model", None, None, "some-4bit-copy")
    config = mq.RunConfig(checkpointing=mq.CheckpointingConfig(output_dir=str(tmp_path / "out")))
    with pytest.raises(mq.AdapterError, match=r"model\.base_model_name_or_path=org/name"):
        mq.fine_tune(model, tokenizer, examples, config=config, console=Console(quiet=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("README.md", "my project"),
        ("README.md", "---\ntags: [lora, mlx-qlora]\n---\nMy notes on mlx-qlora."),
        ("README.md", "A LoRA adapter of rank 8, which I trained with mlx-qlora 0.1.0."),
        ("checkpoint-4/pytorch_model.bin", "my project"),
        ("metrics.jsonl", '{"accuracy": 0.5}'),
        ("run.yaml", "steps: [build, test]"),
        ("training_args.json", '{"versions": {"transformers": "5"}}'),
        ("training_args.json", "[" * 100_000),
        ("adapter_config.json", '{"fine_tune_type": "lora", "lora_parameters": {}}'),
        ("tokenizer.json", "{}"),
        ("report.html", "<p>mine"),
        ("plots/loss.svg", "<svg/>"),
        ("mlx/adapters.safetensors", ""),
    ],
)
def test_files_of_others_are_never_overwritten(finished, tmp_path, name, text):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(
        mq.ConfigError, match="is not known to be from mlx-qlora and would be overwritten"
    ):
        train_run(into(tmp_path / "out", finished))
    assert path.read_text() == text
    assert [p for p in (tmp_path / "out").rglob("*") if p.is_file()] == [path]


@pytest.mark.parametrize("run", ["model: [", "- a", "model: {bits: foo}"])
def test_a_strange_record_beside_an_adapter_does_not_keep_it_from_being_loaded(
    finished, tmp_path, run
):
    folder, *_ = finished
    adapter = shutil.copytree(folder / "out", tmp_path / "a")
    (adapter / "run.yaml").write_text(run)
    mq.load(folder / "model", adapter=adapter)


def test_the_adapter_that_training_goes_on_from_is_not_overwritten(finished, tmp_path):
    folder, *_ = finished
    mq.save_adapter(mq.load(adapter=folder / "out")[0], tmp_path / "a", "org/base")
    before = contents(tmp_path / "a")
    with pytest.raises(mq.ConfigError, match="holds the adapter that training continues from"):
        train_run(into(tmp_path / "a", finished, adapter=str(tmp_path / "a")))
    assert contents(tmp_path / "a") == before
    before = contents(folder / "out")  # a run's own
    with pytest.raises(mq.ConfigError, match="holds the adapter that training continues from"):
        train_run(into(folder / "out", finished, adapter=str(folder / "out")))
    assert contents(folder / "out") == before


@pytest.mark.parametrize(
    ("lora", "told"),
    [
        ({"r": 64}, "lora.r is 4 in the adapter {}, and cannot be changed to 64"),
        ({"r": 4, "lora_alpha": 1}, "lora.lora_alpha is 8"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules is ['q_proj', 'k_proj'"),
        ({"use_dora": True}, "lora.use_dora is False"),
        ({"init_lora_weights": "pissa"}, None),  # of the beginning, which is over
        ({}, None),
        ({"r": 4, "lora_alpha": 8, "loraplus_lr_ratio": 4, "layers_to_transform": []}, None),
        ({"target_modules": "all-linear"}, None),
    ],
)
def test_another_shape_than_the_adapters_is_refused(finished, tmp_path, lora, told):
    folder, *_ = finished
    values = into(tmp_path / "more", finished, adapter=str(folder / "out")) | {"lora": lora}
    if told is None:
        assert open_inputs(build(values), Console(quiet=True))
        return
    with pytest.raises(mq.ConfigError) as caught:
        open_inputs(build(values), Console(quiet=True))
    assert str(caught.value).startswith(told.format(folder / "out"))


def test_an_adapter_s_own_settings_fit_its_copy_for_mlx_lm(finished, tmp_path):
    folder, *_ = finished
    own = read_yaml(folder / "out" / "run.yaml")
    moved = into(tmp_path / "more", finished, adapter=str(folder / "out" / "mlx"))
    own |= {section: moved[section] for section in ("model", "checkpointing")}
    assert open_inputs(build(own), Console(quiet=True))
    own["lora"]["r"] = 64
    with pytest.raises(mq.ConfigError, match=r"lora\.r is 4"):
        open_inputs(build(own), Console(quiet=True))


def test_a_run_that_died_between_its_two_records_goes_on(finished, tmp_path):
    folder, *_ = finished
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "out" / "training_args.json", tmp_path / "out")
    assert open_inputs(build(into(tmp_path / "out", finished)), Console(quiet=True))


def test_the_plan_counts_the_adapter_that_will_be_trained(finished):
    folder, *_ = finished
    adapted = build({"model": {"adapter": str(folder / "out")}, "lora": {"r": 64}})
    assert (
        mq.plan(str(folder / "model"), adapted).trainable
        == mq.plan(str(folder / "model"), build({"lora": {"r": 4}})).trainable
    )


def test_rows_beyond_the_models_context_are_refused_before_loading(finished, tmp_path):
    folder, *_ = finished
    short = write_model(tmp_path / "model", max_position_embeddings=8)
    with pytest.raises(mq.ConfigError, match=r"was made for 8; set data\.max_length=8"):
        train_run(into(tmp_path / "out", finished, source=str(short)))
    assert not (tmp_path / "out").exists()
    model, tokenizer = mq.load(short)
    examples = mq.read_examples(folder / "rows.jsonl", tokenizer, mq.DataConfig(max_length=64))
    with pytest.raises(mq.ConfigError, match="was made for 8"):
        mq.fine_tune(model, tokenizer, examples, console=Console(quiet=True))
