"""A fleet over time: requests come, replicas start and end, and an autoscaler follows the load."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.balancing import LOAD, SERVICE, Balancer, Replica, Request, Service

HPA = Path(__file__).resolve().parents[1] / "deploy" / "kubernetes" / "base" / "hpa.yaml"


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
        service: Service = SERVICE,
        load: Callable[[random.Random], int] = LOAD.draw,
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
