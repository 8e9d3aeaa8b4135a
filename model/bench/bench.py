"""One measurement of everything, each figure in the same run as those it is compared with; the result is plain JSON."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.batching import stack_regions
from model.bench.authors import authors_search
from model.bench.bandwidth import MEMORY_BYTES, Traffic, measure_bandwidth
from model.bench.breakdown import break_down
from model.bench.clock import now, spread, take_turns
from model.bench.looking import measure_looking
from model.bench.machine import describe_machine
from model.bench.ours import (
    BASELINE,
    Captions,
    Contender,
    Decoder,
    caption_all,
    caption_each,
    decode_image,
    encode,
    end_to_end,
    fixed_depth,
    tiers_of,
)
from model.bench.peers import PEERS, Peer, measure_peers
from model.caption import Regions
from model.captioner import Captioner
from model.engine.precision import choose_precision
from model.evaluation.speedup import corpus_speedup, executed_speedup
from model.exits import ExitPolicy

Row = dict[str, Any]

FILLS = 8  # a batch's slots are filled so many times, so that the last ones, when slots run empty, weigh little
SLOW_ROUNDS = 3  # of what takes long
FAILS = 1e-9  # a threshold that no entropy is below
AUTHORS_ITEMS = 16  # captions: that way of decoding is slow
THEIRS = "theirs, float32"


@dataclass(frozen=True)
class Options:
    """How much is measured; the defaults take minutes."""

    count: int = 64  # captions, of photos that repeat where there are fewer
    rounds: int = 5
    batches: tuple[int, ...] = (1, 8, 32)
    peers: tuple[Peer, ...] = PEERS
    peers_repeats: int = 3
    breakdown: bool = False
    memory_bytes: int | None = None  # of the buffer that bandwidth is measured with; by default the device's


@dataclass(frozen=True)
class Item:
    """One caption to make, prepared up to the words."""

    data: bytes
    regions: Regions
    memory: Tensor  # (R, d)


def bench(captioner: Captioner, photos: Sequence[bytes], options: Options, command: str) -> Row:
    """All figures, milliseconds where no unit is named. `photos` as files' bytes, at least one.

    Raises `ValueError` for a model that the engine cannot run.
    """
    model, device = captioner.bundle.model, captioner.device
    precision = choose_precision(device, captioner.precision)
    tiers = tiers_of(captioner, precision)
    for tier in tiers:
        tier.decoder.engine(1)  # a model it cannot run is refused here, before anything takes time
    about = {
        "command": command,
        "bundle": {
            "name": captioner.name,
            "revision": captioner.revision,
            "layers": model.layers,
            "exit_policy": captioner.bundle.policy.to_json(),
        },
        "precision": precision.name,
        "machine": describe_machine(device),
        "captions": options.count,
        "photos": len(photos),
    }
    items, before = prepare(captioner, photos, options.count)
    memories = [item.memory for item in items]
    said = {tier.name: caption_each(tier, memories) for tier in tiers}
    words = max(1, round(said[BASELINE].mean_steps))
    weights = Traffic(model, captioner.bundle.policy, precision).weights
    bandwidth = {
        "memory_gb_s": measure_bandwidth(device, options.memory_bytes or MEMORY_BYTES[device]) / 1e9,
        "weights_gb_s": measure_bandwidth(device, weights) / 1e9,
        "weights_mb": weights / 1e6,
    }
    shallower = [fixed_depth(model, layers, words, precision) for layers in range(1, model.layers)]
    rows = measure_decoders(tiers, shallower, memories, said, options, device)
    for row, tier in zip(rows, tiers, strict=False):
        row |= bound(tier, said[tier.name], memories, row, bandwidth["memory_gb_s"] * 1e9)
    result = {
        **about,
        "before_words": before,
        "regions": measure_looking(captioner, photos, options.count, min(options.rounds, SLOW_ROUNDS)),
        "decoder": {"forced_steps": words, "rows": rows},
        "bandwidth": bandwidth,
        "end_to_end": measure_end_to_end(captioner, tiers, items, options, device),
        "authors": measure_authors(captioner, tiers, items),
    }
    if options.peers:
        ours = {tier.name: _photo_to_text(captioner, tier, items) for tier in (tiers[0], tiers[-1])}
        result["peers"] = measure_peers(options.peers, words, options.peers_repeats, device, ours)
    if options.breakdown:
        medians = {name: before[name]["p50"] for name in before}
        rounds = min(options.rounds, SLOW_ROUNDS)
        result["breakdown"] = break_down(tiers[1:] or tiers, memories, medians, words, rounds, device)
    return _rounded(result)


def prepare(captioner: Captioner, photos: Sequence[bytes], count: int) -> tuple[list[Item], dict[str, Any]]:
    """`count` items, and what each part of preparing them took."""
    device = captioner.device
    enough = captioner.sufficient_side
    encode(captioner, captioner.look(decode_image(photos[0], enough)))  # the first run of anything is slow
    items: list[Item] = []
    times: dict[str, list[float]] = {"decode image": [], "look": [], "encode": []}
    for index in range(count):
        data = photos[index % len(photos)]
        started = now(device)
        image = decode_image(data, enough)
        decoded = now(device)
        regions = captioner.look(image)
        looked = now(device)
        memory = encode(captioner, regions)
        encoded = now(device)
        items.append(Item(data, regions, memory))
        for name, taken in zip(times, (decoded - started, looked - decoded, encoded - looked), strict=True):
            times[name].append(taken * 1000)
    return items, {name: spread(taken) for name, taken in times.items()}


def measure_decoders(
    tiers: Sequence[Contender],
    shallower: Sequence[Contender],
    memories: Sequence[Tensor],
    said: Mapping[str, Captions],
    options: Options,
    device: str,
) -> list[Row]:
    """The decoder alone: the tiers' rows, the baseline first, then those of the shallower decoders.

    The captions of these all have the same whole number of steps, so their figures are scaled to the baseline's mean.
    """
    contenders = [*tiers, *shallower]
    layers, steps = tiers[0].decoder.model.layers, said[BASELINE].mean_steps
    one_by_one = {one.name: _captioning(one, memories) for one in contenders}
    alone = take_turns(one_by_one, len(memories), options.rounds, device, "one at a time")
    rates = measure_rates(contenders, memories, options, device)
    rows: list[Row] = []
    for one in contenders:
        depth = one.decoder.model.layers
        own = said.get(one.name)
        stretch = 1.0 if own else steps / one.decoder.model.config.max_words
        rows.append(
            {
                "name": one.name,
                "tau": one.tau,
                "random_weights": own is None,
                "steps": own.mean_steps if own else steps,
                "speedup": {
                    "paper": corpus_speedup(own.exits, layers) if own else layers / depth,
                    "executed": _executed(own, layers) if own else layers / depth,
                },
                "ms": spread(alone[one.name] * stretch),
                "captions_per_second": {str(batch): rate / stretch for batch, rate in rates[one.name].items()},
            }
        )
    for row in rows:
        row["speedup"]["clock"] = rows[0]["ms"]["mean"] / row["ms"]["mean"]
        row["speedup"]["clock_per_word"] = row["speedup"]["clock"] * row["steps"] / steps
    return rows


def _captioning(contender: Contender, memories: Sequence[Tensor]) -> Callable[[int], object]:
    return lambda item: contender.caption(memories[item])


def _filling(contender: Contender, memories: Sequence[Tensor], batch: int) -> Callable[[int], object]:
    return lambda _: caption_all(contender.decoder.engine(batch), memories, contender.tau)


def _executed(own: Captions, layers: int) -> float:
    return executed_speedup(sum(map(len, own.exits)), layers, own.executed_rows)


def measure_rates(
    contenders: Sequence[Contender], memories: Sequence[Tensor], options: Options, device: str
) -> dict[str, dict[int, float]]:
    """Captions a second of each contender, with each number of slots kept full, the emptying at the end counted."""
    rates: dict[str, dict[int, float]] = {one.name: {} for one in contenders}
    for batch in options.batches:
        many = [memories[index % len(memories)] for index in range(max(len(memories), FILLS * batch))]
        rows = {one.name: _filling(one, many, batch) for one in contenders}
        taken = take_turns(rows, 1, min(options.rounds, SLOW_ROUNDS), device, f"batches of {batch}")
        for name, times in taken.items():
            rates[name][batch] = len(many) / float(times[0]) * 1000
    return rates


def bound(tier: Contender, said: Captions, memories: Sequence[Tensor], row: Row, bandwidth: float) -> Row:
    """Bytes that a word must read, the milliseconds a caption takes for that alone, and the share of these in it."""
    traffic = Traffic(tier.decoder.model, tier.decoder.policy, tier.decoder.precision)
    read = sum(
        traffic.caption(exits, len(memory), tier.tau) for exits, memory in zip(said.exits, memories, strict=True)
    )
    least = read / len(memories) / bandwidth * 1000
    return {
        "bytes_per_word": read / sum(map(len, said.exits)),
        "bound_ms": least,
        "bound_reached": least / row["ms"]["mean"],
    }


def measure_end_to_end(
    captioner: Captioner, tiers: Sequence[Contender], items: Sequence[Item], options: Options, device: str
) -> list[Row]:
    """From the bytes of a photo's file to its text."""
    rows = {tier.name: _photo_to_text(captioner, tier, items) for tier in tiers}
    taken = take_turns(rows, len(items), min(options.rounds, SLOW_ROUNDS), device, "end to end")
    return [{"name": name, "ms": spread(times)} for name, times in taken.items()]


def _photo_to_text(captioner: Captioner, tier: Contender, items: Sequence[Item]) -> Callable[[int], object]:
    return lambda item: end_to_end(captioner, tier, items[item].data)


def measure_authors(captioner: Captioner, tiers: Sequence[Contender], items: Sequence[Item]) -> Row:
    """The authors' way of decoding beside ours, both from regions to words and at full depth unless named otherwise.

    Ours stands there twice: in the precision it is served in, and in theirs.
    """
    model, device = captioner.bundle.model, captioner.device
    chosen = items[:AUTHORS_ITEMS]

    def ours(contender: Contender) -> Callable[[int], Sequence[object]]:
        return lambda item: contender.caption(encode(captioner, chosen[item].regions))

    def theirs(dtype: torch.dtype, tau: float, tested: Sequence[int]) -> Callable[[int], Sequence[object]]:
        network = model if dtype == torch.float32 else copy.deepcopy(model).to(dtype)
        images = [_on(device, item.regions, dtype) for item in chosen]
        return lambda item: authors_search(network, images[item], tau, tested)

    float32 = Decoder(model, ExitPolicy(()), choose_precision(device, "float32"))
    rows = {
        f"ours, {tiers[0].decoder.precision.name}": ours(tiers[0]),
        "ours, float32": ours(Contender(BASELINE, float32, 0.0)),
        THEIRS: theirs(torch.float32, 0.0, ()),
        "theirs, bfloat16": theirs(torch.bfloat16, 0.0, ()),
    }
    if captioner.bundle.policy.tested:
        every, fastest = range(1, model.layers), tiers[-1]
        rows["theirs, float32, all tests fail"] = theirs(torch.float32, FAILS, every)
        rows[f"theirs, float32, {fastest.name}"] = theirs(torch.float32, fastest.tau, every)
    steps = {name: float(np.mean([len(work(item)) for item in range(len(chosen))])) for name, work in rows.items()}
    taken = take_turns(rows, len(chosen), SLOW_ROUNDS, device, "the authors' way")
    means = {name: float(np.mean(times)) for name, times in taken.items()}
    return {
        "captions": len(chosen),
        "rows": [
            {"name": name, "ms": mean, "steps": steps[name], "times_faster": means[THEIRS] / mean}
            for name, mean in means.items()
        ],
    }


def _on(device: str, regions: Regions, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    features, boxes, mask = (part.to(device) for part in stack_regions([regions]))
    return features.to(dtype), boxes.to(dtype), mask


def _rounded(value: Any) -> Any:
    """Five significant digits, of which a clock gives two or three."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
