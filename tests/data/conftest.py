"""Tokenizers that the tests of data share: byte-level BPEs of 320 ids."""

import pytest
from support.tiny_folder import write_tokenizer

from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="session")
def without_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), bos=False))


@pytest.fixture(scope="session")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """One with a chat template, support.tiny_folder.CHAT."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer"), chat=True))
