"""flip_jax: facial language-image pretraining in JAX."""

__version__ = "0.1.0"


def load(path, **options):
    """Loads a trained model: see `flip_jax.api.load`."""
    # Here and not above: importing the package must not start JAX.
    from flip_jax import api

    return api.load(path, **options)
