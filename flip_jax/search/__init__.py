"""Search by words, photo or sketch: an index of embeddings and a web page."""
