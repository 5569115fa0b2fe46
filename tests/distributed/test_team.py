"""Ranks: what they exchange, what they are told, and what becomes of a team of which one has ended."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from distributed.ranks import exchanged, expected

from kogia.distributed import team as team_module
from kogia.distributed.group import join
from kogia.distributed.team import HERE, READY, Team, uninterrupted

RANKS = "distributed.ranks"


@pytest.fixture
def team():
    """Of three, whose other ranks are there."""
    team = Team(RANKS, 3)
    team.wait_until(HERE)
    yield team
    team.close()


def test_ranks_exchange_sums_columns_copies_and_the_least_number(team):
    team.tell("exchange", "cpu")
    group = join(0, 3, team.meeting_place, "cpu")
    assert exchanged(group) == expected(3)
    team.wait_until(READY)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_exchange_the_same():
    team = Team(RANKS, 2)
    team.wait_until(HERE)
    team.tell("exchange", "cuda")
    group = join(0, 2, team.meeting_place, "cuda")
    assert exchanged(group) == expected(2)
    team.wait_until(READY)
    team.close()


def test_a_rank_that_ends_ends_the_team_and_says_how(team):
    heard = threading.Event()
    team.on_failure = heard.set
    team.check()
    os.kill(team._children[1].process.pid, signal.SIGKILL)
    assert heard.wait(20)
    with pytest.raises(ChildProcessError, match=r"over 3 processes has ended: rank 2: it ended \(signal SIGKILL\)"):
        team.check()
    team.tell("ready")  # to nobody: the check says why


def test_a_rank_that_fails_says_why_and_waiting_for_it_ends(team):
    team.tell("ValueError: no such model")
    with pytest.raises(ChildProcessError, match="rank [12]: ValueError: no such model"):
        team.wait_until(READY)


def test_a_rank_that_leaves_without_a_word_is_found_out(team):
    team.tell("exit")
    with pytest.raises(ChildProcessError, match=r"it ended \(exit code 3\)"):
        team.wait_until(READY)


def test_a_rank_that_never_gets_ready_is_waited_for_so_long_only(team, monkeypatch):
    monkeypatch.setattr(team_module, "START_SECONDS", 0.3)
    team.tell("hang")
    with pytest.raises(ChildProcessError, match=r"ranks \[1, 2\] did not say 'ready' within 0.3 s"):
        team.wait_until(READY)


def test_a_closed_team_leaves_no_process_and_no_file():
    team = Team(RANKS, 2)
    child, folder = team._children[0].process, Path(team.meeting_place).parent
    team.close()
    team.close()
    assert child.poll() is not None and not folder.exists()
    with pytest.raises(ChildProcessError, match="it was closed"):
        team.check()


def test_an_error_that_follows_from_the_end_of_a_rank_is_told_as_that(team):
    team.tell("exit")
    with pytest.raises(ChildProcessError, match="exit code 3") as caught:
        team.blame(RuntimeError("connection closed by peer"))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_error_of_the_first_rank_ends_the_others(team):
    team.blame(KeyboardInterrupt())
    with pytest.raises(ChildProcessError, match="rank 0: KeyboardInterrupt"):
        team.check()
    assert all(child.process.poll() is not None for child in team._children)


def test_an_interrupt_waits_for_the_end_of_what_must_be_whole():
    done = []

    def interrupted() -> None:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            done.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    thread = threading.Thread(target=lambda: uninterrupted().__enter__())
    thread.start()
    thread.join()
