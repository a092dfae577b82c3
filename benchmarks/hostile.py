"""Mutated files of models, adapters and configs, and malformed rows: none ends badly.

Run as: python benchmarks/fuzz.py --malformed 100000 --files 10000 --state fuzz-state.json

Each trial is a command in a fork of one warm process, with a limit to its memory and its time: a
whole small model, adapter, GGUF or config of which one file was changed, or a file of rows of
which most are no rows. What may happen: the command is done, or it ends with exit code 2 and one
message. What is counted, and must not be: a traceback or another exit code, an abort, more than
SECONDS of CPU time (the import aside), more than MEGABYTES of memory above the parent's, a control
character that reaches the output, and a difference in silence: a file that is taken although the
format's own reader refuses it, a chat that is written otherwise than by Jinja without our limits,
a row that is lost, changed, or refused under a wrong number.
"""

import copy
import io
import json
import math
import os
import random
import re
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before numpy: a thread is not forked
import forked

SECONDS, MEGABYTES = 8, 500
STILL = 120  # seconds without any CPU time after which a command waits for ever
ROWS = 200  # malformed ones of a trial
# Of each hundred trials of files.
SHARES = {
    **{"config.json": 12, "tokenizer_config.json": 10, "tokenizer.json": 14, "template": 14},
    **{"generation_config.json": 3, "special_tokens_map.json": 3, "added_tokens.json": 3},
    **{"index": 4, "safetensors": 10, "gguf": 11, "adapter_config.json": 7, "adapter": 4},
    **{"run.yaml": 5},
}
CHAT = (
    "{%- set ns = namespace(n=0, text='') -%}{{- bos_token }}{%- for m in messages %}"
    "{%- if m.role in ['system', 'user'] and loop.index0 >= 0 %}<|{{ m['role'] }}|>"
    "{{ (m.content | trim) ~ eos_token }}{%- set ns.n = ns.n + 1 %}"
    "{%- elif m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m.content.split('x')[-1] "
    "}}{{ eos_token }}{% endgeneration %}{%- endif %}{%- set ns.text = ns.text ~ m.content %}"
    "{%- endfor %}{%- set rest = messages[1:] %}{{- {'a': ns.n, 'b': [1, 2]} | tojson }}"
    "{{- '%02d' % ns.n }}{{ rest | length }}{%- macro show(x) %}[{{ x | upper }}]{% endmacro %}"
    "{{ show('k') }}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
POISON: list[Any] = [
    *(None, True, False, 0, -1, 1, 1.5, 10**30, -(10**18), float("nan"), float("inf"), ""),
    *("x", "\x1b]52;c;eA==\x07", "\u202eevil", "\ud800", "a\0b", "<|eos|>", "y" * 5000),
    *([], {}, [[]], [1, "a", None], {"a": {"b": []}}, [0] * 3000, {"": ""}, "1", "(a+)+$"),
]


def try_all(malformed: int, files: int, seed: int, state: Path | None) -> dict[str, Any]:
    """Counts by outcome; of those in a state file only what was bad is tried again."""
    done: dict[str, Any] = {"seed": seed, "trials": 0, "counts": {}, "bad": []}
    if state is not None and state.exists():
        done = json.loads(state.read_text())
        assert done["seed"] == seed, "the state is of another seed"
    trials = [("rows", n) for n in range(-(-malformed // ROWS))]
    trials += [("files", n) for n in range(files)]
    again, counts = [(kind, n) for kind, n, *_ in done["bad"]], Counter(done["counts"])
    counts -= Counter(f"{name}: {outcome}" for _, _, name, outcome, _ in done["bad"])
    done["bad"], trials = [], again + trials[done["trials"] :]
    with tempfile.TemporaryDirectory() as place:
        seeds = make_seeds(Path(place))
        for number, (kind, n) in enumerate(trials, done["trials"] - len(again) + 1):
            name, outcome, said = trial(kind, random.Random(f"{kind} {seed} {n}"), seeds)
            counts[f"{name}: {outcome}"] += 1
            if outcome not in ("done", "refused"):
                done["bad"].append([kind, n, name, outcome, said[-1500:]])
            done["counts"] = dict(counts)
            if number >= done["trials"]:  # not while some of the bad ones are untried
                done["trials"] = number
                if state is not None and number % 4 == 0:
                    write_state(state, done)
    if state is not None:
        write_state(state, done)
    return done


def write_state(path: Path, done: dict[str, Any]) -> None:
    """In place of the one before, whole at any moment."""
    path.with_suffix(".tmp").write_text(json.dumps(done))
    path.with_suffix(".tmp").replace(path)


def make_seeds(place: Path) -> Path:
    """A model in one file and one in two, an adapter, a GGUF and a config, to be changed."""
    os.environ.update(OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    import numpy as np
    from safetensors.numpy import load_file, save_file
    from support.tiny_folder import write_random_model, write_rows

    forked.warm()
    model = place / "model"
    model.mkdir()
    write_random_model(model)
    config = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": CHAT}
    config["added_tokens_decoder"] = {"1": {"content": "<|eos|>", "special": True}}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text('{"eos_token_id": [1], "bos_token_id": 0}')
    (model / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|eos|>"}}')
    (model / "added_tokens.json").write_text('{"<|eos|>": 1}')
    (model / "chat_template.jinja").write_text(CHAT)
    shutil.copytree(model, sharded := place / "sharded")
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    names = sorted(tensors)
    halves = dict(zip(shards, (names[::2], names[1::2])))
    for shard, half in halves.items():
        save_file({name: tensors[name] for name in half}, sharded / shard)
    index = {name: shard for shard, half in halves.items() for name in half}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (adapter := place / "adapter").mkdir()
    lora = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    lora |= {"base_model_name_or_path": str(model), "rank_pattern": {}, "bias": "none"}
    lora |= {"exclude_modules": None, "layers_to_transform": None, "use_dora": False}
    (adapter / "adapter_config.json").write_text(json.dumps(lora))
    prefix = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (2, 64), "B": (64, 2)}
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    pairs = {prefix.format(i, x): np.ones(shapes[x], "f4") for i in range(layers) for x in "AB"}
    save_file(pairs, adapter / "adapter_model.safetensors")
    write_gguf(place / "model.gguf", json.loads((model / "tokenizer.json").read_text()))
    write_rows(place / "rows.jsonl", 30)
    (place / "run.yaml").write_text(
        f"model:\n  source: {model}\n  bits: 4\nlora:\n  r: 8\n  target_modules: [q_proj, v_proj]\n"
        f"  rank_pattern: {{q_proj: 4}}\ndata:\n  path: {place / 'rows.jsonl'}\n  split: [0.8, 0.1,"
        " 0.1]\ntraining:\n  learning_rate: 1.0e-4\n  num_train_epochs: 2\n"
    )
    return place


def write_gguf(path: Path, tokenizer: dict[str, Any]) -> None:
    """A llama of one layer, whole, with a tokenizer that encodes."""
    from support import tiny_gguf

    tiny_gguf.write_tiny_gguf(path, {"general.name": "tiny"})
    import gguf

    old, new = gguf.GGUFReader(path), gguf.GGUFWriter(path.with_suffix(".tmp"), "llama")
    for field in old.fields.values():
        if field.name.startswith("llama."):
            value: Any = field.contents()
            add: Any = new.add_float32 if isinstance(value, float) else new.add_uint32
            add(field.name, value)
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    new.add_tokenizer_model("gpt2")
    new.add_tokenizer_pre("gpt2")
    new.add_token_list(tokens)
    new.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    new.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]])
    new.add_bos_token_id(0)
    new.add_eos_token_id(1)
    new.add_chat_template(CHAT.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    for tensor in old.tensors:
        new.add_tensor(tensor.name, tensor.data[: len(tokens)])
    new.write_header_to_file()
    new.write_kv_data_to_file()
    new.write_tensors_to_file()
    new.close()
    path.with_suffix(".tmp").replace(path)


# ---- a trial -------------------------------------------------------------------------------------


def trial(kind: str, draw: random.Random, seeds: Path) -> tuple[str, str, str]:
    """What was changed, how it ended, and what was said."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if kind == "rows":
            name, work = "rows", rows_trial(place, draw, seeds)
        else:
            name = draw.choices([*SHARES], [*SHARES.values()])[0]
            work = file_trial(name, place, draw, seeds)
        return name, *in_a_fork(work, place)


def resident_kilobytes() -> int:
    """What a fork begins with: our peak may be far above it, and pages of files are not copied."""
    if not sys.platform.startswith("linux"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    resident, shared = Path("/proc/self/statm").read_text(encoding="ascii").split()[1:3]
    return (int(resident) - int(shared)) * resource.getpagesize() // 1024


def cpu_ticks(pid: int) -> int:
    """What a living process has used of the CPU; where no system file says so, the wait decides."""
    if not (stat := Path(f"/proc/{pid}/stat")).exists():
        return -1
    return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))


def in_a_fork(work: Callable[[], str], place: Path) -> tuple[str, str]:
    """How a piece of work ends in a process of its own, and what it printed.

    `work` prints, and returns what differs in silence or, of a command, its exit code.
    """
    before, out = resident_kilobytes(), place / "said.txt"
    child = os.fork()
    if child == 0:
        code = 70
        try:
            seconds = math.ceil(2 * SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            most = int(Path("/proc/self/statm").read_text().split()[0]) * 4096 + (4 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
            descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(descriptor, stream)
            sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), "utf-8", write_through=True)
            sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), "utf-8", write_through=True)
            os.chdir(place)
            answer = work()
            code = {"0": 0, "2": 2}.get(answer, 71)
            if code == 71:
                print(answer, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    # On a busy machine a trial may take any time, but not without a tick of the CPU.
    used, since = -1, time.monotonic()
    while (waited := os.wait4(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > since + STILL:
            if (ticks := cpu_ticks(child)) == used:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return "hang", out.read_text(errors="replace")
            used, since = ticks, time.monotonic()
        time.sleep(0.002)
    status, used = waited[1:]
    said = out.read_bytes().decode("utf-8", "replace") if out.exists() else ""
    seconds, grown = used.ru_utime + used.ru_stime, (used.ru_maxrss - before) / 1024
    if os.WIFSIGNALED(status):
        return ("hang" if os.WTERMSIG(status) in (9, 24) else "abort"), said
    code = os.WEXITSTATUS(status)
    if code == 71:
        return "differs in silence", said
    if code not in (0, 2) or "Traceback" in said or "panicked" in said:
        return "traceback", said
    if seconds > SECONDS:
        return "hang", f"{seconds:.1f} s of CPU time\n{said}"
    if grown > MEGABYTES:
        return "memory", f"{grown:.0f} MB\n{said}"
    # What a model writes goes into a file as it is: there is none here but a refusal's text.
    if code == 2 and (re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", said) or not said):
        return "raw output", said
    return ("done" if code == 0 else "refused"), said


def command(*words: Any) -> str:
    """The exit code of a command, as text."""
    from mlx_qlora.cli import main

    try:
        return str(main([str(word) for word in words]))
    except SystemExit as end:
        return str(end.code)


def rows_trial(place: Path, draw: random.Random, seeds: Path) -> Callable[[], str]:
    """A file of rows: each bad line is refused by its number, the good ones are as they were."""
    from support.malformed import mixture

    from mlx_qlora.data.rows import FORMATS

    form = draw.choice([*FORMATS])
    content, bad, good = mixture(form, ROWS, draw)
    (place / "rows.jsonl").write_bytes(content)

    def work() -> str:
        from support.tiny_folder import write_tokenizer

        import mlx_qlora as mq
        from mlx_qlora.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(write_tokenizer(place / "tokenizer", chat=True))
        settings = mq.DataConfig(format=form, cache_dir=None, num_workers=0, max_refused=1)
        examples = mq.read_examples(place / "rows.jsonl", tokenizer, settings)
        refused = [line for line, _ in examples.report.refused]
        if refused != bad:
            return f"{form}: lines {sorted({*refused} ^ {*bad})} are refused, or are not"
        said = {row.line: tokenizer.decode(row.tokens) for row in examples}
        wrong = [n for n, (a, b) in good.items() if said.get(n) != f"<|bos|>{a}{b}<|eos|>"]
        return f"{form}: good rows {wrong} are others now" if wrong else "0"

    return work


def file_trial(name: str, place: Path, draw: random.Random, seeds: Path) -> Callable[[], str]:
    """A command on a copy of what was right, of which one file is not."""
    whole = {"index": "sharded", "gguf": "model.gguf", "run.yaml": "run.yaml"}.get(name, "model")
    words: list[Any] = ["generate", "--model", "model", "--prompt", "count"]
    words += ["generation.max_new_tokens=1", "--seed", "0"]
    if name.startswith("adapter"):
        shutil.copytree(seeds / "adapter", place / "adapter")
        words[2] = seeds / "model"
        words += ["--adapter", "adapter"]
    elif name == "run.yaml":
        words = ["train", "--config", "run.yaml", "--dry-run"]
        shutil.copy(seeds / whole, place)
    elif name == "gguf":
        words[2] = "model.gguf"
        words += ["model.bits=null"]  # its columns are few
        shutil.copy(seeds / whole, place)
    else:
        shutil.copytree(seeds / whole, place / "model")
    files = {
        "index": "model/model.safetensors.index.json",
        "safetensors": "model/model.safetensors",
        **{"template": "model/chat_template.jinja", "gguf": "model.gguf", "run.yaml": "run.yaml"},
        "adapter": "adapter/adapter_model.safetensors",
        "adapter_config.json": "adapter/adapter_config.json",
    }
    path = place / files.get(name, f"model/{name}")
    change, check = CHANGES[path.suffix]
    for _ in range(draw.choice([1, 1, 1, 2, 4])):
        path.write_bytes(change(path.read_bytes(), draw))

    def work() -> str:
        code = command(*words)
        return (code == "0" and check(path)) or code

    return work


# ---- what is changed -----------------------------------------------------------------------------


def changed_bytes(content: bytes, draw: random.Random) -> bytes:
    """Some bytes are others, are missing, or are there twice."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 8])):
        at = min(int(draw.expovariate(8 / max(1, len(data)))), max(0, len(data) - 1))
        kind = draw.randrange(12)
        if kind >= 6 or kind == 0:
            data[at : at + 1] = bytes([draw.randrange(256)])
        elif kind == 1:
            del data[at : at + draw.choice([1, 3, 40])]
        elif kind == 2:
            data[at:at] = data[at : at + draw.choice([1, 8, 100])]
        elif kind == 3:
            data[at : at + 8] = struct.pack("<Q", draw.choice([0, 9, 2**31, 2**63, 2**64 - 1]))
        elif kind == 4:
            data[at:at] = draw.choice([b"[" * 5000, b"9" * 9000, b"\0", b"\xff", b"\xef\xbb\xbf"])
        else:
            del data[draw.randrange(len(data) + 1) :]
    return bytes(data)


def changed_value(value: Any, draw: random.Random) -> Any:
    """One place in a value of JSON holds something else."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)):
            places.append((inner, key))
            if isinstance(inner[key], (dict, list)):
                walk(inner[key])

    walk(value)
    if not places:
        return draw.choice(POISON)
    # A vocabulary is most of a tokenizer, and its places are all alike.
    within, key = draw.choice(places if draw.random() < 0.3 else places[:40])
    kind = draw.randrange(8)
    if kind == 0:
        del within[key]
    elif kind == 1 and isinstance(within, dict):
        within[draw.choice(["", "x", "\ud800", "\x1b[2J", "0", "a.b"])] = within.pop(key)
    elif kind == 2:
        deep: Any = within[key]
        for _ in range(draw.choice([3, 70, 400])):
            deep = [deep]
        within[key] = deep
    elif kind == 3:
        within[key] = copy.deepcopy(draw.choice(places)[0])
    elif kind == 4 and isinstance(within[key], (int, float)):
        within[key] = within[key] * draw.choice([-1, 0, 2, 1.5, 10**9, 10**40])
    else:
        within[key] = draw.choice(POISON)
    return value


def changed_json(content: bytes, draw: random.Random) -> bytes:
    """JSON whose text, or one of whose values, is another."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, (dict, list)) or draw.random() < 0.2:
        return changed_bytes(content, draw)
    try:
        return json.dumps(changed_value(value, draw)).encode()
    except RecursionError:  # of changes within changes
        return changed_bytes(content, draw)


def changed_safetensors(content: bytes, draw: random.Random) -> bytes:
    """A file whose header says something else, or whose bytes are others."""
    (length,) = struct.unpack("<Q", content[:8].ljust(8, b"\0"))
    if draw.random() < 0.3 or length > len(content):
        return changed_bytes(content, draw)
    header = changed_json(content[8 : 8 + length], draw)
    if draw.random() < 0.2:
        return struct.pack("<Q", draw.choice([0, 1, len(header) + 9, 2**40])) + header
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def changed_gguf(content: bytes, draw: random.Random) -> bytes:
    """A file of which a pair has another type or value, or any other bytes are others."""
    keys = [*re.finditer(rb"(general|llama|tokenizer)\.[a-z_.]+", content)]
    if draw.random() < 0.4 or not keys:
        return changed_bytes(content, draw)
    at, data = draw.choice(keys).end(), bytearray(content)
    numbers = [0, 1, 2, 31, 33, 2**31 - 1, 2**31, 2**32 - 1, 0x7F800000, 0x7FC00000]
    if draw.random() < 0.5:  # its type
        data[at : at + 4] = struct.pack("<I", draw.choice([*range(13), 99]))
    if draw.random() < 0.6:
        after = at + 4 * draw.randrange(1, 5)
        data[after : after + 4] = struct.pack("<I", draw.choice(numbers))
    return bytes(data)


YAML = ["&a ", "*a", "<<: *a", "!!int ''", "!!python/object:os.system {}", "? [", "- ", ": ", "\t"]
YAML += ["{a: &x [1], b: [*x, *x]}", "!!binary x", "2001-99-99", "0x", "1:30", "~", "|", "%"]
YAML += ["[" * 3000, "&b [*b]", "!!timestamp x", "9" * 6000, "\0", "\x1b", "null", ".inf", "(a+)+$"]
JINJA = [
    "{% for i in range(99999) %}",
    "{% endfor %}",
    "{{ 'a' * 999999999 }}",
    "{{ 9 ** 9 ** 9 }}",
]
JINJA += ["{{ ''.__class__.__mro__ }}", "{% set ns.text = ns.text ~ ns.text %}", "{{ messages }}"]
JINJA += ["{{ raise_exception('\x1b[2J') }}", "{{ show(show) }}", "{% set ns.x = [ns, ns] %}"]
JINJA += ["{{ '%9999999s' % 1 }}", "{{ messages * 99999999 }}", "{% include 'x' %}", "{{ loop }}"]
JINJA += ["{{ messages | tojson(indent=99999) }}", "{{ 'a' | center(10**9) }}", "{% break %}", "{#"]
JINJA += ["{{ messages | map(attribute='content') | join(', ') }}", "{{ ns.text[::-1] | list }}"]
JINJA += ["{{ namespace(a=ns) }}", "{{ dict(a=1).items() | list }}", "{{ 'x{}'.format(m) }}"]


def changed_text(parts: list[str], poison: list[str], draw: random.Random) -> bytes:
    """Words of a language that are others, are missing, or stand elsewhere."""
    for _ in range(draw.choice([1, 1, 2, 5])):
        at = draw.randrange(len(parts) + 1)
        kind = draw.randrange(5)
        if kind == 0:
            del parts[at : at + draw.choice([1, 2])]
        elif kind == 1:
            parts.insert(at, draw.choice(parts or [""]))
        elif kind == 2 and parts:
            other = draw.randrange(len(parts))
            parts[other], parts[at - 1] = parts[at - 1], parts[other]
        else:
            parts.insert(at, draw.choice(poison))
    return "".join(parts).encode("utf-8", "replace")


def changed_yaml(content: bytes, draw: random.Random) -> bytes:
    """A config of other words."""
    if draw.random() < 0.2:
        return changed_bytes(content, draw)
    text = content.decode("utf-8", "replace")
    return changed_text(re.findall(r"\w+|\W", text), YAML, draw)


def changed_template(content: bytes, draw: random.Random) -> bytes:
    """A template of other statements, or of other words in them."""
    text = content.decode("utf-8", "replace")
    cut = r"\{[%{#].*?[%}#]\}|[^{]+|\{" if draw.random() < 0.6 else r"\w+|\W"
    return changed_text(re.findall(cut, text, re.S), JINJA, draw)


# ---- what the formats' own readers say -----------------------------------------------------------


def refused_by(read: Callable[[Path], Any]) -> Callable[[Path], str]:
    """Says that a reader refuses what we have taken, if it does."""

    def check(path: Path) -> str:
        try:
            read(path)
        except Exception as error:
            return f"{path.name} is taken, and its format's reader refuses it: {error!r}"[:500]
        return ""

    return check


def read_safetensors(path: Path) -> None:
    """As safetensors does."""
    from safetensors.numpy import load_file

    load_file(path)


def read_gguf(path: Path) -> None:
    """As llama.cpp's own package does."""
    import gguf

    gguf.GGUFReader(path)


def read_yaml(path: Path) -> None:
    """As PyYAML does."""
    import yaml

    yaml.safe_load(path.read_text(encoding="utf-8"))


def same_chat(path: Path) -> str:
    """Whether Jinja in the same sandbox, without our limits, writes the chat as we do."""
    from jinja2 import ext, nodes, sandbox

    from mlx_qlora.data.templates import render_template

    class Generation(ext.Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise ValueError(message)

    source = path.read_text(encoding="utf-8")
    plain = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    plain.filters["tojson"] = lambda value, **how: json.dumps(
        value, **{"ensure_ascii": False, **how}
    )
    plain.globals.update(raise_exception=refuse)
    messages = [
        {"role": role, "content": f"a x {role}"} for role in ("system", "user", "assistant")
    ]
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
    given = {"messages": messages, "tools": None, "documents": None, **special}
    try:
        ours = render_template(source, messages, None, special)
    except ValueError:
        return ""
    theirs = plain.from_string(source).render(add_generation_prompt=False, **given)
    where = re.compile(r" at 0x[0-9a-f]+")
    same = where.sub("", ours) == where.sub("", theirs)
    return "" if same else f"a chat is {ours[:300]!r}, and by Jinja {theirs[:300]!r}"


CHANGES: dict[str, tuple[Callable[[bytes, random.Random], bytes], Callable[[Path], str]]] = {
    ".json": (changed_json, refused_by(lambda path: json.loads(path.read_text("utf-8")))),
    ".safetensors": (changed_safetensors, refused_by(read_safetensors)),
    ".gguf": (changed_gguf, refused_by(read_gguf)),
    ".yaml": (changed_yaml, refused_by(read_yaml)),
    ".jinja": (changed_template, same_chat),
}


def summary(done: dict[str, Any]) -> dict[str, Any]:
    """The counts of all trials by outcome."""
    outcomes = Counter[str]()
    for name, n in done["counts"].items():
        outcomes[name.rpartition(": ")[2]] += n
    rows = sum(n for name, n in done["counts"].items() if name.startswith("rows: "))
    bad = {outcome: n for outcome, n in outcomes.items() if outcome not in ("done", "refused")}
    return {"malformed_rows": rows * ROWS, "files": outcomes.total() - rows, **outcomes, "bad": bad}
