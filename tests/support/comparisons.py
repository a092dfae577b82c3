"""Pairs of answers and judged ones, and what TRL makes of them."""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np

from mlx_qlora.data.batches import IGNORE, Batch
from mlx_qlora.data.examples import Example, Examples


def counting(random: np.random.Generator, by: int, prompt: int, start: int) -> np.ndarray:
    """A prompt that counts by threes from a start, and an answer that counts by another number."""
    n = int(random.integers(4, 12))
    steps = np.concatenate([np.full(prompt - 1, 3), np.full(n, by)])
    return ((start + np.concatenate([[0], np.cumsum(steps)])) % 320).astype(np.int32)


def make_pairs(n: int = 22, seed: int = 0, prompt_weight: float = 0.0) -> Examples:
    """The chosen answer goes on by threes, the rejected one by fives."""
    random, rows = np.random.default_rng(seed), []
    for line in range(1, n + 1):
        prompt, start = int(random.integers(3, 10)), int(random.integers(0, 12))
        sides = [counting(random, by, prompt, start) for by in (5, 3)]
        learned = [np.arange(len(side)) >= prompt for side in sides]
        weights = None
        if prompt_weight:
            chosen = np.where(learned[1], 1, prompt_weight)
            chosen[0] = 0
            weights = np.concatenate([learned[0], chosen]).astype(np.float32)
        both = np.concatenate(sides), np.concatenate(learned)
        rows.append(Example(*both, line, "pairs", (len(sides[0]),), weights))
    return Examples.of(rows, kind="pairs")


def make_judged(n: int = 22, seed: int = 0) -> Examples:
    """Answers of which about half are judged to be bad: those that go on by fives."""
    random, rows = np.random.default_rng(seed), []
    for line in range(1, n + 1):
        prompt, is_good = int(random.integers(3, 10)), line % 3 > 0
        tokens = counting(random, 3 if is_good else 5, prompt, int(random.integers(0, 12)))
        learned = np.arange(len(tokens)) >= prompt
        weights = None if is_good else -learned.astype(np.float32)
        rows.append(Example(tokens, learned, line, "judged", (), weights))
    return Examples.of(rows, kind="labelled answers")


# ---- TRL -----------------------------------------------------------------------------------------


def as_in_trl(kind: type, **fields: Any) -> Any:
    """A trainer of TRL that was never set up, whose loss can be computed."""
    same = SimpleNamespace(
        device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    trainer: Any = object.__new__(kind)
    trainer.__dict__.update(
        accelerator=same,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        is_encoder_decoder=False,
        precompute_ref_logps=True,
        padding_value=0,
        pad_token_id=0,
        _total_train_tokens=0,
        _tp_size=1,
        _metrics={"train": defaultdict(list)},
        **fields,
    )
    return trainer


class Fused:
    """A torch model with the outputs of TRL's fused head."""

    training = True

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, input_ids: Any, attention_mask: Any, labels: Any = None, **_: Any) -> Any:
        import torch

        logits = self.model(input_ids, attention_mask=attention_mask).logits.float()
        if labels is None:
            return SimpleNamespace(logits=logits)
        following = labels[:, 1:]
        logps = torch.log_softmax(logits[:, :-1], -1)
        picked = logps.gather(-1, following.clamp(min=0)[..., None])[..., 0]
        log_probs = torch.where(following == IGNORE, 0.0, picked)
        nothing = torch.zeros_like(log_probs)
        more = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        return SimpleNamespace(log_probs=log_probs, **more)


def documents(batch: Batch) -> Iterator[tuple[list[int], list[bool]]]:
    """The ids of each document of a batch, its last label included, and which are of an answer."""
    tokens: Any = np.array(batch.tokens)
    labels: Any = np.array(batch.labels)
    answers = labels != IGNORE if batch.answers is None else batch.answers
    for row, start, end in batch.documents.tolist():
        ids = [*tokens[row, start:end], labels[row, end - 1]]
        yield list(map(int, ids)), [False, *answers[row, start:end].tolist()]


def padded(rows: Iterable[tuple[list[int], list[bool]]]) -> tuple[Any, Any, Any]:
    """(ids, attention mask, completion mask) of documents, right-padded, as torch has them."""
    import torch

    rows = list(rows)
    ids = torch.zeros((len(rows), max(len(row) for row, _ in rows)), dtype=torch.long)
    mask, completion = torch.zeros_like(ids), torch.zeros_like(ids)
    for i, (row, answer) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        completion[i, : len(row)] = torch.tensor(answer).long()
    return ids, mask, completion


def logps(model: Any, rows: Iterable[tuple[list[int], list[bool]]]) -> Any:
    """(n,) log-probabilities of the answers, by torch."""
    import torch

    ids, mask, completion = padded(rows)
    labels = ids.masked_fill(completion == 0, IGNORE)
    with torch.no_grad():
        return Fused(model)(ids, mask, labels).log_probs.sum(-1)


def trl_loss(objective: str, model: Any, batch: Batch, **fields: Any) -> tuple[Any, dict[str, Any]]:
    """TRL's loss of a batch, with a graph, and its metrics; the reference is `disable_adapter`."""
    import torch

    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"  # or it warns, which is an error here
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.kto_trainer import KTOTrainer

    rows, fused = list(documents(batch)), Fused(model)
    if objective == "kto":
        assert batch.mismatched is not None
        others = list(documents(batch.mismatched))
        (ids, mask, completion), of_kl = padded(rows), padded(others)
        names = "KL_input_ids", "KL_attention_mask", "KL_completion_mask"
        with model.disable_adapter():
            reference = {"ref_logps": logps(model, rows), "ref_KL_logps": logps(model, others)}
        weights = np.zeros(0) if batch.weights is None else batch.weights
        label = torch.tensor([not (row < 0).any() for row in weights])
        trainer = as_in_trl(KTOTrainer, calculate_KL=True, loss_type="kto", **fields)
        inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
        inputs |= {"label": label, **dict(zip(names, of_kl)), **reference}
        return trainer._compute_loss(fused, inputs, False), trainer._metrics["train"]
    chosen, rejected = rows[1::2], rows[::2]
    if objective == "dpo":
        with model.disable_adapter():
            reference = {
                "ref_chosen_logps": logps(model, chosen),
                "ref_rejected_logps": logps(model, rejected),
            }
        ids, mask, completion = padded([*chosen, *rejected])
        inputs = {"input_ids": ids, "attention_mask": mask, "completion_mask": completion}
        fixed = {"ld_alpha": None, "f_divergence_type": "reverse_kl", "use_weighting": False}
        trainer = as_in_trl(DPOTrainer, **fixed, **fields)
        return trainer._compute_loss(fused, inputs | reference, False), trainer._metrics["train"]
    inputs = {}
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        ids, mask, completion = padded(side)
        inputs |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask}
        inputs[f"{name}_labels"] = ids.masked_fill(completion == 0, IGNORE)
    kind = ORPOTrainer if objective == "orpo" else CPOTrainer
    return as_in_trl(kind, **fields).get_batch_loss_metrics(fused, inputs)
