"""A program as Python itself would run it: a script, `-m module`, `-c code` or `-` in a `__main__` of its own."""

import builtins
import dataclasses
import importlib.util
import io
import os
import pkgutil
import sys
from importlib.machinery import BuiltinImporter, ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType, TracebackType
from typing import Any


class ProgramError(Exception):
    """The program cannot be started; `exit_code` is what Python itself exits with in this case."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclasses.dataclass(frozen=True)
class Program:
    """Code to run, and what it finds in `sys.argv`, `sys.path[0]` and its globals."""

    code: CodeType
    argv: list[str]
    folder: str
    main: dict[str, Any]

    def run(self) -> None:
        """Runs the program as `__main__`; an exception leaves it as from Python itself."""
        module = _enter_main(self.main)
        sys.argv = self.argv
        _set_first_path(self.folder)
        try:
            exec(self.code, module.__dict__)
        except BaseException:
            _hide_own_frames(self.code)
            raise


def _enter_main(main: dict[str, Any]) -> ModuleType:
    module = ModuleType("__main__")
    vars(module).update({"__annotations__": {}, "__builtins__": builtins}, **main)
    # For good: threads, exit handlers and pickle look for the program's classes here after its last line too.
    sys.modules["__main__"] = module
    return module


def _set_first_path(folder: str) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = folder


_PACKAGE_FOLDER = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


def _programs_part(traceback: TracebackType | None, code: CodeType | None) -> TracebackType | None:
    """The traceback from the program's first frame on, below those of the launcher, jaxext and importlib."""
    while traceback is not None and not traceback.tb_frame.f_code.co_filename.startswith(_PACKAGE_FOLDER):
        traceback = traceback.tb_next
    while traceback is not None and traceback.tb_frame.f_code is not code:
        if not traceback.tb_frame.f_code.co_filename.startswith((_PACKAGE_FOLDER, "<frozen ")):
            break
        traceback = traceback.tb_next
    return traceback


def _hide_own_frames(code: CodeType | None = None) -> None:
    """Python reports the uncaught exception as ever, exit code and Ctrl-C included, but from the program's frames."""
    report = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        traceback = _programs_part(traceback, code)
        sys.last_traceback = traceback
        report(kind, error.with_traceback(traceback), traceback)

    sys.excepthook = excepthook


def _compile(source: str | bytes, filename: str) -> CodeType:
    try:
        return compile(source, filename, "exec", dont_inherit=True)
    except BaseException:
        _hide_own_frames()
        raise


def _main_globals(loader: Any, **others: Any) -> dict[str, Any]:
    return {"__loader__": loader, "__package__": None, "__spec__": None} | others


def from_code(code: str, arguments: list[str]) -> Program:
    """`python -c code arguments…`"""
    return Program(_compile(code, "<string>"), ["-c", *arguments], "", _main_globals(BuiltinImporter))


def from_stdin(arguments: list[str]) -> Program:
    """`python - arguments…`"""
    code = _compile(sys.stdin.read(), "<stdin>")
    main = _main_globals(SourceFileLoader("__main__", "<stdin>"), __file__="<stdin>", __cached__=None)
    return Program(code, ["-", *arguments], "", main)


def from_script(path: str, arguments: list[str]) -> Program:
    """`python path arguments…`; `path` may be a folder or a zip file with a `__main__.py`.

    Raises:
      ProgramError: no file can be read there.
    """
    location = os.path.abspath(path)
    # As Python does: a path hook answers for a folder or a zip file, and then its __main__ is the program.
    if pkgutil.get_importer(location) is not None:
        return _from_container(path, location, arguments)
    try:
        with io.open_code(location) as file:
            code = pkgutil.read_code(file)  # a .pyc file
        if code is None:
            with io.open_code(location) as file:
                code = _compile(file.read(), location)
    except OSError as error:
        raise ProgramError(
            f"can't open file {location!r}: [Errno {error.errno}] {error.strerror}. "
            "Give the path of a script, -m module or -c code.",
            exit_code=2,
        ) from None
    main = _main_globals(SourceFileLoader("__main__", location), __file__=location, __cached__=None)
    return Program(code, [path, *arguments], os.path.dirname(os.path.realpath(path)), main)


def _from_container(path: str, location: str, arguments: list[str]) -> Program:
    sys.path.insert(0, location)
    try:
        # jaxext's own __main__ is under that name in sys.modules, so the path's finder is asked directly.
        finder = pkgutil.get_importer(location)
        spec = finder.find_spec("__main__") if finder is not None else None  # type: ignore[union-attr]
        if spec is None:
            raise ProgramError(
                f"can't find '__main__' module in {location!r}. Give a script, or a folder with a __main__.py.",
                exit_code=1,
            )
        return _from_spec(spec, [path, *arguments], location)
    finally:
        del sys.path[0]


def from_module(name: str, arguments: list[str]) -> Program:
    """`python -m name arguments…`

    Raises:
      ProgramError: there is no such module, or it cannot be run.
    """
    # While its parent packages are imported, Python shows '-m' as the program's name.
    sys.argv = ["-m", *arguments]
    _set_first_path(os.getcwd())
    try:
        spec = _find(name)
        if spec.submodule_search_locations is not None:
            spec = _find(f"{name}.__main__", f"{name!r} is a package without a __main__ to run.")
        return _from_spec(spec, [spec.origin or "-m", *arguments], os.getcwd())
    except ProgramError:
        raise
    except BaseException:  # raised by the program's own packages
        _hide_own_frames()
        raise


def _find(name: str, remedy: str = "Give the name of a module as after import, without .py.") -> ModuleSpec:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        spec = None
    except ValueError:  # a module without a spec, such as __main__
        spec = None
    if spec is None:
        raise ProgramError(f"No module named {name}. {remedy}", exit_code=1)
    return spec


def _from_spec(spec: ModuleSpec, argv: list[str], folder: str) -> Program:
    get_code = getattr(spec.loader, "get_code", None)  # zipimport's loader is not registered as an InspectLoader
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise ProgramError(f"No code for module {spec.name!r}: it is not written in Python.", exit_code=1)
    main = {
        "__loader__": spec.loader,
        "__package__": spec.parent,
        "__spec__": spec,
        "__file__": spec.origin,
        "__cached__": spec.cached,
    }
    return Program(code, argv, folder, main)
