"""Answers to many prompts, several at once, by mlx-lm's continuous batching.

On most machines a token costs the reading of all weights; rows of a batch share it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.fields import require
from mlx_qlora.infer.generate import Prompt, prompt_ids, room_for, stop_texts
from mlx_qlora.infer.pieces import Answer
from mlx_qlora.infer.sampling import GenerationConfig, Sampler, key_of, repetition_processor
from mlx_qlora.model.llama import LlamaForCausalLM


def generate_batch(
    model: LlamaForCausalLM,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_p: float = 0.9,
    top_k: int = 50,
    repetition_penalty: float = 1.1,
    seed: int | None = None,
    stop: str | Sequence[str] | None = None,
    *,
    batch_size: int = 8,
) -> list[str]:
    """The model's continuation of each prompt; where one ends, the next prompt takes its place.

    Args:
        model: base or tuned.
        tokenizer: the model's.
        prompts: each as `generate` takes it; a single one is a list of one.
        max_new_tokens: most tokens to generate for each prompt, as in `generate`.
        temperature: as in `generate`.
        top_p: as in `generate`.
        top_k: as in `generate`.
        repetition_penalty: as in `generate`; each prompt counts its own tokens.
        seed: prompt i draws as `generate(..., seed=seed + i)` does, whatever stands beside it.
        stop: as in `generate`.
        batch_size: most prompts at once; memory and speed depend on it, and the texts by the
            rounding of their logits alone.

    Returns:
        The new texts, in the order of the prompts.

    Raises:
        ConfigError: a value out of range, a prompt in the place of a list, or one that is empty or
            fills the model's context.
        TokenizerError: messages were given but the model has no chat template.
    """
    how = GenerationConfig(temperature, top_p, top_k, repetition_penalty, max_new_tokens)
    for last in (seed, seed if seed is None else seed + max(len(prompts) - 1, 0)):
        key_of(last)
    require(batch_size >= 1, "batch_size", "be at least 1", batch_size)
    alone = isinstance(prompts, str) or any(isinstance(prompt, dict) for prompt in prompts)
    require(not alone, "prompts", "be a list of prompts ([prompt] for a single one)", prompts)
    stops = stop_texts(stop)
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    room = [
        room_for(model, row, f"prompts[{i}]" if len(rows) > 1 else "the prompt")
        for i, row in enumerate(rows)
    ]
    answers = [Answer(tokenizer, stops) for _ in rows]
    texts, ended = [""] * len(rows), set[int]()
    for i, token in batch_tokens(model, rows, how, seed, batch_size, ended):
        texts[i] += answers[i].add(token)
        if answers[i].ended or len(answers[i].ids) == room[i]:
            ended.add(i)
    return [text + answer.end() for text, answer in zip(texts, answers)]


def batch_tokens(
    model: LlamaForCausalLM,
    prompts: list[list[int]],
    how: GenerationConfig,
    seed: int | None,
    batch_size: int,
    ended: set[int],
) -> Iterator[tuple[int, int]]:
    """New tokens of many prompts, as they come.

    Args:
        model: base or tuned.
        prompts: token ids of each, at least one.
        how: as for all.
        seed: of the first prompt; those behind it count on.
        batch_size: most prompts at once.
        ended: numbers of prompts that want no more tokens; looked at after each token.

    Yields:
        The number of a prompt, and a token for it.
    """
    from mlx_lm.generate import BatchGenerator

    samplers = [
        Sampler(how, key_of(None if seed is None else seed + i)) for i in range(len(prompts))
    ]
    if how.temperature == 0:  # one that is shared is called once for all rows
        samplers = samplers[:1] * len(prompts)
    penalise = how.repetition_penalty != 1
    processors: Any = [repetition_processor(how.repetition_penalty)] if penalise else []
    # Prompts of like lengths start together, as the shorter ones are padded.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    generator = BatchGenerator(
        model, completion_batch_size=batch_size, prefill_batch_size=batch_size
    )
    try:
        uids = generator.insert(
            [prompts[i] for i in order],
            max_tokens=[how.max_new_tokens] * len(order),
            samplers=[samplers[i] for i in order],
            logits_processors=[processors] * len(order),
        )
        numbers = dict(zip(uids, order))
        while responses := generator.next_generated():
            for response in responses:
                yield numbers[response.uid], int(response.token)
            if done := [r.uid for r in responses if numbers[r.uid] in ended]:
                generator.remove(done)
    finally:
        generator.close()
