"""The dtypes of safetensors: one table, for the reader and the writer."""

from __future__ import annotations

import torch

from squisher_mergekit.errors import UnsupportedStateError

# F4 is left out: torch packs two of its entries into one, so the tensor would not have the shape in the header.
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
}
if hasattr(torch, "float8_e8m0fnu"):  # since torch 2.7
    DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
FLOAT8 = frozenset(dtype for dtype in DTYPES.values() if dtype.is_floating_point and dtype.itemsize == 1)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype in a safetensors header.

    Raises:
        UnsupportedStateError: safetensors has no such dtype.

    Example:
        >>> dtype_name(torch.bfloat16)
        'BF16'
    """
    if dtype not in _NAMES:
        raise UnsupportedStateError(
            f"a tensor in a safetensors file must have one of the dtypes {', '.join(DTYPES)}, found {dtype}; convert it"
        )
    return _NAMES[dtype]


def dtype_refusal(name: str, tensor: str, location: object) -> str:
    """Return the message that refuses a stored dtype.

    Args:
        name: Name of the dtype in the header.
        tensor: Name of the tensor.
        location: File of the tensor.
    """
    return (
        f"{tensor} in {location} must have a dtype that one torch tensor can hold, found {name}; save the weights as "
        "float32, float16 or bfloat16"
    )
