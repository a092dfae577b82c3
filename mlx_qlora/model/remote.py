"""What weights hold that are still on the hub: their headers, read by range requests."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mlx_qlora.errors import SourceError, WeightsError
from mlx_qlora.model.hub import ModelFiles, explain

AT_ONCE = 8  # requests; the largest models have hundreds of files


def remote_headers(files: ModelFiles) -> dict[str, dict[str, Any]]:
    """File -> tensor name -> entry with `shape` and `dtype`, of files that were left on the hub.

    Raises:
        SourceError: the hub does not give them.
        WeightsError: one is no safetensors file.
    """
    from huggingface_hub import HfApi, errors

    http_error = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
    api = HfApi()

    def header(name: str) -> dict[str, Any]:
        return api.parse_safetensors_file_metadata(
            files.source, name, revision=files.revision
        ).tensors

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return dict(zip(files.left_on_hub, pool.map(header, files.left_on_hub)))
    except errors.SafetensorsParsingError as error:
        raise WeightsError(f"{files.source} on the hub is damaged: {error}") from None
    except (OSError, RuntimeError, http_error) as error:
        raise SourceError(explain(error, files.source, files.revision)) from error
