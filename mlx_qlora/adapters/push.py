"""An output folder, or a merged model, as a repository on the Hugging Face hub, with its card.

What is uploaded is a closed list: a file that is not on it stays here and is named in
`Pushed.left_out`, so nothing of the training data and no optimiser state can leave by accident.
`run.yaml`, `training_args.json` and `report.html` stay too, because they name paths of this
machine; the settings and figures in them are in the model card.
"""

import functools
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from mlx_qlora import __version__
from mlx_qlora.adapters.origin import check_whole
from mlx_qlora.data.tokenizer import SHIPPED
from mlx_qlora.errors import ConfigError, SourceError, in_page, listing
from mlx_qlora.folders import CARD, MLX_COPY, NOTE, PEFT, RECORD, TAG, user_path
from mlx_qlora.model.hub import HUB_ID, check_environment, hub_errors, resolve, token_refused
from mlx_qlora.readers import card_header, json_value, parse_json, read_object, read_text, reading

# ---- the model card ------------------------------------------------------------------------------

MOST_STATE = 1 << 26  # bytes of a trainer_state.json; a record in its history has some 170
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes


@dataclass(frozen=True)
class Facts:
    """What a card is made from."""

    adapter: dict[str, Any]  # the content of `adapter_config.json`
    record: dict[str, Any] = field(default_factory=dict)  # of `training_args.json`
    metrics: list[dict[str, Any]] = field(default_factory=list)  # of `metrics.jsonl`
    tokens_seen: int | None = None  # in the whole training, repeated epochs included
    plots: list[str] = field(default_factory=list)  # paths relative to the card
    tokenizer: bool = False  # whether its files are beside the adapter
    mlx: bool = False  # whether the copy for mlx-lm is
    mlx_note: str = ""  # what mlx-lm would misread of the base
    license: str | None = None  # as Hugging Face names it
    name: str = "path/to/this/folder"  # under which others find the adapter


def read_facts(folder: Path, name: str = Facts.name) -> Facts:
    """The facts of any folder with a PEFT adapter; a SourceError if a file cannot be read."""
    paths = folder.glob("checkpoint-*/trainer_state.json")
    states = (read_object(path, SourceError, MOST_STATE) for path in paths)
    seen = [n for state in states if type(n := state.get("num_input_tokens_seen")) is int]
    record = read_object(folder / RECORD, SourceError) if (folder / RECORD).is_file() else {}
    if not record and (folder / "run.yaml").is_file():
        record = {"config": read_object(folder / "run.yaml", SourceError)}
    license = card_header(folder / CARD).get("license")
    return Facts(
        adapter=read_object(folder / PEFT[0], SourceError),
        record=record,
        metrics=read_metrics(folder / "metrics.jsonl"),
        tokens_seen=max(seen, default=0) or None,
        plots=sorted(f"plots/{path.name}" for path in folder.glob("plots/[!.]*.svg")),
        tokenizer=any((folder / f).is_file() for f in ("tokenizer.json", "tokenizer.model")),
        mlx=(folder / MLX_COPY[1]).is_file(),
        mlx_note=str(json_value(folder / MLX_COPY[0], NOTE) or ""),
        license=license if isinstance(license, str) else None,
        name=name,
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, their numbers alone; none if there is no such file."""
    records = []
    with reading(path, SourceError):
        lines = read_text(path, 1 << 28, "replace").splitlines() if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            record = dict(parse_json(line))
        except (TypeError, ValueError) as error:
            raise SourceError(
                f"{path}, line {number} is no JSON object ({error}); delete the line"
            ) from None
        # The record of a skipped step names rows of the data.
        records.append({k: v for k, v in record.items() if isinstance(v, int | float)})
    return records


def model_card(facts: Facts) -> str:
    """The card, as Markdown with a YAML header; what is not known is left out."""
    import yaml

    adapter, config = facts.adapter, facts.record.get("config", {})
    base = str(adapter.get("base_model_name_or_path") or "the base model")
    is_repo = HUB_ID.fullmatch(base) is not None
    base = base if is_repo else Path(base).name  # a local folder's place is nobody's business
    header = {
        **({"base_model": base} if is_repo else {}),
        **{"library_name": "peft", "pipeline_tag": "text-generation"},
        **({"license": facts.license} if facts.license else {}),
        "tags": [*([f"base_model:adapter:{base}"] if is_repo else []), "lora", TAG],
    }
    versions = facts.record.get("versions", {})
    return render(
        "adapters/card.md.jinja",
        facts=facts,
        adapter=adapter,
        config=config,
        header=yaml.safe_dump(header, sort_keys=False).strip(),
        base=base,
        is_repo=is_repo,
        on_hub=HUB_ID.fullmatch(facts.name) is not None,
        version=versions.get("mlx-qlora", __version__),
        vllm_rank=next((r for r in VLLM_RANKS if r >= (adapter.get("r") or 0)), None),
        versions=versions,
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; a page's values are escaped, and none of Markdown's."""
    return templates().get_template(template).render(values)


@functools.cache
def templates() -> Any:
    """Jinja's environment, which compiles once: a run writes a card with every checkpoint."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("mlx_qlora", ""),
        autoescape=jinja2.select_autoescape(("html",)),
        finalize=in_page,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )


# ---- the upload ----------------------------------------------------------------------------------

MODEL = ("config.json", "generation_config.json", "model.safetensors.index.json")


def _named(words: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(map(re.escape, names), words)


# What is uploaded, by a regex of its path, and what that is: of an adapter, of its checkpoints, and
# of a merged model.
BOTH = _named("model card", CARD) | _named("tokenizer", *SHIPPED)
ADAPTER = BOTH | _named("the adapter's config", PEFT[0]) | _named("the adapter's weights", PEFT[1])
ADAPTER |= _named("copy for mlx-lm", *MLX_COPY) | _named("numbers of the run", "metrics.jsonl")
ADAPTER |= {r"plots/[\w-][\w.-]*\.(svg|png)": "plot"}
CHECKPOINTS = {rf"checkpoint-\d+/({'|'.join(map(re.escape, PEFT))})": "a checkpoint's adapter"}
MERGED = BOTH | _named("the model's config", *MODEL)
MERGED |= {r"model[\w.-]*\.safetensors": "the model's weights"}
# Large, or tokens that may look like paths.
WITHOUT_PATHS = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", MODEL[2])
SYSTEM = (  # on any machine
    *("/usr", "/bin", "/etc", "/System", "/Library", "/Applications"),
    *("/dev/null", "/dev/std", "/dev/fd"),
)
PATH_IN_TEXT = re.compile(r"(?<![\w:/.])(?:/|~/|[A-Za-z]:\\)[^\s\"'`<>|()\[\]]+")


@dataclass(frozen=True)
class Pushed:
    """What was uploaded to the hub, or would be."""

    files: list[tuple[str, int]]  # path in the repository, bytes
    url: str | None  # of the commit; None after a dry run
    left_out: list[str]  # paths that stay here; a folder of them ends with a slash

    def __str__(self) -> str:
        wide = max((len(name) for name, _ in self.files), default=0)
        words = MERGED | CHECKPOINTS | ADAPTER
        rows = [f"{n:>15,}  {name:<{wide}}  {_what_is(name, words)}" for name, n in self.files]
        rows.append(f"{sum(size for _, size in self.files):>15,}  bytes in all")
        stays = [f"{'stays here':>15}  {name}" for name in self.left_out]
        return "\n".join([*rows, *stays, *([self.url] if self.url else [])])


def _what_is(name: str, uploaded: dict[str, str]) -> str:
    """What a file is, in a few words; empty if it is not uploaded."""
    fits = (words for path, words in uploaded.items() if re.fullmatch(path, name))
    return next(fits, "")


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
    """Upload an adapter or a merged model to the hub, in one commit; nothing changes here.

    An adapter is uploaded with its copy for mlx-lm, the tokenizer, `metrics.jsonl` (its numbers),
    the plots and a new model card. A card that does not mention mlx-qlora is uploaded as it is. In
    small JSON files a path of this machine is cut to its last part.

    Args:
        folder: what a run, `save_adapter` or a merge has left.
        repo_id: `org/name`, or `name` for your own account; made if it does not exist.
        private: whether a new repository is private. With True a public one is refused; with False
            one that is private already stays so.
        token: that may write; by default the one of `hf auth login` or HF_TOKEN.
        revision: a branch, made if it does not exist; by default the main one.
        include_checkpoints: also the adapters of `checkpoint-*`, never their optimiser state.
        dry_run: only say what would be uploaded; needs neither network nor token.

    Raises:
        SourceError: no adapter or model in the folder, or the hub cannot be reached or refuses.
        ConfigError: the name of the repository is invalid, what would be uploaded names a path of
            this machine, or `private` does not fit.
    """
    check_environment()
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
        if not repo_id:
            raise HFValidationError("it is empty")
    except HFValidationError as error:
        raise ConfigError(
            f"{repo_id!r} cannot be the name of a repository ({error}); write it as org/name"
        ) from None
    folder = user_path(folder)
    uploads = _collect(folder, repo_id, include_checkpoints)
    for path in (folder / name for name in uploads):
        if not (target := path.resolve()).is_relative_to(folder.resolve()):
            raise ConfigError(
                f"{path} is a link to {target}, outside of the folder; put a copy in its place "
                "if it should be uploaded, or remove it"
            )
    used, left_out = {name.partition("/")[0] for name in uploads}, set[str]()
    for name in {*_names(folder)} - uploads.keys():
        top, slash, _ = name.partition("/")
        left_out.add(name if top in used else top + slash)
    files = [
        (name, len(content) if isinstance(content, bytes) else content.stat().st_size)
        for name, content in uploads.items()
    ]
    if dry_run:
        return Pushed(files, None, sorted(left_out))
    if (token or get_token()) is None:
        raise SourceError(
            "not logged in to the hub; run `hf auth login` with a token that may write, or pass "
            "token="
        )
    api, message = HfApi(token=token), commit_message or "Upload with mlx-qlora"
    try:
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise ConfigError(
                f"{repo} exists and is public; pass private=False to publish there, or name "
                "another repository"
            )
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations = [CommitOperationAdd(name, content) for name, content in uploads.items()]
        commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    except ConfigError:
        raise
    except hub_errors() as error:
        raise SourceError(_explain(error, repo_id, token)) from error
    return Pushed(files, commit.commit_url, sorted(left_out))


def _collect(folder: Path, repo_id: str, checkpoints: bool) -> dict[str, Path | bytes]:
    """Path in the repository -> a file, or bytes where the file itself must not leave."""
    if not folder.is_dir():
        raise SourceError(f"no such folder: {folder}; give the output folder of a run or a merge")
    present = [name for name in _names(folder) if (folder / name).stat().st_size]
    card, keep = b"", "surrogateescape"  # whatever its bytes are
    if CARD in present:
        with reading(folder / CARD, ConfigError):
            card = read_text(folder / CARD, errors=keep).encode(errors=keep)
    rewritten: dict[str, bytes] = {}
    if all(name in present for name in PEFT):
        uploaded = ADAPTER | (CHECKPOINTS if checkpoints else {})
        check_whole(folder)
        _check_base(folder / PEFT[0])
        if not card or b"mlx-qlora" in card:
            facts = read_facts(folder, repo_id)
            with reading(folder / RECORD, SourceError):
                card = model_card(facts).encode()
        if "metrics.jsonl" in present:
            records = read_metrics(folder / "metrics.jsonl")
            rewritten["metrics.jsonl"] = "".join(json.dumps(r) + "\n" for r in records).encode()
    else:
        if "config.json" not in present:
            missing = [name for name in PEFT if name not in present]
            half = f"; for an adapter, {missing[0]} is missing" if len(missing) == 1 else ""
            raise SourceError(
                f"{folder} holds neither an adapter ({' and '.join(PEFT)}) nor a merged model "
                f"(config.json and model.safetensors){half}; give the output folder of a run or a "
                "merge"
            )
        resolve(folder)  # names the shards that are missing
        uploaded = MERGED
    if card:
        paths = PATH_IN_TEXT.findall(card.decode("utf-8", "replace"))
        if problems := [*dict.fromkeys(path for path in paths if _is_private(path))]:
            names = "names paths of this machine; remove them"
            raise ConfigError(f"{folder / CARD} {names}:\n{listing(problems)}")
        rewritten[CARD] = card
    chosen = {
        n: _public(folder, n) for n in present if _what_is(n, uploaded) and n not in rewritten
    }
    return dict(sorted((chosen | rewritten).items()))


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _check_base(path: Path) -> None:
    base = read_object(path, SourceError).get("base_model_name_or_path")
    if base is None:
        raise SourceError(f"{path} does not name a base model; save the adapter again")
    if not isinstance(base, str) or not HUB_ID.fullmatch(base):
        raise ConfigError(
            f"{path}: the base model {base!r} is no repository on the hub, so nobody else could "
            "open the adapter; save it again with model.base_model_name_or_path=org/name (in "
            "Python: save_adapter(model, folder, base_model_name_or_path=...))"
        )


def _is_private(word: str) -> bool:
    """Whether a path is one of this machine: it exists, or would be in the user's home."""
    path, home = Path(os.path.expanduser(word.rstrip(".,;:"))), Path(os.path.expanduser("~"))
    if len(path.parts) < 3 or str(path).startswith(SYSTEM):
        return False
    return os.path.exists(path) or (len(home.parts) > 2 and str(path).startswith(str(home)))


def _public(folder: Path, name: str) -> Path | bytes:
    """The file, or its JSON with paths of this machine cut to their last part."""
    path = folder / name
    if path.suffix != ".json" or path.name in WITHOUT_PATHS:
        return path
    try:
        values = parse_json(read_text(path))
    except ValueError as error:
        raise SourceError(f"{path} cannot be read as JSON: {error}") from None
    public = _without_local_paths(values)
    return path if public == values else (json.dumps(public, indent=2) + "\n").encode()


def _without_local_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_local_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_local_paths(each) for each in value]
    if not isinstance(value, str) or "\n" in value:
        return value
    path = PureWindowsPath(value)  # reads both kinds of slashes
    is_local = value.startswith(("/", "~/", "\\\\")) or bool(path.drive)
    return path.name if is_local and len(path.parts) > 2 else value


# ---- the hub -------------------------------------------------------------------------------------


def _explain(error: Exception, repo_id: str, token: str | None) -> str:
    from huggingface_hub import constants, errors

    chain: list[BaseException] = [error]
    while chain[-1].__cause__:  # the client wraps what a thread of an upload has raised
        chain.append(chain[-1].__cause__)
    answers = [getattr(each, "response", None) for each in chain]
    status = next((answer.status_code for answer in answers if answer is not None), None)
    again = "run the same command again; what was uploaded already is not sent twice"
    if status == 401 and token:
        return f"the hub refuses your token (401 for {repo_id}); correct or leave out token="
    if status == 401:
        return token_refused(repo_id)
    if status == 403:
        return (
            f"your token may not write to {repo_id} (403); make one with write permission at "
            "https://huggingface.co/settings/tokens, or name a repository of your own account"
        )
    if any(isinstance(each, errors.OfflineModeIsEnabled) for each in chain):
        return f"cannot push to {repo_id}, HF_HUB_OFFLINE is set; unset it and {again}"
    if isinstance(error, ValueError) and status in (None, 400):
        return f"the hub does not accept what would be uploaded to {repo_id}: {error}"
    if status is not None:
        return f"cannot push to {repo_id}, {constants.ENDPOINT} answered {status}; {again}"
    return (
        f"cannot push to {repo_id}, {constants.ENDPOINT} cannot be reached ({chain[-1]}); {again}"
    )
