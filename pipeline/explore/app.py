"""What is served: the page, and what it asks for, as JSON."""

import hmac
import ipaddress
import logging
import re
import shlex
from dataclasses import asdict, dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evaluate.config import Score
from features.errors import SailError, refused
from features.images import ImageFault
from pipeline.explore.search import (
    MAX_UPLOAD_BYTES,
    Among,
    find,
    look,
    map_facts,
    open_map,
    row_facts,
    show,
    vector_of_image,
    vector_of_row,
    vector_of_words,
)
from pipeline.explore.session import SIDES, Pictures, Session
from pipeline.explore.views import (
    classes,
    failures,
    health,
    near_duplicates,
    quarantined,
    results,
    training_facts,
)
from pipeline.search import Ranking

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


HOST = re.compile(r"(?:(?P<name>[\w.-]+)|\[(?P<address>[\da-fA-F:.]+)\])(?::\d{1,5})?", re.ASCII)


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
        named = HOST.fullmatch(value)
        host = (named["name"] or named["address"]).lower() if named else ""
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
    host = headers.get("host")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
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


logger = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
MOST_WORDS = 2_000  # characters of a sentence to search by
router = APIRouter()


def _session(request: Request) -> Session:
    session: Session = request.app.state.session
    return session


InSession = Annotated[Session, Depends(_session)]
Top = Annotated[int, Query(ge=1, le=200)]
Row = Annotated[int, Query(ge=0)]


def create_app(session: Session, access: Access) -> FastAPI:
    """Return the server of a run.

    Args:
        session: The run.
        access: Who may ask.
    """
    app = FastAPI(title="sail explore", openapi_url=None, docs_url=None, redoc_url=None)
    app.state.session = session
    app.state.pictures = Pictures(session)
    app.include_router(router)
    app.mount("/static", StaticFiles(directory=STATIC), name="static")
    app.add_exception_handler(SailError, _said)
    app.add_exception_handler(OSError, _said_by_the_system)
    app.add_exception_handler(RequestValidationError, _misunderstood)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_middleware(Guard, access=access)
    return app


@router.get("/")
def page() -> FileResponse:
    """The page itself."""
    return FileResponse(STATIC / "index.html")


@router.get("/favicon.ico", include_in_schema=False)
def icon() -> FileResponse:
    """What browsers ask for by themselves."""
    return FileResponse(STATIC / "icon.svg")


@router.get("/api/run")
def run(session: InSession) -> dict[str, Any]:
    """What the page shows on every view: name, splits, how far the run is."""
    found = session.checkpoint()
    splits = {}
    for name in session.splits:
        store = session.store(name)
        splits[name] = {"rows": store.rows, "fields": list(store.fields)}
    return {
        "name": session.config.run.name,
        "run_file": shlex.quote(str(session.run_file)),
        "is_evaluated": session.results.is_file(),
        "splits": splits,
        "head": None
        if found is None
        else {
            "step": found.step,
            "image": found.image["name"],
            "text": found.text["name"],
            "dim": found.head.dim,
        },
    }


@router.get("/api/search")
def search(
    session: InSession,
    split: str,
    text: Annotated[str, Query(min_length=1, max_length=MOST_WORDS)],
    among: Among = "images",
    top: Top = 24,
    score: Score | None = None,
) -> dict[str, Any]:
    """Search by words."""
    session.store(split)
    by = Ranking("text", score)
    return find(session, split, vector_of_words(session, text), among, top, by)


@router.get("/api/similar")
def similar(
    session: InSession,
    split: str,
    row: Row,
    among: Among = "images",
    top: Top = 24,
    score: Score | None = None,
) -> dict[str, Any]:
    """Search by the image of a row."""
    by = Ranking("image", score)
    return find(session, split, vector_of_row(session, split, row), among, top, by)


async def _body(request: Request) -> bytes:
    """Read an image that is sent, up to `MAX_UPLOAD_BYTES`."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_UPLOAD_BYTES:
            raise HTTPException(
                413, f"The image is larger than {MAX_UPLOAD_BYTES >> 20} MiB. Send a smaller one."
            )
    return bytes(data)


@router.post("/api/search")
def search_by_image(
    session: InSession,
    data: Annotated[bytes, Depends(_body)],
    split: str,
    among: Among = "images",
    top: Top = 24,
    score: Score | None = None,
) -> dict[str, Any]:
    """Search by an image, which is the body of the request."""
    session.store(split)
    by = Ranking("image", score)
    return find(session, split, vector_of_image(session, data), among, top, by)


@router.get("/api/rows")
def rows(session: InSession, split: str, count: Top = 24) -> dict[str, Any]:
    """Some rows, to begin with."""
    return {"rows": [asdict(row) for row in look(session, split, count)]}


@router.get("/api/shown")
def shown(session: InSession, split: str, row: Row) -> dict[str, Any]:
    """The words of a row."""
    return asdict(show(session, session.checked(split, row), [row])[0])


@router.get("/api/map")
def map_of(session: InSession, split: str) -> dict[str, Any]:
    """What is said beside the map."""
    return map_facts(session, split)


@router.get("/api/map/points")
def points(session: InSession, split: str) -> Response:
    """Where the points of the map are, as binary arrays."""
    labels = session.labels(session.store(split))
    content = open_map(session, split).as_bytes(labels)
    return Response(content, media_type="application/octet-stream")


@router.get("/api/results")
def all_results(session: InSession) -> dict[str, Any]:
    """The numbers of the evaluation."""
    return results(session)


@router.get("/api/results/classes")
def accuracy_of_classes(session: InSession, split: str) -> dict[str, Any]:
    """The accuracy of each class."""
    return classes(session, split)


@router.get("/api/results/failures")
def failed(
    session: InSession,
    name: str,
    start: Row = 0,
    label: str | None = None,
    taken: str | None = None,
) -> dict[str, Any]:
    """The rows that went wrong."""
    return failures(session, name, start, label, taken)


@router.get("/api/training")
def training(session: InSession, seen: Row = 0) -> dict[str, Any]:
    """The curves of the training."""
    return training_facts(session, seen)


@router.get("/api/store")
def store(session: InSession, split: str) -> dict[str, Any]:
    """How the store is."""
    return health(session, split)


@router.get("/api/store/quarantine")
def quarantine(session: InSession, split: str, column: str, start: Row = 0) -> dict[str, Any]:
    """The rows that are quarantined."""
    return quarantined(session, split, column, start)


@router.get("/api/store/duplicates")
def duplicates(session: InSession, split: str, column: str) -> dict[str, Any]:
    """The rows that are nearly the same."""
    return near_duplicates(session, split, column)


@router.get("/api/row")
def row(session: InSession, split: str, row: Row) -> dict[str, Any]:
    """Everything known of a row."""
    return row_facts(session, split, row)


@router.get("/image/{split}/{row}")
def image(request: Request, split: str, row: int, side: int = SIDES[1]) -> Response:
    """The picture of a row, made small."""
    if side not in SIDES:
        raise HTTPException(422, f"side is {side}. One of {list(SIDES)} was expected.")
    pictures: Pictures = request.app.state.pictures
    try:
        made = pictures.jpeg(split, row, side)
    except ImageFault as fault:
        raise HTTPException(404, f"The image cannot be shown: {fault.reason}.") from fault
    if made is None:
        raise HTTPException(404, "The row has no image.")
    return Response(
        made, media_type="image/jpeg", headers={"cache-control": "private, max-age=600"}
    )


def _said(_request: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": str(error)}, status_code=409)


def _said_by_the_system(_request: Request, error: Exception) -> JSONResponse:
    words = refused(error, "this program") if isinstance(error, OSError) else str(error)
    return JSONResponse({"error": words}, status_code=409)


def _misunderstood(_request: Request, error: Exception) -> JSONResponse:
    faults = error.errors() if isinstance(error, RequestValidationError) else []
    words = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in faults)
    return JSONResponse({"error": f"The request cannot be used: {words}."}, status_code=422)


def _refused(_request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, StarletteHTTPException):
        raise error
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
