import time


def test_before():
    pass


def test_hangs():
    time.sleep(600)


def test_after():
    pass
