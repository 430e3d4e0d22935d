"""Published face data sets as TensorFlow Datasets, read over ArrayRecord without TensorFlow.

Importing this registers `flip_celeba`, `flip_lapa` and the others with `tensorflow_datasets`. The
data sets are read from `manual_dir`, the folder that their readers call root.
"""

try:
    import tensorflow_datasets  # noqa: F401
except ImportError as error:
    raise ImportError(
        "flip_jax.data.tfds needs TensorFlow Datasets: pip install 'flip_jax[tfds]'"
    ) from error

from flip_jax.data.tfds import builders  # noqa: F401
