"""k-MTR: learning to read the heart straight from undersampled MRI k-space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kmtr.encoder import load_encoder
    from kmtr.inference import load_model

__all__ = ["load_encoder", "load_model"]


def __getattr__(name: str) -> Any:
    """`load_encoder` and `load_model` without importing torch for those who only want `kmtr.types`."""
    if name == "load_encoder":
        from kmtr.encoder import load_encoder

        return load_encoder
    if name == "load_model":
        from kmtr.inference import load_model

        return load_model
    raise AttributeError(f"module 'kmtr' has no attribute {name!r}")
