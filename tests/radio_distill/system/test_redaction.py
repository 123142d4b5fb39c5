"""A secret does not get out of this process in words; what is none stays as it is."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from radio_distill.system.redaction import redact, secrets_in

ROOT = Path(__file__).resolve().parents[3]
HF = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz12345678"
SECRETS = {
    HF: f"401 for token {HF} here",
    "ghp_" + "a1B2" * 9: f"cloning with {'ghp_' + 'a1B2' * 9}",
    "github_pat_" + "11ABCDEFG0_" * 4: f"({'github_pat_' + '11ABCDEFG0_' * 4})",
    "sk-proj-" + "a1B2c3D4" * 4: f"key=sk-proj-{'a1B2c3D4' * 4}",
    "AKIA" + "ABCD2345" * 2: f"'AKIA{'ABCD2345' * 2}'",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl": "jwt "
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "xoxb-1234567890-abcdef": "slack xoxb-1234567890-abcdef",
    "glpat-abcdefghij0123456789": "glpat-abcdefghij0123456789",
    "s3cr3t:w0rd": "cannot reach https://me:s3cr3t:w0rd@proxy.example:3128/path",
    "me:s3cr3t": "git+ssh://me:s3cr3t@host/x",
    "opaque-value-77": "headers {'Authorization': 'Bearer opaque-value-77'}",
    "QWxhZGRpbjpvcGVu": "Authorization: Basic QWxhZGRpbjpvcGVu",
    "abc123": "GET https://x.example/f.tar?a=1&token=abc123&b=2",
    "f00dfeed": "https://x.example/f?X-Amz-Credential=me&X-Amz-Signature=f00dfeed",
    "hunter2hunter2": '{"password": "hunter2hunter2"}',
}


@pytest.mark.parametrize(("secret", "text"), SECRETS.items())
def test_redact__by_looks_and_by_place(secret, text):
    found = redact(text)
    assert secret not in found
    assert "***" in found


def test_redact__keeps_what_stands_around_a_secret():
    text = f"403 for https://u:p@hub.example/m?token=abc&rev=main ({HF}), try again"
    assert redact(text) == "403 for https://***@hub.example/m?token=***&rev=main (***), try again"


def test_redact__values_of_the_environment(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain words/+=")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2)
    monkeypatch.setenv("DEPLOY_KEY_PASSPHRASE", "first line\nsecond line")
    assert redact("got plain words/+= back") == "got *** back"
    assert redact("?key=plain%20words%2F%2B%3D") == "?key=***"
    assert redact("key " + "0123456789abcdef" * 2) == "key ***"
    assert redact("first line second line") == "*** ***"


def test_redact__variables_that_only_sound_like_secrets(monkeypatch, tmp_path):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "sometimes")
    monkeypatch.setenv("MAX_TOKENS", "100000000")
    monkeypatch.setenv("HF_TOKEN_PATH", "/nowhere/token")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", "short")
    text = f"sometimes 100000000 /nowhere/token {tmp_path} short"
    assert redact(text) == text


def test_redact__leaves_what_the_project_writes():
    names = ["*.md", "docs/*.md", "radio_distill/config/recipes/*.yaml"]
    names += [f"{name}/**/*.py" for name in ("radio_distill", "teachers", "upsamplers", "stages")]
    for path in {path for name in names for path in ROOT.glob(name)}:
        text = path.read_text(encoding="utf-8")
        assert path.name == "redaction.py" or redact(text) == text, path


@pytest.mark.parametrize(
    "text",
    [
        f"teachers.x: /data/w.safetensors has sha256 {'0a1b2c3d' * 8}, not x",
        f"hub: timm/vit_large_patch14_reg4_dinov2.lvd142m, revision {'607a30d7' * 5}",
        "cannot fetch https://huggingface.co/timm/x/resolve/main/model.safetensors: 404",
        "cls_token: (1, 2, 768) for (1, 1, 768); reg_token: torch.Size([1, 4, 768])",
        "step 100  loss 1.2345  1234 img/s  eta 1:02:03  token/s 3.4e6",
        "/home/me/sk-learn_data/task-results/hf_hub/runs/demo/stage3-tile",
        "data.shards: s3://bucket/a.tar, pipe:cat x.tar, user@host:/data",
    ],
)
def test_redact__leaves_sums_paths_and_names(text):
    assert redact(text) == text


def test_secrets_in__names_their_fields():
    recipe = {
        "name": "x",
        "data": {"shards": ["a.tar", "https://me:pw@host/b.tar"]},
        "teachers": {
            "dino": {"options": {"token": "abcdefgh", "model": "m"}},
            "clip": {"weights": f"/data/{HF}/w", "options": {"cls_token": "averaged", "key": 3}},
            "sam": {"options": {"token": "mean", "nested": {"api_key": "12345678"}}},
        },
    }
    assert secrets_in(recipe) == [
        "data.shards.1",
        "teachers.dino.options.token",
        "teachers.clip.weights",
        "teachers.sam.options.nested.api_key",
    ]


def test_secrets_in__a_value_of_the_environment(monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "nothing-special")
    assert secrets_in({"a": {"b": "x nothing-special"}, "c": None, "d": 3}) == ["a.b"]


def test_secrets_in__finds_none_in_the_recipes():
    for path in sorted((ROOT / "radio_distill/config/recipes").glob("*.yaml")):
        assert secrets_in(yaml.safe_load(path.read_text(encoding="utf-8"))) == []


PROGRAM = """
import logging, os, sys, threading, warnings
from radio_distill.system import redaction
redaction.redact_output()
redaction.redact_output()
logging.basicConfig(format="%(name)s %(message)s")
own = logging.StreamHandler(sys.stdout)
library = logging.getLogger("library")
library.propagate = False
library.addHandler(own)
token = os.environ["HF_TOKEN"]
logging.warning("plain %s", token)
logging.warning("broken %d %d", token)
library.error("%(who)s has %(token)s", {"who": "me", "token": token})
try:
    raise OSError(f"403 with {token}")
except OSError:
    logging.exception("failed")
warnings.warn(f"old {token}")
thread = threading.Thread(target=lambda: int(token))
thread.start()
thread.join()
raise RuntimeError(f"https://me:pass-word@host: {token}")
"""


def test_redact_output__nothing_that_a_process_says_holds_a_secret():
    token = "quite-ordinary-words"
    command = [sys.executable, "-c", PROGRAM]
    environment = {"HF_TOKEN": token, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = ended.stdout + ended.stderr
    assert ended.returncode == 1
    assert token not in said
    assert "pass-word" not in said
    for part in (
        "root plain ***\n",
        "broken %d %d ('***',)",
        "me has ***\n",
        "OSError: 403 with ***\n",
        "UserWarning: old ***\n",
        "ValueError: invalid literal",
        "RuntimeError: https://***@host: ***\n",
    ):
        assert part in said
    assert said.count("Traceback") == 3


def test_import__changes_nothing():
    """In a process of its own: another test may have installed it in this one."""
    code = (
        "import logging, warnings, radio_distill.system.redaction; "
        "assert logging.getLogRecordFactory() is logging.LogRecord; "
        "assert warnings.formatwarning.__module__ == 'warnings'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_redact__is_quick_on_long_lines():
    """Patterns that look back and forth would take minutes here, and the time-out would tell."""
    for part in ("a", "://", "?a", "sk-", "password", "eyJaaaaaaaaa.", "hf_"):
        assert redact(part * 100_000)[:1] in ("*", part[0])


def test_redact__json_stays_json():
    settings = {"token": "x" * 5, "password": "a1b2c3d4e5", "n": 1}
    assert json.loads(redact(json.dumps(settings)))["password"] == "***"
