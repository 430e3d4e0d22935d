"""Readers of published face data sets, each in the shape its publisher gives it; no jax.

`READERS` has them by name. `flip_jax.data.readers.url_tables` reads the tables without pictures,
FaceCaption-15M and LAION-Face.
"""

from __future__ import annotations

from flip_jax.data.readers.aflw import Aflw19
from flip_jax.data.readers.celeba import CelebA, CelebADialog, CelebAInTheWild, Face2Text
from flip_jax.data.readers.celeba_hq import CelebADialogHQ, CelebAMaskHQ, MMCelebAHQ
from flip_jax.data.readers.faces_300w import Faces300W
from flip_jax.data.readers.fs2k import Fs2k, Fs2kSde1, Fs2kSde2
from flip_jax.data.readers.lapa import Lapa
from flip_jax.data.readers.lfw import Lfw, Lfwa
from flip_jax.data.readers.reader import Reader
from flip_jax.data.readers.wflw import Wflw

READERS: dict[str, type[Reader]] = {
    reader.NAME: reader
    for reader in (
        CelebA,
        CelebAInTheWild,
        CelebADialog,
        CelebADialogHQ,
        MMCelebAHQ,
        Face2Text,
        Lfw,
        Lfwa,
        CelebAMaskHQ,
        Lapa,
        Faces300W,
        Wflw,
        Aflw19,
        Fs2k,
        Fs2kSde1,
        Fs2kSde2,
    )
}
