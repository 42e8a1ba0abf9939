"""Cost and speed of gossip in the simulation: `python bench/gossip.py [--seeds N] [--large N]`.

Times are virtual and every run is a function of its seed, so the machine does not matter. The delay is 0.5 to 2 ms.
`--real 8,32` measures swarms of that many real processes on loopback instead, see gossip_real.py.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from gossip_real import real

from swarm.content.manifest import Digest, ModelId
from swarm.membership import config
from swarm.protocol.packets import Holding, Profile, State

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the simulated group is the tests'

from sim.swim_group import SwimGroup

LIMIT_S = 600.0


def flock(members: int, *, seed: int, loss: float = 0.0) -> SwimGroup:
    """Members that joined through the first at once and have fallen quiet."""
    found = SwimGroup(seed=seed, config=config.lan(), checked=False)
    for number in range(members):
        found.add(f"m{number}", contacts=("m0",) if number else ())
    while found.now < LIMIT_S and not all(found.knows(name) == members - 1 for name in found.hosts):
        found.run(0.5)
    found.loss = loss
    found.run(10.0)
    found.seen.clear()
    return found


def bytes_per_s(found: SwimGroup, seconds: float) -> tuple[float, float]:
    """Bytes and datagrams that a member sends in a second, with the headers of UDP and IP."""
    before = [(host.sent_bytes, host.sent_datagrams) for host in found.hosts.values()]
    found.run(seconds)
    after = [(host.sent_bytes, host.sent_datagrams) for host in found.hosts.values()]
    pairs = list(zip(before, after, strict=True))
    share = 1.0 / seconds / len(pairs)
    return sum(b[0] - a[0] for a, b in pairs) * share, sum(b[1] - a[1] for a, b in pairs) * share


def newcomer(seed: int) -> tuple[float, float]:
    """Seconds until a newcomer knows all of 32, and until all of them know it."""
    found = flock(32, seed=seed)
    found.add("late", contacts=("m0",))
    knows = found.until(lambda: found.knows("late") == 32, limit_s=LIMIT_S)
    return knows, knows + found.until(lambda: all(found.knows(n) == 32 for n in found.hosts), limit_s=LIMIT_S)


def detection(members: int, seed: int) -> tuple[float, float]:
    """Seconds from a kill until the first member declares it dead, and until the last member knows."""
    found = flock(members, seed=seed)
    found.kill("m1")

    def knowing() -> int:
        return sum(1 for seen in found.seen if seen.state is State.DEAD)

    first = found.until(lambda: knowing() > 0, limit_s=LIMIT_S)
    return first, first + found.until(lambda: knowing() >= members - 1, limit_s=LIMIT_S)


def false_alarms(loss: float, seed: int) -> tuple[int, int]:
    """Members of 32 suspected, and declared dead, in 10 minutes in which nobody dies: (alarm, subject) told apart."""
    found = flock(32, seed=seed, loss=loss)
    alarms = {State.SUSPECT: 0, State.DEAD: 0}
    for _ in range(60):
        found.run(10.0)
        for state in alarms:
            alarms[state] += len({seen.whom for seen in found.seen if seen.state is state})
        found.seen.clear()
    return alarms[State.SUSPECT], alarms[State.DEAD]


def heal(members: int, seed: int) -> float:
    """Seconds from the end of a partition of a minute in halves until all agree."""
    found = flock(members, seed=seed)
    found.partition({f"m{number}" for number in range(members // 2)})
    found.run(60.0)
    found.heal()
    return found.until(found.agreed, limit_s=LIMIT_S)


def cost(members: int, *, busy: bool) -> tuple[float, float]:
    """Bytes and datagrams a second of a member: at rest, or while all profiles change all the time."""
    found = flock(members, seed=0)
    if not busy:
        return bytes_per_s(found, 15.0)
    seconds = math.ceil(config.lan().between_profiles_s(members)) + 10
    sent = []
    for step in range(2 * seconds):
        done = 10 * (step % 9)
        for name in found.hosts:
            found.tell(
                name,
                Profile((Holding(ModelId("org/a-model-7b"), Digest("a" * 64), "checkpoint", done, 80, done == 80),)),
            )
        sent.append(bytes_per_s(found, 1.0))
    steady = sent[seconds:]
    return statistics.mean(one for one, _ in steady), statistics.mean(other for _, other in steady)


def spread(values: list[float]) -> str:
    return f"median {statistics.median(values):.2f} s, max {max(values):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--large", type=int, default=1000)
    parser.add_argument("--real", metavar="N,N", help="measure swarms of so many real processes instead")
    parser.add_argument("--network", choices=["local", "lan", "wan"], default="lan", help="preset of real processes")
    parser.add_argument("--busy", type=float, default=60.0, metavar="S", help="seconds with all cores busy; 0: none")
    given = parser.parse_args()
    if given.real:
        real([int(count) for count in given.real.split(",")], network=given.network, busy_s=given.busy)
        return
    seeds = range(given.seeds)
    knows, known = zip(*(newcomer(seed) for seed in seeds), strict=True)
    print(f"newcomer knows 32: {spread(list(knows))}; is known to 32: {spread(list(known))}", flush=True)
    for members in (8, 32, 128):
        first, last = zip(*(detection(members, seed) for seed in seeds), strict=True)
        print(f"a death among {members}: first {spread(list(first))}; all {spread(list(last))}", flush=True)
    for members in (8, 32, 128):
        print(f"partition of {members} heals: {spread([heal(members, seed) for seed in seeds])}", flush=True)
    for loss in (0.01, 0.1):
        suspected, dead = zip(*(false_alarms(loss, seed) for seed in seeds[:5]), strict=True)
        print(
            f"{loss:.0%} lost, 32 members, {10 * len(suspected)} min: {sum(suspected)} suspected, {sum(dead)} dead",
            flush=True,
        )
    for members in (8, 32, given.large):
        began = flock(members, seed=0).now
        print(f"{members} joined at once through one: all knew all after less than {began - 10:.1f} s", flush=True)
        for busy in (False, True):
            sent_bytes, datagrams = cost(members, busy=busy)
            print(
                f"{members} {'busy' if busy else 'at rest'}: {sent_bytes:.0f} B/s, {datagrams:.1f} datagrams/s",
                flush=True,
            )


if __name__ == "__main__":
    main()
