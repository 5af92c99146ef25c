"""Times timm's models on PyTorch, on request: the other side of peers.py.

It runs under an interpreter of its own that has torch and timm and needs nothing of this project.
Each request is a line of JSON on stdin, each answer a line of JSON on stdout. The first line, sent
unasked, tells the versions, or what is missing as {"error": ...}.

    {"do": "make", "name": N, "model": ..., "sizes": {...}, "batch": B, "compile": false}
        makes a model with random weights and a batch of random images, and runs it once to warm up
    {"do": "time", "name": N, "calls": n}
        runs it n times in a row and answers with their seconds
"""

import argparse
import json
import os
import platform
import sys
import time


def main():
    """Answers requests until stdin ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", required=True)
    options = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    made = {}
    _say(answers, _try(lambda: _start(options)))
    for line in sys.stdin:
        request = json.loads(line)
        todo = {"make": _make, "time": _time}[request["do"]]
        _say(answers, _try(lambda todo=todo, request=request: todo(options, made, request)))


def _say(answers, answer):
    print(json.dumps(answer), file=answers, flush=True)


def _try(todo):
    try:
        return todo()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def _start(options):
    import torch

    _let_torchvision_in(torch)
    import timm

    torch.set_num_threads(options.threads)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no CUDA device")
        # As JAX does by default on such devices.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }


def _let_torchvision_in(torch):
    """Declares the operators that torchvision wants to find when it is imported.

    timm imports torchvision. Where its compiled part does not load, because it was built for
    another PyTorch (a CUDA wheel beside a CPU one), the import fails at these two, which no
    vision transformer uses.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        _let_torchvision_in.library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            signature = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            _let_torchvision_in.library.define(signature)


def _make(options, made, request):
    import timm
    import torch

    dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    model = timm.create_model(request["model"], pretrained=False, **request["sizes"])
    model = model.eval().to(options.device, dtype)
    side = request["sizes"].get("img_size", model.default_cfg["input_size"][-1])
    images = torch.randn(request["batch"], 3, side, side, device=options.device, dtype=dtype)
    # A second batch size would otherwise be compiled for any batch size, which is slower.
    run = torch.compile(model, dynamic=False) if request["compile"] else model

    def call():
        with torch.inference_mode():
            run(images)
        if options.device == "cuda":
            torch.cuda.synchronize()

    start = time.perf_counter()
    call()
    made[request["name"]] = call
    return {
        "warmup_seconds": time.perf_counter() - start,
        "fused_attention": bool(model.blocks[0].attn.fused_attn),
    }


def _time(options, made, request):
    call = made[request["name"]]
    start = time.perf_counter()
    for _ in range(request["calls"]):
        call()
    return {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
