"""The model as `transformers` modules: a folder that `from_pretrained` reads.

    vision/            CLIPVisionModel, and CLIPImageProcessor
    text/              BlipTextModel, and BertTokenizer
    heads.safetensors  vision_proj, text_proj, itm_head (weight, bias) and temp, official names
    flip.json          embed_dim, max_length, enc_token_id, step

`CLIPVisionModel` applies its last norm to the class token only (`pooler_output`, equal to our
class token); for the tokens that the text tower looks at it must be called on all of them. What
else is needed is in docs/convert.md, as a program.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from flip_jax.config import ModelConfig
from flip_jax.convert import torch_flip, torch_models
from flip_jax.convert.check import Inputs, Outputs
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models.vit import PIXEL_MEAN, PIXEL_STD
from flip_jax.weights import Weights, write_tensors

_HEADS = ("vision_proj.", "text_proj.", "itm_head.", "temp")


def write_hugging_face(folder: Path, weights: Weights, tokenizer: Tokenizer) -> None:
    """Writes the folder; it must not be there."""
    model = weights.cfg.model
    state = torch_flip.params_to_official(weights.params, model)
    towers = {
        "vision": (
            torch_models.vision_config(model.vision),
            {  # with the prefix, which transformers 4 needs and 5 takes
                name.removeprefix("visual_encoder.").replace("post_layrnorm", "post_layernorm"): v
                for name, v in state.items()
                if name.startswith("visual_encoder.")
            },
        ),
        "text": (
            torch_models.text_config(model.text, model.vision.width),
            {
                name.removeprefix("text_encoder."): value
                for name, value in state.items()
                if name.startswith("text_encoder.")
            },
        ),
    }
    for name, (config, tensors) in towers.items():
        (folder / name).mkdir(parents=True)
        config.save_pretrained(folder / name)
        write_tensors(folder / name / "model.safetensors", tensors, "pt")
    heads = {name: value for name, value in state.items() if name.startswith(_HEADS)}
    write_tensors(folder / "heads.safetensors", heads, "pt")
    tokenizer.save_vocab(folder / "text" / "vocab.txt")
    _write_json(folder / "text" / "tokenizer_config.json", _tokenizer_config(tokenizer))
    _write_json(folder / "vision" / "preprocessor_config.json", _processor_config(model))
    flip = {
        "embed_dim": model.embed_dim,
        "max_length": model.text.max_length,
        "enc_token_id": tokenizer.enc_id,
        "step": weights.meta["step"],
    }
    _write_json(folder / "flip.json", flip)


def hugging_face_outputs(folder: Path, inputs: Inputs) -> Outputs:
    """What the folder's models compute, loaded by `transformers` alone."""
    from safetensors.numpy import load_file
    from transformers import BlipTextModel, CLIPVisionModel

    vision = CLIPVisionModel.from_pretrained(folder / "vision")
    text = BlipTextModel.from_pretrained(folder / "text", add_pooling_layer=False)
    heads = load_file(folder / "heads.safetensors")
    return torch_models.module_outputs(vision, text, heads, inputs)


def _tokenizer_config(tokenizer: Tokenizer) -> dict:
    return {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": tokenizer.max_length,
        "bos_token": "[DEC]",
        "additional_special_tokens": ["[ENC]"],
    }


def _processor_config(model: ModelConfig) -> dict:
    """Squashed to a square by antialiased bicubic, CLIP's channel statistics."""
    size = model.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": 3,
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _floats(PIXEL_MEAN),
        "image_std": _floats(PIXEL_STD),
    }


def _floats(values: np.ndarray) -> list[float]:
    return [float(str(value)) for value in values]


def _write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")
