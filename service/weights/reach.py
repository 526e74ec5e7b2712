"""Whether a hub answers, and why it does not: no network, or a proxy or certificates that are set up wrongly."""

from __future__ import annotations

import os
import ssl
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

TIMEOUT_S = 3.0
CHECK_CONNECTION = "Check the connection; HF_ENDPOINT names another hub. The model 'tiny' needs none."
_PROXY_SCHEMES = ("http", "https", "socks5", "socks5h")


@dataclass(frozen=True)
class Unreachable:
    """Why a hub does not answer.

    Attributes:
        reason: What follows "it is not in reach: ".
        hint: What to do about it.
        is_offline: There is no way to the hub, or the user switched it off; else something is set up wrongly.
    """

    reason: str
    hint: str = CHECK_CONNECTION
    is_offline: bool = False


@dataclass(frozen=True)
class _Proxy:
    variable: str
    url: str

    def __str__(self) -> str:
        """Return variable and address, without the password that an address may hold."""
        return f"{self.variable}={self.scheme}://{urlsplit(self.url).netloc.rpartition('@')[2]}"

    @property
    def scheme(self) -> str:
        return urlsplit(self.url).scheme


def why_unreachable(url: str) -> Unreachable | None:
    """Ask a hub for its first page; return why it did not answer within a few seconds, or None. Any answer counts."""
    import httpx2  # noqa: PLC0415 - 60 ms that only this question costs

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}:  # as huggingface_hub reads it
        return Unreachable("HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE. The model 'tiny' needs no hub.", True)
    for proxy in _proxies():
        if proxy.scheme not in _PROXY_SCHEMES:
            kinds = ", ".join(_PROXY_SCHEMES)
            return Unreachable(
                f"{proxy} is no proxy that can be used", f"Correct {proxy.variable}, or unset it: {kinds}."
            )
    used = _proxy_for(url)
    try:
        status = httpx2.head(url, timeout=TIMEOUT_S).status_code
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol, ValueError):
        return Unreachable(
            "its address, or that of a proxy, is none such as http://host:port",
            "Correct HF_ENDPOINT or the proxy's variable.",
        )
    except httpx2.HTTPError as error:
        return _explained(error, used, isinstance(error, httpx2.ProxyError))
    if used and status == httpx2.codes.PROXY_AUTHENTICATION_REQUIRED:
        return _refused(used, "407 Proxy Authentication Required")
    return None


def _explained(error: Exception, proxy: _Proxy | None, is_refusal: bool) -> Unreachable:
    said = str(error) or f"no answer within {TIMEOUT_S:.0f} s"
    tls = next((cause for cause in _causes(error) if isinstance(cause, ssl.SSLError)), None)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return Unreachable(
            f"its certificate is not trusted ({tls.verify_message})",
            "Set SSL_CERT_FILE to a file with the certificates of your network, or correct this machine's clock.",
        )
    if tls:
        way = f"the proxy {proxy}" if proxy else "a proxy on the way"
        return Unreachable(f"TLS fails ({said})", f"Look at {way}, or at the scheme of HF_ENDPOINT: http or https.")
    if proxy and is_refusal:
        return _refused(proxy, said)
    if proxy:
        return Unreachable(f"the proxy {proxy} does not answer ({said})", f"Correct {proxy.variable}, or unset it.")
    return Unreachable(said, is_offline=True)


def _refused(proxy: _Proxy, said: str) -> Unreachable:
    hint = f"Correct {proxy.variable}; user and password stand before the host: http://user:password@host:port."
    return Unreachable(f"the proxy {proxy} refuses ({said})", hint)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _proxies() -> Iterator[_Proxy]:
    """Yield the proxies of the environment as httpx2 reads them."""
    for scheme, url in urllib.request.getproxies().items():
        if scheme in {"http", "https", "all"}:
            names = (f"{scheme}_proxy", f"{scheme}_proxy".upper())
            variable = next((name for name in names if os.environ.get(name)), names[1])
            yield _Proxy(variable, url if "://" in url else f"http://{url}")


def _proxy_for(url: str) -> _Proxy | None:
    parts = urlsplit(url)
    if urllib.request.proxy_bypass(parts.hostname or ""):
        return None
    by_scheme = {proxy.variable.lower().partition("_")[0]: proxy for proxy in _proxies()}
    return by_scheme.get(parts.scheme) or by_scheme.get("all")
