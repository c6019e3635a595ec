"""Fleets of replicas, simulated: how requests are spread, how the autoscaler follows, what a lost node costs.

    python benchmarks/fleet.py                       # all tables, into docs/scaling.md (some minutes)
    python benchmarks/fleet.py --only balancing      # one of them, printed
    python benchmarks/fleet.py --measure bundles/demo  # the service times of this machine, as JSON

A discrete-event simulation, repeatable by its seed. What is taken from the project: how a replica batches (by tokens,
small requests and large ones in turns) and refuses (`--max-queue-ms`), the autoscaler's settings
(deploy/kubernetes/base/hpa.yaml), and service times, which `--measure` takes of the engine. What is assumed is in the
classes `Load` and `Scaling`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

from benchmarks.balancing import POLICIES, Load, Service  # noqa: E402
from benchmarks.simulation import Outcome, Scaling, Simulation  # noqa: E402
from deploy.ending import end as end_program  # noqa: E402
from deploy.options import bundle_folder, positive  # noqa: E402

PAGE = ROOT / "docs" / "scaling.md"


# The tables.


def steady(replicas: int, policy: str, rate: float, seconds: float, **options: Any) -> Outcome:
    """A fleet under so many requests a second; `options` are those of `Simulation`."""
    return Simulation(replicas, policy, rate=lambda _: rate, most_rate=rate, **options).run(seconds)


def capacity(replicas: int, service: Service, load: Load) -> float:
    """Requests a second that a fleet can do at most, in full batches."""
    slow = 1 - service.slow_part * (1 - service.slow_rate)
    per_token = 1 / (service.tokens_per_s * slow) + service.batch_s / service.batch_tokens
    return replicas / (load.mean() * per_token)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f}"


def balancing(seed: int) -> str:
    """Policies, fleets of 4 to 1,000, and two loads."""
    service, load, rows = Service(slow_part=0.1), Load(), []
    for replicas, seconds in ((4, 600), (30, 80), (1000, 4)):
        full = capacity(replicas, service, load)
        for policy in POLICIES:
            cells = []
            for part in (0.5, 0.8):
                rate = part * full
                done = steady(replicas, policy, rate, seconds, service=service, seed=seed)
                cells += [_ms(done.percentile(0.5, load.most_tokens)), _ms(done.percentile(0.99, load.most_tokens)),
                          f"{100 * done.failed_part():.2f}"]  # fmt: skip
            rows.append((f"{replicas:,}", policy, *cells))
    head = ("replicas", "policy", "50 %: p50, ms", "p99, ms", "refused, %", "80 %: p50, ms", "p99, ms", "refused, %")
    return table(head, rows)


def gateways(seed: int) -> str:
    """What several gateways, which do not know of each other, leave of it."""
    service, load, replicas, rows = Service(slow_part=0.1), Load(), 30, []
    rate = 0.8 * capacity(replicas, service, load)
    for policy in ("round-robin", "two-choices", "least-tokens", "predicted-wait"):
        cells = []
        for count in (1, 3, 10, 30):
            done = steady(replicas, policy, rate, 60, service=service, gateways=count, seed=seed)
            cells.append(_ms(done.percentile(0.99, load.most_tokens)))
        rows.append((policy, *cells))
    return table(("policy", "1 gateway: p99, ms", "3", "10", "30"), rows)


def autoscaling(seed: int) -> str:
    """A step of the load to three times as much, and back; the runs begin with the right number of replicas."""
    service, load, rows = Service(), Load(), []
    rate = 0.6 * capacity(5, service, load)

    def step(time_s: float) -> float:
        return 3 * rate if 300 <= time_s < 900 else rate

    settings = (
        ("wait and CPU (hpa.yaml)", Scaling()),
        ("CPU alone", Scaling(metrics=("cpu",))),
        ("wait alone", Scaling(metrics=("wait",))),
        ("both, start of 10 s", Scaling(start_s=10)),
        ("both, start of 180 s", Scaling(start_s=180)),
    )
    for name, scaling in settings:
        fleet = Simulation(
            5, "least-tokens", service=service, rate=step, most_rate=3 * rate, scaling=scaling, seed=seed
        )
        done = fleet.run(1500)
        late = [arrived for arrived in done.refused if arrived >= 300]
        bad_until = max((arrived for arrived in late if arrived < 900), default=300) - 300
        before = [5, *(size for at_s, size in done.sizes if 0 < at_s < 300)]
        rows.append((name, f"{100 * done.failed_part():.2f}", f"{bad_until:.0f}", f"{min(before)} to {max(before)}",
                     max(size for _, size in done.sizes), f"{done.replica_s / 3600:.1f}"))  # fmt: skip
    head = ("autoscaler", "refused, %", "refusals end after, s", "replicas before the step", "most", "replica hours")
    return table(head, rows)


def losses(seed: int) -> str:
    """A fifth of the fleet, or two fifths, is taken away."""
    service, load, replicas, rows = Service(), Load(), 15, []
    rate = 0.7 * capacity(replicas, service, load)
    for part, notice in ((0.2, False), (0.2, True), (0.4, False), (0.4, True)):
        fleet = Simulation(replicas, "least-tokens", service=service, rate=lambda _: rate, most_rate=rate, seed=seed,
                           scaling=Scaling())  # fmt: skip

        def lose(fleet: Simulation = fleet, part: float = part, notice: bool = notice) -> None:
            for replica in list(fleet.replicas)[: round(part * len(fleet.replicas))]:
                if notice:  # The pod is evicted in order, and its Deployment makes another one at once.
                    fleet.end_replica(replica)
                else:
                    fleet.kill(replica)
                fleet.start_replica(Scaling().start_s)

        fleet.at(120.0, lose)
        done = fleet.run(360)
        rows.append((f"{100 * part:.0f} %", "drained" if notice else "killed", len(done.lost), len(done.refused),
                     _ms(done.percentile(0.99, load.most_tokens, since_s=120))))  # fmt: skip
    return table(("replicas lost", "how", "lost with them", "refused", "p99 of single texts afterwards, ms"), rows)


TABLES = {"balancing": balancing, "gateways": gateways, "autoscaling": autoscaling, "losses": losses}


def measure(bundle: Path, threads: int) -> dict[str, float]:
    """Fits seconds = batch_s + tokens / tokens_per_s to batches of the bundle's engine, each the least of many runs.

    With one thread the seconds are the process's CPU time, which other work on the machine hardly changes.
    """
    import time

    clock = time.process_time if threads == 1 else time.perf_counter

    from deploy.bundle import load_manifest
    from deploy.engines.open import load_engine
    from deploy.server.service import TextTokenizer
    from deploy.server.service.service import embed_options
    from deploy.texts import sample

    manifest = load_manifest(bundle, verify=False, variants=())
    tokenizer = TextTokenizer.from_manifest(manifest)
    engine, _ = load_engine(manifest, manifest.variant("torch_ext-bf16"), threads, tokenizer.token)
    ids = tokenizer.encode(sample(256), True)
    option = embed_options(True, None, manifest.hidden_size)
    points = []
    for texts in (1, 2, 4, 8, 16):
        batch = ids[:texts]
        times = []
        for _ in range(20):
            begun_s = clock()
            engine.run(batch, [option] * texts)
            times.append(clock() - begun_s)
        points.append((sum(map(len, batch)), min(times)))
    slope, batch_s = statistics.linear_regression(*zip(*points, strict=True))
    return {"tokens_per_s": round(1 / slope), "batch_s": round(max(batch_s, 0.0), 5)}


def main() -> None:
    """Prints tables, or writes them into the page."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__.partition(chr(10))[0]} Without options all tables are written into docs/scaling.md."
    )
    parser.add_argument("--only", choices=TABLES, help="print one table")
    parser.add_argument(
        "--measure",
        metavar="BUNDLE",
        type=bundle_folder,
        help="print service times of this machine, in place of tables",
    )
    parser.add_argument("--threads", type=positive, default=1, help="of --measure (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and texts (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.threads)))
        return
    if arguments.only:
        print(TABLES[arguments.only](arguments.seed), end="")
        return
    page = PAGE.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        begin, end = f"<!-- benchmarks/fleet.py {name}: begin -->\n", "<!-- end -->"
        head, _, rest = page.partition(begin)
        if not rest:
            raise SystemExit(f"{PAGE}: expected the line {begin.strip()}")
        page = head + begin + "\n" + make(arguments.seed) + "\n" + end + rest.partition(end)[2]
        PAGE.write_text(page, encoding="utf-8")
        print(f"{name}: written", flush=True)


if __name__ == "__main__":
    sys.exit(end_program(main))
