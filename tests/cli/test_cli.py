"""The console command: what it lists, and that a subcommand is the program it stands for."""

import importlib.util
import pathlib
import subprocess
import sys
import tomllib

import pytest

import msvit_jax
from msvit_jax import cli

ROOT = pathlib.Path(__file__).parents[2]
MSVIT = ("-c", "from msvit_jax import cli; cli.main()")


def python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_console_command_is_the_dispatcher():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"msvit": "msvit_jax.cli:main"}


def test_every_command_has_a_module():
    assert all(importlib.util.find_spec(command.module) for command in cli.COMMANDS.values())


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(argv, capsys):
    cli.main(argv)
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]
    assert listed == list(cli.COMMANDS)
    assert set(listed) >= {
        *("train", "eval", "predict", "export", "prepare"),
        *("visualize", "benchmark", "aot", "demo"),
    }


def test_version(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == f"{msvit_jax.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["trian", "--config=x"])
    assert ended.value.code == 2
    assert "no command 'trian'. Did you mean 'train'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "other"),
    [("train", ["train.py"]), ("eval", ["eval.py"]), ("prepare", ["-m", "msvit_jax.data.prepare"])],
)
def test_a_command_takes_the_flags_of_its_script(name, other):
    ours, theirs = python(*MSVIT, name, "--help"), python(*other, "--help")
    assert ours.stdout == theirs.stdout
    assert "--" in ours.stdout


@pytest.mark.parametrize("program", [(*MSVIT, "train"), ("train.py",)])
def test_overrides_and_errors_are_those_of_training(program, tmp_path):
    flags = ["--config=configs/digits_vit.py", f"--workdir={tmp_path}", "--config.epoch=1"]
    done = python(*program, *flags)
    assert done.returncode == 2
    assert done.stderr.strip().endswith("error: Unknown config key 'epoch'. Did you mean 'epochs'?")


def test_evaluation_without_a_source_says_what_to_give():
    done = python(*MSVIT, "eval")
    assert done.returncode == 2
    assert done.stderr.strip().endswith(
        "error: Give --workdir=DIR, or --weights=FILE and --config=FILE."
    )
