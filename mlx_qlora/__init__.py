"""mlx-qlora: fine-tune Llama models with QLoRA on a Mac, in pure MLX.

Names load on first use (PEP 562), so importing the package costs next to nothing. The one thing
that happens at import is the choice of BLAS on Linux; see `mlx_qlora.cpu.blas`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from mlx_qlora.cpu.blas import load_fast_blas

load_fast_blas()

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOME = {
    "AdapterError": "errors",
    "Batch": "data.batches",
    "CheckpointingConfig": "train.checkpoint",
    "ConfigError": "errors",
    "DataConfig": "data.read",
    "DataError": "errors",
    "Examples": "data.examples",
    "GenerationConfig": "infer.tokens",
    "LoggingConfig": "train.metrics",
    "LoraConfig": "model.lora",
    "ModelConfig": "config",
    "ProcessError": "errors",
    "PromptCache": "infer.tokens",
    "QuantConfig": "model.quantize",
    "RunConfig": "config",
    "SourceError": "errors",
    "Speed": "infer.generate",
    "TokenizerError": "errors",
    "TrainResult": "train.loop",
    "TrainingError": "errors",
    "TrainingConfig": "train.config",
    "UserError": "errors",
    "WeightsError": "errors",
    "active": "adapters.several",
    "adapter_names": "adapters.several",
    "add_lora": "model.lora",
    "attach": "adapters.several",
    "chat": "infer.chat",
    "combine": "adapters.several",
    "detach": "adapters.several",
    "disabled": "adapters.several",
    "evaluate": "infer.evaluate",
    "fine_tune": "run",
    "generate": "infer.generate",
    "generate_batch": "infer.generate",
    "load": "loading",
    "load_adapter": "adapters.peft",
    "loss_and_grads": "train.engine",
    "make_batches": "data.batches",
    "merge": "adapters.merge",
    "plan": "before.plan",
    "push_to_hub": "adapters.push",
    "read_examples": "data.read",
    "save_adapter": "adapters.peft",
    "save_gguf_adapter": "adapters.export",
    "save_merged": "adapters.merge",
    "save_portable": "adapters.export",
    "stream": "infer.generate",
    "switch": "adapters.several",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


if not TYPE_CHECKING:  # a checker would take any name for Any

    def __getattr__(name: str) -> Any:
        """Imports a public name when it is first used (PEP 562)."""
        if name not in _HOME:
            raise AttributeError(f"module 'mlx_qlora' has no attribute {name!r}")
        value = getattr(importlib.import_module(f"mlx_qlora.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted(__all__)


if TYPE_CHECKING:  # what type checkers and editors read instead of __getattr__
    from mlx_qlora.adapters.export import save_gguf_adapter as save_gguf_adapter
    from mlx_qlora.adapters.export import save_portable as save_portable
    from mlx_qlora.adapters.merge import merge as merge
    from mlx_qlora.adapters.merge import save_merged as save_merged
    from mlx_qlora.adapters.peft import load_adapter as load_adapter
    from mlx_qlora.adapters.peft import save_adapter as save_adapter
    from mlx_qlora.adapters.push import push_to_hub as push_to_hub
    from mlx_qlora.adapters.several import active as active
    from mlx_qlora.adapters.several import adapter_names as adapter_names
    from mlx_qlora.adapters.several import attach as attach
    from mlx_qlora.adapters.several import combine as combine
    from mlx_qlora.adapters.several import detach as detach
    from mlx_qlora.adapters.several import disabled as disabled
    from mlx_qlora.adapters.several import switch as switch
    from mlx_qlora.before.plan import plan as plan
    from mlx_qlora.config import ModelConfig as ModelConfig
    from mlx_qlora.config import RunConfig as RunConfig
    from mlx_qlora.data.batches import Batch as Batch
    from mlx_qlora.data.batches import make_batches as make_batches
    from mlx_qlora.data.examples import Examples as Examples
    from mlx_qlora.data.read import DataConfig as DataConfig
    from mlx_qlora.data.read import read_examples as read_examples
    from mlx_qlora.errors import AdapterError as AdapterError
    from mlx_qlora.errors import ConfigError as ConfigError
    from mlx_qlora.errors import DataError as DataError
    from mlx_qlora.errors import ProcessError as ProcessError
    from mlx_qlora.errors import SourceError as SourceError
    from mlx_qlora.errors import TokenizerError as TokenizerError
    from mlx_qlora.errors import TrainingError as TrainingError
    from mlx_qlora.errors import UserError as UserError
    from mlx_qlora.errors import WeightsError as WeightsError
    from mlx_qlora.infer.chat import chat as chat
    from mlx_qlora.infer.evaluate import evaluate as evaluate
    from mlx_qlora.infer.generate import Speed as Speed
    from mlx_qlora.infer.generate import generate as generate
    from mlx_qlora.infer.generate import generate_batch as generate_batch
    from mlx_qlora.infer.generate import stream as stream
    from mlx_qlora.infer.tokens import GenerationConfig as GenerationConfig
    from mlx_qlora.infer.tokens import PromptCache as PromptCache
    from mlx_qlora.loading import load as load
    from mlx_qlora.model.lora import LoraConfig as LoraConfig
    from mlx_qlora.model.lora import add_lora as add_lora
    from mlx_qlora.model.quantize import QuantConfig as QuantConfig
    from mlx_qlora.run import fine_tune as fine_tune
    from mlx_qlora.train.checkpoint import CheckpointingConfig as CheckpointingConfig
    from mlx_qlora.train.config import TrainingConfig as TrainingConfig
    from mlx_qlora.train.engine import loss_and_grads as loss_and_grads
    from mlx_qlora.train.loop import TrainResult as TrainResult
    from mlx_qlora.train.metrics import LoggingConfig as LoggingConfig
