"""Names and addresses of servers, as Host headers and settings have them."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit


def name_of(host: str) -> str:
    """The name or address in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").removesuffix(".")
    except ValueError:  # "[" without "]"
        return host


def address_of(name: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(name)
    except ValueError:
        return None


def is_loopback(name: str) -> bool:
    """Whether it is localhost or an address of loopback: no name that others could make to lead there."""
    address = address_of(name)
    return name == "localhost" or (address is not None and address.is_loopback)
