"""Whether every gate learns: ten seeds of MSViT from one dense model, twice.

    python studies/seeds.py --workdir=runs/study --seeds=0,1,2,3,4,5,6,7,8,9

* demo: what `make demo` trains, both runs as short as there; the dense model once
* digits_msvit: configs/digits_msvit.py from configs/digits_vit.py, the latter with the first seed

Writes docs/results/seeds.md and seeds.json. What is done already is not done again. Cost: about an
hour and a half on one CPU core.
"""

import concurrent.futures
from collections.abc import Callable, Sequence

import digits
from absl import flags

from msvit_jax import config as configs
from msvit_jax import demo, errors

ARMS = ("demo", "digits_msvit")


def arms(study: digits.Study, starts: dict[str, str]) -> dict[str, digits.Figures]:
    """Trains one seed's arms, each from its dense model."""
    shorter = {key: demo.MSVIT[key] for key in ("epochs", "optimizer.warmup_epochs")}
    return {
        "demo": study.arm("seeds/demo", "digits_msvit", init_from=starts["demo"], **shorter),
        "digits_msvit": study.arm(
            "seeds/digits_msvit", "digits_msvit", init_from=starts["digits_msvit"]
        ),
    }


def claims(target: float, dense: float) -> dict[str, tuple[str, Callable[[digits.Figures], bool]]]:
    """What every seed is to reach, by the name of its figure."""
    wanted = digits.REGIONS * (1 + 3 * target)
    return {
        "tokens_mean": (
            f"{wanted:.1f} +- 10 %",
            lambda r: abs(r["tokens_mean"] / wanted - 1) <= 0.1,
        ),
        "top1": (f"at least dense's {dense:.2f}", lambda r: r["top1"] >= dense),
        "content_fine": ("at least 0.95", lambda r: r["content_fine"] >= 0.95),
        "plain_coarse": ("at least 0.80", lambda r: r["plain_coarse"] >= 0.8),
    }


def table(results: dict[int, dict[str, digits.Figures]], arm: str, dense: float) -> str:
    """Every seed's figures, and how many seeds reach each claim."""
    target = configs.load(str(digits.ROOT / "configs/digits_msvit.py")).loss.gate.target
    wanted = claims(target, dense)
    found = [results[seed][arm] for seed in results]
    rows = [
        [str(seed), *(f"{results[seed][arm][name]:.4g}" for name in wanted)] for seed in results
    ]
    rows.append(["mean", *(digits.with_spread([r[name] for r in found]) for name in wanted)])
    rows.append(["asked for", *(text for text, _ in wanted.values())])
    rows.append(
        ["reached by", *(f"{sum(map(ok, found))} of {len(found)}" for _, ok in wanted.values())]
    )
    head = ["seed", "tokens of 64", "top-1 (%)", "digit regions fine", "plain regions coarse"]
    return digits.markdown(head, rows)


HEAD = """# Ten seeds

Made by `python studies/seeds.py`, which says what is trained: MSViT on scattered digits with ten
seeds, all from one dense model; 2,000 validation images, after the last step.
"""


def main(argv: Sequence[str]) -> None:
    """Runs the study."""
    del argv
    workers = digits.Workers(flags.FLAGS.jobs)
    seeds = [int(seed) for seed in flags.FLAGS.seeds]
    first = digits.Study(workers, seeds[0])
    shorter = {key: demo.DENSE[key] for key in ("epochs", "optimizer.warmup_epochs")}
    dense = {
        "demo": first.arm("seeds/demo_dense", "digits_vit", **shorter),
        "digits_msvit": first.arm("dense", "digits_vit"),
    }
    starts = {
        "demo": first.workdir("seeds/demo_dense"),
        "digits_msvit": first.workdir("dense"),
    }
    with concurrent.futures.ThreadPoolExecutor(flags.FLAGS.jobs) as pool:
        found = pool.map(lambda seed: arms(digits.Study(workers, seed), starts), seeds)
        results = dict(zip(seeds, found, strict=True))
    parts = [HEAD]
    for arm in ARMS:
        parts += [f"## {arm}\n", table(results, arm, dense[arm]["top1"]), ""]
    digits.write("seeds", "\n".join(parts), results)


if __name__ == "__main__":
    errors.run(main)
