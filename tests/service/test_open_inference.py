"""`/v2`: what a client of the Open Inference Protocol gets, NVIDIA's own among them, and what it is refused."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from fastapi import FastAPI
from pydantic import SecretStr
from tritonclient.utils import InferenceServerException

from service.app import create_app
from service.jobs import Answer
from service.settings import Settings
from tests.service import pictures
from tests.service.fakes import EXITS, LAYERS, SPEEDS, FakeBroker, FakeCaptioner, answer_to
from tests.service.running import running, scrape, until, until_ready
from tests.service.test_process import serving, wait_ready

JPEG = pictures.jpeg()
SMALL = pictures.encode(pictures.photo((20, 32)))
INFER = "/v2/models/fake/infer"
HEADER = "Inference-Header-Content-Length"


def image(*photos: bytes) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(photos)], "BYTES")
    return tensor.set_data_from_numpy(np.array(photos, np.object_))


def tensor(name: str, datatype: str, *values: Any) -> triton.InferInput:
    kinds = {"BYTES": np.object_, "FP32": np.float32, "FP64": np.float64, "INT32": np.int32}
    return triton.InferInput(name, [len(values)], datatype).set_data_from_numpy(np.array(values, kinds[datatype]))


def said(result: triton.InferResult, name: str) -> list[Any]:
    values = result.as_numpy(name)
    return np.char.decode(values.astype("S")).tolist() if values.dtype == np.object_ else values.tolist()


def size_of(photo: str) -> str:
    """The end of the fake's caption."""
    return photo.split(" ", 1)[1]


class TestTritonsClient:
    def test_it_finds_the_model_and_captions(self, app: FastAPI, captioner: FakeCaptioner) -> None:
        with serving(app) as address, httpx.Client(base_url=address) as plain:
            wait_ready(plain)
            captioner.described.clear()
            client = triton.InferenceServerClient(address.removeprefix("http://"))
            assert client.is_server_live()
            assert client.is_server_ready()
            assert client.is_model_ready("fake")
            assert client.is_model_ready("deecap", "1")
            assert not client.is_model_ready("other")
            assert client.get_server_metadata()["extensions"] == ["binary_tensor_data"]
            metadata = client.get_model_metadata("fake")
            assert [each["name"] for each in metadata["inputs"]] == ["image", "speed", "tau", "beam"]
            outputs = {each["name"]: each for each in metadata["outputs"]}

            result = client.infer("fake", [image(JPEG, SMALL), tensor("speed", "BYTES", b"fast", b"full")])
            captions = said(result, "caption")
            assert [size_of(caption) for caption in captions] == ["48 32", "20 32"]
            assert sorted(tau for tau, _ in captioner.described) == [0.0, 2.0]
            assert said(result, "words") == [caption.split() for caption in captions]
            assert said(result, "exit_layers") == [list(EXITS[:3])] * 2
            assert said(result, "speedup") == pytest.approx([LAYERS * 4 / sum(EXITS)] * 2)
            assert said(result, "confidence") == pytest.approx([np.exp(-0.1)] * 2)
            for name, output in outputs.items():
                told = result.get_output(name)
                assert told["datatype"] == output["datatype"]
                assert len(told["shape"]) == len(output["shape"])
            assert result.get_response()["parameters"] == {"revision": "0123456789ab"}

            with pytest.raises(InferenceServerException, match="unknown_speed: speed must be one of") as caught:
                client.infer("fake", [image(JPEG), tensor("speed", "BYTES", b"warp")])
            assert caught.value.status() == "422"
            with pytest.raises(InferenceServerException, match="not_found: No model other") as caught:
                client.infer("other", [image(JPEG)])
            assert caught.value.status() == "404"
            client.close()

    def test_every_way_to_give_options_and_to_be_answered(self, app: FastAPI, captioner: FakeCaptioner) -> None:
        with serving(app) as address, httpx.Client(base_url=address) as plain:
            wait_ready(plain)
            client = triton.InferenceServerClient(address.removeprefix("http://"))
            ways = [
                ({"inputs": [tensor("speed", "FP32", 2.5)]}, (1.5, 1)),
                ({"inputs": [tensor("speed", "BYTES", b"2.5")]}, (1.5, 1)),
                ({"inputs": [tensor("tau", "FP64", 0.5), tensor("beam", "INT32", 3)]}, (0.5, 3)),
                ({"parameters": {"speed": "turbo", "beam": 2}}, (3.0, 2)),
                ({"timeout": 4_000_000, "priority": 2, "sequence_id": 7, "sequence_start": True}, (1.0, 1)),
            ]
            for way, expected in ways:
                captioner.described.clear()
                inputs = [image(JPEG), *way.pop("inputs", [])]
                result = client.infer("fake", inputs, model_version="1", request_id="seven", **way)
                assert captioner.described == [expected], way
                assert result.get_response()["id"] == "seven"

            in_json = triton.InferInput("image", [1], "BYTES")
            in_json.set_data_from_numpy(np.array([base64.b64encode(JPEG)], np.object_), binary_data=False)
            wanted = [triton.InferRequestedOutput("caption", False), triton.InferRequestedOutput("exit_layers", True)]
            result = client.infer("fake", [in_json], outputs=wanted)
            assert size_of(said(result, "caption")[0]) == "48 32"
            assert said(result, "exit_layers") == [list(EXITS[:3])]
            assert [each["name"] for each in result.get_response()["outputs"]] == ["caption", "exit_layers"]
            client.close()

    def test_the_asynchronous_one(self, app: FastAPI) -> None:
        async def ask(address: str) -> list[str]:
            async with triton_aio.InferenceServerClient(address.removeprefix("http://")) as client:
                assert await client.is_model_ready("fake")
                results = await asyncio.gather(*(client.infer("fake", [image(each)]) for each in (JPEG, SMALL)))
                with pytest.raises(InferenceServerException, match="not_an_image: The first bytes"):
                    await client.infer("fake", [image(b"no picture at all")])
                return [said(result, "caption")[0] for result in results]

        with serving(app) as address, httpx.Client(base_url=address) as plain:
            wait_ready(plain)
            assert list(map(size_of, asyncio.run(ask(address)))) == ["48 32", "20 32"]

    def test_a_key_and_its_quota(self, captioner: FakeCaptioner, quick_stop: None) -> None:
        """Each photo counts. Probes need no key, metadata do."""
        settings = Settings(api_keys=SecretStr("correct-horse"), quota_per_minute=3)
        with serving(create_app(settings, load=lambda: captioner)) as address:
            client = triton.InferenceServerClient(address.removeprefix("http://"))
            for _ in range(500):
                if client.is_server_ready():
                    break
            assert client.is_server_live()
            with pytest.raises(InferenceServerException, match="unauthorized: There is none") as caught:
                client.get_model_metadata("fake")
            assert caught.value.status() == "401"
            key = {"X-API-Key": "correct-horse"}
            client.infer("fake", [image(JPEG, SMALL)], headers=key)
            client.infer("fake", [image(JPEG)], headers=key)
            with pytest.raises(InferenceServerException, match="quota_exceeded") as caught:
                client.infer("fake", [image(JPEG)], headers=key)
            assert caught.value.status() == "429"
            client.close()


def photo(data: object = None, **more: object) -> dict[str, object]:
    data = [base64.b64encode(JPEG).decode()] if data is None else data
    return {"name": "image", "shape": [1], "datatype": "BYTES", "data": data, **more}


def option(name: str, value: object, datatype: str = "BYTES", **more: object) -> dict[str, object]:
    return {"name": name, "shape": [1], "datatype": datatype, "data": [value], **more}


def assert_error(response: httpx.Response, status: int, code: str, says: str = "") -> None:
    """In the protocol's own shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    assert response.json()["error"].startswith(f"{code}: ")
    assert says in response.json()["error"]
    assert response.headers["x-request-id"]


@pytest.mark.anyio
class TestOverHttp:
    async def test_plain_json_both_ways(self, client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
        captioner.described.clear()
        body = {"id": "a", "inputs": [photo(), option("speed", 3, "INT32"), option("beam", 2, "INT32")]}
        response = await client.post(INFER, json=body, headers={"x-request-id": "mine"})
        assert response.status_code == 200
        assert response.headers["x-request-id"] == "mine"
        assert response.headers["content-type"] == "application/json"
        assert HEADER not in response.headers
        answer = response.json()
        outputs = {each.pop("name"): each for each in answer.pop("outputs")}
        assert answer == {
            "id": "a", "model_name": "fake", "model_version": "1", "parameters": {"revision": "0123456789ab"},
        }  # fmt: skip
        words = outputs["caption"]["data"][0].split()
        assert outputs["caption"] == {"shape": [1], "datatype": "BYTES", "data": [" ".join(words)]}
        assert outputs["words"] == {"shape": [1, 3], "datatype": "BYTES", "data": words}
        assert outputs["exit_layers"] == {"shape": [1, 3], "datatype": "INT32", "data": [1, 3, 2]}
        assert captioner.described == [(2.0, 2)]
        value = await scrape(client)
        assert value(
            'deecap_request_duration_seconds_count{outcome="ok",route="/v2/models/{name}/infer",speed="custom"}'
        )

    @pytest.mark.parametrize("binary", [False, True])
    async def test_it_says_where_load_moved_the_speed(self, quick_stop: None, binary: bool) -> None:
        broker = FakeBroker()
        wanted = [{"name": name, "parameters": {"binary_data": binary}} for name in ("promised", "moved_by_load")]
        two = photo([*photo()["data"]] * 2, shape=[2])
        body = {"inputs": [two], "parameters": {"speed": "full", "max_speed": "fast"}, "outputs": wanted}
        async with running(create_app(Settings(), broker=broker)) as client:
            await until_ready(client)
            asking = asyncio.create_task(client.post(INFER, json=body))
            await until(lambda: len(broker.submitted) == 2)
            as_asked, moved = map(answer_to, broker.submitted)
            assert isinstance(moved.outcome, Answer)
            asked = moved.outcome.caption.speed
            faster = replace(moved.outcome.caption, speed=SPEEDS.resolve("fast"))
            broker.say(as_asked)
            broker.say(replace(moved, outcome=replace(moved.outcome, caption=faster, asked=asked)))
            response = await asking
        assert response.status_code == 200, response.text
        promised = [asked.promised, faster.speed.promised]
        assert promised[0] < promised[1]
        if binary:
            raw = response.content[int(response.headers[HEADER]) :]
            assert np.frombuffer(raw[:8], "<f4").tolist() == pytest.approx(promised)
            assert raw[8:] == b"\0\1"
        else:
            assert [(each["datatype"], each["data"]) for each in response.json()["outputs"]] == [
                ("FP32", promised), ("BOOL", [False, True]),
            ]  # fmt: skip

    async def test_a_caption_that_is_shorter_than_its_neighbour(self, quick_stop: None) -> None:
        broker = FakeBroker()
        app = create_app(Settings(), broker=broker)
        async with running(app) as client:
            await until_ready(client)
            asking = asyncio.create_task(
                client.post(INFER, json={"inputs": [photo([*photo()["data"]] * 2, shape=[2])]})
            )
            await until(lambda: len(broker.submitted) == 2)
            first, second = map(answer_to, broker.submitted)
            steps = second.outcome.caption.steps
            object.__setattr__(second.outcome.caption, "steps", (steps[0], steps[-1]))
            broker.say(second)  # the later one first
            broker.say(first)
            outputs = {each["name"]: each for each in (await asking).json()["outputs"]}
        assert outputs["words"]["shape"] == [2, 3]
        assert outputs["words"]["data"][4:] == ["", ""]
        assert outputs["exit_layers"]["data"] == [1, 3, 2, 1, 0, 0]

    @pytest.mark.parametrize(
        ("body", "status", "code", "says"),
        [
            ({}, 422, "invalid_request", "inputs"),
            ([], 422, "invalid_request", "body"),
            ({"inputs": []}, 422, "missing_image", "image"),
            ({"inputs": [photo(), photo()]}, 422, "repeated_field", "image"),
            ({"inputs": [photo(), option("sped", "fast")]}, 422, "unknown_option", "no input sped; it has image"),
            ({"inputs": [photo(datatype="FP32", data=[1.0])]}, 422, "invalid_request", "must be BYTES"),
            ({"inputs": [photo(datatype="COMPLEX")]}, 422, "invalid_request", "datatype COMPLEX"),
            ({"inputs": [photo(shape=[2])]}, 422, "invalid_request", "its shape is [2]"),
            ({"inputs": [photo(shape=[1, 1])]}, 422, "invalid_request", "shape"),
            ({"inputs": [photo(shape=[0], data=[])]}, 422, "invalid_request", "from 1 to 3"),
            ({"inputs": [photo(shape=[4], data=["a"] * 4)]}, 422, "invalid_request", "from 1 to 3"),
            ({"inputs": [photo(shape=[-1])]}, 422, "invalid_request", "from 1 to 3"),
            ({"inputs": [photo([3])]}, 422, "invalid_request", "not all of its data is BYTES"),
            ({"inputs": [photo(["?"])]}, 422, "bad_base64", ""),
            ({"inputs": [photo([""])]}, 422, "missing_image", ""),
            ({"inputs": [photo(["bm8="])]}, 415, "not_an_image", ""),
            ({"inputs": [photo(shape=[2], data=[photo()["data"][0], "bm8="])]}, 415, "not_an_image", "image[1]"),
            ({"inputs": [{**photo(), "data": None}]}, 422, "invalid_request", "must be data"),
            ({"inputs": [photo(parameters={"shared_memory_region": "x"})], "outputs": [{"name": "x"}]}, 422,
             "unknown_option", "no output x"),
            ({"inputs": [photo()], "outputs": [{"name": "caption"}] * 2}, 422, "repeated_field", "caption"),
            ({"inputs": [photo(), option("tau", True, "FP32")]}, 422, "invalid_request", "tau"),
            ({"inputs": [photo(), option("tau", "1")]}, 422, "invalid_request", "must be FP32"),
            ({"inputs": [photo(), option("tau", -1, "FP32")]}, 422, "invalid_option", "tau"),
            ({"inputs": [photo(), option("beam", 6, "INT32")]}, 422, "invalid_option", "beam"),
            ({"inputs": [photo(), option("beam", 1.5, "INT32")]}, 422, "invalid_request", "INT32"),
            ({"inputs": [photo(), option("speed", "a", shape=[2], data=["a"] * 2)]}, 422, "invalid_request", "each"),
            ({"inputs": [photo(), option("speed", "fast")], "parameters": {"speed": 2}}, 422, "repeated_field", ""),
            ({"inputs": [photo()], "parameters": {"sped": "full"}}, 422, "unknown_option", "sped"),
            ({"inputs": [photo()], "parameters": {"regions": True}}, 422, "unknown_option", "regions"),
            ({"inputs": [photo()], "parameters": {"timeout": 0}}, 422, "invalid_option", "microseconds"),
            ({"inputs": [photo()], "parameters": {"timeout": 6_000_000}}, 422, "invalid_option", "at most 5000"),
            ({"inputs": [photo()], "parameters": {"timeout": 10**400}}, 422, "invalid_option", "timeout_ms"),
            ({"inputs": [photo(parameters={"binary_data_size": 1})]}, 400, "bad_request", "beyond the body"),
        ],
    )  # fmt: skip
    async def test_what_is_wrong_is_told(
        self, captioner: FakeCaptioner, quick_stop: None, body: object, status: int, code: str, says: str
    ) -> None:
        app = create_app(Settings(max_images=3, timeout_ms=5000, feature_cache_mb=0), load=lambda: captioner)
        async with running(app) as client:
            await until_ready(client)
            captioner.looked.clear()
            assert_error(await client.post(INFER, json=body), status, code, says)
            assert captioner.looked == []

    @pytest.mark.parametrize(
        ("length", "raw", "size", "status", "code"),
        [
            ("+0", 0, 1, 400, "bad_request"),
            ("x", 0, 1, 400, "bad_request"),
            ("99999", 0, 1, 400, "bad_request"),
            ("9" * 5000, 0, 1, 400, "bad_request"),
            ("0", 0, 1, 400, "malformed_json"),
            (None, struct.pack("<I", 4) + b"abcd", 7, 400, "bad_request"),  # cut in its element
            (None, struct.pack("<I", 4) + b"abcd", 2, 400, "bad_request"),  # cut in its length
            (None, struct.pack("<I", 4) + b"abcde", 8, 400, "bad_request"),  # more than any tensor has
            (None, struct.pack("<I", 4) + b"abcd", -1, 400, "bad_request"),
            (None, struct.pack("<I", 4) + b"abcd", True, 400, "bad_request"),
            (None, bytes(8), 8, 422, "invalid_request"),  # two elements
            (None, bytes(4), 4, 422, "missing_image"),
            (None, struct.pack("<I", 4) + b"abcd", 8, 415, "not_an_image"),
        ],
    )
    async def test_binary_that_does_not_add_up(
        self, client: httpx.AsyncClient, length: str | None, raw: bytes | int, size: int, status: int, code: str
    ) -> None:
        tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "parameters": {"binary_data_size": size}}
        header = json.dumps({"inputs": [tensor]}).encode()
        headers = {HEADER: str(len(header)) if length is None else length}
        body = header + (raw if isinstance(raw, bytes) else bytes(raw))
        assert_error(await client.post(INFER, content=body, headers=headers), status, code)

    async def test_what_is_no_json_and_what_is_compressed(self, client: httpx.AsyncClient) -> None:
        assert_error(await client.post(INFER, content=b"{"), 400, "malformed_json")
        assert_error(await client.post(INFER, content=b""), 400, "malformed_json")
        assert_error(await client.post(INFER, content=b"[" * 100_000), 400, "malformed_json")
        packed = {"content-encoding": "gzip"}
        assert_error(await client.post(INFER, content=b"{}", headers=packed), 415, "unsupported_media_type")
        assert_error(await client.post(INFER, content=bytes(200_001)), 413, "body_too_large")

    async def test_every_address_below_has_the_protocols_errors(self, client: httpx.AsyncClient) -> None:
        for url in ("/v2/repository/index", "/v2/models/fake/versions/2/infer", "/v2/models/other/infer", "/v2/"):
            assert_error(await client.post(url, json={"inputs": [photo()]}), 404, "not_found")
        assert_error(await client.get(INFER), 405, "method_not_allowed")
        assert (await client.get("/v2x")).headers["content-type"] == "application/problem+json"
        versioned = await client.post("/v2/models/deecap/versions/1/infer", json={"inputs": [photo()]})
        assert versioned.json()["model_name"] == "fake"
        assert (await client.get("/v2/models/fake/versions/1")).json()["versions"] == ["1"]
        assert (await client.get("/v2/models/fake?version=2")).status_code == 200  # no word of a query is ours

    async def test_when_nobody_captions(self, quick_stop: None) -> None:
        broker = FakeBroker()
        async with running(create_app(Settings(), broker=broker)) as client:
            await until_ready(client)
            broker.workers = ()
            for _ in range(1000):
                if (await client.get("/v2/health/ready")).status_code != 200:
                    break
                await asyncio.sleep(0.005)
            for url in ("/v2/health/ready", "/v2/models/fake/ready"):
                response = await client.get(url)
                assert_error(response, 503, "no_worker")
                assert int(response.headers["retry-after"]) >= 1
            response = await client.post(INFER, json={"inputs": [photo()]})
            assert_error(response, 503, "no_worker")
            assert response.headers["retry-after"]
            assert (await client.get("/v2/health/live")).json() == {"live": True}
            assert (await client.get("/v2/models/fake")).json()["name"] == "fake"  # what there was, and will be again

    async def test_a_full_queue_refuses_the_whole_and_leaves_nothing_behind(
        self, client: httpx.AsyncClient, captioner: FakeCaptioner
    ) -> None:
        """Two in hand and two in the queue: of a dozen, most find no place, and none is captioned for nobody."""
        captioner.looked.clear()
        captioner.go.clear()
        photos = [base64.b64encode(pictures.encode(pictures.photo((20 + at, 32)))).decode() for at in range(12)]
        refused = await client.post(INFER, json={"inputs": [photo(photos, shape=[12])]})
        assert_error(refused, 503, "overloaded", "image[")
        assert refused.headers["retry-after"]
        captioner.go.set()
        assert (await client.post(INFER, json={"inputs": [photo()]})).status_code == 200
        assert len(captioner.looked) <= 3  # those that the worker had begun, and the last
        assert (await scrape(client))('deecap_rejections_total{reason="overloaded"}') == 1

    async def test_a_deadline(self, client: httpx.AsyncClient, captioner: FakeCaptioner) -> None:
        captioner.go.clear()
        late = await client.post(INFER, json={"inputs": [photo()], "parameters": {"timeout": 50_000}})
        captioner.go.set()
        assert_error(late, 504, "deadline_exceeded")
