"""The other end of remote.py: one host in this process, orders on standard input, answers as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from jaxext.abtest.protocol import TargetError


def _own_output() -> IO[str]:
    """The pipe to the parent; what the user's program prints goes to standard error instead."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return answers


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _serve(host: Any, answers: IO[str]) -> None:
    from jaxext.abtest.host import StepError
    from jaxext.abtest.settings import Setting

    for line in sys.stdin:
        order = json.loads(line)
        arguments = order["arguments"]
        if "setting" in arguments:
            arguments["setting"] = Setting.from_dict(arguments["setting"])
        if "settings" in arguments:
            arguments["settings"] = [Setting.from_dict(setting) for setting in arguments["settings"]]
        try:
            answer = {"value": _plain(getattr(host, order["method"])(**arguments))}
        except StepError as error:
            traceback.print_exc()
            answer = {"error": "kernels" if error.kernels else "step", "message": str(error)}
        answers.write(json.dumps(answer) + "\n")


def main() -> None:
    order = json.loads(sys.argv[1])
    answers = _own_output()
    from jaxext.abtest.machine import set_memory

    note = set_memory(order["memory"])
    sys.argv = [order["path"]]
    from jaxext.abtest import protocol
    from jaxext.abtest.host import LocalHost

    try:
        workload = protocol.load(Path(order["path"]), order["factory"])
    except TargetError as error:
        answers.write(json.dumps({"error": "target", "message": str(error)}) + "\n")
        return
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        message = f"{Path(order['path']).name}:{order['factory']} raised {type(error).__name__}: {error}"
        answers.write(json.dumps({"error": "target", "message": message}) + "\n")
        return
    answers.write(json.dumps({"value": note}) + "\n")
    _serve(LocalHost(workload, order["seed"], cold_traces=True), answers)


if __name__ == "__main__":
    main()
