"""Limits that stand for a full disk, and chunks so small that workers get some."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from mlx_qlora.data import encode


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Limits the size of any file, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def small_chunks(size: int) -> Iterator[None]:
    """Chunks of so many bytes, and workers, where there are some, after the first of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "CHUNK_BYTES", size)
        patch.setattr(encode, "BEFORE_WORKERS", 1)
        yield
