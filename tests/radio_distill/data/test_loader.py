import itertools
import logging
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from radio_distill.config import DataConfig
from radio_distill.data import loader
from radio_distill.data import tar_reader as reader
from radio_distill.data.images import decode_pixels
from radio_distill.data.loader import (
    BadImage,
    BadImageCounter,
    ShardBatches,
    StepSlice,
    in_every_step,
    made_by_workers,
    too_many_bad,
)
from radio_distill.data.order import SampleOrder, view_generator
from radio_distill.data.rendering import random_origin, render
from radio_distill.errors import ConfigError, DataError

SIZE = (16, 24)


def config_of(folder, **options):
    return DataConfig(shards=(str(folder),), **{"workers": 0, "shuffle_shards": 2, **options})


def source_of(config, slices, images_per_step, seed=0):
    every = slices if callable(slices) else in_every_step(slices)
    return ShardBatches(config, seed=seed, images_per_step=images_per_step, slices=every)


def batches_of(config, slices, steps, start=0, images_per_step=6, seed=11):
    """The batches of some steps, and the source they come from."""
    source = source_of(config, slices, images_per_step, seed)
    stream = source.batches(start)
    batches = list(itertools.islice(stream, steps))
    stream.close()
    return batches, source


@pytest.fixture
def decoders():
    """Which processes this test has started, and are there."""
    before = multiprocessing.active_children()
    return lambda: [child for child in multiprocessing.active_children() if child not in before]


def assert_equal(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        assert ours.keys == theirs.keys
        assert ours.origins == theirs.origins
        assert torch.equal(ours.pixels, theirs.pixels)


def test_batches__from_named_sources_by_the_step_and_by_the_image(shard_folder):
    """A quarter of the steps, and the images of a partition, are of one entry of the shards."""
    config = DataConfig(
        shards=tuple(str(shard_folder / f"part-{number}.tar") for number in (0, 1, 4)),
        names=("lvd", "own", "imagenet"),
        weights=(2, 1, 0),
        homogeneous={"imagenet": 0.25},
        workers=0,
    )

    def entries(start, steps):
        source = ShardBatches(
            config,
            seed=1,
            images_per_step=6,
            slices=in_every_step([StepSlice(0, 6, SIZE)]),
            own=[(4, 6, "own")],
        )
        for (batch,) in itertools.islice(source.batches(start), steps):
            yield [key.partition(".")[0] for key in batch.keys]

    steps = list(entries(0, 12))
    assert all(step[4:] == ["part-1", "part-1"] for step in steps)
    pure = [step[:4] for step in steps if "part-4" in step]
    assert pure == [["part-4"] * 4] * 3
    mixed = [key for step in steps if "part-4" not in step for key in step[:4]]
    assert mixed.count("part-0") == 24, "two thirds of nine steps"
    assert mixed.count("part-1") == 12
    assert list(entries(5, 7)) == steps[5:], "as a resumed run reads them"


def test_batches__are_the_views_at_their_positions(shard_folder, encode):
    config = config_of(shard_folder)
    slices = [StepSlice(1, 3, SIZE), StepSlice(3, 6, (32, 16))]
    (batches,), source = batches_of(config, slices, 1, start=4)
    order = SampleOrder([[3, 4, 5, 6, 7]], seed=11, window=2)
    for item, batch in zip(slices, batches, strict=True):
        assert batch.pixels.shape == (item.stop - item.start, 3, *item.size)
        for row, position in enumerate(range(24 + item.start, 24 + item.stop)):
            shard, sample = order.at(position)
            image = decode_pixels(encode(10 * shard + sample))
            origin = random_origin((40, 48), item.size, config, view_generator(11, position))
            assert batch.keys[row] == f"part-{shard}.tar:s{shard}_{sample}.png"
            assert batch.origins[row] == origin
            view = render(image, origin, item.size)
            assert torch.equal(batch.pixels[row], view)
    assert source.bad == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_batches__do_not_depend_on_workers(shard_folder, workers):
    slices = [StepSlice(0, 2, SIZE), StepSlice(2, 6, (16, 16))]
    alone, _ = batches_of(config_of(shard_folder), slices, 9)
    together, _ = batches_of(config_of(shard_folder, workers=workers), slices, 9)
    assert_equal(together, alone)


def test_batches__slicing_shares_out_the_same_step(shard_folder):
    config = config_of(shard_folder)
    whole, _ = batches_of(config, [StepSlice(0, 6, SIZE)], 6)
    ranks = [batches_of(config, [StepSlice(3 * r, 3 * r + 3, SIZE)], 6)[0] for r in (0, 1)]
    micro, _ = batches_of(config, [StepSlice(i, i + 2, SIZE) for i in (0, 2, 4)], 6)
    for step in range(6):
        expected = whole[step][0]
        for parts in ([ranks[0][step][0], ranks[1][step][0]], micro[step]):
            assert tuple(itertools.chain(*(part.keys for part in parts))) == expected.keys
            assert torch.equal(torch.cat([part.pixels for part in parts]), expected.pixels)


def test_batches__leave_global_random_numbers_alone(shard_folder):
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for workers in (0, 1):
        batches_of(config_of(shard_folder, workers=workers), [StepSlice(0, 2, SIZE)], 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]


@pytest.fixture
def spoiled(tmp_path, encode, write_tar):
    """200 images, of which four are bad, each in its own way."""
    members = {f"good{i:03d}.png": encode(i) for i in range(196)}
    members |= {
        "cut.jpg": encode(1, "JPEG")[:300],
        "small.png": encode(1, size=(8, 40)),
        "large.png": encode(1, size=(60, 60)),
        "rot.png": encode(2),
    }
    path = write_tar(tmp_path / "spoiled.tar", members)
    config = config_of(path, min_size=16, max_pixels=3000, max_bad_share=0.02)
    sound, _ = batches_of(replace(config, min_size=1), [StepSlice(0, 1, SIZE)], 1)
    assert sound, "the index exists before the bit flips"
    raw = bytearray(path.read_bytes())
    status = path.stat()
    raw[raw.index(encode(2), raw.index(b"rot.png")) + 60] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    return config


def test_batches__bad_images_are_replaced_counted_and_logged(spoiled, caplog):
    slices = [StepSlice(0, 20, SIZE)]
    batches, source = batches_of(spoiled, slices, 10, images_per_step=20)
    assert source.bad == {"undecodable": 1, "too_small": 1, "too_large": 1, "checksum": 1}
    for key in ("cut.jpg", "small.png", "large.png", "rot.png"):
        assert f"bad image spoiled.tar:{key}" in caplog.text
    keys = [key for step in batches for batch in step for key in batch.keys]
    assert len(keys) == 200
    assert all(key.startswith("spoiled.tar:good") for key in keys)
    # Substitutes change nothing for the others: exactly four images come a second time.
    assert len(set(keys)) == 196
    again, _ = batches_of(replace(spoiled, workers=2), slices, 4, start=6, images_per_step=20)
    assert_equal(again, batches[6:])


def test_batches__too_many_bad_images_stop_the_run(spoiled):
    strict = replace(spoiled, max_bad_share=0.0)
    with pytest.raises(DataError, match="max_bad_share") as error:
        batches_of(strict, [StepSlice(0, 20, SIZE)], 50, images_per_step=20)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("num_images", [3, 300])
def test_batches__only_bad_images_end_at_once(
    tmp_path, encode, write_tar, workers, num_images, decoders
):
    broken = {f"a{i}.jpg": encode(i % 7, "JPEG")[:-200] for i in range(num_images)}
    config = config_of(write_tar(tmp_path / "a.tar", broken), workers=workers)
    with pytest.raises(DataError, match=r"50 of 50 read \(50 undecodable") as error:
        batches_of(config, [StepSlice(0, 512, (224, 224))], 1, images_per_step=512)
    assert "\n" not in str(error.value)
    assert not decoders()


@pytest.mark.parametrize("workers", [0, 1])
def test_batches__shard_that_vanishes_is_bad_images(shard_folder, workers):
    config = config_of(shard_folder, workers=workers, max_bad_share=0.2)
    source = source_of(config, [StepSlice(0, 25, SIZE)], 25)
    (shard_folder / "part-0.tar").unlink()
    stream = source.batches(0)
    (batch,) = next(stream)
    stream.close()
    assert not any(key.startswith("part-0") for key in batch.keys)
    assert source.bad.keys() == {"unreadable"}
    assert source.bad["unreadable"] >= 3


def test_batches__too_many_vanished_shards_end_in_one_line(shard_folder):
    source = source_of(config_of(shard_folder), [StepSlice(0, 30, SIZE)], 30)
    (shard_folder / "part-3.tar").unlink()
    with pytest.raises(DataError, match=r"part-3\.tar: No such file") as error:
        list(itertools.islice(source.batches(0), 5))
    assert "\n" not in str(error.value)


@pytest.fixture
def wedge(monkeypatch):
    """Makes reads of one shard block inside the kernel, in this process and those it forks."""
    ends, real = os.pipe(), os.pread

    def pread(descriptor, size, offset):
        if "part-0" in os.readlink(f"/proc/self/fd/{descriptor}"):
            os.read(ends[0], 1)
        return real(descriptor, size, offset)

    monkeypatch.setattr(reader.os, "pread", pread)
    yield
    os.write(ends[1], bytes(100))
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches__reads_that_stall_are_bad_images(shard_folder, wedge, workers):
    config = config_of(shard_folder, workers=workers, read_timeout=0.15, max_bad_share=1.0)
    batches, source = batches_of(config, [StepSlice(0, 5, SIZE)], 5, images_per_step=5)
    assert source.bad.keys() == {"stalled"}
    assert not any(key.startswith("part-0") for (batch,) in batches for key in batch.keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches__disk_that_stalls_for_good_ends_in_one_line(
    shard_folder, tmp_path, wedge, workers, decoders
):
    path = str(tmp_path / "part-0.tar")
    config = config_of(path, workers=workers, read_timeout=0.15, max_bad_share=1.0)
    source = source_of(config, [StepSlice(0, 2, SIZE)], 2)
    with pytest.raises(DataError, match="8 reads"):
        next(source.batches(0))
    assert not decoders()


def test_batches__workers_that_wait_for_a_disk_are_ended(shard_folder, tmp_path, wedge, decoders):
    path = str(tmp_path / "part-0.tar")
    config = config_of(path, workers=2, read_timeout=600, max_bad_share=1.0)
    source = source_of(config, [StepSlice(0, 2, SIZE)], 2)
    previous = signal.signal(signal.SIGUSR1, stop)  # SIGALRM is the test run's own time-out
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1))
    try:
        before = time.monotonic()
        stream = source.batches(0)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    finally:
        timer.join()
        signal.signal(signal.SIGUSR1, previous)
    assert not decoders()
    assert time.monotonic() - before < 60, "neither the time-out, nor torch's own for each worker"


def stop(number, frame):
    raise KeyboardInterrupt


def test_batches__workers_ignore_the_signals_of_slurm(shard_folder, decoders):
    config = config_of(shard_folder, workers=2)
    source = source_of(config, [StepSlice(0, 2, SIZE)], 2)
    stream = source.batches(0)
    next(stream)
    children = decoders()
    assert len(children) == 2
    for child in children:
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGUSR2)
    for _ in range(10):
        next(stream)
    assert all(child.is_alive() for child in children)
    stream.close()
    assert not decoders()


def test_batches__worker_that_dies_is_one_line(shard_folder, monkeypatch, decoders):
    make = loader._Views.batch

    def make_two_then_die(self, task):
        if task.start >= 4:
            time.sleep(1.0)  # the training process waits by now
            os.kill(os.getpid(), signal.SIGKILL)
        return make(self, task)

    monkeypatch.setattr(loader._Views, "batch", make_two_then_die)
    config = config_of(shard_folder, workers=1)
    source = source_of(config, [StepSlice(0, 2, SIZE)], 2)
    stream = source.batches(0)
    next(stream), next(stream)
    with pytest.raises(DataError, match="decoding process"):
        next(stream)
    assert not decoders()


def test_batches__program_ends_with_workers_still_running(shard_folder):
    # Regression: workers that ignore SIGTERM kept the interpreter from ending.
    program = f"""
from radio_distill.config import DataConfig
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
config = DataConfig(shards=({str(shard_folder)!r},), workers=1)
slices = in_every_step([StepSlice(0, 1, (8, 8))])
stream = ShardBatches(config, seed=0, images_per_step=1, slices=slices).batches(0)
next(stream)
raise SystemExit(7)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 7


def test_batches__slices_may_differ_from_step_to_step(shard_folder):
    """Other sizes and another number of micro-batches; the images stay those of their positions."""
    config = config_of(shard_folder)

    def slices(step):
        if step % 2:
            return [StepSlice(0, 4, (16, 16)), StepSlice(4, 6, (16, 16))]
        return [StepSlice(0, 6, (32, 16))]

    stream, _ = batches_of(config, slices, 3, start=1)
    assert [[len(batch.keys) for batch in step] for step in stream] == [[4, 2], [6], [4, 2]]
    assert stream[1][0].pixels.shape[-2:] == (32, 16)
    whole, _ = batches_of(config, [StepSlice(0, 6, (16, 16))], 3, start=1)
    for step, expected in zip(stream, whole, strict=True):
        assert sum((batch.keys for batch in step), ()) == expected[0].keys
    assert torch.equal(torch.cat([batch.pixels for batch in stream[2]]), whole[2][0].pixels)


def refuse(task):
    raise ConfigError("one line")


@pytest.mark.parametrize("workers", [0, 1])
def test_made_by_workers__an_error_of_ours_comes_without_a_stack(workers):
    with pytest.raises(ConfigError) as error, made_by_workers(refuse, [0], workers, 2) as stream:
        next(stream)
    assert error.value.args == ("one line",)


def test_too_many_bad__waits_for_evidence():
    assert not too_many_bad(10, 49, 0.01)
    assert too_many_bad(50, 50, 0.01)
    assert not too_many_bad(2, 50, 0.01)  # 4 %, but only two images
    assert too_many_bad(400, 20_000, 0.01)
    assert not too_many_bad(205, 20_000, 0.01)  # within chance
    assert too_many_bad(1, 50, 0.0)
    assert not too_many_bad(1000, 1000, 1.0)


def test_bad_image_counter__counts_by_kind_and_stops_above_the_limit():
    counter = BadImageCounter(0.1)
    counter.add(
        80,
        [
            BadImage("a", "checksum", "x"),
            BadImage("b", "stalled", "y"),
            BadImage("c", "stalled", "z"),
        ],
    )
    assert (counter.num_reads, dict(counter.bad)) == (83, {"checksum": 1, "stalled": 2})
    counter.check()
    counter.add(0, [BadImage("d", "stalled", "the reason")] * 40)
    with pytest.raises(DataError, match=r"43 of 123 read \(42 stalled, 1 check.* d: the reason"):
        counter.check()


def test_bad_image_counter__does_not_flood_the_log(caplog):
    counter = BadImageCounter(1.0)
    with caplog.at_level(logging.WARNING):
        for number in range(5000):
            counter.add(100, [BadImage(f"a.tar:{number}.png", "stalled", "no answer")])
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "bad image a.tar:0.png (stalled): no answer"
    assert sum(line.startswith("bad image a.tar") for line in lines) == 20
    assert len(lines) == 20 + 1 + 5
    assert lines[-1].startswith("bad images: 5000 of 505000 read (5000 stalled;")
