"""The preview draws every dashboard from a real Prometheus."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.deploy import queries
from tests.deploy.compose import ROOT, Compose


def test_every_dashboard_is_drawn(stack: Compose, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "deploy/grafana/preview.py"), "--minutes", "1", "--interval", "20s"]
    place = ["--prometheus", stack.url("prometheus", 9090), "--out", str(tmp_path)]
    done = subprocess.run([*command, *place], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for path in queries.DASHBOARDS.glob("*.json"):
        with Image.open(tmp_path / f"{path.stem}.png") as picture:
            colours = picture.convert("RGB").getcolors(maxcolors=picture.width * picture.height)
            assert colours is not None
            assert len(colours) > 100, f"{path.stem} is all but empty"
