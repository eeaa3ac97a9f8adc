"""Task2Vec: a task as a vector, the Fisher of a network trained on it, averaged over each filter.

``embedding`` makes, writes and reads embeddings, ``distances`` compares two, ``ranking`` ranks sources for a target.
"""

from squisher_mergekit.applications.task2vec.distances import (
    Metric,
    TaskNormalize,
    clustered,
    distance,
    distance_matrix,
)
from squisher_mergekit.applications.task2vec.embedding import (
    Embedding,
    EmbeddingInfo,
    embed,
    read_embedding,
    write_embedding,
)
from squisher_mergekit.applications.task2vec.ranking import (
    Quality,
    assess,
    best_rank,
    mrr,
    ndcg,
    quality,
    rank,
    read_sizes,
    read_transfer,
    reciprocal_rank,
)

__all__ = [
    "Embedding",
    "EmbeddingInfo",
    "Metric",
    "Quality",
    "TaskNormalize",
    "assess",
    "best_rank",
    "clustered",
    "distance",
    "distance_matrix",
    "embed",
    "mrr",
    "ndcg",
    "quality",
    "rank",
    "read_embedding",
    "read_sizes",
    "read_transfer",
    "reciprocal_rank",
    "write_embedding",
]
