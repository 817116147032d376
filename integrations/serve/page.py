"""The page at `/`: one file, and what a browser may do with it."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page() -> tuple[str, dict[str, str]]:
    """The page and its headers: it loads nothing, runs its own script, and asks its own server."""
    text = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    own = {name: b64encode(sha256(body.encode()).digest()) for name, body in _INLINE.findall(text)}
    policy = {
        "default-src": "'none'",
        **{f"{name}-src": f"'sha256-{digest.decode()}'" for name, digest in own.items()},
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return text, headers
