"""A `config.json` that is not as expected is refused, or read as transformers reads it."""

import dataclasses
import sys
from pathlib import Path

import pytest
from support.families import make_family

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import config_mutations

from mlx_qlora.model.families import LlamaConfig


def test_three_hundred_changed_configs_are_refused_or_read_as_transformers_reads_them():
    """`python benchmarks/config_mutations.py` takes ten thousand."""
    found = [
        (family, change, config_mutations.verdict(config))
        for family, config, change in config_mutations.mutations(300, seed=0)
    ]
    assert [each for each in found if each[2].startswith("wrong")] == []
    # Not by refusing everything.
    assert sum(verdict == "same" for *_, verdict in found) > 90


def test_a_fact_that_is_read_wrongly_is_seen(monkeypatch):
    config = make_family("granite").config.to_dict()
    assert config_mutations.verdict(config) == "same"
    read = LlamaConfig.from_hf
    wrong = lambda given: dataclasses.replace(read(given), residual_scale=0.23)  # noqa: E731
    monkeypatch.setattr(config_mutations.LlamaConfig, "from_hf", wrong)
    assert config_mutations.verdict(config).startswith("wrong: logits are")


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("family", "changes", "expected"),
    [
        ("cwm", {"rope_parameters": None, "rope_scaling": {}}, "same"),
        ("cwm", {"rope_parameters": {}}, "same"),
        ("smollm3", {"no_rope_layer_interval": None}, "refused"),
        ("phi3", {"rope_parameters": None, "rope_scaling": LINEAR}, "refused"),
        ("phi3", {"rope_parameters": None, "rope_scaling": None}, "same"),
        ("smollm3", {"no_rope_layer_interval": 2, "no_rope_layers": None}, "same"),
    ],
)
def test_what_ten_thousand_configs_have_shown(family, changes, expected):
    config = make_family(family).config.to_dict()
    assert config_mutations.verdict({**config, **changes}).split(":")[0] == expected
