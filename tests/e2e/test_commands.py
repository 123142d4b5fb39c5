"""The commands around training: sweep, report, shards, list."""

import json

import pytest

from stages.cli import main as cli


@pytest.fixture
def trained(recipe_file):
    """The tiny recipe after its first two stages."""
    assert cli(["train", str(recipe_file), "--stages", "stage1", "stage2", "--seed", "5"]) == 0
    return recipe_file


def test_sweep__trains_scores_compares_and_goes_on_where_it_was(trained, capfd):
    sweep = ["sweep", str(trained), "--seed", "5", "--upsamplers", "bilinear", "tile"]
    sweep += ["--seeds", "2"]
    assert cli(sweep) == 0
    folder = trained.parent / "runs" / "tiny"
    table = capfd.readouterr().out
    assert "stage3-tile" in table
    assert "Δm" in table
    rows = json.loads((folder / "gain.json").read_text())
    assert "stage3-bilinear" in json.dumps(rows)
    assert (folder / "seed-6" / "stage3-tile" / "checkpoints").is_dir()
    assert "±" in table  # of two seeds
    for suffix in ("md", "csv", "tex"):
        assert (folder / f"gain.{suffix}").read_text()
    checkpoint = folder / "stage3-tile" / "checkpoints" / "step-00000004" / "student.safetensors"
    written = checkpoint.stat().st_mtime_ns

    assert cli([*sweep, "--suite", "quick"]) == 0
    assert checkpoint.stat().st_mtime_ns == written
    assert "correspondence-quick@" in (folder / "gain.md").read_text()

    assert cli(["report", str(folder), "--num-images", "1"]) == 0
    page = (folder / "report.html").read_text()
    assert "stage3-tile" in page
    assert 'id="heads"' in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_sweep__mistakes_end_before_anything_is_trained(trained, capfd):
    assert cli(["sweep", str(trained), "--upsamplers", "tile"]) == 2
    assert "--baseline bilinear" in capfd.readouterr().err
    assert cli(["sweep", str(trained), "--upsamplers", "bilinear", "tlie"]) == 2
    assert "'tile'" in capfd.readouterr().err
    for words in (["--evaluation.benchmarks", "[knn]"], ["--suite", "published"]):
        assert cli(["sweep", str(trained), "--seed", "5", *words]) == 2
        assert "evaluation." in capfd.readouterr().err
    assert not list((trained.parent / "runs" / "tiny").glob("stage3*"))


def test_report__of_nothing_says_what_to_do(tmp_path, capfd):
    assert cli(["report", str(tmp_path)]) == 2
    assert "train one first" in capfd.readouterr().err


def test_shards__write_then_check(tmp_path, images, capfd):
    (tmp_path / "images").mkdir()
    for source in sorted((images / "train").glob("*.png"))[:3]:
        (tmp_path / "images" / source.name).write_bytes(source.read_bytes())
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "shards"
    assert cli(["shards", str(tmp_path / "images"), str(out)]) == 0
    printed = capfd.readouterr().out
    assert "3 images in 1 shards" in printed
    assert "left out broken.jpg" in printed
    assert cli(["shards", "--check", str(out)]) == 0
    assert "3 images in 1 shards" in capfd.readouterr().out

    shard = next(out.glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:1500])
    assert cli(["shards", "--check", str(out)]) == 1
    assert "damaged:" in capfd.readouterr().out
    assert cli(["shards", str(tmp_path / "absent"), str(out)]) == 2
    assert "folder" in capfd.readouterr().err


def test_list__every_kind(capfd):
    assert cli(["list"]) == 0
    printed = capfd.readouterr().out
    for name in ("dfn_clip_h14_378", "tile", "phi_s", "knn", "fidelity", "radio_v2_5_l"):
        assert name in printed
    assert "tiny_vit" not in printed
    assert cli(["list", "teachers", "--all"]) == 0
    assert "tiny_vit" in capfd.readouterr().out


@pytest.mark.parametrize("kind", ["upsamplers", "normalizers", "benchmarks", "recipes"])
def test_list__each_name_is_described_on_its_line(kind, capfd):
    assert cli(["list", kind]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) >= 5
    for line in lines:
        _, text = line.split(maxsplit=1)
        assert len(text.split()) >= 2
        assert not {":mod:", "``"} & set(line.split())


@pytest.mark.parametrize(("command", "expected"), [("trian", "'train'"), ("plann", "'plan'")])
def test_cli__unknown_command(command, expected, capfd):
    assert cli([command]) == 2
    assert expected in capfd.readouterr().err
