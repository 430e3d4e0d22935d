"""The pictures of FaceCaption-15M as published: urls, boxes and captions; nothing is made.

Input is the published parquet file with columns _id, url, box, caption and laion_caption. Many of
its links are dead; the status files say which.

    python -m flip_jax.curate build --config configs/curate/facecaption.py \\
      --config.input.paths=FaceCaption-v2.parquet --config.output.path=data/facecaption
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
            id_column="_id",
            url_column="url",
            text_column="caption",
            box_column="box",
            source="facecaption-15m",
            chunk_rows=10_000,
        ),
        fetch=FetchConfig(concurrency=256),
        # As published: no labels came with it, and its filters were applied before.
        faces=FacesConfig(detector="given", min_side=0, align=False),
        attributes=AttributesConfig(labeller="given", min_labels=-1),
        captions=CaptionsConfig(count=0, keep_texts=True),
        beam=BeamConfig(workers=8),
    )
