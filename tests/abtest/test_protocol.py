"""`file.py:factory`: what is accepted, and what each mistake is answered with."""

import pytest

from jaxext.abtest import protocol
from jaxext.abtest.protocol import TargetError


def test_target_splits_into_file_and_factory(program):
    path = program("x = 1")
    assert protocol.parse_target(f"{path}:factory") == (path.resolve(), "factory")
    assert protocol.parse_target(str(path)) == (path.resolve(), None)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(TargetError, match=r"the file '.*gone\.py' does not exist\. Give the path of a Python file\."):
        protocol.parse_target(f"{tmp_path}/gone.py:factory")


def test_folder_is_refused(tmp_path):
    with pytest.raises(TargetError, match=r"is a folder\. Give the path of a Python file"):
        protocol.parse_target(str(tmp_path))


def test_empty_factory_name_is_refused(program):
    with pytest.raises(TargetError, match=r"'' is not the name of a function\. Write file\.py:factory to test a step"):
        protocol.parse_target(f"{program('')}:")


def test_missing_factory_is_named(program):
    path = program("x = 1")
    message = r"factory 'build': program.py has no such function. Define it at the top level: def build\(\)|def factory"
    with pytest.raises(TargetError, match=message):
        protocol.load(path, "build")


def test_factory_that_is_no_function_is_refused(program):
    with pytest.raises(TargetError, match=r"factory 'x' in program\.py is of type int, expected a function without"):
        protocol.load(program("x = 1"), "x")


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "t returned NoneType, expected \\(step, args\\)"),
        ((len,), "t returned a tuple of 1, expected \\(step, args\\)"),
        ((3, ()), "t: the step is of type int, not callable"),
        ((len, 3), r"t: args is of type int, .* A single argument is written \(argument,\)"),
        ((len, (), 3), "t: advance is of type int, not callable"),
    ],
)
def test_wrong_return_is_explained(returned, message):
    with pytest.raises(TargetError, match=message):
        protocol.check(returned, "t")


def test_factory_sees_its_neighbours_and_is_loaded_once(program):
    program("VALUE = 5", name="neighbour_of_program.py")
    path = program(
        """
        import dataclasses, neighbour_of_program

        @dataclasses.dataclass
        class Options:
            value: int = neighbour_of_program.VALUE

        def factory():
            return (lambda x: x), [Options().value]
        """
    )
    workload = protocol.load(path, "factory")
    assert workload.args == (5,)
    assert workload.name == "program.py:factory"


def test_what_the_factory_raises_is_not_hidden(program):
    with pytest.raises(ZeroDivisionError):
        protocol.load(program("def factory(): return 1 / 0"), "factory")
