"""k-MTR: learning to read the heart straight from undersampled MRI k-space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmtr.encoder import load_encoder

__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    """`kmtr.load_encoder` without importing torch for those who only want `kmtr.types`."""
    if name == "load_encoder":
        from kmtr.encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module 'kmtr' has no attribute {name!r}")
