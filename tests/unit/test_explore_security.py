"""Who may ask the page for what, and what its answers allow."""

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from features.errors import ConfigError
from pipeline.explore.app import Access, Guard, is_loopback
from pipeline.explore.server import access_for, address

TOKEN = "a-word-of-24-characters-"


def client(access: Access, name: str = "127.0.0.1:8642") -> TestClient:
    """Ask a guarded app under a name."""
    routes = [Route(path, lambda _: PlainTextResponse("inside")) for path in ("/", "/api/run")]
    app = Starlette(routes=routes, middleware=[Middleware(Guard, access=access)])
    return TestClient(app, base_url=f"http://{name}", follow_redirects=False)


@pytest.mark.parametrize("name", ["127.0.0.1:8642", "localhost:1", "[::1]:8642", "LOCALHOST"])
def test_the_names_of_this_machine_are_served(name: str) -> None:
    assert client(Access("127.0.0.1"), name).get("/api/run").text == "inside"


@pytest.mark.parametrize(
    "name",
    [
        *("evil.example", "127.0.0.1.evil.example:8642", "localhost.evil.example", "10.0.0.7"),
        *("]127.0.0.1[", "127.0.0.1:8642, evil.example", "[127.0.0.1", "127.0.0.1:x"),
    ],
)
def test_another_name_that_leads_here_is_refused(name: str) -> None:
    answer = client(Access("127.0.0.1")).get("/api/run", headers={"host": name})
    assert answer.status_code == 421
    assert "under this name" in answer.json()["error"]


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "file://127.0.0.1:8642"},
    ],
    ids=str,
)
def test_another_page_may_not_ask(headers: dict[str, str]) -> None:
    for ask in (client(Access("127.0.0.1")).get, client(Access("127.0.0.1")).post):
        assert ask("/api/run", headers=headers).status_code == 403


def test_a_link_from_elsewhere_may_lead_to_the_page_itself() -> None:
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    inside = client(Access("127.0.0.1"))
    assert inside.get("/", headers=link).text == "inside"
    assert inside.get("/api/run", headers=link).status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer " + "é" * 24},
        {"cookie": "sail-token-8642=wrong"},
        {"cookie": "sail-token-8642"},
        {"cookie": f"sail-token-1={TOKEN}"},
        {"cookie": ";;=[]"},
    ],
    ids=str,
)
def test_without_the_token_nothing_is_served(headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    for path in (
        "/",
        "/api/run",
        f"/api/run?token={TOKEN}",
        "/?token=wrong",
        "/?token=",
        "/?x=%ff",
    ):
        answer = client(Access("0.0.0.0", TOKEN), "box.lan:8642").get(path, headers=raw)
        assert answer.status_code == 401, path
        assert "inside" not in answer.text


def test_the_token_opens_by_header_and_by_a_cookie_that_no_script_reads() -> None:
    visitor = client(Access("0.0.0.0", TOKEN), "box.lan:8642")
    bearer = {"authorization": f"Bearer {TOKEN}"}
    assert visitor.get("/api/run", headers=bearer).text == "inside"
    answer = visitor.get("/", params={"token": TOKEN})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert visitor.get("/api/run").text == "inside"


def test_every_answer_forbids_what_is_inline_or_from_elsewhere() -> None:
    for answer in (
        client(Access("127.0.0.1")).get("/api/run"),
        client(Access("127.0.0.1"), "evil.example").get("/"),
        client(Access("0.0.0.0", TOKEN)).get("/"),
    ):
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["referrer-policy"] == "no-referrer"


def test_beyond_this_machine_a_token_is_made_where_none_is_given() -> None:
    made = access_for("0.0.0.0", None)
    assert made.token is not None
    assert len(made.token) >= 32
    assert access_for("0.0.0.0", None).token != made.token
    assert access_for("127.0.0.1", None).token is None
    assert access_for("127.0.0.1", TOKEN).token == TOKEN
    assert address(access_for("::1", TOKEN), 80) == f"http://[::1]:80/?token={TOKEN}"
    with pytest.raises(ConfigError, match=r"has 5 characters\. At least 16 .* expected"):
        access_for("0.0.0.0", "short")


def test_only_addresses_of_this_machine_count_as_loopback() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        assert is_loopback(host)
    for host in ("0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.example", "box"):
        assert not is_loopback(host)
