"""Oracle: the Fisher in float64, with one backward pass per example and label."""

import copy

import torch


def fisher(model, batches, loss, kinds):
    """Return a mapping from names to sums over examples and labels of weight times squared gradient.

    ``loss`` maps model and example to a list of (weight, loss), one per label. ``kinds`` is ``example`` or ``batch``.
    """
    model = copy.deepcopy(model).double().eval()
    if getattr(getattr(model, "config", None), "_experts_implementation", "eager") != "eager":
        model.set_experts_implementation("eager")  # the other models do not support float64
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    for batch in batches:
        whole = {name: torch.zeros_like(p) for name, p in named.items()}
        for example in split(batch):
            for weight, value in loss(model, example):
                found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
                for name, gradient in zip(named, found, strict=True):
                    if gradient is not None and kinds == "example":
                        total[name] += weight * gradient.square()
                    elif gradient is not None:
                        whole[name] += gradient
        if kinds == "batch":
            for name in total:
                total[name] += whole[name].square()
    return total


def split(batch):
    """Return the examples as batches of size one, with floats in float64."""
    if isinstance(batch, dict):
        size = len(next(iter(batch.values())))
        return [{key: _wide(value[n : n + 1]) for key, value in batch.items()} for n in range(size)]
    return [(_wide(batch[0][n : n + 1]), _wide(batch[1][n : n + 1])) for n in range(len(batch[1]))]


def _wide(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def classes(kind):
    """Return a loss function of a classifier: the true label, the most likely one, or all weighted by probability."""

    def loss(model, example):
        if isinstance(example, dict):
            label = example["labels"]
            logits = model(**{key: value for key, value in example.items() if key != "labels"}).logits[0]
        else:
            label, logits = example[1], model(example[0])[0]
        likelihood = logits.log_softmax(-1)
        if kind == "exact":
            return [(float(likelihood[c].detach().exp()), -likelihood[c]) for c in range(len(likelihood))]
        chosen = int(logits.argmax()) if kind == "predicted" else int(label)
        return [(1.0, -likelihood[chosen])]

    return loss


def tokens(task, kind):
    """Return a loss function of a language model: the sum over tokens with a label."""

    def loss(model, example):
        labels = example["labels"][0]
        inputs = {key: value for key, value in example.items() if key != "labels"}
        if task == "seq2seq" and "decoder_input_ids" not in inputs:
            inputs["decoder_input_ids"] = shifted(model, example["labels"])
        logits = model(**inputs).logits[0]
        if task == "causal-lm":
            logits, labels = logits[:-1], labels[1:]
            if "attention_mask" in example:
                labels = labels.masked_fill(example["attention_mask"][0, 1:] == 0, -100)
        chosen = logits.argmax(-1) if kind == "predicted" else labels.clamp_min(0)
        picked = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
        return [(1.0, -(picked * (labels >= 0)).sum())]

    return loss


def shifted(model, labels):
    """Return the decoder's inputs for these labels."""
    make = getattr(model, "prepare_decoder_input_ids_from_labels", None) or model._shift_right
    return make(labels)
