import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from radio_distill.data.names import is_hidden, is_safe, printable, shortened, split_name


@pytest.mark.parametrize(
    "name",
    [
        *["a.png", "./a.png", "d.x/..a/b.png", "é.png", "🦊", "a b..png"],
        *["a\u202fb", "\u00a0", "🧑\u200d💻", "\udce9", "\U0001fae8", "a\\b"],
    ],
)
def test_is_safe__plain_names(name):
    assert is_safe(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "/a.png",
            "..",
            "../a",
            "a/../b",
            "a\0b",
            "a\rb",
            "a\x7f",
            "\u2028",
            "\ud800",
            "a" * 1001,
        ),
        *("\x85", "\u2029", "\u202e", "\u2066", "\u200f", "\u061c"),
    ],
)
def test_is_safe__hostile_names(name):
    assert not is_safe(name)


@given(st.text(st.characters(codec=None)))
@example("\udcff\ud800\x1b[31m\u202e\n")
def test_printable__anything_can_be_logged(name):
    for text in (printable(name), shortened(name)):
        assert text.isprintable()
        assert json.loads(json.dumps(text, ensure_ascii=False).encode()) == text
    assert len(shortened(name)) <= 100
    assert not name.isprintable() or printable(name) == name


def test_printable__two_forms_of_a_letter_stay_two():
    forms = {printable(unicodedata.normalize(form, "é")) for form in ("NFC", "NFD")}
    assert len(forms) == 2


@given(st.lists(st.sampled_from([".", "/", "a", "B", "__", "x.y"]), max_size=6).map("".join))
def test_split_name__as_webdataset_does(name):
    from webdataset.tariterators import base_plus_ext

    key, suffix = split_name(name)
    theirs_key, theirs_suffix = base_plus_ext(name)
    is_meta = "/" not in name and name.startswith("__") and name.endswith("__")
    is_hidden = name.rpartition("/")[2].startswith(".")  # webdataset gives some the folder's key
    if theirs_key and theirs_suffix and not is_meta and not is_hidden:
        assert (key, suffix) == (theirs_key, theirs_suffix.lower())
    else:
        assert suffix == ""


def test_is_hidden__files_that_systems_make():
    hidden = [".ipynb_checkpoints", "._a.jpg", ".DS_Store", "Thumbs.db", "__MACOSX", "desktop.ini"]
    assert all(map(is_hidden, hidden))
    assert not any(map(is_hidden, [".", "..", "a.jpg", "a.", "thumbs", "macosx"]))
