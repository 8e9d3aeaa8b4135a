"""`deecap extract`: writes the region features of a folder of photos, for training and for other people's code."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from service.commands.caption import INTERRUPTED, shown
from service.commands.loading import read_settings, require_onnx_runtime, stop
from service.commands.photo_files import UnreadableError, find_photos, read_photo

if TYPE_CHECKING:
    from model.bottom_up.extractor import Extractor
    from model.feature_files import FeatureFiles
    from service.images import ImageLimits
    from service.settings import Settings


@dataclass
class Run:
    """What is the same for every photo, and how it goes so far."""

    extractor: Extractor
    files: FeatureFiles
    limits: ImageLimits
    written: int = 0
    failed: int = 0

    def extract(self, path: Path) -> None:
        """Writes the photo's features; a file that is not a whole image is reported, and counted."""
        from tqdm import tqdm

        try:
            image = read_photo(path, self.limits)
            regions = self.extractor.look([image])[0]
        except (UnreadableError, OSError) as error:
            tqdm.write(f"{shown(path)}: {error}", file=sys.stderr)  # which leaves a progress bar whole
            self.failed += 1
            return
        self.files.write(path, regions, image.size)
        self.written += 1


def extract(
    photos: Annotated[list[Path], typer.Option(help="Folder of photos, or a photo; may be given several times.")],
    out: Annotated[Path, typer.Option(help="Folder for .npz files, or an .hdf5 file. What is there is kept.")],
    format_: Annotated[
        str | None, typer.Option("--format", help="npz or hdf5. Default: hdf5 for a name that ends so, else npz.")
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="Folder with the extractor: a model's, or what convert-vg wrote.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. Default: auto.")] = None,
) -> None:
    """Write region features of photos: vectors, boxes and, where the extractor knows, classes.

    The same command goes on after a stop. A file that is no image is reported and the rest goes on; the exit code is
    then 1. Features of two extractors are never mixed.
    """
    require_onnx_runtime()
    from model.feature_files import FORMATS, HDF5_SUFFIXES, FeatureFilesError, open_feature_files
    from service.images import ImageLimits

    kind = format_ or ("hdf5" if out.suffix.lower() in HDF5_SUFFIXES else "npz")
    if kind not in FORMATS:
        stop(f"--format must be one of {', '.join(FORMATS)}, not {kind!r}")
    try:
        found = find_photos(photos)
    except FileNotFoundError as error:
        stop(str(error))
    settings = read_settings(bundle=bundle, device=device)
    extractor, revision = load_extractor(settings)
    try:
        files = open_feature_files(out, kind, revision, found)
    except (FeatureFilesError, ModuleNotFoundError) as error:
        stop(str(error))
    except OSError as error:
        stop(f"cannot write {shown(out)}: {error.strerror}", code=1)
    run = Run(extractor, files, ImageLimits(settings.max_pixels, settings.min_side))
    wanted = [path for path in found if not files.has(path)]
    _extract_all(run, wanted, out)
    if len(wanted) < len(found):
        typer.echo(f"{len(found) - len(wanted)} were already in {shown(out)}", err=True)
    typer.echo(f"{run.written} photos' features written to {shown(out)}, by extractor {revision}", err=True)
    if run.failed:
        typer.echo(f"{run.failed} of {len(found)} photos have none", err=True)
        raise typer.Exit(1)


def load_extractor(settings: Settings) -> tuple[Extractor, str]:
    """The extractor of the settings' bundle, on their device, and its revision; no other part of it need be there.

    Ends the command where it cannot be loaded.
    """
    from model.bottom_up.extractor import Extractor, ExtractorError, revision_of_extractor
    from model.bundle import EXTRACTOR, BundleError
    from model.captioner import choose_device

    path = settings.bundle / EXTRACTOR
    if not path.is_file():
        stop(f"there is no {EXTRACTOR} in {shown(settings.bundle)}")
    try:
        return Extractor(path, choose_device(settings.device), settings.threads), revision_of_extractor(path)
    except (BundleError, ExtractorError) as error:
        stop(str(error))


def _extract_all(run: Run, photos: list[Path], out: Path) -> None:
    from tqdm import tqdm

    try:
        with tqdm(photos, unit="photo", disable=None) as progress:
            for path in progress:
                run.extract(path)
    except OSError as error:
        stop(f"cannot write {shown(out)}: {error.strerror or error}", code=1)
    except KeyboardInterrupt:
        stop(f"stopped with {run.written} more in {shown(out)}; the same command goes on from there", code=INTERRUPTED)
    finally:
        run.files.close()
