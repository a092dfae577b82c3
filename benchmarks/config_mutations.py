"""A `config.json` that is not as expected is refused, or read as transformers reads it.

Run as: python benchmarks/config_mutations.py --configs 10000

Configs of all families, in both spellings of RoPE, get one to three changes: a field is dropped,
set to null, renamed, or set to another legal or illegal value. The claim, of each: ours refuses it
with a WeightsError, or its logits are those of transformers with the same weights; where
transformers cannot build or run the model, ours refuses. Nothing else may happen.
"""

import argparse
import copy
import json
import random
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora import device
from mlx_qlora.errors import WeightsError
from mlx_qlora.model.llama import LlamaConfig, LlamaForCausalLM
from mlx_qlora.tree import flat, nested

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

T, CLOSE = 24, 5e-5
VALUES = [0, 1, 2, 3, 4, 7, 16, 64, -1, 1.0, 0.5, 1e-5, 10000.0, True, False, None, "", "silu"]
VALUES += ["gelu", "gelu_pytorch_tanh", "relu", "4", [], {}, [1, 2], ["full_attention"] * 4]
VALUES += [["sliding_attention"] * 4, {"rope_type": "linear", "factor": 2.0}, "full_attention"]
VALUES += [{"rope_type": "yarn", "factor": 4.0}, {"type": "dynamic", "factor": 2.0}, 1e30, 2**40]
# What is not about the arithmetic of a text: files, ids, training, and transformers' own matters.
LEFT_OUT = {
    *("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "eod_token_id", "dtype"),
    *("initializer_range", "transformers_version", "use_cache", "torch_dtype", "pretraining_tp"),
    *("attention_dropout", "residual_dropout", "embd_pdrop", "resid_pdrop", "model_type"),
    *("chunk_size_feed_forward", "output_attentions", "output_hidden_states", "return_dict"),
    *("is_encoder_decoder", "id2label", "label2id", "problem_type", "_name_or_path"),
    # More of these only take longer.
    *("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size"),
}


def main() -> None:
    """Tries configs, prints how often each thing happened, and asserts that nothing else did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=10_000, type=int)
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    start, counts, wrong = time.perf_counter(), Counter[str](), []
    for family, config, change in mutations(args.configs, args.seed):
        found = verdict(config)
        counts[found.split(":")[0]] += 1
        if found.startswith("wrong"):
            wrong.append(f"{family}, {change}: {found}")
            print(wrong[-1], flush=True)
    results = {**counts, "seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps({"benchmark": "config_mutations", **vars(args), **device.facts(), **results}))
    assert not wrong, f"{len(wrong)} configs are read otherwise than by transformers"


def mutations(n: int, seed: int) -> list[tuple[str, dict[str, Any], str]]:
    """Family, config and what was changed, of so many configs."""
    from support.families import FAMILIES, make_family

    draw, made = random.Random(seed), []
    configs = {name: json.loads(make_family(name).config.to_json_string()) for name in FAMILIES}
    while len(made) < n:
        name = draw.choice([*FAMILIES])
        config = copy.deepcopy(configs[name])
        if draw.random() < 0.5:  # transformers 4's spelling
            config.pop("rope_parameters", None)
            old = {k: v for k, v in FAMILIES[name].items() if k.startswith("rope_")}
            config |= copy.deepcopy(old)
        changes = [_change(config, draw) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))]
        made.append((name, config, "; ".join(changes) or "nothing"))
    return made


def _change(config: dict[str, Any], draw: random.Random) -> str:
    fields = sorted(config.keys() - LEFT_OUT)
    place, name = config, draw.choice([*fields, "rope_theta", "rope_scaling", "head_dim"])
    while isinstance(place.get(name), dict) and place[name] and draw.random() < 0.7:
        place, name = place[name], draw.choice(sorted(place[name]))
    what = draw.choice(["drop", "rename", "set", "set", "set"])
    if what == "set":
        value = draw.choice(VALUES)
        place[name] = copy.deepcopy(value)
        return f"{name} = {value!r}"
    value = place.pop(name, None)
    if what == "rename":
        place[f"{name}_"] = value
    return f"{what} {name}"


def verdict(config: dict[str, Any]) -> str:
    """`refused`, `same`, or `wrong: ` and why."""
    try:
        ours = LlamaConfig.from_hf(copy.deepcopy(config))
    except WeightsError:
        return "refused"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {error}"
    tokens = np.random.default_rng(0).integers(0, 300, (1, T))
    try:
        theirs, logits = _transformers(config, tokens)
    except Exception as error:
        return f"wrong: transformers raises {type(error).__name__}: {str(error)[:80]}"
    model = LlamaForCausalLM(ours)
    shapes = {name: tuple(x.shape) for name, x in flat(model.parameters()).items()}
    given = {n: x for n, x in theirs.items() if n != "lm_head.weight" or n in shapes}
    if {name: tuple(x.shape) for name, x in given.items()} != shapes:
        return "refused"  # by the loader, which compares names and shapes
    model.update(nested({name: mx.array(x) for name, x in given.items()}))
    found = np.array(model(mx.array(tokens)))
    gap = float(np.abs(found - logits).max() / max(logits.std(), 1e-9))
    return "same" if gap < CLOSE else f"wrong: logits are {gap:.1e} apart"


def _transformers(
    config: dict[str, Any], tokens: np.ndarray
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        given = copy.deepcopy(config)
        made = transformers.AutoConfig.for_model(given.pop("model_type"), **given)
        torch.manual_seed(0)
        how = {"attn_implementation": "eager"}
        model = transformers.AutoModelForCausalLM.from_config(made, **how).float().eval()
        for weight in model.parameters():
            drawn = torch.randn_like(weight)
            weight.copy_(weight + 0.2 * drawn if weight.ndim == 1 else 0.1 * drawn)
        logits = model(torch.from_numpy(tokens)).logits.numpy()
    if not np.isfinite(logits).all():
        raise ValueError("logits are not finite")
    return {name: x.numpy() for name, x in model.state_dict().items()}, logits


if __name__ == "__main__":
    main()
