"""One holder at a time, also for who came while the lock's file was being removed."""

import threading
from pathlib import Path

from registry.lock import exclusive


def test_three_holders_come_one_after_the_other(tmp_path: Path):
    """The first removes the file when it leaves, on which the second waits; the third finds a new one."""
    path = tmp_path / "lock"
    second_waits, second_is_in, second_may_go = threading.Event(), threading.Event(), threading.Event()
    third_waits, order = threading.Event(), []

    def second() -> None:
        with exclusive(path, second_waits.set):
            order.append("second in")
            second_is_in.set()
            assert second_may_go.wait(30)
            order.append("second out")

    def third() -> None:
        with exclusive(path, third_waits.set):
            order.append("third in")

    threads = [threading.Thread(target=second), threading.Thread(target=third)]
    with exclusive(path):
        threads[0].start()
        assert second_waits.wait(30)
    assert second_is_in.wait(30)
    threads[1].start()
    assert third_waits.wait(10)
    second_may_go.set()
    for thread in threads:
        thread.join(30)
    assert order == ["second in", "second out", "third in"]
    assert not path.exists()
