"""What tests of killed and interrupted runs share."""

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import forked


@pytest.fixture(scope="session")
def warm() -> Iterator[ProcessPoolExecutor]:
    """A process that has imported everything, from which commands are forked."""
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, fresh, initializer=forked.warm) as pool:
        yield pool
