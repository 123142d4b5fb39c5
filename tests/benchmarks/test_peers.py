"""Peers side by side: a worker waits after each round, and says why where it ends."""

import argparse

import pytest

from benchmarks import peers
from benchmarks.gpu_parts import noise_shards
from radio_distill.errors import DataError


def worker(name, folder, **settings):
    options = {"batch": 4, "steps": 1, "dtype": "float32", "lightly_python": "", **settings}
    return peers.Worker(name, argparse.Namespace(**options), folder)


def test_worker__two_rounds(tmp_path):
    noise_shards(tmp_path, 8, (60, 80), "images/all")
    by_hand = worker("by hand", tmp_path)
    try:
        by_hand.round()
        by_hand.round()
    finally:
        by_hand.end()
    assert [sorted(one) for one in by_hand.rounds] == [["memory", "seconds"]] * 2
    assert all(one["seconds"] > 0 for one in by_hand.rounds)


def test_worker__last_words_of_one_that_ends(tmp_path):
    by_hand = worker("by hand", tmp_path)  # without images
    try:
        with pytest.raises(DataError, match=r"(?s)by hand.*No such file"):
            by_hand.round()
    finally:
        by_hand.end()
