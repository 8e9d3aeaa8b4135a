"""Pickles of arrays are read, whoever wrote them; whatever else a pickle would do is refused, and not done."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.bottom_up.visual_genome.safe_pickle import UnsafePickleError, read_pickle

ARRAYS = {
    "float32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "columns first": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "other byte order": np.arange(5, dtype=">f4"),
    "half": np.array([1.5, -2], np.float16),
    "whole": np.array([[1], [2]], np.int64),
    "empty": np.zeros((0, 3), np.float32),
    "one number": np.array(2.5),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_are_read_as_they_were_written(protocol: int) -> None:
    kept = {"model": OrderedDict(ARRAYS), "list": [ARRAYS["float32"], "text", 3, None, (1.5, True)]}
    found = read_pickle(pickle.dumps(kept, protocol=protocol))
    assert list(found["model"]) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert np.array_equal(found["model"][name], array), name
        assert found["model"][name].dtype.kind == array.dtype.kind
    assert np.array_equal(found["list"][0], ARRAYS["float32"])
    assert found["list"][1:] == ["text", 3, None, [1.5, True]]


def test_a_pickle_of_python_2_is_read() -> None:
    """Where the numbers are a byte string, and NumPy has its old names."""
    numbers = np.array([1.0, -0.25], np.float32).tobytes()
    content = (
        b"\x80\x02}q\x00U\x01wq\x01]q\x02cnumpy.core.multiarray\n_reconstruct\nq\x03(cnumpy\nndarray\nq\x04K\x00\x85U\x01bt"
        b"Rq\x05(K\x01K\x02\x85cnumpy\ndtype\nq\x06(U\x02f4K\x00K\x01tRq\x07(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff"
        b"\xffK\x00tb\x89U" + struct.pack("B", len(numbers)) + numbers + b"tbas."
    )
    pickletools.dis(content, out=io.StringIO())  # it is a pickle
    assert read_pickle(content)["w"][0].tolist() == [1.0, -0.25]


class Runs:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    attacks: list[Any] = [
        Runs(os.mkdir, str(made)),
        Runs(os.system, f"mkdir {made}"),
        Runs(eval, f"__import__('os').mkdir({str(made)!r})"),
        {"conv1": [np.zeros(2), Runs(os.mkdir, str(made))]},
        {Runs(os.mkdir, str(made)): 1},
        Runs(pickle.loads, pickle.dumps(Runs(os.mkdir, str(made)))),
        Runs(np.load, "x"),
        Runs(getattr, "text", "join"),
    ]
    for attack in attacks:
        for protocol in (0, 2, 4):
            content = pickle.dumps(attack, protocol=protocol)
            with pytest.raises(UnsafePickleError, match="names"):
                read_pickle(content)
            assert not made.exists()
    pickle.loads(pickle.dumps(attacks[0]))  # the attack is one
    assert made.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cnumpy\nndarray.tofile\n.",  # a name within an allowed one
        b"cnumpy.core.multiarray\nfromfile\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.",
        b"\x80\x02\x82\x01.",  # the extension registry
        b"Pwhere the weights are\n.",  # a persistent id
        b"(S'x'\nios\nsystem\n.",
    ],
)
def test_other_ways_to_name_things_are_refused(content: bytes) -> None:
    with pytest.raises(UnsafePickleError):
        read_pickle(content)


@pytest.mark.parametrize(
    "value",
    [
        np.array([{}], object),
        np.array(["text"]),
        np.zeros(2, [("a", "f4")]),
        torch.zeros(2),
        {1, 2},
        1j,
        b"".join,
        np.ndarray,
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_are_no_weights_are_refused(value: Any) -> None:
    with pytest.raises(UnsafePickleError):
        read_pickle(pickle.dumps({"weights": value}))


def test_arrays_that_lie_about_their_size_are_refused() -> None:
    whole = pickle.dumps(np.arange(6, dtype=np.float32).reshape(2, 3), protocol=2)
    assert whole.count(b"K\x02K\x03\x86") == 1
    for lie in (b"K\x02K\x04\x86", b"K\xffK\xff\x86", b"J\xff\xff\xff\xffK\x03\x86"):
        with pytest.raises(UnsafePickleError, match="shape"):
            read_pickle(whole.replace(b"K\x02K\x03\x86", lie))


def test_a_truncated_pickle_is_refused_wherever_it_ends() -> None:
    whole = pickle.dumps({"conv1": [np.arange(30, dtype=np.float32)]}, protocol=2)
    for end in range(len(whole)):
        with pytest.raises(UnsafePickleError):
            read_pickle(whole[:end])


def test_a_list_within_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(UnsafePickleError):
        read_pickle(pickle.dumps(endless))
