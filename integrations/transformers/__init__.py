"""`module.generate(**inputs, custom_generate=spiffy.integrations.custom_generate, graph=graph)`.

transformers prepares inputs and generation config as for any decoding, then calls
`custom_generate` in place of its own loop. What a denoising decode cannot do is refused, never
ignored.
"""

from spiffy.integrations.transformers.call import custom_generate, generate_with
from spiffy.integrations.transformers.rows import DraftedOutput

__all__ = ["DraftedOutput", "custom_generate", "generate_with"]
