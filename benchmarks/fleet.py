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
import heapq
import json
import math
import random
import statistics
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # In place of this folder, whose modules are those of a package.
    sys.path[0] = str(ROOT)

PAGE = ROOT / "docs" / "scaling.md"
HPA = ROOT / "deploy" / "kubernetes" / "base" / "hpa.yaml"
POLICIES = ("random", "round-robin", "two-choices", "least-requests", "least-tokens", "predicted-wait")


@dataclass(frozen=True)
class Service:
    """How a replica works: all-MiniLM-L6-v2 in bf16 on the 4 cores of a pod of deploy/kubernetes.

    Attributes:
        tokens_per_s: Of its engine: 4 times what `--measure` says of one thread, 1448 (AMD Zen 1, AVX2; no ARM hardware
            was at hand). Another speed changes the scale of all times.
        batch_s: What a batch costs beside its tokens.
        batch_tokens: Token budget of a batch.
        most_wait_s: A request that would wait longer is refused (429).
        slow_part: This part of the replicas has noisy neighbours,
        slow_rate: and works at this part of the speed.
    """

    tokens_per_s: float = 5800.0
    batch_s: float = 0.0
    batch_tokens: int = 512
    most_wait_s: float = 2.0
    slow_part: float = 0.0
    slow_rate: float = 0.7


@dataclass(frozen=True)
class Load:
    """What clients send: single texts, and now and then a list of texts to be indexed.

    Attributes:
        single_tokens: Median of a text's tokens; logarithms are normal with `sigma`.
        sigma: See above.
        most_tokens: Longer texts are cut.
        bulk_part: This part of the requests are lists
        bulk_texts: of so many texts, from and to.
    """

    single_tokens: float = 60.0
    sigma: float = 0.8
    most_tokens: int = 256
    bulk_part: float = 0.05
    bulk_texts: tuple[int, int] = (16, 64)

    def draw(self, chance: random.Random) -> int:
        """Tokens of a request."""
        texts = chance.randint(*self.bulk_texts) if chance.random() < self.bulk_part else 1
        return sum(self._text(chance) for _ in range(texts))

    def _text(self, chance: random.Random) -> int:
        return min(max(int(self.single_tokens * math.exp(chance.gauss(0, self.sigma))), 4), self.most_tokens)

    def mean(self) -> float:
        """Mean tokens of a request."""
        chance = random.Random(0)
        text = statistics.fmean(self._text(chance) for _ in range(50_000))
        return text * (1 - self.bulk_part + self.bulk_part * sum(self.bulk_texts) / 2)


@dataclass(frozen=True)
class Scaling:
    """The autoscaler, with hpa.yaml's settings but for what is here.

    Attributes:
        metrics: Which of `wait` and `cpu` it follows.
        sync_s: How often it decides.
        window_s: Of which metrics are averages.
        lag_s: How old they are: scrape and adapter.
        start_s: From the decision until a new replica takes requests: node, image, bundle, model.
        pace: Whether hpa.yaml's policies limit it, or not.
    """

    metrics: tuple[str, ...] = ("wait", "cpu")
    sync_s: float = 15.0
    window_s: float = 60.0
    lag_s: float = 15.0
    start_s: float = 60.0
    pace: bool = True


class Request:
    """One request on its way."""

    __slots__ = ("arrived_s", "gateway", "left", "replica", "tokens")

    def __init__(self, arrived_s: float, tokens: int) -> None:
        self.arrived_s = arrived_s
        self.tokens = self.left = tokens


class Replica:
    """Two lines that take turns, and the batch that runs."""

    __slots__ = ("alive", "big", "busy", "busy_s", "ending", "number", "outstanding", "rate", "small", "turn")

    def __init__(self, number: int, rate: float) -> None:
        self.number = number
        self.rate = rate
        self.small: deque[Request] = deque()
        self.big: deque[Request] = deque()
        self.outstanding = 0
        self.busy = self.turn = self.ending = False
        self.busy_s = 0.0
        self.alive = True


class Balancer:
    """One gateway: it knows what it has sent and what was answered, and nothing of others."""

    def __init__(self, policy: str, chance: random.Random) -> None:
        self.policy = policy
        self._chance = chance
        self.members: list[Replica] = []
        self._next = 0
        self._loads: dict[int, float] = {}
        self._stamps: dict[int, int] = {}
        self._heap: list[tuple[float, float, int, int]] = []
        self._by_number: dict[int, Replica] = {}

    def join(self, member: Replica) -> None:
        """A replica is ready."""
        self.members.append(member)
        self._by_number[member.number] = member
        self._stamps[member.number] = 0
        self._set(member, 0.0)

    def leave(self, member: Replica) -> None:
        """A replica is gone or ends."""
        self.members.remove(member)
        del self._by_number[member.number]

    def _set(self, member: Replica, load: float) -> None:
        self._loads[member.number] = load
        if self.policy in ("least-requests", "least-tokens", "predicted-wait"):
            self._stamps[member.number] += 1
            if len(self._heap) > 8 * len(self.members) + 1000:
                self._heap = [entry for entry in self._heap if self._stamps.get(entry[2]) == entry[3]]
                heapq.heapify(self._heap)
            heapq.heappush(self._heap, (load, self._chance.random(), member.number, self._stamps[member.number]))

    def choose(self) -> Replica:
        """The replica of the next request."""
        if self.policy == "random":
            return self._chance.choice(self.members)
        if self.policy == "round-robin":
            self._next += 1
            return self.members[self._next % len(self.members)]
        if self.policy == "two-choices":
            one, two = self._chance.choice(self.members), self._chance.choice(self.members)
            return one if self._loads[one.number] <= self._loads[two.number] else two
        while True:
            _, _, number, stamp = self._heap[0]
            if number in self._by_number and self._stamps[number] == stamp:
                return self._by_number[number]
            heapq.heappop(self._heap)

    def changed(self, member: Replica, tokens: int, sign: int) -> None:
        """A request was sent (+1) or answered (-1)."""
        if self.policy in ("random", "round-robin") or member.number not in self._by_number:
            return
        unit = {"least-tokens": float(tokens), "predicted-wait": tokens / member.rate}.get(self.policy, 1.0)
        self._set(member, max(self._loads[member.number] + sign * unit, 0.0))


@dataclass
class Outcome:
    """What happened.

    Attributes:
        answered: Arrival, seconds and tokens of each answered request.
        refused: Arrivals of those that were refused.
        lost: Arrivals of those that died with their replica.
        sizes: When there were how many replicas that take requests.
        replica_s: Seconds of all replicas, starting ones included.
        busy_s: Seconds that engines ran.
    """

    answered: list[tuple[float, float, int]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    lost: list[float] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    replica_s: float = 0.0
    busy_s: float = 0.0

    def percentile(self, part: float, most_tokens: float = math.inf, since_s: float = 0.0) -> float:
        """Seconds that this part of the requests of at most so many tokens took at most."""
        times = sorted(took for arrived, took, tokens in self.answered if tokens <= most_tokens and arrived >= since_s)
        return times[min(int(part * len(times)), len(times) - 1)] if times else math.nan

    def mean(self) -> float:
        """Mean seconds of all requests."""
        return statistics.fmean(took for _, took, _ in self.answered)

    def failed_part(self) -> float:
        """Part of the requests that were refused or lost."""
        failed = len(self.refused) + len(self.lost)
        return failed / max(failed + len(self.answered), 1)


class Simulation:
    """A fleet under load. Times are seconds from its start."""

    def __init__(
        self,
        replicas: int,
        policy: str,
        *,
        service: Service = Service(),
        load: Callable[[random.Random], int] = Load().draw,
        rate: Callable[[float], float],
        most_rate: float,
        gateways: int = 1,
        scaling: Scaling | None = None,
        seed: int = 0,
    ) -> None:
        """Prepares a fleet.

        Args:
            replicas: That take requests at the start.
            policy: One of `POLICIES`.
            service: Of each replica.
            load: Tokens of a request.
            rate: Requests a second, by the time.
            most_rate: A bound of it.
            gateways: That spread the requests, each by what it knows.
            scaling: The autoscaler, or none.
            seed: Of arrivals, sizes and choices.
        """
        self._service = service
        self._draw = load
        self._rate, self._most_rate = rate, most_rate
        self._arrivals, self._sizes = random.Random(f"arrivals {seed}"), random.Random(f"sizes {seed}")
        self._chance = random.Random(f"choices {seed}")
        self._gateways = [Balancer(policy, self._chance) for _ in range(gateways)]
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.now_s = 0.0
        self.replicas: list[Replica] = []
        self.outcome = Outcome()
        self._numbers = 0
        self._starting = 0
        for _ in range(replicas):
            self._join()
        self._autoscaler = None if scaling is None else Autoscaler(self, scaling)

    def at(self, time_s: float, what: Callable[[], None]) -> None:
        """Plans an event."""
        self._count += 1
        heapq.heappush(self._events, (time_s, self._count, what))

    def run(self, seconds: float) -> Outcome:
        """Arrivals for so long, and then until all is answered."""
        self._end_s = seconds
        self.at(self._arrivals.expovariate(self._most_rate), self._arrive)
        if self._autoscaler is not None:
            self._autoscaler.start(seconds)
        while self._events:
            time_s, _, what = heapq.heappop(self._events)
            self.now_s = time_s
            what()
        self.outcome.busy_s += sum(one.busy_s for one in self.replicas)
        self.outcome.replica_s += sum(seconds for _ in self.replicas)
        return self.outcome

    # Requests.

    def _arrive(self) -> None:
        next_s = self.now_s + self._arrivals.expovariate(self._most_rate)
        if next_s < self._end_s:
            self.at(next_s, self._arrive)
        if self._arrivals.random() * self._most_rate > self._rate(self.now_s):
            return
        request = Request(self.now_s, self._draw(self._sizes))
        gateway = self._gateways[0] if len(self._gateways) == 1 else self._chance.choice(self._gateways)
        if not gateway.members:
            self.outcome.refused.append(self.now_s)
            return
        replica = gateway.choose()
        if replica.outstanding / replica.rate > self._service.most_wait_s:
            self.outcome.refused.append(self.now_s)
            return
        request.gateway, request.replica = gateway, replica
        gateway.changed(replica, request.tokens, +1)
        replica.outstanding += request.tokens
        (replica.small if 4 * request.tokens <= self._service.batch_tokens else replica.big).append(request)
        if not replica.busy:
            self._batch(replica)

    def _batch(self, replica: Replica) -> None:
        """Puts a batch together and runs it; the lines take turns, and what is left of one is filled from the other."""
        replica.turn = not replica.turn
        lines = (replica.small, replica.big) if replica.turn else (replica.big, replica.small)
        budget, done = self._service.batch_tokens, []
        for line in lines:
            while line and budget:
                request = line[0]
                taken = min(request.left, budget)
                request.left -= taken
                budget -= taken
                if request.left:
                    break
                done.append(line.popleft())
        tokens = self._service.batch_tokens - budget
        replica.busy = tokens > 0
        if replica.busy:
            seconds = self._service.batch_s + tokens / replica.rate
            replica.busy_s += seconds
            self.at(self.now_s + seconds, lambda: self._end_batch(replica, done, tokens))
        elif replica.ending:
            self._gone(replica)

    def _end_batch(self, replica: Replica, done: Sequence[Request], tokens: int) -> None:
        if not replica.alive:
            self.outcome.lost += [request.arrived_s for request in done]
            return
        replica.outstanding -= tokens
        for request in done:
            request.gateway.changed(replica, request.tokens, -1)
            self.outcome.answered.append((request.arrived_s, self.now_s - request.arrived_s, request.tokens))
        self._batch(replica)

    # Replicas.

    def _join(self) -> None:
        self._numbers += 1
        slow = self._chance.random() < self._service.slow_part
        rate = self._service.tokens_per_s * (self._service.slow_rate if slow else 1.0)
        replica = Replica(self._numbers, rate)
        self.replicas.append(replica)
        self.outcome.replica_s -= self.now_s
        self.outcome.sizes.append((self.now_s, len(self.replicas)))
        for gateway in self._gateways:
            gateway.join(replica)

    def start_replica(self, seconds: float) -> None:
        """Begins to start one, which costs from now on."""
        self._starting += 1
        self.outcome.replica_s += seconds

        def ready() -> None:
            self._starting -= 1
            self._join()

        self.at(self.now_s + seconds, ready)

    @property
    def wanted(self) -> int:
        """Replicas that take requests or start."""
        return len(self.replicas) + self._starting

    def end_replica(self, replica: Replica) -> None:
        """Ends one in order: it answers what it has."""
        self._leave(replica)
        replica.ending = True
        if not replica.busy:
            self._gone(replica)

    def kill(self, replica: Replica) -> None:
        """Ends one at once: what it has is lost; what runs is lost when its batch would have ended."""
        self._leave(replica)
        replica.alive = False
        self.outcome.lost += [request.arrived_s for line in (replica.small, replica.big) for request in line]
        self._gone(replica)

    def _leave(self, replica: Replica) -> None:
        self.replicas.remove(replica)
        self.outcome.sizes.append((self.now_s, len(self.replicas)))
        for gateway in self._gateways:
            gateway.leave(replica)

    def _gone(self, replica: Replica) -> None:
        self.outcome.busy_s += replica.busy_s
        self.outcome.replica_s += self.now_s


class Autoscaler:
    """A HorizontalPodAutoscaler with the settings of hpa.yaml."""

    def __init__(self, fleet: Simulation, scaling: Scaling) -> None:
        import yaml

        spec = yaml.safe_load(HPA.read_text(encoding="utf-8"))["spec"]
        wait, cpu = spec["metrics"]
        self._targets = {
            "wait": float(wait["pods"]["target"]["averageValue"].removesuffix("m")) / 1000,
            "cpu": cpu["resource"]["target"]["averageUtilization"] / 100,
        }
        self._least, self._most = spec["minReplicas"], 10 * spec["maxReplicas"]
        self._behavior = spec["behavior"]
        self._fleet, self._scaling = fleet, scaling
        self._samples: deque[tuple[float, float, float]] = deque()
        self._wishes: deque[tuple[float, int]] = deque()
        self._changes: deque[tuple[float, int]] = deque()
        self._busy: dict[int, float] = {}

    def start(self, seconds: float) -> None:
        """Samples every second and decides every `sync_s`."""
        for second in range(1, int(seconds)):
            self._fleet.at(float(second), self._sample)
        for tick in range(1, int(seconds / self._scaling.sync_s) + 1):
            self._fleet.at(tick * self._scaling.sync_s, self._decide)

    def _sample(self) -> None:
        members = self._fleet.replicas
        if not members:
            return
        wait = statistics.fmean(one.outstanding / one.rate for one in members)
        worked = statistics.fmean(min(max(one.busy_s - self._busy.get(one.number, 0.0), 0.0), 1.0) for one in members)
        self._busy = {one.number: one.busy_s for one in members}
        self._samples.append((self._fleet.now_s, wait, worked))

    def _decide(self) -> None:
        now_s, scaling, fleet = self._fleet.now_s, self._scaling, self._fleet
        until_s = now_s - scaling.lag_s
        while self._samples and self._samples[0][0] < until_s - scaling.window_s:
            self._samples.popleft()
        seen = [sample for sample in self._samples if sample[0] <= until_s]
        if not seen:
            return
        ready = len(fleet.replicas)
        wishes = []
        for name, value in (("wait", [s[1] for s in seen]), ("cpu", [s[2] for s in seen])):
            if name in scaling.metrics:
                ratio = statistics.fmean(value) / self._targets[name]
                # Within a tenth of the target nothing changes.
                wishes.append(fleet.wanted if abs(ratio - 1) <= 0.1 else math.ceil(ready * ratio))
        wish = min(max([self._least, *wishes]), self._most)
        window_s = self._behavior["scaleDown"]["stabilizationWindowSeconds"] if scaling.pace else 0
        self._wishes.append((now_s, wish))
        while self._wishes[0][0] < now_s - window_s:
            self._wishes.popleft()
        if wish < fleet.wanted:
            wish = min(max(one for _, one in self._wishes), fleet.wanted)
        if scaling.pace and wish != fleet.wanted:
            wish = self._paced(wish)
        self._apply(wish)

    def _paced(self, wish: int) -> int:
        """Within the policies of hpa.yaml."""
        up = wish > self._fleet.wanted
        allowed = []
        for policy in self._behavior["scaleUp" if up else "scaleDown"]["policies"]:
            since_s = self._fleet.now_s - policy["periodSeconds"]
            changed = sum(by for at_s, by in self._changes if at_s > since_s and (by > 0) == up)
            before = self._fleet.wanted - changed
            by = policy["value"] if policy["type"] == "Pods" else math.ceil(before * policy["value"] / 100)
            allowed.append(before + by if up else before - by)
        return min(wish, max(allowed)) if up else max(wish, min(allowed))

    def _apply(self, wish: int) -> None:
        by = wish - self._fleet.wanted
        if by:
            self._changes.append((self._fleet.now_s, by))
        for _ in range(by):
            self._fleet.start_replica(self._scaling.start_s)
        for replica in sorted(self._fleet.replicas, key=lambda one: one.outstanding)[: max(-by, 0)]:
            self._fleet.end_replica(replica)


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


def measure(bundle: str, threads: int) -> dict[str, float]:
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

    manifest = load_manifest(Path(bundle), verify=False, variants=())
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=TABLES, help="print one table")
    parser.add_argument("--measure", metavar="BUNDLE", help="service times of this machine")
    parser.add_argument("--threads", type=int, default=1, help="of --measure")
    parser.add_argument("--seed", type=int, default=0)
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
    main()
