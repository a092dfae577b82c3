"""A few held-out rows, answered before the training and after it."""

import time
from typing import NamedTuple

import numpy as np

from mlx_qlora.after.advice import CUT
from mlx_qlora.data.examples import Examples
from mlx_qlora.data.tokenizer import Tokenizer
from mlx_qlora.infer.tokens import GenerationConfig, generate_tokens
from mlx_qlora.model.llama import LlamaForCausalLM

MOST_NEW = 128  # tokens of an answer
MOST_PROMPT = 1024  # tokens; longer ones take too long to read
SECONDS = 4.0  # for one answer; a cut one ends in CUT


class Question(NamedTuple):
    """A held-out row: the ids before its first learned token, and its first learned stretch."""

    prompt: list[int]
    reference: list[int]


def questions(held_out: Examples | None, most: int = 3) -> list[Question]:
    """The first rows that have a prompt of a fit length; none if nothing is held out."""
    chosen: list[Question] = []
    for example in held_out or ():
        learned = np.append(example.learned, False)
        start = int(learned.argmax())
        end = start + int((~learned[start:]).argmax())
        # With data.train_on=all a row begins with what is learned: nothing there asks.
        if 2 <= start <= MOST_PROMPT and learned[start]:
            tokens = example.tokens.tolist()
            chosen.append(Question(tokens[:start], tokens[start:end]))
        if len(chosen) == most:
            break
    return chosen


def asked(
    model: LlamaForCausalLM, tokenizer: Tokenizer, rows: list[Question], max_new_tokens: int
) -> list[str]:
    """The model's greedy answers, at most MOST_NEW tokens and about SECONDS each."""
    most = min(max_new_tokens, MOST_NEW)
    greedy = GenerationConfig(temperature=0.0, repetition_penalty=1.0, max_new_tokens=most)
    answers = []
    for row in rows:
        ids, ended, until = [], False, time.monotonic() + SECONDS
        for token in generate_tokens(model, row.prompt, greedy):
            if token in tokenizer.eos_ids:
                ended = True
                break
            ids.append(token)
            if time.monotonic() > until:
                break
        answers.append(tokenizer.decode(ids) + ("" if ended else CUT))
    return answers


def samples_of(
    tokenizer: Tokenizer, rows: list[Question], before: list[str], after: list[str]
) -> list[dict[str, str]]:
    """What the report shows of each row: prompt, reference, and the two answers."""
    return [
        {
            "prompt": tokenizer.decode(row.prompt),
            "reference": tokenizer.decode(i for i in row.reference if i not in tokenizer.eos_ids),
            "before": old,
            "after": new,
        }
        for row, old, new in zip(rows, before, after)
    ]
