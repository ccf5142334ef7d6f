"""A host in a process of its own, for settings that hold for a whole process; same methods, answers over a pipe."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxext.abtest import parity
from jaxext.abtest.host import Compilation, StepError
from jaxext.abtest.protocol import TargetError
from jaxext.abtest.settings import VARIABLES, Setting


class RemoteHost:
    """Starts `python -m jaxext.abtest.worker` under `setting`'s environment and memory behaviour.

    Returns at once; `wait` ends when the worker has loaded the target. Every method raises StepError where the step
    raised there, or the process died.
    """

    def __init__(self, path: Path, factory: str, setting: Setting, seed: int) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        environment = {**os.environ, **setting.environment(), "PYTHONUNBUFFERED": "1"}
        for name in VARIABLES:
            environment.pop(name, None)
        order = {"path": str(path), "factory": factory, "memory": setting.memory, "seed": seed}
        self._process = subprocess.Popen(
            # -P: a folder named jaxext in the working directory is not this package.
            [sys.executable, "-P", "-m", "jaxext.abtest.worker", json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def wait(self) -> str:
        """Wait until the target is loaded; "" or why the memory setting has less effect.

        Raises:
          TargetError: the worker cannot load the target.
        """
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            tail = self._log.read().decode(errors="replace").strip().splitlines()[-12:]
            how = f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise StepError("\n".join([f"a measuring process {how}.", *tail]), kernels=True)
        answer = json.loads(line)
        if "error" not in answer:
            return answer["value"]
        if answer["error"] == "target":
            raise TargetError(answer["message"])
        raise StepError(answer["message"], kernels=answer["error"] == "kernels")

    def _call(self, method: str, **arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # _answer reports how the process ended.
        return self._answer()

    def open(self, name: str, setting: Setting) -> Compilation:
        found = self._call("open", name=name, setting=setting.to_dict())
        return Compilation(**{**found, "dtypes": tuple(found["dtypes"])})

    def trace_seconds(self, settings: list[Setting]) -> list[float | None]:
        return self._call("trace_seconds", settings=[setting.to_dict() for setting in settings])

    def arithmetic(self) -> tuple[float | None, tuple[str, ...]]:
        flops, dtypes = self._call("arithmetic")
        return flops, tuple(dtypes)

    def open_probe(self, name: str, of: str) -> None:
        self._call("open_probe", name=name, of=of)

    def close(self, name: str) -> None:
        self._call("close", name=name)

    def run(self, name: str, steps: int = 1) -> tuple[float, list[float]]:
        seconds, losses = self._call("run", name=name, steps=steps)
        return seconds, losses

    def compare(self, reference: str, candidate: str, probe: str) -> list[parity.LeafError]:
        found = self._call("compare", reference=reference, candidate=candidate, probe=probe)
        return [parity.LeafError(**leaf) for leaf in found]

    def save(self, name: str, folder: str) -> None:
        """Write a side's leaves to `folder`, for a side of another process to be compared with."""
        self._call("save", name=name, folder=folder)

    def adopt(self, name: str, folder: str) -> None:
        """Take leaves that another process saved as those of a side `name` here."""
        self._call("adopt", name=name, folder=folder)

    def rule(self) -> parity.Tolerance:
        return parity.Tolerance(**self._call("rule"))

    def warm_steps(self) -> int:
        return self._call("warm_steps")

    def describe_wiring(self) -> str:
        return self._call("describe_wiring")

    def explain(self) -> dict[str, Any]:
        return self._call("explain")

    def facts(self) -> dict[str, Any]:
        return self._call("facts")

    def peaks(self, seconds: float) -> dict[str, float]:
        return self._call("peaks", seconds=seconds)

    def peak_rss(self) -> int:
        return self._call("peak_rss")

    def stop(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()
