"""A fake model hub on loopback for huggingface_hub's real client: lists, files, a CDN, and scripted faults.

    hub = Hub(repositories={"org/model": Repository(commit, {"config.json": b"{}"}, large=("*.safetensors",))})
    with serving(hub):
        ...                                 # HF_ENDPOINT=hub.url
    assert hub.unknown == []

Routes: information on a repository, trees page by page, `paths-info`, and files by HEAD and GET with ETag, commit and
Range. Large files are redirected to a second port, the CDN, to which the client must not send the hub's token. A
`Fault` says what goes wrong, where and how often. A request that the fake does not know is refused and kept in
`unknown`.

It does not speak Xet: the client then downloads large files over plain HTTP.
"""

from __future__ import annotations

from .content import Content, Fault, Hub, Repository
from .server import serving

__all__ = ["Content", "Fault", "Hub", "Repository", "serving"]
