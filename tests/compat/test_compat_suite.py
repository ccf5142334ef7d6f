"""Suite files, known failures and conditions: what they may say, and what is said where they are wrong."""

import re

import pytest
from harness import known_failures
from harness.conditions import holds
from harness.errors import CompatError
from harness.suite import Suite, find, list_files, read

GOOD = """
name = "some"
package = "Some"
version = "1.2"
paths = ["tests"]
"""
VERSIONS = {"python": "3.11.7", "jax": "0.10.2"}


def write(folder, text, name="some"):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def test_a_suite_is_read_with_its_defaults(tmp_path):
    path = write(tmp_path, GOOD + 'environment = { A = "b" }\ntimeout = 60\n')
    assert read(path, VERSIONS) == Suite("some", "Some", "1.2", ("tests",), environment={"A": "b"}, timeout=60.0)


def test_what_differs_between_versions_is_replaced(tmp_path):
    path = write(tmp_path, GOOD + "[[when]]\ncondition = 'jax>=0.11'\nversion = '2'\nskip = 'why'\n")
    assert read(path, VERSIONS) == Suite("some", "Some", "1.2", ("tests",))
    assert read(path, {**VERSIONS, "jax": "0.12.0.1"}) == Suite("some", "Some", "2", ("tests",), skip="why")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "some.toml: Invalid value (at end of document). A suite is a TOML file."),
        (GOOD.replace("version", "release"), "some.toml: unknown key 'release', expected one of name, package,"),
        (GOOD.replace("version", "#"), "some.toml: version is missing, expected a string."),
        (GOOD.replace('["tests"]', '"tests"'), "some.toml: paths = 'tests', expected a list of strings."),
        (GOOD + "timeout = 0", "some.toml: timeout = 0, expected a positive number."),
        (GOOD + "environment = { A = 1 }", "some.toml: environment = {'A': 1}, expected a table of strings."),
        (GOOD + "expects_replacements = 1", "some.toml: expects_replacements = 1, expected true or false."),
        (GOOD + "when = 1", "some.toml: when = 1, expected [[when]] tables with a condition each."),
        (GOOD + "[[when]]\nversion = '2'", "expected [[when]] tables with a condition each."),
        (GOOD + "[[when]]\ncondition = 'jax>1'\nversion = 2", "some.toml: version = 2, expected a string."),
        (GOOD + "condition = 'jax>1'", "some.toml: unknown key 'condition'"),
        (GOOD.replace('"some"', '"other"'), "some.toml: name = 'other', expected the file's own, 'some'."),
    ],
)
def test_what_is_wrong_with_a_suite_is_said(tmp_path, text, message):
    with pytest.raises(CompatError, match=re.escape(message)):
        read(write(tmp_path, text), VERSIONS)


def test_suites_are_chosen_by_name(tmp_path):
    for name in ("a", "b"):
        write(tmp_path, GOOD.replace('"some"', f'"{name}"'), name)
    assert [suite.name for suite in find(tmp_path, [], VERSIONS)] == ["a", "b"]
    assert [suite.name for suite in find(tmp_path, ["b", "b"], VERSIONS)] == ["b"]
    with pytest.raises(CompatError, match="--suite c: unknown, expected one of a, b"):
        find(tmp_path, ["c"], VERSIONS)


def test_files_are_found_below_folders_and_left_out_where_excluded(tmp_path):
    for name in ("pkg/a_test.py", "pkg/b_test.py", "pkg/b.py", "pkg/deep/test_c.py", "other/test_d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    suite = Suite("some", "some", "1", ("pkg", "other/*.py"), exclude=("pkg/b_test.py",), quick=("pkg/a_test.py",))
    assert list_files(suite, tmp_path, quick=False) == ["pkg/a_test.py", "pkg/deep/test_c.py", "other/test_d.py"]
    assert list_files(suite, tmp_path, quick=True) == ["pkg/a_test.py"]
    with pytest.raises(CompatError, match="suite some: 'none' names no test file of"):
        list_files(Suite("some", "some", "1", ("none",)), tmp_path, quick=False)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("", True),
        ("python<3.12", True),
        ("python>=3.12", False),
        ("python==3.11", True),
        ("jax<=0.10 and python!=3.13", True),
        ("jax > 0.10.2", False),
    ],
)
def test_conditions(condition, expected):
    assert holds(condition, VERSIONS) is expected


@pytest.mark.parametrize("condition", ["numpy<2", "python", "python<3.12 or jax<1"])
def test_a_condition_that_cannot_be_read_is_an_error(condition):
    with pytest.raises(CompatError, match=re.escape(f"condition {condition!r}: expected such as")):
        holds(condition, VERSIONS)


def test_known_failures_hold_under_their_condition(tmp_path):
    path = write(
        tmp_path,
        '[[failure]]\ntest = "a"\nreason = "why"\n[[failure]]\ntest = "b"\nreason = "new"\ncondition = "jax>=0.11"\n',
    )
    assert known_failures.read(path, VERSIONS) == {"a": "why"}
    assert known_failures.read(tmp_path / "none.toml", VERSIONS) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[failure]]\ntest = "a"', "some.toml: a [[failure]] without reason"),
        ('[[failure]]\ntest = "a"\nreason = "b"\nwhen = "c"', "some.toml: unknown key 'when' in [[failure]]"),
        ('[[failed]]\ntest = "a"', "some.toml: unknown key 'failed'"),
        ('[[failure]]\ntest = "a"\nreason = "b"\n' * 2, "some.toml: a is listed twice."),
    ],
)
def test_what_is_wrong_with_known_failures_is_said(tmp_path, text, message):
    with pytest.raises(CompatError, match=re.escape(message)):
        known_failures.read(write(tmp_path, text), VERSIONS)
