"""Finding passages for a question: an index over a corpus, how it is built, stored and searched."""
