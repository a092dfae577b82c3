"""mlx-lm itself opens the copy in `mlx/` and computes our logits."""

import html
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.adapters import move
from support.models import our_logits, random_tokens, randomise_lora
from support.tiny_folder import write_model, write_random_model, write_rows

import mlx_qlora as mq
from mlx_qlora.adapters.peft import save_mlx_lm
from mlx_qlora.cli import main
from mlx_qlora.tree import flat

TOKENS = random_tokens(2, 21)
RANKS = {"q_proj": 8, "1.mlp.up_proj": 2}
ALPHAS = {"v_proj": 3.5, r"model\.layers\.0\.mlp\..*": 11, "q_proj": 5}
CONFIGS = {
    "default": mq.LoraConfig(),
    "rslora": mq.LoraConfig(r=4, lora_alpha=6, use_rslora=True),
    "one layer": mq.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[0]),
    "one regex": mq.LoraConfig(r=4, target_modules=r"model\.layers\.1\..*(k|down)_proj"),
    "all-linear": mq.LoraConfig(r=2, lora_alpha=3.5, target_modules="all-linear"),
    "ranks and alphas": mq.LoraConfig(r=4, rank_pattern=RANKS, alpha_pattern=ALPHAS),
    "rslora, ranks": mq.LoraConfig(r=4, use_rslora=True, rank_pattern=RANKS),
    "dora": mq.LoraConfig(r=4, lora_alpha=6, use_dora=True),
    "dora, all at once": mq.LoraConfig(
        r=4,
        use_dora=True,
        use_rslora=True,
        rank_pattern=RANKS,
        alpha_pattern=ALPHAS,
        init_lora_weights="pissa",
    ),
    "dora, one layer": mq.LoraConfig(
        r=4, use_dora=True, target_modules=["k_proj", "down_proj"], layers_to_transform=[1]
    ),
    "pissa": mq.LoraConfig(r=4, init_lora_weights="pissa"),
    "olora, ranks": mq.LoraConfig(r=4, init_lora_weights="olora", rank_pattern=RANKS),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mlx_lm") / "model")


@pytest.mark.parametrize("name", CONFIGS)
def test_mlx_lm_computes_our_logits(folder: Path, tmp_path: Path, name: str) -> None:
    import mlx_lm

    model, _ = mq.load(folder)
    without = our_logits(model, TOKENS)
    move(mq.add_lora(model, CONFIGS[name]))
    mq.save_adapter(model, tmp_path / "a")
    theirs = mlx_lm.load(str(folder), adapter_path=str(tmp_path / "a" / "mlx"))[0]
    logits = np.array(theirs(mx.array(TOKENS)))
    assert np.abs(logits - our_logits(model, TOKENS)).max() < 1e-5
    assert np.abs(logits - without).max() > 0.01


# ---- in ----------------------------------------------------------------------------------------


def made_by_mlx_lm(folder: Path, adapter: Path, kind: str, **parameters: Any) -> Any:
    """mlx-lm's model with an adapter of its own, as its trainer leaves one behind."""
    import mlx_lm
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = mlx_lm.load(str(folder))[0]
    model.freeze()
    layers = parameters.pop("num_layers", 2)
    settings = {"rank": 4, "scale": 2.5, "dropout": 0.0, **parameters}
    linear_to_lora_layers(model, layers, settings, use_dora=kind == "dora")
    moved = tree_map(
        lambda w: w + 0.05 * mx.random.normal(w.shape, key=mx.random.key(w.size)),
        model.trainable_parameters(),
    )
    model.update(moved)
    adapter.mkdir()
    mx.save_safetensors(
        str(adapter / "adapters.safetensors"), dict(tree_flatten(model.trainable_parameters()))
    )
    config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": settings}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"keys": ["self_attn.q_proj", "mlp.down_proj"]},
        {"keys": ["self_attn.v_proj"], "num_layers": 1, "rank": 2, "scale": 20.0},
    ],
)
def test_an_adapter_of_mlx_lm_computes_the_same_here_and_goes_on(
    folder: Path, tmp_path: Path, kind: str, parameters: dict[str, Any]
) -> None:
    theirs = made_by_mlx_lm(folder, tmp_path / "theirs", kind, **parameters)
    wanted = np.array(theirs(mx.array(TOKENS)))
    model, _ = mq.load(folder, adapter=tmp_path / "theirs")
    assert np.abs(our_logits(model, TOKENS) - wanted).max() < 1e-5
    batch = mq.Batch(mx.array(TOKENS[:, :-1]), mx.array(TOKENS[:, 1:]), None)
    loss, _, grads = mq.loss_and_grads(model, batch)
    assert mx.isfinite(loss).item() and len(flat(grads)) == len(flat(model.trainable_parameters()))

    # From here it is an adapter like any other: PEFT's format, and mlx-lm's again.
    mq.save_adapter(model, tmp_path / "ours", base_model_name_or_path="org/base")
    again, _ = mq.load(folder, adapter=tmp_path / "ours")
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))
    first = load_file(tmp_path / "theirs" / "adapters.safetensors")
    second = load_file(tmp_path / "ours" / "mlx" / "adapters.safetensors")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_what_is_wrong_with_mlx_lms_adapter_is_said_in_its_own_names(
    folder: Path, tmp_path: Path
) -> None:
    made_by_mlx_lm(folder, tmp_path / "a", "lora")
    file = tmp_path / "a" / "adapters.safetensors"
    good = load_file(file)
    names = sorted(good)
    bad = {name: array for name, array in good.items() if name != names[0]}
    bad[names[3]] = np.ascontiguousarray(bad[names[3]].T)
    bad["model.layers.0.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    save_file(bad, file)
    with pytest.raises(mq.AdapterError) as caught:
        mq.load(folder, adapter=tmp_path / "a")
    assert all(word in str(caught.value) for word in (f"{names[0]} is missing", names[3]))
    assert "mlp.up_proj.weight belongs to no target" in str(caught.value)

    save_file(good, file)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(config | {"fine_tune_type": "full"})
    )
    with pytest.raises(mq.AdapterError, match="fine_tune_type is 'full'; supported: lora, dora"):
        mq.load(folder, adapter=tmp_path / "a")


def test_mlx_lms_form_alone_goes_beside_no_peft_adapter(folder: Path, tmp_path: Path) -> None:
    model, _ = mq.load(folder)
    mq.add_lora(model, mq.LoraConfig(r=2))
    randomise_lora(model)
    save_mlx_lm(model, tmp_path / "alone")
    assert sorted(path.name for path in (tmp_path / "alone").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    again, _ = mq.load(folder, adapter=tmp_path / "alone")
    np.testing.assert_array_equal(our_logits(again, TOKENS), our_logits(model, TOKENS))
    mq.save_adapter(model, tmp_path / "peft")
    with pytest.raises(mq.AdapterError, match="holds a PEFT adapter already"):
        save_mlx_lm(model, tmp_path / "peft")


# ---- what mlx-lm reads of the base ---------------------------------------------------------------

LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, '"rope_theta": 500000'),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}}, '"rope_scaling": {"rope_type": "lin'),
        ({"rope_parameters": {**LINEAR, "rope_theta": 1e4}, "rope_theta": 1e4}, '"rope_scaling"'),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ""),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}, ""),
        ({"rope_theta": 5e5}, ""),
        ({"rope_theta": 1e4, "rope_scaling": LINEAR}, ""),
    ],
)
def test_what_mlx_lm_would_misread_of_the_base_is_said_where_its_command_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any], words: str
) -> None:
    from mlx_lm import utils

    base = write_random_model(tmp_path / "model", **{"rope_theta": None, **config})
    full = json.loads((base / "config.json").read_text())
    path = base / "config.json"
    path.write_text(json.dumps({k: v for k, v in full.items() if v is not None}))
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    words_of_run = [
        "--model",
        str(base),
        "--data",
        str(rows),
        "--output-dir",
        str(tmp_path / "out"),
    ]
    assert main(["train", *words_of_run, "--max-steps", "1", "model.bits=null"]) == 0
    page = html.unescape((tmp_path / "out" / "report.html").read_text())
    export = ["export", "--mlx", "--adapter", str(tmp_path / "out"), "--output-dir"]
    capsys.readouterr()
    assert main([*export, str(tmp_path / "mlx")]) == 0
    shown = capsys.readouterr().out
    said = "mlx-lm 0.32 does not read the base's rope_parameters"
    assert (said in shown) == (said in page) == bool(words)
    assert words in shown and words in page
    card = (tmp_path / "out" / "README.md").read_text()
    assert (said in card) == bool(words) and words in card
    assert main([*export, str(tmp_path / "mlx")]) == 0  # a note in its config hides no owner

    # mlx-lm itself: our logits, exactly if nothing was said; and as `merge` writes it, always.
    model, tokens = mq.load(base)[0], np.arange(40)[None] % 300
    wanted = our_logits(model, tokens)
    theirs = np.array(utils.load_model(base)[0](mx.array(tokens)))
    assert (np.abs(theirs - wanted).max() < 1e-4) == (not words)
    merge = ["merge", "--adapter", str(tmp_path / "out"), "--output-dir", str(tmp_path / "merged")]
    assert main([*merge, "--save-dtype", "float32"]) == 0
    merged = np.array(utils.load_model(tmp_path / "merged")[0](mx.array(tokens)))
    assert np.abs(merged - our_logits(mq.load(tmp_path / "merged")[0], tokens)).max() < 1e-4
