"""A server with known delays: the first token `TTFT` after a request, the others `ITL` apart, by the clock.

    python mock_server.py TTFT_MS ITL_MS [CACHED]   prints its port

It streams completions of as many tokens as are asked for, a chunk each; with an ITL of 0 as fast as it can.
Of every prompt it says that its cache held CACHED tokens.
"""

import asyncio
import json
import re
import selectors
import sys

CHUNK = b'{"choices":[{"index":0,"text":" word","finish_reason":%s}]}'
MODELS = b'{"data":[{"id":"mock"}]}'


def event(data: bytes) -> bytes:
    text = b"data: " + data + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(text), text)


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    loop = asyncio.get_running_loop()
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            arrived = loop.time()
            if head.startswith(b"GET"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(MODELS), MODELS))
                continue
            length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
            assert length
            body = json.loads(await reader.readexactly(int(length[1])))
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            count = body["max_tokens"]
            for i in range(count):
                if (pause := arrived + ttft + i * itl - loop.time()) > 0:
                    await asyncio.sleep(pause)
                if writer.is_closing():
                    return
                writer.write(event(CHUNK % (b'"length"' if i == count - 1 else b"null")))
                if not itl:
                    await writer.drain()
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
            last = json.dumps({"choices": [], "usage": usage}).encode()
            writer.write(event(last) + event(b"[DONE]") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def main() -> None:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    ttft, itl = (float(argument) / 1e3 for argument in sys.argv[1:3])
    cached = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    # epoll waits for whole milliseconds, rounded up: half of one too late on average. Not so select.
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        runner.run(main())
