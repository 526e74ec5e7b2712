"""A tiny web server on 0.0.0.0: `/health`, `/echo`, `/slow` (a stream), `/silent` (no byte yet), `/websocket`."""

import base64
import hashlib
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, section 1.3


class Handler(BaseHTTPRequestHandler):
    """Answers by path; says on stdout when a client has left a stream."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer `/health`, `/slow?n=…&s=…` and `/silent?s=…`."""
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/slow":
            self._stream(int(query["n"]), float(query["s"]))
        elif parts.path == "/websocket":
            self._websocket()
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

    def _websocket(self) -> None:
        """Send the first message back, which is less than 126 bytes, and close with 4002."""
        key = self.headers["Sec-WebSocket-Key"].encode() + WEBSOCKET_GUID
        self.send_response(101)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", base64.b64encode(hashlib.sha1(key).digest()).decode())  # noqa: S324
        self.end_headers()
        size = self.rfile.read(2)[1] & 0x7F
        mask, masked = self.rfile.read(4), self.rfile.read(size)
        text = bytes(byte ^ mask[i % 4] for i, byte in enumerate(masked))
        self.wfile.write(bytes([0x81, size]) + text + bytes([0x88, 2]) + (4002).to_bytes(2, "big"))

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it
        """Say nothing."""


if __name__ == "__main__":
    server = ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
    sys.stdout.write("listening\n")
    sys.stdout.flush()
    server.serve_forever()
