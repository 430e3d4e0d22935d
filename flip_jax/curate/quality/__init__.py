"""The quality report of a data set: what is in it, how good it is, what is wrong with it.

`python -m flip_jax.curate report DATA --out DIR` reads every record once for what its header,
labels and captions say, a sample of the pictures for what takes decoding, and writes report.json,
report.md and pictures. Memory does not grow with the data set.
"""
