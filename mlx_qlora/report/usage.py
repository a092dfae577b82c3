"""How to use the adapter of this very folder: commands that can be copied."""

import json
import shlex
from dataclasses import dataclass

from mlx_qlora.adapters.card import VLLM_RANKS
from mlx_qlora.report.answers import ask_command
from mlx_qlora.report.facts import Facts


@dataclass(frozen=True)
class Usage:
    """One tool.

    Attributes:
        tool: its name.
        code: to be copied.
        note: what to know, if anything.
    """

    tool: str
    code: str
    note: str = ""


def usages(facts: Facts) -> list[Usage]:
    """For each tool that opens the adapter, what to type."""
    return [_here(facts), _peft(facts), _mlx_lm(facts), _vllm(facts), _llama_cpp(facts)]


def _here(facts: Facts) -> Usage:
    folder = shlex.quote(facts.folder)
    merge = f"mlx-qlora merge --adapter {folder} --output-dir merged"
    note = "merge makes a model that needs no adapter any more."
    return Usage("mlx-qlora", f"{ask_command(facts)}\n{merge}", note)


def _peft(facts: Facts) -> Usage:
    folder = json.dumps(facts.folder, ensure_ascii=False)
    code = (
        "from peft import AutoPeftModelForCausalLM\n"
        "from transformers import AutoTokenizer\n\n"
        f"model = AutoPeftModelForCausalLM.from_pretrained({folder})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({folder})"
    )
    return Usage("PEFT", code, f"Fetches {facts.base}.")


def _mlx_lm(facts: Facts) -> Usage:
    base, folder = shlex.quote(facts.base), shlex.quote(f"{facts.folder}/mlx")
    code = f'mlx_lm.generate --model {base} --adapter-path {folder} --prompt "Hello"'
    return Usage("mlx-lm", code, "On a Mac.")


def _vllm(facts: Facts) -> Usage:
    adapter, folder = facts.adapter, facts.folder
    if adapter.get("use_dora"):
        code = f"{_merge(facts)}\nvllm serve merged"
        return Usage("vLLM", code, "vLLM computes no DoRA, so the adapter is merged first.")
    before, note = "", "Serves it as the model named tuned."
    if not _is_plain(facts):
        before = (
            f"mlx-qlora export --adapter {shlex.quote(folder)} --output-dir portable --portable\n"
        )
        folder, note = "portable", f"vLLM takes one rank and one scale: --portable. {note}"
    rank = max([adapter.get("r") or 0, *(adapter.get("rank_pattern") or {}).values()])
    enough = [known for known in VLLM_RANKS if known >= rank]
    if not enough:
        code = f"{_merge(facts)}\nvllm serve merged"
        return Usage("vLLM", code, f"vLLM takes no rank of {rank}, so the adapter is merged first.")
    flags = f"--max-lora-rank {enough[0]} --lora-modules {shlex.quote(f'tuned={folder}')}"
    code = f"{before}vllm serve {shlex.quote(facts.base)} --enable-lora {flags}"
    return Usage("vLLM", code, note)


def _llama_cpp(facts: Facts) -> Usage:
    if facts.adapter.get("use_dora"):
        convert = "python convert_hf_to_gguf.py merged --outfile model.gguf --outtype f16"
        note = (
            "llama.cpp computes no DoRA, so the adapter is merged; convert in llama.cpp's folder."
        )
        return Usage("llama.cpp, Ollama", f"{_merge(facts)}\n{convert}", note)
    code = (
        f"mlx-qlora export --adapter {shlex.quote(facts.folder)} --output-dir gguf --gguf\n"
        'llama-cli -m BASE.gguf --lora gguf/adapter.gguf -p "Hello"\n'
        "ollama create tuned -f gguf/Modelfile"
    )
    note = "BASE.gguf is the trained model as GGUF; the Modelfile names it in its line FROM."
    return Usage("llama.cpp, Ollama", code, note)


def _merge(facts: Facts) -> str:
    return f"mlx-qlora merge --adapter {shlex.quote(facts.folder)} --output-dir merged"


def _is_plain(facts: Facts) -> bool:
    return not any(facts.adapter.get(k) for k in ("use_rslora", "rank_pattern", "alpha_pattern"))
