"""A run, written down: the sections, YAML, and `section.field=value`.

Every section is a dataclass that lives beside the code that reads it; this file puts them together,
and what is wrong is an error before anything else happens.
"""

import contextlib
import dataclasses
import os
import re
import textwrap
import typing
from collections.abc import Iterable
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mlx_qlora.data.chats import ALPACA
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.formats import repeated
from mlx_qlora.data.read import DataConfig
from mlx_qlora.device import frozen_matmul
from mlx_qlora.distributed import processes
from mlx_qlora.errors import ConfigError, did_you_mean, listing
from mlx_qlora.fields import coerce, config_section, option
from mlx_qlora.folders import user_path
from mlx_qlora.infer.tokens import GenerationConfig
from mlx_qlora.model.llama import LlamaConfig
from mlx_qlora.model.lora import LoraConfig
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.names import ADAPTER_KINDS, FIELD_OF, INSTEAD, MEANINGS, translate
from mlx_qlora.readers import MOST_YAML, parse_yaml, read_text
from mlx_qlora.train.checkpoint import AUTO_EVERY, CheckpointingConfig
from mlx_qlora.train.config import TrainingConfig, batches_of
from mlx_qlora.train.metrics import LoggingConfig

if TYPE_CHECKING:
    from mlx_qlora.run import Inputs

Values = dict[str, dict[str, Any]]  # section -> field -> value
Notes = list[str] | None  # lines, to which more are appended


@config_section("model")
class ModelConfig:
    """Which model, and in what precision."""

    source: str | None = option(
        None, "hub id (org/name), folder, .gguf file, or the built-in smollm2-135m"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub repository")
    adapter: str | None = option(
        None,
        "folder of an adapter to load. Training continues from it, and `lora` is what its config "
        "says",
    )
    base_model_name_or_path: str | None = option(
        None, "the original Hugging Face repository, if the model's files do not name it"
    )
    bits: int | None = option(
        4,
        "bits of a weight, 2 to 8. 8 is closer to the original and takes twice the memory. null "
        "keeps the precision of the files; quantised files always do",
    )
    group_size: int = option(
        64, "weights that share a scale: 32, 64 or 128. Fewer are more exact and take more memory"
    )
    mode: str = option(
        "affine",
        "format of quantised weights: integers with a scale and a bias, or a float format",
        choices=("affine", "mxfp4", "mxfp8", "nvfp4"),
    )
    dtype: str = option(
        "auto",
        "dtype of the computation. auto is bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    frozen_matmul: str = option(
        "auto",
        "how quantised weights are multiplied: as they are, unpacked each time, or from a dense "
        "copy. auto is the fastest that memory allows, by doctor --tune if that was run",
        choices=("auto", "quantized", "dequantize", "resident"),
    )
    residency: str = option(
        "auto",
        "where the weights are: in memory, or streamed from the disk, layer by layer. auto streams "
        "what would not fit otherwise",
        choices=("auto", "resident", "streamed"),
    )

    def __post_init__(self) -> None:
        self.quantize()
        if self.frozen_matmul != "auto":  # which would ask what machine this is
            frozen_matmul(self.frozen_matmul, streamed=self.residency == "streamed")

    def quantize(self) -> QuantConfig | None:
        """How dense weights are packed while loading."""
        return None if self.bits is None else QuantConfig(self.bits, self.group_size, self.mode)


@config_section("")
class RunConfig:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpointing: CheckpointingConfig = field(default_factory=CheckpointingConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)


SECTIONS: dict[str, type] = {
    section.name: typing.get_type_hints(RunConfig)[section.name]
    for section in dataclasses.fields(RunConfig)
}


def build(values: Values) -> RunConfig:
    """A RunConfig from section -> field -> value; one ConfigError names all unknown names."""
    hints = {name: typing.get_type_hints(section) for name, section in SECTIONS.items()}
    unknown: list[str] = []
    for name, fields in values.items():
        if name and name not in SECTIONS:
            known = f"supported: {', '.join(SECTIONS)}"
            unknown.append(f"unknown section {name!r}{did_you_mean(name, SECTIONS)}; {known}")
            continue
        if not isinstance(fields, dict):
            raise ConfigError(f"section {name} must hold fields; got {fields!r}")
        own = {key: f"{name}.{key}" for key in hints.get(name, {})}
        for key in (key for key in map(str, fields) if key not in own):
            # People forget in which section a field is. To look for each name takes milliseconds.
            words = field_words() | INSTEAD | own if len(unknown) < 20 else {}
            hint = did_you_mean(key, (), words) or "; see --help-all"
            unknown.append(f"unknown field {f'{name}.' * bool(name)}{key}{hint}")
    if unknown:
        several = f"{len(unknown)} names are unknown:\n{listing(unknown)}"
        raise ConfigError(several if len(unknown) > 1 else unknown[0])
    return RunConfig(**{name: SECTIONS[name](**fields) for name, fields in values.items()})


def field_words(sections: Iterable[str] = SECTIONS) -> dict[str, str]:
    """Every word for a field, its own name and those of others -> `section.field`."""
    fields = {f.name: f"{s}.{f.name}" for s in sections for f in dataclasses.fields(SECTIONS[s])}
    usual = {w: place for w, place in FIELD_OF.items() if place.partition(".")[0] in sections}
    return usual | fields


def read_yaml(path: str | Path, notes: Notes = None, words: Notes = None) -> Values:
    """Section -> field -> value from a YAML file, whose own names are appended to `words`."""
    file = user_path(path)
    try:
        content = parse_yaml(read_text(file, MOST_YAML), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except ValueError as error:
        raise ConfigError(f"config file {path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"config file {path} must hold sections such as `training:`")
    if words is not None:
        words.extend(map(str, content))
    values: Values = {}
    if (kind := content.get("adapter")) in ADAPTER_KINDS and not Path(kind).is_dir():
        raise ConfigError(
            f"adapter: {kind} is a kind of training, which lora.use_dora and model.bits decide "
            "here, and adapter is a folder to continue from; leave it out"
        )
    for name, fields in content.items():
        section = "lora" if name == "lora_parameters" else str(name)  # mlx-lm's
        is_place = section in FIELD_OF or "." in place_of("", section)
        is_section = section in SECTIONS or not is_place
        if is_section and isinstance(fields, (dict, type(None))):
            values.setdefault(section, {})
            for word, value in (fields or {}).items():
                put(values, section, str(word), value, notes)
        elif section in SECTIONS and section not in FIELD_OF:
            raise ConfigError(f"config file {path}: section {section} must hold fields")
        else:
            put(values, "", section, fields, notes)
    return values


class _Loader(yaml.SafeLoader):
    """YAML in which a name may not stand twice, and in which 010 and 1:30 are no numbers.

    The second value would silently win; YAML 1.1 reads 8 and 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := [name for name in repeated(map(str, names)) if name != "<<"]:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(f"{twice[0]!r} is given twice in the section of line {line}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [each for each in resolvers if each[0].rpartition(":")[2] not in ("int", "float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
NUMBERS = {
    "int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$",
    "float": r"([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan)$",
}
for _kind, _form in NUMBERS.items():
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(_form), [*"-+.0123456789"]
    )


def put(
    values: Values, section: str, word: str, value: Any, notes: Notes = None, over: bool = False
) -> None:
    """Put a value where its name, which may be another trainer's, belongs; not twice but `over`."""
    place = place_of(section, word)
    if place == FIELD_OF.get(word) and place != f"{section}.{word}":
        value, note = translate(word, value)
        if notes is not None:
            notes.append(note)
        if value is ...:
            return
    section, _, name = place.partition(".") if "." in place else ("", "", place)
    fields = values.setdefault(section, {})
    if name in fields and not over and word in MEANINGS and None in (value, fields[name]):
        value = fields[name] if value is None else value  # load_in_4bit: false says no number
    elif name in fields and not over:
        raise ConfigError(f"{place} is given twice, the second time as {word}")
    fields[name] = value


def place_of(section: str, word: str) -> str:
    """The `section.field` of a word in a section or, without one, in any; an unknown one itself."""
    own = {f.name for f in dataclasses.fields(SECTIONS[section])} if section in SECTIONS else ()
    known = FIELD_OF.get(word)
    if known and word not in own and section in ("", known.partition(".")[0]):
        return known
    return f"{section}.{word}" if section else field_words().get(word, word)


def set_override(values: Values, assignment: str, notes: Notes = None) -> None:
    """Put one `section.field=value` into section -> field -> value, over what is there.

    The value is read as YAML, but plain text stays as it is typed: a folder may be called
    2026-11-22, and YAML would cut "rows #1.jsonl" short.
    """
    place, equals, text = assignment.partition("=")
    section, dot, key = (part.strip() for part in place.partition("."))
    if not (equals and dot and section and key):
        hint = ""
        if equals and not dot:
            meant = {word: f"{field}={text}" for word, field in field_words().items()}
            hint = did_you_mean(place.strip(), (), meant)
        raise ConfigError(f"expected section.field=value; got {assignment!r}{hint}")
    try:
        value = parse_yaml(text, _Loader) if text else ""
    except ValueError:
        value = text
    known, _, name = place_of(section, key).partition(".")
    hint = typing.get_type_hints(SECTIONS[known]).get(name) if known in SECTIONS else None
    is_text = isinstance(value, str) and not text.startswith(("'", '"'))
    if key not in MEANINGS and hint and _fits(text, hint) and (is_text or not _fits(value, hint)):
        value = text
    put(values, section, key, value, notes, over=True)


def _fits(value: Any, annotation: Any) -> bool:
    try:
        coerce(value, annotation, "")
    except ConfigError:
        return False
    return True


def to_dict(config: RunConfig) -> Values:
    """Section -> field -> value of every field, resolved."""
    return dataclasses.asdict(config)


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML that `--config` reads back to an equal one."""
    # Not folded: a long path with a space in it stays on its line.
    values = to_dict(config)
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=float("inf"))


FILES = ("path", "validation_path", "test_path", "template")
PATHS = {"model": ("source", "adapter"), "data": FILES}  # fields that name files, or say another


def with_whole_paths(config: RunConfig) -> RunConfig:
    """With whole paths, so that the record opens the same files in any folder."""
    for section, names in PATHS.items():
        values = getattr(config, section)
        paths = {name: os.path.expanduser(getattr(values, name) or "") for name in names}
        whole = {name: os.path.abspath(p) for name, p in paths.items() if os.path.exists(p)}
        config = replace(config, **{section: replace(values, **whole)})
    return config


# ---- what is left to the data and the model ------------------------------------------------------

FEW_HELD_OUT = 4  # rows: the loss of fewer says nothing of others


def settle(
    config: RunConfig,
    llama: LlamaConfig,
    examples: Examples | None = None,
    n_processes: int | None = None,
) -> RunConfig:
    """Put numbers where the config leaves them to the model and, if they are known, the rows."""
    n, n_processes = len(examples) if examples else None, n_processes or processes().size
    training = config.training.at_hidden_size(llama.hidden_size, llama.model_type)
    training = training.for_examples(n, n_processes)
    if training.objective != "sft":
        training = replace(training, beta=training.reward_scale)
    if not examples:
        return replace(config, training=training)
    steps = training.total_steps(batches_of(examples, config.data, training, n_processes))
    # Whoever asks the adapter something begins as all rows did, if the record can hold it.
    shared = examples.report.shared_system
    with contextlib.suppress(ValueError):
        build({"data": {"system": shared}})
        parse_yaml(yaml.safe_dump([shared, shared]))  # twice, as there is more in a record
        config = replace(config, data=replace(config.data, system=config.data.system or shared))
    return replace(
        config,
        training=replace(training, warmup_steps=training.warmup_of(steps)),
        checkpointing=config.checkpointing.for_steps(steps),
        logging=config.logging.for_steps(steps),
    )


# Fields of one objective or two -> these.
READ_BY = {
    "beta": ("dpo", "orpo", "simpo", "kto"),
    **dict.fromkeys(("label_smoothing", "rpo_alpha"), ("dpo", "simpo")),
    "simpo_gamma": ("simpo",),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",)),
}
SFT_RATE = TrainingConfig().learning_rate


def check_needs(config: RunConfig, validation: Examples | None) -> None:
    """Raise a ConfigError for a field that needs validation rows, if there are none."""
    for name in ("early_stopping_patience", "load_best_model_at_end"):
        if getattr(config.checkpointing, name) and not validation:
            raise ConfigError(
                f"checkpointing.{name} needs validation rows, and there are none; name a file with "
                "data.validation_path, or set data.split=auto"
            )


def without_effect(config: RunConfig, inputs: "Inputs") -> list[str]:
    """The fields that somebody set and that a run has no use for, each with the reason.

    A field that every run of a command ignores is refused before (commands.toml). A limit that
    nothing reaches, such as `data.max_refused`, has had its effect.
    """
    checkpointing, training = config.checkpointing, config.training
    settled, train, validation = inputs.config, inputs.train, inputs.validation
    packed = inputs.checkpoint is not None and bool(inputs.checkpoint.packing)
    files = "the weights are quantised in the files" * packed
    adapter = "training continues from an adapter" * (config.model.adapter is not None)
    named = [name for name in ("validation", "test") if getattr(config.data, f"{name}_path")]
    if named and not isinstance(config.data.split, str):
        place = {"validation": 1, "test": 2}
        named = [name for name in named if config.data.split[place[name]] > 0]
    no_bits = "no weight is quantised" * (config.model.bits is None and not packed)
    trackers = config.logging.report_to
    steps = settled.training.total_steps(
        batches_of(train, settled.data, settled.training, processes().size)
    )
    n_validations = -(-steps // int(settled.checkpointing.eval_steps))
    objective = training.objective
    earliest = 1 + (checkpointing.early_stopping_patience or 0)  # the first is the best so far
    forms = {file.format for file in train.report.files}
    asks_nothing = config.data.template in (*ALPACA, "chat") and forms <= {"text"}
    no_tasks = config.data.template == ALPACA[1] and not {"alpaca", "pairs"} & forms
    elsewhere = {f"training.{k}": v for k, v in READ_BY.items() if objective not in v}
    reasons = {
        "checkpointing.early_stopping_patience": (
            f"the run could stop at validation {earliest} at the earliest, and has "
            f"{n_validations}; set a smaller checkpointing.eval_steps"
        )
        * (earliest >= n_validations),
        "checkpointing.load_best_model_at_end": "the run is validated once, at its end"
        * (n_validations == 1),
        "checkpointing.eval_steps": "there are no validation rows" * (not validation),
        "training.warmup_ratio": "training.warmup_steps is set"
        * (training.warmup_steps is not None),
        "model.bits": files * (config.model.bits is not None),
        "model.group_size": files or no_bits,
        "model.mode": files or no_bits,
        "model.frozen_matmul": no_bits,
        "logging.project": "logging.report_to does not name wandb" * ("wandb" not in trackers),
        "logging.run_name": "logging.report_to names no tracker" * (not trackers),
        "data.template": "no row is an instruction" * (asks_nothing or no_tasks),
        "lora.init_lora_weights": adapter,
        "data.history": "no row is a chat" * (forms <= {"text"}),
        "data.split": f"{' and '.join(named)} rows have separate files" * bool(named),
        "data.system": "every row has a system message"
        * (train.report.own_systems == train.report.kept)
        * (config.data.system != train.report.shared_system),
        "data.train_on": "no row has a prompt" * (forms <= {"text"}),
        "data.max_refused": "data.strict allows no row to be refused" * config.data.strict,
        "data.packing": "rows are always computed end to end, without padding",
        "data.format": "pairs are read by their fields" * ("pairs" in forms),
        "data.prompt_loss_weight": "no row has a prompt" * (forms <= {"text"})
        or "prompts are not learned" * (not training.learns_prompts),
        "lora.lora_dropout": "answers are compared without dropout" * (objective != "sft"),
        **{
            name: " and ".join(readers).replace(" and ", ", ", len(readers) - 2)
            + f" read{'s' * (len(readers) == 1)} it, not {objective}"
            for name, readers in elsewhere.items()
        },
    }
    lines, report = unused(config, reasons), train.report
    if objective == "kto" and report.bad in (0, report.kept):
        label = "true" if report.bad == 0 else "false"
        one_kind = f"all {report.kept:,} answers are labelled {label}"
        lines.append(f"training.objective=kto compares good answers with bad ones, but {one_kind}")
    return lines


def unused(config: RunConfig, reasons: dict[str, str]) -> list[str]:
    """A line for each field that has a reason not to be used and is not its default."""
    if config.generation.temperature == 0:
        greedy = "generation.temperature=0 takes the likeliest token"
        reasons = reasons | dict.fromkeys(("generation.top_p", "generation.top_k"), greedy)
    lines, default = [], RunConfig()
    for place, reason in reasons.items():
        section, _, name = place.partition(".")
        value = getattr(getattr(config, section), name)
        if reason and value != getattr(getattr(default, section), name):
            lines.append(f"{place}={value} is not used: {reason}")
    return lines


def explained(
    config: RunConfig, settled: RunConfig, examples: Examples, validation: Examples | None
) -> list[str]:
    """A line for each thing that `settle` has put a number to, with the reason."""
    asked, training, checkpointing = config.training, settled.training, settled.checkpointing
    batches = batches_of(examples, settled.data, training, processes().size)
    steps, passes = training.total_steps(batches), batches.epoch(training.micro_batches(batches))
    lines, usual = [], LoraConfig()
    if asked.per_device_train_batch_size == "auto" or asked.gradient_accumulation_steps == "auto":
        in_step = training.rows * training.accumulation * processes().size
        often = "once" if round(passes, 2) == 1 else f"{passes:.3g} times"
        read = f"{len(examples):,} rows, read {often}"
        if asked.per_device_train_batch_size != "auto":
            read = f"gradient_accumulation_steps={training.accumulation}; {read}"
        more = f"batch     {in_step} examples in a step: {read}, make {steps:,} steps"
        if asked.num_train_epochs not in (None, TrainingConfig().num_train_epochs) and (
            training.rows * training.accumulation > 1
        ):
            half = max(1, training.rows * training.accumulation // 2)
            more += f"; for more set per_device_train_batch_size={half} and "
            more += "gradient_accumulation_steps=1"
        lines.append(more)
    if asked.warmup_steps is None:
        share = f"warmup_ratio {asked.warmup_ratio:g}"
        lines.append(f"warmup    {training.warmup_steps} of {steps:,} steps: {share}")
    if asked.learning_rate == "auto":
        lines.append(f"rate      {training.peak:.3g}: by the model's width")
    lora = config.lora
    is_new = config.model.adapter is None and not (lora.use_rslora or lora.alpha_pattern)
    if is_new and lora.r != usual.r and lora.lora_alpha == usual.lora_alpha:
        alpha = usual.lora_alpha // usual.r * lora.r
        text = f"alpha stays {lora.lora_alpha} with r {lora.r}; lora_alpha={alpha} keeps"
        lines.append(f"scale     {text} the usual ratio")
    if asked.objective != "sft":
        settings = f"beta {training.reward_scale:g}, no dropout"
        if asked.learning_rate == SFT_RATE:
            settings += f"; the rate is that of sft, {SFT_RATE:g}: take a tenth if it is unstable"
        lines.append(f"objective {asked.objective}, {settings}")
    if settled.data.system != config.data.system:
        shown = textwrap.shorten(settled.data.system or "", 60, placeholder=" ...")
        lines.append(f"system    {shown!r} begins every row; generate and chat begin with it, too")
    elif (examples.report.shared_system or settled.data.system) != settled.data.system:
        lines.append("system    the message of every row is not kept: no record can hold it")
    if validation and len(validation) < FEW_HELD_OUT:
        rows = "1 row is" if len(validation) == 1 else f"{len(validation)} rows are"
        lines.append(f"held out  {rows} too few to tell how good the run is; hold out more")
    every = {"eval_steps": "a validation"} if validation else {}
    every["save_steps"] = "a checkpoint"
    auto = [name for name in every if getattr(config.checkpointing, name) == "auto"]
    if auto:
        what = " and ".join(every[name] for name in auto)
        n = getattr(checkpointing, auto[0])
        each = "step" if n == 1 else f"{n:,} steps"
        lines.append(f"every     {each} {what}: {AUTO_EVERY}")
    return lines
