"""The real SmolLM2, read from its GGUF file by us and by transformers: logits and greedy text."""

from typing import Any

import numpy as np
import pytest
from support.models import our_logits, torch_logits
from support.tiny_folder import hf_smollm2

from mlx_qlora.infer.generate import generate, prompt_ids
from mlx_qlora.infer.tokens import GenerationConfig, batch_tokens

pytestmark = pytest.mark.slow
GREEDY: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 1.0}
PROMPTS = [
    "The capital of France is",
    "### Instruction:\nName three colours.\n\n### Response:\n",
    "Photosynthesis is the process by which",
    "import numpy as np\n\n",
    "1, 2, 3, 4,",
    "The best way to learn a language is",
    "Shakespeare wrote",
    "The mitochondria",
    "Q: What is 7 times 8?\nA:",
    "My favourite animal is the",
]


def test_smollm2s_logits_equal_transformers_reading_of_the_same_file(smollm2):
    model, tokenizer = smollm2
    text = "The capital of France is Paris. In 1789, the people of the city rose, because"
    tokens = np.array([tokenizer.encode(text)], np.int32)
    theirs = torch_logits(hf_smollm2(), tokens)
    ours = our_logits(model, tokens)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.std()


def test_greedy_text_is_that_of_transformers(smollm2):
    """Each of our tokens is transformers' first choice after all before it: its greedy text.

    All prompts together, as that takes a quarter of the time; the first one also alone.
    """
    model, tokenizer = smollm2
    config, ended = GenerationConfig(max_new_tokens=32, **GREEDY), set[int]()
    prompts = [prompt_ids(tokenizer, prompt) for prompt in PROMPTS]
    answers: list[list[int]] = [[] for _ in prompts]
    for i, token in batch_tokens(model, prompts, config, None, len(prompts), ended):
        if i not in ended:
            answers[i].append(token)
            ended |= {i} if token in tokenizer.eos_ids else set()
    for prompt, new in zip(prompts, answers):
        scores = torch_logits(hf_smollm2(), np.array([prompt + new[:-1]]))[0, len(prompt) - 1 :]
        assert new == scores.argmax(axis=-1).tolist(), tokenizer.decode(prompt)
        assert len(new) == 32 or new[-1] in tokenizer.eos_ids
    shown = [token for token in answers[0][:12] if token not in tokenizer.eos_ids]
    text = generate(model, tokenizer, PROMPTS[0], max_new_tokens=12, **GREEDY)
    assert text == tokenizer.decode(shown)
