"""The script for a GPU, small, on a processor."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "studies" / "gpu.py"


@pytest.mark.slow
def test_steps_are_written_one_by_one_and_what_was_left_out_is_named(tmp_path):
    out = tmp_path / "gpu.json"

    def run(*arguments):
        command = [sys.executable, str(SCRIPT), "--small", f"--out={out}", *arguments]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return json.loads(out.read_text())

    found = run("--steps=layouts,forward", "--batches=8")
    assert max(each["error"] for each in found["layouts"]["records"]) < 1e-5
    sides = {each["layout"]: each for each in found["forward, 8"]["records"]}
    assert set(sides) >= {"dense", "dense, XLA", "budget", "rows", "mergence", "ToMe"}
    assert all(each["images_per_second"] > 0 for each in sides.values())
    assert "train" not in found
    assert "minutes were over" in run("--steps=train", "--minutes=0")["train"]["left out"]
