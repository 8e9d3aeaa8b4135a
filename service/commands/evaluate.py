"""`deecap evaluate`: caption metrics and the three SpeedUps of a bundle, as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.commands.loading import load_captioner, read_settings, stop


def evaluate(
    captions: Annotated[Path, typer.Option(help="The human captions: Karpathy's JSON, or COCO's own.")],
    photos: Annotated[Path, typer.Option(help="Folder of image files or tar archives.")],
    bundle: Annotated[Path | None, typer.Option(help="Folder of the model. Default: the one that ships.")] = None,
    split: Annotated[str, typer.Option(help="Which photos of the file.")] = "val",
    speed: Annotated[str | None, typer.Option(help="A tier or a number. Default: balanced.")] = None,
    tau: Annotated[float | None, typer.Option(help="Entropy threshold in nats, in place of a speed.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another bundle to compare with, at the same speed.")] = None,
    against_speed: Annotated[
        str | None, typer.Option(help="The speed to compare with: of --against, or else of the same bundle.")
    ] = None,
    beam: Annotated[int, typer.Option(min=1, max=5, help="Hypotheses per photo.")] = 1,
    ptb: Annotated[bool, typer.Option(help="Score on PTB tokens as well; needs Java.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many photos.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    coco_results: Annotated[
        Path | None, typer.Option(help="Also write the captions here as COCO's evaluation server takes them.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON here.")] = None,
) -> None:
    """Measure a bundle on a captioned split; prints JSON, scores x 100 on the given tokens.

    Photos without captions, as COCO's test photos are, can be captioned with --coco-results, and are not scored.
    """
    from model.evaluation.coco_results import write_coco_results
    from model.evaluation.data import look_at_split
    from model.evaluation.evaluate import compare, describe_all, machine
    from model.evaluation.evaluate import evaluate as measure
    from model.evaluation.metrics import JavaError
    from model.exits import DEFAULT_SPEED, UnknownSpeedError

    if against and tau is not None and against_speed is None:
        stop("--against compares at a speed: thresholds of two models mean different things")
    captioner = load_captioner(read_settings(bundle=bundle, device=device))
    other = load_captioner(read_settings(bundle=against, device=device)) if against else captioner
    other_speed = against_speed or speed or DEFAULT_SPEED
    try:
        asked = captioner.speeds.resolve(speed, tau)
        if against or against_speed:
            other.speeds.resolve(other_speed)  # what is not there is told of before the work, not after it
        seen = look_at_split(captioner, captions, photos, split, limit)
        about = {"captions": str(captions), "split": split, "speed": asked.requested, "machine": machine(captioner)}
        run = describe_all(captioner, seen, asked.tau, beam)
        if coco_results:
            write_coco_results(coco_results, seen.names, seen.numbers, run.words)
        if coco_results and not any(seen.references):
            result: dict[str, Any] = {
                **about,
                "photos": len(seen.names),
                "scores": "not run: there are no human captions",
            }
        else:
            result = {**about, **measure(captioner, seen, run, asked, beam, ptb)}
        if against or against_speed:
            seen_by_other = look_at_split(other, captions, photos, split, limit) if against else seen
            result["against"] = compare(run, other, seen_by_other, other_speed, beam)
    except (UnknownSpeedError, ValueError, FileNotFoundError, ModuleNotFoundError, JavaError) as error:
        stop(str(error))
    text = json.dumps(result, indent=1)
    typer.echo(text)
    if out:
        out.write_text(text + "\n")
