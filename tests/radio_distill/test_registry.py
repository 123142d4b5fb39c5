"""Registries: lazy, without doubles, and helpful with unknown names."""

import pytest

from radio_distill.errors import ConfigError, UnknownNameError
from radio_distill.registry import Registry


def test_get__imports_on_first_use():
    registry = Registry("thing", {"sqrt": "math:sqrt", "absent": "no_such_module:x"})
    assert registry.get("sqrt")(9) == 3
    assert registry.names() == ["absent", "sqrt"]


def test_get__unknown_name_lists_the_nearest():
    registry = Registry("upsampler", {"bilinear": "a:b", "tile": "a:c"})
    with pytest.raises(
        UnknownNameError, match=r"unknown upsampler 'bilinaer' \(did you mean 'bilinear'\?\)"
    ):
        registry.get("bilinaer")
    with pytest.raises(UnknownNameError, match="known: bilinear, tile"):
        registry.get("xyzzy")


def test_add__doubles_and_malformed_targets():
    registry = Registry("thing", {"a": "m:x"})
    with pytest.raises(ConfigError, match="registered twice: as m:x and as m:y"):
        registry.add("a", "m:y")
    with pytest.raises(ConfigError, match="not of the form module:name"):
        registry.add("b", "m.y")


def test_plugins__an_installed_entry_point_is_found(tmp_path, monkeypatch):
    package = tmp_path / "plugin-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[radio_distill.gadgets]\nroot = math:sqrt\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert Registry("gadget", {}).get("root")(4) == 2
