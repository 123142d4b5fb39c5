"""What must change a protocol, and what must not."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from radio_distill.evals.protocol import file_names, protocol_of


@dataclass(frozen=True)
class Depth:
    data: str = "/data/nyu"
    images: str = "/data/images"
    size: int | tuple[int, int] = 480
    rate: float = 1e-3
    quick: bool = False
    as_published: bool = False
    batch_size: int = 8
    seed: int = 0

    name: ClassVar[str] = "nyu_depth"
    sources: ClassVar[dict[str, str]] = {
        "data": "data.nyu_depth", "images": "images", "size": "dense_size"
    }  # fmt: skip


@pytest.mark.parametrize(
    "same", [{"data": "/elsewhere"}, {"images": "x"}, {"batch_size": 1}, {"seed": 3}]
)
def test_protocol_of__where_data_lies_and_how_it_is_run_is_no_protocol(same):
    assert protocol_of(replace(Depth(), **same)) == protocol_of(Depth())


@pytest.mark.parametrize("other", [{"size": 512}, {"as_published": True}, {"rate": 2e-3}])
def test_protocol_of__what_decides_the_number_is(other):
    name, digest = protocol_of(Depth()).split("@")
    changed, changed_digest = protocol_of(replace(Depth(), **other)).split("@")
    assert name == changed == "nyu_depth"
    assert len(digest) == 8
    assert digest != changed_digest


def test_protocol_of__facts_names_versions_and_data_sets_are():
    class Newer(Depth):
        version: ClassVar[int] = 2

    class OtherSet(Depth):
        sources: ClassVar[dict[str, str]] = {"data": "data.other", "images": "images"}

    several = [
        protocol_of(Depth()),
        protocol_of(Depth(), val=654),
        protocol_of(Depth(), val=653),
        protocol_of(Depth(), "nyu-depth-lin4", val=653),
        protocol_of(Newer()),
        protocol_of(OtherSet()),
    ]
    assert len(set(several)) == len(several)


def test_protocol_of__one_number_written_in_two_ways():
    one, other = replace(Depth(), size=(480, 640)), replace(Depth(), size=[480.0, 640])
    assert protocol_of(one, steps=40_000) == protocol_of(other, steps=4e4)


def test_protocol_of__the_quick_one_says_so():
    quick = replace(Depth(), quick=True)
    assert protocol_of(quick).startswith("nyu_depth-quick@")
    assert protocol_of(quick, "nyu-lin4-quick").startswith("nyu-lin4-quick@")


def test_file_names__wherever_their_folder_lies():
    assert file_names(["/here/a/1.jpg", "shard.tar:b/2.jpg"]) == ["1.jpg", "2.jpg"]
