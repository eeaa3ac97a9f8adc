"""Merging by Fisher: equations, their execution, the plan and the run of a merge. ``mergekit/`` alone imports mergekit.

The parameter ``fisher:`` of a model goes from the YAML to the output tensor on two straight lines. A ``Run`` goes
along: it owns the plan and the open Fishers, and closes them at the end of the merge, whether it succeeds or not.

Planning, from the YAML to a task of mergekit's graph; headers are read, tensors are not:

1. ``mergekit.hooks.plan_with_fishers``: the whole configuration, before and after mergekit's planner
2. ``parameters.check_blocks``: keys, values and places
3. ``mergekit.adapter.add_fishers``: one ``WeightInput`` per model and tensor, with the value of ``fisher:``
4. ``tensor_plan.plan_tensor``: a ``FisherUse`` per input, or the reason why there is none; ``planning`` has the records
   and the checks of the base
5. ``sources.FisherSources.open``: an ``OpenFisher``, found and checked
6. ``merge_plan.MergePlan.check``: the whole merge, before any file is written
7. ``mergekit.tasks.FisherMergeTask``: mergekit's task with a ``FisherRequest`` per model

Running, from the task to the output tensor:

1. ``mergekit.tasks.FisherMergeTask.execute``
2. ``read.load_tensor``: the tensor of the open Fisher, with its scale
3. ``mergekit.methods.FisherMergeMethod.merge_group``: weights, Fishers and the ``Ballot`` of one tensor
4. ``execution.merge_squisher`` or ``merge_ubgm``: chunks, or one pass on an accelerator
5. ``equations.squisher`` or ``ubgm_squisher``; with options of the vote those of ``votes.equations``
6. ``run.Run.record``: the outcome, for the report, and its Fisher, for ``merged_fisher.written``

With ``density_scope: model``, ``mergekit.thresholds.ThresholdTask`` reads every tensor once before the first is merged.
"""
