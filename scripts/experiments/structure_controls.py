"""Sources and controls of the structures: what the factors of ``structure`` are made of, on the same models.

The models, texts and scores are those of ``structure``: six text tasks, heads apart and equal, seeds 31 to 35.

Decided before a reported seed was looked at:

* Nothing is chosen. Each structure has the defaults of the package (block 128; damping 0.1, 0.01 and 0.03; 10 steps).
* *From d alone*: ``fisher: none`` for all models, so that the factors come from the task vectors without v.
* *Another's v*: each model has the v of the next model, with its own task vector.
* *Rotated*: the factors of each model are turned by a random rotation in each block, with the seed of the cell. They
  keep their eigenvalues and lose their directions. Tensors without a structure are merged as before.
* References that need data, from the first 128 training texts of each task: RegMean, with the inputs' second moments
  and its published factor of 0.9 on their off-diagonal entries; and K-FAC as in MaTS, with the second moments of inputs
  and output gradients (true labels), shares by the product of the traces, damping 0.03, 10 steps of conjugate
  gradients, no blocks. Both merge the linear layers; the other tensors are the plain average.
* A control is informative only next to the row that it changes one thing of; differences are taken seed by seed.
"""
