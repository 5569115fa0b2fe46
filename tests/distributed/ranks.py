"""What the ranks of the tests do."""

import os
import socket
import time

import torch

from kogia.distributed.group import join
from kogia.distributed.team import HERE, READY, Told


def main(channel: socket.socket) -> None:
    """Says what it is told to say, or does what that names."""
    told = Told(channel.detach())
    told.say(HERE)
    while True:
        word, *kind = told.next()
        if word == "exit":
            os._exit(3)
        elif word == "hang":
            time.sleep(600)
        elif word == "exchange":
            group = join(told.rank, told.size, told.meeting_place, *kind)
            found = exchanged(group)
            told.say(READY if found == expected(told.size) else str(found))
        else:
            told.say(word)


def exchanged(group) -> list:
    own = torch.arange(8.0, device=group.device).view(2, 4) + group.rank
    return [
        group.total(own.clone()).tolist(),
        group.side_by_side(own[:, :2]).tolist(),
        group.copy_from_first_(own.clone().view(-1).view(torch.uint8)).view(torch.float32).tolist(),
        group.least(7 - group.rank),
    ]


def expected(size: int) -> list:
    own = [torch.arange(8.0).view(2, 4) + rank for rank in range(size)]
    return [
        sum(own).tolist(),
        torch.cat([each[:, :2] for each in own], 1).tolist(),
        own[0].flatten().tolist(),
        8 - size,
    ]
