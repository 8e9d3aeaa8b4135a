"""`deecap caption`: what it prints, what it refuses, and that a stopped run can be continued."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from pydantic import SecretStr

from service.app import create_app
from service.commands.caption import _words_to_screen
from service.commands.caption_at import Piece
from service.settings import Settings
from tests.service.fakes import FakeCaptioner
from tests.service.test_process import free_port, serving


def test_one_photo_prints_its_caption_alone(command, captioner, photos):
    (photo,) = photos(30)
    result = command("caption", photo)
    assert (result.exit_code, result.stdout) == (0, "width 30\n")


def test_several_photos_print_path_and_caption(command, captioner, photos):
    first, second = photos(30, 40)
    result = command("caption", first, second)
    assert result.stdout == f"{first}\twidth 30\n{second}\twidth 40\n"


def test_a_folder_gives_its_photos_by_name_and_nothing_hidden(command, captioner, photos):
    first, second = photos(30, 40)
    folder = first.parent
    (folder / "notes.txt").write_text("not a photo")
    first.rename(folder / ".hidden.png")
    (folder / "below").mkdir()
    second.rename(folder / "below" / "B.PNG")
    result = command("caption", folder)
    assert result.stdout == f"{folder / 'below' / 'B.PNG'}\twidth 40\n"


def test_a_photo_named_twice_is_captioned_once(command, captioner, photos):
    (photo,) = photos(30)
    command("caption", photo, photo, photo.parent)
    assert captioner.seen == [30]


def test_json_tells_words_exits_and_certainty(command, captioner, photos):
    (photo,) = photos(30)
    result = command("caption", photo, "--json", "--speed", "fast", "--beam", "3")
    answer = json.loads(result.stdout)
    assert answer["path"] == str(photo)
    assert answer["caption"] == "width 30"
    assert answer["words"] == [
        {"text": "width", "exit_layer": 1, "entropy": 0.5},
        {"text": "30", "exit_layer": 2, "entropy": 0.5},
    ]
    assert answer["confidence"] == pytest.approx(0.5)
    assert answer["speedup"] == pytest.approx(6 * 3 / (1 + 2 + 3))
    assert answer["speed"] == {"requested": "fast", "tier": "fast", "tau": 2.0, "promised": 3.0}
    assert answer["model"] == {"name": "fake", "revision": "0123456789ab"}
    assert captioner.beams == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--speed", "warp"], "speed must be one of full, balanced, fast, turbo or a number from 1 to 5.00"),
        (["--speed", "0.5"], "a number from 1 to 5.00"),
        (["--speed", "fast", "--tau", "1"], "give speed or tau, not both"),
        (["--tau", "nan"], "tau must be a finite number"),
        (["--beam", "6"], "Invalid value for '--beam'"),
        (["--device", "abacus"], "DEECAP_DEVICE"),
    ],
)
def test_what_cannot_be_asked_ends_with_code_2_and_says_why(command, captioner, photos, options, message):
    result = command("caption", *photos(30), *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stdout == ""


def test_a_number_is_a_speed(command, captioner, photos):
    result = command("caption", *photos(30), "--json", "--speed", "2.5")
    assert json.loads(result.stdout)["speed"]["requested"] == 2.5


def test_a_missing_path_ends_with_code_2_before_anything_is_captioned(command, captioner, photos, tmp_path):
    result = command("caption", *photos(30), tmp_path / "nowhere.jpg")
    assert result.exit_code == 2
    assert "no such file or folder" in result.stderr
    assert captioner.seen == []


def test_a_folder_without_photos_ends_with_code_2(command, captioner, tmp_path):
    result = command("caption", tmp_path)
    assert result.exit_code == 2
    assert "no photo in" in result.stderr


def test_a_broken_image_is_reported_and_the_rest_goes_on(command, captioner, photos):
    first, second, third = photos(30, 40, 50)
    first.write_text("no picture at all")
    second.write_bytes(second.read_bytes()[:60])
    result = command("caption", first, second, third)
    assert result.exit_code == 1
    assert result.stdout == f"{third}\twidth 50\n"
    first_line, second_line, count = result.stderr.splitlines()
    assert first_line.startswith(f"{first}: The first bytes are of no known image format")
    assert second_line.startswith(f"{second}: The image is broken or incomplete")
    assert count == "2 of 3 photos could not be captioned"


def test_out_writes_one_record_per_photo(command, captioner, photos, tmp_path):
    out = tmp_path / "captions.jsonl"
    paths = photos(30, 40)
    result = command("caption", *paths, "--out", out)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert result.exit_code == 0
    assert result.stdout == ""
    assert [(record["path"], record["caption"]) for record in records] == [
        (str(paths[0]), "width 30"),
        (str(paths[1]), "width 40"),
    ]


def test_out_continues_where_an_earlier_run_stopped(command, captioner, photos, tmp_path):
    out = tmp_path / "captions.jsonl"
    first, second, third = photos(30, 40, 50)
    command("caption", first, second, "--out", out)
    before = out.read_text()
    result = command("caption", first, second, third, "--out", out)
    assert captioner.seen == [30, 40, 50]
    assert out.read_text().startswith(before)
    assert "2 were already in" in result.stderr


@pytest.mark.parametrize("kept", [1, 8, 9, 20, -2])
def test_out_mends_a_line_that_was_cut_off(command, captioner, photos, tmp_path, kept):
    out = tmp_path / "captions.jsonl"
    paths = photos(30, 40)
    command("caption", *paths, "--out", out)
    whole = out.read_text()
    first, second = whole.splitlines()
    out.write_text(f"{first}\n{second[:kept]}")
    assert command("caption", *paths, "--out", out).exit_code == 0
    assert out.read_text() == whole
    assert captioner.seen == [30, 40, 40]


def test_out_keeps_a_last_line_that_lacks_only_its_end(command, captioner, photos, tmp_path):
    out = tmp_path / "captions.jsonl"
    paths = photos(30, 40)
    command("caption", *paths, "--out", out)
    whole = out.read_text()
    out.write_text(whole.rstrip("\n"))
    command("caption", *paths, "--out", out)
    assert out.read_text() == whole
    assert captioner.seen == [30, 40]


@pytest.mark.parametrize(
    "content", ["dear diary", "dear diary\n", '{"path": 3}\n', "[1]\n", '{"path": "x", "capt\nion']
)
def test_out_leaves_a_file_that_is_not_ours_alone(command, captioner, photos, tmp_path, content):
    out = tmp_path / "diary.txt"
    out.write_text(content)
    result = command("caption", *photos(30), "--out", out)
    assert result.exit_code == 2
    assert "is not a caption of ours" in result.stderr
    assert out.read_text() == content


def test_a_photo_that_failed_is_tried_again(command, captioner, photos, tmp_path):
    out = tmp_path / "captions.jsonl"
    first, second = photos(30, 40)
    good = first.read_bytes()
    first.write_bytes(good[:50])
    assert command("caption", first, second, "--out", out).exit_code == 1
    first.write_bytes(good)
    assert command("caption", first, second, "--out", out).exit_code == 0
    assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == ["width 40", "width 30"]


def test_ctrl_c_leaves_a_file_that_can_be_continued(command, captioner, photos, tmp_path, monkeypatch):
    out = tmp_path / "captions.jsonl"
    paths = photos(30, 40)
    look = captioner.look

    def interrupted(image):
        if image.width == 40:
            raise KeyboardInterrupt
        return look(image)

    monkeypatch.setattr(captioner, "look", interrupted)
    result = command("caption", *paths, "--out", out)
    assert result.exit_code == 130
    assert "the same command goes on" in result.stderr
    assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == ["width 30"]


def test_a_name_that_is_no_text_is_printed_and_recorded(command, captioner, photos, tmp_path):
    (photo,) = photos(30)
    try:
        odd = photo.rename(photo.with_name("caf\udce9.png"))
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    out = tmp_path / "captions.jsonl"
    assert command("caption", odd.parent).stdout.endswith("caf\\udce9.png\twidth 30\n")
    command("caption", odd.parent, "--out", out)
    assert json.loads(out.read_text())["path"] == str(odd)


def test_an_output_that_cannot_be_written_is_no_fault_of_the_photo(command, captioner, photos, tmp_path):
    result = command("caption", *photos(30), "--out", tmp_path / "no" / "folder" / "captions.jsonl")
    assert result.exit_code == 1
    assert "cannot write" in result.stderr


def test_two_onnx_runtimes_are_refused(command, captioner, photos, monkeypatch):
    monkeypatch.setattr("service.requirements_check.installed_version", lambda name: "1.20.0")
    result = command("caption", *photos(30))
    assert result.exit_code == 1
    assert "overwrite each other" in result.stderr


def test_a_folder_that_is_no_bundle_is_refused(command, photos, tmp_path):
    result = command("caption", *photos(30), "--bundle", tmp_path)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr


class TestAtAService:
    """`--url`: a real server on a real port, over a fake model that says `<brightness> <width> <height>`."""

    @pytest.fixture
    def service(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
        monkeypatch.setattr("service.worker.TAKE_SECONDS", 0.02)
        keys = Settings(api_keys=SecretStr("correct-horse"), max_pixels=2_000)
        with serving(create_app(keys, load=FakeCaptioner)) as address:
            while httpx.get(f"{address}/readyz").status_code != 200:
                time.sleep(0.01)
            monkeypatch.setenv("DEECAP_CLIENT_KEY", "correct-horse")
            yield address

    def test_it_prints_what_it_prints_without(self, command, captioner, photos, service):
        first, second = photos(30, 40)
        assert command("caption", first, "--url", service).stdout.split() == ["75", "30", "20"]
        several = command("caption", first.parent, "--url", service).stdout
        assert several == f"{first}\t75 30 20\n{second}\t75 40 20\n"
        words = ["caption", first, "--json", "--speed", "fast", "--beam", "3"]
        here, there = (json.loads(command(*words, *more).stdout) for more in ([], ["--url", service]))
        assert list(here) == list(there)
        assert here["speed"] == there["speed"]
        assert list(here["words"][0]) == list(there["words"][0])
        assert there["model"] == {"name": "fake", "revision": "0123456789ab"}

    def test_photos_that_are_none_do_not_stop_the_others(self, command, photos, service):
        first, second, third = photos(30, 40, 1000)
        first.write_text("no picture at all")
        result = command("caption", first, second, third, "--url", service)
        assert result.exit_code == 1
        assert result.stdout == f"{second}\t75 40 20\n"
        none, large, count = result.stderr.splitlines()
        assert none.startswith(f"{first}: The first bytes are of no known image format")
        assert large.startswith(f"{third}: The image is 1000 x 20 pixels")
        assert count == "2 of 3 photos could not be captioned"

    def test_a_run_goes_on_at_a_service(self, command, captioner, photos, tmp_path, service):
        out = tmp_path / "captions.jsonl"
        first, second, third = photos(30, 40, 50)
        assert command("caption", first, "--out", out).exit_code == 0
        result = command("caption", first, second, third, "--out", out, "--url", service, "--concurrency", "2")
        assert (result.exit_code, result.stdout) == (0, "")
        assert "2 captioned into" in result.stderr
        assert "1 were already in" in result.stderr
        captions = [json.loads(line)["caption"] for line in out.read_text().splitlines()]
        assert captions == ["width 30", "75 40 20", "75 50 20"]

    @pytest.mark.parametrize(
        ("options", "code", "says"),
        [
            (
                ["--speed", "warp"],
                2,
                "error: speed must be one of full, balanced, fast, turbo or a number from 1 to 4.5",
            ),
            (["--speed", "fast", "--tau", "1"], 2, "give speed or tau, not both"),
            (["--device", "cpu"], 2, "a service has its own"),
            (["--bundle", "x"], 2, "a service has its own"),
            (["--stream", "--json"], 2, "goes with neither"),
            (["--stream", "--out", "x.jsonl"], 2, "goes with neither"),
            (["--stream", "--speed", "warp"], 2, "error: speed must be one of"),
        ],
    )
    def test_what_cannot_be_asked(self, command, photos, service, options, code, says):
        result = command("caption", *photos(30, 40), "--url", service, *options)
        assert (result.exit_code, result.stdout) == (code, "")
        assert says in result.stderr

    def test_words_as_they_come(self, command, photos, service):
        first, second, third = photos(30, 40, 50)
        assert command("caption", first, "--url", service, "--stream").stdout == "75 30 20\n"
        second.write_text("no picture at all")
        result = command("caption", first, second, third, "--url", service, "--stream")
        assert result.exit_code == 1
        assert result.stdout == f"{first}\t75 30 20\n{third}\t75 50 20\n"
        assert result.stderr.startswith(f"{second}: The first bytes are of no known image format")
        alone = command("caption", first, "--stream")
        assert (alone.exit_code, alone.stdout) == (2, "")
        assert "it needs --url" in alone.stderr

    def test_a_caption_that_begins_again_begins_a_line(self, monkeypatch, capsys):
        pieces = [Piece("a", "one"), Piece("a", "two"), Piece("a", "three", again=True), Piece("a", done=True)]
        pieces += [Piece("b", "four"), Piece("b", failed="made up")]
        assert _words_to_screen(pieces, alone=False) == 1
        said = capsys.readouterr()
        assert said.out == "a\tone two ...\na\tthree\nb\tfour ...\n"
        assert said.err == "b: made up\n"

    def test_who_has_no_key_and_what_is_no_address(self, command, photos, service, monkeypatch):
        monkeypatch.setenv("DEECAP_CLIENT_KEY", "wrong-horse")
        result = command("caption", *photos(30), "--url", service)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "not known" in result.stderr
        result = command("caption", *photos(30), "--url", "localhost:8000")
        assert result.exit_code == 2
        assert "the address must be like http://127.0.0.1:8000, not localhost:8000" in result.stderr

    def test_a_service_that_is_not_there(self, command, photos, monkeypatch):
        monkeypatch.setattr("service.commands.caption_at.FIRST_SECONDS", 0.3)
        url = f"http://127.0.0.1:{free_port()}"
        result = command("caption", *photos(30), "--url", url)
        assert (result.exit_code, result.stdout) == (1, "")
        assert result.stderr.startswith(f"error: {url}: ConnectError")

    def test_a_service_that_goes_away_leaves_a_file_that_can_be_continued(
        self, command, photos, tmp_path, service, monkeypatch
    ):
        out = tmp_path / "captions.jsonl"
        real = httpx.Client.request

        def request(self: httpx.Client, method: str, path: str, **more: object) -> httpx.Response:
            if method == "POST" and captioned:
                raise httpx.ConnectError("gone")
            captioned.append(path) if method == "POST" else None
            return real(self, method, path, **more)

        captioned: list[str] = []
        monkeypatch.setattr(httpx.Client, "request", request)
        monkeypatch.setattr("service.commands.caption_at.SECONDS", 2.0)
        result = command("caption", *photos(30, 40, 50), "--out", out, "--url", service, "--concurrency", "1")
        assert result.exit_code == 1
        assert "gone: stopped with 1 more in" in result.stderr
        assert [json.loads(line)["caption"] for line in out.read_text().splitlines()] == ["75 30 20"]

    def test_it_needs_httpx_and_says_so_and_no_settings(self, command, photos, service, monkeypatch):
        monkeypatch.setenv("DEECAP_PROT", "1")  # a server would not start
        assert command("caption", *photos(30), "--url", service).exit_code == 0
        for name in [name for name in sys.modules if name.startswith("service.client")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.delattr("service.client", raising=False)
        monkeypatch.setitem(sys.modules, "httpx", None)
        result = command("caption", *photos(30), "--url", service)
        assert result.exit_code == 1
        assert "pip install '.[client]'" in result.stderr

    def test_it_loads_no_torch(self, photos, service):
        script = (
            "import sys\n"
            "from typer.testing import CliRunner\n"
            "from service.cli import app\n"
            f"result = CliRunner().invoke(app, ['caption', {str(photos(30)[0])!r}, '--url', {service!r}])\n"
            "print(result.output, sorted({'torch', 'onnxruntime', 'fastapi', 'service.settings'} & set(sys.modules)))\n"
        )
        root = Path(__file__).parents[2]
        done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == ["75", "30", "20", "[]"], done.stderr
