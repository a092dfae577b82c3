"""Generation speed: ours against mlx-lm's, from the same weights and prompts.

Run as: python benchmarks/generate_speed.py --rounds 3

Both have SmolLM2-135M's weights, dense and in float32, and continue the same prompts of 64 and of
512 tokens, always with the likeliest token and past any end-of-text token. One prompt: our
`generate_tokens` against mlx-lm's `stream_generate`. Four prompts at once: our `batch_tokens`,
which is `generate_batch` without text, against mlx-lm's `BatchGenerator`. Nobody turns tokens into
text: both get and give ids.

The two take turns in one process, round by round; a first round is left out. BLAS has a thread for
each core, as users get it; where other programs keep the cores busy, its threads wait for each
other and times scatter wildly: `--threads 1` compares there. Prompt tokens/s are those of all
prompts over the time to the first token; generation tokens/s count from there on. Asserted: both
choose the same tokens, our generation is at least as fast but for what the clock scatters, and
four prompts at once are so many times as fast as one.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import measure
import mlx.core as mx
from trainers import MODEL, dense_weights, our_model

import mlx_qlora as mq
from mlx_qlora.cpu import blas

LEAST_SHARE = 0.95  # of mlx-lm's speed: a batch differs by less than rounds scatter
LEAST_GAIN = 2.5  # of a batch over one prompt, in tokens/s of all prompts
PROMPT_LENGTHS, BATCH = (64, 512), 4

Prompts = list[list[int]]


@dataclass
class Made:
    """What a generator did with some prompts.

    Attributes:
        first: seconds until each prompt had its first token.
        per_second: tokens generated from there on, of all prompts together.
        tokens: the new ones of each prompt.
    """

    first: float
    per_second: float
    tokens: Prompts


def main() -> None:
    """Measures, prints a table and a JSON line, and asserts the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", default=3, type=int)
    parser.add_argument("--tokens", default=64, type=int, help="to generate for each prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of BLAS, for both")
    args = parser.parse_args()

    model = our_model("resident")
    theirs = mlx_lm_model(model)
    one = {"ours": ours(model), "mlx-lm": mlx_lm(theirs)}
    many = {"ours": our_batch(model), "mlx-lm": mlx_lm_batch(theirs)}
    text = some_text()
    cases = {}
    for n, length in itertools.product((1, BATCH), PROMPT_LENGTHS):
        prompts = [text[i * length : (i + 1) * length] for i in range(n)]
        cases[f"{n} x {length} tokens"] = (prompts, one if n == 1 else many)

    rounds: dict[str, dict[str, list[Made]]] = {
        case: {name: [] for name in generators} for case, (_, generators) in cases.items()
    }
    with blas.threads(args.threads):
        for _ in range(args.rounds + 1):
            for case, (prompts, generators) in cases.items():
                for name, generate in generators.items():
                    rounds[case][name].append(generate(prompts, args.tokens))
    results = {case: summary(found, cases[case][0]) for case, found in rounds.items()}
    show(results)
    speeds = {
        f"{name}, {case}": found["per_second"]["median"]
        for case, result in results.items()
        for name, found in result["generators"].items()
    }
    plot = measure.bars("generate_speed", f"{MODEL}, float32, greedy", "new tokens/s", speeds)
    measure.finish("generate_speed", vars(args), results, plot)
    check(results)


def some_text() -> list[int]:
    """Token ids of this machine's own functions and docstrings, one after the other."""
    _, tokenizer = mq.load(MODEL)
    examples = measure.docstrings(tokenizer, 256)
    wanted, ids = BATCH * max(PROMPT_LENGTHS), []
    while len(ids) < wanted:
        ids += examples[len(ids) % len(examples)].tokens.tolist()
    return ids[:wanted]


# ---- generators --------------------------------------------------------------------------------


def ours(model: Any) -> Callable[[Prompts, int], Made]:
    """Our generator, of one prompt."""
    from mlx_qlora.infer.tokens import generate_tokens

    def generate(prompts: Prompts, n: int) -> Made:
        how = mq.GenerationConfig(temperature=0, repetition_penalty=1, max_new_tokens=n)
        return timed(generate_tokens(model, prompts[0], how))

    return generate


def our_batch(model: Any) -> Callable[[Prompts, int], Made]:
    """Our generator of batches; the first token of each prompt counts as part of the waiting."""
    from mlx_qlora.infer.tokens import batch_tokens

    def generate(prompts: Prompts, n: int) -> Made:
        how = mq.GenerationConfig(temperature=0, repetition_penalty=1, max_new_tokens=n)
        tokens: Prompts = [[] for _ in prompts]
        start, times = time.perf_counter(), []
        for i, token in batch_tokens(model, prompts, how, None, len(prompts), set()):
            tokens[i].append(token)
            times.append(time.perf_counter())
        first, made = times[len(prompts) - 1], len(times) - len(prompts)
        return Made(first - start, made / (times[-1] - first), tokens)

    return generate


def mlx_lm(model: Any) -> Callable[[Prompts, int], Made]:
    """mlx-lm's generator, of one prompt."""
    from mlx_lm import stream_generate

    def generate(prompts: Prompts, n: int) -> Made:
        made = stream_generate(model, no_tokenizer(), prompts[0], max_tokens=n)
        return timed(response.token for response in made)

    return generate


def mlx_lm_batch(model: Any) -> Callable[[Prompts, int], Made]:
    """mlx-lm's generator of batches, timed as ours: its own clock leaves the first token out."""
    from mlx_lm.generate import BatchGenerator

    def generate(prompts: Prompts, n: int) -> Made:
        start = time.perf_counter()
        generator = BatchGenerator(model)
        uids = generator.insert(prompts, [n] * len(prompts))
        tokens: dict[int, list[int]] = {uid: [] for uid in uids}
        times = []
        while responses := generator.next_generated():
            for response in responses:
                tokens[response.uid].append(response.token)
                times.append(time.perf_counter())
        generator.close()
        first, made = times[len(prompts) - 1], len(times) - len(prompts)
        return Made(first - start, made / (times[-1] - first), list(tokens.values()))

    return generate


def mlx_lm_model(source: Any) -> Any:
    """mlx-lm's model with our model's weights."""
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(source.hf_config))
    model.load_weights(list(dense_weights(source).items()))
    mx.eval(model.parameters())
    return model


def no_tokenizer() -> Any:
    """A tokenizer that knows no text and no end; mlx-lm wants one."""
    from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

    class NoText(StreamingDetokenizer):
        text, tokens, offset = "", (), 0
        reset = finalize = lambda self: None
        add_token = lambda self, token: None  # noqa: E731

    class NoTokenizer(TokenizerWrapper):
        detokenizer, eos_token_ids = NoText(), frozenset()
        __init__ = lambda self: None  # noqa: E731
        decode = lambda self, ids: ""  # noqa: E731

    return NoTokenizer()


def timed(tokens: Iterable[int]) -> Made:
    """Takes the tokens of one prompt."""
    start, times, ids = time.perf_counter(), [], []
    for token in tokens:
        times.append(time.perf_counter())
        ids.append(token)
    return Made(times[0] - start, (len(ids) - 1) / (times[-1] - times[0]), [ids])


# ---- figures -----------------------------------------------------------------------------------


def summary(rounds: dict[str, list[Made]], prompts: Prompts) -> dict[str, Any]:
    """One case's figures, without the first round."""
    size = sum(map(len, prompts))
    measured = {name: made[1:] for name, made in rounds.items()}
    shares = [
        mine.per_second / other.per_second
        for mine, other in zip(measured["ours"], measured["mlx-lm"])
    ]
    return {
        "generators": {
            name: {
                "prompt_per_second": measure.spread([size / one.first for one in made]),
                "first_seconds": measure.spread([one.first for one in made]),
                "per_second": measure.spread([one.per_second for one in made]),
            }
            for name, made in measured.items()
        },
        "share": measure.spread(shares),
        "same_tokens": rounds["ours"][0].tokens == rounds["mlx-lm"][0].tokens,
    }


def show(results: dict[str, dict[str, Any]]) -> None:
    """Prints the table for a person."""
    columns = ["prompts", "generator", "prompt tokens/s", "first token ms", "new tokens/s", "share"]
    rows = [
        [
            case,
            name,
            measure.shown(found["prompt_per_second"]),
            f"{found['first_seconds']['median'] * 1e3:,.0f}",
            measure.shown(found["per_second"], 1),
            measure.shown(result["share"], 2) if name == "ours" else "",
        ]
        for case, result in results.items()
        for name, found in result["generators"].items()
    ]
    measure.show(f"{MODEL}, float32, greedy", columns, rows)


def check(results: dict[str, dict[str, Any]]) -> None:
    """Asserts the claims."""
    for case, result in results.items():
        share = result["share"]["median"]
        print(f"ours / mlx-lm, {case}: {share:.2f} of the new tokens/s")
        assert result["same_tokens"], f"{case}: the two choose different tokens"
        assert share >= LEAST_SHARE, f"{case}: less than {LEAST_SHARE} of mlx-lm's speed"
    for length in PROMPT_LENGTHS:
        one, many = (
            results[f"{n} x {length} tokens"]["generators"]["ours"]["per_second"]["median"]
            for n in (1, BATCH)
        )
        print(f"{BATCH} prompts / one, {length} tokens: {many / one:.2f} times the new tokens/s")
        assert many >= LEAST_GAIN * one, f"a batch of {BATCH} gains less than {LEAST_GAIN} times"


if __name__ == "__main__":
    main()
