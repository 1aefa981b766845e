"""The addresses of models: https anywhere, http on this machine and on allowed hosts, metadata services never."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Collection

from autoembed.errors import Fault

# Link-local addresses, and those where clouds give out credentials: AWS, Google, Alibaba, Azure, Oracle.
FORBIDDEN_NETWORKS = [
    ipaddress.ip_network(network)
    for network in (
        "169.254.0.0/16",
        "fe80::/10",
        "fd00:ec2::/32",
        "fd20:ce::254/128",
        "100.100.100.200/32",
        "168.63.129.16/32",
        "192.0.0.192/32",
    )
]
# The names of these services, which a proxy may resolve.
FORBIDDEN_NAMES = {
    "metadata",
    "metadata.google.internal",
    "metadata.goog",
    "instance-data",
    "instance-data.ec2.internal",
}
# IPv4 inside IPv6 (RFC 6052), which ipaddress does not unwrap.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

# This form is stricter than that of HTTP clients, so that none finds another host in a URL.
URL = re.compile(r"(https?)://([^\s/?#\\@]+@)?(\[[0-9A-Fa-f:.]+(?:%\w+)?\]|[^\s/?#\\@:\[\]]+)(:[0-9]+)?([/?#]\S*)?")


def fault_of(url: str, http_hosts: Collection[str]) -> Fault | None:
    """The reason why a URL is not called. http_hosts: the hosts that an administrator allows http for."""
    parts = URL.fullmatch(url)
    shown = without_user(url)
    if parts is None:
        return Fault(f'"{shown}" is not an http or https URL', hint="Write it as https://HOST/PATH.")
    scheme, user, host = parts[1], parts[2], _plain(parts[3])
    if user is not None:
        return Fault(
            f'"{shown}" names a user, who would not be sent and whose password would stand in a table',
            hint="Say where a key is found with api_key.",
        )
    if is_forbidden(host):
        return Fault(
            f'"{shown}" is a link-local address or a cloud\'s metadata service, which is never called',
            hint="Give the address of the embedding server itself.",
        )
    if scheme == "https" or _is_here(host) or host in http_hosts:
        return None
    return Fault(
        f'"{shown}" would be called without encryption',
        hint=f"Use https, or allow it first: SELECT autoembed.allow_http_host('{host}').",
    )


def fault_of_query(url: str) -> Fault | None:
    """The reason why a base_url is refused for what follows its path."""
    shown = re.split(r"[?#]", without_user(url))[0]
    if shown == without_user(url):
        return None
    return Fault(
        f'"{shown}" has a query or a fragment, which may hold a key',
        hint="Leave it out. Say where a key is found with api_key.",
    )


def without_user(url: str) -> str:
    return re.sub(r"//[^/]*@", "//", url)


def is_forbidden(host: str) -> bool:
    """Whether the host of a URL is never called. Where a proxy resolves names, nothing more can be checked."""
    address = _address(host)
    return _plain(host) in FORBIDDEN_NAMES if address is None else _is_forbidden_address(address)


def may_connect(host: str, address: str) -> bool:
    """Whether a connection to the address of a host is allowed. A name for this machine must lead to this machine."""
    resolved = _unwrapped(ipaddress.ip_address(address))
    return not _is_forbidden_address(resolved) and (resolved.is_loopback or not _is_here(_plain(host)))


def _is_here(host: str) -> bool:
    address = _address(host)
    return host == "localhost" or host.endswith(".localhost") if address is None else address.is_loopback


def _is_forbidden_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return any(address in network for network in FORBIDDEN_NETWORKS)


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, in any notation that the system knows (2852039166, 0xA9FEA9FE); None for a name."""
    try:
        plain = _plain(host).partition("%")[0]
        found = socket.getaddrinfo(plain, None, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return None
    return _unwrapped(ipaddress.ip_address(found[0][4][0]))


def _unwrapped(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address inside an IPv6 address, or else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped or address.sixtofour or address


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()
