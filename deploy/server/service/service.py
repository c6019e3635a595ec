"""The model as a service: from checked requests to results. Knows tokenizer, queue and limits, and nothing of HTTP."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from ...bundle import Manifest
from ...machine import versions
from ...tasks import Ids
from ...tasks.feature_extraction import EmbedOptions
from ...tasks.fill_mask import FillMaskOptions
from ...tasks.text_classification import ClassifyOptions
from ..errors import ApiError
from ..limits.bounds import INLINE_CHARS, TOKENIZE_BACKLOG_CHARS, TURN_CHARS, Limits, Settings, exceeded
from ..limits.budget import TEXT_BYTES, MemoryBudget
from ..limits.callers import Caller, CallerLeft
from ..metrics import Metrics
from ..variants import Choice
from .batching import Batcher
from .structured import StructuredQuestions
from .tokens import TextTokenizer
from .work import Work

__all__ = ["Result", "Served", "Service"]

Returned = TypeVar("Returned")

_EMBED_OPTIONS = {value: EmbedOptions(value) for value in (False, True)}


class Result(NamedTuple):
    """What a request got.

    Attributes:
        values: One for each text.
        tokens: Tokens of all texts, special tokens included.
        tokenize_s: How long checking and tokenising took.
        queue_s: Then, how long the first text waited.
        infer_s: How long the batches took that held a text of it.
    """

    values: list[Any]
    tokens: int
    tokenize_s: float
    queue_s: float
    infer_s: float


@dataclass(frozen=True)
class Served:
    """What the engine turned out to be.

    Attributes:
        choice: The variant, and why it was taken.
        isa: What runs it.
    """

    choice: Choice
    isa: str

    @functools.cached_property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that compute; looked up for who asks first."""
        return versions()


@dataclass(frozen=True, slots=True)
class _Request:
    """What a client asks about.

    Attributes:
        inputs: Texts, or pairs of texts, as the client sent them.
        caller: Who waits.
        limits: Of the route.
        truncate: Cut inputs that are longer than the model takes.
        encode: Makes token ids of some inputs: gets them, `truncate`, and the index of the first.
        options: For the task.
        check: Refuses token ids that the task cannot take; returns how many answers the others get.
    """

    inputs: Sequence[Any]
    caller: Caller
    limits: Limits
    truncate: bool
    encode: Callable[..., list[Any]]
    options: Any = None
    check: Callable[[Sequence[Any], Limits], int] = lambda ids, limits: len(ids)


class Service(StructuredQuestions):
    """One model. Methods are called on the event loop.

    Attributes:
        manifest: The bundle.
        settings: Of the server.
        model: Name of the model.
        width: Numbers of an embedding.
        draining: Set once on shutdown: no more requests are welcome.
        served: What is served; None until it is loaded.
        helper_threads: Threads that do what would hold the event loop up.
        budget: Memory of all requests and connections.
    """

    def __init__(
        self, manifest: Manifest, tokenizer: TextTokenizer, batcher: Batcher, settings: Settings, metrics: Metrics
    ) -> None:
        self.manifest = manifest
        self.settings = settings
        self.model = manifest.model.name
        self.width = manifest.hidden_size
        self.draining = False
        self.served: Served | None = None
        self.helper_threads = settings.helper_threads
        self.budget = MemoryBudget.of(settings.max_memory_mb, batcher.retry_after)
        self._tokenizer = tokenizer
        self._batcher = batcher
        self._metrics = metrics
        self._normalize = manifest.pooling is not None and manifest.pooling.normalize
        mask = manifest.special_tokens["mask"]
        self._mask_id = -1 if mask is None else mask.id
        self._mask_token = "" if mask is None else mask.token
        # The default prompt goes before every text.
        self._prompt_chars = 0 if manifest.prompts is None else len(manifest.prompts.default_text)
        self._helpers = ThreadPoolExecutor(self.helper_threads, thread_name_prefix="helper")
        self._tokenizing_chars = 0

    # State.

    @property
    def ready(self) -> bool:
        """Whether new requests are welcome."""
        return self._batcher.running and not self.draining

    def serves(self, choice: Choice, isa: str) -> None:
        """Records which variant is served; called once, on any thread."""
        self.served = Served(choice, isa)

    def check_ready(self) -> None:
        """Refuses while new requests are not welcome.

        Raises:
            ApiError: The model is being loaded, or the server stops (503).
        """
        if not self.ready:
            raise self._unavailable()

    def check_running(self) -> None:
        """Refuses what cannot run; a request on an open connection still can while the server drains.

        Raises:
            ApiError: There is no engine yet, or no more (503).
        """
        if not self._batcher.running:
            raise self._unavailable()

    def _unavailable(self) -> ApiError:
        if self._batcher.failure is not None:
            return ApiError("draining", "the engine has stopped, and the server with it; send the request elsewhere")
        if self.draining:
            return ApiError("draining", "the server is shutting down; send the request elsewhere")
        return ApiError("loading", "the model is being loaded; wait until /ready answers 200")

    def close(self) -> None:
        """Ends the helper threads."""
        self._helpers.shutdown(wait=False, cancel_futures=True)

    async def aside(self, function: Callable[..., Returned], *arguments: Any) -> Returned:
        """Runs a function on a helper thread."""
        return await asyncio.get_running_loop().run_in_executor(self._helpers, function, *arguments)

    # What is asked of the model.

    def embed(
        self,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        normalize: bool | None = None,
        truncate: bool = True,
    ) -> Awaitable[Result]:
        """Embeddings of texts.

        Args:
            texts: As a client sent them.
            caller: Who waits.
            limits: Of the route.
            normalize: Divide by the L2 norm; None: as the model was trained.
            truncate: Cut texts that are longer than the model takes; otherwise they are an error.

        Returns:
            Per text a row, f32 [width]; see `tasks.Rows`.

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        options = _EMBED_OPTIONS[self._normalize if normalize is None else normalize]
        return self._ask(_Request(texts, caller, limits, truncate, self._tokenizer.encode, options))

    def embed_ids(self, texts: Sequence[Sequence[int]], caller: Caller, limits: Limits) -> Awaitable[Result]:
        """Embeddings of texts that are token ids already; see `embed`."""
        started_s = time.perf_counter()
        if len(texts) > limits.inputs:
            raise _too_many(len(texts), limits)
        longest = self._tokenizer.max_tokens
        for index, text in enumerate(texts):
            if len(text) > longest:  # Before each id is looked at.
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected at most {longest} tokens with special tokens, got {len(text)}",
                )
        ids = [self._tokenizer.check_ids(index, text) for index, text in enumerate(texts)]
        return self._run(ids, _EMBED_OPTIONS[self._normalize], caller, limits, started_s)

    def classify(
        self,
        inputs: Sequence[str | tuple[str, str]],
        caller: Caller,
        limits: Limits,
        *,
        raw_scores: bool = False,
        truncate: bool = True,
    ) -> Awaitable[Result]:
        """Labels with scores of texts, or of pairs of texts, best first.

        Args:
            inputs: Texts and pairs, in any order.
            caller: See `embed`.
            limits: See `embed`.
            raw_scores: Logits as scores, without the model's activation.
            truncate: Cut what is longer than the model takes, in a pair the longer text first; see `embed`.

        Returns:
            Per input `[{"label": ..., "score": ...}]`.

        Raises:
            ApiError: See `embed`.
            CallerLeft: See `embed`.
        """
        encode, options = self._tokenizer.encode_mixed, ClassifyOptions(raw_scores)
        return self._ask(_Request(inputs, caller, limits, truncate, encode, options))

    async def rerank(
        self,
        query: str,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        raw_scores: bool = False,
        truncate: bool = True,
    ) -> Result:
        """How well texts fit a query, by a model with one label; see `classify`.

        Returns:
            Per text its score, in the order of the texts.

        Raises:
            ApiError: The model has several labels (`wrong_task`); see `embed`.
            CallerLeft: See `embed`.
        """
        labels = self.manifest.labels or ()
        if len(labels) != 1:
            raise ApiError(
                "wrong_task",
                f"reranking needs a model with one label, this one has {len(labels)} ({', '.join(labels[:5])}"
                f"{', ...' if len(labels) > 5 else ''}); classify pairs of query and text instead",
            )
        self._check_text(query, "query", limits)
        pairs = [(query, text) for text in texts]
        result = await self.classify(pairs, caller, limits, raw_scores=raw_scores, truncate=truncate)
        return result._replace(values=[answer[0]["score"] for answer in result.values])

    def fill(
        self, texts: Sequence[str], caller: Caller, limits: Limits, *, top_k: int, truncate: bool = True
    ) -> Awaitable[Result]:
        """The best `top_k` tokens for every mask token of texts; see `embed`."""
        encode, options = self._tokenizer.encode, FillMaskOptions(top_k)
        return self._ask(_Request(texts, caller, limits, truncate, encode, options, self._check_masks))

    # How it is done.

    def _sizes(self, request: _Request) -> list[int]:
        """Checks the inputs against the limits and returns how many characters each has, with the prompt."""
        inputs, limits = request.inputs, request.limits
        if len(inputs) > limits.inputs:
            raise _too_many(len(inputs), limits)
        if not inputs:
            raise ApiError("invalid_request", "expected at least one input, got an empty list")
        sizes = []
        for index, given in enumerate(inputs):
            where = f"input {index}"
            if isinstance(given, str):
                sizes.append(self._prompt_chars + self._check_text(given, where, limits))
            else:
                sizes.append(sum(self._check_text(text, where, limits) for text in given))
        return sizes

    def _check_text(self, text: str, where: str, limits: Limits) -> int:
        """Checks one text against the limits and returns how many characters it has."""
        size = len(text)
        if size > limits.chars:
            raise ApiError(
                "too_large",
                f"{exceeded('chars', limits.chars, size, f'{where}: ')}; the model reads "
                f"{self._tokenizer.max_tokens} tokens only",
            )
        if "\0" in text:
            raise ApiError("invalid_request", f"{where}: expected text, got a NUL character")
        return size

    def _check_masks(self, ids: Sequence[Ids], limits: Limits) -> int:
        """Checks how many masks each text has, and returns how many all have."""
        total = 0
        for index, text in enumerate(ids):
            masks = text.count(self._mask_id)
            if not 1 <= masks <= limits.masks:
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected 1 to {limits.masks} {self._mask_token} among the first "
                    f"{self._tokenizer.max_tokens} tokens, got {masks}; the limit of masks is fixed",
                )
            total += masks
        return total

    def _ask(self, request: _Request) -> Awaitable[Result]:
        """Checks, tokenises and runs what a client asks about: short requests here, long ones part by part."""
        started_s = time.perf_counter()
        sizes = self._sizes(request)
        if sum(sizes) > INLINE_CHARS:
            return self._ask_in_parts(request, sizes, started_s)
        ids = request.encode(request.inputs, request.truncate)
        units = request.check(ids, request.limits)
        return self._run(ids, request.options, request.caller, request.limits, started_s, units)

    async def _ask_in_parts(self, request: _Request, sizes: Sequence[int], started_s: float) -> Result:
        ids = await self._tokenize(request, sizes)
        units = request.check(ids, request.limits)
        return await self._run(ids, request.options, request.caller, request.limits, started_s, units)

    async def _tokenize(self, request: _Request, sizes: Sequence[int]) -> list[Any]:
        """Token ids of a long request, part by part on helper threads: other requests get their turn in between."""
        waiting, chars = self._tokenizing_chars, sum(sizes)
        if waiting and waiting + chars > TOKENIZE_BACKLOG_CHARS:
            raise self._batcher.try_later(
                f"{waiting} characters are waiting to be tokenised; with {chars} more, they would be more than "
                f"{TOKENIZE_BACKLOG_CHARS}"
            )
        ids: list[Any] = []
        self._tokenizing_chars += chars
        try:
            for start, stop in _turns(sizes):
                ids += await self.aside(request.encode, request.inputs[start:stop], request.truncate, start)
                if request.caller.gone:
                    raise CallerLeft
        finally:
            self._tokenizing_chars -= chars
        return ids

    async def _run(
        self,
        ids: Sequence[Any],
        options: Any,
        caller: Caller,
        limits: Limits,
        started_s: float,
        units: int | None = None,
    ) -> Result:
        """Runs texts through the engine.

        Args:
            ids: Per text its token ids, or those of a pair.
            options: For the engine's head.
            caller: Who waits.
            limits: Of the route.
            started_s: When tokenisation began, by `time.perf_counter`.
            units: How many answers of `Caller.values_each` numbers there will be; None: one to each text.
        """
        if caller.gone:  # While its body was read or tokenised.
            raise CallerLeft
        units = len(ids) if units is None else units
        asked = caller.values_each * units
        if asked > limits.values:
            raise ApiError("too_large", exceeded("values", limits.values, asked))
        work = Work(ids, options, asyncio.get_running_loop().create_future(), caller.deadline_s)
        self.budget.hold(caller, TEXT_BYTES * (len(ids) + units) + 8 * work.tokens + caller.value_bytes * asked)
        self._batcher.submit(work)
        caller.on_leave = functools.partial(self._batcher.abandon, work)
        try:
            values = await work.future
        except asyncio.CancelledError:
            if caller.gone:
                raise CallerLeft from None
            self._batcher.abandon(work)
            raise
        result = Result(
            values, work.tokens, work.submitted_s - started_s, work.started_s - work.submitted_s, work.infer_s
        )
        self._metrics.stages(result.tokenize_s, result.queue_s, result.infer_s)
        return result


def _too_many(found: int, limits: Limits) -> ApiError:
    return ApiError("too_large", exceeded("inputs", limits.inputs, found))


def _turns(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Parts of a long request: index of the first input of each, and of the one behind its last.

    Args:
        sizes: Characters of each input.
    """
    start = chars = 0
    for index, size in enumerate(sizes):
        chars += size
        if chars >= TURN_CHARS:
            yield start, index + 1
            start, chars = index + 1, 0
    if start < len(sizes):
        yield start, len(sizes)
