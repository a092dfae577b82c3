"""Chat templates: programs of strangers, run in transformers' sandbox with a limit to their work.

The sandbox keeps a template from files and from Python's insides, but neither from counting to
10^10 nor from writing 'a' * 10^10. Here every loop and call looks at the clock, and every operation
that makes a value pays for its size; those that multiply sizes do so beforehand.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2 import ext, filters, nodes, sandbox
from jinja2.visitor import NodeTransformer

from mlx_qlora.errors import TokenizerError

# Written on both sides of the words that a template marks as the assistant's. With its private-use
# characters, no template writes it and no text of a person holds it.
GENERATED = "\U000f1a2bmlx-qlora:generated\U000f1a2b"


class EndlessTemplate(TokenizerError):
    """A template computes for so long that no row can be expected to be written."""


def render_template(
    source: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
    date: tuple[int, int, int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Writes a conversation as text; `add_generation_prompt` ends it where an answer begins.

    `mark` puts GENERATED on both sides of the text inside `{% generation %}`; `date` (year, month,
    day) is the template's today, None the clock's; `options` are what the template itself reads.
    A TokenizerError if it is damaged, or refuses these messages, or makes too much of them; an
    EndlessTemplate if it takes too long, which the next chat would, too.
    """
    try:
        template = compile_template(source, mark, date, threading.get_ident())
        template.environment.begin()  # pyright: ignore[reportAttributeAccessIssue]
        return template.render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **{**special_tokens, **(options or {})},
        )
    except EndlessTemplate:
        raise
    except Exception as error:  # the template is the user's code: whatever it raises is input
        raise TokenizerError(str(error) or repr(error)) from error


@functools.lru_cache(maxsize=32)
def compile_template(
    source: str, mark: bool = False, date: tuple[int, int, int] | None = None, thread: int = 0
) -> jinja2.Template:
    """Compiles a template from the hub, which is untrusted code, in transformers' environment.

    Each `thread` has a template, and so an account, of its own.
    """
    if len(source) > LONGEST_SOURCE:
        raise TokenizerError(f"it is longer than {LONGEST_SOURCE:,} characters")

    class Generation(ext.Extension):
        """`{% generation %}` marks the assistant's words for a mask; the text is unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            border = nodes.Output([nodes.TemplateData(GENERATED)], lineno=line)
            body = [border, *body, border] if mark else body
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        environment.may_make("format", [form])
        return (datetime.datetime(*date) if date else datetime.datetime.now()).strftime(form)

    @jinja2.pass_context  # or Jinja would take the one turn of its compiler for all
    def turn(context: Any, size: int) -> str:
        return environment.turn(size)

    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, ext.loopcontrols],
    )
    environment.finalize = environment.text
    environment.filters = {
        name: environment.limited(each)
        for name, each in {**filters.FILTERS, "tojson": tojson}.items()
        if name not in LEFT_OUT
    } | {"_made": environment.made, "_joined": environment.joined, "_turn": turn}
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    del environment.globals["lipsum"]
    tree = environment.parse(source.removeprefix("\ufeff"))  # an editor's mark
    return environment.from_string(_Metered().visit(tree))


# ---- the limit -----------------------------------------------------------------------------------

SECONDS = 3  # of one core, for one chat
SIZE = 1 << 26  # characters that are made for one chat, and as many as these for the rest:
ENTRY = TURN = 16  # each entry of a list, each turn of a loop and each operation
LOOK_EVERY = 64 * TURN  # of all these, at the clock
LONGEST_SOURCE = 1 << 17  # the longest of real ones has 30,000 characters
# Filters and methods that no chat template has been seen to use, and whose work is hard to foresee.
LEFT_OUT = {"urlize", "urlencode", "striptags", "xmlattr", "pprint", "filesizeformat", "wordwrap"}
UNSAFE = {"translate", "expandtabs", "to_bytes", "encode", "format_map", "striptags", "unescape"}
PADDING = {"center", "ljust", "rjust", "zfill", "indent", "batch", "slice", "tojson"}
SPLITTING = {"list", "split", "rsplit", "splitlines", "sort", "unique", "batch", "slice", "map"}
MULTIPLYING = {"format", "replace", "join", "round", "sum"} | PADDING | SPLITTING
WIDE = re.compile(r"\d{4}|%[-+ #0\d.]*\*|\{[^{}]*\{")  # a format with a width of its own
TOO_MUCH = "it makes more than a chat can hold"


class _Environment(sandbox.ImmutableSandboxedEnvironment):
    """Transformers' sandbox, with an account of what a template may still do."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    left, look_below = SIZE, 0  # of the compiler, which computes what is constant

    def begin(self) -> None:
        """A chat is to be written."""
        self.left, self.look_below = SIZE, SIZE - LOOK_EVERY
        self.look_at, self.began = time.monotonic() + SECONDS, time.thread_time()

    def turn(self, size: int) -> str:
        """Pay for one turn of a loop, or for what was made."""
        self.left = left = self.left - size - TURN
        if left < self.look_below:
            self._look()
        return ""

    def _look(self) -> None:
        if self.left < 0:
            raise jinja2.TemplateError(TOO_MUCH)
        self.look_below = self.left - LOOK_EVERY
        if time.monotonic() > self.look_at:  # which takes less time than this thread's own clock
            left = SECONDS - (time.thread_time() - self.began)
            if left <= 0:
                raise EndlessTemplate(f"it computes for more than {SECONDS} seconds")
            self.look_at = time.monotonic() + left

    def made(self, value: Any) -> Any:
        """Pay for a value; one that has others in it must be small when it is written out, too."""
        kind = type(value)
        if kind is str:
            self.turn(len(value))
        elif kind is bool or value is None:
            self.turn(0)
        elif isinstance(value, (list, tuple, dict)):
            self.turn(ENTRY * len(value))
            _written(value)
        else:
            self.turn(len(value) if isinstance(value, str) else 0)
        return value

    def text(self, value: Any) -> str:
        """What is written for a value."""
        text = value if isinstance(value, str) else str(value)
        self.turn(len(text))
        return text

    def joined(self, values: list[Any]) -> str:
        """Jinja's `~`."""
        return self.made("".join([self.text(value) for value in values]))

    def may_make(self, name: str, values: list[Any]) -> None:
        """Refuse what would make much more of some values than they are."""
        first, *others = values or [""]
        size = 0.0
        if name in ("format", "%") and isinstance(first, str):
            fields = first.count("%") + first.count("{")
            size = math.inf if WIDE.search(first) else fields * sum(map(_written, others), 400)
        elif name == "replace" and len(others) > 1:
            old, new = (len(str(each)) for each in others[:2])
            size = (1 + len(first) // max(1, old)) * new
        elif name == "join":
            size = sum(map(_written, values)) + math.prod(map(_length, values))
        elif name == "round":
            size = 2.0 ** sum(each for each in others if isinstance(each, int))
        elif name == "sum" and any(isinstance(each, (list, tuple)) for each in others):
            size = float(_written(first)) ** 2
        elif name in PADDING:
            size = math.prod(max(1, abs(x) if isinstance(x, int) else _written(x)) for x in values)
        if name in SPLITTING and isinstance(first, str):
            size = max(size, ENTRY * len(first))
        if size > self.left:
            raise jinja2.TemplateError(TOO_MUCH)

    def limited(self, function: Any) -> Any:
        """A filter that says beforehand how much it would make, and pays for it."""
        skipped = int(hasattr(function, "jinja_pass_arg"))
        name = function.__name__.removeprefix("do_")

        @functools.wraps(function)
        def limited(*args: Any, **options: Any) -> Any:
            if name in MULTIPLYING:
                if name == "join" and isinstance(args[skipped], Iterator):
                    args = (*args[:skipped], [*args[skipped]], *args[skipped + 1 :])
                self.may_make(name, [*args[skipped:], *options.values()])
            return self.made(function(*args, **options))

        return limited

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in UNSAFE and super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if type(left) is type(right) is str and operator == "+":  # what templates do most
            self.turn(len(left) + len(right))
            return left + right
        if operator == "%":
            self.may_make("%", [left, *(right if isinstance(right, tuple) else (right,))])
        elif operator != "+":
            numbers = [x for x in (left, right) if isinstance(x, int)]
            if len(numbers) == 2:
                bits = left.bit_length() * (abs(right) if operator == "**" else right.bit_length())
                self.turn(SIZE * (bits > 1 << 12))
            elif numbers:
                many = left if numbers[0] is right else right
                self.turn(0 if isinstance(many, float) else max(0, numbers[0]) * _length(many))
        return self.made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        if getattr(__obj, "__name__", "") in MULTIPLYING:
            of = getattr(__obj, "__wrapped__", __obj)  # the sandbox's own `format` wraps the method
            if isinstance(receiver := getattr(of, "__self__", None), str):
                __self.may_make(of.__name__, [receiver, *args, *options.values()])
        return __self.made(super().call(__context, __obj, *args, **options))


def _length(value: Any) -> int:
    return len(value) if hasattr(value, "__len__") else 1


def _written(value: Any, left: int = SIZE) -> int:
    """The characters that writing a value takes, about; a value may hold another one twice."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        inner: Iterator[Any] = (each for pair in value.items() for each in pair)
    elif isinstance(value, (list, tuple)):
        inner = iter(value)
    elif isinstance(value, jinja2.utils.Namespace):
        inner = iter([vars(value)["_Namespace__attrs"]])
    else:
        return 1
    size = 2
    for each in inner:
        size += 64 + _written(each, left - size)
        if size > left:
            raise jinja2.TemplateError(TOO_MUCH)
    return size


# Expressions that make a value without a call, and whether one does.
MAKERS: dict[type[nodes.Node], Callable[[Any], bool]] = {
    nodes.List: lambda node: not all(isinstance(each, nodes.Const) for each in node.items),
    nodes.Dict: lambda node: True,
    nodes.Tuple: lambda node: node.ctx != "store",
    nodes.Getitem: lambda node: isinstance(node.arg, nodes.Slice),  # which copies
    nodes.Compare: lambda node: any(each.op in ("in", "notin") for each in node.ops),
}


class _Metered(NodeTransformer):
    """Puts the limit where a template repeats something or makes a value without a call."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        written = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        size = nodes.Const(written)
        turn = nodes.Filter(size, "_turn", [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(turn, lineno=node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _passed(nodes.List(node.nodes), "_joined", node)

    def generic_visit(self, node: Any, *args: Any, **options: Any) -> nodes.Node:
        super().generic_visit(node, *args, **options)
        makes = MAKERS.get(type(node))
        return _passed(node, "_made", node) if makes and makes(node) else node


def _passed(node: Any, name: str, at: nodes.Node) -> nodes.Node:
    return nodes.Filter(node, name, [], [], None, None, lineno=at.lineno)
