"""Elastic weight consolidation: learn a task without forgetting those before it.

``penalty`` keeps a model near what earlier tasks taught it; ``continual`` has the contexts, outputs and averages of
task-, domain- and class-incremental learning.
"""

from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity

__all__ = ["EWCPenalty", "identity"]
