"""The commit that is reported is the one of this code."""

import subprocess

from msvit_jax.benchmark import machine


def _git(root, *arguments):
    named = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    command = ["git", "-C", str(root), *named, *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def test_commit_of_a_checkout(tmp_path):
    assert machine.commit(tmp_path) is None
    _git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    _git(tmp_path, "add", "code.py")
    _git(tmp_path, "commit", "-m", "one")
    head = _git(tmp_path, "rev-parse", "HEAD")
    assert machine.commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert machine.commit(tmp_path) == f"{head}-dirty"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert machine.commit(inside) is None
