"""`deecap calibrate`: measures a bundle's speed table on validation photos and writes it into the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from service.commands.loading import load_captioner, read_settings, stop


def calibrate(
    captions: Annotated[Path, typer.Option(help="Karpathy-style JSON with the human captions.")],
    photos: Annotated[Path, typer.Option(help="Folder of image files or tar archives.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    split: Annotated[str, typer.Option(help="Which photos of the file: never the test split.")] = "val",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
) -> None:
    """Measure SpeedUp, CIDEr-D and milliseconds over a range of thresholds; sets the tiers' thresholds."""
    from model.bundle import SPEEDS, write_json
    from model.evaluation.calibrate import calibrate as measure
    from model.evaluation.data import look_at_split
    from model.evaluation.evaluate import machine

    settings = read_settings(bundle=bundle, device=device)
    captioner = load_captioner(settings)
    try:
        seen = look_at_split(captioner, captions, photos, split, limit)
        how = {
            "split": f"{captions.stem} {split}, {len(seen.names)} photos",
            "search": "greedy",
            "cider": "CIDEr-D x 100 on the given tokens",
            "describe_ms": "mean of encoder and words, one photo at a time",
            "command": "deecap calibrate",
            "machine": machine(captioner),
        }
        table = measure(captioner, seen, how)
    except (ValueError, FileNotFoundError) as error:
        stop(str(error))
    write_json(settings.bundle / SPEEDS, table.to_json())
    for name, tau in table.tiers.items():
        row = next(row for row in table.rows if row.tau == tau)
        typer.echo(
            f"{name:9} tau {tau:.4f}  SpeedUp {row.speedup:.2f}  CIDEr-D {row.cider:.1f}  {row.describe_ms:.1f} ms"
        )
