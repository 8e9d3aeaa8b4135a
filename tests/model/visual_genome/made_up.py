"""Made-up weight files: the published names and shapes, the widths of any configuration, random numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from model.bottom_up.visual_genome.config import DetectorConfig

Blobs = dict[str, list[np.ndarray]]

NARROW = DetectorConfig(
    stem_width=4,
    width=4,
    blocks=(2, 2, 3, 2),
    proposal_width=16,
    classes=14,
    attributes=7,
    embedding=5,
    attribute_width=9,
    shorter_side=160,
    longer_side=260,
    proposals=60,
    proposals_before_nms=400,
    most_regions=25,
)


def letters(stage: int, block: int) -> str:
    """res2a, res2b, res2c; res3a, res3b1, res3b2, ...; res4a, res4b1, ...; res5a, res5b, res5c."""
    if block == 0:
        return "a"
    return f"b{block}" if stage in (3, 4) else "_bc"[block]


def caffe_shapes(config: DetectorConfig) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """Layers of the published network description, and the shapes of their blobs."""

    def convolution(name: str, place: str, *shape: int) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
        yield name, [shape]
        yield f"bn{place}", [shape[:1], shape[:1], (1,)]
        yield f"scale{place}", [shape[:1], shape[:1]]

    yield from convolution("conv1", "_conv1", config.stem_width, 3, 7, 7)
    inputs = config.stem_width
    for stage, blocks in zip((2, 3, 4, 5), config.blocks, strict=True):
        inner = config.width << (stage - 2)
        for block in range(blocks):
            place = f"{stage}{letters(stage, block)}"
            if block == 0:
                yield from convolution(f"res{place}_branch1", f"{place}_branch1", 4 * inner, inputs, 1, 1)
            yield from convolution(f"res{place}_branch2a", f"{place}_branch2a", inner, inputs, 1, 1)
            yield from convolution(f"res{place}_branch2b", f"{place}_branch2b", inner, inner, 3, 3)
            yield from convolution(f"res{place}_branch2c", f"{place}_branch2c", 4 * inner, inner, 1, 1)
            inputs = 4 * inner
    grid, features, hidden = 16 * config.width, 32 * config.width, config.proposal_width
    yield "rpn_conv/3x3", [(hidden, grid, 3, 3), (hidden,)]
    yield "rpn_cls_score", [(24, hidden, 1, 1), (24,)]
    yield "rpn_bbox_pred", [(48, hidden, 1, 1), (48,)]
    yield "cls_score", [(config.classes, features), (config.classes,)]
    yield "bbox_pred", [(4 * config.classes, features), (4 * config.classes,)]
    if config.attributes:
        yield "cls_embedding", [(config.classes, config.embedding)]
        yield "fc_attr", [(config.attribute_width, features + config.embedding), (config.attribute_width,)]
        yield "attr_score", [(config.attributes, config.attribute_width), (config.attributes,)]


def caffe_blobs(config: DetectorConfig, seed: int = 0) -> Blobs:
    """float32; lively enough for hundreds of proposals and for probabilities from almost none to almost one."""
    random = np.random.default_rng(seed)
    blobs: Blobs = {}
    for name, shapes in caffe_shapes(config):
        if name.startswith("bn"):
            made = [random.normal(0, 0.3, shapes[0]), random.uniform(0.5, 1.5, shapes[1])]
            factor = random.uniform(0.5, 2)
            made = [each * factor for each in made] + [np.array([factor])]
        elif name.startswith("scale"):
            made = [random.uniform(0.5, 1.2, shapes[0]), random.normal(0, 0.2, shapes[1])]
        else:
            made = [random.normal(0, (2 / np.prod(shapes[0][1:])) ** 0.5, shapes[0])]
            made += [random.normal(0, 0.1, shape) for shape in shapes[1:]]
        blobs[name] = [each.astype(np.float32) for each in made]
    for name, factor in (("rpn_bbox_pred", 0.003), ("rpn_cls_score", 0.3), ("cls_score", 0.5)):
        blobs[name][0] *= factor
    if config.attributes:  # in which the class counts as much as the features
        blobs["fc_attr"][0][:, : 32 * config.width] *= 0.01
        blobs["cls_embedding"][0] *= 3
    return blobs


def to_bua(blobs: Blobs) -> dict[str, np.ndarray]:
    """As MILVLG's port names them: Caffe's orders."""
    head = "roi_heads.box_predictor."
    named = {"cls_embedding": "cls_embed", "fc_attr": "attr_linear1", "attr_score": "attr_linear2"}
    port = _to_port(blobs)
    for caffe, bua in named.items():
        for part, blob in zip(("weight", "bias"), blobs.get(caffe, []), strict=False):
            port[f"{head}{bua}.{part}"] = blob
    return port


def to_detectron2(blobs: Blobs) -> dict[str, np.ndarray]:
    """As airsplay's port has them: background last, a logit per anchor, all ratios of a scale before the next scale."""
    port = _to_port(blobs)
    head, rpn = "roi_heads.box_predictor.", "proposal_generator.rpn_head."
    order = [4 * ratio + scale for scale in range(4) for ratio in range(3)]  # theirs -> Caffe's
    for part in ("weight", "bias"):
        both = port[f"{rpn}objectness_logits.{part}"]
        port[f"{rpn}objectness_logits.{part}"] = (both[12:] - both[:12])[order]
        deltas = port[f"{rpn}anchor_deltas.{part}"]
        port[f"{rpn}anchor_deltas.{part}"] = np.concatenate([deltas[4 * each : 4 * each + 4] for each in order])
        port[f"{head}cls_score.{part}"] = np.roll(port[f"{head}cls_score.{part}"], -1, 0)
        port[f"{head}bbox_pred.{part}"] = port[f"{head}bbox_pred.{part}"][4:]
    if "fc_attr" in blobs:
        port[f"{head}cls_embedding.weight"] = np.roll(blobs["cls_embedding"][0], -1, 0)
        for part, hidden, score in zip(("weight", "bias"), blobs["fc_attr"], blobs["attr_score"], strict=True):
            port[f"{head}fc_attr.{part}"] = hidden
            port[f"{head}attr_score.{part}"] = np.roll(score, -1, 0)
    return port


def _to_port(blobs: Blobs) -> dict[str, np.ndarray]:
    port: dict[str, np.ndarray] = {}
    parts = {"branch2a": "conv1", "branch2b": "conv2", "branch2c": "conv3", "branch1": "shortcut"}
    for name, made in blobs.items():
        if name == "conv1":
            ours, place = "backbone.stem.conv1", "_conv1"
        elif name.startswith("res"):
            place = name.removeprefix("res")
            block, part = place.split("_")
            number = 0 if block[1:] == "a" else int(block[2:]) if block[2:] else "abc".index(block[1])
            where = "roi_heads" if block[0] == "5" else "backbone"
            ours = f"{where}.res{block[0]}.{number}.{parts[part]}"
        else:
            continue
        mean, variance, factor = blobs[f"bn{place}"]
        gamma, beta = blobs[f"scale{place}"]
        port[f"{ours}.weight"] = made[0]
        port[f"{ours}.norm.weight"], port[f"{ours}.norm.bias"] = gamma, beta
        port[f"{ours}.norm.running_mean"], port[f"{ours}.norm.running_var"] = mean / factor, variance / factor
    rpn, head = "proposal_generator.rpn_head.", "roi_heads.box_predictor."
    for caffe, named in (
        ("rpn_conv/3x3", f"{rpn}conv"),
        ("rpn_cls_score", f"{rpn}objectness_logits"),
        ("rpn_bbox_pred", f"{rpn}anchor_deltas"),
        ("cls_score", f"{head}cls_score"),
        ("bbox_pred", f"{head}bbox_pred"),
    ):
        port[f"{named}.weight"], port[f"{named}.bias"] = blobs[caffe]
    return port
