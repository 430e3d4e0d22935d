"""The source side of the checks: PyTorch models that take the foreign weights as they are.

They share nothing with our models or mappings: `transformers` modules for the official state dict
and Hugging Face names, `torch.nn.MultiheadAttention` for OpenAI's fused names.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    BlipTextConfig,
    BlipTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
)

from flip_jax.config import ModelConfig, TextConfig, VisionConfig
from flip_jax.convert.check import Inputs, Outputs
from flip_jax.models.visual_tokenizer import TokenizerConfig


def vision_config(cfg: VisionConfig) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        architectures=["CLIPVisionModel"],
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )


def text_config(cfg: TextConfig, image_width: int) -> BlipTextConfig:
    return BlipTextConfig(
        architectures=["BlipTextModel"],
        vocab_size=cfg.vocab_size,
        max_position_embeddings=cfg.positions,
        hidden_size=cfg.width,
        encoder_hidden_size=image_width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width,
        hidden_dropout_prob=cfg.dropout,
        attention_probs_dropout_prob=cfg.dropout,
        layer_norm_eps=1e-12,
        is_decoder=True,  # gives every layer its cross-attention; calls stay bidirectional
        bos_token_id=None,  # these are for generation and must lie inside the vocabulary
        eos_token_id=None,
        sep_token_id=None,
    )


def load(module: nn.Module, state: Mapping[str, np.ndarray], prefix: str = "") -> nn.Module:
    """`module` in eval mode with all tensors whose names start with `prefix`; memory is shared."""
    tensors = {
        name.removeprefix(prefix): torch.from_numpy(np.array(value, copy=not value.flags.writeable))
        for name, value in state.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    module.load_state_dict(tensors, strict=True, assign=True)
    return module.eval()


@torch.no_grad()
def flip_outputs(
    state: Mapping[str, np.ndarray], cfg: ModelConfig, inputs: Inputs, *, twin: bool = False
) -> Outputs:
    """Outputs of an official state dict, of its online or momentum weights (one `itm_head`).

    Args:
      cfg: the sizes; of another image size than `state` if the position table is to be resized.
    """
    suffix = "_m" if twin else ""
    prefix = f"visual_encoder{suffix}.vision_model."
    spelled = {name.replace("post_layrnorm", "post_layernorm"): v for name, v in state.items()}
    table = f"{prefix}embeddings.position_embedding.weight"
    spelled[table] = _resized(spelled[table], cfg.vision.patches)
    vision = load(CLIPVisionModel(vision_config(cfg.vision)), spelled, prefix)
    text = BlipTextModel(text_config(cfg.text, cfg.vision.width), add_pooling_layer=False)
    load(text, state, f"text_encoder{suffix}.")
    heads = {
        f"{name}.{leaf}": state[f"{name}{suffix if twin_too else ''}.{leaf}"]
        for name, twin_too in (("vision_proj", True), ("text_proj", True), ("itm_head", False))
        for leaf in ("weight", "bias")
    }
    return module_outputs(vision, text, heads, inputs)


@torch.no_grad()
def module_outputs(
    vision: CLIPVisionModel, text: BlipTextModel, heads: Mapping[str, np.ndarray], inputs: Inputs
) -> Outputs:
    """Outputs of the two towers and the heads `vision_proj`, `text_proj`, `itm_head`."""

    def head(name: str, x: Tensor) -> Tensor:
        weight, bias = (torch.tensor(heads[f"{name}.{leaf}"]) for leaf in ("weight", "bias"))
        return F.linear(x, weight, bias)

    image_tokens = vision.post_layernorm(vision(_pixels(inputs)).last_hidden_state)
    ids, mask = _texts(inputs)
    text_tokens = text(ids, attention_mask=mask).last_hidden_state
    fused = text(ids, attention_mask=mask, encoder_hidden_states=image_tokens).last_hidden_state
    outputs = {
        "image_tokens": image_tokens,
        "image_embed": F.normalize(head("vision_proj", image_tokens[:, 0]), dim=-1),
        "text_tokens": text_tokens,
        "text_embed": F.normalize(head("text_proj", text_tokens[:, 0]), dim=-1),
        "fused_tokens": fused,
        "itm_logits": head("itm_head", fused[:, 0]),
    }
    return _numpy(outputs)


@torch.no_grad()
def clip_outputs(
    tensors: Mapping[str, np.ndarray], cfg: VisionConfig, inputs: Inputs, *, keep_post_norm: bool
) -> Outputs:
    """Outputs of a CLIP image tower under Hugging Face names.

    Args:
      cfg: the sizes; of another image size than `tensors` if the position table is to be resized.
      keep_post_norm: use CLIP's last norm; else 1 and 0 take its place.
    """
    state = {name.removeprefix("vision_model."): value for name, value in tensors.items()}
    name = "embeddings.position_embedding.weight"
    state[name] = _resized(state[name], cfg.patches)
    model = load(CLIPVisionModel(vision_config(cfg)), state)
    if not keep_post_norm:
        model.post_layernorm = nn.LayerNorm(cfg.width, 1e-5)
    return _numpy({"image_tokens": model.post_layernorm(model(_pixels(inputs)).last_hidden_state)})


@torch.no_grad()
def openai_outputs(
    tensors: Mapping[str, np.ndarray], cfg: VisionConfig, inputs: Inputs, *, keep_post_norm: bool
) -> Outputs:
    """Outputs of a CLIP image tower under OpenAI's names; see `clip_outputs`."""
    state = {name.removeprefix("visual."): value for name, value in tensors.items()}
    state["positional_embedding"] = _resized(state["positional_embedding"], cfg.patches)
    model = load(OpenAiVision(cfg), state)
    if not keep_post_norm:
        model.ln_post = nn.LayerNorm(cfg.width)
    return _numpy({"image_tokens": model(_pixels(inputs))})


@torch.no_grad()
def bert_outputs(
    tensors: Mapping[str, np.ndarray], cfg: TextConfig, inputs: Inputs, *, keep_type: bool
) -> Outputs:
    """Outputs of a BERT encoder, all tokens of type 0.

    Args:
      keep_type: add the type-0 vector; else zeros take its place.
    """
    state = {name.removeprefix("bert."): value for name, value in tensors.items()}
    kind = "embeddings.token_type_embeddings.weight"
    if not keep_type:
        state[kind] = np.zeros_like(state[kind])
    config = BertConfig(
        vocab_size=len(state["embeddings.word_embeddings.weight"]),
        max_position_embeddings=cfg.positions,
        type_vocab_size=len(state[kind]),
        hidden_size=cfg.width,
        num_hidden_layers=cfg.depth,
        num_attention_heads=cfg.heads,
        intermediate_size=cfg.mlp_width,
        layer_norm_eps=1e-12,
    )
    model = load(BertModel(config, add_pooling_layer=False), state)
    ids, mask = _texts(inputs)
    return _numpy({"text_tokens": model(ids, attention_mask=mask).last_hidden_state})


@torch.no_grad()
def dalle_outputs(
    tensors: Mapping[str, np.ndarray], cfg: TokenizerConfig, pixels: np.ndarray
) -> Outputs:
    """`logits` [B, G, G, V] of DALL-E's encoder under `transformers`' names.

    Args:
      pixels: float32 [B, S, S, 3] in 0..1.
    """
    config = FlavaImageCodebookConfig(
        hidden_size=cfg.width, vocab_size=cfg.codes, num_blocks_per_group=cfg.blocks
    )
    model = load(FlavaImageCodebook(config), tensors)
    mapped = 0.8 * torch.tensor(pixels).permute(0, 3, 1, 2) + 0.1
    return _numpy({"logits": model(mapped).permute(0, 2, 3, 1)})


class OpenAiVision(nn.Module):
    """CLIP's image tower with OpenAI's parameter names; all tokens, after `ln_post`."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        width, patch = cfg.width, cfg.patch_size
        self.conv1 = nn.Conv2d(3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(cfg.patches + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict(
            {"resblocks": nn.ModuleList(OpenAiBlock(cfg) for _ in range(cfg.depth))}
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding)
        for block in self.transformer["resblocks"]:
            x = block(x)
        return self.ln_post(x)


class OpenAiBlock(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.attn = nn.MultiheadAttention(cfg.width, cfg.heads, batch_first=True)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(cfg.width, cfg.mlp_width),
                "c_proj": nn.Linear(cfg.mlp_width, cfg.width),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False)[0]
        h = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](h * torch.sigmoid(1.702 * h))


def _resized(table: np.ndarray, patches: int) -> np.ndarray:
    side, old = round(patches**0.5), round((len(table) - 1) ** 0.5)
    if side == old:
        return table
    grid = torch.tensor(table[1:]).T.reshape(1, -1, old, old)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return np.concatenate([table[:1], grid.flatten(2)[0].T.numpy()])


def _pixels(inputs: Inputs) -> Tensor:
    return torch.tensor(inputs.image).permute(0, 3, 1, 2)


def _texts(inputs: Inputs) -> tuple[Tensor, Tensor]:
    return torch.tensor(inputs.token_ids).long(), torch.tensor(inputs.token_mask).long()


def _numpy(outputs: Mapping[str, Tensor]) -> Outputs:
    return {name: value.numpy() for name, value in outputs.items()}
