"""The load test's own options, without Locust: what is refused before anything starts."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from loadtest.options import CannotStartError, Options, add_options
from loadtest.probe import check_host


class Parser:
    """Takes options as Locust's parser does, which knows two settings more than argparse."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser()
        self.parser.add_argument("--run-time", type=float)

    def add_argument_group(self, title: str) -> Parser:
        return self

    def add_argument(self, *names: str, env_var: str = "", is_secret: bool = False, **settings: Any) -> None:
        self.parser.add_argument(*names, **settings)


def options(*arguments: str) -> Options:
    parser = Parser()
    add_options(parser)  # type: ignore[arg-type]
    return Options.from_namespace(parser.parser.parse_args(arguments))


def test_defaults_are_possible() -> None:
    assert options().objectives == options("--run-time", "3", "--warm-up-s", "2").objectives


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--inputs-per-request: expected at least 1, got 0", ("--inputs-per-request", "0")),
        ("--max-chars: expected at least 1, got -1", ("--max-chars", "-1")),
        ("--warm-up-s: expected at least 0, got nan", ("--warm-up-s", "nan")),
        ("--slo-error-rate: expected between 0 and 1", ("--slo-error-rate", "5")),
        ("--slo-refused-rate: expected between 0 and 1", ("--slo-refused-rate", "-0.1")),
        ("--slo-p95-ms: expected more than 0", ("--slo-p95-ms", "0")),
        ("--request-timeout-s: expected more than 0", ("--request-timeout-s", "0")),
        ("--slo-p95-ms: expected a finite number, got inf", ("--slo-p95-ms", "inf")),
        ("--request-timeout-s: expected a finite number", ("--request-timeout-s", "inf")),
        ("--think-time-s: expected a finite number", ("--think-time-s", "inf")),
        ("--warm-up-s: expected a finite number", ("--warm-up-s", "inf")),
        ("ends within its warm-up", ("--run-time", "3", "--warm-up-s", "5")),
    ],
)
def test_values_out_of_range_are_refused(message: str, arguments: tuple[str, ...]) -> None:
    with pytest.raises(CannotStartError) as raised:
        options(*arguments)
    assert message in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "ftp://127.0.0.1"])
def test_a_host_is_a_url(host: str) -> None:
    with pytest.raises(CannotStartError, match=r"expected a URL such as http://127\.0\.0\.1:8000"):
        check_host(host)
