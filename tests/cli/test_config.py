"""YAML, overrides and the dataclasses say the same thing, and what is wrong is named."""

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import pytest

from mlx_qlora.cli import main, parse
from mlx_qlora.commands import config_of
from mlx_qlora.config import (
    SECTIONS,
    RunConfig,
    build,
    read_yaml,
    set_override,
    to_dict,
    to_yaml,
)
from mlx_qlora.errors import ConfigError
from mlx_qlora.names import FIELD_OF, INSTEAD, MEANINGS, translate

# Every field with a value that is legal and not its default.
OTHER: dict[str, dict[str, Any]] = {
    "model": {
        "source": "org/name: with # odd 'characters'",
        "revision": "2026-11-22",
        "adapter": "no",
        "base_model_name_or_path": "null",
        "bits": 8,
        "group_size": 32,
        "mode": "mxfp8",
        "dtype": "bfloat16",
        "frozen_matmul": "resident",
        "residency": "resident",
    },
    "lora": {
        "r": 3,
        "lora_alpha": 4.5,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "1.mlp.up_proj"],
        "layers_to_transform": [0, 5],
        "use_rslora": True,
        "use_dora": True,
        "init_lora_weights": "pissa_niter_4",
        "rank_pattern": {"q_proj": 8, "0.self_attn.k_proj": 2},
        "alpha_pattern": {"q_proj": 1.5},
        "loraplus_lr_ratio": 16.0,
    },
    "data": {
        "path": "~/données.jsonl",
        "validation_path": "v.jsonl",
        "test_path": "1e5",
        "split": [0.5, 0.25, 0.25],
        "columns": {"text": "body"},
        "system": "Be brief: # no more.",
        "format": "text",
        "history": "as_asked",
        "train_on": "all",
        "prompt_loss_weight": 0.1,
        "max_length": 77,
        "template": "mine.jinja",
        "truncation": "drop",
        "packing": False,
        "shuffle": False,
        "strict": True,
        "max_refused": 0.2,
        "refused_path": "refused.jsonl",
        "num_workers": 3,
        "cache_dir": "~/tokens",
    },
    "training": {
        "learning_rate": 1e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.2,
        "warmup_steps": 7,
        "max_steps": 12,
        "num_train_epochs": 1.5,
        "per_device_train_batch_size": 7,
        "gradient_accumulation_steps": 5,
        "max_grad_norm": None,
        "weight_decay": 0.0,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-6,
        "gradient_checkpointing": True,
        "compile": True,
        "max_skipped_steps": 2,
        "seed": 9,
        "objective": "simpo",
        "beta": 0.5,
        "label_smoothing": 0.1,
        "rpo_alpha": 0.2,
        "simpo_gamma": 0.3,
        "desirable_weight": 1.5,
        "undesirable_weight": 0.5,
        "kl_weight": 0.2,
    },
    "checkpointing": {
        "output_dir": "2026",
        "save_steps": 3,
        "eval_steps": 4,
        "save_total_limit": 1,
        "load_best_model_at_end": True,
        "early_stopping_patience": 2,
        "resume_from_checkpoint": "none",
    },
    "logging": {
        "logging_steps": 2,
        "report_to": ["tensorboard", "wandb"],
        "run_name": "007",
        "project": "2026",
    },
    "generation": {
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "max_new_tokens": 5,
    },
}
FIELDS = [(s, f.name) for s, c in SECTIONS.items() for f in dataclasses.fields(c)]


def read_back(config: RunConfig, tmp_path: Path) -> RunConfig:
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return build(read_yaml(path))


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_every_field_survives_yaml_and_can_be_set_from_the_command_line(tmp_path, section, field):
    if field == "bias":  # has one legal value
        assert read_back(RunConfig(), tmp_path).lora.bias == "none"
        return
    fields = {field: OTHER[section][field]}
    if field == "mode":
        fields |= {"bits": 8, "group_size": 32}
    config = build({section: fields})
    assert getattr(getattr(config, section), field) == OTHER[section][field]
    assert config != RunConfig()
    assert read_back(config, tmp_path) == config
    typed: dict[str, Any] = {}
    for name, value in fields.items():
        text = "null" if value is None else "'null'" if value == "null" else value
        set_override(typed, f"{section}.{name}={text}")
    assert build(typed) == config


def test_defaults_are_the_contract_s(tmp_path):
    config = RunConfig()
    seven = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wanted: dict[str, dict[str, Any]] = {
        "model": {"bits": 4, "group_size": 64, "mode": "affine", "dtype": "auto", "source": None},
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.1, "target_modules": seven},
        "data": {"split": "auto", "train_on": "response", "max_length": 2048},
        "training": {
            **{"learning_rate": 2e-4, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1},
            **{"max_steps": None, "num_train_epochs": 3.0, "max_grad_norm": 1.0},
            **{"per_device_train_batch_size": "auto", "gradient_accumulation_steps": "auto"},
            **{"weight_decay": 0.01, "gradient_checkpointing": "auto"},
        },
        "checkpointing": {
            **{"save_steps": "auto", "eval_steps": "auto", "save_total_limit": 3},
            **{"resume_from_checkpoint": "auto", "output_dir": "outputs"},
        },
        "generation": {
            **{"temperature": 0.7, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
            **{"max_new_tokens": 512},
        },
    }
    for section, fields in wanted.items():
        for field, value in fields.items():
            assert getattr(getattr(config, section), field) == value, field
    assert (config.lora.bias, config.lora.use_rslora) == ("none", False)
    assert read_back(config, tmp_path) == config
    assert list(to_dict(config)) == list(SECTIONS)
    assert build({}) == config


@pytest.mark.parametrize("text", ["2e-4", "2.0e-4", "0.0002", "2E-04"])
def test_a_rate_may_be_written_in_any_way(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(f"training:\n  learning_rate: {text}\n")
    assert build(read_yaml(path)).training.learning_rate == 2e-4
    values: dict[str, Any] = {}
    set_override(values, f"training.learning_rate={text}")
    assert build(values).training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"trainng": {}}, ["unknown section 'trainng'", "did you mean 'training'"]),
        ({"x": {}}, ["unknown section 'x'", "supported: model, lora, data"]),
        ({"training": {"learning_rat": 1}}, ["training.learning_rat", "training.learning_rate?"]),
        ({"training": {"lora_alpha": 1}}, ["training.lora_alpha", "did you mean lora.lora_alpha?"]),
        ({"training": {"output_dir": "x"}}, ["did you mean checkpointing.output_dir?"]),
        ({"training": {True: 5}}, ["unknown field training.True"]),  # as YAML reads `on: 5`
        ({"lora": {"zzz": 1}}, ["unknown field lora.zzz", "--help"]),
        ({"lora": 5}, ["section lora must hold fields; got 5"]),
        ({"lora": {"r": "16"}}, ["lora.r must be an int; got '16'"]),
        ({"lora": {"r": True}}, ["lora.r must be an int; got True"]),
        ({"lora": {"r": 2.0}}, ["lora.r must be an int; got 2.0"]),
        ({"lora": {"r": None}}, ["lora.r must be an int; got None"]),
        ({"lora": {"use_rslora": 1}}, ["lora.use_rslora must be true/false; got 1"]),
        ({"lora": {"use_rslora": "yes"}}, ["lora.use_rslora must be true/false; got 'yes'"]),
        ({"lora": {"rank_pattern": 8}}, ["lora.rank_pattern must be a map of text to int; got 8"]),
        ({"lora": {"rank_pattern": {"q_proj": 0}}}, ["lora.rank_pattern.q_proj must be at least"]),
        ({"lora": {"alpha_pattern": {"q_proj": 0}}}, ["lora.alpha_pattern.q_proj must be above 0"]),
        ({"lora": {"alpha_pattern": {"(": 1}}}, ["'(' is no regex"]),
        ({"lora": {"init_lora_weights": "pisa"}}, ["lora.init_lora_weights must be true, gau"]),
        ({"lora": {"init_lora_weights": False}}, ["lora.init_lora_weights must be true, gauss"]),
        ({"lora": {"target_modules": [1]}}, ["list of text or text; got [1]"]),
        ({"model": {"source": 5}}, ["model.source must be text or null; got 5"]),
        ({"model": {"bits": "four"}}, ["model.bits must be an int or null; got 'four'"]),
        ({"model": {"bits": 7}}, ["bits must be one of"]),
        ({"model": {"mode": "nf4"}}, ["model.mode must be one of 'affine'"]),
        ({"data": {"split": 0.8}}, ["data.split must be a list of number or text; got 0.8"]),
        ({"training": {"learning_rate": "fast"}}, ["must be a number or auto"]),
        ({"training": {"warmup_steps": -1}}, ["training.warmup_steps must be at least 0"]),
        ({"training": {"per_device_train_batch_size": 0}}, ["_batch_size must be at least 1"]),
        ({"training": {"per_device_train_batch_size": "most"}}, ["must be a number or auto"]),
        ({"training": {"num_train_epochs": -1.0}}, ["training.num_train_epochs must be above 0"]),
        (
            {"training": {"num_train_epochs": 1e300}},
            ["num_train_epochs must be at most 1,000,000"],
        ),
        ({"training": {"learning_rate": True}}, ["training.learning_rate must be a number"]),
        ({"training": {"learning_rate": 10**400}}, ["training.learning_rate must be a number"]),
        ({"training": {"learning_rate": 0}}, ["training.learning_rate must be above 0"]),
        ({"training": {"lr_scheduler_type": "cos"}}, ["type must be one of 'cosine', 'linear'"]),
        ({"training": {"gradient_checkpointing": "some"}}, ["ing must be", "true, false or auto"]),
        ({"training": {"max_steps": 0}}, ["training.max_steps must be at least 1; got 0"]),
        ({"training": {"adam_beta1": 1.0}}, ["training.adam_beta1 must be in [0, 1)"]),
        (
            {"training": {"max_steps": 5, "num_train_epochs": 1}},
            ["training.max_steps and training.num_train_epochs exclude each other", "5 and 1"],
        ),
        ({"checkpointing": {"save_steps": 0}}, ["checkpointing.save_steps must be at least 1"]),
        ({"checkpointing": {"output_dir": ""}}, ["checkpointing.output_dir must name a folder"]),
        ({"logging": {"logging_steps": 0}}, ["logging.logging_steps must be at least 1"]),
        ({"generation": {"top_p": 2}}, ["generation.top_p must be in (0, 1]"]),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(values, words):
    with pytest.raises(ConfigError) as caught:
        build(values)
    for word in words:
        assert word in str(caught.value)


def test_either_steps_or_epochs_decide_the_length():
    assert build({"training": {"num_train_epochs": 2}}).training.max_steps is None
    assert build({"training": {"max_steps": 5}}).training.num_train_epochs is None
    assert dataclasses.replace(RunConfig().training, seed=1).num_train_epochs == 3


def test_a_later_override_wins_over_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lora: {r: 4, lora_alpha: 8}\ntraining:\n")
    values = read_yaml(path)
    for assignment in ("lora.r=5", " lora . r = 6 ", "training.seed=3", "data.path=a=b.jsonl"):
        set_override(values, assignment)
    config = build(values)
    assert (config.lora.r, config.lora.lora_alpha, config.training.seed) == (6, 8, 3)
    assert config.data.path == "a=b.jsonl"


@pytest.mark.parametrize(
    ("in_file", "flag", "wins"),
    [
        ("num_train_epochs: 2", "--max-steps=7", (7, None)),
        ("max_steps: 7", "--epochs=2", (None, 2)),
        ("max_steps: null\n  num_train_epochs: 3.0", "--steps=7", (7, None)),
    ],
)
def test_a_run_length_that_is_typed_takes_the_place_of_the_file_s(in_file, flag, wins, tmp_path):
    """The two fields exclude each other; a run's own run.yaml names both, one of them null."""
    (tmp_path / "c.yaml").write_text(f"training:\n  {in_file}\n")
    training = config_of(parse(["train", "--config", f"{tmp_path}/c.yaml", flag])).training
    assert (training.max_steps, training.num_train_epochs) == wins
    with pytest.raises(ConfigError, match="exclude each other"):
        config_of(parse(["train", "--epochs=2", "--max-steps=7"]))


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("model.source=2026-11-22", "2026-11-22"),
        ("model.source=2026-13-45", "2026-13-45"),
        ("model.source=007", "007"),
        ("model.source=true", "true"),
        ("model.source=a: b", "a: b"),
        ("model.source=[x", "[x"),
        ("model.source=~", None),
        ("model.source=null", None),
        ("model.source=", ""),
        ("lora.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora.target_modules=all-linear", "all-linear"),
        ("lora.layers_to_transform=[0,1]", [0, 1]),
        ("training.gradient_checkpointing=false", False),
        ("training.gradient_checkpointing=3", 3),
        ("training.gradient_checkpointing=auto", "auto"),
        ("model.bits=null", None),
    ],
)
def test_an_override_is_read_as_its_field_s_type(assignment, value):
    values: dict[str, Any] = {}
    set_override(values, assignment)
    section, field = assignment.split("=")[0].split(".")
    assert getattr(getattr(build(values), section), field) == value


@pytest.mark.parametrize("text", ["lora.r", "r=5", "=5", "lora.=5", ".r=5", "lora"])
def test_an_override_of_another_form_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected section\.field=value"):
        set_override({}, text)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"- a\n- b\n", "must hold sections such as"),
        (b"text", "must hold sections such as"),
        (b"lora: [1, 2]\n", "section lora must hold fields"),
        (b"lora: {r: 4\n", "is not YAML"),
        (b"data: {path: 2026-13-45}\n", "is not YAML"),
        (b"lora: !!python/object/apply:os.system [ls]\n", "is not YAML"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_a_file_that_holds_no_config_is_named(tmp_path, content, words):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    assert words in str(caught.value) and "run.yaml" in str(caught.value)


def test_a_missing_file_is_named_and_an_empty_one_is_the_defaults(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        read_yaml(tmp_path / "missing.yaml")
    (tmp_path / "empty.yaml").touch()
    assert build(read_yaml(tmp_path / "empty.yaml")) == RunConfig()


@pytest.mark.parametrize("path", ["rows #1.jsonl", "&a out", "a: b", "*x", "[draft] rows.jsonl"])
def test_a_path_is_kept_as_it_is_typed(path):
    values: dict[str, dict[str, Any]] = {}
    set_override(values, f"data.path={path}")
    assert build(values).data.path == path
    set_override(values, 'data.path="quoted"')
    assert build(values).data.path == "quoted"


# ---- names of other trainers -------------------------------------------------------------------


def written(tmp_path: Path, text: str) -> tuple[RunConfig, list[str]]:
    """The config of a file, and the notes on its names."""
    (tmp_path / "run.yaml").write_text(text)
    notes: list[str] = []
    return build(read_yaml(tmp_path / "run.yaml", notes)), notes


def test_the_other_names_name_real_fields_and_are_none():
    own = {name for _, name in FIELDS}
    assert len(own) == len(FIELDS)  # so that a name alone says which field it is
    for word, place in FIELD_OF.items():
        section, _, field = place.partition(".")
        assert section in SECTIONS, word
        assert not field or (section, field) in FIELDS, word
        assert word not in own, word
    for word, (place, meanings) in MEANINGS.items():
        for value, ours in meanings.items():
            if ours is not ...:
                section, _, field = place.partition(".")
                build({section: {field: ours}})
            translate(word, value)
    assert INSTEAD.keys().isdisjoint(own | FIELD_OF.keys())


def test_a_file_of_the_usual_names_is_read_with_a_note_of_what_each_is_here(tmp_path):
    config, notes = written(
        tmp_path,
        "training:\n  optimizer: adamw_torch_fused\n  lr_scheduler: cosine\n  gradient_clip: 0.5\n"
        "  learning_rate: 2e-4\n  max_steps: 1000\n  warmup_steps: 100\n"
        "  per_device_train_batch_size: 6\n  gradient_accumulation_steps: 3\n"
        "lora: {r: 16, lora_alpha: 32, lora_dropout: 0.1, bias: none}\n"
        "generation: {max_new_tokens: 512, temperature: 0.7, top_p: 0.9, top_k: 50}\n",
    )
    assert notes == [
        "optimizer=adamw_torch_fused has no effect; the optimiser is always AdamW, in float32",
        "lr_scheduler is training.lr_scheduler_type",
        "gradient_clip is training.max_grad_norm",
    ]
    training = config.training
    assert (training.lr_scheduler_type, training.max_grad_norm) == ("cosine", 0.5)
    assert (training.max_steps, training.warmup_steps) == (1000, 100)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (  # mlx-lm
            "model: org/base\ndata: rows\nbatch_size: 4\niters: 600\nlearning_rate: 1e-5\n"
            "steps_per_report: 5\nsteps_per_eval: 50\nsave_every: 100\nmax_seq_length: 1024\n"
            "grad_checkpoint: true\ngrad_accumulation_steps: 2\nmask_prompt: true\nseed: 3\n"
            "train: true\nfine_tune_type: dora\noptimizer: adamw\nproject_name: mine\n"
            "lora_parameters: {rank: 4, dropout: 0.0, keys: [q_proj]}\n",
            {
                "model": {"source": "org/base"},
                "data": {"path": "rows", "max_length": 1024, "train_on": "response"},
                "lora": {"r": 4, "lora_dropout": 0.0, "target_modules": ["q_proj"]}
                | {"use_dora": True},
                "training": {"per_device_train_batch_size": 4, "max_steps": 600, "seed": 3}
                | {"learning_rate": 1e-5, "gradient_checkpointing": True}
                | {"gradient_accumulation_steps": 2},
                "checkpointing": {"eval_steps": 50, "save_steps": 100},
                "logging": {"logging_steps": 5, "project": "mine"},
            },
        ),
        (  # Axolotl
            "base_model: org/base\nload_in_8bit: false\nload_in_4bit: true\nsequence_len: 512\n"
            "sample_packing: true\nlora_r: 8\nlora_alpha: 16\nlora_target_linear: true\n"
            "micro_batch_size: 2\nnum_epochs: 1\noptimizer: adamw_bnb_8bit\nlr_scheduler: cosine\n"
            "bf16: auto\ntrain_on_inputs: false\nwarmup_ratio: 0.2\noutput_dir: there\n",
            {
                "model": {"source": "org/base", "bits": 4, "dtype": "auto"},
                "data": {"max_length": 512, "packing": True, "train_on": "response"},
                "lora": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
                "training": {"per_device_train_batch_size": 2, "num_train_epochs": 1}
                | {"lr_scheduler_type": "cosine", "warmup_ratio": 0.2},
                "checkpointing": {"output_dir": "there"},
            },
        ),
        (  # Axolotl in 8 bits, with names that have no value
            "load_in_8bit: true\nload_in_4bit: false\noptimizer:\nfp16:\nbf16: auto\n"
            "lora_target: q_proj, v_proj\n",
            {
                "model": {"bits": 8, "dtype": "auto"},
                "lora": {"target_modules": ["q_proj", "v_proj"]},
            },
        ),
        (  # LLaMA-Factory, TRL, Unsloth
            "stage: sft\ndo_train: true\nfinetuning_type: lora\n"
            "model_name_or_path: org/base\ncutoff_len: 64\nlora_rank: 8\nlora_target: all\n"
            "default_system: Be brief.\npreprocessing_num_workers: 3\nmax_steps: 9\n"
            "random_state: 5\nrun_name: one\ncompletion_only_loss: true\nfp16: false\n",
            {
                "model": {"source": "org/base"},
                "data": {"max_length": 64, "system": "Be brief.", "num_workers": 3}
                | {"train_on": "response"},
                "lora": {"r": 8, "target_modules": "all-linear"},
                "training": {"max_steps": 9, "seed": 5},
                "logging": {"run_name": "one"},
            },
        ),
    ],
)
def test_files_of_other_trainers_are_understood(text, wanted, tmp_path):
    assert written(tmp_path, text)[0] == build(wanted)


def test_our_own_names_are_read_without_a_note(tmp_path):
    data = {**OTHER["data"], "prompt_loss_weight": 0.0}  # which train_on=all excludes
    own = build(dict(OTHER, training={"max_steps": 4}, data=data))
    assert written(tmp_path, to_yaml(own))[1] == []


def test_all_unknown_names_are_told_at_once_each_with_its_nearest(tmp_path):
    with pytest.raises(ConfigError) as caught:
        written(tmp_path, "lora: {rnk: 3, scale: 20}\nsav_steps: 3\ntrainng: {a: 1}\nzzz: 5\n")
    assert str(caught.value).splitlines() == [
        "5 names are unknown:",
        "  unknown field lora.rnk; did you mean lora.r?",
        "  unknown field lora.scale; did you mean lora.lora_alpha (scale x lora.r)?",
        "  unknown field sav_steps; did you mean checkpointing.save_steps?",
        "  unknown field zzz; see --help-all",
        "  unknown section 'trainng'; did you mean 'training'?; supported: model, lora, data, "
        "training, checkpointing, logging, generation",
    ]


def test_a_nearest_name_is_looked_for_only_where_it_is_shown(tmp_path, monkeypatch):
    looked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(difflib, "get_close_matches", lambda *a, **_: looked.append(a) or [])
    with pytest.raises(
        ConfigError, match=r"(?s)20000 names are unknown:\n  .*and 19980 more"
    ) as caught:
        written(tmp_path, "lora:\n" + "".join(f"  k{i}: 1\n" for i in range(20_000)))
    assert len(str(caught.value)) < 2000 and sum(bool(words[1]) for words in looked) == 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {lr: 1e-4, learning_rate: 2e-4}", "training.learning_rate is given twice"),
        ("mask_prompt: true\ndata: {train_on: all}", "data.train_on is given twice"),
        (
            "optimizer: lion",
            "optimizer may be adamw or .* got 'lion'; the optimiser is always AdamW",
        ),
        ("training: {lora_r: 8}", "unknown field training.lora_r; did you mean lora.r?"),
    ],
)
def test_a_name_that_cannot_be_followed_is_refused(text, words, tmp_path):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        written(tmp_path, text)


FOREIGN: dict[str, tuple[str, str]] = {
    "Axolotl": (
        "base_model: x/y\nadapter: qlora\nsequence_len: 2048\n",
        "base_model is model.source",
    ),
    "Axolotl's LoRA": (
        "adapter: lora\nlora_model_dir:\nbase_model: x/y\nmicro_batch_size: 2\n",
        "adapter: lora is a kind",
    ),
    "LLaMA-Factory": (
        "stage: sft\nfinetuning_type: lora\ndataset: identity\ntemplate: llama3\ncutoff_len: 9\n",
        "cutoff_len is data.max_length",
    ),
    "mlx-lm": (
        "model: m\nfine_tune_type: lora\nnum_layers: 16\niters: 9\nlora_parameters: {rank: 8}\n",
        "iters is training.max_steps",
    ),
    "TRL": (
        "use_peft: true\ndataset_name: d\nlora_target_modules: all-linear\n",
        "unknown field use_",
    ),
    "torchtune": ("tokenizer: {path: t}\ncheckpointer: {}\nloss: {}\n", "unknown section"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_wrong_in_another_trainer_s_config_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    text, words = FOREIGN[name]
    (tmp_path / "theirs.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "theirs.yaml"), "--print-config"]) == 2
    message = capsys.readouterr().err
    assert f"this looks like a config of {name.partition(chr(39))[0]}" in message
    assert words in message and "Coming from another trainer" in message


@pytest.mark.parametrize("text", ["training: {bogus: 1}\n", "loss: 1\n", "bogus: 1\n"])
def test_a_mistake_in_a_config_of_ours_is_nobody_else_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    (tmp_path / "ours.yaml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "ours.yaml"), "--print-config"]) == 2
    assert "looks like" not in capsys.readouterr().err


def test_a_wrong_word_of_the_command_is_not_blamed_on_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text(FOREIGN["mlx-lm"][0])
    for file in (theirs, tmp_path / "missing.yaml"):
        assert main(["train", "--config", str(file), "rows.jsonl"]) == 2
        assert capsys.readouterr().err == (
            "mlx-qlora: expected section.field=value; got 'rows.jsonl'; for a file of rows pass "
            "--data rows.jsonl\n"
        )
