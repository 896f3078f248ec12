"""How fast it is: against the limits of this machine, and against peers in turns within the same run."""

from mixtura.bench.peers import PEERS, found_peers
from mixtura.bench.run import KINDS, run_bench

__all__ = ["KINDS", "PEERS", "found_peers", "run_bench"]
