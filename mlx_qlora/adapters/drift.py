"""Drift: what an export has changed, the written model against the model with its adapter.

Re-quantising rounds W + s B A to steps that are often larger than s B A itself. The weights do not
show what is lost then; the next-token distributions on rows that were held out do.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qlora.adapters.push import render
from mlx_qlora.data.batches import IGNORE
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM

POSITIONS = 64  # whose logits exist at once: a vocabulary of 128,256 in float64 is 1 MB each
NO_GAIN = 1e-3  # nats per token; what is smaller is no measure of what was kept
WELL_KEPT = 0.95
TEXTS = tuple(Path(__file__).with_name("drift_texts.txt").read_text("utf-8").splitlines())
# The versions of a model that are compared, by their names in a table.
BASE, ADAPTER, MERGED = "base", "with the adapter", "merged, 16 bits"
PLAIN, WRITTEN = "rounded plainly", "as written"
VERSIONS = BASE, ADAPTER, MERGED, PLAIN, WRITTEN


@dataclass(frozen=True)
class Figures:
    """How a version of a model predicts the held-out rows' answers."""

    loss: float  # nats per token
    token_accuracy: float  # share of tokens that were its first choice
    kl: float  # KL(with the adapter || this version), nats per token
    kept: float  # share of the adapter's gain in loss over the base; NaN if it gained nothing


@dataclass(frozen=True)
class Drift:
    """How far a written model is from the model with its adapter, on rows that were held out.

    KL(p || q) is the mean over positions of sum_v p_v log(p_v / q_v): what text of the tuned model
    costs the other in nats per token, beyond what it must cost.
    """

    figures: dict[str, Figures]  # by version
    tokens: int  # how many predictions were compared
    what: str  # the written matrices are in

    @property
    def kept(self) -> float:
        """The share of the gain in loss that is in the files."""
        return self.figures[WRITTEN].kept

    def __str__(self) -> str:
        text = render("adapters/drift.txt.jinja", drift=self, well_kept=WELL_KEPT)
        return text.removesuffix("\n")


def measure(
    model: LlamaForCausalLM, rows: Iterable[tuple[dict[str, mx.array], np.ndarray]], what: str
) -> Drift | None:
    """Compare VERSIONS of a model by what they make of some rows; None if nothing is predicted.

    Of documents end to end `rows` have what its head reads, version -> (N, D), and what follows
    each position (N,), or IGNORE; `what` names what was written.
    """
    sums, n = np.zeros((len(VERSIONS), 3)), 0
    with model.head.dense_for_now():
        for states, targets in rows:
            places = np.flatnonzero(targets != IGNORE)
            for part, logs in log_probabilities(model, [states[v] for v in VERSIONS], places):
                exact, target = logs[VERSIONS.index(ADAPTER)], targets[part]
                p = np.exp(exact)
                for i, log in enumerate(logs):
                    loss = -log[np.arange(len(part)), target].sum()
                    sums[i] += loss, (log.argmax(axis=1) == target).sum(), (p * (exact - log)).sum()
                n += len(part)
    if not n:
        return None
    means = sums / n
    base, tuned = means[0, 0], means[1, 0]
    gain = base - tuned if base - tuned > NO_GAIN else math.nan
    figures = {
        version: Figures(loss, accuracy, kl, float((base - loss) / gain))
        for version, (loss, accuracy, kl) in zip(VERSIONS, means.tolist())
    }
    return Drift(figures, n, what)


def encode_texts(tokenizer: Tokenizer, texts: list[str] | None) -> list[list[int]]:
    """The ids of each text, after a BOS if the model expects one; a ConfigError if none has two."""
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    encoded = tokenizer.encode_batch(texts if texts is not None else [*TEXTS])
    rows = [bos + ids for ids in encoded if len(bos + ids) > 1]
    if not rows:
        raise ConfigError("texts: none has two tokens, to compare with; give longer ones")
    return rows


def log_probabilities(
    model: LlamaForCausalLM, hidden: list[mx.array], places: np.ndarray
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """POSITIONS of some places at a time, and of each hidden (N, D) there log-probabilities (P, V).

    In float64: a divergence of 1e-7 is a difference of numbers near 10.
    """
    for start in range(0, len(places), POSITIONS):
        part, logs = places[start : start + POSITIONS], []
        for states in hidden:
            logits = np.array(model.logits(states[mx.array(part)]).astype(mx.float32), np.float64)
            shifted = logits - logits.max(axis=1, keepdims=True)
            logs.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
        yield part, logs
