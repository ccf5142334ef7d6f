import os
import sys


def test_before():
    pass


def test_crashes():
    if "jaxext" in sys.modules:
        os.abort()


def test_after():
    assert "jaxext" not in sys.modules, "seen behind the crash"
