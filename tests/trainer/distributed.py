"""Runs a function on several ranks of a gloo group on this machine, in fresh processes."""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function, world_size: int, folder: Path, *args) -> list:
    """Calls `function(rank, *args)` on every rank and returns what they return, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_entry, (function, world_size, port, str(folder), args), world_size, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def _entry(rank, function, world_size, port, folder, args):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        torch.save(function(rank, *args), f"{folder}/rank{rank}.pt")
    finally:
        dist.destroy_process_group()
