"""The pages: files of `page/` put together into one answer each, whose headers let the browser load nothing else.

They are read when the server starts: no request reads a file.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from .route import Response

__all__ = ["API_PAGE", "TRY_PAGE", "page"]

_FOLDER = Path(__file__).parent / "page"
_LINKED = re.compile(r'<link rel="stylesheet" href="(?P<style>[a-z.]+)">|<script src="(?P<script>[a-z.]+)"></script>')
_INLINE = re.compile(r"<(?P<tag>script|style)>(?P<text>.*?)</(?P=tag)>", re.DOTALL)


def page(name: str) -> Response:
    """A file of `page/` with the styles and scripts that it links in it, as an answer.

    Scripts and styles are allowed by their hashes: whatever else might get into the page does not run.
    """
    html = _LINKED.sub(_inlined, (_FOLDER / name).read_text(encoding="utf-8"))
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for found in _INLINE.finditer(html):
        digest = base64.b64encode(hashlib.sha256(found["text"].encode()).digest()).decode()
        hashes[found["tag"]].append(f"'sha256-{digest}'")
    policy = (
        f"default-src 'none'; script-src {' '.join(hashes['script'])}; style-src {' '.join(hashes['style'])}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "x-frame-options": "DENY",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cross-origin-resource-policy": "same-origin",
        "permissions-policy": "camera=(), geolocation=(), microphone=()",
        "cache-control": "no-cache",
    }
    return Response(html.encode(), tuple((key.encode(), value.encode()) for key, value in headers.items()))


def _inlined(link: re.Match[str]) -> str:
    tag = "style" if link["style"] else "script"
    return f"<{tag}>\n{(_FOLDER / (link['style'] or link['script'])).read_text(encoding='utf-8')}</{tag}>"


API_PAGE = page("docs.html")
TRY_PAGE = page("try.html")
