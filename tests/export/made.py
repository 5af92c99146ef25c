"""Small models with rough parameters, as sources of exports."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from msvit_jax import create_model
from msvit_jax.export import ExportBundle
from msvit_jax.tree import flat_names

SIDE = 16
COUNT = 5
NAMES = ("ant", "bee", "cat")
SIZES = {"image_size": SIDE, "patch_size": 4, "width": 16, "depth": 1, "heads": 2, "num_classes": 3}
CASCADE = {
    **{name: value for name, value in SIZES.items() if name != "patch_size"},
    **{"grid_sizes": (2, 4), "feature_width": 4, "feature_hidden": 8},
}


def images(count=COUNT, side=SIDE):
    """Pixels from even to noisy, region by region, so that gates and exits differ between them."""
    rng = np.random.default_rng(3)
    regions = side // 8
    contrast = rng.uniform(0, 1, (count, regions, 1, regions, 1, 1)) ** 2
    noise = rng.integers(-120, 120, (count, regions, 8, regions, 8, 3))
    return (128 + contrast * noise).astype(np.uint8).reshape(count, side, side, 3)


@functools.cache
def _source(name, options):
    given = dict(options)
    model = create_model(name, **given)
    zeros = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), zeros)["params"]
    rng = np.random.default_rng(0)
    params = {
        path: (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        for path, leaf in flat_names(shapes).items()
    }
    return ExportBundle(name, given, params, NAMES)


def source(name, **options):
    """A model of `SIZES` with other options, and parameters that are random everywhere."""
    sizes = CASCADE if name.startswith("dvt") else SIZES
    return _source(name, tuple(sorted({**sizes, **options}.items())))
