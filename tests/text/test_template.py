"""Chat templates are programs from elsewhere: what they may compute, what they may take, what they may not see."""

import json
import os
import subprocess
import sys
import time

import pytest

from kogia.text.template import MAX_CHARS, ChatTemplate

TURNS = {"messages": [{"role": "user", "content": "q <&> 漢 \ud800"}], "bos_token": "<s>"}


def test_a_template_renders_its_variables():
    template = ChatTemplate("{% for m in messages %}{{ bos_token }}{{ m.role }}:{{ m['content'] }}{% endfor %}\n")
    assert template.render(TURNS) == "<s>user:q <&> 漢 \ud800"
    assert template.render(TURNS | {"bos_token": ""}) == "user:q <&> 漢 \ud800"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'b': '<é>', 'a': [1]} | tojson }}", '{"b": "<é>", "a": [1]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a{% generation %}b{% endgeneration %}c", "abc"),
        ("{% set ns = namespace(n=1, self=2) %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ ns.self }}", "22"),
        ("{{ dict(a=1).a }}{{ dict([('b', 2)])['b'] }}{{ nothing }}", "12"),
    ],
)
def test_the_dialect_is_that_of_transformers(source, text):
    assert ChatTemplate(source).render({}) == text
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    assert utils.render_jinja_template([[{}]], chat_template=source)[0] == [text]


def test_the_date_of_today_is_there():
    assert ChatTemplate("{{ strftime_now('%Y-%m') }}").render({}) == time.strftime("%Y-%m")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (
            "{{ raise_exception('no tools\x1b[2J here') }}",
            r"my\.json: the chat template refuses .*: no tools \[2J here$",
        ),
        ("{{ 1 if }}", r"my\.json: the chat template line 1: unexpected"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update(a=1) }}", "SecurityError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ dict.__subclasses__() }}", "SecurityError|UndefinedError"),
        ("{{ cycler.__init__.__globals__.os }}", "SecurityError"),
        ("{{ '{0.__class__.__mro__}'.format('') }}", "SecurityError"),
        ("{{ (messages | map(attribute='__class__') | list)[0].mro() }}", "Error"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "SecurityError"),
        ("{{ namespace(__init__=1) }}", "SecurityError"),
        ("{{ self.__init__.__globals__.x }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
    ],
)
def test_what_a_template_may_not_do_is_an_error(source, reason):
    with pytest.raises(ValueError, match=reason):
        ChatTemplate(source, "my.json").render(TURNS)


BOMBS = [
    "{{ 7 ** (7 ** 9) % 10 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [messages] * 10 ** 9 }}",
    "{{ '%1000000000d' % 3 }}",
    "{{ '{:1000000000}'.format(3) }}",
    "{{ 'a'.ljust(10 ** 9) }}{{ 'a'.zfill(10 ** 9) }}",
    "{{ 'a' | center(10 ** 12) }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "{{ [1] | tojson(indent=10 ** 9) }}",
    "{{ range(10 ** 9) | list }}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "x" * 999_000 + "{{ 'y' * 4000000 }}",
]
MEASURE = """
import json, resource, sys, time
from kogia.text.template import ChatTemplate
rows = []
for source in json.load(sys.stdin):
    start = time.monotonic()
    try:
        ChatTemplate(source).render({"messages": [{}]})
        error = "none"
    except ValueError as raised:
        error = str(raised)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows.append([error, time.monotonic() - start, children.ru_utime + children.ru_stime, children.ru_maxrss])
print(json.dumps(rows))
"""


def test_every_bomb_ends_in_an_error_with_bounded_time_and_memory():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], input=json.dumps(BOMBS), capture_output=True, text=True, check=True
    )
    rows, spent = json.loads(run.stdout), 0.0
    for bomb, (error, _, total, peak_kib) in zip(BOMBS, rows, strict=True):
        assert error.startswith("chat template: the chat template "), bomb
        assert total - spent < 3.0, bomb  # seconds of CPU
        assert peak_kib < 300 * 1024, bomb
        spent = total
    assert "takes more than 2 s of CPU time" in rows[0][0]
    assert "needs more than 192 MiB" in rows[1][0]
    assert f"more than {MAX_CHARS:,}" in rows[-1][0]


def test_after_a_bomb_the_next_conversation_is_rendered():
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ 'x' * k }}")
    with pytest.raises(ValueError, match="more than 192 MiB"):
        template.render({"n": 1, "k": 10**9})
    assert template.render({"n": 1, "k": 3}) == "xxx"
    with pytest.raises(ValueError, match="CPU time"):
        template.render({"n": 99_999, "k": 0})
    assert template.render({"n": 1, "k": 2}) == "xx"


def test_an_interrupted_rendering_does_not_answer_the_next_one(monkeypatch):
    template = ChatTemplate("{{ x }}")
    assert template.render({"x": 1}) == "1"
    worker = template._worker
    assert worker is not None

    def interrupt() -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker, "_replies", type("Replies", (), {"readline": staticmethod(interrupt)}))
    with pytest.raises(KeyboardInterrupt):
        template.render({"x": 2})
    assert template.render({"x": 3}) == "3"


def test_the_process_ends_with_its_template():
    template = ChatTemplate("x")
    template.render({})
    assert template._worker is not None
    pid = template._worker._child.process.pid
    os.kill(pid, 0)
    del template
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_prompt_costs_less_than_a_millisecond():
    template = ChatTemplate("{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}")
    messages = [{"role": "user", "content": "word " * 200}] * 4
    seconds = []
    for _ in range(101):
        start = time.perf_counter()
        template.render({"messages": messages})
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1e-3  # whatever else the machine does
