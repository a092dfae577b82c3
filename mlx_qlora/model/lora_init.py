"""Where a LoRA update begins: at nothing, or with a part of what it is put beside."""

import re
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qlora.errors import ConfigError
from mlx_qlora.model.quantize import Linear

PLAIN = (True, "gaussian")  # initial weights that need nothing of the base
INITS = re.compile(r"gaussian|olora|loftq|pissa(_niter_[1-9]\d*)?")
OVERSAMPLED = 6  # columns that a randomised SVD draws beyond r, as torch.svd_lowrank does
Factors = tuple[mx.array, mx.array]  # A (r, d_in) and B (d_out, r), float32


def begins_with_base(name: Any) -> bool:
    """Whether what is trained begins with a part of the frozen matrices."""
    return isinstance(name, str) and name.startswith(("pissa", "olora"))


def initial(
    name: Any, linear: Linear, r: int, scale: float, key: mx.array, original: mx.array | None
) -> Factors:
    """A and B of the update of W (d_out, d_in), by the name of the initialisation.

    true            Hu et al. 2021: A uniform, B zero; the update begins at nothing.
    gaussian        the same with A normal (Diffusers' way).
    pissa           Meng et al. 2024 (arXiv 2404.02948): the r principal components of W.
    pissa_niter_N   the same components by N rounds of a randomised SVD (Halko et al. 2011).
    olora           Büyükakyüz 2024 (arXiv 2406.01775): the first r columns of W's QR.
    loftq           Li et al. 2023 (arXiv 2310.08659), one round: what quantisation lost of W,
                    as far as rank r can give it back.

    `original` is W before it was quantised; None where W is dense, or was packed in its files.
    """
    d_out, d_in = linear.shape
    if name in PLAIN:
        B = mx.zeros((d_out, r), mx.float32)
        if name == "gaussian":
            return mx.random.normal((r, d_in), mx.float32, scale=1 / r, key=key), B
        bound = d_in**-0.5  # PEFT's kaiming_uniform(a=sqrt(5))
        return mx.random.uniform(-bound, bound, (r, d_in), mx.float32, key), B
    if linear.quant is not None and original is None:
        raise ConfigError(
            f"lora.init_lora_weights: {name} needs the weights from before quantisation; use a "
            "16-bit model, to be quantised while it is loaded (model.bits)"
        )
    W = np.array((linear.dense() if original is None else original).astype(mx.float32))
    if name == "loftq":
        if linear.quant is None:
            raise ConfigError(
                "lora.init_lora_weights: loftq corrects for quantisation, and this model is not "
                "quantised; set model.bits"
            )
        W = W - np.array(linear.dense().astype(mx.float32))
    elif name == "olora":
        Q, R = np.linalg.qr(W)
        return mx.array(R[:r]), mx.array(Q[:, :r])
    if name.startswith("pissa_niter"):
        U, S, V = _randomised_svd(W, r, int(name.rpartition("_")[2]), key)
    else:
        U, S, V = np.linalg.svd(W, full_matrices=False)
    root = np.sqrt(S[:r] / scale)  # shared evenly by A and B
    return mx.array(root[:, None] * V[:r]), mx.array(U[:, :r] * root)


def take_off(linear: Linear, update: mx.array) -> None:
    """Take an update (d_out, d_in) float32 off a dense matrix."""
    linear.weight = (linear.weight.astype(mx.float32) - update).astype(linear.weight.dtype)
    linear.stack = None
    linear.freeze()
    mx.eval(linear.parameters())


def _randomised_svd(W: np.ndarray, r: int, rounds: int, key: mx.array) -> tuple[np.ndarray, ...]:
    """The first singular vectors and values (Halko et al. 2011, algorithms 4.4 and 5.1)."""
    columns = min(r + OVERSAMPLED, *W.shape)
    Q = np.linalg.qr(W @ np.array(mx.random.normal((W.shape[1], columns), key=key)))[0]
    for _ in range(rounds):
        Q = np.linalg.qr(W.T @ Q)[0]
        Q = np.linalg.qr(W @ Q)[0]
    U, S, V = np.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, V
