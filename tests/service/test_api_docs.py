"""docs/api.md tells what is so: its codes, addresses, settings, and its Python, which is run."""

from __future__ import annotations

import re
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from service.errors import KINDS
from service.schemas import CaptionOptions
from service.settings import Settings
from tests.service import pictures
from tests.service.test_process import serving, wait_ready

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
RESERVED = {"min_speed", "max_speed"}  # taken, and without effect yet


def test_every_problem_is_in_the_table_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PAGE, re.MULTILINE))
    assert rows == {code: str(kind.status) for code, kind in KINDS.items()}


def test_every_address_and_option_is_told_of(app: FastAPI) -> None:
    for path in app.openapi()["paths"]:
        assert path in PAGE, path
    for name in set(CaptionOptions.model_fields) - RESERVED:
        assert f"| `{name}` |" in PAGE, name


def test_what_it_calls_a_setting_is_one() -> None:
    told = set(re.findall(r"DEECAP_\w+", PAGE)) - {"DEECAP_CLIENT_URL", "DEECAP_CLIENT_KEY", "DEECAP_API_KEY"}
    assert told <= {f"DEECAP_{name.upper()}" for name in Settings.model_fields}
    assert told


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_its_python_runs(
    app: FastAPI, snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.jpg").write_bytes(pictures.jpeg())
    monkeypatch.chdir(tmp_path)
    with serving(app) as address:
        with httpx.Client(base_url=address) as client:
            wait_ready(client)
        exec(snippet.replace("127.0.0.1:8000", address.removeprefix("http://")), {})
    assert " 48 32" in capsys.readouterr().out


def test_there_is_python_for_both_clients() -> None:
    assert ["triton" in snippet for snippet in SNIPPETS] == [True, False]
