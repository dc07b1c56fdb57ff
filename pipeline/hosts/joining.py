"""The first meeting of all ranks, bounded in time: a host that never comes does not keep the others for long."""

import os
from datetime import timedelta

import torch.distributed as dist

from data_contracts.errors import UserError
from pipeline.hosts.launcher import several_hosts

JOIN_SECONDS = 300  # between the first rank's coming and the last one's: imports, from slow disks too


def wait_for_all_ranks(seconds: float = JOIN_SECONDS) -> dist.Store | None:
    """Wait until all ranks of a job of several hosts have come; the store to be held until the process group stands.

    torchrun has its own meeting. Raises UserError where a rank has not come in time, DistNetworkError as torch does.
    """
    if not several_hosts() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    address, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    try:
        return dist.TCPStore(
            address,
            port,
            size,
            is_master=os.environ["RANK"] == "0",
            timeout=timedelta(seconds=seconds),
            multi_tenant=True,  # the process group's store shares the server
        )
    except dist.DistError as error:
        if "EADDRINUSE" in str(error):
            raise
        told = " ".join(str(error).split())[:160]
        raise UserError(
            f"not all {size} ranks came to {address}:{port} within {seconds:g} s ({told}); see what the other hosts "
            "say, and whether they reach that address and port"
        ) from error
