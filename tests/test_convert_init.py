"""Imported weights as the start of a run: `config.init`."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny_weights
import torch

from flip_jax.checkpoint import load_momentum, load_params, read_meta, save_weights
from flip_jax.config import Config, DataConfig, InitConfig, LossConfig
from flip_jax.convert import init
from flip_jax.convert.foreign import Options
from flip_jax.convert.importer import import_weights
from flip_jax.convert.init import initial_params, initial_state
from flip_jax.models import flip
from flip_jax.named_arrays import named_leaves
from flip_jax.train import init_state


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Folders of an imported CLIP, BERT and FLIP."""
    folder = tmp_path_factory.mktemp("imported")
    tiny_weights.clip_model().save_pretrained(folder / "clip_source")
    tiny_weights.bert_model().save_pretrained(folder / "bert_source")
    torch.save({"model": tiny_weights.official_state()}, folder / "flip_source")
    for kind in ("clip", "bert", "flip"):
        options = Options(tokenizer="grammar")
        import_weights(kind, folder / f"{kind}_source", folder / kind, options)
    return folder


def run_config(**init: str) -> Config:
    return Config(
        model=tiny_weights.model_config(),
        loss=LossConfig(queue_size=tiny_weights.QUEUE),
        data=DataConfig(tokenizer="grammar"),
        init=InitConfig(**{name: str(path) for name, path in init.items()}),
    )


@pytest.fixture(scope="module")
def fresh():
    return init_state(run_config(), optax.adamw(1e-3))


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_weights_twins_and_queue_are_of_one_step(imported, fresh, tmp_path, monkeypatch):
    """Of the step that was the newest at the start, while a training writes the next one."""
    steps = tmp_path / "checkpoints"
    shutil.copytree(imported / "flip", steps / "1")

    def reading(*arguments, **options):
        found = load_params(*arguments, **options)
        if not (steps / "2").exists():
            other = jax.tree.map(np.zeros_like, load_momentum(imported / "flip"))
            zeros = jax.tree.map(np.zeros_like, found)
            save_weights(steps / "2", zeros, read_meta(imported / "flip"), momentum=other)
        return found

    monkeypatch.setattr(init, "load_params", reading)
    cfg = run_config(checkpoint=tmp_path)
    state, wanted = initial_state(cfg, fresh), load_momentum(imported / "flip")
    assert (steps / "2").exists()
    assert_same(state["params"], load_params(imported / "flip"))
    assert_same(state["momentum"], wanted["twins"])
    assert_same(state["queue"], wanted["queue"])


def test_nothing_given_changes_nothing(fresh):
    assert_same(initial_state(run_config(), fresh), dict(fresh))


def test_towers_are_overlaid_and_the_rest_stays_fresh(imported, fresh):
    cfg = run_config(vision=imported / "clip", text=imported / "bert")
    state = initial_state(cfg, fresh)
    params = state["params"]
    assert_same(params["vit"], load_params(imported / "clip")["vit"])
    found, old = named_leaves(params["bert"]), named_leaves(fresh["params"]["bert"])
    new = named_leaves(load_params(imported / "bert")["bert"])
    assert {name for name in found if name not in new} == {
        name for name in found if "/cross/" in name or "/ln_cross/" in name
    }
    for name, value in found.items():
        np.testing.assert_array_equal(value, new.get(name, old[name]), err_msg=name)
    for name in ("image_proj", "text_proj", "itm_head", "temperature"):
        assert_same(params[name], fresh["params"][name])
    assert_same(state["momentum"], flip.twin_params(params))
    assert_same(state["queue"], fresh["queue"])
    # The step donates its state, so no buffer may be there twice.
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(pointers) == len(set(pointers))


def test_checkpoint_brings_momentum_and_queue(imported, fresh):
    state = initial_state(run_config(checkpoint=imported / "flip"), fresh)
    momentum = load_momentum(imported / "flip")
    assert_same(state["params"], load_params(imported / "flip"))
    assert_same(state["momentum"], momentum["twins"])
    assert_same(state["queue"], momentum["queue"])
    assert int(state["step"]) == 0


def test_heads_of_a_loss_that_the_run_has_not_are_left_out(imported, fresh, tmp_path, caplog):
    wanted = load_params(imported / "flip")
    more = {"logit_bias": np.zeros(()), "mim": {"out": {"bias": np.zeros(3)}}}
    save_weights(tmp_path / "more", wanted | more, read_meta(imported / "flip"))
    with caplog.at_level("INFO"):
        state = initial_state(run_config(checkpoint=tmp_path / "more"), fresh)
    assert_same(state["params"], wanted)
    assert "left out, as this run has no such loss: logit_bias, mim/out/bias" in caplog.text
    save_weights(tmp_path / "else", wanted | {"other": np.zeros(3)}, read_meta(imported / "flip"))
    with pytest.raises(ValueError, match="unexpected other"):
        initial_state(run_config(checkpoint=tmp_path / "else"), fresh)


def test_a_tower_wins_over_the_checkpoint(imported, fresh):
    cfg = run_config(checkpoint=imported / "flip", vision=imported / "clip")
    state = initial_state(cfg, fresh)
    assert_same(state["params"]["vit"], load_params(imported / "clip")["vit"])
    assert_same(state["params"]["bert"], load_params(imported / "flip")["bert"])
    assert_same(state["momentum"], flip.twin_params(state["params"]))


def test_a_queue_of_another_size_starts_afresh(imported, caplog):
    cfg = run_config(checkpoint=imported / "flip")
    cfg = dataclasses.replace(cfg, loss=LossConfig(queue_size=20))
    state = init_state(cfg, optax.adamw(1e-3))
    assert_same(initial_state(cfg, state)["queue"], state["queue"])
    assert "queue of 12, loss.queue_size is 20" in caplog.text


def test_shardings_are_those_of_the_fresh_state(imported, fresh):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = jax.device_put(dict(fresh), replicated)
    found = initial_state(run_config(checkpoint=imported / "flip"), state)
    assert {leaf.sharding for leaf in jax.tree.leaves(found)} == {replicated}


def test_what_does_not_fit_is_named(imported, fresh):
    params = fresh["params"]
    with pytest.raises(ValueError, match=r"only='vit/\*' matches no parameter"):
        initial_params(run_config(vision=imported / "bert"), params)
    cfg = run_config(vision=imported / "clip")
    other = dataclasses.replace(
        cfg.model, vision=dataclasses.replace(cfg.model.vision, image_size=48)
    )
    wide = jax.jit(lambda: flip.init_params(other, 0.07, jax.random.key(0)))()
    with pytest.raises(ValueError, match=r"vit/position_embed is .*17.*not .*37.*--image-size"):
        initial_params(dataclasses.replace(cfg, model=other), wide)
    heads = dataclasses.replace(cfg.model, vision=dataclasses.replace(cfg.model.vision, heads=4))
    with pytest.raises(ValueError, match=r"model\.vision\.heads is 2, not 4"):
        initial_params(dataclasses.replace(cfg, model=heads), params)
    with pytest.raises(FileNotFoundError):
        initial_params(run_config(checkpoint="absent"), params)


def test_another_vocabulary_is_refused(imported, fresh, tmp_path):
    entries = (imported / "bert/vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text(
        "\n".join([*entries[:9], entries[10], entries[9], *entries[11:]])
    )
    cfg = run_config(text=imported / "bert")
    cfg = dataclasses.replace(cfg, data=DataConfig(tokenizer=str(tmp_path / "vocab.txt")))
    with pytest.raises(ValueError, match=r"its vocabulary, 'grammar', is not that of"):
        initial_params(cfg, fresh["params"])
