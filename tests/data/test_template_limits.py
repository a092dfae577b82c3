"""A chat template that never ends, or makes more than memory holds, is stopped within limits."""

import random
import time

import pytest
from support.npm_tokenizers import chat_tokenizer

from mlx_qlora.data import templates
from mlx_qlora.data.read import DataConfig, read_examples
from mlx_qlora.data.templates import EndlessTemplate, compile_template, render_template
from mlx_qlora.errors import TokenizerError

MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
GROW = "{% set ns = namespace(x='a' * 10) %}{% for i in range(60) %}{% set ns.x = "
NEST = "{% set ns = namespace(x=[]) %}{% for i in range(60) %}{% set ns.x = "
ENDLESS = {
    "loops in loops": "{% set x = range(9999) %}{% for a in x %}{% for b in x %}{% endfor %}"
    "{% endfor %}",
    "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}"
    "{% endif %}{% endmacro %}{{ m(60) }}",
    "text that is looked through": "{% set x = 'ab' * 99999 %}{% for i in range(99999) %}"
    "{% if 'ba' * 9999 ~ 'c' in x %}{% endif %}{% endfor %}",
    "recursive loops": "{% for a in range(99) recursive %}{% if loop.depth < 9 %}"
    "{{ loop(range(99)) }}{% endif %}{% endfor %}",
    "sorting": "{% for i in range(99999) %}{% if range(9999) | sort | first %}{% endif %}"
    "{% endfor %}",
}
LARGE = {
    "text times": "{{ ('a' * 1000000000) | length }}",
    "lists times": "{{ ([[1]] * 9999999999999999999) | length }}",
    "a long list times": "{{ (range(99999) | list * 100000) | length }}",
    "a power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}"
    "{% endfor %}",
    "doubled by ~": GROW + "ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": GROW + "ns.x + ns.x %}{% endfor %}",
    "doubled in a block": GROW.removesuffix(" = ")
    + " %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "doubled by join": GROW + "[ns.x, ns.x] | join %}{% endfor %}",
    "doubled by format": GROW + "'%s%s' % (ns.x, ns.x) %}{% endfor %}",
    "doubled by replace": GROW + "ns.x.replace('a', 'aa') %}{% endfor %}",
    "doubled by a filter": GROW + "ns.x | replace('a', 'aa') %}{% endfor %}",
    "nested lists": NEST + "[ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "nested objects": NEST + "{'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x }}",
    "nested dicts": NEST + "dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "nested namespaces": NEST + "namespace(a=ns.x, b=[ns.x]) %}{% endfor %}{{ [ns.x] | string }}",
    "padding": "{{ 'a' | center(999999999) | length }}",
    "padding by a method": "{{ 'a'.ljust(10 ** 9) | length }}",
    "padding by a format": "{{ '%999999999d' % 1 }}",
    "padding by a field": "{{ '{:{}}'.format(1, 999999999) }}",
    "padding through map": "{{ range(9999) | map('center', 99999) | join }}",
    "indents": "{{ [[1]] | tojson(indent=999999999) | length }}",
    "batches": "{{ 'ab' | list | batch(10 ** 9, 'x') | list }}",
    "dates": "{{ strftime_now('%999999999Y') }}",
    "sums of lists": "{{ [[[1]] * 9999] | sum(start=[]) | length }}",
    "said often": "{% set x = 'a' * 9999999 %}" + "{{ x }}" * 100,
    "copied often": "{% set x = 'a' * 9999999 %}" + "{% set y = x[1:] %}" * 100,
    "constants in a loop": "{% for i in range(99999) %}" + "a" * 9999 + "{% endfor %}",
    "letters translated": "{{ 'x'.translate({120: 'y' * 999}) }}",
    "a source without end": "{{ 1 }}" * 99999,
    "calls without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "blocks without end": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
}


@pytest.mark.parametrize("name", ENDLESS)
def test_what_never_ends_is_stopped(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    began = time.thread_time()
    with pytest.raises(EndlessTemplate, match=r"computes for more than 0\.1 seconds"):
        render_template(ENDLESS[name], MESSAGES, None, {})
    assert time.thread_time() - began < 2, "in time of this thread, whatever else runs"


@pytest.mark.parametrize("name", LARGE)
def test_what_would_fill_memory_is_refused_before_it_does(name: str) -> None:
    began = time.thread_time()
    with pytest.raises(TokenizerError):
        render_template(LARGE[name], MESSAGES, None, {})
    assert time.thread_time() - began < templates.SECONDS + 2


def test_a_template_that_never_ends_ends_the_run_and_not_each_row(chatty, tmp_path, monkeypatch):
    monkeypatch.setattr(templates, "SECONDS", 0.1)
    (path := tmp_path / "t.jinja").write_text(ENDLESS["loops in loops"])
    settings = DataConfig(template=str(path), num_workers=0)
    with pytest.raises(TokenizerError, match="the chat template does not end"):
        read_examples([{"messages": MESSAGES}] * 1000, chatty, settings)


@pytest.mark.parametrize("chat", ["llama3_1", "qwen3", "gptoss"])
def test_long_chats_of_real_templates_are_within_the_limits(chat: str) -> None:
    draw, tokenizer = random.Random(0), chat_tokenizer(chat)
    turns = [
        {"role": role, "content": "".join(draw.choices("ab \n", k=50_000))}
        for _ in range(10)
        for role in ("user", "assistant")
    ]
    assert len(tokenizer.render_chat(turns)) >= 900_000


WRITTEN = {
    "{{ 1 ~ none ~ 2.5 ~ 'x' ~ nothing }}": "1None2.5x",
    "{{ none }}{{ true }}{{ [1, 'a'] }}{{ (1, 2) }}{{ {'a': 1} }}": "NoneTrue[1, 'a']"
    "(1, 2){'a': 1}",
    "{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}": "a1",
    "{% set a, b = 1, 2 %}{{ a }}{{ b }}": "12",
    "{{ messages[1:] | map(attribute='content') | join('-') }}": "there",
    "{{ 'user' in messages[0].role }}{{ 3 not in [1, 2] }}": "TrueTrue",
    "{{ '%s is %03d%%' % ('a', 7) }}{{ '{}-{b}'.format(1, b=2) }}": "a is 007%1-2",
    "{{ 2 ** 10 }}{{ 3 * 'ab' }}{{ [1] * 2 }}{{ 7 % 4 }}{{ 2.5 * 2 }}": "1024ababab[1, 1]35.0",
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(m('a')) }}": "<<a>>",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{% endfilter %}": "a1B",
    "{{ [3, 1] | sort | tojson }}{{ 'a b'.split() }}{{ [[1], [2]] | sum(start=[]) }}": "[1, 3]"
    "['a', 'b'][1, 2]",
}


@pytest.mark.parametrize("source", WRITTEN)
def test_what_a_template_writes_is_as_without_limits(source: str) -> None:
    assert render_template(source, MESSAGES, None, {}) == WRITTEN[source]
    assert compile_template(source).render(messages=MESSAGES) == WRITTEN[source]
