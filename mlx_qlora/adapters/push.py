"""An output folder, or a merged model, as a repository on the Hugging Face hub.

What goes is a closed list: a file that is not on it stays here and is named in `Pushed.left_out`.
So nothing of the training data and no optimiser state can leave by accident. `run.yaml`,
`training_args.json` and `report.html` stay too, because they name paths of this machine; the
settings and figures in them are in the model card.
"""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.errors import ConfigError, SourceError, listing
from mlx_qlora.folders import TAG, card_header
from mlx_qlora.model.hub import HUB_ID, resolve

# ---- the model card ------------------------------------------------------------------------------


# Settings that a card shows. Whatever may hold a path or a text of the user's is not among them.
SHOWN = {
    "model": ("bits", "group_size", "mode", "dtype"),
    "data": ("max_length", "truncation", "packing", "train_on", "shuffle"),
    "training": (
        *("learning_rate", "lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs"),
        *("per_device_train_batch_size", "gradient_accumulation_steps", "max_grad_norm"),
        *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "seed"),
    ),
}


LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "layers_to_transform", "use_rslora")


LORA += ("use_dora", "rank_pattern", "alpha_pattern")


VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Facts:
    """What a card is made from.

    Attributes:
        adapter: of `adapter_config.json`.
        record: of `training_args.json`; without it the settings of the run are left out.
        metrics: the records of `metrics.jsonl`.
        tokens_seen: of the whole training, with repeated epochs.
        plots: paths relative to the card.
        tokenizer: whether its files lie beside the adapter.
        mlx: whether the copy for mlx-lm does.
        license: as Hugging Face names it; None if nothing says.
        name: under which others find the adapter.
    """

    adapter: dict[str, Any]
    record: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    tokens_seen: int | None = None
    plots: list[str] = field(default_factory=list)
    tokenizer: bool = False
    mlx: bool = False
    license: str | None = None
    name: str = "path/to/this/folder"


def read_facts(folder: Path, name: str | None = None) -> Facts:
    """The facts of an output folder, a checkpoint, or any folder with a PEFT adapter.

    Args:
        folder: with `adapter_config.json`; all else may be missing.
        name: the repository on the hub that it goes to.

    Raises:
        SourceError: a file cannot be read.
    """
    seen = []
    for path in folder.glob("checkpoint-*/trainer_state.json"):
        seen.append(_object(path).get("num_input_tokens_seen") or 0)
    header = card_header(folder / "README.md")
    known = {} if name is None else {"name": name}
    return Facts(
        adapter=_object(folder / "adapter_config.json"),
        record=_object(folder / "training_args.json", {}) or _from_yaml(folder / "run.yaml"),
        metrics=read_metrics(folder / "metrics.jsonl"),
        tokens_seen=max(seen, default=0) or None,
        plots=sorted(
            f"plots/{path.name}"
            for path in folder.glob("plots/[!.]*.svg")
            if path.suffix in (".svg", ".png")
        ),
        tokenizer=any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")),
        mlx=(folder / "mlx" / "adapters.safetensors").is_file(),
        license=header.get("license") if isinstance(header.get("license"), str) else None,
        **known,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, their numbers alone; none if there is no such file.

    Raises:
        SourceError: a line is not a JSON object.
    """
    records = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = dict(json.loads(line))
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{path}, line {number} is no JSON object ({error}): delete the line"
            ) from None
        # A record of a skipped step names rows of the data.
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float)}
        records.append(numbers)
    return records


def _object(path: Path, missing: dict[str, Any] | None = None) -> dict[str, Any]:
    if missing is not None and not path.is_file():
        return missing
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError, OSError) as error:
        raise SourceError(f"{path} cannot be read as a JSON object: {error}") from None


def _from_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        return {}
    try:
        return {"config": dict(yaml.safe_load(path.read_text(encoding="utf-8")))}
    except (TypeError, ValueError, yaml.YAMLError) as error:
        raise SourceError(f"{path} cannot be read as YAML: {error}") from None


# ---- facts -> markdown -------------------------------------------------------------------------
def model_card(facts: Facts) -> str:
    """The card, as Markdown with a YAML header; what is not known is left out."""
    parts = [
        _yaml(facts),
        _summary(facts),
        _usage(facts),
        _settings(facts),
        _results(facts),
        _versions(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _base(facts: Facts) -> tuple[str, bool]:
    """The base's name, and whether it is a repository; of a local folder only the last part."""
    base = str(facts.adapter.get("base_model_name_or_path") or "the base model")
    is_repo = HUB_ID.fullmatch(base) is not None
    return (base if is_repo else Path(base).name), is_repo


def _yaml(facts: Facts) -> str:
    import yaml

    base, is_repo = _base(facts)
    header: dict[str, Any] = {"base_model": base} if is_repo else {}
    header |= {"library_name": "peft", "pipeline_tag": "text-generation"}
    header |= {"license": facts.license} if facts.license else {}
    tags = [f"base_model:adapter:{base}"] if is_repo else []
    header["tags"] = [*tags, "lora", TAG]
    return f"---\n{yaml.safe_dump(header, sort_keys=False).strip()}\n---"


def _summary(facts: Facts) -> str:
    adapter, (base, is_repo) = facts.adapter, _base(facts)
    kind = "DoRA" if adapter.get("use_dora") else "LoRA"
    link = f"[`{base}`](https://huggingface.co/{base})" if is_repo else f"`{base}`"
    model = facts.record.get("config", {}).get("model", {})
    bits = f", on {model['bits']}-bit weights" if model.get("bits") else ""
    title = f"# {facts.name.rpartition('/')[2]}\n\n" if HUB_ID.fullmatch(facts.name) else ""
    return (
        f"{title}A {kind} adapter of rank {adapter.get('r')} for {link}, trained with "
        f"mlx-qlora {facts.record.get('versions', {}).get('mlx-qlora', __version__)}{bits}."
    )


def _usage(facts: Facts) -> str:
    base, name = _base(facts)[0], facts.name
    code = [
        "## How to use it\n\nWith [PEFT](https://github.com/huggingface/peft):\n",
        "```python",
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer\n",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{name}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{name if facts.tokenizer else base}")',
        "```",
    ]
    if facts.mlx:
        fetched = HUB_ID.fullmatch(name) is not None
        folder = "adapter" if fetched else name
        code += ["\nWith [mlx-lm](https://github.com/ml-explore/mlx-lm), on a Mac:\n", "```sh"]
        code += [f'hf download {name} --include "mlx/*" --local-dir adapter'] if fetched else []
        code += [
            f'mlx_lm.generate --model {base} --adapter-path {folder}/mlx --prompt "Hello"',
            "```",
        ]
    return "\n".join([*code, *_vllm(facts)])


def _vllm(facts: Facts) -> list[str]:
    adapter, base = facts.adapter, _base(facts)[0]
    ranks = [adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()]
    enough = [rank for rank in VLLM_RANKS if rank >= max(ranks)]
    if adapter.get("use_dora") or adapter.get("rank_pattern") or adapter.get("alpha_pattern"):
        why = "DoRA" if adapter.get("use_dora") else "ranks or scales of their own"
        return [f"\nvLLM does not compute {why}: merge the adapter into the base for it."]
    if not enough:
        return []
    flags = f"--enable-lora --max-lora-rank {enough[0]} --lora-modules tuned={facts.name}"
    head = "\nWith [vLLM](https://github.com/vllm-project/vllm), as the model `tuned`:\n"
    return [head, "```sh", f"vllm serve {base} {flags}", "```"]


def _settings(facts: Facts) -> str:
    config = facts.record.get("config", {})
    rows = {f"lora.{name}": facts.adapter[name] for name in LORA if facts.adapter.get(name)}
    for section, names in SHOWN.items():
        values = config.get(section, {})
        rows |= {f"{section}.{n}": values[n] for n in names if values.get(n) is not None}
    table = [f"| `{name}` | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["## Hyperparameters\n", "| | |", "|---|---|", *table])


def _results(facts: Facts) -> str:
    losses = [_line(facts, "loss", "training loss"), _line(facts, "eval_loss", "validation loss")]
    lines = []
    if any(losses):
        lines += ["| nats per token | first | last | best |", "|---|---|---|---|"]
        lines += [line for line in losses if line]
    said = {}
    if accuracy := [r["eval_token_accuracy"] for r in facts.metrics if "eval_token_accuracy" in r]:
        said["validation token accuracy at the end"] = f"{accuracy[-1]:.1%}"
    if epochs := [r["epoch"] for r in facts.metrics if "epoch" in r]:
        said["epochs"] = f"{epochs[-1]:g}"
    if facts.tokens_seen:
        said["tokens trained on"] = f"{facts.tokens_seen:,}"
    for name, count in facts.record.get("data", {}).items():  # counts of rows and tokens
        if isinstance(count, int):
            said[f"data: {name}"] = f"{count:,}"
    if peak := [r["peak_memory_bytes"] for r in facts.metrics if "peak_memory_bytes" in r]:
        said["peak memory"] = f"{max(peak) / 1e9:.2f} GB"
    lines += [f"\n{'; '.join(f'{name} {value}' for name, value in said.items())}."] if said else []
    for plot in facts.plots:
        lines.append(f"\n![{Path(plot).stem.replace('_', ' ')}]({plot})")
    return "\n".join(["## Training\n", *lines]) if lines else ""


def _line(facts: Facts, key: str, label: str) -> str:
    """One row of the table of losses; empty if none was recorded."""
    points = [(record[key], record.get("step")) for record in facts.metrics if key in record]
    if not points:
        return ""
    chosen = (points[0], points[-1], min(points))
    return f"| {label} | " + " | ".join(f"{loss:.4f} (step {at})" for loss, at in chosen) + " |"


def _versions(facts: Facts) -> str:
    versions = facts.record.get("versions", {})
    listed = "\n".join(f"- {name} {_cell(version)}" for name, version in versions.items())
    return f"## Versions\n\n{listed}" if listed else ""


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


# ---- the upload ----------------------------------------------------------------------------------


ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


MLX = ("mlx/adapter_config.json", "mlx/adapters.safetensors")


TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"),
    *("added_tokens.json", "chat_template.jinja", "chat_template.json"),
)


MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


WEIGHTS = re.compile(r"model[\w.-]*\.safetensors")


PLOT = re.compile(r"plots/[\w-][\w.-]*\.(svg|png)")


CHECKPOINT = re.compile(rf"checkpoint-\d+/({'|'.join(map(re.escape, ADAPTER))})")


# Large, or tokens that may look like paths.
WITHOUT_PATHS = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", MODEL[2])


SYSTEM = ("/usr", "/bin", "/etc", "/dev", "/System", "/Library", "/Applications")  # on any machine


PATH_IN_TEXT = re.compile(r"(?<![\w:/.])(?:/|~/|[A-Za-z]:\\)[^\s\"'`<>|()\[\]]+")


@dataclass(frozen=True)
class Pushed:
    """What went to the hub, or would go.

    Attributes:
        files: (path in the repository, bytes).
        url: of the commit; None after a dry run.
        left_out: paths in the folder that stay here; a folder of them ends with a slash.
    """

    files: list[tuple[str, int]]
    url: str | None
    left_out: list[str]

    def __str__(self) -> str:
        rows = [f"{size:>15,}  {name}" for name, size in self.files]
        rows.append(f"{sum(size for _, size in self.files):>15,}  bytes in all")
        stays = [f"{'stays here':>15}  {name}" for name in self.left_out]
        return "\n".join([*rows, *stays, *([self.url] if self.url else [])])


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    include_checkpoints: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Uploads an adapter or a merged model to the hub, in one commit; changes nothing here.

    An adapter goes with its copy for mlx-lm, the tokenizer, `metrics.jsonl` (its numbers), the
    plots, and a model card made anew. A card that was written by hand, one that does not mention
    mlx-qlora, goes as it is. In small JSON files a path of this machine is cut to its last part.

    Args:
        folder: that a run, `save_adapter` or a merge has left.
        repo_id: `org/name`, or `name` for your own account; made if it does not exist.
        private: whether a new repository is private. With True a public one is refused; with False
            one that is private already stays so.
        token: that may write; by default the one of `hf auth login` or HF_TOKEN.
        revision: a branch, made if it does not exist; by default the main one.
        commit_message: by default one that names mlx-qlora.
        include_checkpoints: also the adapters of `checkpoint-*`; their optimiser state never goes.
        dry_run: only says what would go; needs neither network nor token.

    Raises:
        SourceError: no adapter or model in the folder, or the hub cannot be reached or refuses.
        ConfigError: the name of the repository is invalid, what would go names a path of this
            machine, or `private` does not fit.
    """
    _check_repo_id(repo_id)
    folder = Path(folder).expanduser()
    uploads = _collect(folder, repo_id, include_checkpoints)
    left_out = _left_out(folder, uploads)
    files = [(name, _size(what)) for name, what in uploads.items()]
    if dry_run:
        return Pushed(files, None, left_out)
    message = commit_message or "Upload with mlx-qlora"
    return Pushed(files, _upload(uploads, repo_id, private, token, revision, message), left_out)


# ---- what goes ---------------------------------------------------------------------------------
def _collect(folder: Path, repo_id: str, checkpoints: bool) -> dict[str, Path | bytes]:
    """Path in the repository -> a file, or bytes where the file itself must not go."""
    if not folder.is_dir():
        raise SourceError(f"no such folder: {folder}; give the output folder of a run or a merge")
    here = [name for name in _names(folder) if (folder / name).stat().st_size]
    if all(name in here for name in ADAPTER):
        known = {*ADAPTER, *MLX, *TOKENIZER}
        chosen = [name for name in here if name in known or PLOT.fullmatch(name)]
        chosen += [name for name in here if checkpoints and CHECKPOINT.fullmatch(name)]
        _check_base(folder / ADAPTER[0])
        cards = {"README.md": _card(folder, repo_id)}
        if "metrics.jsonl" in here:
            records = read_metrics(folder / "metrics.jsonl")
            lines = "".join(json.dumps(record) + "\n" for record in records)
            cards["metrics.jsonl"] = lines.encode()
    else:
        if not {"config.json", *ADAPTER} & {*here}:
            raise SourceError(
                f"{folder} holds neither an adapter ({' and '.join(ADAPTER)}) nor a merged model "
                "(config.json and model.safetensors): give the output folder of a run or a merge"
            )
        if half := [name for name in ADAPTER if name not in here and "config.json" not in here]:
            raise SourceError(f"{folder} holds half an adapter: {half[0]} is missing; save it anew")
        resolve(folder)  # names the shards that are missing
        known = {*MODEL, *TOKENIZER}
        chosen = [name for name in here if name in known or WEIGHTS.fullmatch(name)]
        cards = {"README.md": (folder / "README.md").read_bytes()} if "README.md" in here else {}
    if "README.md" in cards:
        _check_text(folder / "README.md", cards["README.md"].decode("utf-8", "replace"))
    uploads: dict[str, Path | bytes] = {name: _public(folder, name) for name in chosen}
    return dict(sorted((uploads | cards).items()))


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _left_out(folder: Path, uploads: dict[str, Path | bytes]) -> list[str]:
    stays = [name for name in _names(folder) if name not in uploads]
    kept = {name.split("/")[0] for name in uploads}
    whole = {
        f"{n.split('/')[0]}/" if "/" in n and n.split("/")[0] not in kept else n for n in stays
    }
    return sorted(whole)


def _card(folder: Path, repo_id: str) -> bytes:
    path = folder / "README.md"
    own = path.read_bytes() if path.is_file() else b""
    if own and b"mlx-qlora" not in own:
        return own
    return model_card(read_facts(folder, repo_id)).encode()


def _check_base(path: Path) -> None:
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (KeyError, TypeError, ValueError):
        raise SourceError(f"{path} does not name a base model; save the adapter anew") from None
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        raise ConfigError(
            f"{path}: the base model {base!r} is no repository on the hub, so nobody else could "
            "open the adapter: save it anew with model.base_model_name_or_path=org/name (in "
            "Python: save_adapter(model, folder, base_model_name_or_path=...))"
        )


def _check_text(path: Path, text: str) -> None:
    found = [word for word in PATH_IN_TEXT.findall(text) if _is_here(word)]
    if found:
        problems = listing(list(dict.fromkeys(found)))
        raise ConfigError(f"{path} names paths of this machine; take them out:\n{problems}")


def _is_here(word: str) -> bool:
    path, home = Path(word.rstrip(".,;:")).expanduser(), str(Path.home())
    near_home = len(Path(home).parts) > 2 and str(path).startswith(home)
    private = len(path.parts) > 2 and not str(path).startswith(SYSTEM)
    return private and (near_home or os.path.exists(path))


def _public(folder: Path, name: str) -> Path | bytes:
    """The file, or its JSON with paths of this machine cut to their last part."""
    path = folder / name
    if path.suffix != ".json" or path.name in WITHOUT_PATHS:
        return path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
    cut = _cut(values)
    return path if cut == values else (json.dumps(cut, indent=2) + "\n").encode()


def _cut(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _cut(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cut(each) for each in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    windows = PureWindowsPath(value)  # reads both kinds of slashes
    local = value.startswith(("/", "~/", "\\\\")) or bool(windows.drive)
    return windows.name if local and len(windows.parts) > 2 else value


def _size(what: Path | bytes) -> int:
    return len(what) if isinstance(what, bytes) else what.stat().st_size


# ---- the hub -----------------------------------------------------------------------------------
def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if not repo_id:
            raise HFValidationError("it is empty")
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} cannot be the name of a repository: write it as org/name ({error})"
        ) from None


def _upload(
    uploads: dict[str, Path | bytes],
    repo_id: str,
    private: bool,
    token: str | None,
    revision: str | None,
    message: str,
) -> str:
    """Makes the repository and one commit; returns the commit's address."""
    from huggingface_hub import CommitOperationAdd, HfApi, errors, get_token

    if (token or get_token()) is None:
        raise SourceError(
            "not logged in to the hub: run `hf auth login` with a token that may write, or pass "
            "token="
        )
    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    api = HfApi(token=token)
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"{repo} exists and is public: pass private=False to publish there, or name "
                "another repository"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(name, what if isinstance(what, bytes) else str(what))
            for name, what in uploads.items()
        ]
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, http_error) as error:
        raise SourceError(_explain(error, repo_id, token)) from error
    return commit.commit_url


def _explain(error: Exception, repo_id: str, token: str | None) -> str:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while chain[-1].__cause__:  # the client wraps what a thread of an upload has raised
        chain.append(chain[-1].__cause__)
    answers = [getattr(each, "response", None) for each in chain]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    again = "run the same command again; what has arrived is not sent twice"
    if status == 401:
        fix = "run `hf auth login`"
        if token or os.environ.get("HF_TOKEN"):
            fix = "correct or leave out token=" if token else "correct or unset HF_TOKEN"
        return f"the hub refuses your token (401 for {repo_id}): {fix}"
    if status == 403:
        return (
            f"your token may not write to {repo_id} (403): make one with write permission at "
            "https://huggingface.co/settings/tokens, or name a repository of your own account"
        )
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return f"cannot push to {repo_id}, HF_HUB_OFFLINE is set: unset it and {again}"
    if isinstance(error, ValueError) and status in (None, 400):
        return f"the hub does not accept what would go to {repo_id}: {error}"
    if status is not None:
        return f"cannot push to {repo_id}, {constants.ENDPOINT} answered {status}: {again}"
    return (
        f"cannot push to {repo_id}, {constants.ENDPOINT} cannot be reached ({chain[-1]}): {again}"
    )
