"""A tiny web server on 0.0.0.0: `/health`, `/echo`, `/slow` (a stream) and `/silent` (no byte yet)."""

import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Handler(BaseHTTPRequestHandler):
    """Answers by path; writes to stderr when a client has left a stream."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer `/health`, `/slow?n=…&s=…` and `/silent?s=…`."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/slow":
            self._stream(int(query["n"]), float(query["s"]))
        else:
            time.sleep(float(query.get("s", "0")))
            self._reply(200, b'{"status":"ok"}')

    def do_POST(self) -> None:
        """Echo the body."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self._reply(201, body)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Sample", "1")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, count: int, pause_s: float) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number in range(count):
                data = f"{number}\n".encode()
                self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                self.wfile.flush()
                time.sleep(pause_s)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            sys.stderr.write("client left\n")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Log nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the container's program ends
