"""What is written to disk and read back: pydantic models and nothing else."""

from spiffy.schemas.decoding import (
    CacheName,
    DecodingSettings,
    PolicyName,
    ScheduleName,
    ScoreName,
)
from spiffy.schemas.errors import SpiffyError
from spiffy.schemas.graph import DraftGraph
from spiffy.schemas.records import (
    AcceptanceModel,
    Budget,
    CalibrationRecord,
    CostPoint,
    CostProfile,
    ExpectedSteps,
    ModelRecord,
    Node,
    Objective,
    Provenance,
)

__all__ = [
    "AcceptanceModel",
    "Budget",
    "CacheName",
    "CalibrationRecord",
    "CostPoint",
    "CostProfile",
    "DecodingSettings",
    "DraftGraph",
    "ExpectedSteps",
    "ModelRecord",
    "Node",
    "Objective",
    "PolicyName",
    "Provenance",
    "ScheduleName",
    "ScoreName",
    "SpiffyError",
]
