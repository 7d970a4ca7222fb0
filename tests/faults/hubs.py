"""Faults of the Hub and the way to it; all commands push."""

from faults.table import fault

AREA = "Hub"
ANY, COMMIT = ".", "POST .*/commit/"
FAILED = "not pushed to|stays at main as it is"


def fails(pattern, action, times=1_000_000):
    return lambda hub: hub.fail(pattern, action, times)


def patient():
    """Spare the test the seconds that a user would wait."""
    import time

    import hf_dash.hub.client as client

    client.TIMEOUT, client.DEADLINE = 0.5, 4.0
    time.sleep = lambda seconds: None


for told, pattern, action in (
    ("does not answer", ANY, "hang"),
    ("drops every connection", ANY, "drop"),
    ("fails with 500", ANY, 500),
    ("refuses the token, 401", ANY, 401),
    ("forbids writing, 403", "POST", 403),
    ("asks for patience, 429, for ever", ANY, 429),
    ("sends a byte a tenth of a second", "GET", "drip"),
    ("fails with 500 at the commit", COMMIT, 500),
    ("drops the connection at the commit", COMMIT, "drop"),
    ("fails at the tag", "POST .*/tag/", 500),
):
    hub = fails(pattern, action)
    fault(AREA, told, "FFFF", FAILED, hub=hub, inside=patient)

for told, pattern, action in (
    ("fails once with 503", ANY, 503),
    ("drops one connection", ANY, "drop"),
    ("another commit comes first, 412", COMMIT, 412),
    ("the answer to the commit is lost", COMMIT, "lose"),
    ("the answer to the tag is lost", "POST .*/tag/", "lose"),
    ("the answer to the new repository is lost", "POST .*/repos/create", "lose"),
):
    hub = fails(pattern, action, 1)
    fault(AREA, told, "====", hub=hub, inside=patient)
