"""What tests of a model's files share: a tiny model, and a copy of it to change."""

import shutil
from pathlib import Path

import pytest
from support.tiny_folder import write_random_model


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("plain") / "model")


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "model"))
