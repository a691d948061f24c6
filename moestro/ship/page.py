"""The web page of a store: packages, releases, lineage, sizes, and what an update would transfer.

Static files without any foreign source; everything shown comes through the same REST interface and token that other
clients use, and is set as text, never as HTML.
"""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

MEDIA = {"page.html": "text/html; charset=utf-8", "page.css": "text/css", "page.js": "text/javascript"}
SAFETY = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def show(request: Request) -> Response:
    """One of the three files."""
    name = request.url.path.lstrip("/") or "page.html"
    content = (files("moestro.ship") / "web" / name).read_bytes()
    return Response(content, media_type=MEDIA[name], headers=SAFETY)


def routes() -> list[Route]:
    """`/` and what it needs."""
    return [Route(path, show, methods=["GET"]) for path in ("/", "/page.css", "/page.js")]
