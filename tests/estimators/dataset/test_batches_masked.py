"""Batches of masked language models."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from tests.estimators.dataset.makers import assert_batch, batch_maker, same_batches

TEXTS = [{"text": "the cat sat on the mat " * 3}, {"text": "a dog ran far"}, {"text": "far " * 16}]


def _make_elsewhere(maker, number):
    torch.manual_seed(number)
    return {key: value.tolist() for key, value in maker(TEXTS, number).items()}


def test_masks_depend_on_seed_and_number_alone():
    """Masks do not depend on earlier batches or on torch's generator, which stays unchanged."""
    maker = batch_maker("masked-lm")
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = maker(TEXTS, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    maker(TEXTS, 0)
    assert same_batches(maker(TEXTS, 3), first)
    assert same_batches(batch_maker("masked-lm")(TEXTS, 3), first)
    others = [maker(TEXTS, 4), batch_maker("masked-lm", seed=8)(TEXTS, 3), batch_maker("masked-lm", seed=3)(TEXTS, 7)]
    for i, batch in enumerate(others):
        assert not any(torch.equal(batch["labels"], other["labels"]) for other in [first, *others[:i]])


def test_masks_are_the_same_in_another_process():
    """A process without shared state makes the same masks."""
    maker = batch_maker("masked-lm")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_make_elsewhere, maker, 3).result()
    assert_batch(maker(TEXTS, 3), **found)


def test_masks_are_those_of_training():
    """15 % of the ordinary tokens have labels. 80 % of these are hidden, and 10 % are random."""
    whole = batch_maker("causal-lm")(TEXTS * 40, 0)
    batch = batch_maker("masked-lm", batch_size=120)(TEXTS * 40, 0)
    ordinary = whole["input_ids"] > 4
    chosen = batch["labels"] != -100
    assert torch.equal(batch["attention_mask"], whole["attention_mask"])
    assert not (chosen & ~ordinary).any()
    assert torch.equal(batch["labels"][chosen], whole["input_ids"][chosen])
    assert torch.equal(batch["input_ids"][~chosen], whole["input_ids"][~chosen])
    # Five standard deviations of a share p of n draws: 5 (p (1 - p) / n)^1/2.
    draws, count = int(ordinary.sum()), int(chosen.sum())
    assert abs(count / draws - 0.15) < 5 * (0.15 * 0.85 / draws) ** 0.5
    hidden = (batch["input_ids"] == 4)[chosen].float().mean()
    kept = (batch["input_ids"] == whole["input_ids"])[chosen].float().mean()
    # A random token is [MASK] or the original token once in 14 draws.
    for found, share in ((hidden, 0.8 + 0.1 / 14), (kept, 0.1 + 0.1 / 14)):
        assert abs(float(found) - share) < 5 * (share * (1 - share) / count) ** 0.5
