"""Ctrl-C: the first raises the stop flag, whatever is computed, and the second leaves."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ms4 import StopFlag
from ms4.models.interrupt import Interrupt, interruptible


def test_ctrl_c_raises_the_flag_and_everything_is_as_before():
    before = signal.getsignal(signal.SIGINT)
    flag = StopFlag()
    with interruptible(flag) as stop:
        assert stop is flag and not flag.is_set()
        os.kill(os.getpid(), signal.SIGINT)
    assert flag.is_set()  # the watcher has read what was sent before it ended
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_ctrl_c_twice_leaves():
    with pytest.raises(KeyboardInterrupt), interruptible():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        pytest.fail("still here")


def test_a_flag_that_is_raised_already_does_not_make_the_first_ctrl_c_the_second():
    flag = StopFlag()
    flag.set()
    with interruptible(flag):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_the_process_raises_the_flag_and_waits_for_the_end_of_the_block(number):
    seen = []
    before = signal.signal(number, lambda number, frame: seen.append(number))
    try:
        with Interrupt(until_kept=True) as ctrl_c:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
            assert ctrl_c.flag.is_set() and not seen
            if number == signal.SIGHUP:  # the second time does not wait
                os.kill(os.getpid(), number)
                time.sleep(0.01)
                assert seen == [number]
        assert seen[0] == number
    finally:
        signal.signal(number, before)


def test_what_ends_the_process_and_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with Interrupt(until_kept=True) as ctrl_c:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.01)
        assert not ctrl_c.flag.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_ctrl_c_nothing_is_stopped():
    with interruptible() as stop:
        pass
    assert not stop.is_set()
    assert not [thread for thread in threading.enumerate() if thread.name == "interrupt"]


BLOCKED = """
import ctypes, os, sys
from ms4.models.interrupt import Interrupt, interruptible

class Flag:
    def __init__(self):
        self.read, self.write = os.pipe()
    def set(self):
        os.write(self.write, b"x")

flag = Flag()
libc = ctypes.CDLL(None)
with interruptible(flag):
    print("ready", flush=True)
    # One call into C that no Python signal handler can end, as a feed is; only the flag does.
    got = ctypes.create_string_buffer(1)
    while libc.read(flag.read, got, 1) != 1:
        pass
sys.exit(42)
"""


def test_ctrl_c_reaches_a_call_into_c():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 42
    process.stdout.close()


def test_what_is_put_in_order_is_not_left_half_done():
    done = []
    with Interrupt() as ctrl_c:
        with ctrl_c.leaving():
            os.kill(os.getpid(), signal.SIGINT)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("kept")
        with pytest.raises(KeyboardInterrupt), ctrl_c.leaving():
            done.append("computed for nobody")
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
    assert ctrl_c.flag.is_set() and done == ["kept"] * 3
