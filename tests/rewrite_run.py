"""One pass of captions through the rewriting stage."""

import dataclasses
import pickle

import numpy as np

from flip_jax.curate.config import RewriteConfig
from flip_jax.curate.rewrite import RewriteStage
from flip_jax.curate.stages import Sample, Tally
from flip_jax.data.captions import captions

CFG = RewriteConfig(
    url="set by each test",
    retries=3,
    attempts=1,
    concurrency=4,
    timeout_seconds=30,
)
MAN = "This man has a beard. He is wearing glasses."
WOMAN = "A woman with blond hair is smiling."


def texts(count, seed=0):
    """Captions that differ from each other."""
    rng = np.random.default_rng(seed)
    found = {}
    while len(found) < count:
        labels = rng.integers(-1, 2, 40)
        found.update(dict.fromkeys(captions(labels, int(rng.integers(1 << 30)), 3)))
    return list(found)[:count]


def run(server, tmp_path, *samples, **changes):
    """The captions of the samples after a pass through a stage, and the tally."""
    cfg = dataclasses.replace(CFG, url=server.url, **changes)
    stage = pickle.loads(pickle.dumps(RewriteStage(cfg, str(tmp_path / "replies"))))
    stage.setup()
    tally = Tally()
    batch = [Sample(str(n), captions=tuple(each)) for n, each in enumerate(samples)]
    try:
        kept = stage.process(batch, tally)
    finally:
        stage.teardown()
    assert [each.id for each in kept] == [each.id for each in batch] and not tally.drops
    return [each.captions for each in kept], counts(tally)


def counts(tally):
    return {name.removeprefix("rewrite/"): n for name, n in tally.counts.items()}


def rewritten(text):
    return "In this picture: " + text
