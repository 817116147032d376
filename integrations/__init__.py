"""Drafts inside tools that people use already; each module needs its extra, when it is used."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spiffy.integrations.transformers import custom_generate

__all__ = ["custom_generate"]


def __getattr__(name: str) -> Any:
    """Import torch and transformers when what needs them is asked for."""
    if name == "custom_generate":
        from spiffy.integrations.transformers import custom_generate

        return custom_generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
