"""The process in which a grammar is tried: JSON lines in and out of a socket, nothing else.

The kernel bounds what a grammar may take: a timer of CPU time, which ends this process even inside one long call, and a
limit on its address space.
"""

import json
import resource
import signal
import socket

from kogia.engine.grammar import CPU_SECONDS, MEMORY_BYTES, Compiler
from kogia.process import limit_memory, limit_resource


def main(channel: socket.socket) -> None:
    """Serves the socket until it closes. First line in: the tokenizer. Then per line a grammar in, a verdict out."""
    with channel.makefile("rb") as lines:
        compiler = Compiler(**json.loads(next(lines)))
        limit_memory(MEMORY_BYTES)
        limit_resource(resource.RLIMIT_FSIZE, 0)
        limit_resource(resource.RLIMIT_CORE, 0)
        for line in lines:
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal's default action ends the process
            try:
                compiler.explore(compiler.start(*json.loads(line)))
                reply = {"error": None}
            except ValueError as error:
                reply = {"error": str(error)}
            except MemoryError:
                reply = {"error": f"needs more than {MEMORY_BYTES >> 20} MiB"}
            signal.setitimer(signal.ITIMER_PROF, 0)
            channel.sendall(json.dumps(reply).encode() + b"\n")
