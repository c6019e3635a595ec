"""The simulation of fleets against what is known without it."""

from __future__ import annotations

import random
import statistics

import pytest

from benchmarks.balancing import POLICIES, Load, Service
from benchmarks.fleet import PAGE, TABLES, capacity, steady
from benchmarks.simulation import Outcome, Scaling, Simulation

FIXED = Service(tokens_per_s=100.0, batch_s=0.0, batch_tokens=100, most_wait_s=1e9)
"""A request of 100 tokens takes a second, alone in its batch."""


def fixed(chance: random.Random) -> int:
    return 100


def test_one_queue_waits_as_theory_says() -> None:
    """M/D/1: a mean wait of rho / (2 (1 - rho)) service times (Pollaczek and Khinchine), at the rho that there was."""
    for rho in (0.5, 0.7):
        runs = [steady(1, "random", rho, 10_000, service=FIXED, load=fixed, seed=seed) for seed in range(3)]
        had = sum(run.busy_s for run in runs) / sum(run.replica_s for run in runs)
        assert had == pytest.approx(rho, rel=0.02)
        assert statistics.fmean(run.mean() - 1 for run in runs) == pytest.approx(had / (2 * (1 - had)), rel=0.05)


def test_random_choice_makes_independent_queues() -> None:
    """Of 10 replicas each is such a queue; every other policy does better, with requests of one size, too."""
    means = {policy: steady(10, policy, 7.0, 600, service=FIXED, load=fixed).mean() - 1 for policy in POLICIES}
    assert means["random"] == pytest.approx(0.7 / 0.6, rel=0.2)
    assert all(means[policy] < 0.7 * means["random"] for policy in POLICIES if policy != "random")


def slow(done: Outcome) -> float:
    return done.percentile(0.99, Load().most_tokens)


def test_least_tokens_beats_round_robin() -> None:
    """Where sizes differ, as those of texts do; and the predicted wait is better where speeds differ, too."""
    service = Service(slow_part=0.2, slow_rate=0.4)
    rate = 0.75 * capacity(10, service, Load())
    policies = ("round-robin", "least-tokens", "predicted-wait")
    done = {policy: steady(10, policy, rate, 40, service=service) for policy in policies}
    assert slow(done["least-tokens"]) < 0.7 * slow(done["round-robin"])
    assert slow(done["predicted-wait"]) <= slow(done["least-tokens"])


def test_a_run_repeats() -> None:
    rate = 0.8 * capacity(5, Service(), Load())
    one, two, other = (steady(5, "two-choices", rate, 20, seed=seed).answered for seed in (1, 1, 2))
    assert one == two
    assert one != other


def test_every_request_ends_once() -> None:
    """Answered, refused or lost; those of a replica that is drained are answered."""
    rate = 1.2 * capacity(4, Service(), Load())
    for end in ("kill", "end_replica"):
        drawn: list[int] = []

        def draw(chance: random.Random, drawn: list[int] = drawn) -> int:
            drawn.append(Load().draw(chance))
            return drawn[-1]

        fleet = Simulation(4, "least-tokens", load=draw, rate=lambda _: rate, most_rate=rate)
        fleet.at(5.0, lambda fleet=fleet, end=end: getattr(fleet, end)(fleet.replicas[0]))
        done = fleet.run(10)
        assert len(drawn) == len(done.answered) + len(done.refused) + len(done.lost)
        assert done.refused
        assert bool(done.lost) == (end == "kill")
        assert done.replica_s == pytest.approx(35, abs=3)


def test_the_autoscaler_follows() -> None:
    """From 2 replicas to what the load needs, and not before a new one has started."""
    service, load = Service(tokens_per_s=1000.0), Load(bulk_part=0.0)
    rate = 0.6 * capacity(8, service, load)
    fleet = Simulation(
        2,
        "least-tokens",
        service=service,
        load=load.draw,
        rate=lambda _: rate,
        most_rate=rate,
        scaling=Scaling(start_s=30),
    )
    done = fleet.run(360)
    assert min(at_s for at_s, size in done.sizes if size > 2) >= 30
    assert 7 <= fleet.wanted <= 20
    assert max(done.refused) < 240


def test_the_page_has_the_tables() -> None:
    page = PAGE.read_text(encoding="utf-8")
    for name in TABLES:
        _, _, rest = page.partition(f"<!-- benchmarks/fleet.py {name}: begin -->\n")
        assert rest.lstrip().startswith("| "), f"docs/scaling.md lacks the table {name}"
