"""Next words against `transformers`: logits, loss and gradients of BLIP's text decoder."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from test_towers import SMALL, close, redraw, reference, texts, to_torch, tokens, torch_bert

from flip_jax.losses.caption import next_word_losses
from flip_jax.models import flip

MODEL = replace(SMALL, caption_head=True)


@pytest.fixture(scope="module")
def sides():
    """(BLIP's decoder in float64, our parameters)"""
    from transformers import BlipTextLMHeadModel

    _, bert, _, params = reference(SMALL)
    decoder = BlipTextLMHeadModel(torch_bert(SMALL).config)
    redraw(decoder.cls, 7)
    decoder.bert = bert
    decoder.cls.predictions.decoder.weight = bert.embeddings.word_embeddings.weight
    head = decoder.cls.predictions
    assert head.decoder.bias is head.bias
    decoder.label_smoothing = 0.1
    value = lambda p: np.asarray(p.detach(), np.float32)  # noqa: E731
    transform = head.transform
    ours = {
        "dense": {"kernel": value(transform.dense.weight).T, "bias": value(transform.dense.bias)},
        "norm": {
            "scale": value(transform.LayerNorm.weight),
            "bias": value(transform.LayerNorm.bias),
        },
        "bias": value(head.bias),
    }
    return decoder.double().eval(), params | {"caption_head": ours}


def test_logits_loss_and_gradients(sides):
    decoder, params = sides
    ids, mask = texts(SMALL, [9, 4, 6, 2], 9)
    seen = tokens(SMALL, 4, 5)
    ids = np.maximum(ids, 1)  # torch keeps the gradient of the embedding of [PAD], 0, at nought
    ids[:, 0] = SMALL.text.dec_id
    torch_ids, torch_mask, torch_seen = to_torch(ids, mask, seen)
    torch_seen.requires_grad_(True)
    out = decoder(
        input_ids=torch_ids,
        attention_mask=torch_mask,
        encoder_hidden_states=torch_seen,
        labels=torch_ids.masked_fill(torch_mask == 0, -100),
    )
    decoder.zero_grad()
    out.loss.backward()

    def loss(params, seen):
        logits = nnx.merge(flip.build(MODEL), params).caption_logits(ids, mask, seen)
        sums, words = next_word_losses(logits, ids, mask, 0.1)
        return sums.sum() / words.sum(), logits

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (value, logits), (grads, seen_grad) = compiled(params, seen)
    close(logits[mask], out.logits.detach().numpy()[mask], 1e-5)
    close(value, out.loss.detach().numpy(), 1e-6)
    layers, transform = decoder.bert.encoder.layer, decoder.cls.predictions.transform
    block = grads["bert"]["blocks"]
    kernels = {
        "words, both uses": (grads["bert"]["word_embed"], decoder.bert.embeddings.word_embeddings),
        "head": (grads["caption_head"]["dense"]["kernel"].T, transform.dense),
        "query": (block["attn"]["query"]["kernel"][0].T, layers[0].attention.self.query),
        "key": (block["cross"]["key"]["kernel"][1].T, layers[1].crossattention.self.key),
    }
    for name, (ours, module) in kernels.items():
        close(ours, module.weight.grad.numpy(), 1e-5, name)
    close(grads["caption_head"]["bias"], decoder.cls.predictions.bias.grad.numpy(), 1e-6)
    close(seen_grad, torch_seen.grad.numpy(), 1e-5)
