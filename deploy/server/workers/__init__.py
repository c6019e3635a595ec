"""`--workers`: several processes that serve together.

A supervisor (`supervisor`) starts a process that loads and verifies the bundle, chooses the variant and packs its
weights once (`prepare`), and then the workers (`worker`), which map those weights. It accepts connections (`front`) and
hands each to the worker that has the fewest; it replaces workers that die, and on SIGHUP starts a new generation of
them beside the old one. `cpus` splits the machine, `channel` is how the processes speak, and `board` is memory with
what each has counted, which `exposition` adds up.

Why the supervisor accepts. With one listener that all workers have inherited, whichever wakes first takes all
connections that wait: clients that keep their connections then stay with it, beside idle workers. With a listener for
each worker (SO_REUSEPORT), the kernel deals connections out by a hash, which is uneven for few clients, and those that
wait for a worker that dies are reset. A connection that is handed over costs one message, once, and none is lost while
a worker dies, is replaced or drains: the supervisor keeps a duplicate of each (`keeper`), and workers mark how far its
requests are (`marks`, `protocol`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ...host import host
from ..process import open_admin, open_listener
from ..sockets import url_of
from .cpus import AUTO, plan
from .supervisor import Supervisor

__all__ = ["supervise"]


def supervise(arguments: argparse.Namespace, argv: Sequence[str], port: int) -> int:
    """Serves with several workers until a signal.

    Args:
        arguments: Options of the server.
        argv: The same as they came, for the workers.
        port: Where to listen.

    Returns:
        The exit code.

    Raises:
        UsageError: The address cannot be used.
    """
    workers = None if arguments.workers == AUTO else arguments.workers
    shares = plan(workers, arguments.threads, host())
    listener = open_listener(arguments.host, port, arguments.unix_socket)
    admin = None if arguments.admin_address is None else open_admin(arguments.admin_address)
    url = url_of(listener, tls=arguments.tls_cert is not None)
    supervisor = Supervisor(listener, url, shares, argv, arguments.drain_delay_s, arguments.drain_timeout_s)
    if admin is not None:
        from ..admin import Admin

        Admin(admin, supervisor.ask)
    return supervisor.run()
