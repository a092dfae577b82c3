"""Preferences: how much each answer's log-probability adds to a loss that compares answers.

An example is a pair, whose documents are the rejected answer and the chosen one, or one answer that
is judged to be good or bad. The forward gives the log-probability of each answer. A loss is a
function of these alone, so that its gradient is theirs times one number for each answer, and the
backward is that of any batch whose labels are weighed. The definitions are TRL's, of

    dpo    Rafailov et al. 2023 (arXiv 2305.18290), its smoothed labels Mitchell 2023 (cDPO)
    orpo   Hong et al. 2024 (arXiv 2403.07691)
    simpo  Meng et al. 2024 (arXiv 2405.14734)
    kto    Ethayarajh et al. 2024 (arXiv 2402.01306)

DPO and KTO compare with the model as it was before its training, which scores each example once.
Dropout is off: in a difference of two log-probabilities it would be noise.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from mlx_qlora.adapters.several import untrained
from mlx_qlora.data.batches import IGNORE, Batch, Batches, evaluation_batches, mismatch
from mlx_qlora.data.examples import Example, Examples
from mlx_qlora.data.preferences import KIND_OF, PAIRS
from mlx_qlora.distributed import processes
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.progress import doing
from mlx_qlora.train.config import TrainingConfig
from mlx_qlora.train.loss import Weighed
from mlx_qlora.train.score import answers_of_documents, log_probabilities, nats_of_labels

AVERAGED = ("orpo", "simpo")  # objectives that compare log-probabilities per token

# ---- answers and their losses --------------------------------------------------------------------


class Answers:
    """The answers of n examples, k of each: the rejected and the chosen one, or one.

    The columns of the table (n, 3 k + 2) float64 are k log-probabilities, k lengths, k times
    whether the answer is chosen or good, and of the last answer's document the weighted nats and
    the weights of all its labels.
    """

    def __init__(self, table: np.ndarray) -> None:
        k = (table.shape[1] - 2) // 3
        self.table = table
        self.logps, self.lengths, good, _ = np.split(table, [k, 2 * k, 3 * k], axis=1)
        self.good = good > 0

    @classmethod
    def of(cls, batch: Batch, labels: np.ndarray, nats: np.ndarray, k: int) -> "Answers":
        """Of some whole rows of a batch, whose labels (S,) cost so many nats (S,)."""
        T, document = batch.tokens.shape[1], batch.document_of[labels]
        weights = np.ones(len(labels))
        if batch.weights is not None:
            weights = batch.weights.reshape(-1)[labels].astype(np.float64)

        def last(values: np.ndarray) -> np.ndarray:
            sums = np.bincount(document, values, minlength=len(batch.documents))
            return sums.reshape(-1, k)[:, -1:]

        def answers(values: np.ndarray) -> np.ndarray:
            return answers_of_documents(batch, labels, values).reshape(-1, k)

        chosen = np.tile([False, True], (len(batch.documents) // k, 1))
        good = answers(weights) > 0 if k == 1 else chosen
        lengths = answers(np.ones(len(labels)))
        columns = -answers(nats), lengths, good, last(weights * nats), last(weights)
        return cls(np.concatenate(columns, axis=1)[np.unique(labels // T)])

    def __len__(self) -> int:
        return len(self.table)


def good_answers(examples: Examples, side: int = -1) -> Examples | None:
    """Chosen answers (rejected ones: `side` 0) and good ones, as rows of one; None without any."""
    if examples.report.kind == KIND_OF["sft"]:
        return examples
    rows = []
    for row in examples:
        tokens, learned, weights = row.documents[side]
        if weights.min() >= 0:
            rows.append(Example(tokens, learned, row.line, row.file))
    return Examples.of(rows, examples.report.source) if rows else None


def compared(
    config: TrainingConfig, answers: Answers, reference: np.ndarray, kl: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The losses (n,) of n examples.

    And their derivatives (n, k) by the log-probabilities, and the scores (n, k), of which `beta`
    times are the rewards. The `reference` (n, k) is of log-probabilities before the training, which
    orpo and simpo do not read; by `kl` nats those of mismatched answers have risen, for kto.
    """
    averages = config.objective in AVERAGED
    scale = answers.lengths if averages else np.ones_like(answers.lengths)
    scores = answers.logps / scale if averages else answers.logps - reference
    beta, smoothing = config.reward_scale, config.label_smoothing
    if config.objective == "kto":
        sign = np.where(answers.good, 1.0, -1.0)
        weights = np.where(answers.good, config.desirable_weight, config.undesirable_weight)
        value = sigmoid(beta * sign * (scores - kl))
        slopes = -weights * beta * sign * value * (1 - value)
        return (weights * (1 - value))[:, 0], slopes, scores
    if config.objective == "orpo":
        # A probability of 1 has infinite odds; float32 knows no log-probability closer to 0.
        rejected, chosen = np.minimum(scores, -1e-7).T
        log_odds = chosen - rejected - np.log(np.expm1(chosen) / np.expm1(rejected))
        losses, slope = -beta * log_sigmoid(log_odds), -beta * sigmoid(-log_odds)
        by_scores = np.stack([1 / np.expm1(rejected), -1 / np.expm1(chosen)], axis=1)
    else:
        gamma = config.simpo_gamma if config.objective == "simpo" else 0.0
        margin = beta * (scores[:, 1] - scores[:, 0]) - gamma
        losses = -(1 - smoothing) * log_sigmoid(margin) - smoothing * log_sigmoid(-margin)
        slope = smoothing * sigmoid(margin) - (1 - smoothing) * sigmoid(-margin)
        by_scores = np.array([-beta, beta])
    return losses, slope[:, None] * by_scores / scale, scores


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    """The logarithm of 1 / (1 + exp(-x))."""
    return -np.logaddexp(0, -x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without an overflow."""
    return np.exp(log_sigmoid(x))


# ---- a run's objective ---------------------------------------------------------------------------

Pieces = Callable[[Iterable[Batch]], Iterator[Batch]]  # small enough for memory


class Preferences:
    """The objective of a run that compares answers, and the sums behind its metrics.

    It is made before anything was trained: what the model is then is the reference.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: LlamaForCausalLM,
        batches: Batches,
        held_out: Batches | None,
    ) -> None:
        self.config, self.model, self.batches, self.processes = config, model, batches, processes()
        self.k = 2 if KIND_OF[config.objective] == PAIRS else 1
        # The likelihood of the chosen answer, of which so much is added to the loss.
        self.alpha = 1.0 if config.objective == "orpo" else config.rpo_alpha * (self.k == 2)
        self.untrained = untrained(model)
        self.held_out, self.mismatched = held_out, None
        if held_out is not None and config.objective == "kto":
            rows = [*held_out.examples]
            self.mismatched = Examples.of(map(mismatch, rows, [rows[-1], *rows[:-1]]))
        self.reset()

    def refer(self, pieces: Pieces) -> None:
        """Score all examples of the run as the model is without its training."""
        examples, config = self.batches.examples, self.config
        n = min(config.micro_batches(self.batches) * self.batches.step, len(examples))
        seen = np.array(sorted(self.batches.indices(range(n))))
        self.reference = np.zeros((len(examples), self.k))
        self.reference_held_out, self.reference_mismatched = np.zeros((1, self.k)), 0.0
        if config.objective not in ("dpo", "kto"):
            return
        with self.untrained():
            self.reference[seen] = self.answers_of(examples[seen], pieces, "reference").logps
            if self.held_out is not None:
                held_out = self.held_out.examples
                self.reference_held_out = self.answers_of(held_out, pieces, "reference").logps
            if self.mismatched is not None:
                self.reference_mismatched = self._total(self.mismatched, pieces)

    def answers_of(self, examples: Examples, pieces: Pieces, title: str) -> Answers:
        """The answers of examples in their order; of several processes each scores its share."""
        everyone, k = self.processes, self.k
        table = np.zeros((len(examples), 3 * k + 2))
        share = np.arange(everyone.rank, len(examples), everyone.size)
        with doing(title, len(share), "rows") as task:
            for piece in pieces(evaluation_batches(examples[share])) if len(share) else ():
                answers = Answers.of(piece, *nats_of_labels(self.model, piece), k)
                table[share[list(piece.rows)]] = answers.table
                task.advance(len(piece.rows))
        return Answers(everyone.total(table))

    def _total(self, examples: Examples, pieces: Pieces) -> float:
        """The sum of log-probabilities of all answers."""
        return float(self.answers_of(examples, pieces, "mismatched").logps.sum())

    # ---- in a step -------------------------------------------------------------------------------

    def count(self, micro_batches: list[Batch], pieces: Pieces) -> np.ndarray:
        """What must be known of a whole step before its first backward, of this process.

        That is how many examples it has, the weights of its chosen labels and, for KTO, by how many
        nats mismatched answers have become more likely.
        """
        risen, others = 0.0, [b.mismatched for b in micro_batches if b.mismatched and b.rows]
        if others:
            risen = sum(log_probabilities(self.model, piece).sum() for piece in pieces(others))
            with self.untrained():
                parts = (log_probabilities(self.model, piece) for piece in pieces(others))
                risen -= sum(part.sum() for part in parts)
        weights = sum(map(self._weight_of_chosen, micro_batches)) if self.alpha else 1.0
        return np.array([sum(len(batch.rows) for batch in micro_batches), weights, risen])

    def begin(self, counts: np.ndarray) -> None:
        """A new step, of which each process has counted so much."""
        n, weights, risen = self.processes.total(counts).tolist()
        self.kl, self.per_weight = max(risen / max(n, 1), 0.0), self.alpha * n / max(weights, 1e-9)
        self.reset()

    def _weight_of_chosen(self, batch: Batch) -> float:
        """The sum of the weights of all labels of chosen documents."""
        labels = np.flatnonzero(np.array(batch.labels).reshape(-1) != IGNORE)
        return float(Answers.of(batch, labels, np.zeros(len(labels)), self.k).table[:, -1].sum())

    def weigh(self, batch: Batch, labels: np.ndarray, nats: np.ndarray) -> Weighed:
        """As `train.loss.Weigh`: the loss of whole rows, and what becomes of the labels' nats."""
        here = np.unique(labels // batch.tokens.shape[1])
        answers = Answers.of(batch, labels, nats, self.k)
        indices = self.batches.indices([batch.rows[row] for row in here])
        losses, of_rows, scores = compared(self.config, answers, self.reference[indices], self.kl)
        self.sums += self._sums_of(answers, scores)
        slopes = np.zeros((len(batch.rows), self.k))
        slopes[here] = of_rows
        document = batch.document_of[labels]
        weights = -slopes.reshape(-1)[document]
        if batch.answers is not None:
            weights *= batch.answers.reshape(-1)[labels]
        if self.per_weight:
            own = 1.0 if batch.weights is None else batch.weights.reshape(-1)[labels]
            weights += self.per_weight * own * (document % self.k == self.k - 1)
        loss = losses.sum() + self.per_weight * answers.table[:, -2].sum()
        return Weighed(float(loss), len(answers), weights)

    # ---- metrics ---------------------------------------------------------------------------------

    def reset(self) -> None:
        """Forget what was computed of a step, which is computed again."""
        self.sums = np.zeros(7)

    def _sums_of(self, answers: Answers, scores: np.ndarray) -> np.ndarray:
        """Of the good answers and the others their number, rewards and log-probabilities."""
        averaged = self.config.objective in AVERAGED
        logps = scores if averaged else answers.logps
        sums = [
            values[good].sum()
            for good in (answers.good, ~answers.good)
            for values in (np.ones_like(logps), self.config.reward_scale * scores, logps)
        ]
        right = (scores[:, -1] > scores[:, 0]).sum()
        return np.array([*sums, right])

    def metrics(self) -> dict[str, float]:
        """The metrics of a step of all processes, by TRL's names."""
        return self._named(self.processes.total(self.sums), self.kl)

    def _named(self, sums: np.ndarray, kl: float) -> dict[str, float]:
        figures, means = {}, {}
        for name, (n, reward, logp) in zip(("chosen", "rejected"), (sums[:3], sums[3:6])):
            if n:
                means[name] = figures[f"rewards/{name}"] = float(reward / n)
                figures[f"logps/{name}"] = float(logp / n)
        if len(means) == 2:
            figures["rewards/margins"] = means["chosen"] - means["rejected"]
        if self.k == 2 and sums[0]:
            figures["rewards/accuracies"] = float(sums[6] / sums[0])
        if self.config.objective == "kto":
            figures["kl"] = kl
        return figures

    def validate(self, pieces: Pieces) -> tuple[float, dict[str, float]]:
        """The objective's mean loss of the held-out examples, and their metrics."""
        assert self.held_out is not None
        answers, kl = self.answers_of(self.held_out.examples, pieces, "validating"), 0.0
        if self.mismatched is not None:
            risen = self._total(self.mismatched, pieces) - self.reference_mismatched
            kl = max(risen / len(answers), 0.0)
        losses, _, scores = compared(self.config, answers, self.reference_held_out, kl)
        nats, weights = answers.table[:, -2:].sum(axis=0)
        loss = losses.mean() + self.alpha * nats / max(weights, 1e-9)
        return float(loss), self._named(self._sums_of(answers, scores), kl)
