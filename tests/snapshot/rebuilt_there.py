"""A process that was never told of any handle: rebuilds an archive's graphs, and runs them.

Arguments: the store, where the regions are to be (`same` or `moved`), and seeds. Prints JSON.
"""

from __future__ import annotations

import hashlib
import json
import sys

from coldframe.snapshot.graph_store import GraphStore
from coldframe.snapshot.graphs import Kernels, rebuild
from tests.snapshot.graph_kit import BASES, MOVED, Device, one_of_each


def main(store: str, where: str, *seeds: str) -> None:
    device = Device(BASES if where == "same" else MOVED)
    kernels = Kernels(device.calls)
    kernels.learn(one_of_each(device))
    archive = GraphStore(store).read(device.fingerprint())
    rebuilt = rebuild(device.driver, archive, device.regions, kernels)
    found = {}
    for key, executable in rebuilt.graphs.items():
        for seed in seeds:
            device.fill(int(seed))
            device.run(executable)
            found[f"{key} {seed}"] = hashlib.sha256(device.content()).hexdigest()
    refused = dict(rebuilt.refused)
    rebuilt.close()
    kernels.close()
    device.close()
    print(json.dumps({"found": found, "refused": refused, "left": device.emulator.left()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
