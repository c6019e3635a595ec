r"""Load test with real text: what can this machine take, and does it keep its promises?

::

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --headless -u 32 -r 32 -t 20s \
        --task embed --slo-p95-ms 200 --slo-error-rate 0.01 --csv out --html report.html

Each user sends a request, waits for the answer, checks it, and sends the next: a closed loop, in which a server that
slows down is sent less (``--think-time-s`` adds a pause). A request counts if it starts after all users run and
``--warm-up-s`` has passed. No request is cut off at the end: those under way are waited for, and count. A user that is
refused waits as ``Retry-After`` says, at most a second.

Exit code: 0 if the limits are kept, 1 if one is missed, 2 if the test could not start or is void. Without a limit on
errors: 1 on any error. With several processes or machines (``--processes``, ``--master``, ``--worker``) the master
alone judges. A run is void if a process that sends was busy for more than ``--max-cpu`` of the time, or if a worker is
lost: killed, cut off, or gone before the master ended the run. The master then ends it at once.
"""

# Locust's events carry no annotations.
# mypy: disable-error-code="untyped-decorator, no-untyped-call"

from __future__ import annotations

import contextlib
import html
import json
import logging
import random
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gevent
from locust import FastHttpUser, events, stats, task
from locust.env import Environment
from locust.event import EventHook
from locust.exception import StopUser
from locust.runners import MasterRunner, WorkerRunner

# Locust imports this file by its path, from any folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from deploy.texts import TextsError, docstrings
from loadtest.measure import Collector, describe
from loadtest.options import CannotStartError, Options, add_options
from loadtest.probe import check_host, check_server, learn_traits
from loadtest.session import FINISH, FINISHED, START, Session, judge, read_texts
from loadtest.tasks import TASKS

logger = logging.getLogger("loadtest")

EXIT_KEPT, EXIT_MISSED, EXIT_VOID = 0, 1, 2
EXIT_CANNOT_START = EXIT_VOID

FORKED_WORKERS_WAIT_S = 60.0
"""How long a master waits for its own processes (``--processes``), unless ``--expect-workers-max-wait`` says."""

UNCOUNTED = EventHook()
"""Where requests that do not count are reported: nobody listens."""

# Now, not when the test starts: it takes seconds on a busy machine, in which Locust's run time would already tick and a
# master would give up a worker for sending no heartbeat. With --processes the children inherit the result.
if not any(argument.startswith(("--texts", "--help", "-h", "--version", "-V")) for argument in sys.argv):
    with contextlib.suppress(TextsError):
        docstrings()

# Points of the report's charts; five seconds apart is too far for a run of twenty.
stats.HISTORY_STATS_INTERVAL_SEC = 1

events.init_command_line_parser.add_listener(lambda parser, **_: add_options(parser))


_session: Session | None = None
"""The test of this process: Locust's users and event listeners have nothing else in common."""

_interrupted = False
"""Whether this master was interrupted. Ctrl-C reaches processes of ``--processes`` as well, which may be quicker."""


def prepare(environment: Environment) -> Session:
    """Looks at the options and the server, and reads the texts.

    Raises:
        CannotStartError: Any of them is not as it should be.
    """
    assert environment.parsed_options is not None
    options = Options.from_namespace(environment.parsed_options)
    host = environment.host = check_host(environment.host)
    check_server(host, options)
    endpoint = TASKS[options.task]
    traits = learn_traits(host, options, endpoint)
    rng = random.Random(f"{options.seed}/{getattr(environment.runner, 'worker_index', 0)}")
    return Session(environment.runner, options, endpoint, traits, read_texts(options, endpoint, traits, rng), rng)


@events.init.add_listener
def on_init(environment: Environment, **_: Any) -> None:
    """Stops before anything starts if the test cannot run, and lets master and workers talk."""
    runner = environment.runner
    if isinstance(runner, WorkerRunner):
        environment.process_exit_code = EXIT_KEPT
        runner.register_message(START, on_start)
        runner.register_message(FINISH, on_finish, concurrent=True)
        # Listeners of this event are called last to first: before Locust's own, which takes leave of the master.
        environment.events.quitting.add_listener(on_worker_quitting)
        return
    if isinstance(runner, MasterRunner):
        runner.register_message(FINISHED, on_finished)
        note_interrupts()
    # In the web interface, the host can still be typed in.
    if environment.host or environment.web_ui is None:
        try:
            prepare(environment)
        except CannotStartError as error:
            print(f"loadtest: {error}", file=sys.stderr, flush=True)
            sys.exit(EXIT_CANNOT_START)
    if isinstance(runner, MasterRunner) and environment.web_ui is None:
        gevent.spawn(expect_workers, environment)


def note_interrupts() -> None:
    """Has an interrupt of this process noted, before it does what it did."""
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual):
        return

    def note(number: int, frame: Any) -> Any:
        global _interrupted
        _interrupted = True
        return usual(number, frame)

    signal.signal(signal.SIGINT, note)


def expect_workers(environment: Environment) -> None:
    """Ends a master whose workers do not all connect in time, before Locust does with the code of a missed limit."""
    parsed: Any = environment.parsed_options
    runner: Any = environment.runner
    limit_s = parsed.expect_workers_max_wait or (FORKED_WORKERS_WAIT_S if parsed.processes else 0)
    if not limit_s:
        return
    gevent.sleep(limit_s)
    if _session is None and runner.worker_count < parsed.expect_workers:
        print(
            f"loadtest: expected {parsed.expect_workers} workers within {limit_s:g} s, got {runner.worker_count}: do "
            "the others run, and is their --master-host right?",
            file=sys.stderr,
            flush=True,
        )
        runner.quit()
        sys.exit(EXIT_CANNOT_START)  # gevent raises it in the main greenlet.


@events.test_start.add_listener
def on_test_start(environment: Environment, **_: Any) -> None:
    """Starts a test in this process."""
    global _session
    runner: Any = environment.runner
    try:
        _session = prepare(environment)
    except CannotStartError as error:
        print(f"loadtest: {error}", file=sys.stderr, flush=True)
        _session = None
        environment.process_exit_code = EXIT_CANNOT_START
        # Not from within this listener: the runner is still starting.
        gevent.spawn(end, environment)
        return
    TextUser.network_timeout = TextUser.connection_timeout = _session.options.request_timeout_s
    if isinstance(runner, MasterRunner):
        now_s = time.monotonic()
        _session.heard_s = {client.id: now_s for client in [*runner.clients.ready, *runner.clients.running]}
        gevent.spawn(watch_workers, _session, environment)


def watch_workers(session: Session, environment: Environment) -> None:
    """Ends a master's test once it is void: the rest of it would be waste."""
    while session.ends_s is None and not session.lost:
        gevent.sleep(0.2)
        if session.ends_s is None:
            session.look_for_losses()
    if session.lost:
        end(environment)


def end(environment: Environment) -> None:
    """Ends the test, and without a web interface the process."""
    runner: Any = environment.runner
    if environment.web_ui is None:
        runner.quit()
    else:
        runner.stop()


@events.worker_connect.add_listener
def on_worker_connect(client_id: str, **_: Any) -> None:
    """Counts a worker that comes while the test runs among those that take part."""
    if _session is not None and _session.ends_s is None:
        _session.heard_s[client_id] = time.monotonic()


@events.heartbeat_sent.add_listener
def on_heartbeat_sent(client_id: str, **_: Any) -> None:
    """The master has answered a worker's heartbeat."""
    if _session is not None and client_id in _session.heard_s:
        _session.heard_s[client_id] = time.monotonic()


@events.spawning_complete.add_listener
def on_spawning_complete(user_count: int, **_: Any) -> None:
    """Starts the warm-up, once; it ends by itself. Workers wait for their master's word."""
    if _session is not None and _session.warm_up is None and not isinstance(_session.runner, WorkerRunner):
        _session.users = user_count
        _session.warm_up = gevent.spawn_later(_session.options.warm_up_s, _session.start_counting)


class TextUser(FastHttpUser):
    """Sends texts to the endpoint under test, one request after the other."""

    concurrency = 1

    def wait_time(self) -> float:
        """Seconds between an answer and the next request: random, so that users do not march in step."""
        mean_s = _session.options.think_time_s if _session is not None else 0.0
        return random.expovariate(1 / mean_s) if mean_s else 0.0

    @task
    def send(self) -> None:
        """Sends one request, and checks its answer."""
        session = _session
        if session is None or session.ends_s is not None:
            raise StopUser
        texts = session.rng.choices(session.texts, k=session.options.inputs_per_request)
        # Decided when the request starts: an answer after the warm-up may belong to a queue that was shorter.
        counts = session.counting
        self.client.request_event = self.environment.events.request if counts else UNCOUNTED
        session.in_flight += counts
        try:
            with self.client.post(
                session.task.path_at(session.traits),
                # Bytes are sent as they are; Locust's annotation knows only str.
                data=session.task.body(texts, session.traits),  # type: ignore[arg-type]
                headers=session.options.headers,
                name=session.task.path,
                catch_response=True,
            ) as response:
                pause_s = judge(response, len(texts), session, session.collector if counts else Collector())
        finally:
            session.in_flight -= counts
        if pause_s:
            gevent.sleep(pause_s)


@events.report_to_master.add_listener
def on_report_to_master(data: dict[str, Any], **_: Any) -> None:
    """Hands what a worker has counted since its last report to the master."""
    if _session is not None:
        data["loadtest"] = _session.collector.to_wire()
        data["loadtest_counting"] = _session.counting
        _session.collector = Collector()


@events.worker_report.add_listener
def on_worker_report(client_id: str, data: Mapping[str, Any], **_: Any) -> None:
    """Adds a worker's counts to the master's; a worker that came late is told to start counting."""
    if _session is not None and "loadtest" in data:
        if client_id in _session.heard_s:
            _session.heard_s[client_id] = time.monotonic()
        _session.collector.merge(Collector.from_wire(data["loadtest"]))
        if _session.counting and not data["loadtest_counting"]:
            _session.runner.send_message(START, client_id=client_id)


@events.test_stopping.add_listener
def on_test_stopping(environment: Environment, **_: Any) -> None:
    """Ends the test without cutting off a request; a master waits for its workers' last reports."""
    session = _session
    if session is None or session.ends_s is not None:
        return
    session.stop_sending()
    runner = environment.runner
    if not isinstance(runner, MasterRunner):
        session.wait_for_answers()
        return
    if not _interrupted:
        session.look_for_losses()
    runner.send_message(FINISH)
    deadline_s = time.monotonic() + session.options.request_timeout_s + 5
    while missing := session.heard_s.keys() - session.finished_workers.keys():
        if time.monotonic() > deadline_s or all(session.is_silent(worker) for worker in missing):
            break
        gevent.sleep(0.02)
    for worker in missing:
        session.lose(worker, "sent no last report (killed, halted, or cut off from the master)")
    if session.lost:
        # Not from within this listener: the runner is still stopping.
        gevent.spawn(end, environment)


def on_start(**_: Any) -> None:
    """A worker starts counting."""
    if _session is not None:
        _session.start_counting()


def on_finish(environment: Environment, **_: Any) -> None:
    """A worker sends no more, waits for answers, reports, and says so."""
    if _session is not None:
        _session.hand_over()
    else:
        runner: Any = environment.runner
        runner.send_message(FINISHED, {"measured_s": 0.0, "cpu": 0.0})


def on_finished(msg: Any, **_: Any) -> None:
    """The master notes that a worker is done. Its last report came before, on the same connection."""
    if _session is not None:
        _session.finished_workers[msg.node_id] = msg.data["measured_s"]
        _session.cpu[msg.node_id] = msg.data["cpu"]
        if _session.ends_s is None and not _interrupted:
            _session.lose(msg.node_id, "left during the run (its own output says why)")


def on_worker_quitting(environment: Environment, **_: Any) -> None:
    """A worker that leaves by itself, or has lost its master, hands over what it has, and says so."""
    if _session is not None and not _session.handed_over:
        print("loadtest: this worker leaves before its master has ended the run", file=sys.stderr, flush=True)
        environment.process_exit_code = EXIT_VOID
        _session.hand_over()


@events.quitting.add_listener
def on_quitting(environment: Environment, **_: Any) -> None:
    """Gives the verdict, and sets the exit code."""
    session = _session
    runner: Any = environment.runner
    if isinstance(runner, WorkerRunner):
        return
    if session is None:
        # In the web interface nobody may have pressed start.
        if environment.web_ui is None and environment.process_exit_code is None:
            print("loadtest: the run ended before a request was sent", file=sys.stderr, flush=True)
            environment.process_exit_code = EXIT_CANNOT_START
        return
    # After Ctrl-C users still run.
    session.stop_sending()
    session.look_for_saturation()
    assert environment.parsed_options is not None
    csv_prefix: str | None = environment.parsed_options.csv_prefix
    if csv_prefix:
        # Locust writes its tables once a second, but not at the end: the last requests would be missing.
        gevent.sleep(1.2 * stats.CSV_STATS_INTERVAL_SEC)
    verdicts = session.options.objectives.judge(session.collector)
    crashes = sum(int(crash["count"]) for crash in runner.exceptions.values())
    if crashes:
        verdicts.append((False, f"{crashes} exceptions in the load test itself, see above"))
    kept = all(passed for passed, _ in verdicts)
    environment.process_exit_code = EXIT_VOID if session.lost else EXIT_KEPT if kept else EXIT_MISSED
    summary = {
        "task": session.task.name,
        "path": session.task.path_at(session.traits),
        "host": environment.host,
        "users": session.users,
        "think_time_s": session.options.think_time_s,
        "inputs_per_request": session.options.inputs_per_request,
        "warm_up_s": session.options.warm_up_s,
        **session.collector.summary(session.measured_s),
        "generator_cpu": max(session.cpu.values(), default=None),
        "limits": [{"kept": passed, "message": message} for passed, message in verdicts],
        "void": list(session.lost.values()),
        "kept": kept and not session.lost,
    }
    if csv_prefix:
        Path(f"{csv_prefix}_summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    text = "\n".join(describe(summary))
    if html_file := environment.parsed_options.html_file:
        add_to_report(Path(html_file), text)
    # After Locust's own tables, which come between this event and that one.
    events.quit.add_listener(lambda **_: print(f"\n{text}", flush=True))


def add_to_report(path: Path, text: str) -> None:
    """Puts the summary on top of Locust's HTML report, which knows neither the limits nor percentiles of three digits.

    Args:
        path: The report; without one (after SIGTERM Locust writes none), nothing happens.
        text: Lines of text.
    """
    if path.is_file():
        # The last one is the page's own; scripts before it hold others as text.
        before, body, after = path.read_text(encoding="utf-8").rpartition("<body>")
        style = "margin:0;padding:1.5em;overflow:auto;font-size:14px;color:#222;background:#eee"
        block = f'<pre style="{style}">{html.escape(text)}</pre>' if body else ""
        path.write_text(before + body + block + after, encoding="utf-8")
