#!/usr/bin/env python3
"""Puts `folio serve` under load by clients good and bad, and checks that nothing is left of it: no block, no memory, no request.

    python3 scripts/load_serve.py [--seconds 60] [--clients 64] [--binary target/release/folio]

Needs Linux (memory is read from /proc) and a built binary: `cargo build --release -p folio-cli`. It speaks HTTP over bare sockets, as the ill-behaved
clients could not be had from a library.
"""

import argparse
import collections
import json
import pathlib
import random
import re
import socket
import threading
import time
import urllib.request

from check_serve import KEY, ROOT, serve

# Memory may grow by this much from the middle of the load to its end: what the allocator keeps for the next peak.
MAX_GROWTH_MB = 48


def request(body, path="/v1/completions", length=None):
    head = f"POST {path} HTTP/1.1\r\nHost: load\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def prompt(rng):
    """Some are common beginnings, some long, some of a kind of their own."""
    return rng.choice(["Once upon a time", "Once upon a time there was a girl named Anna. " * rng.randint(1, 12), [rng.randrange(1000) for _ in range(rng.randint(1, 300))]])


def good(rng, **options):
    body = {"prompt": prompt(rng), "max_tokens": rng.randint(1, 60), "temperature": rng.choice([0, 0.8]), "n": rng.choice([1, 1, 1, 3]), **options}
    return json.dumps(body).encode()


def read_all(connection):
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


class Load:
    def __init__(self, base, seconds):
        self.address = (base.split("//")[1].split(":")[0], int(base.rsplit(":", 1)[1]))
        self.deadline = time.monotonic() + seconds
        self.counts = collections.Counter()
        self.problems = []
        self.lock = threading.Lock()

    def note(self, kind, status):
        with self.lock:
            self.counts[kind, status] += 1

    def status(self, answer):
        found = re.match(rb"HTTP/1\.1 (\d+)", answer)
        return int(found[1]) if found else 0

    def client(self, seed):
        rng = random.Random(seed)
        kinds = [self.whole, self.stream, self.leave, self.leave_early, self.malformed, self.garbage, self.huge, self.slow_reader, self.half_body]
        weights = [6, 6, 4, 2, 3, 3, 1, 1, 1]
        while time.monotonic() < self.deadline:
            kind = rng.choices(kinds, weights)[0]
            try:
                with socket.create_connection(self.address, 30) as connection:
                    connection.settimeout(120)
                    status, allowed = kind(rng, connection)
            except ConnectionError:
                # Bodies that are far too large are cut off.
                status, allowed = "reset", ("reset",) if kind == self.huge else ()
            except TimeoutError:
                status, allowed = "timeout", ()
            self.note(kind.__name__, status)
            if status not in allowed:
                with self.lock:
                    self.problems.append(f"{kind.__name__}: {status}")
            if status == 429:
                time.sleep(rng.random())

    def whole(self, rng, connection):
        connection.sendall(request(good(rng)))
        answer = read_all(connection)
        json.loads(answer.partition(b"\r\n\r\n")[2])
        return self.status(answer), (200, 429)

    def stream(self, rng, connection):
        connection.sendall(request(good(rng, stream=True)))
        answer = read_all(connection)
        status = self.status(answer)
        if status == 200 and b"data: [DONE]" not in answer:
            return "cut off", ()
        return status, (200, 429)

    def leave(self, rng, connection):
        """Reads a little of a long answer and goes."""
        connection.sendall(request(good(rng, stream=True, max_tokens=400, ignore_eos=True)))
        answer = connection.recv(1000)
        time.sleep(rng.random())
        return self.status(answer), (200, 429)

    def leave_early(self, rng, connection):
        connection.sendall(request(good(rng, max_tokens=400, ignore_eos=True)))
        time.sleep(rng.random() / 5)
        if rng.random() < 0.5:
            # With a reset.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        return "left", ("left",)

    def malformed(self, rng, connection):
        body = bytearray(good(rng, max_tokens=1))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(body))
            body[at : at + rng.randint(0, 2)] = rng.randbytes(rng.randint(0, 2))
        connection.sendall(request(bytes(body), rng.choice(["/v1/completions", "/v1/chat/completions", "/v1/models", "/nothing"])))
        return self.status(read_all(connection)), (200, 400, 404, 405, 429)

    def garbage(self, rng, connection):
        """A request with anything changed, its headers too. Any answer will do, or none, but not that the server has failed."""
        data = bytearray(request(good(rng, max_tokens=1)))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice([rng.randbytes(rng.randint(0, 3)), b"\r\n", b": ", b"Transfer-Encoding: chunked\r\n", b"\0" * 9])
        connection.sendall(bytes(data) * rng.choice([1, 1, 3]))
        connection.shutdown(socket.SHUT_WR)
        try:
            status = self.status(read_all(connection))
        except ConnectionError:
            status = 0
        return status, (0, *range(200, 500), 501, 505)

    def huge(self, rng, connection):
        body = json.dumps({"prompt": "a " * rng.choice([1 << 20, 3 << 20])}).encode()
        connection.sendall(request(body))
        return self.status(read_all(connection)), (400, 413)

    def slow_reader(self, rng, connection):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(good(rng, stream=True, max_tokens=200)))
        answer = connection.recv(100)
        for _ in range(rng.randint(1, 8)):
            time.sleep(0.5)
            connection.recv(10)
        return self.status(answer), (200, 429)

    def half_body(self, rng, connection):
        body = good(rng)
        connection.sendall(request(body[: rng.randrange(len(body))], length=len(body)))
        time.sleep(rng.random())
        return "left", ("left",)


def metrics(base):
    call = urllib.request.Request(f"{base}/metrics", headers={"Authorization": f"Bearer {KEY}"})
    with urllib.request.urlopen(call, timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def memory_mb(pid):
    return int(re.search(r"^VmRSS:\s+(\d+)", pathlib.Path(f"/proc/{pid}/status").read_text(), re.M)[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default=ROOT / "target" / "release" / "folio", type=pathlib.Path)
    parser.add_argument("--seconds", default=60, type=float)
    parser.add_argument("--clients", default=64, type=int)
    parser.add_argument("--seed", default=0, type=int)
    arguments = parser.parse_args()
    # Fewer places than clients, so that the queue is full at times; a limit of memory per body that is reached.
    server, base = serve(arguments.binary, "--max-running", "16", "--max-queued", "32", "--body-read-timeout", "10", "--log", "warn")
    try:
        before = memory_mb(server.pid)
        load = Load(base, arguments.seconds)
        threads = [threading.Thread(target=load.client, args=(arguments.seed * 1000 + i,), daemon=True) for i in range(arguments.clients)]
        for thread in threads:
            thread.start()
        samples = []
        while time.monotonic() < load.deadline:
            time.sleep(min(1.0, arguments.seconds / 20))
            samples.append(memory_mb(server.pid))
            seen = metrics(base)
            assert seen['folio_pool_blocks{state="used"}'] >= 0
        for thread in threads:
            thread.join(150)
        assert not any(thread.is_alive() for thread in threads), "a client hangs"
        # What is left is cancelled within a step or two.
        deadline = time.monotonic() + 30
        while True:
            seen = metrics(base)
            used = seen['folio_pool_blocks{state="used"}']
            running = sum(seen[f'folio_answers{{phase="{phase}"}}'] for phase in ("waiting", "running", "swapped"))
            # That of this very question is open.
            if used == 0 and running == 0 and seen["folio_connections"] <= 1:
                break
            assert time.monotonic() < deadline, f"{used} blocks, {running} answers and {seen['folio_connections']} connections are left"
            time.sleep(0.2)
        after = memory_mb(server.pid)
        middle = sum(samples[len(samples) // 2 :][:5]) / len(samples[len(samples) // 2 :][:5])
        for (kind, status), count in sorted(load.counts.items(), key=str):
            print(f"{kind:12} {status!s:>8} {count:6}")
        tokens = seen['folio_tokens_total{kind="generated"}']
        print(f"{sum(load.counts.values())} requests of {arguments.clients} clients and {tokens:.0f} new tokens in {arguments.seconds:.0f} s")
        print(f"memory: {before:.0f} MB before, {middle:.0f} MB in the middle, {max(samples):.0f} MB at most, {after:.0f} MB after")
        print("pool: 0 blocks used, {:.0f} of the prefix index, {:.0f} free".format(*(seen[f'folio_pool_blocks{{state="{state}"}}'] for state in ("indexed", "free"))))
        assert not load.problems, load.problems[:10]
        assert after - middle < MAX_GROWTH_MB, f"memory grows: {middle:.0f} MB, then {after:.0f} MB"
    finally:
        server.terminate()
        code = server.wait(60)
    assert code == 0, code
    log = (ROOT / "target" / "check_serve.log").read_text()
    assert "panicked" not in log and "ERROR" not in log, log
    print("the server has stopped by itself, and its log has no errors")


if __name__ == "__main__":
    main()
