"""Runs with the sigmoid loss: no twins and no queue from the first step to the export."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import SIGMOID, batches

from flip_jax import checkpoint, config, main, partition
from flip_jax.config import CheckpointConfig, MeshConfig
from flip_jax.convert import __main__ as convert
from flip_jax.convert import init
from flip_jax.train import Compiled

DEBUG = ["--config", "configs/debug.py"]
FIELDS = ["--config.loss.contrastive=sigmoid", "--config.model.logit_bias=-10"]
META = {"config": config.to_dict(SIGMOID), "vocab_hash": "", "data_hash": ""}


def steps(compiled, mesh, state, some):
    for batch in some:
        state, _ = compiled.step(state, partition.to_global(batch, mesh))
    return state


@pytest.mark.slow
def test_goes_on_with_the_same_bits(tmp_path):
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:2])
    compiled = Compiled(SIGMOID, mesh, steps_per_epoch=10, steps=10)
    some = list(batches(4))
    unbroken = steps(compiled, mesh, compiled.init(), some)
    with checkpoint.Checkpointer(tmp_path, CheckpointConfig(), META) as saving:
        saving.save(2, steps(compiled, mesh, compiled.init(), some[:2]))
    assert set(checkpoint.read_meta(tmp_path)["arrays"]) == {"params", "opt_state"}
    with checkpoint.Checkpointer(tmp_path, CheckpointConfig(), META) as resuming:
        restored = resuming.restore(compiled.target)
    assert restored["momentum"] == {} and restored["queue"] == {}
    resumed = steps(compiled, mesh, restored, some[2:])
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)


@pytest.mark.release
def test_a_run_from_data_to_export(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(Path(__file__).parent.parent)
    run = tmp_path / "run"
    assert main.main([*DEBUG, *FIELDS, "--workdir", str(run), "--config.epochs=0.5"]) == 0
    log = (run / "metrics.jsonl").read_text()
    assert "loss_sigmoid" in log and "loss_itc" not in log
    assert (run / "report.png").is_file()
    params = checkpoint.load_params(run)
    assert params["logit_bias"] != -10.0

    cfg = config.from_arguments(config.load("configs/debug.py"), FIELDS)
    cfg = config.override(cfg, "init.checkpoint", str(run))
    fresh = {"params": jax.tree.map(jnp.zeros_like, params), "momentum": {}, "queue": {}}
    started = init.initial_state(cfg, fresh)
    jax.tree.map(np.testing.assert_array_equal, started, fresh | {"params": params})

    pytest.importorskip("torch")
    out = tmp_path / "flip.pth"
    assert convert.main([str(run), str(out), "--to", "flip"]) == 0
    assert "left out, as the layout has none: logit_bias" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("field", "allowed"),
    [
        ("loss.contrastive=sigmoid", "must be a number with loss.contrastive=sigmoid"),
        ("model.logit_bias=-10", "must be None with loss.contrastive=itc"),
    ],
)
def test_loss_and_bias_belong_together(field, allowed):
    cfg = config.from_arguments(config.Config(), [f"--config.{field}"])
    with pytest.raises(ValueError, match=rf"config\.model\.logit_bias=.*{allowed}"):
        config.validate(cfg)


def test_the_preset():
    cfg = config.validate(config.load(Path(__file__).parent.parent / "configs" / "siglip.py"))
    assert cfg.loss.contrastive == "sigmoid" and cfg.model.logit_bias == -10.0
