"""Tensors that stay in their files, and are read when they are needed.

By plain reads and not by a mapping: a mapped file that gets shorter ends the process, and its pages
count as the process's memory.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError

# safetensors' names of dtypes -> NumPy's, which has no bfloat16.
NUMPY = {"U32": np.uint32, "U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
Stamp = tuple[int, int, int]  # a file's number, size in bytes and time of the last change in ns
Rows = tuple[int, int] | np.ndarray  # the first one and the one after the last; or their numbers


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes are, row after row."""

    path: Path
    start: int  # its first byte in the file
    shape: tuple[int, ...]
    kind: str  # safetensors' name of its dtype
    stamp: Stamp  # of the file when it was opened

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * np.dtype(NUMPY[self.kind]).itemsize

    def read(self, rows: Rows | None = None) -> mx.array:
        """The tensor, or some of its rows; bfloat16 as the uint16 of its bits.

        May be called in any thread.

        Raises:
            WeightsError: the file has changed since it was opened, or cannot be read.
        """
        if rows is None:
            rows = 0, self.shape[0]
        n = len(rows) if isinstance(rows, np.ndarray) else rows[1] - rows[0]
        content = np.empty((n, *self.shape[1:]), NUMPY[self.kind])
        row = self.nbytes // self.shape[0]
        with self._opened() as file:
            if isinstance(rows, np.ndarray):
                for into, number in zip(content, rows.tolist()):
                    self._fill(file, self.start + number * row, into)
            else:
                self._fill(file, self.start + rows[0] * row, content)
        return mx.array(content)

    def as_float(self, array: mx.array) -> mx.array:
        """What `read` returned, in the tensor's own dtype."""
        return array.view(mx.bfloat16) if self.kind == "BF16" else array

    @contextmanager
    def _opened(self) -> Iterator[int]:
        try:
            file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._lost(error.strerror) from None
        try:
            if stamp_of(file) != self.stamp:
                raise self._lost("it has changed since it was opened")
            yield file
        finally:
            os.close(file)

    def _fill(self, file: int, offset: int, into: np.ndarray) -> None:
        view = into.data.cast("B")
        while view:
            try:
                n = os.preadv(file, [view], offset)
            except OSError as error:
                raise self._lost(error.strerror) from None
            if n == 0:
                raise self._lost("it is truncated")
            view, offset = view[n:], offset + n

    def _lost(self, why: str | None) -> WeightsError:
        return WeightsError(
            f"{self.path} cannot be read any more: {why}. The model is streamed from there "
            "(model.residency): put the file back as it was and start again"
        )


@dataclass(frozen=True)
class StoredMatrix:
    """A frozen matrix in a file: `weight`, and `scales` and `biases` of a packed one."""

    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, rows: Rows | None = None) -> dict[str, mx.array]:
        """What `StoredTensor.read` returns of each part."""
        return {name: tensor.read(rows) for name, tensor in self.tensors.items()}


def stamp_of(file: int | Path) -> Stamp:
    """What changes when a file does."""
    found = os.stat(file)
    return found.st_ino, found.st_size, found.st_mtime_ns


def stored_in(path: Path, header: dict[str, Any], start: int) -> dict[str, StoredTensor]:
    """The tensors of a file by name, from a header as safetensors has it.

    Args:
        start: where the data begins, in bytes.
    """
    stamp = stamp_of(path)
    return {
        name: StoredTensor(
            path, start + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"], stamp
        )
        for name, entry in header.items()
    }
