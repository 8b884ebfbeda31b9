"""A chat template is code of others: whatever it does, it ends, soon, in little memory, and with
one line."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers

from chats import CHATML, write_rows, write_tokenizer
from megalite.cli import main
from megalite.data import template_limits
from megalite.data.chat import LARGEST_SOURCE, ChatTemplate
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import DataError, TemplateLimit
from tiny_models import LLAMA

NESTED = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
DOUBLED = NESTED + "{% for i in range(60) %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
HASHED = "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}"
TEXT = "{% set ns = namespace(a='ab') %}{% for i in range(60) %}{% set ns.a = STEP %}{% endfor %}{{ ns.a }}"
BIG = "{% set big = 'x' * 1000000 %}"
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
WALKED = "{% for x in ns.a recursive %}{{ loop(x) if x is iterable }}{% endfor %}"
HOSTILE = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "text of loops": "{% for a in range(99999) %}{% for b in range(999) %}" + "x" * 999 + "{% endfor %}{% endfor %}",
    "generators": "{% for a in 'ab'|map('abs') %}".replace("'ab'", "range(99999)") * 2 + "{% endfor %}" * 2,
    "power": "{{ 10 ** (10 ** 10) }}",
    "product": TEXT.replace("'ab'", "3").replace("STEP", "ns.a * ns.a") * 2,
    "quotient": "{{ ('f' * 900000)|int(0, 16) // 3 % 7 }}",
    "times": "{{ 'a' * 10000000000 }}",
    "list times": "{{ [1, 2] * 10000000000 }}",
    "concatenated": TEXT.replace("STEP", "ns.a ~ ns.a"),
    "added": TEXT.replace("STEP", "ns.a + ns.a"),
    "lists added": TEXT.replace("'ab'", "[1]").replace("STEP", "ns.a + ns.a"),
    "replaced": TEXT.replace("STEP", "ns.a | replace('a', 'aa')"),
    "replaced by a method": TEXT.replace("STEP", "ns.a.replace('a', 'aa')"),
    "empty replaced": BIG + "{{ big.replace('', big) }}",
    "joined": BIG + "{{ big.join(range(99999)|map('string')) }}",
    "joined by a filter": BIG + "{{ range(99999)|join(big) }}",
    "translated": BIG + "{{ big.translate({120: big}) }}",
    "indented": BIG + "{{ ('\\n' * 1000000)|indent(1000000) }}",
    "centered": "{{ 'x'|center(10000000000) }}",
    "justified": "{{ 'x'.ljust(10000000000) }}",
    "tabs": "{{ ('\\t' * 1000000).expandtabs(1000000) }}",
    "percent": "{{ '%9999999999d' % 1 }}",
    "percent of a value": "{{ '%*d' % (9999999999, 1) }}",
    "format": "{{ '{:>9999999999}'.format(1) }}",
    "format of a value": "{{ '{:>{n}}'.format(1, n=9999999999) }}",
    "format again": BIG + "{{ ('{0}' * 100000).format(big) }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "rounded": "{{ 1.5|round(10000000000, 'floor') }}",
    "written": NESTED + "{{ ns.a }}",
    "written as JSON": NESTED + "{{ ns.a|tojson }}",
    "written with all": NESTED + "{{ ns }}",
    "as text": NESTED + "{{ ns.a|string|length }}",
    "in a text": NESTED + "{% set x = 'a' ~ ns.a %}",
    "compared": DOUBLED + "{{ ns.a == ns.b }}",
    "compared by a test": DOUBLED + "{{ ns.a is eq(ns.b) }}",
    "looked for": DOUBLED + "{{ ns.a in [ns.b] }}",
    "looked for by a method": DOUBLED + "{{ [ns.a].index(ns.b) }}",
    "looked for by a filter": DOUBLED + "{{ [ns.a]|map('default')|select('in', [ns.b])|list }}",
    "sorted": DOUBLED + "{{ [ns.a, ns.b]|sort|length }}",
    "hashed": HASHED + "{{ {ns.a: 1}|length }}",
    "hashed key": HASHED + "{{ {}[ns.a] }}",
    "unique": HASHED + "{{ [ns.a]|unique|list|length }}",
    "filled": NESTED + "{{ [1]|batch(999999, ns.a)|list|string }}",
    "summed": NESTED + "{{ (range(99999)|batch(1))|sum(start=[])|length }}",
    "walked": NESTED + WALKED,
    "macro": MACRO,
    "block": "{% block a %}x{{ self.a() }}{{ self.a() }}{% endblock %}",
    "linked": BIG + "{% set ns = namespace() %}{% for i in range(999) %}{% set ns.a = [ns.a, big ~ i] %}{% endfor %}",
    "written often": BIG + "{% for i in range(99999) %}{{ big }}{% endfor %}",
    "set often": BIG + "{% for i in range(99999) %}{% set x %}{{ big }}{{ x }}{% endset %}{% endfor %}",
    "lipsum": "{{ lipsum(n=1000000) }}",
}  # fmt: skip


@pytest.fixture
def little_memory() -> Iterator[None]:
    """2 GB more than are in use: to take more fails, with another error than TemplateLimit."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_template_ends(
    kind: str, little_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "SECONDS", 0.5)
    template, begin = ChatTemplate(HOSTILE[kind], {}, ()), time.thread_time()
    with pytest.raises(ValueError, match=r"^the chat template [^\n]*$") as caught:
        template.render([{"role": "user", "content": "hello"}])
    assert time.thread_time() - begin < 3
    assert isinstance(caught.value, TemplateLimit) or kind in (
        "walked",
        "block",
        "lipsum",
        "quotient",
    ), caught.value


def test_what_templates_do_is_not_refused() -> None:
    """Long conversations and texts, through every filter that models' templates have; beside
    test_chat_styles."""
    source = """{%- set ns = namespace(text='', calls=[]) -%}
    {%- for message in messages if message.role in ['user', 'assistant'] -%}
    {%- set ns.calls = ns.calls + [message] -%}
    {%- set ns.text = ns.text ~ message.content|trim|replace('x', 'yy')|indent(2) -%}
    {%- if message == messages[-1] and messages|selectattr('role', 'eq', 'user')|list|length > 1 -%}
    {{- (message|tojson(indent=4)) ~ loop.index ~ message.content.split('\n')|join(', ')|upper -}}
    {%- endif -%}
    {{- '%s: %d' % (message.role, loop.length) ~ '{}!'.format(loop.index0) -}}
    {%- endfor -%}
    {{- ns.text|length ~ ns.calls|map(attribute='role')|unique|sort|join(' ') -}}"""
    chat = [
        {"role": "assistant" if n % 2 else "user", "content": f"x {n}\n" * 400} for n in range(200)
    ]
    from transformers.utils.chat_template_utils import render_jinja_template

    [wanted], _ = render_jinja_template([chat], chat_template=source)
    assert ChatTemplate(source, {}, ()).render(chat) == wanted
    long = [{"role": "user", "content": "x" * 20_000_000}]
    assert len(ChatTemplate(CHATML, {}, ()).render(long)) > 20_000_000


def test_a_source_that_is_no_template_s_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, "x" * (LARGEST_SOURCE + 1))
    with pytest.raises(TemplateLimit, match="the chat template has more than 262,144 characters"):
        ChatTemplate.of(folder, ())
    for nested in (
        "{{ " + "(" * 5000,
        "{{ " + "not " * 5000 + "1 }}",
        "{% if 1 %}" * 500,
        "{{ 1" + "|abs" * 5000 + " }}",
    ):
        with pytest.raises(ValueError, match="the chat template"):
            ChatTemplate(nested, {}, ()).render([])


def test_the_commands_end_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    config = transformers.AutoConfig.for_model(**LLAMA | {"vocab_size": 400})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    capsys.readouterr()
    write_rows(
        rows,
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
        * 300,
    )
    for kind in ("power", "concatenated", "written as JSON"):
        write_tokenizer(folder, HOSTILE[kind])
        assert main(["generate", str(folder), "--chat", "--prompt", "hello"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert "model: the chat template" in line
        with pytest.raises(DataError, match=r"^[^\n]*model: the chat template [^\n]*$"):
            preprocess_rows([str(rows)], tmp_path / "data", Settings("chat", str(folder)))
        assert [path.name for path in tmp_path.glob("data*")] == []
