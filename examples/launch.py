"""Who this process is among those that train together, however they were launched.

python train_gpt.py                                alone
torchrun --nproc_per_node 2 train_gpt.py           torchrun tells each process all it needs
mpirun -n 2 python train_gpt.py                    mpirun tells it only its rank: the rest goes over MPI
"""

from __future__ import annotations

import os
import socket
import sys
from typing import NamedTuple

import torch.distributed as dist


class Place(NamedTuple):
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0  # on this machine: which of its GPUs to take


def join(backend: str, also_alone: bool = False) -> Place:
    """Makes the process group, if there are several processes, or one is to have it, too."""
    if "LOCAL_RANK" in os.environ:  # of torchrun
        dist.init_process_group(backend)
        return Place(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]))
    by_mpi = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & os.environ.keys()  # of mpirun: Open MPI, MPICH and its kin
    place = join_by_mpi(backend) if by_mpi else Place()
    if also_alone and place.ranks == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return place


def join_by_mpi(backend: str) -> Place:
    """Rank 0 opens a store at a free port, MPI tells the others where, and there they meet."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    place = Place(world.rank, world.size, world.Split_type(MPI.COMM_TYPE_SHARED).rank)
    if place.ranks == 1:
        return place
    store, address = None, None
    if place.rank == 0:
        host = os.environ.get("MASTER_ADDR", socket.gethostname())  # where others reach it
        store = dist.TCPStore(host, 0, place.ranks, is_master=True, wait_for_workers=False)
        address = host, store.port
    host, port = world.bcast(address)
    if store is None:
        store = dist.TCPStore(host, port, place.ranks, is_master=False)
    dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.ranks)
    return place


def leave() -> None:
    """Ends the process, if it has a process group; all that it has to do is done.

    An interpreter that ends by itself takes gloo's thread by surprise, which may just be letting go of the last collective.
    With DTensors among the imports that takes the interpreter, and torch 2.13 has been seen to hang there, or to abort.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        MPI.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
