"""A Hub on this machine, for the unmodified clients of the real one.

The clients read the address of the Hub and the place of their cache when they are imported, so
both are chosen here, before. Until a test starts it, the Hub answers nobody.
"""

from tempfile import TemporaryDirectory

from tests.support.hub.server import HubServer

HUB = HubServer()
HOME = TemporaryDirectory(prefix="hf_ecif-tests-")
