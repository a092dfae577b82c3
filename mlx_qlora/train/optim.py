"""Learning rate, gradient clipping and AdamW: functions of (config, step), all in float32.

AdamW is that of Loshchilov & Hutter 2019 (arXiv 1711.05101), bias correction included. The
weights, both moments and the gradient each are one flat buffer, so an update is a few fused
passes, however many LoRA matrices there are.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from mlx_qlora import device
from mlx_qlora.cpu.streams import streams
from mlx_qlora.tree import flat, nested

SCHEDULES = ("cosine", "linear", "constant_with_warmup")


def learning_rate(
    step: int, peak: float, warmup_steps: int, total_steps: int, schedule: str = "cosine"
) -> float:
    """The learning rate of one optimiser step, from 1 to total_steps; one of SCHEDULES.

    No step trains at a rate of 0, where it would learn nothing: step k of n in the warmup has
    peak * k / n, and cosine and linear would reach 0 one step after the last.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant_with_warmup":
        return peak
    first = max(warmup_steps, 1)  # the step at the peak
    progress = (step - first) / (total_steps - first + 1)
    if schedule == "linear":
        return peak * (1 - progress)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """The trainable weights with their moments, and the update that moves them.

    Args:
        weights: tree of float32 arrays, `model.trainable_parameters()`.
        beta1, beta2: decay of the mean of gradients, and of squared gradients.
        epsilon: added to the root, after bias correction, as in the paper and in torch.
        weight_decay: decoupled; applied to every LoRA matrix, as torch does without groups.
        max_grad_norm: the gradient's global norm is clipped to this; None leaves it.
        lr_ratio: lora_B learns at this many times the learning rate (LoRA+, Hayou et al. 2024,
            arXiv 2402.12354); its decay is as much stronger, as in PEFT's optimiser.
    """

    def __init__(
        self,
        weights: dict[str, Any],
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = 1.0,
        lr_ratio: float = 1.0,
    ) -> None:
        self.shapes = {name: array.shape for name, array in flat(weights).items()}
        self.weights = flatten(weights)  # (P,) float32, one after the other
        self.mean = mx.zeros_like(self.weights)  # first moment
        self.square = mx.zeros_like(self.weights)  # second moment
        self.step = 0  # updates made; a skipped one is none
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay
        self.max_grad_norm = max_grad_norm
        self.ratios = mx.array(1.0) if lr_ratio == 1 else _ratios(self.shapes, lr_ratio)

        def move(*arrays: mx.array) -> tuple[mx.array, ...]:
            weights, mean, square, grad, ratios, factor, finite, decay, rate, correction = arrays
            grad = grad * factor
            new_mean = beta1 * mean + (1 - beta1) * grad
            new_square = beta2 * square + (1 - beta2) * grad.square()
            change = rate * (new_mean / (mx.sqrt(new_square) * correction + epsilon))
            moved = weights - ratios * (decay * weights + change)
            news, olds = (moved, new_mean, new_square), (weights, mean, square)
            return tuple(mx.where(finite, new, old) for new, old in zip(news, olds))

        # Shapeless is safe: nothing but elementwise operations, and no shape is looked at.
        self._move: Any = mx.compile(move, shapeless=True)

    def update(
        self, grads: dict[str, Any], n_tokens: float, rate: float, nats: mx.array | float = 0.0
    ) -> mx.array:
        """Moves the weights by one step: one division, clipping, AdamW.

        Nothing moves if the gradient or the loss is not finite, if the gradient of supervised
        tokens is exactly 0, or if an error is raised. Returns the gradient's global norm before
        clipping, a float32 scalar.

        Args:
            grads: tree of gradients of the loss sum over all micro-batches of the step.
            n_tokens: supervised tokens of the step, or their weights; the only division is here.
            rate: the learning rate.
            nats: the loss sum, and what else has to be finite.
        """
        step, grad = self.step + 1, flatten(grads)
        n = n_tokens or 1
        norm = self._norm(grad) / n
        # Before clipping, which would make a finite number of an infinite one. A moment that has
        # once been NaN stays so: nothing moves where anything is not finite.
        finite = mx.isfinite(norm) & mx.isfinite(mx.array(nats, mx.float32)).all()
        finite &= (norm > 0) | (n_tokens == 0)  # see `Step`: a device that lost its work
        factor = mx.array(1 / n)
        if self.max_grad_norm is not None:
            # 1e-6 as in torch.nn.utils.clip_grad_norm_, for equal trajectories.
            factor = factor * mx.minimum(self.max_grad_norm / (norm + 1e-6), 1)
        # Divided and rooted here, as a kernel would do it once for each weight; and arrays, because
        # Python numbers would be baked into the compiled update.
        numbers = (
            rate * self.weight_decay,
            rate / (1 - self.beta1**step),
            1 / math.sqrt(1 - self.beta2**step),
        )
        scalars = [factor, finite, *(mx.array(number, mx.float32) for number in numbers)]

        buffers = self.weights, self.mean, self.square
        moved: list[list[mx.array]] = []
        for part, stream in self._slices():
            with mx.stream(stream):
                olds = (buffer[part] for buffer in buffers)
                ratios = self.ratios if self.ratios.ndim == 0 else self.ratios[part]
                moved.append(list(self._move(*olds, grad[part], ratios, *scalars)))
            mx.async_eval(moved[-1])
            if len(moved) > device.cores():  # so that only few temporary arrays exist
                mx.eval(moved[-1 - device.cores()])
        del grad
        square, mean, weights = (_joined(moved) for _ in buffers)
        mx.eval(square, mean, weights, norm)
        self.square, self.mean, self.weights = square, mean, weights
        if finite.item():
            self.step = step
        return norm

    def _slices(self) -> Iterator[tuple[slice, mx.Stream]]:
        """The slices of a buffer, each with the stream that computes it."""
        size = device.current().adamw_slice  # near a CPU's caches; few of them on a GPU
        slices = (slice(start, start + size) for start in range(0, self.weights.size, size))
        return zip(slices, itertools.cycle(streams(device.cores())))

    def _norm(self, grad: mx.array) -> mx.array:
        """Of the whole buffer, whose squares never exist all at once."""
        mx.async_eval(grad)
        squares = []
        for part, stream in self._slices():
            with mx.stream(stream):
                squares.append(grad[part].square().sum())
            mx.async_eval(squares[-1])
        return mx.sqrt(mx.stack(squares).sum())

    def tree(self) -> dict[str, Any]:
        """The weights in the model's tree."""
        return nested(self.named(self.weights))

    def named(self, buffer: mx.array) -> dict[str, mx.array]:
        """Name -> its part of a flat buffer, in its own shape."""
        return unflatten(buffer, self.shapes)


def _joined(moved: list[list[mx.array]]) -> mx.array:
    """The last buffer's slices as one, while those of the others wait."""
    parts = [news.pop() for news in moved]
    if len(parts) == 1:
        return parts[0]
    whole = mx.concatenate(parts)
    mx.eval(whole)
    return whole


def _ratios(shapes: dict[str, tuple[int, ...]], lr_ratio: float) -> mx.array:
    """(P,) float32: lr_ratio for every number of a lora_B or a length of DoRA, 1 for the others."""
    parts = [
        # As in PEFT's optimiser, whose rule for what is no matrix is the same.
        mx.full((math.prod(shape),), lr_ratio if ".lora_B." in name or len(shape) == 1 else 1.0)
        for name, shape in shapes.items()
    ]
    return mx.concatenate(parts)


def flatten(tree: dict[str, Any]) -> mx.array:
    """All leaves of a tree, in its order, as one (P,) float32 buffer."""
    leaves = [array.reshape(-1).astype(mx.float32) for array in flat(tree).values()]
    return mx.concatenate(leaves)


def unflatten(buffer: mx.array, shapes: dict[str, tuple[int, ...]]) -> dict[str, mx.array]:
    """Name -> its part of a flat buffer, in its own shape."""
    ends = itertools.accumulate(map(math.prod, shapes.values()))
    parts = mx.split(buffer, [*ends][:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts)}
