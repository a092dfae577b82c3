"""An output folder, or a merged model, as a repository on the Hugging Face hub.

What goes is a closed list: a file that is not on it stays here and is named in `Pushed.left_out`.
So nothing of the training data and no optimiser state can leave by accident. `run.yaml`,
`training_args.json` and `report.html` stay too, because they name paths of this machine; the
settings and figures in them are in the model card.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from mlx_qlora.adapters.card import model_card, read_facts, read_metrics
from mlx_qlora.errors import ConfigError, SourceError, listing
from mlx_qlora.model.hub import HUB_ID, resolve

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
