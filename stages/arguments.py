"""Command lines: one-line errors, recipe fields as flags, and a face for every sub-command."""

import argparse
import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from radio_distill.config import Recipe, assignments_of, describe_fields, yaml_line
from radio_distill.errors import ConfigError, RadioDistillError
from radio_distill.registry import nearest
from radio_distill.system.files import check_writable, printable, reason_of
from radio_distill.system.redaction import redact, redact_output
from radio_distill.system.trust import FLAG, FLAG_HELP, trusting_pickles

_LONGEST = 1500  # characters of an error; the hint stands at its end


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest valid name."""

    def __init__(self, **settings: Any):
        # --stage.steps is a field, not short for --stages.
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings
        )
        # A shell leaves --output=~/runs as it is, which would become a folder called ~.
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError instead of printing the usage."""
        raise ConfigError(f"{message} (`{self.prog} --help` lists the arguments)")

    def parse(
        self, argv: Sequence[str] | None, takes_fields: bool
    ) -> tuple[argparse.Namespace, list[str]]:
        """Return the parsed arguments and the recipe fields as ``field.name=value``."""
        plain = list(sys.argv[1:] if argv is None else argv)
        plain, fields = split_fields(plain) if takes_fields else (plain, [])
        arguments, unknown = self.parse_known_intermixed_args(plain)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name for action in self._actions for name in action.option_strings]
            known += [f"--{row[0]}" for row in describe_fields(Recipe)] if takes_fields else []
            raise ConfigError(f"unknown argument {flag!r} ({_nearest_flag(flag, known)})")
        if named := vars(arguments).pop(_RECIPE_FLAG, None):
            if arguments.recipe not in (self.get_default("recipe"), named):
                raise ConfigError(f"two recipes, {arguments.recipe!r} and --recipe {named!r}")
            arguments.recipe = named
        if vars(arguments).get("recipe") == _NOT_NAMED:
            arguments.recipe = "demo"
            if os.environ.get("RANK", "0") == "0":
                print("no recipe is named, so it is demo", file=sys.stderr)
        if folder := vars(arguments).pop(_RUN_FOLDER, None):
            fields.insert(0, f"output={yaml_line(folder)}")
        return arguments, fields


_RECIPE_FLAG, _RUN_FOLDER = "recipe_flag", "run_folder"
_NOT_NAMED = ""


def _nearest_flag(flag: str, known: list[str]) -> str:
    same_ending = [name for name in known if name.rpartition(".")[2] == flag.lstrip("-")]
    if same_ending:
        return f"did you mean {same_ending[0]}?"
    known = [name for name in known if name != flag]  # of another command's arguments
    return nearest(flag, known) if len(known) < 20 else nearest(flag, known).partition(",")[0]


_OVERRIDE = "override"
_WITHOUT_DOT = ("name", "seed", _OVERRIDE)


def split_fields(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take ``--field.name value`` and ``--field.name=value`` out of a command line.

    A field is known by the dot in its name; of those without one, by the name itself. Behind
    ``--override`` stands a YAML file of fields, or one field as ``field.name=value``.

    Returns:
        What is left, and the fields as ``field.name=value``.
    """
    rest, fields, arguments = [], [], list(argv)
    while arguments:
        flag = arguments.pop(0)
        name, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or ("." not in name and name not in _WITHOUT_DOT):
            rest.append(flag)
            continue
        if not equals:
            if not arguments:
                raise ConfigError(f"--{name} needs a value")
            value = arguments.pop(0)
        if name != _OVERRIDE:
            fields.append(f"{name}={value}")
        else:
            fields += [value] if "=" in value else assignments_of(value)
    return rest, fields


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; an error of the user's becomes one line on stderr, and its exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    redact_output()
    for noisy in ("DeepSpeed", "timm", "torch", "PIL", "matplotlib", "onnx_ir", "onnxscript"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_chatter)
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output, `head` for instance, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except RadioDistillError as error:
        print("radio-distill:", "\n".join(map(_line, error.args)), file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE or error.filename is None:
            raise
        print("radio-distill:", _line(_what_the_machine_refuses(error)), file=sys.stderr)
        return RadioDistillError.exit_status
    except KeyboardInterrupt as error:
        print("radio-distill:", _line(error) or "stopped", file=sys.stderr)
        return _end_at_once(130)


def _is_no_chatter(record: logging.LogRecord) -> bool:
    """Leave out what open_clip says of every model it builds, in the root logger's name."""
    return record.levelno >= logging.ERROR or "open_clip" not in Path(record.pathname).parts


_OF_THE_MACHINE = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ELOOP,
    errno.ENAMETOOLONG,
)  # fmt: skip
"""What a file or its disk refuses anybody; all else that escapes is a bug of ours."""


def _what_the_machine_refuses(error: OSError) -> str:
    hint = "ask its owner for access (chmod -R a+rX to read it), or name another"
    if error.errno not in (errno.EACCES, errno.EPERM):
        hint = "name another, or make room"
    return f"{error.filename}: {reason_of(error).lower()}; {hint}"


def _end_at_once(status: int) -> int:
    """Return the status; where threads still work on something, end without waiting for them."""
    main = threading.main_thread()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not main):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _line(problem: object) -> str:
    """Return one printable line of bounded length, whatever names a message repeats."""
    text = redact(" ".join(str(problem).split()))
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return printable(text)


def run_module(module: ModuleType, argv: Sequence[str] | None, prog: str | None = None) -> int:
    """Parse the arguments of a command's module and run it.

    The module has ``add_arguments(parser)`` and ``run(arguments) -> int``. Where it takes recipe
    fields, its ``TAKES_FIELDS`` is true, and they arrive in ``arguments.fields`` as
    ``field.name=value``.
    """
    takes_fields = getattr(module, "TAKES_FIELDS", False)
    parser = Parser(
        prog=prog,
        description=module.__doc__,
        epilog=FIELDS_HELP if takes_fields else None,
    )
    module.add_arguments(parser)
    arguments, fields = parser.parse(argv, takes_fields)
    arguments.fields = fields
    with trusting_pickles(getattr(arguments, "trust_checkpoint", False)):
        return int(module.run(arguments) or 0)


def size_of(text: str) -> tuple[int, int]:
    """Read ``64`` or ``64x96`` as (height, width), for argparse's ``type``."""
    match = re.fullmatch(r"(\d+)(?: ?[xX\N{MULTIPLICATION SIGN}] ?(\d+))?", text.strip())
    size = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not all(size):
        raise argparse.ArgumentTypeError(f"{text!r} is no size, such as 64 or 64x96, in px")
    return size


def side_of(text: str) -> int:
    """Read ``64`` or ``64x64`` as the side of a square, for argparse's ``type``."""
    height, width = size_of(text)
    if height != width:
        raise argparse.ArgumentTypeError(f"{text!r}: only squares here; give one side, in px")
    return height


def count_of(text: str) -> int:
    """Read a number of images, of which 0 is all, for argparse's ``type``."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of images, such as 20; 0 for all")
    return int(text)


def joined_size(sizes: Sequence[tuple[int, int]], flag: str) -> tuple[int, int]:
    """Return the one size that was given as ``64``, ``64x96`` or ``64 96`` with :func:`size_of`.

    Raises:
        ConfigError: it is none of these.
    """
    if len(sizes) == 1:
        return sizes[0]
    if len(sizes) == 2 and all(height == width for height, width in sizes):
        return sizes[0][0], sizes[1][0]
    raise ConfigError(f"{flag} takes one side, or height and width: {flag} 64 96, or {flag} 64x96")


FIELDS_HELP = """\
Every field of the recipe can be set: --FIELD VALUE, for instance --stages.stage1.steps 100;
--override FILE sets those of a YAML file. `radio-distill fields` lists them."""


def add_recipe_argument(parser: argparse.ArgumentParser) -> None:
    """Add the recipe, everywhere a positional argument; ``--recipe RECIPE`` says the same."""
    parser.add_argument(
        "recipe", nargs="?", default=_NOT_NAMED, help="name or file of a recipe (default: demo)"
    )
    parser.add_argument("--recipe", dest=_RECIPE_FLAG, help=argparse.SUPPRESS)


def add_run_folder_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--output`` of the commands that make run folders: the recipe's field of that name."""
    text = "folder for run folders (default: runs)"
    parser.add_argument("--output", dest=_RUN_FOLDER, metavar="DIR", help=text)


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes that trains something of a recipe: stages and fits."""
    add_recipe_argument(parser)
    add_run_folder_argument(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument(
        "--allow-changed-recipe",
        action="store_true",
        help="resume although the recipe or the shards differ from the checkpoint's",
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take the folder from a run that is going on in it; that one stops",
    )
    add_trust_argument(parser)


def add_images_argument(parser: argparse.ArgumentParser) -> None:
    """Add the images that a command looks at."""
    parser.add_argument(
        "--images", metavar="DIR", help="folder or shards (default: the recipe's evaluation.images)"
    )


def add_num_images_argument(parser: argparse.ArgumentParser, default: int) -> None:
    """Add how many of the images a command shows."""
    parser.add_argument(
        "--num-images",
        type=count_of,
        default=default,
        metavar="N",
        help="images to show (default: %(default)s)",
    )


def add_trust_argument(parser: argparse.ArgumentParser) -> None:
    """Add the flag of commands that read weights of others."""
    parser.add_argument(FLAG, action="store_true", help=FLAG_HELP)


def run_script(module: ModuleType, argv: Sequence[str] | None = None) -> int:
    """Run a command's module as a script of its own."""
    return run_command(lambda: run_module(module, argv))


def check_output(path: Path, flag: str = "--output", is_folder: bool = False) -> None:
    """Check that a file, or files in a folder, can be written before the work is done.

    Raises ConfigError where it cannot; see :func:`writing`.
    """
    with writing(path, flag):
        check_writable(path if is_folder else path.parent)
        if path.is_dir() and not is_folder:
            raise OSError("it is a folder")


@contextmanager
def writing(path: Path, flag: str = "--output") -> Iterator[None]:
    """Make an OSError of the block a ConfigError, whose hint is to choose another with ``flag``."""
    try:
        yield
    except OSError as error:
        reason = reason_of(error)
        raise ConfigError(f"cannot write {path}: {reason}; choose another with {flag}") from error
