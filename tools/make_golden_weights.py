"""Makes tests/weights/golden: small random weights of other libraries, and what their code answers.

    python tools/make_golden_weights.py --big_vision=DIR --vision_transformer=DIR

DIR are checkouts of google-research/big_vision and google-research/vision_transformer. Also needs
timm, transformers, torch, flax, einops and ml_collections. Versions are written to golden.json.
"""

import argparse
import importlib.metadata
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types

import numpy as np

GOLDEN = pathlib.Path(__file__).parents[1] / "tests" / "weights" / "golden"
CLASSES, SIDE, PATCH, WIDTH, DEPTH, HEADS, HIDDEN = 5, 16, 4, 16, 2, 2, 32
# Of our model, but for what a case says itself.
OPTIONS = {
    "num_classes": CLASSES,
    "image_size": SIDE,
    "patch_size": PATCH,
    "width": WIDTH,
    "depth": DEPTH,
    "heads": HEADS,
    "mlp_ratio": HIDDEN / WIDTH,
}


def random_value(rng, name, shape):
    """Values that let every parameter matter: scales around 1, kernels that keep the variance."""
    noise = rng.standard_normal(shape).astype(np.float32)
    if "norm" in name.lower() and name.endswith(("weight", "scale")):
        return 1 + 0.2 * noise
    if "kernel" in name or ("weight" in name and noise.ndim > 1):
        return noise * np.float32(1.5 / np.sqrt(noise.size / max(noise.shape[0], noise.shape[-1])))
    return 0.3 * noise


def randomize(module, rng):
    """Gives every parameter of a PyTorch module another value."""
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.from_numpy(random_value(rng, name, parameter.shape)))


def answer(module, images):
    """Logits of a PyTorch module, or the class token of one without a head."""
    import torch

    with torch.no_grad():
        out = module.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    if not isinstance(out, torch.Tensor):
        out = out.logits if hasattr(out, "logits") else out.last_hidden_state[:, 0]
    return out.numpy().tolist()


def timm_cases(images, rng):
    """Plain, distilled, DINOv2 with and without registers."""
    from safetensors.torch import save_file
    from timm.models import deit, vision_transformer

    sizes = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        "num_classes": CLASSES,
    }
    vit, distilled = vision_transformer.VisionTransformer, deit.VisionTransformerDistilled
    registers = {"reg_tokens": 3, "no_embed_class": True, "init_values": 1e-5}
    for name, make, theirs, ours in (
        ("timm_vit", vit, {}, {}),
        ("timm_deit_distilled", distilled, {}, {"distilled": True}),
        ("timm_dinov2", vit, {"init_values": 1e-5}, {"layer_scale": 1e-5}),
        (
            "timm_dinov2_registers",
            vit,
            registers,
            {"layer_scale": 1e-5, "register_tokens": 3, "prefix_positions": False},
        ),
    ):
        module = make(**sizes, **theirs)
        randomize(module, rng)
        save_file(module.state_dict(), GOLDEN / f"{name}.safetensors")
        yield name, ours, answer(module, images)


def transformers_cases(images, rng):
    """ViT, DeiT with its two heads, DINOv2 without a head, DINOv2 with registers."""
    import torch
    import transformers as hf

    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": PATCH,
        "num_labels": CLASSES,
    }
    hidden = {"intermediate_size": HIDDEN}
    ratio = {"mlp_ratio": HIDDEN // WIDTH}
    registers = {**ratio, "num_register_tokens": 3}
    exact = {"norm_epsilon": 1e-12}
    for name, config, make, theirs, ours in (
        ("huggingface_vit", hf.ViTConfig, hf.ViTForImageClassification, hidden, exact),
        (
            "huggingface_deit_distilled",
            hf.DeiTConfig,
            hf.DeiTForImageClassificationWithTeacher,
            hidden,
            {**exact, "distilled": True},
        ),
        # The class token's features come out of a head that copies them.
        (
            "huggingface_dinov2_headless",
            hf.Dinov2Config,
            hf.Dinov2Model,
            ratio,
            {"layer_scale": 1e-5, "num_classes": WIDTH},
        ),
        (
            "huggingface_dinov2_registers",
            hf.Dinov2WithRegistersConfig,
            hf.Dinov2WithRegistersForImageClassification,
            registers,
            {"layer_scale": 1e-5, "register_tokens": 3},
        ),
    ):
        module = make(config(**sizes, **theirs))
        randomize(module, rng)
        if "dinov2" in name and hasattr(module, "classifier"):
            with torch.no_grad():  # what looks at the patches: our head does not
                module.classifier.weight[:, WIDTH:] = 0
        with tempfile.TemporaryDirectory() as directory:
            module.save_pretrained(directory)
            shutil.copy(f"{directory}/model.safetensors", GOLDEN / f"{name}.safetensors")
        yield name, ours, answer(module, images)


def flax_case(name, module, images, rng, prefix="", rename=lambda name: name, **call):
    """Saves a Flax module's random parameters as .npz, and returns its logits."""
    import flax
    import jax

    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), images, **call))["params"]
    flat = {
        key: random_value(rng, key, leaf.shape)
        for key, leaf in flax.traverse_util.flatten_dict(shapes, sep="/").items()
    }
    np.savez(GOLDEN / f"{name}.npz", **{prefix + rename(key): x for key, x in flat.items()})
    params = flax.traverse_util.unflatten_dict(flat, sep="/")
    with jax.default_matmul_precision("highest"):
        out = module.apply({"params": params}, images, **call)
    return np.asarray(out[0] if isinstance(out, tuple) else out).tolist()


def numbered_through(name):
    """The numbers of modules in vision_transformer's published files, from before linen."""
    for new, old in (
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
        ("LayerNorm_1", "LayerNorm_2"),
        ("MlpBlock_0", "MlpBlock_3"),
    ):
        name = name.replace(new, old)
    return name


def vision_transformer_cases(images, rng):
    """With a class token, under the names of the published files."""
    from vit_jax import models_vit

    module = models_vit.VisionTransformer(
        num_classes=CLASSES,
        patches=types.SimpleNamespace(size=(PATCH, PATCH)),
        transformer={"num_layers": DEPTH, "mlp_dim": HIDDEN, "num_heads": HEADS},
        hidden_size=WIDTH,
    )
    name = "vision_transformer"
    logits = flax_case(name, module, images, rng, rename=numbered_through, train=False)
    yield name, {"gelu": "tanh"}, logits


def big_vision_cases(images, rng):
    """Mean pooling with learned and computed positions; a class token, layers scanned."""
    import flax.training.checkpoints  # noqa: F401 - before it could find what follows

    # Its file functions alone want TensorFlow, and none is called.
    for missing in ("tensorflow", "tensorflow.io", "tensorflow.io.gfile"):
        sys.modules.setdefault(missing, types.ModuleType(missing))
    sys.modules["tensorflow.io"].gfile = sys.modules["tensorflow.io.gfile"]
    from big_vision.models import vit

    sizes = {
        "patch_size": (PATCH, PATCH),
        "width": WIDTH,
        "depth": DEPTH,
        "mlp_dim": HIDDEN,
        "num_heads": HEADS,
    }
    pooled = {"gelu": "tanh", "pool": "mean", "class_token": False}
    for name, theirs, ours in (
        ("big_vision_pooled", {}, pooled),
        ("big_vision_sincos", {"posemb": "sincos2d"}, pooled),
        (
            "big_vision_scanned",
            {"pool_type": "tok", "scan": True},
            {"gelu": "tanh", "prefix_positions": False},
        ),
    ):
        module = vit.Model(num_classes=CLASSES, **sizes, **theirs)
        yield name, ours, flax_case(name, module, images, rng, prefix="params/")


def commit(directory):
    """What is checked out there."""
    command = ["git", "-C", directory, "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main():
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--big_vision", required=True)
    parser.add_argument("--vision_transformer", required=True)
    given = parser.parse_args()
    sys.path += [given.big_vision, given.vision_transformer]
    GOLDEN.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.standard_normal((2, SIDE, SIDE, 3)).astype(np.float32)
    np.save(GOLDEN / "images.npy", images)
    makers = (timm_cases, transformers_cases, vision_transformer_cases, big_vision_cases)
    cases = {
        name: {"options": {**OPTIONS, **ours}, "logits": logits}
        for make in makers
        for name, ours, logits in make(images, rng)
    }
    libraries = ("timm", "transformers", "torch", "safetensors", "flax", "jax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    for name in ("big_vision", "vision_transformer"):
        versions[name] = commit(getattr(given, name))
    text = json.dumps({"versions": versions, "cases": cases}, indent=1)
    (GOLDEN / "golden.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
