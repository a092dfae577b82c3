"""What other trainers call a field, what their values mean here, and presets.

The words of TRL, transformers, Axolotl, LLaMA-Factory, Unsloth and mlx-lm that have an equal here.
docs/migration.md shows these tables, and a test holds that it does.
"""

from collections.abc import Iterable
from typing import Any

from mlx_qlora.errors import ConfigError

# Field -> other names of it, whose values mean the same.
ALIASES = {
    "model.source": "model base_model model_name model_name_or_path pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "model.adapter": "adapter_name_or_path lora_model_dir",
    "model.bits": "quantization_bit",
    "model.dtype": "torch_dtype",
    "lora.r": "rank lora_r lora_rank",
    "lora.lora_alpha": "alpha",
    "lora.lora_dropout": "dropout",
    "lora.target_modules": "keys lora_target_modules",
    "lora.use_rslora": "peft_use_rslora",
    "lora.use_dora": "peft_use_dora",
    "data.path": "data dataset_name",
    "data.max_length": "max_seq_length max_seq_len seq_len sequence_len cutoff_len",
    "data.packing": "sample_packing",
    "data.system": "default_system",
    "data.num_workers": "dataset_num_proc dataset_processes preprocessing_num_workers",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "lr_scheduler scheduler",
    "training.warmup_steps": "warmup",
    "training.num_train_epochs": "epochs num_epochs",
    "training.max_steps": "steps iters",
    "training.per_device_train_batch_size": "batch batch_size micro_batch_size",
    "training.gradient_accumulation_steps": "grad_accum grad_accumulation_steps",
    "training.max_grad_norm": "gradient_clip gradient_clip_val grad_clip clip_grad_norm",
    "training.gradient_checkpointing": "grad_checkpoint",
    "training.seed": "random_state",
    "training.beta": "pref_beta rl_beta dpo_beta orpo_beta kto_beta",
    "training.rpo_alpha": "pref_ftx",
    "training.desirable_weight": "kto_chosen_weight kto_desirable_weight",
    "training.undesirable_weight": "kto_rejected_weight kto_undesirable_weight",
    "checkpointing.output_dir": "out",
    "checkpointing.save_steps": "save_every",
    "checkpointing.eval_steps": "steps_per_eval",
    "checkpointing.resume_from_checkpoint": "resume",
    "logging.logging_steps": "steps_per_report",
    "logging.run_name": "wandb_name wandb_run_name",
    "logging.project": "project_name wandb_project",
    "generation.temperature": "temp",
    "generation.max_new_tokens": "max_tokens",
}
RESPONSE, ALL = {"true": "response", "false": "all"}, {"true": "all", "false": "response"}
ADAMW = "adamw adamw_hf adamw_torch adamw_torch_fused adamw_8bit adamw_bnb_8bit"
ADAMW += " paged_adamw_8bit paged_adamw_32bit"
COMPARE = {name: name for name in ("dpo", "orpo", "simpo", "kto")}
# Name -> the field that it decides, or only its section, and what its values mean; ... is what
# happens here anyway, or what leaves the field alone.
MEANINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "load_in_4bit": ("model.bits", {"true": 4, "false": None}),
    "load_in_8bit": ("model.bits", {"true": 8, "false": ...}),
    "bf16": ("model.dtype", {"true": "bfloat16", "auto": "auto", "false": ...}),
    "fp16": ("model.dtype", {"true": "float16", "false": ...}),
    "fine_tune_type": ("lora.use_dora", {"lora": ..., "dora": True}),
    "lora_target": ("lora.target_modules", {"all": "all-linear"}),
    "lora_target_linear": ("lora.target_modules", {"true": "all-linear", "false": ...}),
    **dict.fromkeys(("mask_prompt", "completion_only_loss"), ("data.train_on", RESPONSE)),
    **dict.fromkeys(("train_on_inputs", "train_on_prompt"), ("data.train_on", ALL)),
    **dict.fromkeys(("optimizer", "optim"), ("training", dict.fromkeys(ADAMW.split(), ...))),
    **dict.fromkeys(("train", "do_train"), ("training", {"true": ...})),
    **dict.fromkeys(("stage", "rl", "train_mode"), ("training.objective", {"sft": ...} | COMPARE)),
    "finetuning_type": ("lora", {"lora": ...}),
}
# What else the note says that is printed where such a name is used.
REMARKS: dict[str, str] = {
    **dict.fromkeys(("optimizer", "optim"), "; the optimiser is always AdamW, in float32"),
    **dict.fromkeys(("iters", "save_every", "steps_per_eval"), ", which counts updates"),
}
# Names without an equal -> what is nearest to them.
INSTEAD = {
    "scale": "lora.lora_alpha (scale x lora.r)",
    "num_layers": "lora.layers_to_transform",
    "adapter_path": "checkpointing.output_dir (to write; model.adapter to read)",
    "resume_adapter_file": "model.adapter (its folder)",
    **dict.fromkeys(("val_size", "val_set_size"), "data.split (such as [0.9, 0.1, 0])"),
    **dict.fromkeys(("dataset", "datasets"), "data.path"),
    **dict.fromkeys(("prompt_feature", "dataset_text_field"), "data.columns"),
}
# Arguments of other trainers' functions -> those of ours.
ARGUMENTS = {"eval_dataset": "validation", "train_dataset": "train_examples", "args": "config"}
ARGUMENTS |= {"processing_class": "tokenizer", "peft_config": "config"}
# Words of a trainer's config file; two of them show whose it is.
PROGRAMS = {
    "Axolotl": "base_model adapter datasets sequence_len micro_batch_size val_set_size",
    "LLaMA-Factory": "stage finetuning_type cutoff_len template dataset lora_target do_train",
    "mlx-lm": "lora_parameters fine_tune_type iters num_layers adapter_path steps_per_eval",
    "TRL": "use_peft dataset_name lora_target_modules dataset_text_field completion_only_loss",
    "torchtune": "tokenizer checkpointer loss compile enable_activation_checkpointing",
}
ADAPTER_KINDS = ("lora", "qlora", "dora")  # what Axolotl's `adapter` may be
FIELD_OF = {word: field for field, words in ALIASES.items() for word in words.split()}
FIELD_OF |= {word: field for word, (field, _) in MEANINGS.items()}


def whose(words: Iterable[str]) -> str:
    """What to say of a config file with these names if it is another trainer's, or nothing."""
    words = list(words)
    shared = {name: len({*own.split()} & {*words}) for name, own in PROGRAMS.items()}
    name = max(shared, key=lambda each: shared[each])
    if shared[name] < 2:
        return ""
    known = [f"{word} is {FIELD_OF[word]}" for word in words if word in FIELD_OF][:6]
    return (
        f"\nthis looks like a config of {name}{': ' * bool(known)}{', '.join(known)}; leave out or "
        'rename what has no equal here (in the docs, see "Coming from another trainer")'
    )


def translate(word: str, value: Any) -> tuple[Any, str]:
    """The value of `FIELD_OF[word]`, ... if it stays as it is, and a note that says so.

    A ConfigError for a value without an equal lists those that have one.
    """
    field, remark = FIELD_OF[word], REMARKS.get(word, "")
    if word not in MEANINGS:
        return value, f"{word} is {field}{remark}"
    meanings, shown = MEANINGS[word][1], str(value)
    shown = shown.lower() if isinstance(value, bool) else shown
    if value is None:  # "fp16:" with nothing behind it
        return ..., f"{word} has no effect"
    if word == "lora_target" and shown not in meanings:
        names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
        return names, f"{word} is {field}"
    if shown not in meanings:
        raise ConfigError(f"{word} may be {' or '.join(meanings)} here; got {value!r}{remark}")
    value = meanings[shown]
    meaning = "has no effect" if value is ... else f"is {field}={value}"
    return value, f"{word}={shown} {meaning}{remark}"


# ---- presets -------------------------------------------------------------------------------------

SMALL, BEST = "lora.r=8 lora.lora_alpha=16", "checkpointing.load_best_model_at_end=true"
# Name -> what it is for, and its fields.
PRESETS = {
    "quick": (
        "a first look: one pass over short rows, a small adapter, short answers",
        f"training.num_train_epochs=1 data.max_length=512 generation.max_new_tokens=128 {SMALL}",
    ),
    "style": (
        "a tone or a format, from some hundred rows: a small adapter, the best weights kept",
        f"{SMALL} {BEST}",
    ),
    "knowledge": (
        "facts and terms, from thousands of rows: four times the rank, five passes",
        f"training.num_train_epochs=5 lora.r=64 lora.lora_alpha=128 lora.lora_dropout=0.05 {BEST}",
    ),
    "long-context": (
        "rows of up to 8,192 tokens, one at a time",
        "data.max_length=8192 training.per_device_train_batch_size=1",
    ),
    "tiny-mac": (
        "8 GB of memory: short rows, one at a time, all activations recomputed",
        "data.max_length=512 training.per_device_train_batch_size=1 "
        f"training.gradient_checkpointing=true checkpointing.save_total_limit=1 {SMALL}",
    ),
}
# Who sets one of these decides the other, too.
TOGETHER = {"training.max_steps", "training.num_train_epochs"}, {"lora.r", "lora.lora_alpha"}


def preset(name: str, given: set[str]) -> tuple[list[str], str]:
    """The `section.field=value` of a preset that are not given, and a line that says so."""
    about, fields = PRESETS[name]
    given = given.union(*(pair for pair in TOGETHER if given & pair))
    used = [field for field in fields.split() if field.partition("=")[0] not in given]
    if "model.adapter" in given:  # its shape is what it is
        used = [field for field in used if not field.startswith("lora.")]
    return used, f"preset {name}, {about}: {', '.join(used)}"
