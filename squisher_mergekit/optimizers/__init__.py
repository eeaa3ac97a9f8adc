"""From a training run's optimizer state to a Fisher with names.

``load`` opens what it is given; ``state`` finds the optimizer's slots in a file, ``moments`` the second moment in each,
``naming`` the parameter of each, with the help of ``skeleton``, the model without its weights. ``pickles`` is the only
module that loads a pickle, and runs none.
"""
