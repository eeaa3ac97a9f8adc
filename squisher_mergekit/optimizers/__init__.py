"""From a training run's optimizer state to a Fisher with names.

``load`` finds what it is given, ``opening`` turns an optimizer's file into a Fisher: ``pickles`` alone loads pickles,
and runs none; ``state`` finds the optimizer's slots, ``moments`` the second moment in each, ``naming`` the parameter of
each, with the help of ``skeleton``, the model without its weights, or of ``lora``; ``store`` makes of them the tensors
of ``model.safetensors``, ``weights`` holds these against the headers there, ``metadata`` writes down what is known. A
trainer with a layout of its own needs a file that gives ``state.OptimizerState``; the rest is shared.
"""
