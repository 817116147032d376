"""Decoding with this repository's draft graph: fewer forwards of the model, the same tokens.

Written by `spiffy-graph push`. transformers runs it for
`model.generate(**inputs, custom_generate="<this repository>", trust_remote_code=True)`.
"""

from typing import Any

# In a try block, so that transformers, which looks for imports before it reads requirements.txt,
# does not ask for a package by the module's name.
try:
    from spiffy.integrations.transformers import generate_with
except ImportError as error:
    raise ImportError("this repository's decoding needs spiffy: pip install spiffy-dllm") from error

GRAPH = "OWNER/NAME"  # where draft_graph.json is


def generate(model: Any, **options: Any) -> Any:
    """Decode as transformers' `generate` is asked to, with drafts."""
    return generate_with(GRAPH, model, **options)
