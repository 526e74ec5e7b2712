"""The HTTP/1.1 client of the gateway: requests to engines, on the parser and the event loop of its server.

It speaks what engines and Modal's proxy do: bodies of a length, in chunks, or up to the end of the connection;
connections that are kept; TLS for `https`. It follows no redirect, decodes no content, and sends nothing twice: who
calls knows whether that is safe.
"""
