"""The trainers that `train_speed.py` compares, each from the same weights on the same batches.

Run by it in a process of its own: python trainers.py NAME BATCHES.json
"""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

RANK, ALPHA, RATE = 16, 32, 1e-4
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODEL = "smollm2-135m"
Document = tuple[list[int], list[bool]]  # token ids, and which of them are learned
Batches = list[list[Document]]


@dataclass
class Found:
    """What a trainer did in its second pass over the batches.

    Attributes:
        seconds: of the pass.
        positions: that were computed, padding included.
        base_bytes: resident before training.
        peak_bytes: at most resident.
        losses: mean of each batch, of the first pass.
    """

    seconds: float
    positions: int
    base_bytes: int
    peak_bytes: int
    losses: list[float]


def main() -> None:
    """Trains, and prints the figures as JSON."""
    name, file = sys.argv[1:]
    print(json.dumps(asdict(TRAINERS[name](json.loads(Path(file).read_text())))))


def ours(recompute: str, frozen_matmul: str = "auto") -> Any:
    """Our engine and optimiser."""

    def train(batches: Batches) -> Found:
        import mlx.core as mx

        import mlx_qlora as mq
        from mlx_qlora import device
        from mlx_qlora.cpu import blas
        from mlx_qlora.train.engine import Engine
        from mlx_qlora.train.optim import AdamW

        model = our_model(device.frozen_matmul(frozen_matmul))
        base = mx.get_active_memory()
        mq.add_lora(model, mq.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0))
        engine = Engine(model, recompute, compiled=False)
        optimizer = AdamW(model.trainable_parameters())
        made = own_rows(batches)
        engine.limit_memory(max(([len(ids) - 1 for ids, _ in b] for b in batches), key=sum))

        def step(batch: mq.Batch) -> float:
            loss, n, grads = engine(optimizer.named(optimizer.weights), batch)
            norm = optimizer.update(grads, n, RATE)
            mx.eval(loss, norm, optimizer.weights, optimizer.mean, optimizer.square)
            return loss.item() / n

        mx.reset_peak_memory()
        with blas.threads(1):  # as around a run of the training loop
            seconds, losses = two_passes(step, made)
        positions = sum(batch.real_tokens for batch in made)
        return Found(seconds, positions, base, mx.get_peak_memory(), losses)

    return train


def our_model(matmul: Any) -> Any:
    """SmolLM2 in float32, its frozen matrices kept as the strategy wants it."""
    import mlx.core as mx

    from mlx_qlora.model.hub import resolve
    from mlx_qlora.model.weights import load_model, open_checkpoint

    return load_model(open_checkpoint(resolve(MODEL)), None, mx.float32, matmul)


def own_rows(batches: Batches) -> list[Any]:
    """Each document in a row of its own."""
    from mlx_qlora.data.batches import collate

    return [collate([example(document) for document in batch]) for batch in batches]


def example(document: Document) -> Any:
    """A document as the library's data floor hands it on."""
    from mlx_qlora.data.examples import Example

    ids, learned = document
    return Example(np.array(ids), np.array(learned), "")


def mlx_lm(checkpointing: bool) -> Any:
    """mlx-lm's trainer with its own padding, LoRA on every layer."""

    def train(batches: Batches) -> Found:
        import mlx.core as mx
        import mlx.optimizers
        from mlx_lm.models.llama import Model, ModelArgs
        from mlx_lm.tuner import trainer, utils
        from mlx_lm.tuner.callbacks import TrainingCallback

        source = our_model("resident")
        weights = dense_weights(source)
        model = Model(ModelArgs.from_dict(source.hf_config))
        model.load_weights(list(weights.items()))
        del source, weights
        mx.eval(model.parameters())
        model.freeze()
        base = mx.get_active_memory()
        linears = {f"{'mlp' if n in LINEARS[4:] else 'self_attn'}.{n}" for n in LINEARS}
        settings = {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0, "keys": linears}
        utils.linear_to_lora_layers(model, len(model.layers), settings)

        # (ids, where the answer begins): mlx-lm learns from there to the end, and a pad token.
        rows = [[(ids, learned.index(True)) for ids, learned in batch] for batch in batches]

        def in_order(*_: Any, batch_size: int, max_seq_length: int, **__: Any) -> Iterator[Any]:
            for batch in [*rows, *rows]:
                yield from trainer.iterate_batches(batch, batch_size, max_seq_length)

        times, losses = [], []

        class Watch(TrainingCallback):
            def on_train_loss_report(self, info: dict[str, Any]) -> None:
                times.append(time.perf_counter())
                losses.append(info["train_loss"])

        longest = max(len(ids) for batch in batches for ids, _ in batch)
        arguments = trainer.TrainingArgs(
            batch_size=len(batches[0]),
            iters=2 * len(batches),
            steps_per_report=1,
            steps_per_save=10**9,
            max_seq_length=longest + 32,
            adapter_file="/dev/null",
            grad_checkpoint=checkpointing,
        )
        mx.reset_peak_memory()
        trainer.mx.save_safetensors = lambda *_, **__: None  # its last adapter is of no interest
        trainer.train(
            model,
            mlx.optimizers.AdamW(RATE),
            rows[0],
            args=arguments,
            iterate_batches=in_order,
            training_callback=Watch(),
        )
        widths = [1 + -(-max(len(ids) for ids, _ in batch) // 32) * 32 for batch in batches]
        positions = sum(width * len(batch) for width, batch in zip(widths, batches))
        n = len(batches)
        return Found(times[-1] - times[n - 1], positions, base, mx.get_peak_memory(), losses[:n])

    return train


def dense_weights(model: Any) -> dict[str, Any]:
    """Hugging Face's names -> dense arrays, of our model without LoRA layers."""
    from mlx_qlora.model.quantize import FrozenMatrix
    from mlx_qlora.tree import flat

    matrices = {p: m for p, m in model.named_modules() if isinstance(m, FrozenMatrix)}
    norms = {k: v for k, v in flat(model.parameters()).items() if "norm" in k}
    return norms | {f"{path}.weight": matrix.dense() for path, matrix in matrices.items()}


def torch_peft(batches: Batches) -> Found:
    """A plain torch loop with PEFT's LoRA; memory is the process's resident set."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    source = our_model("resident")
    weights = {k: torch.from_numpy(np.array(v)) for k, v in dense_weights(source).items()}
    model = LlamaForCausalLM(LlamaConfig(**source.hf_config))
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    del source, weights
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS))
    model = get_peft_model(model, lora)
    model.train()
    base = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    made = []
    for batch in batches:
        width = max(len(ids) for ids, _ in batch)
        ids, labels = torch.zeros(2, len(batch), width, dtype=torch.long)
        mask = torch.zeros(len(batch), width, dtype=torch.long)
        labels.fill_(-100)
        for row, (tokens, learned) in enumerate(batch):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            wanted = [token if is_learned else -100 for token, is_learned in zip(tokens, learned)]
            labels[row, : len(tokens)] = torch.tensor(wanted)
        made.append((ids, mask, labels))

    def step(batch: Any) -> float:
        ids, mask, labels = batch
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    seconds, losses = two_passes(step, made)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    return Found(seconds, sum(ids.numel() for ids, _, _ in made), base, peak, losses)


def two_passes(step: Callable[[Any], float], batches: list[Any]) -> tuple[float, list[float]]:
    """Seconds of the second pass, losses of the first."""
    losses = [step(batch) for batch in batches]
    start = time.perf_counter()
    for batch in batches:
        step(batch)
    return time.perf_counter() - start, losses


TRAINERS: dict[str, Callable[[Batches], Found]] = {
    "ours": ours("none"),
    "ours, recompute": ours("all"),
    "ours, 4-bit base only": ours("all", frozen_matmul="dequantize"),
    "mlx-lm": mlx_lm(False),
    "mlx-lm, recompute": mlx_lm(True),
    "torch + PEFT": torch_peft,
}

if __name__ == "__main__":
    main()
