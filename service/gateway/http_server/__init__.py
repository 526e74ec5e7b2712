"""The HTTP/1.1 server under the gateway on this machine: httptools and uvloop, one ASGI application.

Why it is our own: `make bench-http-servers`, 2 cores, Python 3.11, uvloop 0.23, httptools 0.9, uvicorn 0.54, h11 0.16,
Granian 2.8.9, the same gateway in front of the same stub, medians of 7 interleaved rounds. The 11 cases are an offer of
HTTP/2 on a POST, a 413 that is read while the client writes, one `Date`, an idle connection, a head and a body that
stall, trailers, a length of 5,000 digits, a head of 200 KiB, two hosts, and silent connections.

                                    own   uvicorn on httptools   uvicorn on h11   Granian
    cases that hold                  11                      5                8         6
    answers/s, 64 clients          3740                   3712             2866      3807
    processor time of an answer  260 us                 272 us           350 us    304 us
    first byte, one client      0.29 ms                0.32 ms          0.42 ms   0.47 ms
    streamed chunks/s, 64 clients 59996                  61309            58429     58300

uvicorn has no deadline of a head and no bound on it or on silent connections, and on httptools it takes trailers for
headers: nearly all of its protocol class would be overridden. Granian parses in Rust, in threads of its own, and takes
more processor time for an answer; a body that is refused while it is written ends in a reset.
"""
