"""A tokenizer and rows small enough for the tiny model, made on the spot."""

import json
import random
from pathlib import Path


def write_tokenizer(folder: Path, size: int = 320) -> None:
    """A byte-level BPE with an end-of-sequence token, trained on a few lines."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = ["### Instruction:\n", "### Input:\n", "### Response:\n", "count on from one two three"]
    tokenizer.train_from_iterator(lines * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|end|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|end|>"}))


def write_rows(path: Path, n: int) -> Path:
    """Alpaca rows, all different, with an easy answer."""
    draw = random.Random(0)
    rows = [
        {"instruction": "count", "input": str(draw.randrange(10**6)), "output": f"on {i % 3}"}
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
