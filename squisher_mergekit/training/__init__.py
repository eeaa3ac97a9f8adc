"""Write a Squisher while training: what the optimizer knows then, no file has to be asked for later.

With the Hugging Face Trainer, one argument::

    from squisher_mergekit.training import SquisherCallback
    Trainer(model, args, train_dataset=data, callbacks=[SquisherCallback()]).train()

In a loop of torch or accelerate, two lines, in all processes, after the weights were saved::

    from squisher_mergekit.training import save_squisher
    save_squisher(model, optimizer, "runs/math", examples_per_step=64, max_grad_norm=1.0)

A moving average of the squared gradient that no reset of the optimizer and no penalty touches::

    from squisher_mergekit.training import GradientSquares
    squares = GradientSquares(model, beta=0.999)
    loss.backward()
    squares.update()  # before a penalty's backward pass, before optimizer.step()
    squares.save("runs/math/fisher_ema", weights="runs/math")

Some weights alone, the others held to the bit (a FISH mask; a pruned network that is trained again)::

    from squisher_mergekit.training import MaskedTraining
    with MaskedTraining(model, optimizer, "runs/math/mask.safetensors"):
        ...  # any loop; for the Trainer: MaskCallback("runs/math/mask.safetensors")

``live`` turns a live optimizer into a Fisher, ``writing`` puts it where an older one may lie. ``average`` keeps an
average of the per-example Fisher. ``masked`` trains some weights and holds the others; ``ewc`` keeps a model near what
earlier tasks taught it.
"""

from squisher_mergekit.training.average import FisherAverage
from squisher_mergekit.training.callback import SquisherCallback
from squisher_mergekit.training.ewc import EWCCallback
from squisher_mergekit.training.gradients import GradientSquares
from squisher_mergekit.training.masked import MaskCallback, MaskedTraining
from squisher_mergekit.training.writing import save_squisher

__all__ = [
    "EWCCallback",
    "FisherAverage",
    "GradientSquares",
    "MaskCallback",
    "MaskedTraining",
    "SquisherCallback",
    "save_squisher",
]
