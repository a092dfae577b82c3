"""What the hub would send for a model, and whether we may have it, before anything is fetched."""

from dataclasses import dataclass
from typing import Any

from mlx_qlora.errors import SourceError
from mlx_qlora.model import hub


@dataclass(frozen=True)
class Offer:
    """What the hub has of a model that we may read."""

    bytes: int  # of all files that we read
    bytes_to_fetch: int  # of those that the cache lacks
    config: dict[str, Any]  # config.json


def on_offer(repo: str, revision: str | None = None, timeout: float = 10) -> Offer:
    """Asks what `resolve` would download, and leaves the cache as it is.

    Not huggingface_hub's `dry_run`, which moves the cache's `refs/main` to the hub's newest commit:
    an older copy that is whole would then not be found any more without a network.

    Args:
        repo: as `org/name`.
        revision: a branch, tag or commit.
        timeout: seconds for each of three questions.

    Raises:
        SourceError: no access, no such repository or revision, no model in it, or no network.
    """
    from huggingface_hub import HfApi, errors, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import build_hf_headers, filter_repo_objects, get_session
    from huggingface_hub.utils import hf_raise_for_status as raise_for_status

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    try:
        commit = HfApi().model_info(repo, revision=revision, timeout=timeout).sha
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=commit)
        files = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
        names = [*filter_repo_objects(files, allow_patterns=hub.NEEDED, ignore_patterns=hub.UNREAD)]
        missing = [] if "config.json" in names else ["config.json"]
        if not any(name.endswith(".safetensors") for name in names):
            missing.append("*.safetensors")
        if missing:
            raise SourceError(hub.unfit(repo, [*files], missing))
        # Everybody may list a gated repository: only a file tells who may read it.
        url = hf_hub_url(repo, "config.json", revision=commit)
        answer = get_session().get(url, headers=build_hf_headers(), timeout=timeout)
        raise_for_status(answer)
        config = answer.json()
    except (OSError, RuntimeError, http_error) as error:
        raise SourceError(hub.explain(error, repo, revision)) from error
    cached = [try_to_load_from_cache(repo, name, revision=commit) for name in names]
    absent = [name for name, path in zip(names, cached) if not isinstance(path, str)]
    sizes = [sum(files[name] for name in some) for some in (names, absent)]
    return Offer(sizes[0], sizes[1], config if isinstance(config, dict) else {})
