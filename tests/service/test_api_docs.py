"""docs/api.md tells what is so: its codes, addresses, settings, and its Python and curl, which are run."""

from __future__ import annotations

import re
import shutil
import subprocess
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
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_every_problem_is_in_the_table_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d{3}) \|", PAGE, re.MULTILINE))
    assert rows == {code: str(kind.status) for code, kind in KINDS.items()}


def test_every_address_and_option_is_told_of(app: FastAPI) -> None:
    for path in app.openapi()["paths"]:
        assert path in PAGE, path
    for name in CaptionOptions.model_fields:
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
    assert ["triton" in snippet for snippet in SNIPPETS] == [True, False, False]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_its_curl_runs(app: FastAPI, tmp_path: Path) -> None:
    """Each line of each shell snippet of this service, in order; `ID` is what the answer before it said."""
    for name in ("photo.jpg", "a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(pictures.jpeg())
    lines = [line for snippet in SHELL for line in snippet.splitlines() if line.startswith("curl ")]
    assert len(lines) >= 8
    said: list[str] = []
    with serving(app) as address:
        with httpx.Client(base_url=address) as client:
            wait_ready(client)
        for line in lines:
            job = re.findall(r"(?i)^location: /v1/jobs/(\w+)", "\n".join(said), re.MULTILINE)
            command = line.replace("http://127.0.0.1:8000", address).replace("/ID", f"/{job[-1]}" if job else "/ID")
            done = subprocess.run(
                ["bash", "-c", command.replace("curl ", "curl --silent --show-error --fail-with-body ", 1)],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                timeout=30,
            )
            assert done.returncode == 0, (line, done.stdout, done.stderr)
            said.append(done.stdout)
    assert sum(" 48 32" in each for each in said) >= len(lines) - 3, said  # not of a job, before it is done
    assert "event: caption" in "".join(said)


def test_every_problem_of_the_api_has_an_example(app: FastAPI) -> None:
    """And the other way round: no example of the document is of a kind that is none."""
    shown = set(re.findall(r"'type': '/problems/(\w+)'", str(app.openapi()["paths"])))
    assert shown <= set(KINDS)
    assert {"unknown_job", "too_many_images", "key_reused"} <= shown


def test_nothing_is_reserved_any_more(app: FastAPI) -> None:
    assert "eserved" not in str(app.openapi())


def test_every_operation_has_an_example(app: FastAPI) -> None:
    for path, operations in app.openapi()["paths"].items():
        if path.startswith(("/v1/caption", "/v1/jobs")):
            for method, operation in operations.items():
                for status, response in operation["responses"].items():
                    for kind, content in response.get("content", {}).items():
                        assert "example" in content or "examples" in content, (path, method, status, kind)
