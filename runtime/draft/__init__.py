"""Drafting: which future states are worth verifying.

`candidates` names what a drafter is told and what it is; `by_graph` drafts a static graph,
`by_model` what the acceptance model finds most probable at the root at hand: `outlook` lays out
what is known there, `features` and `acceptance` are the model, `expand` searches with it.
`rejected` asks what the last forward's rejected drafts say. `artifact` picks one of the two for a
draft graph. Nothing here can change a token.
"""

from spiffy.runtime.draft.artifact import graph_drafter
from spiffy.runtime.draft.by_graph import GeometricMeanDrafter, GraphDrafter
from spiffy.runtime.draft.by_model import AcceptanceDrafter, Vocabulary
from spiffy.runtime.draft.candidates import Candidates, Drafter, Selection, rank_candidates

__all__ = [
    "AcceptanceDrafter",
    "Candidates",
    "Drafter",
    "GeometricMeanDrafter",
    "GraphDrafter",
    "Selection",
    "Vocabulary",
    "graph_drafter",
    "rank_candidates",
]
