"""The plane's dictionaries with the real client, and what a lease in one needs: each call is atomic."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import modal
import pytest

from .modal import ModalPlane
from .sample import command


def test_dict_methods_of_the_client_work_as_in_python(plane: ModalPlane) -> None:
    """Every method of the client's dictionary does what it does in Python."""
    shared = modal.Dict.from_name("d", create_if_missing=True, client=plane.client())
    assert shared.put("a", ("x", 1))
    shared["b"] = None
    shared.update({"c": 3})

    assert (shared["a"], shared.get("b", 1), shared.get("nothing", 2)) == (("x", 1), None, 2)
    assert sorted(shared.keys()) == ["a", "b", "c"]
    assert dict(shared.items()) == {"a": ("x", 1), "b": None, "c": 3}
    assert len(list(shared.values())) == shared.len() == 3
    assert "a" in shared
    assert shared.pop("a") == ("x", 1)
    assert "a" not in shared
    with pytest.raises(KeyError):
        shared.pop("a")
    assert shared.pop("a", None) is None
    shared.clear()
    assert shared.len() == 0


def test_dict_with_skip_if_exists_keeps_the_first_value(plane: ModalPlane) -> None:
    """`put` returns whether it stored the value."""
    shared = modal.Dict.from_name("d", create_if_missing=True, client=plane.client())

    assert shared.put("a", 1, skip_if_exists=True)
    assert not shared.put("a", 2, skip_if_exists=True)
    assert shared["a"] == 1


def test_dict_with_concurrent_puts_stores_one(plane: ModalPlane) -> None:
    """Of several clients that put a key at once, exactly one stores its value."""
    client = plane.client()
    handles = [modal.Dict.from_name("d", create_if_missing=True, client=client) for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        put = list(pool.map(lambda pair: pair[1].put("a", pair[0], skip_if_exists=True), enumerate(handles)))

    assert sum(put) == 1
    assert plane.dicts["d"]["a"] == put.index(True)


def test_dict_that_does_not_exist_is_not_found(plane: ModalPlane) -> None:
    """A look-up does not create a dictionary."""
    with pytest.raises(modal.exception.NotFoundError, match="Dict 'd' not found"):
        modal.Dict.from_name("d", client=plane.client()).get("a")
    assert list(plane.dicts) == []


def test_dict_of_a_test_is_seen_by_clients(plane: ModalPlane) -> None:
    """Clients see the entries that a test writes."""
    plane.dicts.put("d")["a"] = ("x", 1)

    assert modal.Dict.from_name("d", client=plane.client())["a"] == ("x", 1)
    assert plane.dicts["d"].keys() == ["a"]
    assert "a" in plane.dicts["d"]


def test_cli_lists_and_deletes_dicts(plane: ModalPlane) -> None:
    """The `modal dict` commands list, show and delete dictionaries."""
    plane.dicts.put("vllm-locks")["a"] = 1

    assert "vllm-locks" in command(plane, "dict", "list").stdout
    assert "'a'" in command(plane, "dict", "items", "vllm-locks", "--repr").stdout
    assert command(plane, "dict", "delete", "vllm-locks", "--yes").returncode == 0
    assert list(plane.dicts) == []
