"""What a user of the Python names may pass, and what is said of anything else."""

import dataclasses
import inspect
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.models import load_folder
from support.tiny_folder import write_model
from support.training import make_examples

import mlx_qlora
from mlx_qlora.config import SECTIONS, build, to_dict
from mlx_qlora.data.tokenizer import load_tokenizer
from mlx_qlora.errors import AdapterWarning, ConfigError, DataWarning, PromptWarning

mq: Any = mlx_qlora  # a type checker would say before what these tests are of
ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(10)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model", num_hidden_layers=1)


# ---- sections ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mq.DataConfig(max_length="256"), "data.max_length must be an int; got '256'"),
        (lambda: mq.DataConfig(packing=1), "data.packing must be true/false; got 1"),
        (lambda: mq.TrainingConfig(max_steps=4.0), "training.max_steps must be an int or null"),
        (lambda: mq.GenerationConfig(top_k=True), "generation.top_k must be an int; got True"),
        (
            lambda: mq.RunConfig(training={"max_steps": 4}),
            "training must be TrainingConfig(...); got {'max_steps': 4}",
        ),
        (lambda: mq.RunConfig(mq.LoraConfig()), "model must be ModelConfig(...); got LoraConfig("),
        (lambda: mq.TrainingConfig(lr=1e-4), "training.lr; did you mean training.learning_rate?"),
        (lambda: mq.DataConfig(max_lenght=8), "data.max_lenght; did you mean data.max_length?"),
        (lambda: mq.LoraConfig(num_layers=8), "did you mean lora.layers_to_transform?"),
        (lambda: mq.RunConfig(trainig=None), "unknown field trainig; did you mean training?"),
        (lambda: mq.RunConfig(max_steps=4), "field max_steps; did you mean training.max_steps?"),
        (lambda: mq.LoggingConfig(zzz=1), "logging.zzz; LoggingConfig has logging_steps, report"),
    ],
)
def test_a_section_says_what_a_field_of_it_may_be(make: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        make()


def test_numbers_of_numpy_and_paths_become_what_a_config_holds(tmp_path: Path) -> None:
    config = mq.RunConfig(
        data=mq.DataConfig(path=tmp_path, max_length=np.int64(64), split=(0.5, np.float32(0.5))),
        training=mq.TrainingConfig(learning_rate=np.float64(1e-3)),
        lora=mq.LoraConfig(target_modules=("q_proj", "v_proj")),
    )
    assert (config.data.path, config.data.max_length) == (str(tmp_path), 64)
    assert type(config.data.max_length) is int
    assert config.lora.target_modules == ["q_proj", "v_proj"]
    assert build(to_dict(config)) == config


@pytest.mark.parametrize("config", [*SECTIONS.values()], ids=[*SECTIONS])
def test_help_shows_every_field_with_its_line(config: Any) -> None:
    for field in dataclasses.fields(config):
        assert f"    {field.name}: {field.metadata['help']}" in (inspect.getdoc(config) or "")
    assert [*inspect.signature(config).parameters] == [f.name for f in dataclasses.fields(config)]


# ---- arguments -----------------------------------------------------------------------------------


def test_an_argument_of_another_class_is_named_with_what_it_must_be(folder: Path) -> None:
    model, tokenizer, rows = load_folder(folder), load_tokenizer(folder), make_examples()
    of_load = "must be the Tokenizer of load; got LlamaForCausalLM"
    calls: list[tuple[Any, str]] = [
        (lambda: mq.read_examples(ROWS, model), f"read_examples: tokenizer {of_load}"),
        (
            lambda: mq.read_examples(ROWS, tokenizer, {"max_length": 64}),
            "read_examples: config must be DataConfig(...); got dict",
        ),
        (
            lambda: mq.fine_tune(model, tokenizer, ROWS),
            "fine_tune: train_examples must be the Examples of read_examples; got list",
        ),
        (
            lambda: mq.fine_tune(model, tokenizer, rows, None, mq.TrainingConfig()),
            "fine_tune: config must be RunConfig(...); got TrainingConfig",
        ),
        (lambda: mq.evaluate(model, model, rows), f"evaluate: tokenizer {of_load}"),
        (lambda: mq.evaluate(model, tokenizer, ROWS), "evaluate: examples must be the Examples"),
        (lambda: mq.generate(tokenizer, model, "Hi"), "generate: model must be the LlamaForCa"),
        (lambda: mq.generate_batch(model, None, ["Hi"]), "generate_batch: tokenizer must be the"),
    ]
    for call, words in calls:
        with pytest.raises(ConfigError, match=re.escape(words)):
            call()
    with pytest.raises(TypeError, match=r"fine_tune: .*'eval_dataset'; did you mean validation\?"):
        mq.fine_tune(model, tokenizer, rows, eval_dataset=rows)
    with pytest.raises(TypeError, match=r"fine_tune: missing a required argument: 'train_examples"):
        mq.fine_tune(model, tokenizer)


# ---- rows ----------------------------------------------------------------------------------------


def test_rows_that_are_refused_are_a_warning_and_in_the_repr(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    rows = [*ROWS[:3], {"instruction": "And?", "output": ""}, *ROWS[3:]]
    with pytest.warns(DataWarning, match=r"(?s)10 kept, 1 refused.*\n  row 4: .*from 1$"):
        examples = mq.read_examples(rows, tokenizer)
    assert repr(examples).endswith(", 1 of the source refused)")
    assert repr(examples[:3]).startswith("Examples(3 of rows")
    with pytest.warns(DataWarning, match=r"not used: field 'mood' in 1 rows$") as caught:
        mq.read_examples([ROWS[0] | {"mood": "x"}], tokenizer)
    assert caught[0].filename == __file__
    assert "refused" not in repr(mq.read_examples(ROWS, tokenizer))


# ---- mistakes of a day -------------------------------------------------------------------------


def test_what_load_is_given_wrongly_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"quantize must be QuantConfig\(\.\.\.\); got str"):
        mq.load(folder, quantize="4bit")
    with pytest.raises(TypeError, match=r"'bits'; did you mean quantize=mlx_qlora.QuantConfig"):
        mq.load(folder, bits=4)
    with pytest.raises(ConfigError, match="neither a model nor an adapter is named"):
        mq.load()
    model, tokenizer = mq.load(folder)
    mq.save_merged(
        mq.add_lora(model, mq.LoraConfig(r=2)),
        tokenizer,
        packed := tmp_path / "packed",
        quantize=mq.QuantConfig(bits=4, group_size=32),
    )
    with pytest.warns(AdapterWarning, match="bits=8, .* is not used: the weights are quantised"):
        mq.load(packed, quantize=mq.QuantConfig(bits=8, group_size=32))


def test_an_adapter_s_run_names_the_model_to_load(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = mq.load(folder)
    output = tmp_path / "outputs"
    config = mq.RunConfig(
        training=mq.TrainingConfig(max_steps=1),
        checkpointing=mq.CheckpointingConfig(output_dir=str(output)),
    )
    examples = mq.read_examples(ROWS, tokenizer)
    mq.fine_tune(model, tokenizer, examples, config=config)
    again, _ = mq.load(adapter=output)
    assert again.lora_config == model.lora_config
    assert str(again.source.source) == str(folder)


def test_rows_that_another_model_s_tokenizer_read_are_refused(
    folder: Path, smollm2: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = mq.load(folder)
    examples = mq.read_examples(ROWS, smollm2[1])
    words = "rows was read with the tokenizer of another model; read it again"
    with pytest.raises(ConfigError, match=words):
        mq.fine_tune(model, tokenizer, examples)
    with pytest.raises(ConfigError, match=words):
        mq.evaluate(model, tokenizer, examples)


def test_a_tokenizer_that_differs_in_what_no_row_needs_is_the_same(
    folder: Path, tmp_path: Path
) -> None:
    model, tokenizer = mq.load(folder)
    examples = mq.read_examples(ROWS, tokenizer)
    copy = shutil.copytree(folder, tmp_path / "copy")
    content = json.loads((copy / "tokenizer.json").read_text())
    content["post_processor"] = None
    (copy / "tokenizer.json").write_text(json.dumps(content))
    mq.evaluate(model, load_tokenizer(copy), examples)


def test_one_message_is_put_into_a_list(folder: Path) -> None:
    model, tokenizer = mq.load(folder)
    with pytest.raises(ConfigError, match="put the message in a list"):
        mq.generate(model, tokenizer, {"role": "user", "content": "hi"})


def test_a_text_for_a_chat_model_is_said_to_be_no_chat(tmp_path: Path) -> None:
    model, tokenizer = mq.load(write_model(tmp_path / "model", chat=True, num_hidden_layers=1))
    with pytest.warns(PromptWarning, match="to ask a chat model pass") as caught:
        mq.generate(model, tokenizer, "Hello?", max_new_tokens=1)
    assert Path(caught[0].filename).samefile(__file__)
    asked = [{"role": "user", "content": "Hello?"}]
    rendered = tokenizer.render_chat(asked, add_generation_prompt=True) + "<|eos|>"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in (asked, rendered, "### Instruction:\nHello?\n\n### Response:\n"):
            mq.generate(model, tokenizer, prompt, max_new_tokens=1)
