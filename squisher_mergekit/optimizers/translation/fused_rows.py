"""Order of the rows of fused queries, keys and values, told by the weights where the names leave it open.

Shapes are equal in all orders. GPT-NeoX changed the order of a Llama with grouped queries within the time of one set of
names, and nanotron had no setting for the order of rotary rows in its first versions.
"""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from squisher_mergekit.errors import NamingError
from squisher_mergekit.models.weights import Weights
from squisher_mergekit.optimizers.checkpoints.raw_state import RawState
from squisher_mergekit.optimizers.translation.families import NANOTRON, NANOTRON_PAIRS
from squisher_mergekit.optimizers.translation.moves import Dimensions
from squisher_mergekit.optimizers.translation.pipelines import NEOX, NEOX_BY_RANK
from squisher_mergekit.optimizers.translation.schemes import Family
from squisher_mergekit.tensors.lazy import MaybeLazy, read

_SINCE_SEPTEMBER = ".mlp.linear1."
_NEAR, _FAR = 0.2, 0.5  # distances of weights after further training, and of rows in another order, to their norm


def by_rows(raw: RawState, family: Family, kind: str, sizes: Dimensions, weights: Weights) -> Family:
    """Return the family with the order of rows that the weights have; a family with one order as it is.

    Args:
        raw: The state, with its own weights of the fused tensors.
        family: The family by the names and the trainer's config.
        kind: ``model_type`` of the config.
        sizes: Sizes of the model.
        weights: Weights of the Hugging Face model, perhaps none.

    Raises:
        NamingError: The order is not certain without the weights, or by them.
    """
    if family in (NANOTRON, NANOTRON_PAIRS) and raw.fused:
        return _nearest(raw, (NANOTRON, NANOTRON_PAIRS), kind, sizes, weights) or family
    names = [str(name) for state in raw.states for name in state["state"]]
    is_old = not any(_SINCE_SEPTEMBER in name for name in names)
    if family is not NEOX or kind not in NEOX_BY_RANK.schemes or sizes.groups == sizes.heads or is_old:
        return family
    nearest = _nearest(raw, (NEOX, NEOX_BY_RANK), kind, sizes, weights)
    if nearest is not None:
        return nearest
    raise NamingError(
        f"the rows of queries, keys and values in {raw.location} are in the order of one query head after another, or, "
        f"since November 2024, of one rank after another, which the weights tell, but {weights.folder} has none that "
        "fit one order; give the converted weights as --model DIR"
    )


def _nearest(
    raw: RawState, families: tuple[Family, ...], kind: str, sizes: Dimensions, weights: Weights
) -> Family | None:
    """Return the family whose order the weights have; None if they are other weights, or fit several orders."""
    found = [_distance(raw.fused, one, kind, sizes, weights) for one in families]
    near = [one for one, distance in zip(families, found, strict=True) if distance < _NEAR]
    return near[0] if len(near) == 1 and max(found) > _FAR else None


def _distance(fused: Mapping[str, MaybeLazy], family: Family, kind: str, sizes: Dimensions, weights: Weights) -> float:
    """Return the distance of the first fused weights from those of the model, relative to their norm."""
    for own, master in fused.items():
        try:
            pairs = list(_pairs(own, master, family, kind, sizes, weights))
        except (RuntimeError, ValueError):  # the shape is another model's
            return float("inf")
        if pairs:
            square = sum(float((mine - theirs).square().sum()) for mine, theirs in pairs)
            norm = sum(float(theirs.square().sum()) for _, theirs in pairs)
            return (square / norm) ** 0.5 if norm else float("inf")
    return float("inf")


def _pairs(
    own: str, master: MaybeLazy, family: Family, kind: str, sizes: Dimensions, weights: Weights
) -> Iterator[tuple[Tensor, Tensor]]:
    for pattern, replacement in family.rewrites:
        own = re.sub(pattern, replacement, own)
    matched, scheme = family.block.fullmatch(own), family.schemes[kind]
    if matched is None:
        return
    tensor, block = read(master), scheme.block.format(int(matched[1]) - family.first)
    for target in scheme.inside[matched[2].removesuffix(".weight")]:
        name = f"{block}{target.module}.weight"
        if name in weights.infos:
            moved = tensor
            for make in target.moves:
                moved = make(sizes, tensor.shape[0])(moved)
            theirs = weights.read(name)
            if moved.shape != theirs.shape:
                raise ValueError(name)
            yield moved.float(), theirs.float()
