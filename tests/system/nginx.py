"""nginx in front of a gateway, as an operator puts it there: a configuration, a process, its error log."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Self

import psutil

from tests.engine.running import free_port, port_is_free, wait_until

from . import programs

_STARTS_S = 10


class Nginx:
    """nginx as a reverse proxy on a free port of the loopback.

    Args:
        directory: Where its configuration, logs and temporary files go.
        upstream: Port of the gateway.
        proxy: Further directives of the location that forwards, such as `proxy_read_timeout 2s;`.
        upstreams: Further directives of the upstream, such as `keepalive 8;`.
    """

    def __init__(self, directory: Path, upstream: int, *, proxy: str = "", upstreams: str = "") -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._program = programs.find("nginx")
        self._directory, self._config = directory, directory / "nginx.conf"
        places = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"    {place}_temp_path {directory}/{place};\n" for place in places)
        user = "user root;" if os.getuid() == 0 else ""  # else a worker may not write into the test's directory
        self._config.write_text(f"""daemon off; {user}
pid {directory}/nginx.pid;
error_log {directory}/error.log info;
worker_processes 1;
events {{ worker_connections 256; }}
http {{
    access_log off;
{temporary}    upstream gateway {{ server 127.0.0.1:{upstream}; {upstreams} }}
    server {{
        listen 127.0.0.1:{self.port};
        location / {{
            proxy_pass http://gateway;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            {proxy}
        }}
    }}
}}
""")

    def __enter__(self) -> Self:
        """Start it and wait until it listens."""
        command = [self._program, "-p", str(self._directory), "-c", str(self._config), "-e", "stderr"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: not port_is_free(self.port) or self._process.poll() is not None, _STARTS_S)
            assert self._process.poll() is None, f"nginx ended with {self._process.returncode}: {self.errors}"
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it and its worker."""
        family = [psutil.Process(self._process.pid), *psutil.Process(self._process.pid).children()]
        self._process.terminate()
        _, alive = psutil.wait_procs(family, timeout=5)
        for process in alive:
            process.kill()
        self._process.wait()

    @property
    def errors(self) -> str:
        """Its error log."""
        log = self._directory / "error.log"
        return log.read_text() if log.exists() else ""
