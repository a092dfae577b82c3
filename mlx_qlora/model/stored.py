"""Tensors that stay in their files, and are read when they are needed.

By plain reads and not by a mapping: a mapped file that gets shorter ends the process, and its pages
count as the process's memory.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import WeightsError

# safetensors' names of dtypes -> NumPy's, which has no bfloat16.
NUMPY = {"U32": np.uint32, "U8": np.uint8, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
Stamp = tuple[int, int, int]  # a file's number, size in bytes and time of the last change in ns


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

    def read(self, rows: np.ndarray | None = None) -> mx.array:
        """The tensor, or the rows of some numbers; bfloat16 as the uint16 of its bits.

        May be called in any thread.

        Raises:
            WeightsError: the file has changed since it was opened, or cannot be read.
        """
        rows = np.arange(self.shape[0]) if rows is None else rows
        # Of pages that are not there yet, so that the only copy in memory is MLX's.
        array = mx.array(np.empty((len(rows), *self.shape[1:]), NUMPY[self.kind]))
        content, row = np.array(array, copy=False), self.nbytes // self.shape[0]
        ends = [*np.flatnonzero(np.diff(rows) != 1) + 1, len(rows)]  # of rows in a row
        try:
            file = os.open(self.path, os.O_RDONLY)
            try:
                if stamp_of(file) != self.stamp:
                    raise EOFError("it has changed since it was opened")
                for first, end in zip([0, *ends], ends):
                    _read_into(file, self.start + int(rows[first]) * row, content[first:end])
            finally:
                os.close(file)
        except (OSError, EOFError) as error:
            why = getattr(error, "strerror", None) or error
            raise WeightsError(
                f"{self.path} cannot be read any more: {why}. The model is streamed from there "
                "(model.residency): put the file back as it was and start again"
            ) from None
        return array


def _read_into(file: int, offset: int, into: np.ndarray) -> None:
    view = into.data.cast("B")
    while view:
        n = os.preadv(file, [view], offset)
        if n == 0:
            raise EOFError("it is truncated")
        view, offset = view[n:], offset + n


@dataclass(frozen=True)
class StoredMatrix:
    """A frozen matrix in a file: `weight`, and `scales` and `biases` of a packed one."""

    tensors: dict[str, StoredTensor]

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def read(self, rows: np.ndarray | None = None) -> dict[str, mx.array]:
        """What `StoredTensor.read` returns of each part."""
        return {name: tensor.read(rows) for name, tensor in self.tensors.items()}


def stamp_of(file: int | Path) -> Stamp:
    """What changes when a file does."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def stored_in(path: Path, header: dict[str, Any], start: int) -> dict[str, StoredTensor]:
    """The tensors of a file by name, from a header as safetensors has it.

    Args:
        start: where the data begins, in bytes.
    """
    stamp, tensors = stamp_of(path), {}
    for name, entry in header.items():
        place = start + entry["data_offsets"][0]
        tensors[name] = StoredTensor(path, place, tuple(entry["shape"]), entry["dtype"], stamp)
    return tensors
