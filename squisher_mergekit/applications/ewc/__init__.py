"""Elastic weight consolidation (EWC): learn a task without forgetting earlier ones.

``penalty`` has the penalty, ``quadratics`` the sum of its terms, ``runaway`` a monitor of its gradient.
"""

from squisher_mergekit.applications.ewc.penalty import EWCPenalty, identity

__all__ = ["EWCPenalty", "identity"]
