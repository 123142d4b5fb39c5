"""A signal is noted and nothing else, and the handlers of before come back."""

import os
import signal
import threading

import pytest

from radio_distill.interruption import SIGNALS, listening, requested


@pytest.mark.parametrize("number", SIGNALS)
def test_listening__notes_the_first_signal_and_restores_the_handlers(number):
    before = {item: signal.getsignal(item) for item in SIGNALS}
    with listening():
        assert requested() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), SIGNALS[1 - SIGNALS.index(number)])
        assert requested() == number
    assert requested() == 0
    assert {item: signal.getsignal(item) for item in SIGNALS} == before


def test_listening__what_an_outer_block_noted_is_known_to_an_inner_one():
    with listening():
        os.kill(os.getpid(), signal.SIGUSR2)
        with listening():
            assert requested() == signal.SIGUSR2
        assert requested() == signal.SIGUSR2, "the outer block has not ended"
    assert requested() == 0


def test_listening__a_thread_sets_no_handlers():
    before, found = signal.getsignal(signal.SIGUSR2), []

    def enter():
        with listening():
            found.append(signal.getsignal(signal.SIGUSR2))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
