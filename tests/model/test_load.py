"""`mq.load` on a whole model folder, and the public names."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from support.models import (
    LLAMA3_ROPE,
    make_hf_model,
    our_logits,
    random_tokens,
    randomise_lora,
    torch_logits,
)
from support.tiny_folder import write_model

import mlx_qlora as mq
from mlx_qlora import errors

ROOT = Path(__file__).parents[2]
TOKENS = random_tokens(2, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("load") / "model")


# ---- load --------------------------------------------------------------------------------------


def test_a_folder_becomes_its_model_and_tokenizer(folder: Path) -> None:
    model, tokenizer = mq.load(folder)
    wanted = torch_logits(make_hf_model(rope_parameters=LLAMA3_ROPE), TOKENS)
    assert np.abs(our_logits(model, TOKENS) - wanted).max() < 1e-5
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("The fox: Zoë?")) == "The fox: Zoë?"
    assert tokenizer.adds_bos and tokenizer.bos_id == 0 and tokenizer.eos_id == 1
    again, _ = mq.load(str(folder))
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))


def test_an_adapter_is_attached(folder: Path, tmp_path: Path) -> None:
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=4))
    randomise_lora(model)
    mq.save_adapter(model, tmp_path / "a")
    for adapter in (tmp_path / "a", str(tmp_path / "a")):
        again, _ = mq.load(folder, adapter=adapter)
        np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))


def test_the_dtype_is_the_one_asked_for(folder: Path) -> None:
    for name in ("float32", "bfloat16", "float16"):
        model, _ = mq.load(folder, dtype=name, quantize=mq.QuantConfig(4, 32))
        assert str(model(mx.array(TOKENS)).dtype) == f"mlx.core.{name}"


def test_the_format_and_the_way_to_multiply_are_those_asked_for(folder: Path) -> None:
    for matmul in ("quantized", "dequantize", "resident"):
        quant = mq.QuantConfig(bits=3, group_size=32)
        up = mq.load(folder, quantize=quant, frozen_matmul=matmul)[0].layers[1].mlp.up_proj
        assert (up.quant, up.matmul) == (quant, matmul)


def test_wrong_requests_are_the_user_s_errors(folder: Path, tmp_path: Path) -> None:
    for how, words in (
        ({"dtype": "float8"}, "model.dtype must be one of 'auto'"),
        ({"frozen_matmul": "fast"}, "model.frozen_matmul must be one of 'auto'"),
        ({"quantize": mq.QuantConfig(4, 128)}, "group_size 128 does not divide the 64 columns"),
    ):
        with pytest.raises(mq.ConfigError, match=words):
            mq.load(folder, **how)
    with pytest.raises(mq.SourceError, match="no such file or folder"):
        mq.load(tmp_path / "missing")
    with pytest.raises(mq.AdapterError, match="no such folder"):
        mq.load(folder, adapter=tmp_path / "missing")
    with pytest.raises(mq.SourceError, match="leave out model"):
        mq.load(folder, revision="main")


# ---- public names ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mq.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(mq, name) is not None
    assert name in dir(mq)


def test_public_functions_stay_functions_whatever_was_imported_before() -> None:
    """`mlx_qlora.x` the module, once imported, must not take the place of `x` the function."""
    script = (
        "import mlx_qlora, mlx_qlora.cli, mlx_qlora.run, mlx_qlora.before.plan\n"
        "import mlx_qlora.infer.generate, mlx_qlora.infer.evaluate\n"
        "names = [n for n in mlx_qlora.__all__ if n != '__version__']\n"
        "print([n for n in names if not callable(getattr(mlx_qlora, n))])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = mq.lod
    with pytest.raises(ImportError):
        from mlx_qlora import nothing  # noqa: F401
    assert not hasattr(mq, "train_fast")


def test_every_error_is_a_user_error_and_a_value_error() -> None:
    names = [name for name in mq.__all__ if name.endswith("Error")]
    declared = [name for name in vars(errors) if name.endswith("Error")]
    assert sorted(names) == sorted(declared), "every error is public"
    for name in names:
        assert issubclass(getattr(mq, name), mq.UserError)
        assert issubclass(getattr(mq, name), ValueError)
