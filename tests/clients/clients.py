"""Calls of popular clients as their documentation has them. Run by `run.py`, in an environment that has them.

Each function is a client's call and what must come of it; its first argument names the bundle it needs.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ.update(
    HF_HUB_OFFLINE="0",
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    HAYSTACK_TELEMETRY_ENABLED="False",
    ANONYMIZED_TELEMETRY="False",
)
KEY = os.environ["CLIENTS_KEY"]
"""The key of the server `keys`: one request a minute."""

TEXTS = ["the name of the file", "a list of the values", "is it?"]
LONG = "the name of the file " * 3000
WIDTH = 64
CALLS: list[tuple[str, str, Callable[[str], None]]] = []


def call(client: str, bundle: str) -> Callable[[Callable[[str], None]], Callable[[str], None]]:
    """Registers a call."""

    def register(function: Callable[[str], None]) -> Callable[[str], None]:
        CALLS.append((client, bundle, function))
        return function

    return register


def vectors(rows: Any, count: int, width: int = WIDTH) -> None:
    """Checks embeddings."""
    assert [len(row) for row in rows] == [width] * count
    assert all(isinstance(float(value), float) for row in rows for value in row)


def refusal(kind: type[Exception], function: Callable[[], Any]) -> Any:
    """The error that a call raises."""
    try:
        function()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got an answer")


@call("openai", "feature-extraction")
def openai_embeddings(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    plain = client.embeddings.create(model="any", input=TEXTS)
    vectors([item.embedding for item in plain.data], 3)
    floats = client.embeddings.create(model="any", input=TEXTS[0], encoding_format="float")
    assert max(abs(a - b) for a, b in zip(floats.data[0].embedding, plain.data[0].embedding, strict=True)) < 1e-6
    vectors([item.embedding for item in client.embeddings.create(model="any", input=[LONG]).data], 1)
    many = client.embeddings.create(model="any", input=TEXTS * 700, user="me")
    assert [item.index for item in many.data] == list(range(2100))
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 6
    names = [model.id for model in client.models.list()]
    assert client.models.retrieve(names[0]).id == names[0] == "tiny/feature-extraction"


@call("openai, errors", "feature-extraction")
def openai_errors(url: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for arguments, param in (
        ({"input": TEXTS, "dimensions": 2 * WIDTH}, "dimensions"),
        ({"input": []}, None),
        ({"input": [[100_277]]}, None),
    ):
        error = refusal(openai.BadRequestError, lambda sent=arguments: client.embeddings.create(model="any", **sent))
        assert error.type == "invalid_request_error"
        assert param is None or error.param == param
        assert error.code
    error = refusal(openai.BadRequestError, lambda: client.embeddings.create(model="any", input=[[5, 6]]))
    assert "check_embedding_ctx_length=False" in str(error)


@call("openai, async", "feature-extraction")
def openai_async(url: str) -> None:
    import asyncio

    import httpx
    import openai

    async def many(**options: Any) -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", **options) as client:
            return await asyncio.gather(*(client.embeddings.create(model="any", input=TEXTS) for _ in range(20)))

    for options in ({}, {"http_client": openai.DefaultAioHttpClient()}, {"http_client": httpx.AsyncClient(http2=True)}):
        for found in asyncio.run(many(**options)):
            vectors([item.embedding for item in found.data], 3)


@call("openai, keys", "keys")
def openai_keys(url: str) -> None:
    import openai

    def ask(key: str) -> Any:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)
        return client.embeddings.create(model="any", input=TEXTS)

    assert refusal(openai.AuthenticationError, lambda: ask("wrong")).type == "authentication_error"
    error = refusal(openai.RateLimitError, lambda: [ask(KEY) for _ in range(2)])
    assert 0 < int(error.response.headers["retry-after"]) <= 60


@call("pydantic-ai", "feature-extraction")
def pydantic_ai_embeddings(url: str) -> None:
    import cohere
    from pydantic_ai import Embedder
    from pydantic_ai.embeddings.cohere import CohereEmbeddingModel
    from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
    from pydantic_ai.providers.cohere import CohereProvider
    from pydantic_ai.providers.openai import OpenAIProvider

    of_openai = OpenAIEmbeddingModel("any", provider=OpenAIProvider(base_url=f"{url}/v1", api_key="none"))
    client = cohere.AsyncClientV2(api_key="none", base_url=url)
    of_cohere = CohereEmbeddingModel("any", provider=CohereProvider(cohere_client=client))
    for model in (of_openai, of_cohere):
        found = Embedder(model).embed_documents_sync(TEXTS)
        vectors(found.embeddings, 3)
        assert found.usage.input_tokens > 6


@call("llama-index, OpenAI embeddings", "feature-extraction")
def llama_index_openai(url: str) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(model_name="any", api_base=f"{url}/v1", api_key="none")
    vectors(model.get_text_embedding_batch(TEXTS), 3)


@call("chromadb", "feature-extraction")
def chromadb_embeddings(url: str) -> None:
    from chromadb.utils import embedding_functions

    os.environ["CHROMA_OPENAI_API_KEY"] = "none"
    vectors(embedding_functions.HuggingFaceEmbeddingServer(url=f"{url}/embed")(TEXTS), 3)
    vectors(embedding_functions.OpenAIEmbeddingFunction(api_base=f"{url}/v1", model_name="any")(TEXTS), 3)


@call("langchain-openai", "feature-extraction")
def langchain_embeddings(url: str) -> None:
    from langchain_openai import OpenAIEmbeddings

    embeddings = OpenAIEmbeddings(model="any", base_url=f"{url}/v1", api_key="none", check_embedding_ctx_length=False)
    vectors(embeddings.embed_documents(TEXTS), 3)
    vectors([embeddings.embed_query(TEXTS[0])], 1)


@call("litellm, embeddings", "feature-extraction")
def litellm_embeddings(url: str) -> None:
    import litellm

    found = litellm.embedding(model="openai/any", input=TEXTS, api_base=f"{url}/v1", api_key="none")
    vectors([item["embedding"] for item in found.data], 3)
    # Told what the model is for, it asks no hub.
    found = litellm.embedding(
        model="huggingface/any", input=TEXTS, api_base=f"{url}/embed", api_key="none", input_type="feature-extraction"
    )
    vectors([item["embedding"] for item in found.data], 3)
    found = litellm.embedding(model="cohere/any", input=TEXTS, api_base=f"{url}/v2/embed", api_key="none")
    vectors([item["embedding"] for item in found.data], 3)


@call("litellm, rerank", "rerank")
def litellm_rerank(url: str) -> None:
    import litellm

    for model, base in (
        ("hosted_vllm/any", url),
        ("cohere/any", f"{url}/v2/rerank"),
        ("jina_ai/any", f"{url}/v1/rerank"),
        ("huggingface/any", url),
    ):
        found = litellm.rerank(model=model, query="the name", documents=TEXTS, top_n=2, api_base=base, api_key="none")
        assert len(found.results) == (3 if model.startswith("huggingface") else 2), model  # TEI has no top_n.
        assert found.results[0]["relevance_score"] >= found.results[1]["relevance_score"], model


def hub(url: str) -> Any:
    """A client of the hub, as for an inference endpoint."""
    import huggingface_hub

    return huggingface_hub.InferenceClient(model=url, token="none", provider="hf-inference")


@call("huggingface_hub, feature_extraction", "feature-extraction")
def hub_features(url: str) -> None:
    client = hub(url)
    vectors(client.feature_extraction(TEXTS[0]), 1)
    vectors(client.feature_extraction(TEXTS[0], normalize=True, truncate=True, truncation_direction="left"), 1)
    vectors(hub(f"{url}/embed").feature_extraction(TEXTS[0]), 1)
    assert client.get_endpoint_info()["served_model_name"]
    assert client.health_check()


@call("huggingface_hub, sentence_similarity", "feature-extraction")
def hub_similarity(url: str) -> None:
    for address in (url, f"{url}/similarity"):
        scores = hub(address).sentence_similarity(TEXTS[0], other_sentences=TEXTS)
        assert len(scores) == 3
        assert abs(scores[0] - 1) < 1e-3


@call("huggingface_hub, text_classification", "text-classification")
def hub_classes(url: str) -> None:
    labels = hub(url).text_classification(TEXTS[0])
    assert [label.label for label in labels]
    assert labels[0].score >= labels[1].score
    assert len(hub(url).text_classification(TEXTS[0], top_k=1)) == 1
    import huggingface_hub.errors as errors

    # Scores of the model's own labels would be taken for those of the candidates.
    error = refusal(errors.HfHubHTTPError, lambda: hub(url).zero_shot_classification(TEXTS[0], candidate_labels=["a"]))
    assert error.response.status_code == 422


@call("huggingface_hub, keys", "keys")
def hub_keys(url: str) -> None:
    import huggingface_hub
    import huggingface_hub.errors as errors

    def ask(key: str) -> Any:
        client = huggingface_hub.InferenceClient(model=url, token=key, provider="hf-inference")
        return client.feature_extraction(TEXTS[0])

    assert refusal(errors.HfHubHTTPError, lambda: ask("wrong")).response.status_code == 401
    assert refusal(errors.HfHubHTTPError, lambda: [ask(KEY) for _ in range(2)]).response.status_code == 429


@call("huggingface_hub, fill_mask", "fill-mask")
def hub_masks(url: str) -> None:
    found = hub(url).fill_mask("the [MASK] of the file", top_k=3)
    assert len(found) == 3
    assert all(item.token_str and item.sequence and 0 <= item.score <= 1 for item in found)


@call("huggingface_hub, token_classification", "token-classification")
def hub_entities(url: str) -> None:
    for arguments in ({}, {"aggregation_strategy": "none"}):
        found = hub(url).token_classification(TEXTS[0], **arguments)
        assert all(item.word and 0 <= item.start < item.end and 0 <= item.score <= 1 for item in found)


@call("huggingface_hub, question_answering", "question-answering")
def hub_answers(url: str) -> None:
    found = hub(url).question_answering("what is it?", context=TEXTS[0])
    assert found.answer == TEXTS[0][found.start : found.end]
    several = hub(url).question_answering("what is it?", context=TEXTS[0], top_k=3)
    assert [item.answer for item in several]


@call("llama-index, TEI embeddings", "feature-extraction")
def llama_index_embeddings(url: str) -> None:
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    model = TextEmbeddingsInference(model_name="any", base_url=url)
    vectors([model.get_text_embedding(TEXTS[0]), model.get_query_embedding(TEXTS[1])], 2)
    vectors(model.get_text_embedding_batch(TEXTS), 3)


@call("llama-index, TEI rerank", "rerank")
def llama_index_rerank(url: str) -> None:
    from llama_index.core.schema import NodeWithScore, TextNode
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.0) for text in TEXTS]
    found = TextEmbeddingInference(base_url=url, top_n=2).postprocess_nodes(nodes, query_str="the name")
    assert len(found) == 2
    assert found[0].score >= found[1].score


@call("haystack, TEI embedders", "feature-extraction")
def haystack_embedders(url: str) -> None:
    from haystack import Document
    from haystack.utils import Secret
    from haystack_integrations.components.embedders import huggingface_api as embedders

    options = {"api_type": "text_embeddings_inference", "api_params": {"url": url}, "token": Secret.from_token("none")}
    vectors([embedders.HuggingFaceAPITextEmbedder(**options).run(text=TEXTS[0])["embedding"]], 1)
    documents = [Document(content=text) for text in TEXTS]
    embedder = embedders.HuggingFaceAPIDocumentEmbedder(**options, progress_bar=False)
    vectors([document.embedding for document in embedder.run(documents=documents)["documents"]], 3)


@call("haystack, TEI ranker", "rerank")
def haystack_ranker(url: str) -> None:
    from haystack import Document
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    documents = [Document(content=text) for text in TEXTS]
    ranker = HuggingFaceTEIRanker(url=url, top_k=2)
    found = ranker.run(query="the name", documents=documents)["documents"]
    assert len(found) == 2
    assert found[0].score >= found[1].score


@call("cohere", "rerank")
def cohere_rerank(url: str) -> None:
    import cohere

    for client in (cohere.Client(api_key="none", base_url=url), cohere.ClientV2(api_key="none", base_url=url)):
        found = client.rerank(model="any", query="the name", documents=TEXTS, top_n=2)
        assert len(found.results) == 2
        assert 1 >= found.results[0].relevance_score >= found.results[1].relevance_score >= 0


@call("cohere, embeddings", "feature-extraction")
def cohere_embeddings(url: str) -> None:
    import cohere
    import numpy as np

    kinds = ["float", "base64", "ubinary", "binary"]
    arguments: dict[str, Any] = {"model": "any", "texts": TEXTS, "input_type": "search_document"}
    clients = (cohere.Client(api_key="none", base_url=url), cohere.ClientV2(api_key="none", base_url=url))
    for client in clients:
        found = client.embed(**arguments, embedding_types=kinds)
        vectors(found.embeddings.float_, 3)
        bits = np.packbits(np.array(found.embeddings.float_) > 0, axis=1)
        assert np.array_equal(found.embeddings.ubinary, bits)
        assert np.array_equal(found.embeddings.binary, bits.astype(int) - 128)
        assert len(found.embeddings.base64) == 3
        assert found.meta.billed_units.input_tokens > 6
    one, two = (client.embed(**arguments) for client in clients)
    assert one.embeddings == two.embeddings.float_
    many = clients[1].embed(**{**arguments, "texts": TEXTS * 70})  # It sends 96 at once.
    vectors(many.embeddings.float_, 210)


@call("cohere, errors and keys", "keys")
def cohere_keys(url: str) -> None:
    import cohere

    def ask(key: str, **arguments: Any) -> Any:
        client = cohere.ClientV2(api_key=key, base_url=url)
        wanted = {"model": "any", "texts": TEXTS, "input_type": "search_query", "embedding_types": ["float"]}
        return client.embed(**{**wanted, **arguments}, request_options={"max_retries": 0})

    assert refusal(cohere.UnauthorizedError, lambda: ask("wrong")).body["message"]
    assert refusal(cohere.TooManyRequestsError, lambda: [ask(KEY) for _ in range(2)]).body["message"]


@call("tritonclient", "feature-extraction")
def triton_embeddings(url: str) -> None:
    import numpy as np
    import tritonclient.http as triton
    from tritonclient.utils import InferenceServerException

    client = triton.InferenceServerClient(url.removeprefix("http://"))
    name = "tiny/feature-extraction"
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    assert client.is_model_ready(name, "1")
    assert client.get_server_metadata()["name"]
    metadata = client.get_model_metadata(name)
    assert metadata["inputs"][0] == {"name": "text", "datatype": "BYTES", "shape": [-1]}
    assert metadata["outputs"][0]["shape"] == [-1, WIDTH]
    texts = np.array([text.encode() for text in TEXTS], dtype=np.object_)
    found = []
    for binary in (True, False):
        given = triton.InferInput("text", [3], "BYTES")
        given.set_data_from_numpy(texts, binary_data=binary)
        wanted = [triton.InferRequestedOutput("embedding", binary_data=binary)]
        for outputs in (wanted, None):
            for coding in (None, "gzip", "deflate"):
                result = client.infer(
                    name,
                    [given],
                    outputs=outputs,
                    request_id="7",
                    timeout=5_000_000,
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                assert result.get_response()["id"] == "7"
                found.append(result.as_numpy("embedding"))
    vectors(found[0], 3)
    assert all(np.abs(other - found[0]).max() < 1e-6 for other in found)
    assert refusal(InferenceServerException, lambda: client.infer("nope", [given])).message()


@call("tritonclient, asyncio", "feature-extraction")
def triton_async(url: str) -> None:
    import asyncio

    import numpy as np
    import tritonclient.http.aio as triton

    async def ask() -> None:
        async with triton.InferenceServerClient(url.removeprefix("http://")) as client:
            assert await client.is_model_ready("tiny/feature-extraction")
            given = triton.InferInput("text", [3], "BYTES")
            given.set_data_from_numpy(np.array([text.encode() for text in TEXTS], dtype=np.object_))
            for coding in (None, "gzip", "deflate"):
                result = await client.infer(
                    "tiny/feature-extraction",
                    [given],
                    request_compression_algorithm=coding,
                    response_compression_algorithm=coding,
                )
                vectors(result.as_numpy("embedding"), 3)

    asyncio.run(ask())


@call("prometheus_client", "feature-extraction")
def prometheus(url: str) -> None:
    import httpx
    from prometheus_client.parser import text_string_to_metric_families

    # What Prometheus sends; the server has the older format alone.
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
    answer = httpx.get(f"{url}/metrics", headers={"accept": accept})
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    names = {family.name for family in text_string_to_metric_families(answer.text)}
    assert {"serve_request_seconds", "serve_queue_tokens", "process_resident_memory_bytes"} <= names


@call("tritonclient, pairs", "text-classification")
def triton_pairs(url: str) -> None:
    import numpy as np
    import tritonclient.http as triton

    client = triton.InferenceServerClient(url.removeprefix("http://"))
    texts = np.array([text.encode() for text in TEXTS], dtype=np.object_)
    inputs = [triton.InferInput(name, [3], "BYTES") for name in ("text", "text_pair")]
    for given in inputs:
        given.set_data_from_numpy(texts)
    result = client.infer("tiny/text-classification", inputs)
    assert result.as_numpy("scores").shape == result.as_numpy("labels").shape == (3, 2)
    assert np.abs(result.as_numpy("scores").sum(axis=1) - 1).max() < 1e-5


def main() -> int:
    """Runs all calls; returns how many failed."""
    addresses = json.loads(sys.argv[1])
    only = sys.argv[2:]
    failed = 0
    for client, bundle, function in CALLS:
        if only and not any(word in client for word in only):
            continue
        try:
            function(addresses[bundle])
            print(f"ok      {client}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {client}\n{traceback.format_exc()}", flush=True)
    print(f"{failed} of {len(CALLS)} failed")
    return failed


if __name__ == "__main__":
    sys.exit(main())
