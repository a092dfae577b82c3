"""A source becomes a model and its tokenizer."""

from dataclasses import dataclass
from pathlib import Path

from mlx_qlora import backend
from mlx_qlora.adapters.load import load_adapter
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer
from mlx_qlora.fields import check_choices, option
from mlx_qlora.model.hub import resolve
from mlx_qlora.model.llama import LlamaForCausalLM
from mlx_qlora.model.quantize import QuantConfig
from mlx_qlora.model.weights import load_model, open_checkpoint


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and in what precision."""

    source: str | None = option(
        None, "hub id (org/name), folder, .gguf file, or the built-in smollm2-135m"
    )
    revision: str | None = option(None, "branch, tag or commit of a hub repository")
    adapter: str | None = option(
        None, "PEFT folder to go on training from; its config then stands for `lora`"
    )
    base_model_name_or_path: str | None = option(
        None, "the original Hugging Face repository, where the model's files do not name it"
    )
    bits: int | None = option(
        4, "quantise to this while loading; null keeps the files' precision, as quantised files do"
    )
    group_size: int = option(64, "weights that share one scale")
    mode: str = option(
        "affine",
        "how: integers with a scale and a bias, or a float format",
        choices=("affine", "mxfp4", "mxfp8", "nvfp4"),
    )
    dtype: str = option(
        "auto",
        "of the computation; auto is bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    frozen_matmul: str = option(
        "auto",
        "how quantised weights are multiplied; see backend.py",
        choices=("auto", "quantized", "dequantize", "resident"),
    )

    def __post_init__(self) -> None:
        check_choices("model", self)
        self.quantize()

    def quantize(self) -> QuantConfig | None:
        """How dense weights are packed while loading."""
        return None if self.bits is None else QuantConfig(self.bits, self.group_size, self.mode)


def load(
    source: str | Path,
    quantize: QuantConfig | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    *,
    dtype: str = "auto",
    frozen_matmul: str = "auto",
) -> tuple[LlamaForCausalLM, Tokenizer]:
    """Loads a frozen model and its tokenizer.

    Args:
        source: a hub id (`org/name`), a folder of Hugging Face safetensors (dense, or quantised
            by MLX), a `*.gguf` file, or the built-in name `smollm2-135m`.
        quantize: quantises dense weights while loading, tensor by tensor; None keeps the files'
            own precision. Weights that are quantised already stay as they are.
        adapter: a PEFT folder to attach.
        revision: branch, tag or commit of a hub repository.
        dtype: of the computation: `auto` (bfloat16 on a GPU, float32 on a CPU) or a name.
        frozen_matmul: how quantised weights are multiplied: `auto`, or `quantized`, `dequantize`
            or `resident` as explained in `mlx_qlora.backend`.

    Returns:
        The model, evaluated, and the tokenizer.

    Raises:
        SourceError: the source cannot be found or fetched.
        WeightsError: its files are damaged, or of an unsupported architecture.
        TokenizerError: its tokenizer is missing or damaged.
        AdapterError: the adapter is damaged or belongs to another model.
        ConfigError: an unknown dtype or strategy, or a group size that does not fit.
    """
    chosen_dtype = backend.compute_dtype(dtype)
    backend.frozen_matmul(frozen_matmul)  # an unknown one is refused before anything is read
    checkpoint = open_checkpoint(resolve(source, revision))
    tokenizer = load_tokenizer(checkpoint.files.path, checkpoint.metadata)
    model = load_model(checkpoint, quantize, chosen_dtype, frozen_matmul)
    if adapter is not None:
        load_adapter(model, adapter)
    return model, tokenizer
