"""A chat template, compiled in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlx_qlora.errors import TokenizerError

if TYPE_CHECKING:
    import jinja2
    import jinja2.nodes

# Stands on both sides of the words that a template marks as the assistant's. A private-use
# character and a word around it: no template writes it, and no text of a person holds it.
GENERATED = "\U000f1a2bmlx-qlora:generated\U000f1a2b"


def render_template(
    source: str,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None,
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = False,
    mark: bool = False,
    date: tuple[int, int, int] | None = None,
) -> str:
    """Writes a conversation as text.

    Args:
        source: the template.
        messages: `{"role": ..., "content": ...}` in order.
        tools: JSON schemas of functions.
        special_tokens: what the template may call `bos_token`, `eos_token`, ...
        add_generation_prompt: ends the text where the assistant's answer begins.
        mark: puts GENERATED on both sides of what stands in `{% generation %}`.
        date: what the template takes for today, as (year, month, day); None asks the clock.

    Raises:
        TokenizerError: the template is damaged, or refuses these messages.
    """
    try:
        return compile_template(source, mark, date).render(
            messages=messages,
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
        )
    except Exception as error:  # the template is the user's code: whatever it raises is input
        raise TokenizerError(str(error) or repr(error)) from error


def can_mark(source: str) -> bool:
    """Whether a template marks the assistant's words."""
    return re.search(r"\{%[-+]?\s*generation\b", source) is not None


@functools.lru_cache(maxsize=16)
def compile_template(
    source: str, mark: bool = False, date: tuple[int, int, int] | None = None
) -> jinja2.Template:
    """Compiles a template from the hub, which is untrusted code, in a sandbox."""
    return _environment(mark, date).from_string(source)


def _environment(mark: bool, date: tuple[int, int, int] | None) -> Any:
    """The environment that templates are written for: transformers' own."""
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for a mask; the text is unchanged."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            border = jinja2.nodes.Output([jinja2.nodes.TemplateData(GENERATED)], lineno=line)
            body = [border, *body, border] if mark else body
            return jinja2.nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        # Jinja's own filter escapes <, > and & for HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(form: str) -> str:
        now = datetime.datetime(*date) if date else datetime.datetime.now()
        return now.strftime(form)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment
