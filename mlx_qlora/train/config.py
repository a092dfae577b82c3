"""How long and how fast to learn, and the batches and the run length that follow from it."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlx_qlora.data.batches import Batches, make_batches
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.preferences import KIND_OF
from mlx_qlora.data.read import DataConfig
from mlx_qlora.errors import ConfigError, require
from mlx_qlora.fields import config_section, option
from mlx_qlora.train.optim import SCHEDULES, learning_rate

# The version of the arithmetic, in every run's fingerprint. 1 is what commit 8129655 computes, and
# what a checkpoint without a number has. Whoever changes a trained bit raises it, records the
# golden run again and says why in docs/log.md; a run is not continued under another number.
NUMERICS = 2
USUAL_PASSES, MANY_PASSES = 3, 20  # that are a start, and that learn examples by heart
# Examples in a step: 18 keep its gradient calm; a small data set rather has more steps, LEAST_STEPS
# of them, but fewer than 4 examples make each step depend on which ones they are.
FEWEST_EXAMPLES, MOST_EXAMPLES, LEAST_STEPS = 4, 18, 30


@config_section("training")
class TrainingConfig:
    """How long and how fast to learn; names and defaults as Hugging Face users know them."""

    learning_rate: float | str = option(
        2e-4,
        "rate after the warmup, or auto: by the model's width. Take a third of it if the loss "
        "jumps, three times as much if it barely falls",
    )
    lr_scheduler_type: str = option("cosine", "what follows the warmup", choices=SCHEDULES)
    warmup_ratio: float = option(0.1, "share of the steps during which the rate grows, 0 to 1")
    warmup_steps: int | None = option(None, "the same as a number of steps; replaces warmup_ratio")
    num_train_epochs: float | None = option(
        None,
        f"passes over the data, above 0. {USUAL_PASSES} if max_steps is not given either. Take "
        "fewer if the validation loss rises while the training loss falls",
    )
    max_steps: int | None = option(None, "optimiser steps, instead of num_train_epochs")
    per_device_train_batch_size: int | str = option(
        "auto",
        "examples in a micro-batch, 1 or more, or auto: "
        f"{FEWEST_EXAMPLES} to {MOST_EXAMPLES} examples in a step, by how many there are",
    )
    gradient_accumulation_steps: int | str = option(
        "auto", "micro-batches in an optimiser step. auto: what the batch size leaves, mostly 1"
    )
    max_grad_norm: float | None = option(1.0, "clip the gradient to this norm. null never clips")
    weight_decay: float = option(0.01, "decoupled weight decay, on every LoRA matrix")
    adam_beta1: float = option(0.9, "decay of AdamW's mean of gradients")
    adam_beta2: float = option(0.999, "decay of AdamW's mean of squared gradients")
    adam_epsilon: float = option(1e-8, "is added to AdamW's denominator")
    gradient_checkpointing: bool | int | str = option(
        "auto", "recompute activations: true, false, auto (as memory asks), or how many layers"
    )
    compile: bool | str = option(
        "auto", "fuse operations with mx.compile: true, false, or auto (on a GPU)"
    )
    max_skipped_steps: int = option(
        5, "stop after so many steps in a row whose loss or gradient is not finite"
    )
    seed: int = option(0, "seed of the initial adapter, the order of rows, the split and dropout")
    objective: str = option(
        "sft",
        "what is learned: answers (sft), pairs of a chosen and a rejected one (dpo, orpo, simpo), "
        "or answers with a label true or false (kto)",
        choices=KIND_OF,
    )
    beta: float | None = option(
        None,
        "the objective's beta, which scales rewards. null is 0.1, for simpo 2. Not for sft",
    )
    label_smoothing: float = option(
        0.0, "share of pairs, in [0, 0.5), that may be the wrong way round (dpo, simpo)"
    )
    rpo_alpha: float = option(
        0.0, "weight of the chosen answers' own loss, which is added (dpo, simpo). orpo adds 1"
    )
    simpo_gamma: float = option(
        1.0, "margin between the rewards of a chosen and a rejected answer (simpo)"
    )
    desirable_weight: float = option(1.0, "weight of good answers (kto)")
    undesirable_weight: float = option(1.0, "weight of bad answers (kto)")
    kl_weight: float = option(
        0.0,
        "weight of the KL divergence from the model before its training, at the learned tokens, "
        "which is added to the loss (sft). Less is forgotten, for one more forward",
    )

    def __post_init__(self) -> None:
        if self.max_steps is None and self.num_train_epochs is None:
            object.__setattr__(self, "num_train_epochs", float(USUAL_PASSES))
        elif self.max_steps is not None and self.num_train_epochs is not None:
            raise ConfigError(
                "training.max_steps and training.num_train_epochs exclude each other; "
                f"got {self.max_steps} and {self.num_train_epochs}; leave one of them out"
            )
        sizes = "per_device_train_batch_size", "gradient_accumulation_steps"
        words = dict.fromkeys((*sizes, "learning_rate"), "be a number or auto")
        words |= dict.fromkeys(("gradient_checkpointing", "compile"), "be true, false or auto")
        for name, rule in words.items():
            value = getattr(self, name)
            require(not isinstance(value, str) or value == "auto", f"training.{name}", rule, value)

        def check(names: tuple[str, ...], rule: str, legal: Callable[[float], bool]) -> None:
            for name in names:
                value = getattr(self, name)
                known = value is None or isinstance(value, str) or legal(value)
                require(known, f"training.{name}", rule, value)

        check((*sizes, "max_steps", "max_skipped_steps"), "be at least 1", lambda n: n >= 1)
        positive = ("learning_rate", "adam_epsilon", "max_grad_norm", "num_train_epochs", "beta")
        check(positive, "be above 0 and finite", lambda x: 0 < x < math.inf)
        check(("num_train_epochs",), "be at most 1,000,000", lambda x: x <= 1e6)
        check(("warmup_steps", "weight_decay", "seed"), "be at least 0", lambda x: 0 <= x < 2**63)
        check(("warmup_ratio",), "be in [0, 1]", lambda x: 0 <= x <= 1)
        check(("label_smoothing",), "be in [0, 0.5)", lambda x: 0 <= x < 0.5)
        weights = "rpo_alpha", "simpo_gamma", "desirable_weight", "undesirable_weight", "kl_weight"
        check(weights, "be at least 0, and finite", lambda x: 0 <= x < math.inf)
        check(("adam_beta1", "adam_beta2"), "be in [0, 1)", lambda x: 0 <= x < 1)
        sft = self.objective == "sft" or not self.kl_weight
        rule = f"be left out: training.objective={self.objective} compares answers"
        require(sft, "training.kl_weight", rule, self.kl_weight)

    @property
    def reward_scale(self) -> float:
        """`beta`, or what it is for the objective if it is not given."""
        return self.beta or (2.0 if self.objective == "simpo" else 0.1)

    @property
    def learns_prompts(self) -> bool:
        """Whether `data.prompt_loss_weight` changes anything."""
        return self.objective in ("sft", "orpo") or bool(self.rpo_alpha and self.objective != "kto")

    @property
    def recompute(self) -> str | int:
        """`gradient_checkpointing` in the engine's words."""
        if isinstance(self.gradient_checkpointing, bool):
            return "all" if self.gradient_checkpointing else "none"
        return self.gradient_checkpointing

    def for_examples(self, n: int | None, n_processes: int = 1) -> "TrainingConfig":
        """With numbers in the place of `auto`, for n examples to learn from; None for very many.

        How many of a step's examples are computed at once does not matter here: the engine cuts a
        batch into chunks by its tokens and the memory. So a step is one micro-batch.
        """
        wanted = MOST_EXAMPLES
        if n is not None:
            examples = n * (self.num_train_epochs or USUAL_PASSES)  # of all passes
            wanted = max(int(min(wanted, examples // LEAST_STEPS)), FEWEST_EXAMPLES)
        size, accumulation = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if isinstance(size, str):
            micro_batches = 1 if isinstance(accumulation, str) else accumulation
            size = max(1, wanted // (micro_batches * n_processes))
        if isinstance(accumulation, str):
            accumulation = max(1, wanted // (size * n_processes))
        return dataclasses.replace(
            self, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation
        )

    def at_hidden_size(self, hidden_size: int, model_type: str = "llama") -> "TrainingConfig":
        """With a number in the place of `learning_rate: auto`.

        The rule is `get_lr` of tinker_cookbook 0.6.1,

            5e-5 * 10 * (2000 / hidden_size) ** exponent

        which was fitted to LoRA on all linears with lora_alpha 32 and a scale of alpha / r
        (Schulman et al. 2025, "LoRA Without Regret"); 5e-5 is for all weights, and LoRA wants
        about ten times that. The exponent is 0.0775 for Qwen models and 0.781 for Llama, whose it
        is here for all others, too. It gives 2.86e-4 for Llama 3.1 8B. A start, which a sweep may
        move.
        """
        if self.learning_rate != "auto":
            return self
        exponent = 0.0775 if model_type.startswith("qwen") else 0.781
        return dataclasses.replace(self, learning_rate=5e-4 * (2000 / hidden_size) ** exponent)

    @property
    def peak(self) -> float:
        """`learning_rate`, once it is a number."""
        return float(self.learning_rate)

    @property
    def rows(self) -> int:
        """`per_device_train_batch_size`, once it is a number."""
        return int(self.per_device_train_batch_size)

    @property
    def accumulation(self) -> int:
        """`gradient_accumulation_steps`, once it is a number."""
        return int(self.gradient_accumulation_steps)

    def warmup_of(self, total_steps: int) -> int:
        """Steps over which the learning rate grows, of so many in all."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        return math.ceil(self.warmup_ratio * total_steps)

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of one optimiser step, counted from 1."""
        warmup = self.warmup_of(total_steps)
        return learning_rate(step, self.peak, warmup, total_steps, self.lr_scheduler_type)

    def micro_batches(self, batches: Batches) -> int:
        """Micro-batches of the whole run; the last step may have fewer than the others."""
        if self.max_steps is not None:
            return self.max_steps * self.accumulation
        assert batches.stop is not None
        return batches.stop

    def total_steps(self, batches: Batches) -> int:
        """Optimiser steps of the whole run."""
        return -(-self.micro_batches(batches) // self.accumulation)


def batches_of(
    examples: Examples,
    data: DataConfig,
    training: TrainingConfig,
    processes: int = 1,
    rank: int = 0,
) -> Batches:
    """The batches of a run; of several processes, those of one."""
    share = {"rank": rank, "world_size": processes}
    size, epochs = training.rows, training.num_train_epochs
    if training.objective == "kto":
        in_step = size * training.accumulation * processes
        if min(in_step, len(examples)) < 2:
            raise ConfigError(
                "training.objective=kto compares each answer with others of its step, and a step "
                "has one example; set training.per_device_train_batch_size=4"
            )
        share["mismatch_within"] = in_step
    return make_batches(examples, size, training.seed, data.shuffle, epochs=epochs, **share)


@dataclass(frozen=True)
class RunLength:
    """How long a run is."""

    steps: int  # of the optimiser
    examples: int
    passes: float  # over the examples
    warmup_steps: int
    by_passes: bool = False  # whether the config gives the passes, and not the steps

    @classmethod
    def of(cls, training: TrainingConfig, batches: Batches) -> "RunLength":
        """The length of a run on these batches."""
        steps, by_passes = training.total_steps(batches), training.max_steps is None
        passes = batches.epoch(training.micro_batches(batches))
        n = len(batches.examples)
        return cls(steps, n, passes, training.warmup_of(steps), by_passes)

    def __str__(self) -> str:
        passes = f"{self.passes:,.0f}" if self.passes >= 10 else f"{self.passes:.2f}"
        return f"{self.steps:,} steps: {passes} passes over {self.examples:,} examples"

    @property
    def warnings(self) -> list[str]:
        """What is most likely not intended, with the remedy."""
        warnings = []
        if self.warmup_steps >= self.steps > 1:
            warnings.append(
                f"training.warmup_steps={self.warmup_steps} is all of the run's {self.steps:,} "
                "steps, so the learning rate does not reach its peak before the end; set "
                f"training.warmup_steps={self.steps // 10}"
            )
        if self.passes > MANY_PASSES:
            steps = math.ceil(self.steps / self.passes * USUAL_PASSES)
            fewer = f"num_train_epochs={USUAL_PASSES}" if self.by_passes else f"max_steps={steps}"
            warnings.append(
                f"{self.passes:,.0f} passes over {self.examples:,} examples learn them by heart; "
                f"set training.{fewer}, which is {USUAL_PASSES} passes, or collect more rows"
            )
        return warnings
