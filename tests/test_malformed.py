"""Damaged files of every kind: a right answer or one line, and nothing is done or taken."""

import os
import sys

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from msvit_jax import checkpoint, create_model
from msvit_jax.errors import UserError
from msvit_jax.inference import Predictor
from tests.export import made
from tools import fuzz_files
from tools.file_kinds import KINDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
# Cases of each kind by number: some that are made by hand, and the first ones by chance.
BY_HAND = {
    "ours": (0, 1, 4, 16, 22, 23),
    "big_vision": (0, 1),
    "pytorch": (0, 10, 20, 31, 32),
    "run": (0, 1, 3),
    "transformers": (0, 5),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Reads changed copies of the examples, which are made once."""
    root = tmp_path_factory.mktemp("malformed")
    scratch, before = tmp_path_factory.mktemp("scratch"), os.getcwd()
    fuzz_files.make_examples(root, list(KINDS))
    checkpoint.quiet_orbax()  # as commands do
    yield fuzz_files.Reader(root, scratch, seed=7)
    os.chdir(before)


# Reads that were under way when Orbax gave up report to an event loop that is gone.
@pytest.mark.fault(5, 6)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_end_in_an_answer_or_a_line(reader, kind):
    """A sample; tools/fuzz_files.py tries some 800."""
    first = len(KINDS[kind].special)
    done = [
        reader.try_case(fuzz_files.Case(kind, number))
        for number in (*BY_HAND.get(kind, ()), first, first + 1)
    ]
    assert [case for case in done if case.outcome == "failed"] == []
    assert [case for case in done if case.outcome == "refused"] != []


def test_what_a_file_does_is_noticed(reader, tmp_path):
    with reader._acts.watched() as seen:
        (tmp_path / "made").write_text("")
        os.system("true")
    assert "to write" in seen[0]
    assert "os.system" in seen[1]


@pytest.mark.fault(4)
@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("depth", value) for value in (0, -1, 2.5, None, 10**9)),
        *(("num_classes", value) for value in (-1, True)),
        *(("norm_epsilon", value) for value in (-1.0, float("nan"))),
        *(("std", value) for value in ((0.0,) * 3, (0.5,))),
        *(("image_size", value) for value in (0, 10**9)),
        ("gate_hidden", 10**30),
        ("threshold", float("nan")),
        ("dtype", "int32"),
    ],
)
def test_models_that_there_cannot_be_are_refused_by_what_is_wrong(key, value):
    with pytest.raises(UserError, match=f"'msvit_tiny_patch16_224': {key}="):
        create_model("msvit_tiny_patch16_224", **{**made.SIZES, key: value})


@pytest.mark.fault(4)
@pytest.mark.parametrize("name", ["msvit_tiny_patch16_224", "dvt_deit_small"])
def test_answers_that_are_not_finite_are_not_given(name):
    source = made.source(name)
    params = {
        path: np.float32(1e38) * np.sign(x) if "qkv" in path else x
        for path, x in source.params.items()
    }
    predictor = Predictor(source.model, {"params": unflatten_dict(params, sep="/")}, batch_size=2)
    with pytest.raises(UserError, match="answers are not finite"):
        predictor(made.images(2))
