"""Drafting: which future states are worth verifying.

`candidates` names what a drafter is told and what it is; `by_graph` drafts a static graph,
`by_model` what the acceptance model finds most probable at the root at hand: `outlook` lays out
what is known there, `features` and `acceptance` are the model, `expand` searches with it,
`compiled` does the same where numba is installed (`search`). `primitives` are the array functions
between a forward and drafts. `rejected` asks what the last forward's rejected drafts say. `best_of`
leaves every forward to the way that would have done best lately; `artifact` makes such a drafter of
a draft graph. Nothing here can change a token.
"""

from spiffy.runtime.draft.artifact import graph_drafter, lasting_drafter, way_of
from spiffy.runtime.draft.best_of import BestOfDrafter
from spiffy.runtime.draft.by_graph import GeometricMeanDrafter, GraphDrafter, confidence_chain
from spiffy.runtime.draft.by_model import AcceptanceDrafter, Vocabulary
from spiffy.runtime.draft.candidates import (
    Candidates,
    Chooser,
    Drafter,
    Selection,
    Walk,
    rank_candidates,
    search_of,
)
from spiffy.runtime.draft.search import fastest_search

__all__ = [
    "AcceptanceDrafter",
    "BestOfDrafter",
    "Candidates",
    "Chooser",
    "Drafter",
    "GeometricMeanDrafter",
    "GraphDrafter",
    "Selection",
    "Vocabulary",
    "Walk",
    "confidence_chain",
    "fastest_search",
    "graph_drafter",
    "lasting_drafter",
    "rank_candidates",
    "search_of",
    "way_of",
]
