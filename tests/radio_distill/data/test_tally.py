import logging

import pytest

from radio_distill.data.tally import Bad, Tally, too_many_bad
from radio_distill.errors import DataError


def test_too_many_bad__waits_for_evidence():
    assert not too_many_bad(10, 49, 0.01)
    assert too_many_bad(50, 50, 0.01)
    assert not too_many_bad(2, 50, 0.01)  # 4 %, but only two images
    assert too_many_bad(400, 20_000, 0.01)
    assert not too_many_bad(205, 20_000, 0.01)  # within chance
    assert too_many_bad(1, 50, 0.0)
    assert not too_many_bad(1000, 1000, 1.0)


def test_tally__counts_by_kind_and_stops_above_the_limit():
    tally = Tally(0.1)
    tally.add(80, [Bad("a", "checksum", "x"), Bad("b", "stalled", "y"), Bad("c", "stalled", "z")])
    assert (tally.num_reads, dict(tally.bad)) == (83, {"checksum": 1, "stalled": 2})
    tally.check()
    tally.add(0, [Bad("d", "stalled", "the reason")] * 40)
    with pytest.raises(DataError, match=r"43 of 123 read \(42 stalled, 1 check.* d: the reason"):
        tally.check()


def test_tally__does_not_flood_the_log(caplog):
    tally = Tally(1.0)
    with caplog.at_level(logging.WARNING):
        for number in range(5000):
            tally.add(100, [Bad(f"a.tar:{number}.png", "stalled", "no answer")])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "bad image a.tar:0.png (stalled): no answer"
    assert sum(line.startswith("bad image a.tar") for line in lines) == 20
    assert len(lines) == 20 + 1 + 5
    assert lines[-1].startswith("bad images: 5000 of 505000 read (5000 stalled;")
