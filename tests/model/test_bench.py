"""The benchmark's arithmetic, its parts, and one whole run on a tiny bundle: what it says, never how fast it was."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model.bench import clock
from model.bench.authors import authors_search
from model.bench.bandwidth import Traffic, measure_bandwidth
from model.bench.bench import Options, bench
from model.bench.breakdown import PARTS, words_apart
from model.bench.clock import spread, take_turns
from model.bench.ours import BASELINE, Contender, Decoder, caption_all, caption_each, fixed_depth, taken_tests
from model.bench.peers import PEERS, Peer, Sizes, import_transformers, peer_caption
from model.bench.photos import read_photos
from model.bench.plot import plot_bench, plot_breakdown
from model.bench.report import align, to_text
from model.bench.trade_off import surest
from model.bottom_up.detections import Detections
from model.captioner import Captioner
from model.decoding.search import greedy_search
from model.deecap import DeeCap
from model.engine.precision import choose_precision
from model.exits import TIERS, ExitPolicy

MakeModel = Callable[..., DeeCap]
FLOAT64 = choose_precision("cpu", "float64")
INT8 = choose_precision("cpu", "int8")
PNG = b"\x89PNG\r\n\x1a\n"


def tiny(peer: Peer) -> Peer:
    return replace(peer, sizes=Sizes(image=32, text_layers=2, vocabulary=40, vision_layers=1, width=16, heads=2))


def photo_bytes(colour: str, suffix: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), colour).save(file, suffix)
    return file.getvalue()


# The clock -----------------------------------------------------------------------------------------------------------


def test_spread_is_linear_between_neighbours():
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"p50": 3.0, "p95": pytest.approx(4.8), "mean": 3.0}


def test_rows_take_turns_and_the_median_of_the_rounds_counts(monkeypatch):
    time = 0.0
    order: list[tuple[str, int]] = []
    monkeypatch.setattr(clock, "now", lambda device: time)

    def row(name: str, seconds: list[float]) -> Callable[[int], None]:
        """A run takes the next of `seconds`; the first of them is the warm-up's."""
        left = iter(seconds)

        def work(item: int) -> None:
            nonlocal time
            order.append((name, item))
            time += next(left)

        return work

    rows = {"a": row("a", [9, 1, 2, 9, 4, 3, 6]), "b": row("b", [9, 1, 1, 1, 1, 1, 1])}
    taken = take_turns(rows, items=2, rounds=3, device="cpu", what="test")
    assert order[:2] == [("a", 0), ("b", 0)]
    # Each item by all rows before the next one, the order rotating.
    assert order[2:8] == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 0), ("b", 0)]
    assert taken["a"].tolist() == pytest.approx([3000.0, 4000.0])
    assert taken["b"].tolist() == pytest.approx([1000.0, 1000.0])


# Photos --------------------------------------------------------------------------------------------------------------


def test_photos_come_from_files_and_archives_by_name(tmp_path):
    first, second, third = (photo_bytes(colour) for colour in ("red", "green", "blue"))
    (tmp_path / "a.png").write_bytes(first)
    (tmp_path / "notes.txt").write_text("not a photo")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        for name, data in (("deep/one.png", second), ("readme.md", b"text"), ("two.png", third)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert read_photos(tmp_path, 10) == [first, second, third]
    assert read_photos(tmp_path, 2) == [first, second]


def test_what_are_no_photos_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_photos(tmp_path / "missing", 1)
    with pytest.raises(FileNotFoundError, match="no photo in"):
        read_photos(tmp_path, 1)
    (tmp_path / "b.tar").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match=r"b\.tar cannot be read as a tar archive"):
        read_photos(tmp_path, 1)
    (tmp_path / "a.png").write_bytes(photo_bytes("red")[:50])
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a photo"):
        read_photos(tmp_path, 1)


# Ours ----------------------------------------------------------------------------------------------------------------


def test_a_fixed_depth_has_the_length_and_the_depth_asked_for(make_model: MakeModel):
    network = make_model(no_repeats=True)
    memories = [torch.randn(5, 16, dtype=torch.float64) for _ in range(3)]
    said = caption_each(fixed_depth(network, 2, 5, FLOAT64), memories)
    assert said.exits == [[2] * 5] * 3
    assert (said.mean_steps, said.executed_rows) == (5.0, 2 * 5 * 3)
    network = fixed_depth(network, 2, 5, FLOAT64).decoder.model
    assert not network.config.no_repeats, "to look for other words would be most of what it is measured at"


def test_captions_of_a_full_engine_are_those_of_one_at_a_time(make_model: MakeModel):
    network = make_model()
    memories = [torch.randn(5, 16, dtype=torch.float64) for _ in range(7)]
    contender = Contender("some", Decoder(network, ExitPolicy((1, 2)), FLOAT64), 1.5)
    alone = caption_each(contender, memories)
    together = caption_all(contender.decoder.engine(3), memories, 1.5)
    expected = [greedy_search(network, memory[None], [1.5], ExitPolicy((1, 2))) for memory in memories]
    words = [[step.token for step in one.captions[0]] for one in expected]
    assert [[step.token for step in steps] for steps in alone.steps] == words
    assert [[step.token for step in steps] for steps in together] == words
    assert alone.executed_rows == sum(one.executed_rows for one in expected)


@pytest.mark.parametrize(
    ("policy", "left", "tau", "expected"),
    [
        (ExitPolicy((1, 3)), 1, 2.0, [1]),
        (ExitPolicy((1, 3)), 4, 2.0, [1, 3]),
        (ExitPolicy((1, 3)), 4, 0.0, []),
        (ExitPolicy((1, 3), margin=0.5), 3, 2.0, [3]),
        (ExitPolicy((1, 3), margin=0.5), 4, 2.0, []),
        (ExitPolicy(()), 4, 2.0, []),
    ],
)
def test_which_tests_were_taken(policy, left, tau, expected):
    assert taken_tests(policy, left, tau) == expected


# The authors' way ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exits", ["deecap", "shallow", "plain", "final"])
@pytest.mark.parametrize("tau", [0.0, 1.0, 2.0, 9.0])
def test_the_authors_way_gives_the_captions_of_the_plain_decoder(make_model: MakeModel, exits: str, tau: float):
    network = make_model(exits)
    tested = () if exits == "final" else (1, 2, 3)
    features, boxes = torch.randn(3, 5, 6, dtype=torch.float64), torch.rand(3, 5, 4, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([[5], [3], [4]])
    memory = network.encode(features, boxes, mask)
    expected = greedy_search(network, memory, [tau] * 3, ExitPolicy(tested), mask).captions
    for row, steps in enumerate(expected):
        image = (features[row : row + 1], boxes[row : row + 1], mask[row : row + 1])
        assert authors_search(network, image, tau, tested) == [(step.token, step.exit_layer) for step in steps]


# Bandwidth -----------------------------------------------------------------------------------------------------------

# Of `make_model`'s network: width 16, feed-forward 24, 4 layers, 19 words.
LAYER = 6 * 16 * 16 + 2 * 16 * 24
HEAD = 19 * 16
REGIONS = 4 * 2 * 16 * 16
GATE = 2 * 16 * 16 + 16


def imitating(layers: int) -> int:
    """Imitators and deep fusion of so many layers."""
    return layers * 3 * 16 * 16


def test_bytes_of_an_untested_caption(make_model: MakeModel):
    traffic = Traffic(make_model(), ExitPolicy((1, 2, 3)), INT8)
    weights = 2 * (4 * LAYER + HEAD) + REGIONS
    states = 4 * 2 * 16 * (1 + 5) + 4 * 2 * 16 * (2 + 5)  # keys and values of two steps
    memory = 5 * 16
    assert traffic.caption([4, 4], regions=5, tau=0.0) == weights + 4 * (states + memory)


def test_bytes_of_tested_words(make_model: MakeModel):
    network = make_model()
    policy = ExitPolicy((1, 3))
    test_1 = HEAD + 1 * 256 + GATE + imitating(3)
    test_3 = HEAD + 2 * 256 + GATE + imitating(1)
    traffic = Traffic(network, policy, choose_precision("cpu", "float32"))
    for left, weights in (
        (1, LAYER + test_1),
        (3, 3 * LAYER + test_1 + test_3),
        (4, 4 * LAYER + test_1 + test_3 + HEAD),
    ):
        states = left * 2 * 16 * (1 + 5) + 5 * 16
        assert traffic.caption([left], regions=5, tau=1.0) == 4 * (REGIONS + weights + states)
    assert traffic.weights == 4 * (4 * LAYER + REGIONS + test_1 + test_3 - HEAD)


def test_bytes_of_plain_exits_are_those_of_the_head(make_model: MakeModel):
    traffic = Traffic(make_model("plain"), ExitPolicy((1,)), choose_precision("cuda", "bfloat16"))
    assert traffic.caption([1], regions=5, tau=1.0) == 2 * (REGIONS + LAYER + HEAD + 2 * 16 * 6 + 5 * 16)


def test_bandwidth_is_some_number_of_bytes_a_second():
    assert 0 < measure_bandwidth("cpu", 2**16) < math.inf


# The breakdown -------------------------------------------------------------------------------------------------------


def test_words_are_told_apart_by_where_they_left():
    captions = [[(5.0, 1), (2.5, 1), (7.0, 4)], [(9.0, 4)]]
    apart = words_apart(
        captions, [1, 4], step_ms={1: 2.0, 4: 4.0}, fixed_ms={1: 0.5, 4: 1.0}, begin_ms={1: 1.5, 4: 2.0}
    )
    assert apart == {
        "begin": pytest.approx((1.5 + 2.0) / 2),
        "layers, early": pytest.approx(2 * 1.5 / 2),
        "tests, early": pytest.approx((5.0 - 2.0 - 1.5 + 0.5) / 2),
        "layers, deep": pytest.approx(2 * 3.0 / 2),
        "tests, deep": pytest.approx((3.0 + 9.0 - 4.0 - 2.0) / 2),
        "fixed": pytest.approx((0.5 + 0.5 + 1.0 + 1.0) / 2),
    }
    assert sum(apart.values()) == pytest.approx((5.0 + 2.5 + 7.0 + 9.0) / 2)


def test_without_tests_every_word_went_all_the_way():
    apart = words_apart([[(5.0, 4)]], [4], {4: 4.0}, {4: 1.0}, {4: 1.0})
    assert (apart["layers, early"], apart["layers, deep"], apart["tests, deep"]) == (0.0, 3.0, 0.0)


# Peers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_gives_exactly_the_tokens_asked_for(peer: Peer, dtype: torch.dtype):
    small = tiny(peer)
    torch.manual_seed(0)
    network = small.build(small.sizes).eval().to(dtype)
    for words in (1, 7):
        tokens = peer_caption(network, torch.randn(1, 3, 32, 32).to(dtype), words)
        assert len(tokens) == words
        assert all(0 <= token < 40 for token in tokens)


def test_another_number_of_tokens_is_an_error():
    class Short:
        def generate(self, **_: Any) -> torch.Tensor:
            return torch.ones(1, 4, dtype=torch.long)

    with pytest.raises(RuntimeError, match="gave 3 tokens where 7"):
        peer_caption(Short(), torch.zeros(1, 3, 32, 32), 7)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_the_peers_have_their_real_sizes(peer: Peer):
    """Millions of weights; BLIP's file holds 23 more, its head a second time."""
    with torch.device("meta"):
        network = peer.build(peer.sizes)
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert count == pytest.approx({"BLIP-base": 224, "GIT-base": 177, "ViT-GPT2": 239}[peer.name], abs=0.5)


def test_transformers_is_kept_off_the_network(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    import_transformers()
    import os

    assert os.environ["HF_HUB_OFFLINE"] == "1"


# A whole run ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(random_bundle: Any) -> dict[str, Any]:
    captioner = Captioner.load(random_bundle.folder, "cpu", threads=1)
    options = Options(
        count=3, rounds=1, batches=(1, 2), peers=(tiny(PEERS[0]),), peers_repeats=1, breakdown=True, memory_bytes=2**20
    )
    return bench(captioner, [photo_bytes("red"), photo_bytes("blue", "JPEG")], options, "deecap bench")


def test_the_result_is_plain_json_with_all_its_parts(result):
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert set(result) == {
        "command", "bundle", "precision", "machine", "captions", "photos", "before_words", "regions", "decoder",
        "bandwidth", "end_to_end", "authors", "peers", "breakdown",
    }  # fmt: skip
    assert (result["captions"], result["photos"], result["precision"]) == (3, 2, "int8")
    assert set(result["before_words"]) == {"decode image", "look", "encode"}
    assert set(result["regions"]) == {"1", "8"}
    assert {"torch", "onnxruntime", "transformers"} <= set(result["machine"]["versions"])


def test_the_rows_are_the_tiers_and_the_shallower_decoders(result):
    rows = {row["name"]: row for row in result["decoder"]["rows"]}
    assert list(rows) == [BASELINE, *TIERS, *(f"TF-{layers}L" for layers in range(1, 6))]
    assert [row["name"] for row in result["end_to_end"]] == [BASELINE, *TIERS]
    for name in (BASELINE, "full"):
        assert rows[name]["speedup"]["paper"] == rows[name]["speedup"]["executed"] == 1.0
    assert rows["TF-2L"]["speedup"]["paper"] == 3.0
    assert not rows["turbo"]["random_weights"]
    assert rows["TF-2L"]["random_weights"]
    for row in rows.values():
        assert set(row["captions_per_second"]) == {"1", "2"}
        assert row["speedup"]["paper"] >= row["speedup"]["executed"] >= 1.0


def test_the_ratios_are_those_of_the_milliseconds_beside_them(result):
    rows = result["decoder"]["rows"]
    for row in rows:
        assert row["speedup"]["clock"] == pytest.approx(rows[0]["ms"]["mean"] / row["ms"]["mean"], rel=1e-3)
        if not row["random_weights"]:
            assert row["bound_reached"] == pytest.approx(row["bound_ms"] / row["ms"]["mean"], rel=1e-3)
            least = row["bytes_per_word"] * row["steps"] / result["bandwidth"]["memory_gb_s"] / 1e6
            assert row["bound_ms"] == pytest.approx(least, rel=1e-3)
    authors = {row["name"]: row for row in result["authors"]["rows"]}
    assert {"ours, int8", "ours, float32", "theirs, float32", "theirs, bfloat16", "theirs, float32, turbo"} <= set(
        authors
    )
    theirs = authors["theirs, float32"]["ms"]
    assert authors["ours, float32"]["times_faster"] == pytest.approx(theirs / authors["ours, float32"]["ms"], rel=1e-3)
    (peer,) = result["peers"]
    assert set(peer["ours_ms"]) == {BASELINE, "turbo"}
    assert peer["words"] == result["decoder"]["forced_steps"]
    ratio = peer["ms"]["bfloat16"] / peer["ours_ms"]["turbo"]
    assert peer["times_ours"]["turbo"]["bfloat16"] == pytest.approx(ratio, rel=1e-3)


def test_the_breakdown_has_every_part_of_every_tier(result):
    assert [row["name"] for row in result["breakdown"]["tiers"]] == list(TIERS)
    assert all(tuple(row["ms"]) == PARTS for row in result["breakdown"]["tiers"])


def test_the_table_names_every_row(result):
    text = to_text(result)
    for name in (BASELINE, *TIERS, "TF-1L*", "theirs, float32", "BLIP-base", "bound ms", "layers, deep", "GB/s"):
        assert name in text
    assert "nan" not in text.lower()


def test_columns_are_aligned():
    assert align([["", "ms"], ["full", "10.25"], ["a", "1.00"]]).splitlines() == [
        "         ms",
        "full  10.25",
        "a      1.00",
    ]


def test_the_pictures_are_pngs(result, tmp_path):
    plot_bench(result, tmp_path / "bench.png")
    plot_breakdown(result["breakdown"], tmp_path / "breakdown.png")
    without_peers = {key: value for key, value in result.items() if key != "peers"}
    plot_bench(without_peers, tmp_path / "alone.png")
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(PNG)
        with Image.open(path) as image:
            assert np.asarray(image).std() > 0


def test_peers_and_breakdown_can_be_left_out(random_bundle: Any):
    captioner = Captioner.load(random_bundle.folder, "cpu", threads=1)
    untested = replace(captioner.bundle, policy=ExitPolicy(()))
    captioner.bundle = untested
    options = Options(count=1, rounds=1, batches=(1,), peers=(), memory_bytes=2**20)
    result = bench(captioner, [photo_bytes("red")], options, "deecap bench --no-peers")
    assert not {"peers", "breakdown"} & set(result)
    assert [row["name"] for row in result["decoder"]["rows"][:2]] == [BASELINE, "TF-1L"]  # no tests, no tiers
    assert "Peers" not in to_text(result)


def test_fewer_regions_are_the_surest_and_all_cells():
    chances = np.array([[0.1, 0.9], [0.4, 0.6], [0.7, 0.3], [1.0, 0.0], [1.0, 0.0]], np.float32)  # the last two: cells
    boxes, features = np.arange(20, dtype=np.float32).reshape(5, 4), np.arange(5, dtype=np.float32)[:, None]
    for most, rows in ((1, [0, 3, 4]), (2, [0, 1, 3, 4]), (9, [0, 1, 2, 3, 4])):
        found = surest(Detections(boxes, features, chances), most)
        assert found.features[:, 0].tolist() == rows
        assert found.boxes[:, 0].tolist() == [4.0 * row for row in rows]
        assert len(found.scores) == len(rows)
