import json

import jax
import numpy as np
import pytest

from msvit_jax import metrics
from msvit_jax.train import reporter
from tests import tiny_run


class _Run:
    """What a reporter asks of a run."""

    def __init__(self, every):
        self.config = tiny_run.msvit(log_every_steps=every)
        self.model = type("Model", (), {"max_tokens": 16})
        self.capacity = None
        self.schedule = lambda step: 1e-3
        self.run_length = type("Plan", (), {"steps": 40, "steps_per_epoch": 3.0})


class _Logger:
    def __init__(self):
        self.reports = []

    def report(self, kind, step, epoch, figures):
        self.reports.append((step, figures))

    def say(self, text):
        self.reports.append(text)

    def advance(self):
        pass


@pytest.fixture
def run_for(monkeypatch):
    """Runs steps that take one second each, the first one a minute; returns the reports."""
    clock = {"now": 0.0}
    monkeypatch.setattr(reporter.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(reporter.flops, "macs_per_image", lambda model, counts: counts * 1e6)

    def run(every, steps, stops=()):
        logger = _Logger()
        made = reporter.Reporter(_Run(every), logger)
        rng = np.random.default_rng(0)
        for step in range(1, steps + 1):
            clock["now"] += 60.0 if step == 1 else 1.0
            made.add(step, _step(rng))
            if step in stops:
                made.flush()
                saved = json.loads(json.dumps(made.to_json()))
                made = reporter.Reporter(_Run(every), logger)
                made.restore(saved)
        made.flush()
        return logger.reports

    return run


def _step(rng):
    tokens = rng.integers(0, 5, 17).astype(np.float32)
    sums = metrics.Sums(
        count=tokens.sum(), loss=np.float32(rng.random()), top1=np.float32(3), top5=np.float32(5),
        tokens=tokens, overflow=np.float32(0),
    )  # fmt: skip
    scalars = {"total_loss": np.float32(rng.random()), "grad_norm": np.float32(rng.random())}
    return jax.tree.map(jax.numpy.asarray, reporter.StepMetrics(sums=sums, scalars=scalars))


@pytest.mark.fault(16)
@pytest.mark.parametrize("every", [1, 2, 3, 4, 10])
def test_the_pace_is_that_of_the_steps_however_often_it_is_reported(run_for, every):
    reports = dict(run_for(every, 30))
    rates = {step: figures.get("images_per_second") for step, figures in reports.items()}
    assert rates.pop(1, None) is None, "the first step is compiled"
    # Python waits for no step that it reports, so only the end of a run is read at once.
    assert all(rate == pytest.approx(16, rel=0.01) for s, rate in rates.items() if s < 28)


@pytest.mark.parametrize("stops", [(5,), (4, 9), (3, 7, 11)])
def test_reports_do_not_show_where_a_run_was_resumed(run_for, stops):
    timed = ("images_per_second", "seconds_per_step", "seconds_left")
    whole, resumed = (
        [(s, {k: v for k, v in f.items() if k not in timed}) for s, f in run_for(4, 14, at)]
        for at in ((), stops)
    )
    assert len(whole) == 3
    assert resumed == whole
