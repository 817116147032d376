"""Decoding with this repository's draft graph: fewer forwards of the model, the same tokens.

Written by `spiffy-graph push`. transformers runs it for
`model.generate(**inputs, custom_generate="<this repository>", trust_remote_code=True)`. It also
puts it in the place of `model.generate` when it loads the model with `trust_remote_code=True`: then
calls that do not ask for drafts get the model's own `generate`, as if this file were not there.
"""

import inspect
from typing import Any

from transformers import GenerationMixin

GRAPH = "OWNER/NAME"  # where draft_graph.json is

# What `GenerationMixin.generate` hands to a file like this, given or not, where it was named there:
# all its arguments.
HANDED = {*inspect.signature(GenerationMixin.generate).parameters}
HANDED -= {"self", "custom_generate", "kwargs"}
# Arguments of ours that ask for drafts, where the model's own `generate` has none of that name.
OURS = {"graph", "budget", "selection", "decoding", "any_model"}


def generate(*args: Any, model: Any, **options: Any) -> Any:
    """Decode with drafts where the call asks for them, else as the model does by itself."""
    own, named = type(model).generate, options.get("custom_generate")
    if named is not None:  # transformers finds it, and calls this again where it is this file
        here = isinstance(named, str) and named in (GRAPH, model.name_or_path)
        return (GenerationMixin.generate if here else own)(model, *args, **options)
    asking = OURS - inspect.signature(own).parameters.keys()
    if not (options.keys() >= HANDED or asking & options.keys()):
        return own(model, *args, **options)
    # In a try block, which transformers does not search for packages to ask for beforehand: who
    # wants no drafts needs none.
    try:
        from spiffy.integrations.transformers import generate_with
    except ImportError as error:
        message = "this repository's drafts need spiffy: pip install spiffy-dllm"
        raise ImportError(message) from error
    return generate_with(GRAPH, model, *args, **options)
