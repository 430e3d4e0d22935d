"""Patch masking with a last stretch on all patches."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_run import CFG, batches

from flip_jax import checkpoint, config, main, partition, train
from flip_jax.config import MeshConfig

VISION = replace(CFG.model.vision, keep_patches=2)
MASKED = replace(CFG, model=replace(CFG.model, vision=VISION), epochs=4.0, unmasked_epochs=1.0)


@pytest.mark.release
def test_the_unmasked_step_is_that_of_a_run_without_masking():
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:1])
    masked, plain = (train.Compiled(cfg, mesh, 10, 40) for cfg in (MASKED, CFG))
    assert masked.masked_steps == 30 and plain.masked_steps == 40
    assert masked.unmasked[0].model == CFG.model
    (batch,) = batches(1)
    batch = partition.to_global(batch, mesh)
    steps = masked.step, masked.unmasked[1], plain.step
    few, all_of_them, expected = (step(plain.init(), batch) for step in steps)
    jax.tree.map(np.testing.assert_array_equal, all_of_them, expected)
    assert few[1]["loss_itc"] != expected[1]["loss_itc"]


@pytest.mark.release
def test_a_run_goes_over_to_all_patches_and_stays_there(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    calls = []

    class Noting(train.Compiled):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            cfg, unmasked = self.unmasked
            self.step = self.noting("masked", self.step)
            self.unmasked = cfg, self.noting("unmasked", unmasked)

        @staticmethod
        def noting(name, step):
            return lambda *arguments: calls.append(name) or step(*arguments)

    monkeypatch.setattr(train, "Compiled", Noting)
    fields = ["--config.model.vision.keep_patches=2", "--config.unmasked_epochs=0.34"]
    command = ["--config", "configs/debug.py", "--workdir", str(tmp_path), *fields]
    assert main.main([*command, "--config.epochs=0.5"]) == 0
    assert calls == ["masked", "unmasked", "unmasked"]
    calls.clear()
    assert main.main([*command, "--config.epochs=0.67"]) == 0  # goes on from step 3
    assert calls == ["unmasked"]
    assert checkpoint.read_meta(tmp_path)["step"] == 4


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (["unmasked_epochs=1"], "above 0 only with model.vision.keep_patches"),
        (["unmasked_epochs=16", "keep"], "which are 15.0: set it lower, too"),
    ],
)
def test_needs_masking_and_no_more_than_all_epochs(fields, reason):
    fields = [f.replace("keep", "model.vision.keep_patches=98") for f in fields]
    cfg = config.from_arguments(config.Config(), [f"--config.{f}" for f in fields])
    said = r"config\.unmasked_epochs=.*must be 0 up to epochs, .*" + reason
    with pytest.raises(ValueError, match=said):
        config.validate(cfg)


def test_the_preset():
    cfg = config.validate(config.load(Path(__file__).parent.parent / "configs" / "masked.py"))
    assert cfg.model.vision.keep_patches == 98 and cfg.unmasked_epochs == 1.0
