"""From settings to arrival times and requests."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Iterator
from urllib.parse import urlsplit

from deploy.texts import TextsError, load_texts, sample
from loadtest.options import CannotStartError
from loadtest.tasks import TASKS, Traits, insert_mask

from .arrivals import Profile, diurnal, gaps, read_trace, spikes, steady, steps, times
from .client import Prepared
from .lengths import parse_counts, parse_lengths, with_lengths
from .options import Settings

__all__ = ["arrivals_of", "planned_s", "prepare_requests", "profile_of"]

_FEWEST = 50
"""Different requests at least, however many texts each has."""


def profile_of(settings: Settings) -> Profile | None:
    """The rate over time; None for a trace, and where everything comes at once."""
    if settings.trace or settings.shape == "at-once":
        return None
    match settings.shape:
        case "steps":
            step_s = settings.duration_s / settings.steps
            return steps(settings.rate, settings.rate_to, settings.steps, step_s)
        case "spike":
            return spikes(
                settings.rate,
                settings.rate_to,
                every_s=settings.spike_every_s,
                length_s=settings.spike_s,
                duration_s=settings.duration_s,
            )
        case "diurnal":
            return diurnal(settings.rate, settings.rate_to, day_s=settings.day_s, duration_s=settings.duration_s)
    return steady(settings.rate, settings.duration_s)


def planned_s(settings: Settings) -> float:
    """For how many seconds requests that count are to be started; 0 where everything comes at once."""
    if settings.shape == "at-once" and not settings.trace:
        return 0.0
    profile = profile_of(settings)
    end_s = profile.duration_s if profile else read_trace(settings.trace, settings.trace_speed)[-1]
    return max(0.0, end_s - settings.warm_up_s)


def arrivals_of(settings: Settings, index: int = 0, workers: int = 1) -> Iterator[float]:
    """Arrival times of one of several generators.

    Together they give the same times, however many they are: each takes every `workers`-th one.

    Args:
        settings: Of the run.
        index: Which generator, from 0.
        workers: How many there are.

    Returns:
        Seconds from the start, ascending.
    """
    profile = profile_of(settings)
    moments: Iterator[float]
    if settings.trace:
        moments = iter(read_trace(settings.trace, settings.trace_speed))
    elif profile is None:
        moments = itertools.repeat(0.0, settings.count)
    else:
        moments = times(profile, gaps(settings.process, settings.seed))
    return itertools.islice(moments, index, None, workers)


@functools.lru_cache(maxsize=1)
def _texts(path: str, count: int, seed: int) -> tuple[str, ...]:
    try:
        return tuple(load_texts(path, limit=count) if path else sample(count, seed=seed))
    except TextsError as error:
        raise CannotStartError(str(error)) from error


def prepare_requests(settings: Settings, traits: Traits, index: int = 0) -> list[Prepared]:
    """Requests as they are sent, head and body.

    Args:
        settings: Of the run.
        traits: What was learnt of the server.
        index: Which generator this is: each sends other mixtures.

    Raises:
        CannotStartError: The file of texts is missing, empty, or no text.
    """
    rng = random.Random(f"requests/{settings.seed}/{index}")
    task = TASKS[settings.task]
    texts = list(_texts(settings.texts, settings.text_count, settings.seed))
    if draw := parse_lengths(settings.lengths):
        texts = with_lengths(texts, draw, rng)
    if task.needs_mask and traits.mask_token is not None:
        texts = [insert_mask(text, traits.mask_token, rng) for text in texts]
    texts = [text[: settings.max_chars or None] for text in texts]
    low, high = parse_counts(settings.inputs_per_request)
    parts = urlsplit(settings.host)
    path = parts.path.rstrip("/") + task.path_at(traits)
    headers = "".join(f"{name}: {value}\r\n" for name, value in settings.headers.items())
    head = f"POST {path} HTTP/1.1\r\nHost: {parts.netloc.rpartition('@')[2]}\r\n{headers}"
    found = []
    for _ in range(max(_FEWEST, 2 * len(texts) // (low + high))):
        chosen = rng.choices(texts, k=rng.randint(low, high))
        body = task.body(chosen, traits)
        found.append(Prepared(f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body, len(chosen)))
    return found
