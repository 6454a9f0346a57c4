"""Partners that misbehave: one that accepts and never answers, one that drips, one that is slow.

python -m benchmarks.partners hanging|dripping|slow PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import sys

KINDS = ("hanging", "dripping", "slow")
SLOW_S = 1.0
DRIP_S = 0.2  # between two bytes: below any timeout that counts per read
_SUPPORTS = b'{"status":"healthy","supports":["batch","features","predict","canary"]}'


async def _serve(kind: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            path = head.split(b" ", 2)[1]
            lines = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
            body = await reader.readexactly(int(lines[0].split(b":")[1])) if lines else b""
            if kind == "hanging":
                await asyncio.sleep(3600)
            if kind == "slow":
                await asyncio.sleep(SLOW_S)
            answer = _SUPPORTS
            if path.startswith(b"/events"):
                answer = b'{"accepted":%d,"duplicates":0,"rejected":[]}' % body.count(b'"event_type":')
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
                len(answer),
                answer,
            )
            step = 1 if kind == "dripping" else len(answer)
            for at in range(0, len(answer), step):
                writer.write(answer[at : at + step])
                await writer.drain()
                if kind == "dripping":
                    await asyncio.sleep(DRIP_S)
    writer.close()


async def main(kind: str, port: int) -> None:
    server = await asyncio.start_server(lambda r, w: _serve(kind, r, w), "127.0.0.1", port, limit=8 << 20)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
