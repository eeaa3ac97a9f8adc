"""Every merge method side by side: mergekit 0.1.5, OTA-merge, the options of ``squisher``, and its structures.

The models, texts and scores are those of ``structure`` (six text tasks, heads apart and equal, whose pooler and
classifier stay those of the task) and of ``structure_domains`` (four sentiment domains, one shared head). The base is
the model that all were trained from.

Decided, and committed, before any result of this experiment was looked at:

* **Seeds** 46 to 50, for both starts of the heads and for the domains. No experiment has used them. Some rows were
  seen on other seeds, as ``structure`` has them on 41 to 45. The first form of this protocol named those seeds; it was
  changed before the first cell was run.
* **Methods.** All methods that mergekit 0.1.5 registers and that merge any number of models, with mergekit's defaults
  for the parameters that are not searched. These do not apply: ``slerp``, ``nearswap`` and ``arcee_fusion`` take a base
  and one model; ``nuslerp`` takes two models; ``passthrough`` takes one.
* **Budget.** At most nine settings a method, all of which are tried. The best mean accuracy on 40 validation texts a
  task (or domain) chooses; of equal settings the first counts. Test texts are read once a method: 160 a task; 400, 400,
  200 and 200 of the domains.
* **Grids**, with M models. Lambda, the scale of the step from the base, is 1, 0.7, 1.5 unless another list is given.

  ======================================== =========================================================================
  ``linear``                               nothing to choose
  ``multislerp``                           around the base: lambda 1, 0.5, 0.7, 1.5, 2; around 0: lambda 1, 1.5, 2, 3
  ``karcher``                              lambda 1, 0.5, 0.7, 1.25, 1.5, 1.75, 2, 2.5, 3
  ``model_stock``                          ``filter_wise`` false, true; lambda 1, 1.5, 2, 3
  ``task_arithmetic``                      weight 1/M, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1
  ``ties``                                 density 0.1, 0.05, 0.2; lambda
  ``dare_linear``                          density 0.5, 0.1, 0.9; lambda 1/M, 2/M, 3/M
  ``dare_ties``                            density 0.5, 0.1, 0.9; lambda 2/M, 3/M, 1
  ``della``                                density 0.3, 0.1, 0.6, ``epsilon`` min(0.15, density / 2); lambda
  ``della_linear``                         the same densities; lambda 1/M, 2/M, 3/M
  ``breadcrumbs``                          density 0.3, 0.1, 0.6; lambda 1/M, 2/M, 3/M
  ``breadcrumbs_ties``                     density 0.3, 0.1, 0.6; lambda 2/M, 3/M, 1
  ``sce``                                  ``select_topk`` 1, 0.1, 0.3; lambda
  ``ram``, ``ramplus_tl``                  ``epsilon`` 1e-5, 1e-4, 1e-3; lambda
  OTA-merge without its mask               ``power: 0.5``; ``normalize`` none, mean, l2; lambda
  OTA-merge                                the same as ``change`` below with ``power: 0.5``
  ``squisher``                             ``normalize`` none, mean, l2; lambda
  + ``density``                            ``density_by: fisher``, a tensor at a time: 0.3, 0.1, 0.6; lambda
  + ``density_by: change`` of the model    ``density_scope: model``: density 0.1, 0.05, 0.2; lambda
  + the same, ``trimmed: abstain``         density 0.1, 0.05, 0.2; lambda; called ``change``
  + ``consensus: sign``                    ``normalize`` none, mean, l2; lambda
  + ``change``, ``abstain`` and ``sign``   density 0.1, 0.05, 0.2; lambda
  ``ubgm_squisher``                        weight 1, 0.5, 0.25; ``prior`` 0, 0.1, 1; no Fisher of the base
  ``structure: rows``, ``columns``         block 128, 384, 1536 (the largest side); lambda
  ``structure: kron``                      block 128, 32, 384; lambda
  + ``density``, ``trimmed: abstain``      block 128; density 0.5, 0.2, 0.1; lambda
  ======================================== =========================================================================

  A method that draws entries has draws of its own for each seed, method and density.
* **The field** of a cell is the method of mergekit, or OTA-merge, whose chosen setting has the best accuracy on the
  validation texts; of equal ones the first of the table. It has a far larger budget than any single method.
* **Primary comparison**: ``structure: kron``, seed by seed, less the field, once for each start of the heads. A recipe
  with ``structure: kron`` and a base is recommended for different tasks if, and only if, all five seeds are there and
  the 95 % t interval of the difference is above 0 for both starts. If not, no recipe is recommended. Nothing else in
  the tables makes a recommendation: not another row, a better mean, or the domains, where models of one task interfere
  little. The default of the method, Eq. 13, stays in either case.
* **Second**, stated and not decisive: each row less tuned ``ties``, less the field, and less ``squisher``; the worst
  task of a seed, and the largest loss of a task to its single model. Every row is reported, also where ours is below.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scripts.experiments import method_report, structure_domains, structure_tasks
from scripts.experiments.merging import HEADS
from scripts.experiments.method_rows import BUDGET, compared, methods
from scripts.experiments.runner import TIMINGS, Experiment, Result, Settings, main
from scripts.experiments.tables import Table

DOMAINS = "domains"  # setting of a cell of the shared head
SEEDS = (46, 47, 48, 49, 50)
FULL_CELLS = [{"seed": seed, "heads": heads, **structure_tasks.FULL} for seed in SEEDS for heads in HEADS]
FULL_DOMAINS = [{"seed": seed, **structure_domains.FULL, "validation_texts": 40} for seed in SEEDS]


def cell(settings: Settings, work: Path) -> Result:
    """Fine-tune, search, merge and score for one seed, and one start of the heads or the domains."""
    if DOMAINS in settings:
        models, training = structure_domains.trained(settings, work)
    else:
        _, models, training = structure_tasks.trained(settings, work)
    table = methods(len(models.weights), settings["seed"], most=settings["budget"])
    result = compared(models, table)
    result[TIMINGS]["training"] = training
    return result


EXPERIMENT = Experiment(
    "merge_methods",
    "Every merge method side by side.",
    cell,
    full=[{**one, "budget": BUDGET} for one in [*FULL_CELLS, *FULL_DOMAINS]],
    quick=[{**one, "budget": 1} for one in structure_tasks.QUICK_CELLS],
    gpu=True,
)


def tables(report: Mapping[str, Any]) -> list[Table]:
    """Return a table for each start of the heads and for the domains."""
    return method_report.tables(report, EXPERIMENT)


def pictures(report: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the picture of mean accuracies by row."""
    return {"merge_methods.png": method_report.picture(report)}


if __name__ == "__main__":
    sys.exit(main(EXPERIMENT))
