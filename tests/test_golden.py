"""Our model, losses, step and re-ranking against tensors recorded from the official code.

Case A: float32, dropout 0. Tolerances are the float32 noise that the recording states, a few
units of 1e-6, against float32 on our side too.
"""

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

from flip_jax.checkpoint import load_momentum, load_params
from flip_jax.config import Config, LossConfig, ModelConfig, TextConfig, VisionConfig
from flip_jax.convert import torch_flip
from flip_jax.losses.flip import flip_loss
from flip_jax.losses.itc import itc_loss
from flip_jax.models import flip
from flip_jax.train import TrainState, make_train_step

NOISE = 5e-6  # twice the largest float32 - float64 difference of any recorded output


def case_config(meta: dict) -> Config:
    """Our config of a recorded case."""
    vision, text = meta["config"]["vision_config"], meta["config"]["bert_config"]
    model = ModelConfig(
        vision=VisionConfig(
            image_size=vision["image_size"],
            patch_size=vision["patch_size"],
            width=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            heads=vision["num_attention_heads"],
            mlp_width=vision["intermediate_size"],
        ),
        text=TextConfig(
            vocab_size=meta["special_ids"]["len"],
            max_length=meta["max_length"],
            positions=text["max_position_embeddings"],
            width=text["hidden_size"],
            depth=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            mlp_width=text["intermediate_size"],
            dropout=0.0,
        ),
        embed_dim=meta["config"]["embed_dim"],
        dtype="float32",
    )
    loss = LossConfig(
        queue_size=meta["config"]["queue_size"],
        momentum=meta["config"]["momentum"],
        candidates="global",
    )
    return Config(model=model, loss=loss)


def case_batch(io: dict, prefix: str, step: int | None = None) -> dict:
    """A recorded batch in our layout."""

    def get(name):
        value = io[f"{prefix}/{name}"]
        return value if step is None else value[step]

    negatives = "out" if step is None else prefix
    pick = (lambda v: v) if step is None else (lambda v: v[step])
    return {
        "image": jnp.asarray(get("pixel_values").transpose(0, 2, 3, 1)),
        "token_ids": jnp.asarray(get("input_ids"), jnp.int32),
        "token_mask": jnp.asarray(get("attention_mask"), bool),
        "group": jnp.asarray(get("idx"), jnp.int32),
        "negatives": {
            "image": jnp.asarray(pick(io[f"{negatives}/neg_image_idx"]), jnp.int32),
            "text": jnp.asarray(pick(io[f"{negatives}/neg_text_idx"]), jnp.int32),
        },
    }


@pytest.fixture
def case(golden):
    meta = json.loads((golden / "A_meta.json").read_text())
    cfg = case_config(meta)
    state = load_file(golden / "A_params.safetensors")
    return SimpleNamespace(
        meta=meta,
        cfg=cfg,
        io=load_file(golden / "A_io.safetensors"),
        params=torch_flip.params_from_official(state, cfg.model),
        momentum=torch_flip.params_from_official(state, cfg.model, twin=True),
        queue=torch_flip.queue_from_official(state),
        after3=load_file(golden / "A_params_after3.safetensors"),
        graphdef=flip.build(cfg.model),
        folder=golden,
    )


def close(ours, recorded, tolerance=NOISE):
    np.testing.assert_allclose(np.asarray(ours), recorded, rtol=0, atol=tolerance)


def test_forward_features(case):
    model = nnx.merge(case.graphdef, case.params)
    batch, out = (
        case_batch(case.io, "in"),
        {k[4:]: v for k, v in case.io.items() if k[:4] == "out/"},
    )
    image_tokens, image_embed = model.encode_image(batch["image"])
    close(image_tokens, out["vision_last_hidden_state"])
    close(image_embed, out["image_feat"])
    text_tokens, text_embed = model.encode_text(batch["token_ids"], batch["token_mask"])
    close(text_tokens, out["text_last_hidden_state"])
    close(text_embed, out["text_feat"])
    fused = model.bert(
        batch["token_ids"].at[:, 0].set(model.enc_id), batch["token_mask"], image_tokens
    )
    close(fused, out["mm_pos_last_hidden_state"])


def test_losses_targets_and_logits(case):
    batch, io = case_batch(case.io, "in"), case.io
    momentum = flip.update_twin(case.momentum, case.params, case.cfg.loss.momentum)
    alpha = float(io["in/alpha"])
    _, aux = flip_loss(
        case.params,
        momentum,
        case.queue,
        batch,
        alpha,
        None,
        cfg=case.cfg,
        graphdef=case.graphdef,
        negatives=batch["negatives"],
    )
    close(aux["metrics"]["loss_itc"], io["out/loss_ita"])
    close(aux["metrics"]["loss_itm"], io["out/loss_itm"])
    close(aux["itm_logits"], io["out/itm_logits"])
    close(aux["twin_embeds"]["image"], io["out/image_feat_m"])
    close(aux["twin_embeds"]["text"], io["out/text_feat_m"])

    embeds = {"image": io["out/image_feat"], "text": io["out/text_feat"]}
    twins = {"image": io["out/image_feat_m"], "text": io["out/text_feat_m"]}
    _, dense = itc_loss(
        embeds, twins, case.queue, batch["group"], case.params["temperature"], alpha
    )
    for ours, recorded in (("sim_{}", "out/sim_{}"), ("targets_{}", "out/sim_{}_targets")):
        for direction in ("i2t", "t2i"):
            close(dense[ours.format(direction)], io[recorded.format(direction)])


def test_gradients_of_every_parameter(case):
    batch = case_batch(case.io, "in")
    momentum = flip.update_twin(case.momentum, case.params, case.cfg.loss.momentum)

    def loss(params):
        return flip_loss(
            params,
            momentum,
            case.queue,
            batch,
            float(case.io["in/alpha"]),
            None,
            cfg=case.cfg,
            graphdef=case.graphdef,
            negatives=batch["negatives"],
        )[0]

    grads = torch_flip.params_to_official(jax.jit(jax.grad(loss))(case.params), case.cfg.model)
    recorded = {k[5:]: v for k, v in case.io.items() if k.startswith("grad/")}
    assert set(grads) == set(recorded)
    for name, value in recorded.items():
        # Key biases: zero in exact arithmetic, noise on both sides.
        scale = 1.0 if name in case.meta["params_with_zero_gradient_in_exact_arithmetic"] else 0.0
        tolerance = 1e-5 * max(np.abs(value).max(), scale)
        np.testing.assert_allclose(grads[name], value, rtol=0, atol=tolerance, err_msg=name)


def golden_step(case):
    """Our train step with the recorded optimizer and alphas."""
    rate = case.meta["optimizer"]
    alphas = jnp.asarray(case.io["train/alpha"])
    tx = optax.adamw(rate["lr"], *rate["betas"], eps=rate["eps"], weight_decay=0.05)
    step = make_train_step(
        case.cfg, tx, lambda _: jnp.float32(rate["lr"]), lambda number: alphas[number]
    )
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=jax.tree.map(jnp.asarray, case.params),
        opt_state=tx.init(case.params),
        momentum=jax.tree.map(jnp.asarray, case.momentum),
        queue=jax.tree.map(jnp.asarray, case.queue),
    )
    return jax.jit(step), state


def test_queue_and_twins_after_one_step(case):
    step, state = golden_step(case)
    state, _ = step(state, case_batch(case.io, "train", 0))
    ours = torch_flip.params_to_official(state["momentum"], case.cfg.model, twin=True)
    ours |= torch_flip.queue_to_official(state["queue"])
    recorded = {k[6:]: v for k, v in case.io.items() if k.startswith("after/")}
    assert set(ours) == set(recorded)
    for name, value in recorded.items():
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=NOISE, err_msg=name)


def test_three_adamw_steps(case):
    assert_three_steps(case)


def test_three_adamw_steps_from_an_imported_checkpoint(case, tmp_path):
    """The recorded weights through `python -m flip_jax.convert` instead of by name."""
    pytest.importorskip("torch", reason="conversion needs the extra [torch]")
    from flip_jax.convert.__main__ import main

    vocab, imported = tmp_path / "vocab.txt", tmp_path / "imported"
    vocab.write_text("".join(f"{token}\n" for token in case.meta["vocab"]))
    heads = str(case.cfg.model.vision.heads)
    source = str(case.folder / "A_params.safetensors")
    options = ["--vision-heads", heads, "--text-heads", heads, "--tokenizer", str(vocab)]
    assert main(["--from", "flip", source, str(imported), *options]) == 0
    case.params, stored = load_params(imported), load_momentum(imported)
    case.momentum, case.queue = stored["twins"], stored["queue"]
    assert_three_steps(case)


def assert_three_steps(case):
    step, state = golden_step(case)
    for number in range(3):
        state, metrics = step(state, case_batch(case.io, "train", number))
        close(metrics["loss_itc"], case.io["train/loss_ita"][number], 1e-5)
        close(metrics["loss_itm"], case.io["train/loss_itm"][number], 1e-5)
        close(metrics["temperature"], case.io["train/temp_in_forward"][number], 1e-6)
    model = case.cfg.model
    ours = torch_flip.params_to_official(state["params"], model)
    ours |= torch_flip.params_to_official(state["momentum"], model, twin=True)
    ours |= torch_flip.queue_to_official(state["queue"])
    exact_zero = set(case.meta["params_with_zero_gradient_in_exact_arithmetic"])
    for name, value in case.after3.items():
        if name in exact_zero or name.endswith("position_ids"):
            continue
        np.testing.assert_allclose(ours.pop(name), value, rtol=0, atol=1e-5, err_msg=name)
    assert set(ours) == exact_zero


def test_round_trip_is_the_identity(case):
    state = load_file(case.folder / "A_params.safetensors")
    model = case.cfg.model
    again = torch_flip.params_to_official(case.params, model)
    again |= torch_flip.params_to_official(case.momentum, model, twin=True)
    again |= torch_flip.queue_to_official(case.queue)
    trained = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    assert set(again) == set(trained)
    for name, value in trained.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)
        assert again[name].dtype == value.dtype, name


def test_official_names_of_the_base_model(golden):
    """Every name and shape of the published base-size checkpoint, in its order."""
    listed = json.loads((golden / "state_dict_base.json").read_text())
    assert dataclasses.asdict(Config().model.text)["vocab_size"] == 30524
    names = [e.official for e in torch_flip.entries(Config().model)]
    text = json.dumps(listed)
    assert all(f'"{name}"' in text for name in names)
