import json
import os
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from radio_distill.system.files import open_regular, printable, replacing, shortened


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


def test_open_regular__refuses_what_could_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    before = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "nothing"):
        with pytest.raises(OSError, match=r"not a regular file|No such file"):
            open_regular(path)
    assert len(os.listdir("/proc/self/fd")) == before
    (tmp_path / "file").write_bytes(b"abc")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"abc"


def test_replacing__a_file_is_whole_or_as_it_was(tmp_path):
    path = tmp_path / "deep" / "file"
    with replacing(path) as draft:
        draft.write_text("one")

    def fail():
        with replacing(path) as draft:
            draft.write_text("half")
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fail()
    assert [(p, p.read_text()) for p in path.parent.iterdir()] == [(path, "one")]
