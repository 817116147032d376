"""What torch's attention is given on a GPU: its kernels, and masks that none of them copies."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from device_cases import outcome, tasks_of
from helpers import parity_model
from torch.backends import cuda

from spiffy.runtime import DiffusionLM
from spiffy.runtime.models import attention, base, flex
from spiffy.runtime.models.device import without_cudnn
from spiffy.runtime.models.mask import Mask
from spiffy.runtime.models.slots import KeyValues

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def allowed() -> Iterator[None]:
    """All kernels, as torch has it, before and after."""
    assert cuda.cudnn_sdp_enabled()
    yield
    for enable in (
        cuda.enable_cudnn_sdp,
        cuda.enable_flash_sdp,
        cuda.enable_mem_efficient_sdp,
        cuda.enable_math_sdp,
    ):
        enable(True)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> DiffusionLM:
    """One that is taken to be on CUDA."""
    monkeypatch.setattr(base, "without_cudnn", lambda _: without_cudnn(CUDA))
    return parity_model("llada-a")


def test_a_forward_on_cuda_attends_without_cudnn(
    model: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, found = attention.scaled_dot_product_attention, []

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        found.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()))
        return usual(*args, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    model.forward_logits(torch.tensor([[1, 2, 3]]))
    assert set(found) == {(False, True)}
    assert cuda.cudnn_sdp_enabled()


def test_cudnn_is_back_after_a_forward_that_fails(
    model: DiffusionLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> torch.Tensor:
        assert not cuda.cudnn_sdp_enabled()
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(attention, "scaled_dot_product_attention", fails)
    with pytest.raises(torch.OutOfMemoryError):
        model.forward_logits(torch.tensor([[1, 2, 3]]))
    assert cuda.cudnn_sdp_enabled()


def test_cudnn_stays_out_until_the_last_thread_is_done() -> None:
    both, first_done, seen = Barrier(2, timeout=10), Barrier(2, timeout=10), []

    def first() -> None:
        with without_cudnn(CUDA):
            both.wait()
        first_done.wait()

    def last() -> None:
        with without_cudnn(CUDA):
            both.wait()
            first_done.wait()
            seen.append(cuda.cudnn_sdp_enabled())

    threads = [Thread(target=work) for work in (first, last)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert seen == [False]
    assert cuda.cudnn_sdp_enabled()


def test_elsewhere_the_setting_is_left_alone() -> None:
    with without_cudnn(torch.device("cpu")):
        assert cuda.cudnn_sdp_enabled()


def test_what_the_caller_forbids_or_needs_stays_so() -> None:
    cuda.enable_cudnn_sdp(False)
    with without_cudnn(CUDA):
        assert not cuda.cudnn_sdp_enabled()
    assert not cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(True)
    cuda.enable_flash_sdp(False)
    cuda.enable_mem_efficient_sdp(False)
    cuda.enable_math_sdp(False)
    with without_cudnn(CUDA):
        assert cuda.cudnn_sdp_enabled()  # or there would be no attention at all


def test_flexattention_is_compared_with_what_forwards_use(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def against(*_: Any) -> str:
        seen.append(cuda.cudnn_sdp_enabled())
        return "nothing"

    monkeypatch.setattr(flex, "_against", against)
    flex.better_masked(flex.Shape(2, 1, 8, 1), torch.float32, CUDA)
    assert seen == [False]
    assert cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (4, 7), (12, 8), (16, 33), (64, 203)])
def test_rows_of_a_mask_begin_at_multiples_of_eight(
    queries: int, keys: int, dtype: torch.dtype
) -> None:
    """And attention gives what it gives with a mask that lies elsewhere, bit by bit."""
    draw = torch.Generator().manual_seed(queries)
    mask = torch.rand(queries, keys, generator=draw) < 0.3
    mask[:, 0] = True
    ours = Mask.of(mask).added(dtype)
    usual = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    assert torch.equal(ours, usual)
    query, key, value = (
        torch.randn(1, 2, n, 16, generator=draw).to(dtype) for n in (queries, keys, keys)
    )
    found, expected = (
        attention.scaled_dot_product_attention(query, key, value, hidden[None, None])
        for hidden in (ours, usual)
    )
    assert torch.equal(found, expected)
    assert is_aligned(ours[None, None])


def is_aligned(mask: torch.Tensor) -> bool:
    """Whether torch's memory-efficient attention takes it as it lies."""
    return mask.stride(-1) == 1 and all(stride % 8 == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize(
    ("name", "cache"), [("sdar-a", "block"), ("llada-a", "dual"), ("dream-a", "prefix")]
)
def test_no_mask_of_a_decode_is_copied(
    name: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads share keys in two of them, and prompts are of many lengths."""
    usual, masks = attention.scaled_dot_product_attention, []

    def watched(query: Any, key: Any, value: Any, mask: Any = None, **options: Any) -> torch.Tensor:
        if mask is not None:
            masks.append(mask)
        return usual(query, key, value, mask, **options)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    lm = parity_model(name)
    outcome(lm, tasks_of(lm, 3, "graph", cache=cache))
    assert len({mask.shape[-1] % 8 for mask in masks}) > 1
    assert all(map(is_aligned, masks))


def test_runs_are_put_into_their_slots_at_once_as_one_by_one() -> None:
    slots = (range(2, 4), range(9, 12), range(5, 6))
    at = torch.tensor([slot for run in slots for slot in run])
    fresh = [torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    found = []
    for index in (None, at):
        kv = KeyValues(8)
        kv.reserve(12)
        everything = [torch.zeros(1, 2, 12, 4)] * 2
        kv.put(0, everything, (range(12),), 12)
        found.append(kv.put(0, fresh, slots, 12, index))
    for part, one_by_one, at_once in zip(fresh, *found, strict=True):
        assert torch.equal(one_by_one, at_once)
        assert torch.equal(at_once[:, :, at], part)
