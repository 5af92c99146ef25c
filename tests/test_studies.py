"""Studies: pages show the figures of their arms, and arms cost what their study says."""

import json
import pathlib
import subprocess
import sys

import pytest

STUDIES = pathlib.Path(__file__).parents[1] / "studies"
ARMS = """
import json, sys
sys.path.insert(0, {folder!r})
import camvid
from absl import flags
from msvit_jax import config as configs
flags.FLAGS(["camvid"])
found = {{}}
for name in ("dense", *camvid.ARMS):
    model = configs.build_model(camvid.STUDY.resolved(camvid.STUDY.arm(name), 0))
    tokens = camvid.TOKENS if model.has_gate else model.grid_size**2
    found[name] = [float(tokens), float(model.macs(tokens))]
print(json.dumps(found))
"""


def arm(miou, tokens=676.0, gmacs=20.0, **more):
    figures = {"miou": miou, "tokens_mean": tokens, "gmacs_mean": gmacs, "pixel_accuracy": 91.5}
    return {"0": {"figures": {**figures, "iou": {"Sky": 90.25, "Pole": None}}, **more}}


def test_the_page_of_camvid_shows_its_arms(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(STUDIES))
    import camvid_page

    at = [
        {"asked": t, "tokens_mean": t + 1, "gmacs_mean": t / 40, "miou": 50 + t / 100}
        for t in (338.0, 397.0)
    ]
    results = {
        "dense": arm(70.0),
        "msvit": arm(69.125, 400.0, 11.0, at_tokens=at),
        "speed": {"0": {"figures": {"dense": {"images_per_second": 1000.0}}}},
    }
    camvid_page.write_page(results, tmp_path)
    page = (tmp_path / "camvid.md").read_text()
    assert "| dense | 676.0 | 1.000 | 70.00 | 1 | 1,000 | 91.50 |  |" in page
    assert "| msvit | 400.0 | 0.550 | 69.12 | 1 |  | 91.50 |  |" in page
    assert "| 397 | 53.97 at 398.0 |" in page
    assert "| msvit | 90.2 |  |" in page
    assert "| speed" not in page
    assert (tmp_path / "camvid.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_arms_of_camvid_cost_as_much_as_they_say():
    code = ARMS.format(folder=str(STUDIES))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    share = {name: macs / found["dense"][1] for name, (_, macs) in found.items()}
    assert share["longer"] == 1
    equal = ("msvit", "msvit_frozen", "entropy", "algm", "mergence", "tome", "lower_280")
    assert all(0.53 < share[name] < 0.57 for name in equal), share
    assert share["lower_252"] < 0.5
