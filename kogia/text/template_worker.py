"""The process in which a chat template runs: JSON lines in and out of a socket, nothing else.

The kernel bounds what a template may take: a timer of CPU time, which ends this process even inside one long
operation, and a limit on its address space.
"""

import json
import resource
import signal
import socket
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from kogia.process import limit_memory, limit_resource
from kogia.text.template import CPU_SECONDS, MAX_CHARS, MEMORY_BYTES


def main(channel: socket.socket) -> None:
    """Serves the socket until it closes. First line in: the template. Then per line variables in, a reply out."""
    _limit_resources()
    template = None
    with channel.makefile("rb") as lines:
        source = json.loads(next(lines))
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal's default action ends the process
            try:
                template = template or environment().from_string(source)
                text = template.render(json.loads(line))
                reply = json.dumps({"text": text} if len(text) <= MAX_CHARS else {"error": _too_long(len(text))})
            except (Exception, MemoryError) as error:  # noqa: BLE001 - a template may raise anything
                reply = json.dumps({"error": _reason(error)})
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(reply.encode() + b"\n")


def environment() -> ImmutableSandboxedEnvironment:
    """The dialect of chat templates as transformers defines it."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = _to_json
    env.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _make_dict,
        "namespace": PlainNamespace,
    }
    return env


class Generation(Extension):
    """`{% generation %}...{% endgeneration %}` marks what a model writes; prompts are rendered as if it were absent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class PlainNamespace(Namespace):
    """A namespace without underscore names, by which some jinja2 releases can be left."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace has no name {name!r}")
        Namespace.__setitem__(self, name, value)


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _limit_resources() -> None:
    """No files written, no core dumps, and MEMORY_BYTES more address space than now."""
    limit_memory(MEMORY_BYTES)
    limit_resource(resource.RLIMIT_FSIZE, 0)
    limit_resource(resource.RLIMIT_CORE, 0)


def _too_long(num_chars: int) -> str:
    return f"renders {num_chars:,} characters, more than {MAX_CHARS:,}"


def _reason(error: BaseException) -> str:
    """One printable line: what a template says about itself is not to reach a terminal as it is."""
    if isinstance(error, MemoryError):
        text = f"needs more than {MEMORY_BYTES >> 20} MiB"
    elif isinstance(error, TemplateSyntaxError):
        text = f"line {error.lineno}: {error.message}"
    elif type(error) is TemplateError:
        text = f"refuses this conversation: {error.message}"
    else:
        text = f"{type(error).__name__}: {error}"
    return "".join(char if char.isprintable() else " " for char in text[:300])
