"""Merges of a generative model with a structure: four text tasks as prompts, and the loss on general text.

The model is SmolLM2-135M-Instruct, dequantised from four bits; its last ten of thirty layers are fine-tuned on each task
and merged, all else is frozen, so that the hidden states below are computed once. A text of a task stands in a prompt
that ends with a question, and the answer is one word for each class: the class with the most likely first token of its
word counts. Training maximises the likelihood of that token among all tokens.

Decided before a reported seed was looked at:

* Tasks tweets, bbc, newsgroups, spam; 320 training texts each, 40 steps of 8, prompts of at most 48 tokens, AdamW with a
  learning rate of 1e-4, gradients clipped at 1. 60 validation texts and 200 test texts a task. There is no head, so all
  models share their outputs.
* Rows and searches are those of ``structure``, chosen by the mean accuracy on the validation texts alone.
* Language-model loss (nats a token) on 100 sentences of newspaper editorials, which belong to no task, for each row and
  for the model before its fine-tuning, so that forgetting shows. Nothing is chosen by it.
* Seeds 31, 32 and 33. A seed draws texts and order; there is no dropout.
"""
