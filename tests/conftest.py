"""Settings of the whole suite."""

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs the hub
# The models are tiny: a second thread costs more than it gives, above all on a busy machine.
torch.set_num_threads(1)

settings.register_profile("spiffy", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("spiffy")
