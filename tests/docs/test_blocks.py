"""What README and docs tell people to type is run, or says why not; and then its commands and options exist."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import click
import httpx
import pytest
import typer

from service.cli import app
from tests.docs.blocks import OTHER, PAGES, PYTHON, ROOT, SHELL, Block, blocks

BLOCKS = [block for page in PAGES for block in blocks(page)]
RUN = [block for block in BLOCKS if block.reason is None and block.language not in OTHER]
HOST = "127.0.0.1:8000"  # what the pages call the service
SECONDS = 60
PHOTOS = {"photo.jpg": "cat.jpg", "a.jpg": "astronaut.jpg", "b.jpg": "coffee.jpg"}  # what the pages call the reader's


def names(chosen: list[Block]) -> list[str]:
    return [block.name for block in chosen]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Host and port of a service with the bundle that ships, in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("service") / "log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", "from service.cli import main; main()", "serve", "--port", str(port)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=output, stderr=output)
    try:
        end = time.monotonic() + SECONDS
        while not ready(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(SECONDS)


def ready(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def environment() -> dict[str, str]:
    """That of the tests, without the developer's own settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DEECAP_")}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader stands: the project's folder, and photos of their own in it."""
    for name in ("model", "service", "samples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, sample in PHOTOS.items():
        shutil.copy(ROOT / "samples" / sample, tmp_path / name)
    (tmp_path / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "deecap"  # that of these sources, wherever another one is installed
    command.write_text(f"#!{sys.executable}\nfrom service.cli import main\nmain()\n")
    command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("block", RUN, ids=names(RUN))
def test_what_is_told_is_run(block: Block, service: str, folder: Path) -> None:
    text = block.text.replace(HOST, service)
    shell = block.language in SHELL or block.language == "indented"
    assert shell or block.language in PYTHON, (
        f"{block.name}: what is to be done with {block.language or 'no language'}?"
    )
    if block.language == "console":
        text = "".join(line[2:] + "\n" for line in text.splitlines() if line.startswith("$ "))
    command = ["sh", "-euc", text] if shell else [sys.executable, "-c", text]
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=folder,
        env={**environment(), "PATH": path, "CURL_HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{block.name}: {done.stdout}{done.stderr}"
    assert done.stdout.strip(), f"{block.name}: it says nothing"
    assert "problems/" not in done.stdout


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "json"], ids=lambda block: block.name)
def test_json_is_json(block: Block) -> None:
    assert json.loads(block.text)


def test_a_block_that_is_not_run_says_why() -> None:
    assert [block.name for block in BLOCKS if block.reason is not None and len(block.reason) < 10] == []
    assert len(RUN) > 5


def commands() -> dict[str, click.Command]:
    """Every command of `deecap` by its name, those of groups as "group name" and the group alone too."""
    found: dict[str, click.Command] = {}

    def add(prefix: str, command: click.Command) -> None:
        found[prefix] = command
        if hasattr(command, "commands"):
            for name, inner in command.commands.items():
                add(f"{prefix} {name}".strip(), inner)

    add("", typer.main.get_command(app))
    return found


@pytest.mark.parametrize("block", [block for block in BLOCKS if "deecap " in block.text], ids=lambda block: block.name)
def test_commands_and_options_exist(block: Block) -> None:
    known = commands()
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.match(r"(?:[A-Z_]+=\S+ +)*deecap +(.*)", line)
        if found is None:
            continue
        words = shlex.split(found[1], comments=True)
        name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
        assert name in known, f"{block.name}: deecap {name}"
        options = {option for parameter in known[name].params for option in parameter.opts + parameter.secondary_opts}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= options | {"--help"}, f"{block.name}: deecap {name}"


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    told = {
        target
        for block in BLOCKS
        if block.language in (*SHELL, "indented")
        for target in re.findall(r"^make ([a-z-]+)", block.text, re.MULTILINE)
    }
    assert told <= targets
    assert told
