"""The comparison with PyTorch takes turns with another interpreter, and does without it."""

import json
import pathlib
import subprocess
import sys

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "studies" / "peers.py"
STUB = """#!{python}
import json, sys
log = open({log!r}, "w")
print(json.dumps({{"timm": "0", "threads": 1}}), flush=True)
for line in sys.stdin:
    log.write(line)
    request = json.loads(line)
    if request["do"] == "make":
        answer = {{"error": "no compiler"}} if request["compile"] else {{"fused_attention": True}}
    else:
        answer = {{"seconds": 100.0}}
    print(json.dumps(answer), flush=True)
"""
SIZES = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "gate_hidden": 4}


def _run(*arguments):
    command = [sys.executable, str(SCRIPT), "--rounds=1", "--batch=1", "--threads=1"]
    command += [f"--set={key}={value}" for key, value in SIZES.items()]
    command += ["--tokens=9", "--spread=3", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


@pytest.mark.slow
def test_takes_turns_with_another_interpreter(tmp_path):
    stub, log = tmp_path / "python", tmp_path / "log"
    stub.write_text(STUB.format(python=sys.executable, log=str(log)))
    stub.chmod(0o755)
    done, report = _run(f"--torch_python={stub}", "--compile")
    assert done.returncode == 0, done.stderr
    dense, timm = report["records"]
    assert (dense["layout"], timm["layout"]) == ("dense", "timm")
    assert "timm_compiled is not measured: no compiler" in done.stdout
    assert report["peer"] == {"timm": "0", "threads": 1}
    assert report["machine"]["cores"] == 1
    # Sixteen single images in 100 s, whatever our side needed.
    assert timm["images_per_second"] == pytest.approx(0.16)
    assert timm["speedup"] == pytest.approx(16 / dense["images_per_second"] / 100)
    assert timm["dense_speedup"] == pytest.approx(1 / timm["speedup"])
    assert timm["gmacs"] == dense["gmacs"]
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["do"] for r in requests] == ["make", "make", "time", "time", "time"]
    assert requests[0]["model"] == "deit_small_patch16_224"
    names = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2}
    assert requests[0]["sizes"] == names
    assert requests[2]["calls"] == 16


@pytest.mark.slow
def test_goes_on_without_timm():
    done, report = _run("--layouts=budget")
    assert done.returncode == 0, done.stderr
    layouts = [record["layout"] for record in report["records"]]
    assert layouts[:2] == ["dense", "budget"]
    if "timm" not in layouts:
        assert "timm is not measured: ModuleNotFoundError" in done.stdout
        assert report["peer"] is None


@pytest.mark.slow
def test_an_interpreter_that_is_not_there():
    done, _ = _run("--torch_python=/nowhere/python")
    assert done.returncode == 2
    assert "'/nowhere/python' cannot be started (No such file or directory)" in done.stderr
