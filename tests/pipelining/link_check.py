"""What a link delivers, over a plain TCP connection: as JSON, seconds of round trips and bytes a second.

Arguments: `ask` or `answer`, the address of the host that answers, and how many bytes are sent at once after the trips.
"""

import json
import socket
import sys
import time

PORT, TRIPS = 5079, 9


def answer(address, bulk):
    with socket.create_server((address, PORT)) as server:
        print("ready", flush=True)
        connection, _ = server.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(TRIPS):
            connection.sendall(connection.recv(1))
        arrivals, count = [], 0
        while count < bulk:
            count += len(connection.recv(1 << 16))
            arrivals.append((time.perf_counter(), count))
    # The second half: a connection starts slowly.
    start = next(arrival for arrival in arrivals if arrival[1] >= bulk // 2)
    print((count - start[1]) / (arrivals[-1][0] - start[0]), flush=True)


def ask(address, bulk):
    with socket.create_connection((address, PORT)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        seconds = []
        for _ in range(TRIPS):
            start = time.perf_counter()
            connection.sendall(b"x")
            connection.recv(1)
            seconds.append(time.perf_counter() - start)
        connection.sendall(bytes(bulk))
    print(json.dumps(seconds))


if __name__ == "__main__":
    {"ask": ask, "answer": answer}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
