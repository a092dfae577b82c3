"""Optional packages, and the environment variables that change what a run does."""

import importlib.metadata
import json
import os
import sys
from collections.abc import Iterator

from mlx_qlora import backend
from mlx_qlora.checks.finding import Finding
from mlx_qlora.checks.machine import output_of

EXTRAS = {
    "tensorboard": ("tensorboard", "logging.report_to=[tensorboard]"),
    "wandb": ("wandb", "logging.report_to=[wandb]"),
    "matplotlib": ("plots", "plots as PNG"),
    "pyarrow": ("parquet", "rows in Parquet files"),
    "datasets": ("datasets", "rows from data sets of the hub"),
    "gguf": ("gguf", "adapters for llama.cpp and Ollama"),
    "rouge-score": ("evaluate", "ROUGE-L of answers"),
    "sacrebleu": ("evaluate", "chrF of answers"),
}


def packages() -> Iterator[Finding]:
    """Which optional ones are installed, and what each is for."""
    for package, (extra, purpose) in EXTRAS.items():
        try:
            version = importlib.metadata.version(package)
            yield Finding(package, "ok", f"{version}, for {purpose}")
        except importlib.metadata.PackageNotFoundError:
            fix = f"pip install 'mlx-qlora[{extra}]'"
            yield Finding(package, "ok", f"not installed; optional, for {purpose}", fix)


def environment() -> Iterator[Finding]:
    """Variables that change what a run does, where they are set or should be."""
    watchdog = "AGX_RELAX_CDM_CTXSTORE_TIMEOUT"
    if sys.platform == "darwin":
        if os.environ.get(watchdog):
            yield Finding("watchdog", "ok", f"{watchdog} is set: macOS lets long GPU work go on")
        elif _has_display():  # github.com/ml-explore/mlx/issues/3267
            text = "macOS stops GPU work that keeps the display waiting (ImpactingInteractivity)"
            yield Finding("watchdog", "ok", f"{text}; if it does", f"export {watchdog}=1")
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if threads and backend.backend().device == "cpu" and sys.platform.startswith("linux"):
        text = f"OPENBLAS_NUM_THREADS={threads}: training sets its own number, numpy keeps to it"
        yield Finding("environment", "ok", text)
    for name in ("HF_HOME", "HF_ENDPOINT"):
        if value := os.environ.get(name):
            yield Finding("environment", "ok", f"{name}={value}")


def _has_display() -> bool:
    found = json.loads(output_of("system_profiler", "-json", "SPDisplaysDataType"))
    return any(gpu.get("spdisplays_ndrvs") for gpu in found["SPDisplaysDataType"])
