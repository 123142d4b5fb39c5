"""A file that is read once: all that it has is there, and no more than that."""

import io

from radio_distill.data.images import ReadOnce


def test_once__gives_everything_wherever_it_is_read():
    data = bytes(range(100))
    file = io.BytesIO(data)
    file.seek(30)
    once = ReadOnce(file)
    assert once.tell() == 30
    assert once.read(70) == data[30:]
    once.seek(0)
    assert once.read(30) == data[:30]


def test_once__gives_no_more_than_there_is():
    once = ReadOnce(io.BytesIO(bytes(100)))
    read = []
    for _ in range(5):
        once.seek(60)
        read.append(len(once.read(40)))
    assert read == [40, 40, 20, 0, 0]
