"""FlexAttention computes what torch's usual attention computes, and is used where it is faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from device_cases import outcome, tasks_of
from helpers import PARITY
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.functional import scaled_dot_product_attention

from spiffy.runtime import load_model
from spiffy.runtime.models import flex
from spiffy.runtime.models.base import Compiled
from spiffy.runtime.models.flex import Flex, Shape, better_masked
from spiffy.runtime.models.mask import Mask

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SHAPE = Shape(heads=4, shared=2, width=16, layers=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (32, 45), (129, 300)])
def test_it_gives_what_torchs_usual_attention_gives(
    queries: int, keys: int, dtype: torch.dtype
) -> None:
    """Whatever the mask; every position attends to something."""
    draw = torch.Generator().manual_seed(queries)
    mask = torch.rand(queries, keys, generator=draw) < 0.2
    mask[torch.arange(queries), torch.arange(queries)] = True
    query, key, value = (
        torch.randn(1, 2, n, 16, generator=draw, dtype=dtype) for n in (queries, keys, keys)
    )
    ours = Flex()
    found = ours(query, key, value, ours.prepared(Mask.of(mask)), 0.3)
    torch.testing.assert_close(
        found, scaled_dot_product_attention(query, key, value, mask, scale=0.3)
    )


@pytest.mark.parametrize("name", ["sdar-a", "llada-a"])
@pytest.mark.parametrize("way", ["graph", "model"])
def test_decoding_with_it_gives_the_same_tokens(name: str, way: str) -> None:
    """Heads share keys and values in one of them."""
    model = load_model(str(PARITY / name), device="cpu", dtype="float64")
    asked = []

    class Counted(Flex):
        def __call__(self, *inputs: Any) -> Tensor:
            asked.append(len(inputs))
            return super().__call__(*inputs)

    other = model.replaced(compiled=Compiled(model.module.model, Counted()))  # type: ignore[arg-type]
    options: dict[str, Any] = {"gen_length": 8, "block_length": 4}
    if name == "llada-a":
        options["cache"] = "dual"
    for sequences in (1, 2):
        found = outcome(other, tasks_of(other, sequences, way, **options))
        assert found.values == outcome(model, tasks_of(model, sequences, way, **options)).values
    assert asked


def right(
    query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float
) -> Tensor:
    shape = (query.shape[2], key.shape[2])
    mask = create_mask(block_mask.mask_mod, None, None, *shape, device=CPU)
    return scaled_dot_product_attention(query, key, value, mask, scale=scale)


def wrong(*inputs: Tensor, **options: Any) -> Tensor:
    return right(*inputs, **options) + 1e-3


def unable(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("no such\nkernel")


def anew(*inputs: Tensor, **options: Any) -> Tensor:
    counters["stats"]["unique_graphs"] += 1
    return right(*inputs, **options)


@pytest.mark.parametrize(
    ("attend", "seconds", "said"),
    [
        (right, 0.001, "is FlexAttention's: as exact as torch's usual one, and faster"),
        (right, 0.003, "not used: it takes 3.00 ms, the usual one 2.00 ms"),
        (wrong, 0.001, "not used: it is off by 0.001"),
        (unable, 0.001, "not used: RuntimeError: no such kernel"),
        (anew, 0.001, "not used: it is compiled for every shape anew"),
    ],
)
def test_it_is_used_where_it_is_as_exact_and_faster(
    attend: Callable[..., Tensor],
    seconds: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def timed(forward: object, way: object, layers: int) -> float:
        return seconds if isinstance(way, Flex) else 0.002

    monkeypatch.setattr(flex, "_compiled", lambda: attend)
    monkeypatch.setattr(flex._Forward, "seconds", timed)
    found = better_masked(SHAPE, torch.float32, CPU)
    assert (found is not None) == ("not used" not in said)
    assert said in caplog.text
