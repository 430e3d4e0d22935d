"""Faces of the photographs in a folder, with a table of their labels; no network.

A row of the table names a picture below the folder; columns named like CelebA's 40 attributes are
its labels, from which the grammar makes captions. OpenCV's detector finds the face.

    python -m flip_jax.curate build --config configs/curate/folder.py \\
      --config.input.paths=faces.csv --config.input.images=photos --config.output.path=data/faces

`--config.faces.detector=whole` is for pictures that are crops of one face already.
"""

from flip_jax.curate.config import (
    AttributesConfig,
    BeamConfig,
    CurateConfig,
    FacesConfig,
    InputConfig,
    SplitConfig,
)


def get_config() -> CurateConfig:
    return CurateConfig(
        input=InputConfig(kind="table", file_column="file"),
        # Labels are of one person: the one with the largest face. OpenCV's boxes leave out hair and
        # chin, of which the captions speak.
        faces=FacesConfig(detector="opencv", max_faces=1, margin=0.3),
        attributes=AttributesConfig(labeller="given"),
        split=SplitConfig(train=0.8, val=0.1, test=0.1),
        beam=BeamConfig(workers=2),
    )
