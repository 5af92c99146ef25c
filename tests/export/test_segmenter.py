"""Exported functions of segmenters against the Predictor, and run.py on their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from msvit_jax import sharding
from msvit_jax.export import Options, write
from msvit_jax.export.run import Model
from msvit_jax.inference import Predictor
from tests.export import made
from tests.export.test_compiled import _run_alone

NAME = "msvit_seg_vit_tiny_linear"  # the mask transformer is in test_onnx.py


def bundle():
    """No class is preferred whatever the patch, so that patches differ in what they answer."""
    source = made.source(NAME, decode="mixed")
    zeros = ("backbone/norm/bias", "decoder/head/bias")
    params = {**source.params, **{name: 0 * source.params[name] for name in zeros}}
    return dataclasses.replace(source, params=params)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "out"
    options = Options(layout="budget", token_capacity=12)
    write(bundle(), "compiled", directory, options)
    return directory


@pytest.fixture(scope="module")
def expected():
    """The Predictor's answers, of the same weights decoded cell by cell."""
    source = bundle()
    model = source.model.clone(decode="dense")
    variables = {"params": unflatten_dict(source.params, sep="/")}
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    predictor = Predictor(model, variables, batch_size=made.COUNT, layout="slots", mesh=mesh)
    return list(predictor.segment(list(made.images()), probabilities=True))


def test_pixels_have_the_predictors_classes(exported, expected):
    answers = Model(exported).segment(made.images(), batch=2)
    assert answers["logits"].shape == (made.COUNT, 4, 4, 3)
    labels = np.stack([answer.labels for answer in expected])
    # Where two classes are as probable, rounding may decide.
    top = np.sort(np.stack([answer.probabilities for answer in expected]), axis=-1)
    clear = top[..., -1] - top[..., -2] > 1e-4
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(answers["labels"][clear], labels[clear])
    tokens = [int(answer.tokens[0]) for answer in expected]
    np.testing.assert_array_equal(answers["tokens"], tokens)
    assert min(tokens) <= 12 < max(tokens)  # some images ran again in slots
    assert len(np.unique(labels)) > 1


def test_run_py_says_what_covers_an_image(exported, expected, tmp_path):
    np.save(tmp_path / "images.npy", made.images())
    done = _run_alone(exported, tmp_path / "images.npy", f"--out={tmp_path / 'out.npz'}")
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "out.npz") as answers:
        labels = answers["labels"]
    assert labels.shape == (made.COUNT, 16, 16)
    for row, line in enumerate(done.stdout.splitlines()):
        words = line.split()
        shares = dict(zip(words[1:-2:2], map(float, words[2:-2:2]), strict=True))
        counts = np.bincount(labels[row].reshape(-1), minlength=3) / 256
        assert shares == {
            name: pytest.approx(share, abs=1e-4)
            for name, share in zip(made.NAMES, counts, strict=True)
            if share
        }
        assert words[-2:] == ["tokens", str(int(expected[row].tokens[0]))]


def test_about_says_what_the_functions_do(exported):
    about = json.loads((exported / "about.json").read_text())
    assert (about["task"], about["kind"]) == ("segmentation", "mixed_scale")
    assert about["functions"][0]["outputs"]["logits"] == "float32[b, 4, 4, 3]"
