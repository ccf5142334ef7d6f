"""Arrays from process to process over TCP: what a pipeline of several processes sends its neighbours.

Sends never wait: a thread for each peer takes arrays off the device and writes them. Receives wait for what they name,
so that no order of sends and receives can block two processes against each other. Addresses are exchanged through
JAX's own distributed runtime, whose cluster detection (SLURM, Open MPI, Kubernetes) this relies on.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import json
import queue
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .. import _jax_compat as compat

_LENGTHS = struct.Struct("!QQ")
_FAILED = "failed"
# How long a process that fails waits for its last words to be sent.
_LAST_WORDS_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Received:
    """An array of another process: `key`: its kind of random key, "" for a plain array; `spec`: how it was sharded."""

    key: str
    words: Any
    spec: tuple[Any, ...] = ()


class PeerError(RuntimeError):
    """Another process of the pipeline is gone, late, or at odds with this one: who, what was awaited, what to do."""


class Transport:
    """Connections to all other processes.

    rank, size: this process and how many there are. Peers are numbered as `jax.process_index`.
    timeout: seconds that each of the others has to get here.

    Raises:
      PeerError: one did not.
    """

    def __init__(self, rank: int, size: int, addresses: Any, timeout: float) -> None:
        self.rank, self.size = rank, size
        # All processes move the same arrays in the same order, which numbers them.
        self.moves = itertools.count()
        self._peers: dict[int, _Peer] = {}
        listener = socket.create_server(("", 0))
        listener.settimeout(timeout)
        addresses.put(rank, f"{addresses.host()}:{listener.getsockname()[1]}")
        for other in range(rank):
            try:
                host, _, port = addresses.get(other, timeout).rpartition(":")
                connection = socket.create_connection((host, int(port)), timeout=timeout)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                raise _is_late(rank, [other], timeout) from error
            connection.sendall(struct.pack("!Q", rank))
            self._peers[other] = _Peer(other, connection)
        while missing := [other for other in range(rank + 1, size) if other not in self._peers]:
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise _is_late(rank, missing, timeout) from error
            (other,) = struct.unpack("!Q", _exactly(connection, 8))
            self._peers[other] = _Peer(other, connection)
        listener.close()

    def send(self, peer: int, tag: str, arrays: Sequence[Any]) -> None:
        """Send arrays, typed random keys among them, under a name that is used once. Returns at once."""
        self._peers[peer].outbox.put((tag, [_words(array) for array in arrays], None))

    def exchange(self, own: np.ndarray, ranks: Sequence[int], name: str, timeout: float) -> dict[int, np.ndarray]:
        """An array of each of these processes, by rank; all of them call this alike.

        Raises:
          PeerError: one of them has failed, is gone, or sent nothing within `timeout` seconds.
        """
        tag = f"{name} #{next(self.moves)}"
        others = [rank for rank in ranks if rank != self.rank]
        for rank in others:
            self.send(rank, tag, [own])
        return {self.rank: own} | {rank: self.receive(rank, tag, timeout)[0].words for rank in others}

    def tell(self, message: str) -> None:
        """Tell all peers why this process fails; whoever waits for it, or ever does, gets to know."""
        told = [threading.Event() for _ in self._peers]
        for peer, event in zip(self._peers.values(), told):
            peer.outbox.put((_FAILED, [Received("", np.frombuffer(message.encode(), np.uint8))], event))
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        for event in told:
            event.wait(max(0.0, deadline - time.monotonic()))

    def receive(self, peer: int, tag: str, timeout: float) -> list[Received]:
        """The arrays that `peer` sent under this name.

        Raises:
          PeerError: it has failed, is gone, or sent nothing within `timeout` seconds.
        """
        return self._peers[peer].receive(tag, timeout, self.rank)


class _Peer:
    """One connection, with a thread for each direction."""

    def __init__(self, rank: int, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.outbox: queue.SimpleQueue[tuple[str, list[Received], threading.Event | None]] = queue.SimpleQueue()
        self._rank, self._connection = rank, connection
        self._arrived: dict[str, list[Received]] = {}
        self._changed = threading.Condition()
        self._lost = ""
        for run in (self._write, self._read):
            threading.Thread(target=run, daemon=True, name=f"jaxext pipeline peer {rank}").start()

    def receive(self, tag: str, timeout: float, own: int) -> list[Received]:
        deadline = time.monotonic() + timeout
        with self._changed:
            while tag not in self._arrived:
                left = deadline - time.monotonic()
                if self._lost or left <= 0:
                    state = self._lost or f"has not sent it for {timeout:.0f} s"
                    patience = "" if self._lost else "; where it is healthy but slow, with a longer timeout="
                    raise PeerError(
                        f"pipeline: process {own} waits for {tag} from process {self._rank}, which {state}. Look at "
                        f"the log of process {self._rank}, then start all processes again from the last checkpoint"
                        f"{patience}."
                    )
                self._changed.wait(left)
            return self._arrived.pop(tag)

    def _write(self) -> None:
        try:
            while True:
                tag, arrays, sent = self.outbox.get()
                self._connection.sendall(_packed(tag, arrays))
                if sent is not None:
                    sent.set()
        except OSError as error:
            self._fail(f"is gone ({error})")

    def _read(self) -> None:
        try:
            while True:
                header, body = _LENGTHS.unpack(_exactly(self._connection, _LENGTHS.size))
                tag, arrays = _unpacked(_exactly(self._connection, header), _exactly(self._connection, body))
                if tag == _FAILED:
                    self._fail(f"has failed: {arrays[0].words.tobytes().decode()}")
                    continue
                with self._changed:
                    self._arrived[tag] = arrays
                    self._changed.notify_all()
        except OSError as error:
            self._fail(f"is gone ({error})")

    def _fail(self, reason: str) -> None:
        with self._changed:
            self._lost = self._lost or reason
            self._changed.notify_all()


def _is_late(rank: int, others: Sequence[int], timeout: float) -> PeerError:
    names = " and ".join(f"process {other}" for other in others)
    return PeerError(
        f"pipeline: process {rank} has waited {timeout:.0f} s for {names} to come to the first pipelined step. Look at "
        f"the log of {names}, or give it more time: jaxext.pipeline(timeout={2 * timeout:.0f})."
    )


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("it closed the connection")
        view = view[received:]
    return data


def _words(array: Any) -> Received:
    """What is sent of an array; it may still be on its device."""
    sharding = getattr(array, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, jax.sharding.NamedSharding) else ()
    if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
        return Received(str(jax.random.key_impl(array)), jax.random.key_data(array), spec)
    return Received("", array, spec)


def _packed(tag: str, arrays: list[Received]) -> bytes:
    header = json.dumps([tag, [[a.key, a.words.dtype.name, a.words.shape, a.spec] for a in arrays]]).encode()
    body = io.BytesIO()
    for array in arrays:
        body.write(np.ascontiguousarray(array.words).tobytes())
    return _LENGTHS.pack(len(header), body.tell()) + header + body.getvalue()


def _unpacked(header: bytes | bytearray, body: bytes | bytearray) -> tuple[str, list[Received]]:
    tag, types = json.loads(bytes(header))
    arrays, place = [], 0
    for key, name, shape, spec in types:
        dtype = jax.numpy.dtype(name)
        count = int(np.prod(shape, dtype=np.int64))
        axes = tuple(tuple(entry) if isinstance(entry, list) else entry for entry in spec)
        arrays.append(Received(key, np.frombuffer(body, dtype, count, place).reshape(shape), axes))
        place += count * dtype.itemsize
    return tag, arrays


class _Addresses:
    """Addresses of the processes, in the key-value store of JAX's distributed runtime."""

    def __init__(self) -> None:
        self._store, self._coordinator = compat.distributed_store()

    def host(self) -> str:
        """This machine's address as the coordinator sees it."""
        host, _, port = self._coordinator.rpartition(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port)))
            return probe.getsockname()[0]

    def put(self, rank: int, address: str) -> None:
        self._store.key_value_set(f"jaxext/pipeline/{rank}", address)

    def get(self, rank: int, timeout: float) -> str:
        return self._store.blocking_key_value_get(f"jaxext/pipeline/{rank}", round(timeout * 1000))


_connected: list[Transport] = []


def connect(timeout: float) -> Transport:
    """The connections of this process, made once; `timeout`: seconds that the others have to get here.

    Raises:
      PeerError: one of them did not.
    """
    if not _connected:
        _connected.append(Transport(jax.process_index(), jax.process_count(), _Addresses(), timeout))
    return _connected[0]
