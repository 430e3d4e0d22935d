"""FaceCaption-15M made from LAION-Face: urls in, pairs of face and caption out.

Input are the 32 files laion_face_part_*.parquet that LAION-Face's own script makes, with columns
SAMPLE_ID, URL, TEXT and LICENSE. Needs a detector, and a labeller: a probe that `python -m
flip_jax.downstream attributes` trained, or with --config.attributes.labeller=onnx a model file:

    python -m flip_jax.curate build --config configs/curate/laion_face.py \\
      '--config.input.paths=laion_face_meta/*.parquet' --config.output.path=data/laion_faces \\
      --config.faces.model=retinaface.onnx --config.attributes.model=runs/labeller/probe \\
      '--config.fetch.user_agent=my-lab/1.0 (+https://my.lab/crawler)'

The filters are the paper's. Its captions were rewritten by Qwen-7B-Chat: add
--config.rewrite.url=http://localhost:8000/v1. Not run at full size.
"""

from flip_jax.curate.config import (
    AttributesConfig,
    BeamConfig,
    CaptionsConfig,
    CurateConfig,
    FacesConfig,
    FetchConfig,
    InputConfig,
)


def get_config() -> CurateConfig:
    return CurateConfig(
        input=InputConfig(
            kind="table",
            id_column="SAMPLE_ID",
            url_column="URL",
            text_column="TEXT",
            licence_column="LICENSE",
            source="laion-face",
            # A chunk waits for its slowest host; a large one waits less often.
            chunk_rows=10_000,
        ),
        fetch=FetchConfig(concurrency=256),
        faces=FacesConfig(detector="onnx", model="retinaface.onnx"),
        attributes=AttributesConfig(labeller="probe", model="runs/labeller/probe"),
        captions=CaptionsConfig(count=1),
        # Workers mostly wait for the network: more of them than cores.
        beam=BeamConfig(workers=8),
    )
