"""Files on web servers, by ranges. A redirect into the network of this machine is refused.

A server of strangers could otherwise have us read what only this machine can reach. The client that
reads S3 and Google Cloud follows every redirect, so this one is urllib3, which asks.
"""

import functools
import ipaddress
import logging
import socket
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import urllib3
from urllib3.exceptions import HTTPError, MaxRetryError, ResponseError

logging.getLogger("urllib3").setLevel(logging.ERROR)  # what is tried again is no news
MAX_REDIRECTS = 5
RETRIED = (429, 500, 502, 503, 504)
CONNECTIONS = 64
PORTS = {"http": 80, "https": 443}
TIMEOUT = urllib3.Timeout(connect=10, read=60)


class WebError(Exception):
    """A web server refuses, fails, or leads elsewhere."""


class NoRangesError(WebError):
    """A server sends whole files only."""


def asked(
    method: str, url: str, headers: dict[str, str], *, retries: int, backoff: float
) -> urllib3.BaseHTTPResponse:
    """Return the whole answer of a server, after the redirects that may be followed.

    Args:
        method: HEAD or GET.
        url: With escapes.
        headers: Such as Range.
        retries: How often to try again where the server is not there, or too busy.
        backoff: Seconds before the first of these, doubled each time.

    Raises:
        FileNotFoundError: There is no such file.
        WebError: Every try failed, the server refuses, or it leads to an internal address.
    """
    tries = urllib3.Retry(
        retries,
        redirect=False,
        status_forcelist=RETRIED,
        backoff_factor=backoff,
        backoff_max=15,
        raise_on_status=False,
    )
    for _ in range(MAX_REDIRECTS):
        try:
            answer = _pool(url).request(
                method, url, headers=headers, retries=tries, redirect=False, timeout=TIMEOUT
            )
        except HTTPError as error:
            raise WebError(_reason(error, retries)) from error
        target = answer.get_redirect_location()
        if not target:
            return _checked(answer, url, retries)
        url = _followed(url, urljoin(url, str(target)))
    raise WebError(f"it leads from one address to the next more than {MAX_REDIRECTS} times")


def _checked(answer: urllib3.BaseHTTPResponse, url: str, retries: int) -> urllib3.BaseHTTPResponse:
    if answer.status in (404, 410):
        raise FileNotFoundError(url)
    if answer.status >= 400 and answer.status != 416:
        tried = f" (after {retries} retries)" if answer.status in RETRIED else ""
        raise WebError(f"{answer.status} {answer.reason}{tried}")
    return answer


def _followed(url: str, target: str) -> str:
    """Return where a redirect leads, if it may.

    Raises:
        WebError: It leads to another server with an address that is internal, or from https to
            http.
    """
    here, there = urlsplit(url), urlsplit(target)
    if there.scheme not in PORTS or (here.scheme, there.scheme) == ("https", "http"):
        raise WebError(
            f"it leads to {there.scheme}://, which is not followed from {here.scheme}://"
        )
    if _server(here) != _server(there) and not all(map(_is_public, _addresses(there))):
        raise WebError(
            f"it leads to {there.hostname}, an internal address, which is not followed from "
            f"another server"
        )
    return target


def _server(url: SplitResult) -> tuple[str | None, int]:
    return url.hostname, url.port or PORTS[url.scheme]


def _addresses(url: SplitResult) -> Iterator[str]:
    try:
        found = socket.getaddrinfo(*_server(url), type=socket.SOCK_STREAM)
    except OSError as error:
        raise WebError(f"it leads to {url.hostname}, which has no address") from error
    yield from (str(address[0]) for *_, address in found)


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None)
    return bool((mapped or found).is_global)


def _reason(error: Exception, retries: int) -> str:
    """Return what went wrong, without the address, which may be that of a proxy."""
    cause = error.reason if isinstance(error, MaxRetryError) else error
    if isinstance(cause, ResponseError):
        return f"{cause} (after {retries} retries)"
    return f"error sending request: {type(cause).__name__} (after {retries} retries)"


def _pool(url: str) -> urllib3.PoolManager:
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(str(parts.hostname)):
        return _proxied(proxy)
    return _direct()


@functools.cache
def _direct() -> urllib3.PoolManager:
    return urllib3.PoolManager(maxsize=CONNECTIONS, block=False)


@functools.cache
def _proxied(proxy: str) -> urllib3.PoolManager:
    options: Any = {"maxsize": CONNECTIONS, "block": False}
    return urllib3.ProxyManager(proxy, **options)


def address_of(scheme: str, path: str) -> str:
    """Return the address of a place: what no address can have becomes escapes, those there stay."""
    return f"{scheme}://{quote(path, safe='/%:@!$&()*+,;=~[]')}"
