"""Schemes of names: modules of a trainer, the Hugging Face modules that correspond to them, and the moves of rows."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from squisher_mergekit.optimizers.translation.moves import (
    Dimensions,
    Move,
    RowRange,
    halves_of_pairs,
    in_groups,
    of_blocks,
    transposed,
)

Prepare = Callable[[Dimensions, int], Move]  # from the sizes of a model and the rows of a tensor to a move


@dataclass(frozen=True)
class Target:
    """Module of a Hugging Face model that a trainer's module corresponds to.

    Attributes:
        module: Name of the module, below the block for a module of a block.
        moves: Moves from the trainer's tensor, in order.
        part: Move that takes the trainer's tensor out of the Hugging Face one, of which it has some rows; None if the
            trainer's tensor has all of them.
    """

    module: str
    moves: tuple[Prepare, ...] = ()
    part: Prepare | None = None


Table = Mapping[str, tuple[Target, ...]]


@dataclass(frozen=True)
class Scheme:
    """Translation of a family's names to those of one kind of model.

    Attributes:
        block: Name of a block of the Hugging Face model, with ``{}`` for its number.
        outside: Module outside of the blocks -> targets, in the trainer's order.
        inside: Module in a block -> targets, in the trainer's order.
        since: Name of a parameter -> its name in later versions of transformers.
    """

    block: str
    outside: Table
    inside: Table
    since: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """Trainer with names of its own.

    Attributes:
        name: Name of the trainer, for messages.
        mark: Pattern of names that no other trainer gives; None if only the layout tells the trainer.
        block: Pattern of the names in a block; its groups are the number of the block and the rest of the name.
        schemes: ``model_type`` of a Hugging Face config -> translation.
        first: Number of the first block.
        rewrites: Patterns in own names, and their replacement before the table is looked up.
    """

    name: str
    mark: re.Pattern[str] | None
    block: re.Pattern[str]
    schemes: Mapping[str, Scheme]
    first: int = 0
    rewrites: tuple[tuple[str, str], ...] = field(default=())


def to(module: str, *moves: Prepare) -> tuple[Target, ...]:
    """Return one target, with the moves to it."""
    return (Target(module, moves),)


def part_of(module: str, rows: Prepare) -> tuple[Target, ...]:
    """Return the target of a part of a fused tensor; the parts are in the table in the order of their rows."""
    return (Target(module, (), rows),)


def query_rows(sizes: Dimensions, _: int) -> Move:
    """Return the move that keeps the queries of fused rows."""
    return RowRange(0, sizes.heads * sizes.width)


def key_rows(sizes: Dimensions, _: int) -> Move:
    """Return the move that keeps the keys of fused rows."""
    begin = sizes.heads * sizes.width
    return RowRange(begin, begin + sizes.groups * sizes.width)


def value_rows(sizes: Dimensions, _: int) -> Move:
    """Return the move that keeps the values of fused rows."""
    begin = (sizes.heads + sizes.groups) * sizes.width
    return RowRange(begin, begin + sizes.groups * sizes.width)


def first_half(_: Dimensions, rows: int) -> Move:
    """Return the move that keeps the first half of the rows."""
    return RowRange(0, rows // 2)


def second_half(_: Dimensions, rows: int) -> Move:
    """Return the move that keeps the second half of the rows."""
    return RowRange(rows // 2, rows)


def vocabulary_rows(sizes: Dimensions, rows: int) -> Move:
    """Return the move that drops the rows by which the vocabulary was padded."""
    return RowRange(0, min(sizes.vocabulary, rows))


def pairs_of_queries(sizes: Dimensions, _: int) -> Move:
    """Return the move of the rotary rows of queries from pairs to halves."""
    return halves_of_pairs(sizes.heads, sizes.width)


def pairs_of_keys(sizes: Dimensions, _: int) -> Move:
    """Return the move of the rotary rows of keys from pairs to halves."""
    return halves_of_pairs(sizes.groups, sizes.width)


def turned(_: Dimensions, __: int) -> Move:
    """Return the move that transposes a matrix."""
    return transposed


def rows_of_groups(part: str) -> Prepare:
    """Return the function that makes the move of ``q``, ``k`` or ``v`` out of groups; each has one head of k and v."""
    return lambda sizes, _: of_blocks(sizes.groups, (sizes.heads // sizes.groups, 1, 1), "qkv".index(part))


def rows_of_heads(part: str) -> Prepare:
    """Return the function that makes the move of ``q``, ``k`` or ``v`` out of query heads with shares of k and v."""

    def prepare(sizes: Dimensions, _: int) -> Move:
        share = sizes.width * sizes.groups // sizes.heads
        return of_blocks(sizes.heads, (sizes.width, share, share), "qkv".index(part))

    return prepare


def rows_of_ranks(part: str) -> Prepare:
    """Return the function that makes the move of queries, keys or values out of the rows of each rank."""
    return lambda sizes, _: of_blocks(sizes.ranks, (sizes.heads // sizes.groups, 1, 1), "qkv".index(part))


def half_of_ranks(number: int) -> Prepare:
    """Return the function that makes the move of the first or the second half of the rows of each rank."""
    return lambda sizes, _: of_blocks(sizes.ranks, (1, 1), number)


def rows_in_groups(sizes: Dimensions, _: int) -> Move:
    """Return the move of queries, keys and values, fused one after another, into groups."""
    return in_groups(sizes)
