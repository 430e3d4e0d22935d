"""Texts cut to the length they need: same losses and gradients, same shapes on all hosts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import CFG, batches

from flip_jax import config
from flip_jax.config import DataConfig, DrawnConfig
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.records import RecordSource
from flip_jax.data.sources import write_drawn
from flip_jax.data.text_buckets import crop_texts
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip


def text(lengths, columns=10, name="token"):
    mask = np.arange(columns) < np.array(lengths)[:, None]
    return {f"{name}_ids": np.where(mask, 7, 0), f"{name}_mask": mask}


def alone(value):
    return [value]


@pytest.mark.parametrize("longest, width", [(3, 4), (4, 4), (5, 6), (6, 6), (7, 10), (10, 10)])
def test_the_first_bucket_that_holds_the_longest(longest, width):
    batch = text([3, longest, 1]) | {"group": np.zeros(3)}
    cropped = crop_texts(batch, (4, 6), alone)
    assert cropped["token_ids"].shape == cropped["token_mask"].shape == (3, width)
    assert cropped["token_mask"].sum() == batch["token_mask"].sum()
    assert cropped["group"] is batch["group"]
    assert batch["token_ids"].shape == (3, 10)
    assert crop_texts(batch, (), alone) is batch


def test_parts_have_a_length_of_their_own():
    cropped = crop_texts(text([9]) | text([2], name="part"), (4, 6), alone)
    assert cropped["token_ids"].shape == (1, 10) and cropped["part_mask"].shape == (1, 4)


def test_hosts_agree_on_the_longest_of_all():
    others = [[3, 3], [5, 2]]  # texts and parts of two other hosts

    def gather(own):
        assert own == [4, 1]
        return [own, *others]

    cropped = crop_texts(text([4, 2]) | text([1, 1], name="part"), (4, 6), gather)
    assert cropped["token_ids"].shape == (2, 6) and cropped["part_ids"].shape == (2, 4)


@pytest.mark.slow
def test_embeddings_logits_and_gradients_are_those_of_the_padded_texts():
    params = flip.init_params(CFG.model, 0.07, jax.random.key(0))
    graphdef = flip.build(CFG.model)
    batch = next(batches(1))
    batch["token_mask"] = np.arange(8) < np.where(batch["token_mask"].sum(1) > 4, 5, 3)[:, None]
    cropped = crop_texts(batch, (5,), alone)
    assert cropped["token_ids"].shape[1] == 5 < batch["token_ids"].shape[1]
    image_tokens = jax.random.normal(jax.random.key(1), (16, 5, CFG.model.vision.width))

    @jax.jit
    def gradient(params, ids, mask):
        def loss(params):
            model = nnx.merge(graphdef, params)
            found = model.embed_text(ids, mask), model.match(ids, mask, image_tokens)
            return sum(jnp.sum(jnp.sin(3 * value + 1)) for value in found), found

        return jax.grad(loss, has_aux=True)(params)

    grads, found = gradient(params, cropped["token_ids"], cropped["token_mask"])
    wanted_grads, wanted = gradient(params, batch["token_ids"], batch["token_mask"])
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    largest = max(float(np.abs(g).max()) for g in jax.tree.leaves(wanted_grads))
    # Positions that were cut off have no gradient; all others have the same.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * largest), grads, wanted_grads
    )


def test_the_stream_cuts_and_a_single_batch_does_not(tmp_path):
    drawn = DrawnConfig(train_identities=6, test_identities=2, pictures=2, size=64)
    source = RecordSource(write_drawn(drawn, tmp_path / "data"), "train")
    cfg = DataConfig(batch_size=4, threads=0, text_buckets=(24, 32, 40, 48, 56))
    pipeline = TrainPipeline(source, Tokenizer.load("grammar", 64), cfg, 32, seed=1)
    widths = set()
    with pipeline.batches() as stream:
        for step in range(4):
            batch, whole = next(stream), pipeline.batch_at(step)
            width = batch["token_ids"].shape[1]
            longest = whole["token_mask"].sum(1).max()
            assert whole["token_ids"].shape[1] == 64
            assert width == next(b for b in (*cfg.text_buckets, 64) if b >= longest)
            np.testing.assert_array_equal(batch["token_ids"], whole["token_ids"][:, :width])
            widths.add(width)
    assert max(widths) < 64


@pytest.mark.parametrize(
    "text, buckets", [("3,5", (3, 5)), ("4,", (4,)), ("()", ()), ("(6, 7)", (6, 7))]
)
def test_the_command_line_sets_them(text, buckets):
    cfg = config.validate(config.override(CFG, "data.text_buckets", text))
    assert cfg.data.text_buckets == buckets
    assert config.from_dict(json.loads(json.dumps(config.to_dict(cfg)))) == cfg
    for wrong in ("4", "4,x", "4.5,6"):
        with pytest.raises(ValueError, match=r"text_buckets=.*: must be int,\.\.\."):
            config.override(CFG, "data.text_buckets", wrong)


@pytest.mark.parametrize("buckets", [(6, 4), (2, 4), (4, 4), (4, 8), (9,)])
def test_buckets_that_cannot_be(buckets):
    data = dataclasses.replace(CFG.data, text_buckets=buckets)
    with pytest.raises(
        ValueError, match=r"config.data.text_buckets=.* must ascend, from 3 to less"
    ):
        config.validate(dataclasses.replace(CFG, data=data))
