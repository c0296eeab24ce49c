"""The first signal asks, a later one acts, and the former handlers come back."""

import signal

import pytest

from tilewright_train import signals
from tilewright_train.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(number)
        assert stop.requested
        assert stop.signal is number
    assert signal.getsignal(number) is before


def test_the_run_itself_may_ask_to_stop() -> None:
    with StopRequest() as stop:
        stop.ask()
        assert stop.requested
        assert stop.signal is None


def test_signals_of_one_second_count_once_and_a_later_one_acts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A shell without job control has what it starts in the background ignore Ctrl-C.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun passes on what the terminal sent already
        assert stop.requested
        monkeypatch.setattr(signals, "_ONE_SIGNAL", -1.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, inherited)
