"""The commands: what each takes, does, and ends with (0 kept, 1 missed or worse, 2 void or not started)."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from loadtest.options import CannotStartError
from loadtest.probe import check_host, check_server, learn_traits
from loadtest.tasks import TASKS, Traits

from .knee import Search, find_knee
from .options import KEY_VARIABLE, Settings, add_load_options, add_slo_options, read_objectives
from .result import describe_run, knee_result, run_result
from .schema import write_result
from .team import Team, lead, work
from .verdict import EXIT_VOID, judge

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    whole = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="send requests at their times, whether or not the server keeps up")
    add_load_options(run)
    add_slo_options(run)
    run.add_argument("-o", "--output", default="", metavar="FILE", help="write the result as JSON")

    knee = commands.add_parser("knee", help="search the highest rate that keeps the limits")
    add_load_options(knee)
    add_slo_options(knee)
    knee.add_argument("--precision", type=float, default=0.05, metavar="PART", help="when to end (default: 0.05)")
    knee.add_argument("-o", "--output", default="", metavar="FILE", help="write the result as JSON")
    knee.set_defaults(duration_s=12.0, rate=1.0, rate_to=100_000.0)

    worker = commands.add_parser("worker", help="make a part of the load of a leader on this machine")
    worker.add_argument("--join", required=True, metavar="HOST:PORT", help="where the leader listens (its --bind)")
    return whole


def _settings(given: argparse.Namespace) -> Settings:
    if given.api_key:
        # Workers of this machine inherit it; it is sent to no others, and stands in no result.
        os.environ[KEY_VARIABLE] = given.api_key
    check_host(given.host)
    return Settings.from_values({**vars(given), "host": given.host.rstrip("/")})


def _learn(settings: Settings) -> Traits:
    trust = settings.trust()
    check_server(settings.host, settings, trust)
    return learn_traits(settings.host, settings, TASKS[settings.task], trust)


def _stop_on_interrupt(team: Team) -> None:
    """The first interrupt ends the run, which still gives a verdict; a second one ends the process."""
    loop = asyncio.get_running_loop()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        team.stop()

    loop.add_signal_handler(signal.SIGINT, interrupt)


def _team(given: argparse.Namespace) -> tuple[int, int, float, str]:
    for name in ("processes", "expect_workers"):
        if getattr(given, name) < (name == "processes"):
            raise CannotStartError(
                f"--{name.replace('_', '-')}: expected a number of processes, got {getattr(given, name)}"
            )
    return given.processes, given.expect_workers, given.expect_workers_max_wait_s, given.bind


async def _run(given: argparse.Namespace, command: Sequence[str]) -> int:
    settings, objectives = _settings(given), read_objectives(vars(given))
    traits = _learn(settings)
    async with lead(*_team(given)) as team:
        _stop_on_interrupt(team)
        outcome = await team.run(settings, traits)
    verdict = judge(outcome, settings, objectives)
    result = run_result(command, settings, objectives, traits, outcome, verdict)
    print("\n".join(describe_run(result)))
    if given.output:
        write_result(given.output, result)
    return verdict.exit_code


async def _knee(given: argparse.Namespace, command: Sequence[str]) -> int:
    settings, objectives = _settings(given), read_objectives(vars(given))
    if settings.shape != "steady" or settings.trace:
        raise CannotStartError("knee: expected no --shape and no --trace; each trial has one rate")
    search = Search(settings.rate, settings.rate_to, given.precision)
    search.check(objectives)
    traits = _learn(settings)
    async with lead(*_team(given)) as team:
        _stop_on_interrupt(team)
        found = await find_knee(team, settings, traits, objectives, search, lambda line: print(line, flush=True))
    if given.output:
        write_result(given.output, knee_result(command, settings, objectives, traits, found.as_fields()))
    for reason in found.void:
        print(f"{'VOID':10} {reason}")
    if found.kept is not None:
        upper = f", missed at {found.missed:.4g}/s" if found.missed else ""
        print(f"{'knee':10} {found.kept:.4g} requests/s keep the limits{upper}")
    return found.exit_code


def main(arguments: Sequence[str]) -> int:
    """Runs a command.

    Args:
        arguments: Without the name of the program.

    Returns:
        Exit code.
    """
    given = parser().parse_args(arguments)
    try:
        match given.command:
            case "run":
                return asyncio.run(_run(given, arguments))
            case "knee":
                return asyncio.run(_knee(given, arguments))
            case "worker":
                return asyncio.run(work(given.join))
    except CannotStartError as error:
        print(f"loadtest: {error}", file=sys.stderr, flush=True)
    return EXIT_VOID
