"""Small random weights in the formats that `flip_jax.convert` reads."""

import numpy as np
import pytest
from transformers import BertConfig, BertForMaskedLM, CLIPConfig, CLIPModel

from flip_jax.config import ModelConfig, TextConfig, VisionConfig
from flip_jax.convert import torch_flip
from flip_jax.data.tokenizer import Tokenizer

# Skips the tests that import this module, too.
torch = pytest.importorskip("torch", reason="conversion needs the extra [torch]")

WIDTH, HEADS, DEPTH, MLP, PATCH, SIZE, POSITIONS, QUEUE = 128, 2, 2, 96, 8, 32, 70, 12
VOCAB = Tokenizer.load("grammar", 65).vocab_size


def model_config() -> ModelConfig:
    tower = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "mlp_width": MLP}
    return ModelConfig(
        vision=VisionConfig(image_size=SIZE, patch_size=PATCH, **tower),
        text=TextConfig(vocab_size=VOCAB, positions=POSITIONS, **tower),
        embed_dim=24,
    )


def official_state(*, twins: bool = True, queue: bool = True) -> dict[str, torch.Tensor]:
    """A state dict with the official names and order; no two tensors alike."""
    model, rng = model_config(), np.random.default_rng(0)

    def draw(shapes):
        return {n: rng.normal(size=s).astype(np.float32) * 0.2 for n, s in shapes.items()}

    online = draw(torch_flip.official_shapes(model))
    state = {"temp": online.pop("temp")}
    if queue:
        state |= draw({n: (model.embed_dim, QUEUE) for n in ("image_queue", "text_queue")})
        state["idx_queue"] = np.arange(QUEUE)[None] - 100
        state["ptr_queue"] = np.array([8])
    state |= online
    if twins:
        state |= draw(torch_flip.official_shapes(model, twin=True))
    ordered = {}
    for name, value in state.items():
        tower = name.partition("embeddings.")[0]
        if name.endswith("word_embeddings.weight"):
            ordered[f"{tower}embeddings.position_ids"] = np.arange(POSITIONS)[None]
        ordered[name] = value
        if name.endswith("class_embedding"):
            ordered[f"{tower}embeddings.position_ids"] = np.arange(model.vision.patches + 1)[None]
    return {name: torch.tensor(value) for name, value in ordered.items()}


def _randomize(module: torch.nn.Module) -> None:
    """No trivial norm or bias, so that a mixed-up one shows."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def clip_model() -> CLIPModel:
    tower = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS}
    text = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = CLIPConfig(
        vision_config={**tower, "intermediate_size": MLP, "image_size": SIZE, "patch_size": PATCH},
        text_config={**tower, "intermediate_size": MLP, **text},
    )
    model = CLIPModel(config)
    _randomize(model)
    return model


def bert_model() -> BertForMaskedLM:
    """Without rows for [DEC] and [ENC], as bert-base-uncased."""
    config = BertConfig(
        vocab_size=VOCAB - 2,
        max_position_embeddings=POSITIONS,
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
    )
    model = BertForMaskedLM(config)
    _randomize(model)
    return model


def openai_state(clip: CLIPModel) -> dict[str, torch.Tensor]:
    """The same weights under OpenAI's names, with parts of a text tower."""
    state, vision = {}, clip.vision_model
    visual = {
        "class_embedding": vision.embeddings.class_embedding,
        "positional_embedding": vision.embeddings.position_embedding.weight,
        "conv1.weight": vision.embeddings.patch_embedding.weight,
        "proj": clip.visual_projection.weight.T,
    }

    def put(name, module):
        visual[f"{name}.weight"], visual[f"{name}.bias"] = module.weight, module.bias

    put("ln_pre", vision.pre_layrnorm)
    put("ln_post", vision.post_layernorm)
    for index, layer in enumerate(vision.encoder.layers):
        block, attention = f"transformer.resblocks.{index}", layer.self_attn
        fused = attention.q_proj, attention.k_proj, attention.v_proj
        visual[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight for part in fused])
        visual[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias for part in fused])
        put(f"{block}.attn.out_proj", attention.out_proj)
        put(f"{block}.ln_1", layer.layer_norm1)
        put(f"{block}.ln_2", layer.layer_norm2)
        put(f"{block}.mlp.c_fc", layer.mlp.fc1)
        put(f"{block}.mlp.c_proj", layer.mlp.fc2)
    state = {f"visual.{name}": tensor.detach().clone() for name, tensor in visual.items()}
    state["positional_embedding"] = torch.zeros(77, WIDTH)
    state["transformer.resblocks.0.ln_1.weight"] = torch.zeros(WIDTH)
    state["vocab_size"] = torch.tensor(50)
    return state
