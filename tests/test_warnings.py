"""What libraries deprecate does not reach users through us, with any version of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from helpers import PARITY

from spiffy.runtime import load_model
from spiffy.runtime.models.attention import Group
from spiffy.runtime.models.slots import KeyValues


@pytest.mark.parametrize("category", [UserWarning, FutureWarning, DeprecationWarning])
def test_a_warning_at_a_line_of_ours_is_an_error_in_this_suite(category: type[Warning]) -> None:
    with pytest.raises(category, match="stale"):
        warnings.warn_explicit("stale", category, "base.py", 1, module="spiffy.runtime.models.base")
    with pytest.warns(category, match="stale"):
        warnings.warn_explicit("stale", category, "base.py", 1, module="spiffyish.base")


@pytest.mark.parametrize("checkpoint", ["llada-a", "dream-a", "sdar-a"])
def test_forwards_use_nothing_deprecated(checkpoint: str) -> None:
    model = load_model(str(PARITY / checkpoint), device="cpu")
    ids = positions = torch.arange(6)
    kv = KeyValues(6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.hidden_states(ids[:4], positions[:4], [Group(1, 4, None, kv, (range(4),), 4)])
        behind = Group(1, 2, None, kv, (range(4, 6),), 6)
        late = model.hidden_states(ids[4:], positions[4:], [behind])
        alone = model.hidden_states(ids[4:], positions[4:], [Group(1, 2)])
    assert not torch.equal(late, alone)
