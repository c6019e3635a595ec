"""The commands: what each takes, does, and ends with (0 kept, 1 missed or worse, 2 void or not started)."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.ending import is_of_output
from loadtest.measure import Objectives
from loadtest.options import KEY_VARIABLE, CannotStartError, flag_of, why
from loadtest.probe import check_host, check_server, learn_traits
from loadtest.tasks import TASKS, Traits

from .compare import changes_data, compare_runs, describe_changes, overall
from .knee import Search, find_knee
from .options import Settings, add_load_options, add_slo_options, check_effects, read_objectives
from .presets import with_preset
from .prices import read_prices
from .report import Source, choose_prices, report_data, report_html
from .result import describe_run, knee_result, run_result
from .schema import check_output, read_result, write_result
from .selfcheck import check_machine, describe_check
from .team import Team, lead, work
from .verdict import EXIT_KEPT, EXIT_MISSED, EXIT_VOID, judge

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """The parser of every command."""
    whole = argparse.ArgumentParser(
        prog="python -m loadtest",
        description="Load tests whose requests have scheduled times. Each command has its own --help.",
        epilog="exit codes: 0 the limits were kept, 1 one was missed (compare: worse), 2 void, or it could not start; "
        "130 stopped by Ctrl-C.",
    )
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, usage: str | None = None) -> argparse.ArgumentParser:
        if usage is not None:
            usage = f"%(prog)s {usage} [OPTION ...]    (--help lists the options)"
        sentence = text[0].upper() + text[1:] + ("" if text.endswith("?") else ".")
        return commands.add_parser(name, help=text, description=sentence, usage=usage, allow_abbrev=False)

    run = command("run", "send requests at their times, whether or not the server keeps up", "--host URL --rate PER_S")
    add_load_options(run)
    add_slo_options(run)
    run.add_argument("-o", "--output", default="", metavar="FILE", help="write the result as JSON")

    knee = command("knee", "search the highest rate that keeps the limits", "--host URL --slo-p99-ms MS")
    add_load_options(knee, search=True, duration_s=12.0, rate=1.0, rate_to=100_000.0)
    add_slo_options(knee)
    knee.add_argument(
        "--precision",
        type=float,
        default=0.05,
        metavar="PART",
        help="end when the rates kept and missed differ by less (default: 0.05)",
    )
    knee.add_argument("-o", "--output", default="", metavar="FILE", help="write the result as JSON")

    report = command("report", "write one page on some results, without network")
    report.add_argument("results", nargs="+", metavar="RESULT", help="files that run and knee wrote")
    report.add_argument("-o", "--output", default="report.html", metavar="FILE", help="the page (default: report.html)")
    report.add_argument("--json", default="", metavar="FILE", help="write the same as JSON, too")
    report.add_argument("--prices", default="", metavar="FILE", help="your prices, as in loadtest/prices.example.json")
    report.add_argument(
        "--instance", action="append", default=[], metavar="NAME", help="the machine of all results, or once for each"
    )

    compare = command("compare", "is a run better than another, worse, or is it noise?")
    compare.add_argument("before", metavar="BEFORE", help="a file that run wrote")
    compare.add_argument("after", metavar="AFTER", help="another one, of the same load")
    compare.add_argument(
        "--confidence", type=float, default=0.99, metavar="PART", help="of each figure (default: 0.99)"
    )
    compare.add_argument(
        "--tolerance", type=float, default=0.02, metavar="PART", help="less does not matter (default: 0.02)"
    )
    compare.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (default: 0)")
    compare.add_argument("--json", default="", metavar="FILE", help="write the comparison as JSON")

    check = command("self-check", "does the generator keep its schedule on this machine?")
    check.add_argument(
        "--rate", type=float, default=1000.0, metavar="PER_S", help="arrivals per second (default: 1000)"
    )
    check.add_argument("--duration-s", type=float, default=10.0, metavar="S", help="of the run (default: 10)")
    check.add_argument("--max-lag-ms", type=float, default=2.0, metavar="MS", help="limit at p99 (default: 2)")

    worker = command("worker", "make a part of the load of a leader on this machine")
    worker.add_argument("--join", required=True, metavar="HOST:PORT", help="where the leader listens (its --bind)")
    return whole


def _settings(given: argparse.Namespace, objectives: Objectives) -> Settings:
    if given.api_key:
        # Workers of this machine inherit it; it is sent to no others, and stands in no result.
        os.environ[KEY_VARIABLE] = given.api_key
    values = {**vars(given), "host": check_host(given.host)}
    settings = Settings.from_values(with_preset(values, objectives))
    check_effects(values, settings, search=given.command == "knee")
    if given.output:
        check_output(given.output)
    return settings


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
            raise CannotStartError(f"{flag_of(name)}: expected a number of processes, got {getattr(given, name)}")
    if not 0 < given.expect_workers_max_wait_s < float("inf"):
        raise CannotStartError(
            f"--expect-workers-max-wait-s: expected more than 0, got {given.expect_workers_max_wait_s:g}"
        )
    return given.processes, given.expect_workers, given.expect_workers_max_wait_s, given.bind


class _Prepared(NamedTuple):
    """What a load needs. It is read before there is an event loop, in which the first Ctrl-C would wait for its end."""

    objectives: Objectives
    settings: Settings
    search: Search | None
    traits: Traits


def _prepare(given: argparse.Namespace) -> _Prepared:
    objectives = read_objectives(vars(given))
    settings = _settings(given, objectives)
    search = None
    if given.command == "knee":
        if settings.shape != "steady" or settings.trace or settings.preset:
            raise CannotStartError("knee: expected no --shape, --trace or --preset; each trial has one rate")
        search = Search(settings.rate, settings.rate_to, given.precision)
        search.check(objectives)
    return _Prepared(objectives, settings, search, _learn(settings))


def _tell(lines: Sequence[str], path: str, save: Callable[[str], None]) -> None:
    """Saves a result and prints its lines: a reader that leaves costs no file, and a full disk no line."""
    try:
        if path:
            save(path)
    finally:
        if lines:
            print("\n".join(lines), flush=True)


async def _run(given: argparse.Namespace, command: Sequence[str], prepared: _Prepared) -> int:
    objectives, settings, _, traits = prepared
    async with lead(*_team(given)) as team:
        _stop_on_interrupt(team)
        outcome = await team.run(settings, traits)
    verdict = judge(outcome, settings, objectives)
    result = run_result(command, settings, objectives, traits, outcome, verdict)
    _tell(describe_run(result), given.output, lambda path: write_result(path, result))
    for note in result["notes"]:
        print(f"loadtest: {note}", file=sys.stderr, flush=True)
    return verdict.exit_code


async def _knee(given: argparse.Namespace, command: Sequence[str], prepared: _Prepared) -> int:
    objectives, settings, search, traits = prepared
    assert search is not None
    async with lead(*_team(given)) as team:
        _stop_on_interrupt(team)
        found = await find_knee(team, settings, traits, objectives, search, lambda line: print(line, flush=True))
    lines = [f"{'VOID':10} {reason}" for reason in found.void]
    if found.kept is not None:
        upper = f", missed at {found.missed:.4g}/s" if found.missed else ""
        lines.append(f"{'knee':10} {found.kept:.4g} requests/s keep the limits{upper}")
    result = knee_result(command, settings, objectives, traits, found.as_fields())
    _tell(lines, given.output, lambda path: write_result(path, result))
    return found.exit_code


def _names(paths: Sequence[str]) -> list[str]:
    """Names of files that tell them apart."""
    short = [Path(path).stem for path in paths]
    return list(paths) if len(set(short)) < len(short) else short


def _write(path: str, text: str) -> None:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CannotStartError(f"cannot write {path}: {why(error)}") from error


def _report(given: argparse.Namespace) -> int:
    prices = read_prices(given.prices) if given.prices else []
    chosen = choose_prices(prices, given.instance, len(given.results))
    found = zip(_names(given.results), map(read_result, given.results), chosen, strict=True)
    sources = [Source(*parts) for parts in found]
    _write(given.output, report_html(sources))
    if given.json:
        _write(given.json, json.dumps(report_data(sources), indent=1) + "\n")
    print(f"loadtest: {given.output}")
    return 0


def _compare(given: argparse.Namespace) -> int:
    before, after = read_result(given.before), read_result(given.after)
    changes = compare_runs(before, after, confidence=given.confidence, tolerance=given.tolerance, seed=given.seed)
    lines = [*describe_changes(changes, given.confidence), f"{'all':8} {overall(changes)}"]
    _tell(lines, given.json, lambda path: _write(path, json.dumps(changes_data(changes), indent=1) + "\n"))
    return EXIT_MISSED if overall(changes) == "worse" else EXIT_KEPT


async def _self_check(given: argparse.Namespace) -> int:
    if not 0 < given.max_lag_ms < float("inf"):
        raise CannotStartError(f"--max-lag-ms: expected a finite number above 0, got {given.max_lag_ms:g}")
    outcome, settings = await check_machine(given.rate, given.duration_s)
    kept, message = describe_check(outcome, settings, given.max_lag_ms)
    print(f"{'kept' if kept else 'MISSED':10} {message}")
    return EXIT_KEPT if kept else EXIT_VOID


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
                return asyncio.run(_run(given, arguments, _prepare(given)))
            case "knee":
                return asyncio.run(_knee(given, arguments, _prepare(given)))
            case "self-check":
                return asyncio.run(_self_check(given))
            case "compare":
                return _compare(given)
            case "report":
                return _report(given)
            case "worker":
                return asyncio.run(work(given.join))
    except CannotStartError as error:
        print(f"loadtest: {error}", file=sys.stderr, flush=True)
    except Exception as error:  # Python's own exit code would be that of a missed limit.
        if is_of_output(error):
            raise
        traceback.print_exc()
        print("loadtest: void: this is a fault of the load test", file=sys.stderr, flush=True)
    return EXIT_VOID
