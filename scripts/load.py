#!/usr/bin/env python3
"""A load of streamed completions on any OpenAI-compatible server, and what it measured.

    python3 scripts/load.py --url http://127.0.0.1:8080 --clients 1,8,32

A closed loop: each client sends its next request when the last has ended. Prompts are random words, the
same for the same seed, so that no two share a prefix unless --shared-words asks for it. Reports output
tokens per second over the whole run, and medians of the time to the first token and between tokens.
Standard library only. Tokens are counted by the server's own usage figures.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

WORDS = """time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point home water
room mother area money story fact month lot right study book eye job word business issue side kind head house
service friend father power hour game line end member law car city community name president team minute idea
body information back parent face others level office door health person art war history party result change
morning reason research girl guy moment air teacher force education""".split()


@dataclass
class Outcome:
    started: float
    chunks: list[float] = field(default_factory=list)  # when text arrived
    ended: float = 0.0
    output: int = 0
    prompt: int = 0
    cost: float | None = None


class Failed(Exception):
    """The server did not stream an answer."""


async def one_request(host: str, port: int, path: str, body: dict) -> Outcome:
    """Streams one completion over a connection of its own."""
    payload = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    )
    outcome = Outcome(time.perf_counter())
    reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
    try:
        writer.write(head.encode() + payload)
        await writer.drain()
        status = await reader.readline()
        if b" 200 " not in status:
            raise Failed(
                f"{status.decode().strip()}: {(await reader.read()).decode(errors='replace')[-500:]}"
            )
        # Chunked framing shows as lines of hexadecimal digits, which are no events: passed over.
        while line := await reader.readline():
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise Failed(str(event["error"]))
            if any(choice.get("text") for choice in event.get("choices", [])):
                outcome.chunks.append(time.perf_counter())
            if usage := event.get("usage"):
                outcome.output, outcome.prompt = usage["completion_tokens"], usage["prompt_tokens"]
                outcome.cost = usage.get("cost")
        outcome.ended = time.perf_counter()
    finally:
        writer.close()
    if not outcome.output or not outcome.chunks:
        raise Failed("the stream ended without tokens or without usage")
    return outcome


def prompt(seed: int, words: int, shared: int) -> str:
    same, own = random.Random(0), random.Random(seed)
    return " ".join([same.choice(WORDS) for _ in range(shared)] + [own.choice(WORDS) for _ in range(words)])


async def run(given: argparse.Namespace, clients: int) -> dict:
    """One run of `clients` clients, `given.requests` each."""
    url = urlsplit(given.url)
    outcomes: list[Outcome] = []

    async def client(number: int) -> None:
        for turn in range(given.requests):
            seed = given.seed + number + clients * (turn + 1000 * clients)
            body = {
                "model": given.model,
                "prompt": prompt(seed, given.words, given.shared_words),
                "max_tokens": given.tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            outcomes.append(await one_request(url.hostname, url.port or 80, "/v1/completions", body))

    began = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(clients)))
    wall = time.perf_counter() - began
    gaps = [b - a for o in outcomes for a, b in zip(o.chunks, o.chunks[1:], strict=False)]
    costs = [o.cost for o in outcomes if o.cost is not None]
    output = sum(o.output for o in outcomes)
    return {
        "clients": clients,
        "requests": len(outcomes),
        "output_tokens_per_second": round(output / wall, 1),
        "prompt_tokens_mean": round(statistics.mean(o.prompt for o in outcomes), 1),
        "ttft_p50_ms": round(1000 * statistics.median(o.chunks[0] - o.started for o in outcomes), 1),
        "inter_token_p50_ms": round(1000 * statistics.median(gaps), 1) if gaps else None,
        "wall_seconds": round(wall, 2),
        "cost_per_million_output_tokens": round(1e6 * sum(costs) / output, 6) if costs else None,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True, help="the server, as http://127.0.0.1:8080")
    parser.add_argument("--model", default="default", help="the model's id in requests")
    parser.add_argument("--clients", default="1,8,32", help="numbers of clients, one run each")
    parser.add_argument("--requests", type=int, default=3, help="requests of each client, one after another")
    parser.add_argument("--words", type=int, default=100, help="words of each prompt that are its own")
    parser.add_argument("--shared-words", type=int, default=0, help="words that all prompts begin with")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to generate")
    parser.add_argument("--seed", type=int, default=1, help="other seed, other prompts")
    parser.add_argument("--json", action="store_true", help="one JSON object a run instead of a table")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if urlsplit(given.url).hostname not in ("127.0.0.1", "localhost", "::1"):
        sys.exit("load goes to this machine only: --url must be a loopback address")
    if not given.json:
        print("clients  tok/s out  TTFT p50 ms  inter-token p50 ms  wall s")
    for clients in (int(number) for number in given.clients.split(",")):
        try:
            row = asyncio.run(run(given, clients))
        except (Failed, OSError) as error:
            sys.exit(f"{clients} clients: {error}")
        if given.json:
            print(json.dumps(row), flush=True)
        else:
            print(
                f"{clients:7}  {row['output_tokens_per_second']:9}  {row['ttft_p50_ms']:11}  "
                f"{row['inter_token_p50_ms'] or '-':>18}  {row['wall_seconds']:6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
