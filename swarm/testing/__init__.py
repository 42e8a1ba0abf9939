"""Contracts as programs: `check_transport`, `check_store` and `check_origin` use one in every way that a node does.

They raise AssertionError, with the broken promise, where an implementation does not keep its contract: the protocols
`swarm.transport.Transport`, `swarm.store.Store` and `swarm.origin.OriginReader`. They need no test framework and only
this machine:

    from swarm.testing import check_transport, pairs_of

    def test_does_it_keep_the_contract():
        check_transport(pairs_of(MyTransport))         # about 5 s

docs/transports.md shows a complete transport, docs/origins.md describes origins. Nothing else in `swarm` imports this
package.
"""

from swarm.testing.origins import check_origin
from swarm.testing.stores import check_store
from swarm.testing.transport_pairs import Pair, pairs_of
from swarm.testing.transports import CHECKS, check_transport, run_check

__all__ = ["CHECKS", "Pair", "check_origin", "check_store", "check_transport", "pairs_of", "run_check"]
