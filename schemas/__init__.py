"""What is written to disk and read back: pydantic models and nothing else."""

from spiffy.schemas.decoding import (
    CacheName,
    DecodingSettings,
    PolicyName,
    ScheduleName,
    ScoreName,
)
from spiffy.schemas.errors import SpiffyError
from spiffy.schemas.graph import (
    CalibrationRecord,
    CostPoint,
    CostProfile,
    DraftGraph,
    ModelRecord,
    Node,
    Objective,
)

__all__ = [
    "CacheName",
    "CalibrationRecord",
    "CostPoint",
    "CostProfile",
    "DecodingSettings",
    "DraftGraph",
    "ModelRecord",
    "Node",
    "Objective",
    "PolicyName",
    "ScheduleName",
    "ScoreName",
    "SpiffyError",
]
