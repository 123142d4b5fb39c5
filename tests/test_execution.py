"""Nothing in the five packages runs what it reads, apart from the places that say so."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from radio_distill.data.find import find_shards
from radio_distill.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("radio_distill", "upsamplers", "teachers", "stages", "slurm")
ALLOWED = {
    ("radio_distill/data/remote.py", "shell=True"),  # pipe: with data.commands
    ("radio_distill/export/timm_body.py", "exec"),  # the lines that it writes on the card
    ("radio_distill/system/trust.py", "torch.load without weights_only=True"),  # --trust-checkpoint
    ("teachers/sources/remote_code.py", "trust_remote_code=True"),  # options.trust_remote_code
    ("upsamplers/external.py", "torch.hub.load"),  # options.repository, source="local"
}
NEVER_IMPORTED = ("pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")
NEVER_CALLED = (
    "eval", "exec", "os.system", "os.popen", "torch.jit.load", "torch.hub.load", "torch.package",
    "torch.distributed.checkpoint.load", "dcp.load", "yaml.unsafe_load", "yaml.full_load",
    "runpy.run_path", "webdataset.WebDataset", "wds.WebDataset",
)  # fmt: skip
NEVER_METHODS = ("load_checkpoint", "load_state_dict_from_url")  # DeepSpeed's engine, torch.hub's


def calls_that_run_what_they_read(source: str) -> set[str]:
    tree = ast.parse(source)
    safe_loaders = {
        item.name
        for item in ast.walk(tree)
        if isinstance(item, ast.ClassDef)
        and any(ast.unparse(base) == "yaml.SafeLoader" for base in item.bases)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {f"import of {name}" for name in _imported(node)}
        elif isinstance(node, ast.Call):
            found |= set(_problems(node, safe_loaders))
    return found


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.module == "pickle" and names == ["UnpicklingError"]:
            return  # torch's word for what it refused
        names = [node.module or ""] if not node.level else []
    yield from (name for name in names if name.partition(".")[0] in NEVER_IMPORTED)


def _problems(call: ast.Call, safe_loaders: set[str]) -> Iterator[str]:
    name = ast.unparse(call.func)
    given = {item.arg: ast.unparse(item.value) for item in call.keywords}
    positional = [ast.unparse(item) for item in call.args]
    if name in NEVER_CALLED:
        yield name
    if name.rpartition(".")[2] in NEVER_METHODS:
        yield name.rpartition(".")[2]
    if name == "torch.load" and given.get("weights_only") != "True":
        yield "torch.load without weights_only=True"
    if name == "yaml.load" and not {*positional[1:], *given.values()} & safe_loaders:
        yield "yaml.load"
    if given.get("allow_pickle", "False") != "False":
        yield "allow_pickle"
    for flag in ("shell", "trust_remote_code"):
        if given.get(flag, "False") != "False":
            yield f"{flag}={given[flag]}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages__run_nothing_that_they_read(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {
        (path.relative_to(ROOT).as_posix(), problem)
        for path in files
        for problem in calls_that_run_what_they_read(path.read_text(encoding="utf-8"))
    }
    assert found == {item for item in ALLOWED if item[0].startswith(f"{package}/")}


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=safe)",
        "import pickle",
        "from pickle import loads",
        "import joblib.memory",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "exec(code)",
        "subprocess.run(command, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=trusted)",
        "torch.hub.load(name, 'model')",
        "engine.load_checkpoint(folder)",
        "wds.WebDataset(urls)",
    ],
)
def test_calls_that_run_what_they_read__are_found(line):
    assert calls_that_run_what_they_read(line)


def test_calls_that_run_what_they_read__safe_ones_are_not():
    safe = """
class Strict(yaml.SafeLoader):
    pass
yaml.load(text, Strict)
yaml.safe_load(text)
torch.load(path, weights_only=True)
model.eval()
np.load(path, allow_pickle=False)
AutoTokenizer.from_pretrained(name, trust_remote_code=False)
"""
    assert calls_that_run_what_they_read(safe) == set()


@pytest.mark.parametrize("address", ["pipe:touch ran", "http://127.0.0.1:9/a.tar", "| touch ran"])
def test_find_shards__addresses_are_no_files(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no shards found") as error:
        find_shards([address])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_external__takes_only_code_that_the_user_has():
    tree = ast.parse((ROOT / "upsamplers" / "external.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    (load,) = [call for call in calls if ast.unparse(call.func) == "torch.hub.load"]
    assert {item.arg: ast.unparse(item.value) for item in load.keywords}["source"] == "'local'"
