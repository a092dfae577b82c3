"""A streamed run that is killed, files that are written to meanwhile, and little memory."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support.models import randomise_lora
from support.streamed import load_as, settings, train, weights_of
from support.tiny_folder import write_random_model, write_rows, write_tokenizer

import mlx_qlora as mq
from mlx_qlora.errors import WeightsError
from mlx_qlora.folders import locked
from mlx_qlora.model.lora import LoraConfig

pytestmark = pytest.mark.filterwarnings("ignore::mlx_qlora.errors.StreamedWarning")
# The command line, killed at a certain call of what writes a packed copy, or of a micro-batch.
KILLED = """
import os, signal, sys
from mlx_qlora.cli import main
from mlx_qlora.model import streaming
from mlx_qlora.train.engine import Engine

owner, name = {"copy": (streaming.PackedCopy, "take"), "step": (Engine, "__call__")}[sys.argv[1]]
call, left = getattr(owner, name), int(sys.argv[2])

def dying(*words, **more):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return call(*words, **more)

setattr(owner, name, dying)
sys.exit(main(sys.argv[3:]))
"""
# The command line, with so many bytes of data beside what its imports and threads have taken.
LIMITED = """
import resource, sys
import mlx.core as mx
from mlx_qlora import cli, commands
from mlx_qlora.adapters import merge

mx.eval(mx.zeros((64, 64)) @ mx.zeros((64, 64)))
with open("/proc/self/status") as status:
    taken = 1024 * int(status.read().partition("VmData:")[2].split()[0])
resource.setrlimit(resource.RLIMIT_DATA, (taken + int(sys.argv[1]),) * 2)
sys.exit(cli.main(sys.argv[2:]))
"""


def python(script: str, *words: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, words)]
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of copies of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "mlx-qlora" / "weights"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_model(tmp_path_factory.mktemp("source") / "dense")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", 24)


# ---- SIGKILL -------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_bit_for_bit(
    source: Path, rows: Path, cache: Path, tmp_path: Path
) -> None:
    """Killed while the packed copy is written, again within its third step, and left alone."""
    train(source, rows, tmp_path / "whole", "resident")
    out, config = tmp_path / "out", tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings(source, rows, out, "streamed")))

    done = python(KILLED, "copy", 5, "train", "--config", config)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (half,) = cache.iterdir()
    assert half.name.startswith("."), "half a copy looks like a whole one"

    done = python(KILLED, "step", 6, "train", "--config", config)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not half.exists() and len([*cache.iterdir()]) == 1
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-2"}

    train(source, rows, out, "streamed", resume_from_checkpoint="auto")
    assert weights_of(out) == weights_of(tmp_path / "whole")


def test_whoever_needs_a_copy_waits_for_the_process_that_writes_it(
    source: Path, cache: Path
) -> None:
    cache.mkdir(parents=True)
    (cache / ".DS_Store").touch()  # which a Mac leaves wherever somebody looks
    written = "import sys; from pathlib import Path; from mlx_qlora.folders import locked\n"
    written += "with locked(Path(sys.argv[1]), wait=True): pass"
    words = [sys.executable, "-c", written, str(cache)]
    with locked(cache):
        other = subprocess.Popen(words)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(2)
    assert other.wait(60) == 0
    load_as("streamed", source)
    assert len([*cache.iterdir()]) == 1


# ---- content that changes ------------------------------------------------------------------------


def rewrite(file: Path) -> None:
    """Flip a bit of the last layer's weights in place, and set back the time of the change."""
    status = file.stat()
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        entry = json.loads(stream.read(length))["model.layers.1.mlp.up_proj.weight"]
        stream.seek(8 + length + entry["data_offsets"][0])
        byte = stream.read(1)[0]
        stream.seek(-1, 1)
        stream.write(bytes([byte ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def link(file: Path) -> None:
    """What a backup does, say."""
    file.chmod(0o600)
    file.with_suffix(".backup").hardlink_to(file)


@pytest.mark.parametrize(("act", "is_error"), [(rewrite, True), (link, False)])
def test_the_content_decides_whether_a_file_has_changed(
    source: Path, tmp_path: Path, act: Callable[[Path], None], is_error: bool
) -> None:
    folder = write_random_model(tmp_path / "model")
    model = load_as("streamed", folder, None)
    reader = model.model.reader
    assert reader is not None
    with reader.layer(1):
        pass
    act(folder / "model.safetensors")
    if not is_error:
        with reader.layer(1):
            return
    with pytest.raises(WeightsError, match=r"any more: its content has changed.* restore the file"):
        with reader.layer(1):
            pass


# ---- merging in little memory --------------------------------------------------------------------


def write_zeros(folder: Path, layers: int) -> int:
    """A dense model in float32 whose file is one hole; its size in bytes."""
    write_tokenizer(folder, chat=True)
    D, F, V = 512, 2048, 320
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V}
    config |= {"hidden_size": D, "intermediate_size": F, "num_hidden_layers": layers}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 1e4, "max_position_embeddings": 512, "tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (V, D), "model.norm": (D,)}
    for i in range(layers):
        linears = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"}
        linears |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        linears |= {"input_layernorm": (D,), "post_attention_layernorm": (D,)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in linears.items()}
    header, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        offsets = [end, end := end + 4 * int(np.prod(shape))]
        header[f"{name}.weight"] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others limit no process's data")
def test_a_model_larger_than_the_memory_is_merged(tmp_path: Path) -> None:
    allowed = 110 << 20
    assert write_zeros(tmp_path / "model", 14) > 2 * allowed
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = load_as("streamed", tmp_path / "model", None, lora=lora)
    randomise_lora(model)
    mq.save_adapter(model, tmp_path / "adapter")
    merge = (
        "merge",
        "--model",
        tmp_path / "model",
        "--adapter",
        tmp_path / "adapter",
        "model.bits=null",
    )
    codes, said = {}, ""
    for residency in ("resident", "streamed"):
        out = "--output-dir", tmp_path / residency, f"model.residency={residency}"
        done = python(LIMITED, allowed, *merge, *out)
        codes[residency], said = done.returncode, done.stderr
    assert codes["streamed"] == 0, said
    assert codes["resident"] != 0, "the limit is none"
    assert not (tmp_path / "resident").exists() and (tmp_path / "streamed").is_dir()
