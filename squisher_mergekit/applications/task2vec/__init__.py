"""Task2Vec: a task as the Fisher of a network trained on it, averaged over each filter.

``embedding`` makes and keeps it, ``distances`` compares two, ``ranking`` orders sources for a target.
"""

from squisher_mergekit.applications.task2vec.distances import distance, distance_matrix
from squisher_mergekit.applications.task2vec.embedding import Embedding, embed, read_embedding, write_embedding
from squisher_mergekit.applications.task2vec.ranking import mrr, ndcg, rank

__all__ = [
    "Embedding",
    "distance",
    "distance_matrix",
    "embed",
    "mrr",
    "ndcg",
    "rank",
    "read_embedding",
    "write_embedding",
]
