"""The five packages of the project, which must be ours and from one place."""

from importlib.util import find_spec
from pathlib import Path

from radio_distill.errors import ConfigError

PACKAGES = ("radio_distill", "upsamplers", "teachers", "stages", "slurm")


def check_packages() -> None:
    """Make sure that our five packages are ours, and all from one place.

    Other projects install top-level packages called ``slurm`` and ``stages``; nothing is imported
    to find out.

    Raises:
        ConfigError: naming the package that is another project's, and the commands that help.
    """
    home = Path(__file__).resolve().parents[1]
    for name in PACKAGES:
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise ConfigError(f"no `{name}` beside {home}; install radio-distill again")
        origin = Path(spec.origin).resolve()
        if 'PROJECT = "radio-distill"' not in origin.read_text(encoding="utf-8", errors="replace"):
            raise ConfigError(
                f"`{name}` comes from {origin.parent}, which is another project's package of that "
                f"name; run `pip uninstall {name}`, then install radio-distill again"
            )
        if origin.parent != home / name:
            raise ConfigError(
                f"`{name}` comes from {origin.parent}, and this command from {home}; take one of "
                "the two copies of radio-distill off PYTHONPATH, or uninstall it"
            )
