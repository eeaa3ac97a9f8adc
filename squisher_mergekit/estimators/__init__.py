"""From a model and data to a diagonal Fisher.

``tasks`` runs a model on a batch; ``labels`` turns its outputs into gradients at its logits, one column for each draw
or class. ``capture`` notes the calls of a forward pass, and goes back from the outputs to these calls without forming
any weight gradient; ``special`` helps modules that make one thing for all examples. ``layers`` says which rule makes
the squared gradient of every example of what was noted: ``matrices`` and ``convolutions`` have their own, ``rules`` the
others and the generic way. ``squares`` adds them up over a batch, ``proof`` tries beforehand whether they are right,
``sums`` grow over batches and processes, ``estimate`` makes of them a Fisher.

For the command line ``data`` reads rows, ``encode`` makes batches of them, ``loading`` gets a model ready, ``kept``
remembers what is under way, and ``command`` does all of it.
"""
