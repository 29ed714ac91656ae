"""The network card that other hosts reach this one by, where the host's own name does not say it.

gloo listens at the address of the host's own name. Debian and Ubuntu write `127.0.1.1 NAME` into /etc/hosts: each host then
offers its loopback address to the others, which find nobody there.
"""

from __future__ import annotations

import os
import socket

_ANYWHERE = "192.0.2.1"  # of a network for documentation (RFC 5737); nothing is sent, only the route is asked for


def card_for_gloo(towards: str) -> str:
    """The card for GLOO_SOCKET_IFNAME of a job of several hosts whose rank 0 has the address `towards`; "" when gloo finds
    the right one by itself, when the hosts meet on the loopback (they are one), or when no card is known."""
    if not _inward(_looked_up(socket.gethostname()) or "127.0.0.1") or towards == "localhost" or _inward(towards):
        return ""
    source = _source(towards)
    if not source or _inward(source):  # rank 0 itself, called by its own name
        source = _source(_ANYWHERE) or _only_address()
    return card_of(source) if source and not _inward(source) else ""


def choose_card(towards: str, *, several: bool) -> None:
    """Tell gloo, through GLOO_SOCKET_IFNAME, the card of a job of `several` hosts whose rank 0 has the address `towards`,
    unless somebody has or it needs no telling. Before anything asks for the own address or makes a group."""
    if several and not os.environ.get("GLOO_SOCKET_IFNAME"):
        card = card_for_gloo(towards)
        if card:
            os.environ["GLOO_SOCKET_IFNAME"] = card


def card_of(address: str) -> str:
    """The card that has an IPv4 address; "" when none has."""
    import psutil

    return next((card for card, own in psutil.net_if_addrs().items() if any(one.address == address for one in own)), "")


def address_of(card: str) -> str:
    """The IPv4 address of a card; "" when it has none."""
    import psutil

    found = psutil.net_if_addrs().get(card, [])
    return next((one.address for one in found if one.family == socket.AF_INET), "")


def own_address(card: str = "") -> str:
    """The address that gloo listens at: that of the card, else of the host's own name; "" when there is none."""
    return (address_of(card) if card else "") or _looked_up(socket.gethostname())


def _inward(address: str) -> bool:
    return address.startswith("127.")


def _looked_up(name: str) -> str:
    try:
        return socket.gethostbyname(name)  # the same question that gloo asks when a group is made
    except OSError:
        return ""


def _only_address() -> str:
    """The own address of a host without a default route, when it has one card only that is up, beside the loopback."""
    import psutil

    states = psutil.net_if_stats()
    found = [own.address for card, addresses in psutil.net_if_addrs().items() if card in states and states[card].isup
             for own in addresses if own.family == socket.AF_INET and not _inward(own.address)]
    return found[0] if len(found) == 1 else ""


def _source(towards: str) -> str:
    """The own address from which packets to a host leave."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, 9))
            return probe.getsockname()[0]
    except OSError:
        return ""
