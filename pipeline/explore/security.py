"""Who may ask, and what the answers allow: hosts, the token, and the headers of every answer."""

import hmac
import ipaddress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    # Nothing from elsewhere, nothing inline: what a caption or a class is called cannot run.
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>SAIL explore</title>
<h1>{}</h1>
<p>{}</p>
"""


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    host: str
    """Address that is listened at."""
    token: str | None = None
    """What everyone must know who asks; None on loopback, where only this machine can ask."""

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the address."""
        return is_loopback(self.host)


class Guard:
    """Answers for the app where a request may not pass, and adds `HEADERS` to every answer.

    A page elsewhere that a browser shows must not read what is served here. Its own requests are
    told by `Sec-Fetch-Site`; one whose name was made to point to this machine (DNS rebinding), by
    the name in `Host`.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("cache-control", "no-cache")
            await send(message)

        answer = self._refusal(scope, Headers(scope=scope)) or self._app
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        """Return the answer to a request that may not pass, None where it may."""
        if not self._is_known_host(headers.get("host", "")):
            return _refuse(scope, 421, "The page is not served under this name.")
        if _is_from_elsewhere(scope, headers):
            return _refuse(scope, 403, "Another page may not ask.")
        return self._entry(scope, headers)

    def _entry(self, scope: Scope, headers: Headers) -> Response | None:
        """Return None to those who know the token, and let in who has it in the address."""
        token = self._access.token
        cookie = f"sail-token-{scope['server'][1]}"  # of the port: browsers send it to all of them
        if token is None or _equal(_token_of(headers, cookie), token):
            return None
        given = parse_qs(scope["query_string"].decode("ascii", "replace")).get("token", [""])[0]
        if scope["path"] == "/" and _equal(given, token):
            return _enter(token, cookie)
        return _refuse(scope, 401, "The token is missing or wrong.")

    def _is_known_host(self, value: str) -> bool:
        host = value.rpartition(":")[0] if not value.endswith("]") and ":" in value else value
        host = host.strip("[]").lower()
        if host in LOOPBACK or host == self._access.host.lower():
            return True
        # Beyond loopback the token guards: a name that was made to point here has no cookie of it.
        return not self._access.is_loopback and self._access.token is not None


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_from_elsewhere(scope: Scope, headers: Headers) -> bool:
    """Return whether a browser asks on behalf of another page, but for a link to the first page."""
    is_link = scope["path"] == "/" and headers.get("sec-fetch-mode") == "navigate"
    site = headers.get("sec-fetch-site", "none")
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return True
    return site not in ("none", "same-origin") and not is_link


def _token_of(headers: Headers, cookie: str) -> str:
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return ""
    return cookies[cookie].value if cookie in cookies else ""


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _enter(token: str, cookie: str) -> Response:
    """Remember the token in a cookie, and lead to the page without it in the address."""
    answer = RedirectResponse("/", status_code=303)
    answer.set_cookie(cookie, token, httponly=True, samesite="strict", path="/")
    return answer


def _refuse(scope: Scope, status: int, words: str) -> Response:
    """Say so as the page's scripts read it, or for who opened the page, as a page."""
    remedy = "Open the address that `sail explore` printed."
    if scope["path"] != "/":
        return JSONResponse({"error": f"{words} {remedy}"}, status_code=status)
    return HTMLResponse(PAGE.format(words, remedy.replace("`", "")), status_code=status)
