"""Random rows and chats against readers that share no code with ours: nothing differs in silence.

Run as: python benchmarks/fuzz.py --rows 10000 --chats 1000
and, for what `hostile.py` tries: python benchmarks/fuzz.py --rows 0 --chats 0 --malformed 100000
--files 10000 --state fuzz-state.json

Every word of a row is one of a kind, so that what became of it can be seen. Claims:

- rows, of every format, with known, harmless and unknown fields, nulls, and parts: each word is
  trained where it should be, or its field is counted by name, or the row is refused;
- chats, for each real tokenizer and template: what is trained is what transformers'
  `apply_chat_template` writes, prompts have its ids, and answers alone are learned; a chat is
  refused only if transformers refuses it, or leaves something of it out.
"""

import argparse
import itertools
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile
import jinja2

import mlx_qlora as mq
from mlx_qlora.data.tokenizer import Tokenizer, load_tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

Row = dict[str, Any]
WORD = re.compile(r"w\d+x")
DATE = "26 Jul 2024"  # that rows are written with


def main() -> None:
    """Tries rows and chats, prints what happened, and asserts that nothing else did."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=10_000, type=int, help="of each format")
    parser.add_argument("--chats", default=1_000, type=int, help="for each template")
    parser.add_argument("--malformed", default=0, type=int, help="rows that are none")
    parser.add_argument("--files", default=0, type=int, help="that are changed; see hostile.py")
    parser.add_argument("--state", type=Path, help="file from which these two go on")
    parser.add_argument("--seed", default=0, type=int)
    args = parser.parse_args()
    start, wrong, counts = time.perf_counter(), [], {}
    done = hostile.try_all(args.malformed, args.files, args.seed, args.state)  # forks: at first
    wrong += [" ".join(map(str, bad)) for bad in done["bad"]]
    for form in FORMATS if args.rows else ():
        counts[form], differences = try_rows(form, args.rows, args.seed)
        wrong += differences
    for chat in templates() if args.chats else ():
        counts[chat], differences = try_chats(chat, args.chats, args.seed)
        wrong += differences
    for line in wrong[:20]:
        print(line[:2000])
    for name, count in counts.items():
        print(f"{name:18} {', '.join(f'{n:,} {what}' for what, n in count.items())}")
    seconds = time.perf_counter() - start
    about = {"benchmark": "fuzz", "rows": args.rows, "chats": args.chats, "seed": args.seed}
    about |= {"hostile": hostile.summary(done)}
    print(json.dumps({**about, "counts": counts, "wrong": len(wrong), "seconds": seconds}))
    assert not wrong, f"{len(wrong)} rows differ in silence"


class Words:
    """Texts in which each word is one of a kind."""

    def __init__(self, draw: random.Random) -> None:
        self.draw, self.n = draw, 0

    def __call__(self) -> str:
        """A few words with what surrounds words in real texts."""
        words = []
        for _ in range(self.draw.randrange(1, 4)):
            self.n += 1
            words.append(f"w{self.n}x")
        between = self.draw.choice([" ", ", ", "\n", " é ", ' "', " <b> ", "\t", " {} ", " 漢字 "])
        return between.join(words)


# ---- rows of every format ------------------------------------------------------------------------

HARMLESS = ("id", "source", "score", "lang", "created_at", "metadata")
UNKNOWN = ("mood", "notes", "reply_to", "context_2", "Persona")
EMPTY = (None, "", [], {})
# As the tiny tokenizer's template writes a turn; it reads no field but role and content.
TURN, START = "<|{}|>{}<|eos|>", "<|assistant|>"


def alpaca(words: Words, draw: random.Random) -> tuple[Row, str]:
    """A row, and what is to be trained, with brackets around what is learned."""
    row = {"instruction": words(), "output": words()}
    block = ""
    if draw.random() < 0.5:
        row["input"] = words()
        block = f"### Input:\n{row['input']}\n\n"
    question = "\n\n".join(row[name] for name in ("instruction", "input") if name in row)
    text = (
        f"### Instruction:\n{row['instruction']}\n\n{block}### Response:\n[{row['output']}<|eos|>]"
    )
    if draw.random() < 0.2:
        row["history"] = [[words(), words()] for _ in range(draw.randrange(1, 3))]
        turns = [*row["history"], [question, row["output"]]]
        text = "".join(TURN.format("user", a) + f"{START}[{b}<|eos|>]" for a, b in turns)
        return with_system(row, words, draw, text)
    as_chat = TURN.format("user", question) + f"{START}[{row['output']}<|eos|>]"
    return with_system(row, words, draw, text, as_chat)


def prompt_completion(words: Words, draw: random.Random) -> tuple[Row, str]:
    """As `alpaca`."""
    row = {"prompt": words(), "completion": words()}
    text = f"{row['prompt']}[{row['completion']}<|eos|>]"
    chat = TURN.format("user", row["prompt"]) + f"{START}[{row['completion']}<|eos|>]"
    return with_system(row, words, draw, text, chat)


def text_alone(words: Words, draw: random.Random) -> tuple[Row, str]:
    """As `alpaca`."""
    text = words()
    return {"text": text}, f"[{text}<|eos|>]"


def messages(words: Words, draw: random.Random, sharegpt: bool = False) -> tuple[Row, str]:
    """As `alpaca`."""
    role_of, content_of, names = "role", "content", {"user": "user", "assistant": "assistant"}
    if sharegpt:
        role_of, content_of, names = "from", "value", {"user": "human", "assistant": "gpt"}
    turns, text = [], ""
    for i in range(2 * draw.randrange(1, 4)):
        role = ("user", "assistant")[i % 2]
        content = words()
        turn: Row = {role_of: names[role], content_of: content}
        if not sharegpt and draw.random() < 0.2:
            turn["content"] = [{"type": "text", draw.choice(["text", "value"]): content}]
        learned = role == "assistant"
        if learned and i > 1 and draw.random() < 0.3:
            turn[draw.choice(["weight", "loss_weight"])] = 0
            learned = False
        if draw.random() < 0.2:
            turn[draw.choice(["id", "model", "timestamp"])] = draw.choice([7, "harmless"])
        turns.append(turn)
        end = f"{content}<|eos|>"
        text += f"<|{role}|>" + (f"[{end}]" if learned else end)
    cut = text.rindex("]") + 1  # what follows the last answer to learn is left out
    row = {"conversations" if sharegpt else "messages": turns}
    return with_system(row, words, draw, text[:cut])


def with_system(
    row: Row, words: Words, draw: random.Random, text: str, as_chat: str = ""
) -> tuple[Row, str]:
    """At times a system message, with which every row is written as a chat."""
    if draw.random() < 0.7:
        return row, text
    row["system"] = words()
    return row, TURN.format("system", row["system"]) + (as_chat or text)


FORMATS: dict[str, Callable[[Words, random.Random], tuple[Row, str]]] = {
    "alpaca": alpaca,
    "prompt_completion": prompt_completion,
    "text": text_alone,
    "messages": messages,
    "sharegpt": lambda words, draw: messages(words, draw, sharegpt=True),
}


def random_rows(form: str, n: int, seed: int) -> Iterator[tuple[Row, str, list[str]]]:
    """(row, what is to be trained or "" where it must be refused, fields that are not used)."""
    draw = random.Random(f"{form} {seed}")
    words = Words(draw)
    for _ in range(n):
        row, text = FORMATS[form](words, draw)
        for name in draw.sample(HARMLESS, draw.randrange(3)):
            row[name] = draw.choice([7, 0.5, words()])
        for name in draw.sample(UNKNOWN, draw.choice([0, 0, 1])):
            row[name] = draw.choice([words(), 7, [words()], {"a": words()}])
        for name in draw.sample(("chosen", "images", "empty", "tools"), draw.randrange(2)):
            row[name] = draw.choice(EMPTY)
        if draw.random() < 0.1:
            row[draw.choice(["chosen", "rejected", "image", "videos"])] = words()
            text = ""
        items = [*row.items()]
        draw.shuffle(items)
        yield dict(items), text, [name for name in UNKNOWN if name in row]


def try_rows(form: str, n: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each thing happened, and what differs, of n rows through a file."""
    from support.tiny_folder import write_tokenizer

    rows = list(random_rows(form, n, seed))
    with tempfile.TemporaryDirectory() as name:
        tokenizer = load_tokenizer(write_tokenizer(Path(name), chat=True))
        path = Path(name) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row, *_ in rows), encoding="utf-8")
        examples = mq.read_examples(path, tokenizer, mq.DataConfig(cache_dir=None, format=form))
        trained = {example.line: bracketed(example, tokenizer) for example in examples}
    counts, wrong, unread = Counter[str](), [], Counter[str]()
    refused = dict(examples.report.refused)
    for line, (row, text, unknown) in enumerate(rows, 1):
        counts["refused" if line in refused else "trained"] += 1
        if text:
            unread.update(unknown)
        got = trained.get(line, "")
        if got.removeprefix("<|bos|>") != text:
            wrong.append(f"{form} {json.dumps(row)}: {got or refused[line]!r}, not {text!r}")
    if examples.report.unread != dict(unread):
        wrong.append(f"{form}: {examples.report.unread} are counted, not {dict(unread)}")
    counts["fields counted"] = sum(unread.values())
    return counts, wrong


def bracketed(example: Any, tokenizer: Tokenizer) -> str:
    """The text of an example, with brackets around what is learned."""
    text = ""
    for learned, run in itertools.groupby(range(len(example)), example.learned.__getitem__):
        piece = tokenizer.decode(example.tokens[[*run]])
        text += f"[{piece}]" if learned else piece
    return text


# ---- chats, against transformers -----------------------------------------------------------------


def templates() -> list[str]:
    """The real templates at hand."""
    from support.npm_tokenizers import CHATS

    return [*CHATS]


def random_chats(n: int, seed: int) -> Iterator[Row]:
    """Chats with a system message, thoughts, calls and tools at times, as OpenAI writes them."""
    draw = random.Random(seed)
    words = Words(draw)
    for number in range(n):
        turns: list[Row] = []
        if draw.random() < 0.3:
            turns.append({"role": "system", "content": words()})
        tools = None
        if draw.random() < 0.3:
            schema = {"type": "object", "properties": {"city": {"type": "string"}}}
            function = {"name": "weather", "description": words(), "parameters": schema}
            tools = [{"type": "function", "function": function}]
        for _ in range(draw.randrange(1, 4)):
            turns.append({"role": "user", "content": words()})
            if tools and draw.random() < 0.6:
                calls = []
                for i in range(draw.choice([1, 1, 1, 2])):
                    arguments = {"city": words()}
                    text = json.dumps(arguments) if draw.random() < 0.5 else arguments
                    call = {"name": "weather", "arguments": text}
                    calls.append(
                        {"id": f"call{number:04}{i}", "type": "function", "function": call}
                    )
                beside = words() if draw.random() < 0.3 else ""
                turns.append({"role": "assistant", "content": beside, "tool_calls": calls})
                for call in calls:
                    result = {"role": "tool", "content": words(), "tool_call_id": call["id"]}
                    turns.append({**result, "name": "weather"})
            answer: Row = {"role": "assistant", "content": words()}
            if draw.random() < 0.2:
                answer["content"] = f"<think>\n{words()}\n</think>\n\n{answer['content']}"
            elif draw.random() < 0.2:
                answer["reasoning_content"] = words()
            turns.append(answer)
        row: Row = {"messages": turns}
        yield row | {"tools": tools} if tools else row


def try_chats(chat: str, n: int, seed: int) -> tuple[Counter[str], list[str]]:
    """How often each thing happened, and what differs, of n chats of one template."""
    from support.npm_tokenizers import chat_tokenizer, of_transformers

    ours, theirs = chat_tokenizer(chat), of_transformers(chat)
    rows = list(random_chats(n, seed))
    examples = mq.read_examples(rows, ours, mq.DataConfig(num_workers=0, max_length=1 << 16))
    refused = dict(examples.report.refused)
    kept = {example.line: example for example in examples}
    counts, wrong = Counter[str](), []
    for line, row in enumerate(rows, 1):
        oracle = Oracle(theirs, row)
        if line in refused:
            counts["refused"] += 1
            problem = oracle.refusal(refused[line])
        else:
            several = len(kept[line].documents) > 1
            counts["a text for each answer" if several else "one text"] += 1
            problem = oracle.difference(kept[line], ours)
        if problem:
            wrong.append(f"{chat} {json.dumps(row, ensure_ascii=False)}: {problem}")
    return counts, wrong


class Oracle:
    """What transformers makes of one chat, and what of it is to be learned."""

    def __init__(self, tokenizer: Any, row: Row) -> None:
        self.tokenizer, self.tools = tokenizer, row.get("tools")
        # Templates want arguments as an object; OpenAI writes them as text.
        self.messages = json.loads(json.dumps(row["messages"]))
        for call in (c for m in self.messages for c in m.get("tool_calls", ())):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        self.answers = [i for i, m in enumerate(self.messages) if m["role"] == "assistant"]
        self.words = {
            i: set(WORD.findall(json.dumps(message))) for i, message in enumerate(self.messages)
        }

    def text(self, n: int, asks: bool) -> str | None:
        """The first n messages, and an answer's header if one is asked for; None if refused."""
        options = {"tools": self.tools, "add_generation_prompt": asks, "date_string": DATE}
        try:
            text = self.tokenizer.apply_chat_template(self.messages[:n], tokenize=False, **options)
        except (jinja2.TemplateError, TypeError):  # raised by the template; else a fault here
            return None
        return re.sub(r"\d{4}-\d\d-\d\d", "2024-07-26", text)  # the day of a template that asks

    def ids(self, text: str) -> list[int]:
        """Its ids."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def refusal(self, reason: str) -> str:
        """Why this chat should not have been refused; empty if there is a reason."""
        whole = self.text(len(self.messages), False)
        if whole is None or any(self.text(i, True) is None for i in self.answers):
            return ""
        said = set(WORD.findall(json.dumps([self.messages, self.tools])))
        if said - set(WORD.findall(whole)):
            return ""
        # R1's and Qwen's templates begin an answer otherwise than they ask for it.
        if any(m.get("tool_calls") or "</think>" in m["content"] for m in self.messages):
            prefixes = [(self.text(i, True), self.text(i + 1, False)) for i in self.answers]
            if not all(str(after).startswith(str(before)) for before, after in prefixes):
                return ""
        return f"is refused ({reason}), and transformers writes all of it"

    def difference(self, example: Any, ours: Tokenizer) -> str:
        """How an example differs from what transformers writes; empty if it does not."""
        documents = example.documents
        answers = self.answers if len(documents) > 1 else self.answers[-1:]
        if len(documents) not in (1, len(self.answers)):
            return f"{len(documents)} texts for {len(self.answers)} answers"
        for i, (ids, learned, _) in zip(answers, documents):
            context = int(learned.argmax())
            first = self.answers[0] if len(documents) == 1 else i
            prompt = self.text(first, True)
            if prompt is None or self.ids(prompt) != ids[:context].tolist():
                return f"the prompt of message {first} has other ids than {prompt!r}"
            text = ours.decode(ids)
            spoken = self.answers if len(documents) == 1 else [i]
            wanted = set().union(*(self.words[k] for k in spoken))
            got = set(WORD.findall(ours.decode(ids[learned])))
            if got != wanted:
                return f"learned are {sorted(got)}, not {sorted(wanted)}: {text!r}"
            if ids[-1] not in ours.eos_ids:
                return f"does not end: {text!r}"
            whole = self.text(i + 1, False)
            if whole is None:
                return f"transformers refuses it, and we train {text!r}"
            cut = whole[: len(text)] if whole.startswith(text) else whole
            rewritten = "</think>" in text  # R1's template cuts what is to be learned
            if not whole.startswith(text) and ours.decode(self.ids(cut)) != text and not rewritten:
                return f"{text!r} is not {whole!r}"
        return ""


if __name__ == "__main__":
    main()
