"""Which of its kernels torch's attention may use while a forward runs on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from helpers import parity_model
from torch.backends import cuda

from spiffy.runtime import DiffusionLM
from spiffy.runtime.models import attention, base, flex
from spiffy.runtime.models.device import without_cudnn

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
