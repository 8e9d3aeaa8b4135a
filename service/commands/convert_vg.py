"""`deecap convert-vg`: makes an extractor of a weights file of the Visual Genome detector."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import require_onnx_runtime, stop


def convert_vg(
    weights: Annotated[
        Path, typer.Argument(help="Pickle of Caffe's layers, or .pth/.pkl of a PyTorch port.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder to write extractor.onnx to.")],
    precision: Annotated[str, typer.Option(help="What weights are kept in: float32, or float16 (half the file).")] = (
        "float32"
    ),
) -> None:
    """Convert weights of the bottom-up attention detector (Faster R-CNN, ResNet-101, Visual Genome) to ONNX.

    The file is read without running anything in it, every tensor is checked, and the result is compared with PyTorch on
    one image before it is written: minutes on a CPU, and some gigabytes of memory.
    """
    require_onnx_runtime()
    from model.bottom_up.visual_genome.convert import PRECISIONS, ConversionError, convert
    from model.bottom_up.visual_genome.tensors import WeightsError

    if precision not in PRECISIONS:
        stop(f"--precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    try:
        done = convert(weights, out, precision)
    except WeightsError as error:
        stop(str(error))
    except ConversionError as error:
        stop(str(error), code=1)
    except OSError as error:
        stop(f"cannot write to {out}: {error.strerror}", code=1)
    unused = f"{len(done.read.unused)} of them not needed, " if done.read.unused else ""
    heads = "objects and attributes" if done.read.detector.attribute_head else "objects, no attributes"
    typer.echo(f"{weights}: {done.read.tensors} tensors, named as in {done.read.naming}, {unused}{heads}")
    typer.echo(f"{done.path}: {done.regions} regions on the image of the check, {done.same:.0%} as PyTorch finds them")
    typer.echo(f"next: deecap extract --photos PHOTOS --out FEATURES --bundle {out}", err=True)
