import json

import pytest

from msvit_jax.aot import report
from msvit_jax.aot.topology import CHIPS, Topology

V5E = Topology("v5e:2x2", CHIPS["v5e"], [None] * 4)


def _record(layout="dense", **changes):
    record = {
        "layout": layout,
        "capacity": "whole grid",
        "what": "train",
        "batch": 64,
        "fits": True,
        "memory_gib": 1.5,
        "gmacs_per_image": 4.6,
        "gbytes_accessed": 12.0,
        "mcycles": 40.0,
        "kernels": {"calls": 0},
        "loops": 0,
        "collectives": {"all-reduce": {"count": 3, "bytes": 2**21}},
        "limits": {
            "products": 1.0,
            "memory": 2.5,
            "links": 0.1,
            "kernels": 0.0,
            "links_share": 0.0385,
        },
        "compile_seconds": 2.0,
    }
    return {**record, **changes}


def _shown(capsys, *records):
    fits = report.show(records, V5E)
    out, err = capsys.readouterr()
    return fits, out.splitlines(), err


def test_layouts_stand_side_by_side_and_json_comes_last(capsys):
    records = [_record(), _record("rows", mcycles=26.0, collectives={})]
    fits, lines, err = _shown(capsys, *records)
    assert fits
    assert not err
    assert "4 x v5e (v5e:2x2), batch 64 (16 a chip)" in lines[0]
    dense, rows = (line for line in lines if line.strip().startswith(("dense", "rows")))
    assert "1.000" in dense
    assert "all-reduce 3 (2.0 MiB)" in dense
    assert "0.650" in rows
    assert "none" in rows
    assert "1.00 / 2.50" in dense
    assert "3.9%" in dense
    assert len(lines) == 7
    assert json.loads(lines[-1])["records"] == records


def test_what_does_not_fit_is_said_beside_what_does(capsys):
    large = {"layout": "slots", "capacity": "whole grid", "what": "train", "batch": 64}
    large |= {"fits": False, "needs_gib": 21.5, "has_gib": 15.75}
    for records in ([_record(), large], [large, _record()]):
        fits, lines, err = _shown(capsys, *records)
        assert not fits
        assert "slots does not fit: 21.5 GiB of 15.75 GiB; try a smaller batch_size" in err
        assert json.loads(lines[-1])["records"] == records


@pytest.mark.parametrize(
    ("key", "note"),
    [
        ("loops", "count a body once"),
        ("loops_of_unknown_length", "do not say how often"),
    ],
)
def test_what_figures_leave_out_is_said(capsys, key, note):
    _, plain, _ = _shown(capsys, _record())
    _, noted, _ = _shown(capsys, _record(**{key: 2}))
    assert not any(note in line for line in plain)
    assert any(note in line for line in noted)


def test_kernels_have_their_least_time_beside_them(capsys):
    limits = {**_record()["limits"], "kernels": 1.25}
    record = _record(kernels={"calls": 12, "vmem": 3 * 2**19}, limits=limits)
    _, lines, _ = _shown(capsys, record)
    (dense,) = (line for line in lines if line.strip().startswith("dense"))
    assert "12, 1.25 ms" in dense
    assert dense.split("ms", 1)[1].split()[0] == "1.5"
    assert any("Pallas kernels are not estimated" in line for line in lines)
