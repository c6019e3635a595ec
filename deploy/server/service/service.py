"""The model as a service: from checked requests to results. Knows tokenizer, queue and limits, and nothing of HTTP."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from ...bundle import Manifest
from ...tasks import Ids
from ...tasks.fill_mask import FillMaskOptions
from ...tasks.text_classification import ClassifyOptions
from ..errors import ApiError
from ..limits.bounds import Limits, Settings, exceeded
from ..limits.budget import TEXT_BYTES, MemoryBudget
from ..limits.callers import Caller, CallerLeft
from ..metrics import Metrics
from ..variants import Choice
from .batching import Batcher
from .computing import computing
from .located import LocatingTokenizer
from .request import Request, Result, Served, check_text, embed_options, too_many, widths_of
from .tokenizing import Tokenizing, is_long
from .tokens import TextTokenizer
from .work import Work

__all__ = ["Service"]

Returned = TypeVar("Returned")


class Service:
    """One model. Methods are called on the event loop.

    Attributes:
        manifest: The bundle.
        settings: Of the server.
        model: Name of the model.
        width: Numbers of an embedding.
        dimensions: Widths that embeddings may be cut to.
        draining: Set once on shutdown: no more requests are welcome.
        served: What is served; None until it is loaded.
        helper_threads: Threads that do what would hold the event loop up.
        budget: Memory of all requests and connections.
    """

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: TextTokenizer,
        batcher: Batcher,
        settings: Settings,
        metrics: Metrics,
        budget: MemoryBudget | None = None,
    ) -> None:
        self.manifest = manifest
        self.settings = settings
        self.model = settings.served_model_name or manifest.model.name
        self.width = manifest.width
        self.dimensions = widths_of(manifest, settings.any_dimensions)
        self.draining = False
        self.served: Served | None = None
        self.helper_threads = settings.helper_threads
        self.budget = budget or MemoryBudget.of(settings.max_memory_mb, batcher.retry_after)
        self._tokenizer = tokenizer
        tokenizer.read_chars = settings.max_chars
        self._batcher = batcher
        self._metrics = metrics
        self._normalize = manifest.pooling is not None and manifest.pooling.normalize
        self._skips_prompts = manifest.pooling is not None and not manifest.pooling.include_prompt
        mask = manifest.special_tokens["mask"]
        self._mask_id = -1 if mask is None else mask.id
        self._mask_token = "" if mask is None else mask.token
        self._helpers = ThreadPoolExecutor(self.helper_threads, thread_name_prefix="helper")
        self._running = 0
        # The default prompt goes before every text.
        prompt_chars = 0 if manifest.prompts is None else len(manifest.prompts.default_text)
        self._tokenizing = Tokenizing(self.aside, batcher, settings, tokenizer.max_tokens, prompt_chars)
        self._compute = computing(batcher, metrics, settings.cache_mb)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the bundle."""
        return self._tokenizer

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

    @functools.cached_property
    def locating(self) -> LocatingTokenizer:
        """The tokenizer, for answers that point into texts."""
        unk = self.manifest.special_tokens.get("unk")
        return LocatingTokenizer(self._tokenizer, None if unk is None else unk.id)

    # What is asked of the model.

    def embed(
        self,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        normalize: bool | None = None,
        truncate: bool = True,
        cut_left: bool | None = None,
        prompt_name: str | None = None,
        dimensions: int | None = None,
    ) -> Awaitable[Result]:
        """Embeddings of texts.

        Args:
            texts: As a client sent them.
            caller: Who waits.
            limits: Of the route.
            normalize: Divide by the L2 norm; None: as the model was trained.
            truncate: Cut texts that are longer than the model takes; otherwise they are an error.
            cut_left: Cut off their beginning, or their end; None: what the model was trained with.
            prompt_name: Which of the model's prompts goes before each text; None: its default prompt.
            dimensions: Keep so many leading numbers, and normalise what is left; None: all.

        Returns:
            Per text a row, f32 [width]; see `tasks.Rows`.

        Raises:
            ApiError: See `errors`.
            CallerLeft: The client has left.
        """
        skipped = self._tokenizer.prompt_tokens(prompt_name) if self._skips_prompts else 0
        normalize = self._normalize if normalize is None else normalize
        options = embed_options(normalize, dimensions, self.width, skipped)
        encode = self.encoder(cut_left, prompt_name)
        return self.ask(Request(texts, caller, limits, truncate, encode, options))

    def embed_ids(
        self,
        texts: Sequence[Sequence[int]],
        caller: Caller,
        limits: Limits,
        *,
        normalize: bool | None = None,
        dimensions: int | None = None,
    ) -> Awaitable[Result]:
        """Embeddings of texts that are token ids already; see `embed`."""
        options = embed_options(self._normalize if normalize is None else normalize, dimensions, self.width)
        started_s = time.perf_counter()
        if len(texts) > limits.inputs:
            raise too_many(len(texts), limits)
        longest = self._tokenizer.max_tokens
        for index, text in enumerate(texts):
            if len(text) > longest:  # Before each id is looked at.
                raise ApiError(
                    "invalid_request",
                    f"input {index}: expected at most {longest} tokens with special tokens, got {len(text)}",
                )
        ids = [self._tokenizer.check_ids(index, text) for index, text in enumerate(texts)]
        return self.run(ids, options, caller, limits, started_s)

    def classify(
        self,
        inputs: Sequence[str | tuple[str, str]],
        caller: Caller,
        limits: Limits,
        *,
        raw_scores: bool = False,
        truncate: bool = True,
        cut_left: bool | None = None,
    ) -> Awaitable[Result]:
        """Labels with scores of texts, or of pairs of texts, best first.

        Args:
            inputs: Texts and pairs, in any order.
            caller: See `embed`.
            limits: See `embed`.
            raw_scores: Logits as scores, without the model's activation.
            truncate: Cut what is longer than the model takes, in a pair the longer text first; see `embed`.
            cut_left: See `embed`.

        Returns:
            Per input `[{"label": ..., "score": ...}]`.

        Raises:
            ApiError: See `embed`.
            CallerLeft: See `embed`.
        """
        options = ClassifyOptions(raw_scores)
        encode: Callable[..., list[Any]] = self._tokenizer.encode_mixed
        if cut_left is not None:
            encode = functools.partial(encode, cut_left=cut_left)
        return self.ask(Request(inputs, caller, limits, truncate, encode, options))

    async def rerank(
        self,
        query: str,
        texts: Sequence[str],
        caller: Caller,
        limits: Limits,
        *,
        raw_scores: bool = False,
        truncate: bool = True,
        cut_left: bool | None = None,
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
        check_text(query, "query")
        pairs = [(query, text) for text in texts]
        result = await self.classify(pairs, caller, limits, raw_scores=raw_scores, truncate=truncate, cut_left=cut_left)
        return result._replace(values=[answer[0]["score"] for answer in result.values])

    def fill(
        self, texts: Sequence[str], caller: Caller, limits: Limits, *, top_k: int, truncate: bool = True
    ) -> Awaitable[Result]:
        """The best `top_k` tokens for every mask token of texts; see `embed`."""
        encode, options = self._tokenizer.encode, FillMaskOptions(top_k)
        return self.ask(Request(texts, caller, limits, truncate, encode, options, self._check_masks))

    # What other questions are made of: `structured`, `similarity`, `words`.

    def ask(self, request: Request) -> Awaitable[Result]:
        """Checks, tokenises and runs what a client asks about: short requests here, long ones part by part."""
        started_s = time.perf_counter()
        sizes = self._tokenizing.sizes_of_few(request)
        if is_long(sizes):
            return self._ask_in_parts(request, sizes, started_s)
        return self._run_encoded(request, request.encode(request.inputs, request.truncate), started_s)

    def encode(self, request: Request) -> Awaitable[list[Any]]:
        """Checks and tokenises a request; see `Tokenizing.encode`."""
        return self._tokenizing.encode(request)

    def encoder(self, cut_left: bool | None, prompt_name: str | None) -> Callable[..., list[Any]]:
        """What makes token ids of texts, cut and with a prompt as a request wants it."""
        if cut_left is None and prompt_name is None:
            return self._tokenizer.encode
        prompt = None if prompt_name is None else self._tokenizer.prompt(prompt_name)
        return functools.partial(self._tokenizer.encode, prompt=prompt, cut_left=cut_left)

    async def run(
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
        most = self.settings.max_concurrent_requests
        if most is not None and self._running >= most:
            raise self._batcher.try_later(f"{most} requests are waiting or running (--max-concurrent-requests)")
        work = Work(ids, options, asyncio.get_running_loop().create_future(), caller.deadline_s)
        self.budget.hold(caller, TEXT_BYTES * (len(ids) + units) + 8 * work.tokens + caller.value_bytes * asked)
        caller.charge(work.tokens)
        self._running += 1
        try:
            values = await self._compute(work, caller)
        finally:
            self._running -= 1
        queue_s = work.started_s - work.submitted_s
        tokenize_s = work.submitted_s - started_s
        self._metrics.stages(tokenize_s, queue_s, work.infer_s)
        caller.result = Result([], work.tokens, tokenize_s, queue_s, work.infer_s, started_s)
        return Result(values, work.tokens, tokenize_s, queue_s, work.infer_s, started_s, ids)

    # How it is done.

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

    def _run_encoded(self, request: Request, ids: Sequence[Any], started_s: float) -> Awaitable[Result]:
        units = request.check(ids, request.limits)
        return self.run(ids, request.options, request.caller, request.limits, started_s, units)

    async def _ask_in_parts(self, request: Request, sizes: Sequence[int] | None, started_s: float) -> Result:
        return await self._run_encoded(request, await self._tokenizing.in_parts(request, sizes), started_s)
