"""Where an update begins: A and B of one linear, and what is left to the frozen matrix.

    true                Hu et al. 2021: A uniform, B zero; the update begins at nothing.
    gaussian            the same with A normal (Diffusers' way).
    pissa               Meng et al. 2024 (arXiv 2404.02948): the r principal components of W are
                        trained, the rest is frozen.
    pissa_niter_N       the same components by N rounds of a randomised SVD (Halko et al. 2011).
    olora               Büyükakyüz 2024 (arXiv 2406.01775): the first r columns of W's QR.
    loftq               Li et al. 2023 (arXiv 2310.08659), one round: what quantisation lost of W,
                        as far as rank r can give it back.

Names and definitions are PEFT's.
"""

import re
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.model.quantize import Linear, pack

PLAIN = (True, "gaussian")
FROM_WEIGHTS = ("pissa", "olora", "loftq")
OVERSAMPLED = 6  # columns that a randomised SVD draws beyond r, as torch.svd_lowrank does


@dataclass(frozen=True)
class Start:
    """Of one linear.

    Attributes:
        A: (r, d_in) float32.
        B: (d_out, r) float32.
        left: (d_out, d_in) float32, what the frozen matrix becomes; None if it stays.
    """

    A: mx.array
    B: mx.array
    left: mx.array | None = None


def is_known(name: Any) -> bool:
    """Whether `init_lora_weights` may be this."""
    if isinstance(name, str) and re.fullmatch(r"pissa_niter_[1-9]\d*", name):
        return True
    return name is True or name in ("gaussian", *FROM_WEIGHTS)


def changes_base(name: Any) -> bool:
    """Whether the frozen matrices make way for what is trained."""
    return isinstance(name, str) and name.startswith(("pissa", "olora"))


def start(
    name: Any, linear: Linear, r: int, scale: float, key: mx.array, original: mx.array | None
) -> Start:
    """The beginning of one linear's update.

    Args:
        name: of the initialisation.
        linear: of weight W (d_out, d_in), packed or dense.
        r: rank.
        scale: of the update.
        key: draws what is random.
        original: W before it was quantised; None where W is dense, or was packed in its files.

    Raises:
        ConfigError: what it starts from is not there.
    """
    d_out, d_in = linear.shape
    if name in PLAIN:
        B = mx.zeros((d_out, r), mx.float32)
        if name == "gaussian":
            return Start(mx.random.normal((r, d_in), mx.float32, scale=1 / r, key=key), B)
        bound = d_in**-0.5  # PEFT's kaiming_uniform(a=sqrt(5))
        return Start(mx.random.uniform(-bound, bound, (r, d_in), mx.float32, key), B)
    dense = linear.dense().astype(mx.float32)
    # What rounding has lost is still in the original, and its largest part in the components.
    W = np.array(dense if original is None else original.astype(mx.float32))
    if linear.quant is not None and original is None:
        raise ConfigError(
            f"lora.init_lora_weights: {name} needs the weights as they were before they were "
            "quantised; use a 16-bit model, which is quantised while it is loaded (model.bits)"
        )
    if name == "loftq":
        if linear.quant is None:
            raise ConfigError(
                "lora.init_lora_weights: loftq starts from what quantisation loses, and this model "
                "is not quantised; set model.bits"
            )
        U, S, V = np.linalg.svd(W - np.array(dense), full_matrices=False)
        return _product(U[:, :r], S[:r] / scale, V[:r])
    if name == "olora":
        Q, R = np.linalg.qr(W)
        A, B = mx.array(R[:r]), mx.array(Q[:, :r])
        return Start(A, B, mx.array(W) - scale * (B @ A))
    if name == "pissa":
        U, S, V = np.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = _svd(W, r, int(name.rpartition("_")[2]), key)
    begun = _product(U[:, :r], S[:r] / scale, V[:r])
    return Start(begun.A, begun.B, mx.array(W) - scale * (begun.B @ begun.A))


def leave(linear: Linear, left: mx.array) -> None:
    """Makes a matrix (d_out, d_in) float32 the frozen one, packed again as that was."""
    if linear.quant is None:
        linear.weight = left.astype(linear.weight.dtype)
    else:
        names = ("weight", "scales", "biases")
        for name, array in zip(names, pack(left, linear.quant)):
            linear[name] = array.astype(linear[name].dtype)
        linear.make_resident()
    linear.freeze()
    mx.eval(linear.parameters())


def _product(U: np.ndarray, S: np.ndarray, V: np.ndarray) -> Start:
    """B A = U diag(S) V, shared out evenly."""
    root = np.sqrt(S)
    return Start(mx.array(root[:, None] * V), mx.array(U * root))


def _svd(W: np.ndarray, r: int, rounds: int, key: mx.array) -> tuple[np.ndarray, ...]:
    """The first singular vectors and values (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    columns = min(r + OVERSAMPLED, *W.shape)
    Q = np.linalg.qr(W @ np.array(mx.random.normal((W.shape[1], columns), key=key)))[0]
    for _ in range(rounds):
        Q = np.linalg.qr(W.T @ Q)[0]
        Q = np.linalg.qr(W @ Q)[0]
    U, S, V = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, V
