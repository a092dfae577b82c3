"""A frozen base that is not in memory: layers are read when their turn comes, and dropped after it.

Reading a layer takes a fraction of computing it, and a thread reads the next one meanwhile: two
layers are in memory at most. Files of safetensors are read as they are. From others, and where
dense weights are to be packed, a copy is made once, in the user's cache.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_qlora.errors import ConfigError, size
from mlx_qlora.folders import locked, remove, staged, user_cache
from mlx_qlora.model.hub import ModelFiles, sample_of
from mlx_qlora.model.quantize import PARTS, FrozenMatrix, QuantConfig
from mlx_qlora.readers import json_value

# ---- one layer after the other -------------------------------------------------------------------

_thread = ThreadPoolExecutor(1, "layers")  # reads; of all models, as there is one disk


def streamed(module: nn.Module) -> list[FrozenMatrix]:
    """The matrices of a model, or of a layer, that are in files."""
    return [m for m in module.modules() if isinstance(m, FrozenMatrix) and m.stored is not None]


def streamed_bytes(module: nn.Module) -> int:
    """Their size, in bytes."""
    return sum(matrix.stored.nbytes for matrix in streamed(module) if matrix.stored)


class LayerReader:
    """Puts the matrices of a layer in their places for a while, and reads the next layer's."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._ahead: tuple[int, Future[Any]] | None = None  # a layer's number, and its arrays

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Within it the matrices of a layer are there; a graph that was built keeps its own."""
        self.ahead(i)
        assert self._ahead is not None
        reading, self._ahead = self._ahead[1], None
        matrices = streamed(self._layers[i])
        for matrix, read in zip(matrices, reading.result()):
            for name, array in zip(PARTS, matrix.as_computed(read)):
                matrix[name] = array
        del reading
        try:
            yield
        finally:
            for matrix in matrices:
                matrix.drop()

    def ahead(self, i: int) -> None:
        """Begin to read a layer, if there is one of this number, and it is not under way."""
        if 0 <= i < len(self._layers) and (self._ahead is None or self._ahead[0] != i):
            self._ahead = i, _thread.submit(_read, streamed(self._layers[i]))

    @property
    def resident_bytes(self) -> int:
        """Size of the two layers that are in memory at most."""
        return sum(sorted(map(streamed_bytes, self._layers))[-2:])


def _read(matrices: list[Any]) -> list[list[mx.array]]:
    return [matrix.stored.read() for matrix in matrices]


# ---- a copy that is read layer by layer ----------------------------------------------------------

VERSION = 2  # of these files
ABOUT = "about.json"  # beside the tensors: where they are from, how they are packed, their size


class PackedCopy:
    """The matrices of a model as they are computed with, in a folder of the user's cache.

    It is found again by the content of the model's files, the packing and the dtype.
    """

    def __init__(self, files: ModelFiles, quantize: QuantConfig | None, dtype: mx.Dtype) -> None:
        content = sample_of(files.path, names=False).hex()
        key = hashlib.sha256(f"{VERSION} {content} {quantize} {dtype}".encode()).hexdigest()[:40]
        self._copies, self._source = user_cache() / "weights", files.source
        self.folder = self._copies / key
        self._staging = self.folder
        self._packing: dict[str, dict[str, Any]] = {}

    @property
    def files(self) -> list[Path]:
        """Safetensors files, one for each matrix or part of one."""
        return sorted(self.folder.glob("*.safetensors"))

    @property
    def is_whole(self) -> bool:
        """Whether it is there, all of it."""
        n_bytes = json_value(self.folder / ABOUT, "bytes")
        return n_bytes == sum(file.stat().st_size for file in self.files)

    @property
    def packing(self) -> dict[str, QuantConfig]:
        """How matrices are packed in it, by their paths; those that it lacks are dense."""
        packing = json_value(self.folder / ABOUT)["packing"]
        return {path: QuantConfig(**how) for path, how in packing.items()}

    @contextmanager
    def there(self, n_bytes: int) -> Iterator[bool]:
        """Lends whether the copy has to be written within, by `take`; after it, it is there.

        A ConfigError if the disk has no room for `n_bytes`, or cannot be written to.
        """
        try:
            self._copies.mkdir(parents=True, exist_ok=True)
            # Another process may be about to write it.
            with nullcontext() if self.is_whole else locked(self._copies, wait=True):
                if self.is_whole:
                    yield False
                    return
                for leftover in self._copies.glob(".*"):  # of processes that were killed
                    remove(leftover)
                free = shutil.disk_usage(self._copies).free
                if free < n_bytes:
                    raise ConfigError(
                        f"model.residency: streaming {self._source} needs a packed copy of "
                        f"{size(n_bytes)} in {self._copies}, where {size(free)} are free; clear "
                        "older copies with mlx-qlora cache --clear, free other space, or set "
                        "XDG_CACHE_HOME to a larger disk"
                    )
                with staged(self.folder, replace=True) as self._staging:
                    yield True
                    written = sum(file.stat().st_size for file in self._staging.iterdir())
                    about = {"source": self._source, "packing": self._packing, "bytes": written}
                    (self._staging / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"model.residency: the packed copy cannot be written to {self._copies}: "
                f"{error.strerror or error}; set XDG_CACHE_HOME to another folder"
            ) from None

    def take(self, path: str, matrix: FrozenMatrix) -> None:
        """Write the arrays of a matrix that are there, and drop them."""
        if matrix.quant is not None:
            self._packing[path] = asdict(matrix.quant)
        arrays = {f"{path}.{name}": matrix.pop(name) for name in PARTS if name in matrix}
        try:
            mx.save_safetensors(str(self._staging / f"{min(arrays)}.safetensors"), arrays)
        except RuntimeError as error:  # the disk is full
            raise OSError(str(error)) from None
        mx.clear_cache()
