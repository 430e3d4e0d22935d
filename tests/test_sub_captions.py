"""Parts of captions: how they are drawn, and who reads them."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from tiny_run import CFG, batches

from flip_jax import config
from flip_jax.compile.step import abstract_batch
from flip_jax.config import DataConfig, DrawnConfig
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.records import RecordSource
from flip_jax.data.sources import write_drawn
from flip_jax.data.sub_captions import draw_part, sentences
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.losses.flip import flip_loss
from flip_jax.models import flip
from flip_jax.optim import make_optimizer
from flip_jax.partition import make_mesh
from flip_jax.train import init_state

CAPTION = "She has 2.5 cm of hair.  Does she smile? No!"


def test_sentences():
    assert sentences(CAPTION) == ["She has 2.5 cm of hair.", "Does she smile?", "No!"]
    assert sentences(" no full stop ") == ["no full stop"]
    assert sentences("她很年轻。她在微笑。") == ["她很年轻。", "她在微笑。"]
    assert sentences("") == [""]


@pytest.mark.parametrize(("kind", "choices"), [("sentence", 3), ("block", 6)])
def test_every_part_is_as_likely_as_any_other(kind, choices):
    rng = np.random.default_rng(0)
    drawn = collections.Counter(draw_part(CAPTION, kind, rng) for _ in range(6000))
    assert len(drawn) == choices
    assert all(part in " ".join(sentences(CAPTION)) for part in drawn)
    # Five standard deviations of a count.
    expected, spread = 6000 / choices, 5 * (6000 / choices) ** 0.5
    assert all(abs(count - expected) < spread for count in drawn.values())


def test_the_pipeline_draws_a_part_of_the_caption_it_gives(tmp_path):
    drawn = DrawnConfig(train_identities=6, test_identities=2, pictures=2, size=64)
    source = RecordSource(write_drawn(drawn, tmp_path / "data"), "train")
    tokenizer = Tokenizer.load("grammar", 40)
    cfg = DataConfig(batch_size=8, contrastive_text="sentence")
    batch = TrainPipeline(source, tokenizer, cfg, 32, seed=1).batch_at(0)
    assert batch["part_ids"].shape == batch["token_ids"].shape
    assert batch["part_mask"].sum() < batch["token_mask"].sum()
    for row in range(8):  # [CLS] part [SEP] stands in a row in the caption
        part = batch["part_ids"][row][batch["part_mask"][row]][1:-1].tolist()
        whole = batch["token_ids"][row][batch["token_mask"][row]].tolist()
        assert any(whole[i : i + len(part)] == part for i in range(len(whole)))
    plain = TrainPipeline(source, tokenizer, DataConfig(batch_size=8), 32, seed=1).batch_at(0)
    assert "part_ids" not in plain


def test_the_contrastive_loss_reads_the_part_and_itm_the_caption():
    state = init_state(CFG, make_optimizer(CFG.optim, lambda _: 1e-3))
    whole, other = batches(2)
    part = {"part_ids": other["token_ids"], "part_mask": other["token_mask"]}
    texts = {"token_ids": other["token_ids"], "token_mask": other["token_mask"]}
    negatives = {name: np.roll(np.arange(16), 1) for name in ("image", "text")}

    @jax.jit
    def losses(batch):
        arguments = state["params"], state["momentum"], state["queue"], batch, 0.4, None
        model = flip.build(CFG.model)
        return flip_loss(*arguments, cfg=CFG, graphdef=model, negatives=negatives)[1]["metrics"]

    both = losses(whole | part)
    assert both["loss_itc"] == losses(whole | texts)["loss_itc"]
    assert both["loss_itm"] == losses(whole)["loss_itm"]
    assert both["loss_itc"] != losses(whole)["loss_itc"]


def test_compiling_ahead_knows_the_part():
    data = dataclasses.replace(CFG.data, contrastive_text="block")
    mesh = make_mesh(config.MeshConfig(), jax.devices()[:1])
    batch = abstract_batch(dataclasses.replace(CFG, data=data), mesh)
    assert batch["part_ids"].shape == (16, 8) and "part_ids" not in abstract_batch(CFG, mesh)
