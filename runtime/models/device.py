"""What a device needs that computes while the host goes on."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Wait for the device: a launched kernel is not a finished one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
