"""lm-evaluation-harness: a model class that decodes with drafts and counts what that took.

Importing this registers it as the harness's model "spiffy"; `spiffy-lm-eval` does so and hands over
to the harness.
"""

from spiffy.integrations.lm_eval.counts import Counts
from spiffy.integrations.lm_eval.launch import launched, run_harness
from spiffy.integrations.lm_eval.model import SpiffyLM

__all__ = ["Counts", "SpiffyLM", "launched", "run_harness"]
