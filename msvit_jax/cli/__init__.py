"""The console command `msvit`: one subcommand for each task of the library.

    msvit train --config=digits_msvit --workdir=runs/msvit

A subcommand takes the flags of the module behind it; `msvit predict` and
`python -m msvit_jax.predict` are the same program.
"""

import dataclasses
import runpy
import sys
from collections.abc import Sequence

import msvit_jax
from msvit_jax import extras
from msvit_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Command:
    """A subcommand of `msvit`.

    Attributes:
      module: Module that is run as the main program.
      summary: One line of `msvit --help`.
      extra: Extra of the installation that the module needs.
    """

    module: str
    summary: str
    extra: str = "train"


COMMANDS = {
    "train": Command("msvit_jax.cli.train", "train a model, or resume its training"),
    "eval": Command("msvit_jax.cli.evaluate", "evaluate a run or a weights file"),
    "predict": Command("msvit_jax.predict", "classify image files"),
    "export": Command(
        "msvit_jax.export", "write weights or compiled functions for other projects", "export"
    ),
    "prepare": Command("msvit_jax.data.prepare", "make a data set of your own images", "data"),
    "visualize": Command("msvit_jax.visualize", "draw where a model spends its tokens"),
    "benchmark": Command("msvit_jax.benchmark", "measure speed beside the dense model"),
    "aot": Command("msvit_jax.aot", "compile a training or prediction step for absent TPUs"),
    "demo": Command("msvit_jax.demo", "train and compare a dense ViT and MSViT in minutes"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand and exits with its code.

    Args:
      argv: Name of the subcommand, then its arguments; None for the process's own.
    """
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("--help", "-h", "help"):
        print(usage())
    elif name == "--version":
        print(msvit_jax.__version__)
    elif name in COMMANDS:
        _run(COMMANDS[name], arguments)
    else:
        _fail(f"There is no command {name!r}.{nearest(name, COMMANDS)} msvit --help lists all.")


def usage() -> str:
    """Returns the text of `msvit --help`."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    head = "usage: msvit <command> [flags]; msvit <command> --help lists a command's flags\n"
    return "\n".join([head, *lines])


def _run(command: Command, arguments: Sequence[str]) -> None:
    """Runs a module as `python -m` does, so that both are the same program."""
    sys.argv[1:] = arguments
    try:
        with extras.needed(command.extra):
            runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    except UserError as error:  # from an import; later ones are reported by `errors.run`
        _fail(str(error))


def _fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
