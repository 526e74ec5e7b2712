"""Where a request may carry a key: the places that admit, and those where a key is only text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_service import http_contract

Header = tuple[str, str]


@dataclass(frozen=True)
class Attempt:
    """A request that tries to get in.

    Attributes:
        headers: Beside those that every request has.
        query: What is added to the path.
        fields: Of the body.
        trailers: After the body, which is chunked where there are any.
        target: What stands before the path in the first line, such as a host.
    """

    headers: tuple[Header, ...] = ()
    query: str = ""
    fields: Mapping[str, str] | None = None
    trailers: tuple[Header, ...] = ()
    target: str = ""

    def request(self, method: str, path: str, model: str) -> bytes:
        """Return its bytes; query and body name a model, so that whoever gets in would start it."""
        mark = "&" if "?" in path else "?"
        path = f"{self.target}{path}{mark}model={model}{self.query and '&'}{self.query}"
        body = json.dumps({"model": model, "messages": [], "prompt": "x", "input": "x", **(self.fields or {})}).encode()
        lines: list[Header] = [("Host", "localhost"), ("Content-Type", "application/json"), *self.headers]
        if self.trailers:
            lines += [("Transfer-Encoding", "chunked"), ("Trailer", ", ".join(name for name, _ in self.trailers))]
            body = b"%x\r\n%b\r\n0\r\n%b\r\n" % (len(body), body, _lines(self.trailers))
        else:
            lines += [("Content-Length", str(len(body)))]
        return b"%b %b HTTP/1.1\r\n%b\r\n%b" % (method.encode(), path.encode(), _lines(lines), body)


def _lines(headers: list[Header] | tuple[Header, ...]) -> bytes:
    return b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers)


def admitting(key: str) -> dict[str, Attempt]:
    """Return the ways to send a key that let in, by name."""
    stale = ("Authorization", "Bearer stale")
    return {
        "Bearer": Attempt((("Authorization", f"Bearer {key}"),)),
        "bearer": Attempt((("authorization", f"bearer {key}"),)),
        "BEARER": Attempt((("AUTHORIZATION", f"BEARER {key}"),)),
        "blanks": Attempt((("Authorization", f"Bearer   {key} "),)),
        "x-api-key": Attempt((("X-API-Key", key),)),
        "api-key": Attempt((("api-key", key),)),
        "x-api-key beside a stale Bearer": Attempt((stale, ("x-api-key", key))),
    }


def refused(key: str) -> dict[str, Attempt]:
    """Return attempts without a key, with a wrong one, and with a right one where it does not count, by name."""
    wrong = _wrong_values(key)
    found = {"none": Attempt()}
    found |= {f"{name} Bearer": Attempt((("Authorization", f"Bearer {value}"),)) for name, value in wrong.items()}
    found |= {f"{name} x-api-key": Attempt((("x-api-key", value),)) for name, value in wrong.items()}
    found |= {f"{name} api-key": Attempt((("api-key", value),)) for name, value in wrong.items()}
    found |= {name: Attempt((("Authorization", value),)) for name, value in _wrong_schemes(key).items()}
    return found | _other_headers(key) | _outside_of_headers(key) | _pretences()


def _wrong_values(key: str) -> dict[str, str]:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {
        "wrong": "wrong",
        "empty": "",
        "upper case": key.upper(),
        "lower case": key.lower(),
        "swapped case": key.swapcase(),
        "longer": f"{key}x",
        "shorter": key[:-1],
        "twice": key * 2,
        "list": f"{key},{key}",
        "list of two": f"wrong, {key}",
        "semicolon": f"{key}; a=b",
        "quoted": f'"{key}"',
        "escaped": "".join(f"%{byte:02x}" for byte in key.encode()),
        "digest": digest,
        "sha256:": f"sha256:{digest}",
        "name": "attacked",
        "name and key": f"attacked={key}",
        "name of the gateway": "gateway",
        "long": key + "x" * 8000,
        "beyond ASCII": f"{key}\xff",
        "star": "*",
        "null": "null",
    }  # fmt: skip


def _wrong_schemes(key: str) -> dict[str, str]:
    return {
        "Basic": f"Basic {key}",
        "Basic user": f"Basic {base64.b64encode(f'{key}:'.encode()).decode()}",
        "Basic both": f"Basic {base64.b64encode(f'x:{key}'.encode()).decode()}",
        "Digest": f'Digest username="{key}", response="{key}"',
        "Token": f"Token {key}",
        "Bearers": f"Bearers {key}",
        "bare": key,
        "no blank": f"Bearer{key}",
        "tab": f"Bearer\t{key}",
        "colon": f"Bearer: {key}",
        "two schemes": f"Bearer Bearer {key}",
        "key first": f"{key} Bearer",
        "Bearer second": f"Basic x, Bearer {key}",
    }


def _other_headers(key: str) -> dict[str, Attempt]:
    # X-Request-Id is none of them: it is logged, as its clients want, and keys are searched for in logs
    names = (
        *("X-Auth-Token", "Proxy-Authorization", "X-Authorization", "X-Forwarded-Authorization", "Authentication"),
        *("X_API_KEY", "x-api-key2", "apikey", "api_key", "openai-api-key", "X-Goog-Api-Key", "WWW-Authenticate"),
        *("X-Original-Authorization", "Modal-Key", "Modal-Secret", "Referer", "User-Agent", "From"),
        http_contract.CLIENT_HEADER.decode(),
    )
    found: dict[str, Attempt] = {}
    for name in names:
        found[f"header {name}"] = Attempt(((name, key), (f"{name}-2", f"Bearer {key}")))
        found[f"header {name} as Bearer"] = Attempt(((name, f"Bearer {key}"),))
    found["connection header"] = Attempt((("Connection", "x-api-key"), ("Keep-Alive", key)))
    return found


def _outside_of_headers(key: str) -> dict[str, Attempt]:
    fields = ("api_key", "api-key", "key", "token", "access_token", "x-api-key", "authorization", "Authorization")
    found = {f"query {name}": Attempt(query=f"{name}={key}") for name in fields}
    found |= {f"query {name} as Bearer": Attempt(query=f"{name}=Bearer%20{key}") for name in fields}
    found |= {f"cookie {name}": Attempt((("Cookie", f"{name}={key}; a=b"),)) for name in fields}
    found |= {f"body {name}": Attempt(fields={name: key}) for name in fields}
    found |= {f"trailer {name}": Attempt(trailers=((name, value),)) for name, value in (
        ("Authorization", f"Bearer {key}"), ("x-api-key", key), ("api-key", key),
    )}  # fmt: skip
    found["user of the URL"] = Attempt(target=f"http://{key}:{key}@localhost")
    return found


def _pretences() -> dict[str, Attempt]:
    """Return attempts that pretend to come from this machine, to go elsewhere, or to be another method."""
    addresses = ("127.0.0.1", "localhost", "::1")
    names = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Forwarded-Host", "X-Original-URL", "X-Rewrite-URL")
    found = {f"{name} {value}": Attempt(((name, value),)) for name in names for value in (*addresses, "/health")}
    found["method override"] = Attempt((("X-HTTP-Method-Override", "OPTIONS"), ("X-HTTP-Method", "HEAD")))
    return found
