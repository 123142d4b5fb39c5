import torch

from radio_distill.config import DataConfig
from radio_distill.data.device import on_device
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.types import ImageBatch, View

CPU = torch.device("cpu")
VIEWS = {View((32, 48)): None, View((24, 24)): None}


def test_batches__are_bytes_on_the_host(shard_folder):
    for workers in (0, 1):
        config = DataConfig(shards=(str(shard_folder),), workers=workers)
        slices = in_every_step([StepSlice(0, 2, (32, 48), VIEWS), StepSlice(2, 5, (16, 16))])
        step = next(ShardBatches(config, seed=0, images_per_step=5, slices=slices).batches(0))
        for pixels in (pixels for batch in step for pixels in batch.views.values()):
            assert pixels.dtype == torch.uint8
            assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_on_device__gives_the_same_images_as_numbers():
    batches = []
    for number in range(4):
        pixels = torch.randint(256, (3, 3, 8, 10), dtype=torch.uint8)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        batches.append(ImageBatch({View((8, 10)): pixels}, (str(number),) * 3))
    before = [batch.pixels.clone() for batch in batches]
    found = list(on_device(batches, CPU))
    for batch, ours, pixels in zip(batches, found, before, strict=True):
        assert torch.equal(ours.pixels, pixels.float() / 255)
        assert ours.pixels.is_contiguous()
        assert ours.keys == batch.keys
        assert torch.equal(batch.pixels, pixels), "what came in can be used again"


def test_on_device__looks_one_batch_ahead():
    taken = []

    def batches():
        for number in range(3):
            taken.append(number)
            yield ImageBatch({View((4, 4)): torch.zeros(1, 3, 4, 4, dtype=torch.uint8)}, ("a",))

    seen = [list(taken) for _ in on_device(batches(), CPU)]
    assert seen == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert not list(on_device([], CPU))
