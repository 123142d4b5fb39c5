"""A signal is noted and nothing else, and the handlers of before come back."""

import os
import signal
import threading

import pytest

from radio_distill.system.signals import SIGNALS, listening, requested


@pytest.mark.parametrize("number", SIGNALS)
def test_listening__notes_the_first_signal_and_restores_the_handlers(number):
    before = {item: signal.getsignal(item) for item in SIGNALS}
    with listening(keyboard=True):
        assert requested() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), next(item for item in SIGNALS if item != number))
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


def test_listening__ctrl_c_ends_at_once_what_does_not_ask_for_it():
    with listening(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_listening__a_second_ctrl_c_aborts_and_the_first_says_so(capfd):
    with listening(keyboard=True, notice="stopping after this step"):
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == "stopping after this step\n"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGINT
    assert requested() == 0


def test_listening__ctrl_c_after_another_signal_is_a_first_one():
    with listening(keyboard=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert requested() == signal.SIGTERM


def test_listening__a_background_job_that_ignores_ctrl_c_goes_on_doing_so():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening(keyboard=True):
            os.kill(os.getpid(), signal.SIGINT)
            assert requested() == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_listening__a_thread_sets_no_handlers():
    before, found = signal.getsignal(signal.SIGUSR2), []

    def enter():
        with listening():
            found.append(signal.getsignal(signal.SIGUSR2))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]
