"""What the tests of adapters share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def base(hf_tiny: tuple[Any, Path]) -> Path:
    """The folder of the tiny model that adapters are made for."""
    return hf_tiny[1]
