"""The parts of a simulated fleet: requests, the replicas that answer them, and the balancer that spreads them."""

from __future__ import annotations

import heapq
import math
import random
import statistics
from collections import deque
from dataclasses import dataclass

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


SERVICE, LOAD = Service(), Load()


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
