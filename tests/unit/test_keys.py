"""Keys: their forms in the environment, and errors that never show one."""

from __future__ import annotations

import hashlib

import pytest

from service.errors import UsageError
from service.keys import digests

HEX = hashlib.sha256(b"opensesame").hexdigest()


def test_keys_with_none_set_are_none() -> None:
    """Unset and empty variables mean that no key is required."""
    assert digests({}) == digests({"API_KEY": "", "API_KEYS": " , "}) == {}


def test_keys_with_one_key_are_its_digest() -> None:
    """One key has the name `default`; spaces around it are removed."""
    assert digests({"API_KEY": " opensesame "}) == {HEX: "default"}


@pytest.mark.parametrize(
    "text", ["alice=opensesame,bob=b", " alice = opensesame , bob = b ", "alice=opensesame,,bob=b,"]
)
def test_keys_with_pairs_are_named(text: str) -> None:
    """Spaces and a trailing comma change nothing."""
    assert digests({"API_KEYS": text}) == {HEX: "alice", hashlib.sha256(b"b").hexdigest(): "bob"}


def test_keys_with_an_equals_sign_in_a_key_keep_it() -> None:
    """Base64 ends in equals signs."""
    assert digests({"API_KEYS": "alice=a=b=="}) == {hashlib.sha256(b"a=b==").hexdigest(): "alice"}


@pytest.mark.parametrize("variable", ["API_KEY", "API_KEYS"])
def test_keys_that_are_no_text_are_refused_without_showing_them(variable: str) -> None:
    """Python has surrogates in place of the bytes."""
    with pytest.raises(UsageError, match=rf"^{variable} is not UTF-8\.") as caught:
        digests({variable: "alice=t0psecret\udcfc"})

    assert "t0psecret" not in str(caught.value)


@pytest.mark.parametrize("written", [f"sha256:{HEX}", f"sha256:{HEX.upper()}"])
def test_keys_given_as_a_digest_are_taken_as_they_are(written: str) -> None:
    """The deployer need not know the key itself."""
    assert digests({"API_KEY": written}) == digests({"API_KEYS": f"default={written}"}) == {HEX: "default"}


@pytest.mark.parametrize(
    "written", ["sha256:", "sha256:abc", f"sha256:{HEX[:-1]}", f"sha256:{HEX}0", f"sha256:{HEX[:-1]}g"]
)
def test_keys_given_as_a_broken_digest_are_refused(written: str) -> None:
    """An incomplete digest must not be accepted as a key in clear text."""
    for environ in ({"API_KEY": written}, {"API_KEYS": f"alice={written}"}):
        with pytest.raises(UsageError, match="64"):
            digests(environ)


def test_keys_named_as_requests_without_a_key_are_refused() -> None:
    """Such a key would be taken for a service without keys, where everybody may do everything."""
    with pytest.raises(UsageError, match=r"API_KEYS: 'anonymous' cannot be the name of a key.*Expected another name"):
        digests({"API_KEYS": "alice=a,anonymous=t0psecret"})


def test_keys_in_both_variables_are_all_accepted() -> None:
    """The one key and the named ones side by side."""
    assert list(digests({"API_KEY": "a", "API_KEYS": "bob=b"}).values()) == ["default", "bob"]


@pytest.mark.parametrize("text", ["t0psecret", "alice=", "=t0psecret", "alice=a,t0psecret", "alice=a,=t0psecret"])
def test_keys_pair_without_name_or_key_is_refused_without_showing_it(text: str) -> None:
    """The error gives the pair's position: its text may be a key."""
    with pytest.raises(UsageError) as caught:
        digests({"API_KEYS": text})

    assert f"pair {text.count(',') + 1} is not name=key" in str(caught.value)
    assert "t0psecret" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("environ", [{"API_KEYS": "alice=old,alice=new"}, {"API_KEYS": "alice=new,bob=b,alice=old"}])
def test_keys_with_one_name_twice_are_both_valid(environ: dict[str, str]) -> None:
    """While keys are rotated the old and the new one are valid side by side."""
    owners = digests(environ)

    assert {owners[hashlib.sha256(key).hexdigest()] for key in (b"old", b"new")} == {"alice"}


@pytest.mark.parametrize(
    "environ", [{"API_KEYS": "alice=t0psecret,bob=t0psecret"}, {"API_KEY": "t0psecret", "API_KEYS": "bob=t0psecret"}]
)
def test_keys_of_two_names_that_are_the_same_are_refused_without_showing_it(environ: dict[str, str]) -> None:
    """Requests of the two could not be told apart."""
    with pytest.raises(UsageError, match="the same key") as caught:
        digests(environ)

    assert "t0psecret" not in str(caught.value)
