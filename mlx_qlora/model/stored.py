"""Tensors that stay in their files, and are read when they are needed.

By plain reads and not by a mapping: a mapped file that gets shorter ends the process, and its pages
count as the process's memory.
"""

import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_qlora.errors import UserError, WeightsError
from mlx_qlora.model.hub import check_readable
from mlx_qlora.readers import parse_json

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
    stamp: Stamp = (0, 0, 0)  # of the file when it was opened
    name: str = ""
    # The checksum of all its bytes, and the file's ctime (ns) when it was last computed.
    checked: dict[str, int] = field(default_factory=dict, compare=False)

    @property
    def nbytes(self) -> int:
        """Its size in the file."""
        return int(np.prod(self.shape)) * np.dtype(NUMPY[self.kind]).itemsize

    def read(self, rows: np.ndarray | None = None) -> mx.array:
        """The tensor, or the rows of some numbers; bfloat16 as the uint16 of its bits.

        May be called in any thread.

        Raises:
            WeightsError: the file has changed since it was opened, or cannot be read; or a number
                is NaN or infinite, which is looked for once.
        """
        whole, rows = rows is None, np.arange(self.shape[0]) if rows is None else rows
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
                if whole:
                    self._check(content, os.stat(file).st_ctime_ns)
            finally:
                os.close(file)
        except (OSError, EOFError) as error:
            why = getattr(error, "strerror", None) or error
            raise WeightsError(
                f"{self.path} cannot be read any more: {why}, and the model is read from there "
                "during the run; restore the file and start again"
            ) from None
        return array

    def _check(self, content: np.ndarray, ctime: int) -> None:
        """Compare the content with what was read first, if the file may have been written to.

        A program can set back the time of the last change, but not ctime. That changes with a
        file's mode or number of links as well, so that the content decides. A checksum each time
        would take as long as a fast device computes (docs/log.md).
        """
        if self.checked.get("ctime") != ctime:
            checksum = zlib.crc32(content.data)
            if "checksum" not in self.checked and not _is_finite(content, self.kind):
                raise _not_finite(self.name, self.path)
            if self.checked.setdefault("checksum", checksum) != checksum:
                raise EOFError("its content has changed")
            self.checked["ctime"] = ctime


def _is_finite(content: np.ndarray, kind: str) -> bool:
    """Whether no number is NaN or infinite, seen piece by piece, as the whole may be large."""
    flat = content.reshape(-1)
    for piece in (flat[at : at + (1 << 20)] for at in range(0, flat.size, 1 << 20)):
        if kind == "BF16":
            piece = (piece.astype(np.uint32) << 16).view(np.float32)
        if piece.dtype.kind == "f" and not np.isfinite(piece).all():
            return False
    return True


def _not_finite(name: str, path: Path, error: type[UserError] = WeightsError) -> UserError:
    return error(f"{name} in {path} holds NaN or infinite numbers; fetch or write it again")


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

    def read(self, rows: np.ndarray | None = None) -> list[mx.array]:
        """What `StoredTensor.read` returns of each part, in any thread."""
        return [tensor.read(rows) for tensor in self.tensors.values()]


def stamp_of(file: int | Path) -> Stamp:
    """What changes when a file does."""
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def check_finite(
    name: str, path: Path, *arrays: mx.array, error: type[UserError] = WeightsError
) -> None:
    """Refuse numbers that are NaN or infinite, of a tensor that is in memory anyway."""
    for array in arrays:
        if not mx.issubdtype(array.dtype, mx.floating):
            mx.eval(array)
        # Both keep NaN, and need no array of the same size.
        elif array.size and not mx.isfinite(mx.stack([array.max(), array.min()])).all().item():
            raise _not_finite(name, path, error)


def tensors_in(path: Path, error: type[Exception]) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, from its header.

    Raises:
        `error`, a class from `mlx_qlora.errors`, if the file cannot be read, or is damaged.
    """
    check_readable(path, error)
    try:
        stamp = stamp_of(path)
        with safe_open(path, "numpy"), path.open("rb") as file:  # the first refuses what is damaged
            start = 8 + int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(start - 8))
    except (OSError, SafetensorError, ValueError) as problem:
        raise error(f"{path} is damaged ({problem}); fetch or write it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path, start + of["data_offsets"][0], tuple(of["shape"]), of["dtype"], stamp, name
        )
        for name, of in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
