"""SPICE (Anderson et al. 2016) by pycocoevalcap, where Java and the parser's jars are there; else why not."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

JARS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def spice_or_reason(candidates: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> float | str:
    """SPICE x 100 of the corpus, or "not run: reason": it is never replaced, and nothing is downloaded for it.

    `candidates`: images x tokens; `references`: images x references x tokens. The parser's jars are those that
    pycocoevalcap looks for in its own `spice/lib`; it takes several gigabytes of memory.
    """
    if shutil.which("java") is None:
        return "not run: there is no Java on the path"
    try:
        package: Any = importlib.import_module("pycocoevalcap.spice.spice")
    except ModuleNotFoundError:
        return "not run: pycocoevalcap is not installed"
    library = Path(package.__file__).parent / "lib"
    missing = [jar for jar in JARS if not (library / jar).exists()]
    if missing:
        return f"not run: {' and '.join(missing)} not there"
    found = {image: [" ".join(tokens)] for image, tokens in enumerate(candidates)}
    truth = {image: [" ".join(tokens) for tokens in one] for image, one in enumerate(references)}
    try:
        return 100.0 * float(package.Spice().compute_score(truth, found)[0])
    except Exception as error:  # whatever Java or its wrapper ends with: a figure is missing, the others stand
        return f"not run: failed ({error})"
