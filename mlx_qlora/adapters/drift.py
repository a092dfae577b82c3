"""Drift: what an export has changed, the written model against the model with its adapter.

Re-quantising rounds W + s B A to steps that are often larger than s B A itself, and then the files
hold little of what was learned. The weights do not show it; the next-token distributions do.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qlora.adapters.several import disabled
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.errors import ConfigError
from mlx_qlora.model.llama import LlamaForCausalLM

POSITIONS = 64  # whose logits exist at once: a vocabulary of 128,256 in float64 is 1 MB each
NO_EFFECT = 1e-9  # nats per token; below it rounding is larger than what the adapter does
WELL_KEPT = 0.95
TEXTS = tuple(Path(__file__).with_name("drift_texts.txt").read_text("utf-8").splitlines())


@dataclass(frozen=True)
class Drift:
    """How far a written model is from the model with its adapter, on sample texts.

    KL is KL(exact || other), the mean over positions of sum_v p_exact log(p_exact / p_other): what
    text of the tuned model costs the other in nats per token, beyond what it must cost. `kept` is
    1 - KL(exact || written) / KL(exact || base). A written model equal to the tuned one keeps all;
    one that is as far from it as the base is keeps nothing; noise beyond that gives a negative
    number. It holds for these texts, not for all text. Losses and divergences are nats per token.
    """

    loss_exact: float  # of the model with its adapter
    loss_base: float  # of the same model without it
    loss_written: float  # of what was written, read back from the files
    kl: float  # KL(exact || written)
    kl_base: float  # KL(exact || base): the adapter's effect
    max_logit_difference: float  # largest |logit of written - logit of exact|
    kept: float  # the share of the effect that is in the files; NaN where there is next to none
    tokens: int  # how many predictions were compared
    bits: int | None  # what the files are quantised to; None if they are dense

    def __str__(self) -> str:
        return (
            f"loss {self.loss_exact:.4f} with the adapter, {self.loss_base:.4f} without it, "
            f"{self.loss_written:.4f} as written ({self.tokens:,} tokens); KL to the tuned model "
            f"{self.kl:.2g} nats per token, of the base {self.kl_base:.2g}; logits differ by at "
            f"most {self.max_logit_difference:.2g}\n{self._verdict()}"
        )

    def _verdict(self) -> str:
        if math.isnan(self.kept):
            return "on these texts the adapter changes nothing that could have been lost"
        if self.kept >= WELL_KEPT:
            return f"the files keep {100 * self.kept:.0f} % of what was learned"
        what = "rounding" if self.bits is None else f"re-quantising to {self.bits} bits"
        remedy = "choose a wider dtype" if self.bits is None else "merge without bits="
        if self.kept <= 0:
            lost = "moved the model further than training did: all of what was learned is lost"
        else:
            lost = f"lost {100 * (1 - self.kept):.0f} % of what was learned"
        return f"{what} {lost}; {remedy}, or keep the adapter separate"


def encode_texts(tokenizer: Tokenizer, texts: list[str] | None) -> list[list[int]]:
    """The ids of each text, after a BOS if the model expects one; None means `TEXTS`.

    A ConfigError if no text has a token to predict.
    """
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    encoded = tokenizer.encode_batch(texts if texts is not None else [*TEXTS])
    rows = [bos + ids for ids in encoded if len(bos + ids) > 1]
    if not rows:
        raise ConfigError("texts: none has two tokens, to compare with; give longer ones")
    return rows


def measure(
    exact: LlamaForCausalLM, written: LlamaForCausalLM, rows: list[list[int]], bits: int | None
) -> Drift:
    """Compare two models, and the first without its adapter, on every prediction of some texts.

    Args:
        written: the exported model, loaded with the same compute dtype.
        rows: ids of each text, at least two.
        bits: what `written` is quantised to, for the report.
    """
    sums = np.zeros(5)  # three losses, two divergences
    largest = 0.0
    for ids in rows:
        tokens = mx.array([ids[:-1]])
        with disabled(exact):
            hidden_of_base = exact.model(tokens)[0]
        hidden = exact.model(tokens)[0], hidden_of_base, written.model(tokens)[0]
        mx.eval(hidden)
        labels = np.array(ids[1:])
        with exact.head.dense_for_now(), written.head.dense_for_now():
            for start in range(0, len(labels), POSITIONS):
                part = slice(start, start + POSITIONS)
                logits = [float64_of(exact.logits(h[part])) for h in hidden[:2]]
                logits.append(float64_of(written.logits(hidden[2][part])))
                sums += _compare(logits, labels[part])
                largest = max(largest, float(np.abs(logits[2] - logits[0]).max()))
    n = sum(len(ids) - 1 for ids in rows)
    loss_exact, loss_base, loss_written, kl_base, kl = (float(s) for s in sums / n)
    kept = 1 - kl / kl_base if kl_base > NO_EFFECT else math.nan
    return Drift(loss_exact, loss_base, loss_written, kl, kl_base, largest, kept, n, bits)


def _compare(logits: list[np.ndarray], labels: np.ndarray) -> np.ndarray:
    """Logits (P, V) of exact, base, written -> the sums of their losses, KL of base, of written."""
    exact, base, written = (log_softmax(each) for each in logits)
    at = np.arange(len(labels)), labels
    losses = [-logs[at].sum() for logs in (exact, base, written)]
    p = np.exp(exact)
    return np.array([*losses, (p * (exact - base)).sum(), (p * (exact - written)).sum()])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (P, V) float64 -> log-probabilities."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def float64_of(logits: mx.array) -> np.ndarray:
    """Logits as float64 (P, V)."""
    # A divergence of 1e-7 is a difference of numbers near 10: float32 cannot hold it.
    return np.array(logits.astype(mx.float32)).astype(np.float64)
