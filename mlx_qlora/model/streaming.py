"""A frozen base that is not in memory: layers are read when their turn comes, and dropped after it.

Reading a layer takes a fraction of computing it, and a thread reads the next one meanwhile: two
layers are in memory at most. Files of safetensors are read as they are. From others, and where
dense weights are to be packed, a copy is made once, in the user's cache.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qlora.errors import ConfigError, size
from mlx_qlora.folders import json_object, staged, user_cache
from mlx_qlora.model.hub import ModelFiles, sample_of
from mlx_qlora.model.quantize import PARTS, FrozenMatrix, QuantConfig
from mlx_qlora.model.stored import StoredTensor, stored_in

# ---- one layer after the other -------------------------------------------------------------------


class LayerReader:
    """Puts the matrices of a layer in their places for a while, and reads the next layer's."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = layers
        self._ahead: _Reading | None = None

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Within it the matrices of a layer are there; a graph that was built keeps its own.

        Raises:
            WeightsError: a file has changed since it was opened, or cannot be read.
        """
        reading, self._ahead = self._ahead, None
        if reading is None or reading.i != i:
            reading = _Reading(i, self._matrices(i))
        for matrix, arrays in reading.wait():
            for name, array in matrix.as_computed(arrays).items():
                matrix[name] = array
        del reading
        try:
            yield
        finally:
            for matrix in self._matrices(i):
                matrix.stack = None
                for name in PARTS:
                    matrix.pop(name, None)

    def ahead(self, i: int) -> None:
        """Begin to read a layer, if there is one of this number, and it is not under way."""
        if 0 <= i < len(self._layers) and (self._ahead is None or self._ahead.i != i):
            self._ahead = _Reading(i, self._matrices(i))

    @property
    def resident_bytes(self) -> int:
        """Size of the two layers that are in memory at most."""
        each = (sum(m.stored.nbytes for m in self._matrices(i)) for i in range(len(self._layers)))
        return sum(sorted(each)[-2:])

    def _matrices(self, i: int) -> list[Any]:
        modules = self._layers[i].modules()
        return [m for m in modules if isinstance(m, FrozenMatrix) and m.stored is not None]


def streamed_bytes(model: nn.Module) -> int:
    """Size of the matrices that are in files, in bytes."""
    matrices = (module for module in model.modules() if isinstance(module, FrozenMatrix))
    return sum(matrix.stored.nbytes for matrix in matrices if matrix.stored is not None)


class _Reading:
    """The matrices of a layer, while a thread reads them."""

    def __init__(self, i: int, matrices: list[Any]) -> None:
        self.i, self._matrices = i, matrices
        self._read: list[dict[str, mx.array]] = []
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name=f"read layer {i}", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for matrix in self._matrices:
                self._read.append(matrix.stored.read())
        except BaseException as error:
            self._error = error

    def wait(self) -> Iterator[tuple[Any, dict[str, mx.array]]]:
        """Each matrix with what was read of it, which this keeps no longer."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        read, self._read = self._read, []
        return zip(self._matrices, read)


# ---- a copy that is read layer by layer ----------------------------------------------------------

VERSION = 1  # of these files
WEIGHTS, ABOUT = "weights.bin", "about.json"  # the tensors' bytes; what and where they are
KINDS = {
    mx.uint32: "U32",
    mx.uint8: "U8",
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
}


def copies() -> Path:
    """The folder of all copies, beside that of the tokens."""
    return user_cache() / "weights"


class PackedCopy:
    """The matrices of a model as they are computed with, in a folder of the user's cache.

    It is found again by the content of the model's files, the packing and the dtype.
    """

    def __init__(self, files: ModelFiles, quantize: QuantConfig | None, dtype: mx.Dtype) -> None:
        content = sample_of(files.path, names=False).hex()
        key = hashlib.sha256(f"{VERSION} {content} {quantize} {dtype}".encode()).hexdigest()[:40]
        self.folder, self.source = copies() / key, files.source
        self._about: dict[str, Any] = {"version": VERSION, "source": files.source}
        self._about |= {"tensors": {}, "packing": {}, "size": 0}
        self._file: Any = None  # while it is written

    def find(self) -> dict[str, StoredTensor] | None:
        """The tensors by name; None if the copy is not there, or is not whole."""
        file, about = self.folder / WEIGHTS, json_object(self.folder / ABOUT)
        if not file.is_file() or about.get("size") != file.stat().st_size:
            return None
        self._about = about
        return stored_in(file, about["tensors"], 0)

    def packing(self, path: str) -> QuantConfig | None:
        """How a matrix is packed in it; None if it is dense."""
        how = self._about["packing"].get(path)
        return how and QuantConfig(**how)

    @contextmanager
    def written(self, n_bytes: int) -> Iterator[None]:
        """Within it `take` writes; the copy is there once the block has succeeded.

        Raises:
            ConfigError: the disk has no room for `n_bytes`, or cannot be written to.
        """
        try:
            copies().mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(copies()).free
            if free < n_bytes:
                raise ConfigError(
                    f"model.residency: streaming {self.source} needs a packed copy of "
                    f"{size(n_bytes)} in {copies()}, where {size(free)} are free: free some, clear "
                    "older copies with mlx-qlora cache --clear, or set XDG_CACHE_HOME to a larger "
                    "disk"
                )
            with staged(self.folder, replace=True) as staging:
                with open(staging / WEIGHTS, "wb") as self._file:
                    yield
                    self._about["size"] = self._file.tell()
                (staging / ABOUT).write_text(json.dumps(self._about), encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"model.residency: the packed copy cannot be written to {copies()}: "
                f"{error.strerror or error}; set XDG_CACHE_HOME to another folder"
            ) from None

    def take(self, path: str, matrix: FrozenMatrix) -> None:
        """Write the arrays of a matrix that are there, and drop them."""
        if matrix.quant is not None:
            self._about["packing"][path] = asdict(matrix.quant)
        for name in PARTS:
            if (array := matrix.pop(name, None)) is not None:
                start = self._file.tell()
                self._file.write(np.array(array.reshape(-1).view(mx.uint8), copy=False).data)
                self._about["tensors"][f"{path}.{name}"] = {
                    "data_offsets": [start, self._file.tell()],
                    "shape": array.shape,
                    "dtype": KINDS[array.dtype],
                }
        mx.clear_cache()
