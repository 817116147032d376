"""What libraries deprecate does not reach users through us, with any version of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import PARITY

from spiffy.runtime import load_model
from spiffy.runtime.models.base import KeyValues


@pytest.mark.parametrize("category", [UserWarning, FutureWarning, DeprecationWarning])
def test_a_warning_at_a_line_of_ours_is_an_error_in_this_suite(category: type[Warning]) -> None:
    with pytest.raises(category, match="stale"):
        warnings.warn_explicit("stale", category, "base.py", 1, module="spiffy.runtime.models.base")
    with pytest.warns(category, match="stale"):
        warnings.warn_explicit("stale", category, "base.py", 1, module="spiffyish.base")


@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a", "sdar-a"])
def test_forwards_use_no_deprecated_argument(checkpoint: str) -> None:
    """The cache's name differs between versions of transformers; under the wrong one it is lost."""
    model = load_model(str(PARITY / checkpoint), device="cpu")
    ids, positions = torch.arange(6)[None], torch.arange(6)[None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, kept = model.hidden_states(ids[:, :4], positions[:, :4], keep=True)
        assert isinstance(kept, KeyValues)
        assert kept.length == 4
        behind, _ = model.hidden_states(ids[:, 4:], positions[:, 4:], frozen=kept.layers)
        alone, _ = model.hidden_states(ids[:, 4:], positions[:, 4:])
    assert not torch.equal(behind, alone)
