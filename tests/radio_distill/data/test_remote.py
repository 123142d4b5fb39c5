"""Shards behind real servers on this machine: HTTP with faults, and S3 where moto is."""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path

import pytest
import torch

from radio_distill.config import DataConfig
from radio_distill.data import remote as remote_module
from radio_distill.data.cache import CacheError, cache_of
from radio_distill.data.check import check_shards
from radio_distill.data.find import find_shards
from radio_distill.data.folder import list_images
from radio_distill.data.loader import ShardBatches, StepSlice, in_every_step
from radio_distill.data.remote import FetchError, Remote, shown
from radio_distill.data.sources import open_sources
from radio_distill.data.tar_index import open_shard
from radio_distill.errors import DataError

SECRETS = "user:pa55word@", "X-Amz-Signature=5ecre7"


class Server(ThreadingHTTPServer):
    """Serves the files of a folder, with ranges and ETags, as badly as it is told to."""

    daemon_threads, allow_reuse_address = True, True

    def __init__(self, folder: Path, port: int = 0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.folder = folder
        self.has_ranges = True
        self.num_drops = 0  # answers that are cut off in the middle
        self.status = 0  # instead of any answer
        self.delay = 0.0  # seconds before an answer
        self.fetched: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Say nothing of clients that hang up."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET(with_body=False)

    def do_GET(self, with_body=True):
        server = self.server
        time.sleep(server.delay)
        path = server.folder / self.path.partition("?")[0].lstrip("/")
        if server.status or not path.is_file():
            self.send_error(server.status or 404)
            return
        data = path.read_bytes()
        if with_body:
            server.fetched.append(path.name)
        wanted, start = self.headers.get("Range"), 0
        if server.has_ranges and wanted:
            start, _, end = wanted.removeprefix("bytes=").partition("-")
            start, whole = int(start), len(data)
            data = data[start : int(end) + 1 if end else None]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{whole}")
        else:
            self.send_response(200)
        if server.has_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body and server.num_drops > 0:
            server.num_drops -= 1
            data = data[: len(data) // 2]
        if with_body:
            self.wfile.write(data)
        self.close_connection = True


@contextmanager
def serving(server: Server):
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def server(shard_folder, monkeypatch):
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(remote_module, "_WAITS", (0.05, 0.1, 0.2, 0.4, 0.8, 0.8))
    with serving(Server(shard_folder)) as server:
        yield server


@pytest.fixture
def config(server, tmp_path_factory):
    """A recipe's data: five shards on the server, and a cache that holds about two of them."""

    def make(*shards, **options):
        folder = tmp_path_factory.getbasetemp() / "cache" / os.environ["PYTEST_CURRENT_TEST"][-40:]
        folder = Path(str(folder).replace(" (call)", "").replace(":", "_"))
        largest = max(path.stat().st_size for path in server.folder.glob("*.tar"))
        options = {"cache": str(folder), "cache_gb": 2.5 * largest / 1e9, "workers": 0} | options
        options.setdefault("shuffle_shards", 1)
        shards = shards or (f"{server.url}/part-{{0..4}}.tar",)
        return DataConfig(shards=shards, **options)

    return make


def source_of(config):
    """Five images a step; 25 images are five steps."""
    slices = in_every_step([StepSlice(0, 5, (32, 32))])
    return ShardBatches(config, seed=3, images_per_step=5, slices=slices)


def batches_of(config, steps=range(6)):
    """The keys and pixels of some steps, and where they come from."""
    source = source_of(config)
    stream = source.batches(steps[0])
    found = [next(stream)[0] for _ in steps]
    stream.close()
    return found, source


def assert_same(found, expected):
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for batch, other in zip(found, expected, strict=True):
        for view, pixels in batch.views.items():
            assert torch.equal(pixels, other.views[view])


def copies(config):
    return list(Path(config.cache).glob("*.tar"))


def of_disk(server, steps=range(6), **options):
    config = DataConfig(shards=(str(server.folder),), workers=0, shuffle_shards=1, **options)
    return batches_of(config, steps)


def test_batches__those_of_the_disk_whatever_the_server_does(server, config):
    expected, local = of_disk(server)
    server.num_drops, server.delay = 4, 0.01
    found, source = batches_of(config())
    assert_same(found, expected)
    assert source.fingerprint == local.fingerprint
    assert source.bad == {}
    assert len(server.fetched) > 5 + 4, "the cache holds three of five, so some come again"
    resumed, _ = batches_of(config(), range(3, 6))
    assert_same(resumed, expected[3:])


def test_batches__with_workers_and_a_server_that_dies_and_comes_back(server, config):
    expected, _ = of_disk(server, range(12))
    source = source_of(config(workers=2))
    server.delay = 0.01
    stream = source.batches(0)
    found = [next(stream)[0] for _ in range(2)]
    server.status = 503
    timer = threading.Timer(0.7, setattr, (server, "status", 0))
    timer.start()
    found += [next(stream)[0] for _ in range(10)]
    stream.close()
    assert_same(found, expected)
    assert source.bad == {}


def test_batches__a_process_that_serves_is_gone_for_a_while(shard_folder, config, server):
    with serving(Server(shard_folder)) as first:
        port = first.server_address[1]
        stream = source_of(config(f"{first.url}/part-{{0..4}}.tar")).batches(0)
        found = [next(stream)[0] for _ in range(2)]
    again = Server.__new__(Server)

    def restart():
        again.__init__(shard_folder, port)
        again.serve_forever(0.02)

    timer = threading.Timer(0.6, restart)
    timer.start()
    found += [next(stream)[0] for _ in range(4)]
    stream.close()
    again.shutdown()
    again.server_close()
    timer.join()
    assert again.fetched, "something had to come from the second process"
    assert_same(found, of_disk(server)[0])


def test_batches__what_stays_away_is_named_and_the_run_may_start_again(server, config, monkeypatch):
    monkeypatch.setattr(remote_module, "_WAITS", 6 * (0.01,))
    stream = source_of(config()).batches(0)
    next(stream)
    server.status = 503
    with pytest.raises(DataError, match=r"/part-\d\.tar: .* 503, 7 times") as e:
        list(islice(stream, 10))
    assert e.value.exit_status == 1
    assert "data.max_bad_shards is 0" in str(e.value)
    assert "\n" not in str(e.value)


def test_batches__lost_shards_within_the_budget_are_bad_images(server, config, monkeypatch):
    monkeypatch.setattr(remote_module, "_WAITS", (0.01,))
    made = config(max_bad_shards=1.0, max_bad_share=1.0)
    source = source_of(made)
    stream = source.batches(0)
    next(stream)
    (server.folder / "part-2.tar").rename(server.folder / "gone")
    for path in copies(made):
        path.unlink()
    for _ in range(9):
        next(stream)
    stream.close()
    assert set(source.bad) <= {"unreadable"}


def test_open_sources__a_missing_shard_is_counted_as_damaged(server, config):
    (server.folder / "part-3.tar").unlink()
    with pytest.raises(DataError, match=r"1 of 5 .*part-3\.tar: .* 404"):
        open_sources(config())
    sources = open_sources(config(max_bad_shards=0.2))
    assert len(sources.shards) == 4


def test_open_sources__an_index_outlives_the_copy_and_a_change_is_noticed(server, config, tmp_path):
    index = (str(tmp_path / "indexes"),)
    before = open_sources(config(index=index))
    for path in Path(config().cache).iterdir():
        path.unlink()
    server.fetched.clear()
    assert open_sources(config(index=index)).fingerprint == before.fingerprint
    assert server.fetched == [], "the members are known without the shard"
    held = before.shards[1].path
    path = server.folder / "part-1.tar"
    path.write_bytes((server.folder / "part-4.tar").read_bytes())
    with pytest.raises(FetchError, match="changed since it was indexed"):
        held.open()
    after = open_sources(config(index=index))
    assert [shard.num_samples for shard in after.shards] == [3, 7, 5, 6, 7]
    assert set(server.fetched) == {"part-1.tar"}


@pytest.mark.parametrize("has_ranges", [True, False])
def test_open__a_cut_download_goes_on_and_one_of_many_fetches(server, config, has_ranges):
    server.has_ranges, server.num_drops = has_ranges, 1
    (place,) = find_shards([f"{server.url}/part-4.tar"], cache_of(config())).paths
    place = place.look()
    with ThreadPoolExecutor(8) as pool:
        files = list(pool.map(lambda _: place.open(), range(8)))
    data = (server.folder / "part-4.tar").read_bytes()
    assert all(os.pread(file.fileno(), len(data) + 1, 0) == data for file in files)
    assert len(server.fetched) == 2
    assert not list(Path(config().cache).glob("*.part"))


def test_open__what_is_in_use_stays_and_the_rest_is_bounded(server, config):
    cache = cache_of(config())
    places = [place.look() for place in find_shards(config().shards, cache).paths]
    held = [place.open() for place in places[2:]]
    for place in places:
        place.open().close()
    files = copies(config())
    assert {place.copy for place in places[2:]} <= set(files)
    in_use = sum(place.size for place in places[2:])
    others = sum(path.stat().st_size for path in files) - in_use
    assert others <= max(cache.max_bytes - in_use, max(place.size for place in places))
    assert places[0].open_if_free() is None, "nothing is fetched ahead where there is no room"
    for file in held:
        file.close()
    places[0].open().close()
    total = sum(path.stat().st_size for path in copies(config()))
    assert total <= cache.max_bytes


def test_open__an_unfinished_copy_of_a_killed_process_is_no_copy(server, config):
    cache = cache_of(config())
    place = find_shards([f"{server.url}/part-0.tar"], cache).paths[0].look()
    cache.folder.mkdir(parents=True)
    place.copy.with_suffix(".part").write_bytes(b"half")
    other = place.copy.with_name("other.0.0.part")
    other.write_bytes(bytes(cache.max_bytes))
    with place.open() as file:
        assert len(file.read()) == place.size
    assert not other.exists(), "nobody holds it, and its room is needed"


def test_cache__smaller_than_a_shard_is_refused(server, config):
    with pytest.raises(CacheError, match=r"data.cache_gb: .*part-\d.tar"):
        open_sources(config(cache_gb=1e-6))


def test_secrets__are_in_no_message_log_index_or_name(server, config, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    address = f"{server.url}/part-0.tar?{SECRETS[1]}".replace("//", f"//{SECRETS[0]}")
    lines = [address, address.replace("part-0", "absent")]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    made = config(str(tmp_path / "list.txt"))
    with pytest.raises(DataError, match=r"absent\.tar") as error:
        open_sources(made)
    (shard,) = open_sources(config(str(tmp_path / "list.txt"), max_bad_shards=0.5)).shards
    assert shown(address) == f"{server.url}/part-0.tar" == str(shard.path)
    written = [str(error.value), repr(shard), repr(shard.path)]
    written += [record.getMessage() for record in caplog.records if record.name[:5] == "radio"]
    for path in Path(made.cache).iterdir():
        written += [path.name, path.read_bytes().decode("latin-1")]
    for secret in ("pa55word", "5ecre7"):
        assert not any(secret in text for text in written)
    twice = find_shards([address, f"{server.url}/part-1.tar"], cache_of(made)).paths
    assert len(twice) == 2
    with pytest.raises(DataError, match="two users or queries"):
        find_shards([address, f"{server.url}/part-0.tar"], cache_of(made))


def test_pipe__runs_only_where_it_may(shard_folder, tmp_path):
    folder = str(tmp_path / "copies")
    entry = f"pipe:cat {shard_folder}/part-{{0..1}}.tar::{shard_folder}/part-2.tar"
    options = {"cache": folder, "cache_gb": 1.0}
    with pytest.raises(DataError, match=r"data\.commands"):
        open_sources(DataConfig(shards=(entry,), **options))
    sources = open_sources(DataConfig(shards=(entry,), commands=True, **options))
    expected = open_sources(DataConfig(shards=(f"{shard_folder}/part-{{0..2}}.tar",)))
    assert sources.fingerprint == expected.fingerprint
    for shard in sources.shards[:2]:
        with open_shard(shard.path).path.open() as file:
            assert os.fstat(file.fileno()).st_size == shard.size


def test_pipe__a_command_that_fails_is_told_without_its_words(tmp_path, monkeypatch):
    monkeypatch.setattr(remote_module, "_WAITS", (0.01,))
    entry = "pipe:sh -c 'echo half; echo hunter2 >&2; exit 3'"
    options = {"cache": str(tmp_path), "commands": True}
    with pytest.raises(DataError, match="status 3, 2 times") as error:
        open_sources(DataConfig(shards=(entry,), **options))
    assert "hunter2" not in str(error.value)


def test_check_shards__reads_what_lies_elsewhere(server, config):
    report = check_shards([f"{server.url}/part-{{0..4}}.tar"], config())
    assert (report.num_images, report.num_shards, report.is_clean) == (25, 5, True)


def test_check_shards__tells_what_did_not_come_from_what_is_damaged(server, config):
    (server.folder / "part-3.tar").unlink()
    (server.folder / "part-1.tar").write_bytes(b"no tar" * 100)
    report = check_shards([f"{server.url}/part-{{0..4}}.tar"], config())
    assert ["part-1" in line for line in report.damaged] == [True]
    assert ["part-3" in line for line in report.not_fetched] == [True]
    assert report.num_images == 15
    assert not report.is_clean


def test_check_shards__a_cache_that_takes_nothing_is_no_damage(server, config):
    with pytest.raises(CacheError, match=r"data\.cache_gb"):
        check_shards([f"{server.url}/part-{{0..4}}.tar"], config(cache_gb=1e-6))


def test_list_images__reads_from_a_disk_alone():
    address = "https://user:pa55word@host/held-out-{0..3}.tar"
    with pytest.raises(DataError, match=r"https://host/held-out.*copy") as error:
        list_images(address)
    assert "pa55word" not in str(error.value)


def test_missing_package__is_one_line_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    cache = cache_of(DataConfig(shards=(), cache=str(tmp_path)))
    with pytest.raises(CacheError, match=r"gs://.*pip install 'radio-distill\["):
        Remote("gs://bucket/a.tar", cache).look()


def test_s3__same_batches_as_from_the_disk(server, config, monkeypatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    s3 = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    s3.start()
    try:
        url = "http://{}:{}".format(*s3.get_host_and_port())
        for name, value in (
            ("AWS_ENDPOINT_URL", url),
            ("AWS_ACCESS_KEY_ID", "testing"),
            ("AWS_SECRET_ACCESS_KEY", "testing"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for path in server.folder.glob("*.tar"):
            client.upload_file(str(path), "images", f"train/{path.name}")
        expected, _ = of_disk(server)
        for entry in ("s3://images/train/part-{0..4}.tar", "s3://images/train/"):
            found, _ = batches_of(config(entry))
            assert_same(found, expected)
        client.put_object(Bucket="images", Key="train/part-0.tar", Body=b"other")
        with pytest.raises(DataError, match=r"s3://images/train/part-0\.tar"):
            open_sources(config("s3://images/train/"))
    finally:
        s3.stop()
