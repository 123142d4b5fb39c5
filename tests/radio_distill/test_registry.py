"""Registries: lazy, without doubles, and helpful with unknown names."""

import pytest

from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.registry import Registry, check_has, check_takes, nearest


def test_get__imports_on_first_use():
    registry = Registry("thing", {"sqrt": "math:sqrt", "absent": "no_such_module:x"})
    assert registry.get("sqrt")(9) == 3
    assert registry.names() == ["absent", "sqrt"]


def test_get__unknown_name_lists_the_nearest():
    registry = Registry("upsampler", {"bilinear": "a:b", "tile": "a:c"})
    with pytest.raises(UnknownNameError, match=r"upsampler 'bilinaer'.*'bilinear'"):
        registry.get("bilinaer")
    with pytest.raises(UnknownNameError, match="bilinear, tile"):
        registry.get("xyzzy")


def test_get__what_cannot_be_imported_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    targets = {"absent": "no_such_module:x", "empty": "math:nothing", "broken": "broken_module:x"}
    registry = Registry("thing", targets)
    messages = {
        "absent": r"thing 'absent' \(no_such_module:x\) cannot be imported: ModuleNotFoundError",
        "empty": "math has no 'nothing'",
        "broken": "cannot be imported: ZeroDivisionError: division by zero",
    }
    for name, message in messages.items():
        with pytest.raises(ConfigError, match=message) as error:
            registry.get(name)
        assert "\n" not in str(error.value)


def test_nearest__what_begins_so_goes_before_what_is_spelt_alike():
    known = ["vit_base_patch16_224", "vit_tiny_patch16_224", "vit_tiny_patch16_384", "deit_tiny"]
    assert nearest("vit_tiny", known).startswith("did you mean 'vit_tiny_patch16_224' or")
    assert nearest("vit_tiny_patch16_244", known) == "did you mean 'vit_tiny_patch16_224'?"


def test_nearest__a_long_list_is_cut_and_counted():
    line = nearest("zzz", [f"model_{number:04}" for number in range(1000)])
    assert len(line) < 120
    assert "model_0000" in line
    assert "1000 in all" in line
    assert nearest("", ["a", "b"]) == "known: a, b"


def test_check_takes__names_the_call_and_what_is_wrong():
    def takes_two(low, high):
        return low, high

    check_takes("it", takes_two, ("low",), ("high",))
    with pytest.raises(ConfigError, match=r"\(low, factor=…\).*'high'"):
        check_takes("it", takes_two, ("low",), ("factor",))
    with pytest.raises(ConfigError, match="int"):
        check_takes("it", 3)


def test_check_has__names_what_is_missing():
    class Thing:
        cost = 1

    check_has("it", Thing, ("cost",))
    with pytest.raises(ConfigError, match="__call__, run"):
        check_has("it", Thing, ("cost", "__call__", "run"))


def test_add__doubles_and_malformed_targets():
    registry = Registry("thing", {"a": "m:x"})
    with pytest.raises(ConfigError, match=r"m:x.*m:y"):
        registry.add("a", "m:y")
    with pytest.raises(ConfigError, match="module:name"):
        registry.add("b", "m.y")


def test_plugins__an_installed_entry_point_is_found(tmp_path, monkeypatch):
    package = tmp_path / "plugin-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[radio_distill.gadgets]\nroot = math:sqrt\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Registry("gadget", {}).get("root")(4) == 2
