"""From a training run's optimizer state to a Fisher with names.

``load`` finds what it is given. ``layouts`` asks in turn whose checkpoint it is; each layout has a file that reads it
into ``saved.Saved``, the states of the optimizers as they were saved: ``torch_file`` (the Trainer, accelerate,
Lightning, people), ``rank_files`` and ``distributed`` (FSDP, torchtitan), ``deepspeed`` and ``universal``. ``pickles``
alone loads pickles, and runs none; ``checksums`` verifies what they point to.

From there on all go the same way. ``opening`` turns it into a Fisher: ``state`` finds the optimizers' slots,
``moments`` the second moment in each and ``values`` the form it is kept in; ``naming`` finds the parameter of each
slot, or ``partition`` that of several optimizers', with the help of ``skeleton``, the model without its weights, or of
``lora``; ``models`` knows the names of a live one; ``flat`` cuts what needs their shapes, ``buffers`` what a trainer
has cut. ``store`` makes of them the tensors of ``model.safetensors``, ``weights`` holds these against the headers
there, ``updates`` against the way the weights moved, ``metadata`` writes down what is known. ``sharding`` is for
tensors that several processes hold in parts, here and elsewhere.
"""
