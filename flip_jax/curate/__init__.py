"""Making face image-caption pairs from web pairs or local files, as Apache Beam transforms.

Nothing here imports jax: a build reaches training only through the record files that it writes.
"""
