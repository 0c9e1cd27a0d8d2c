"""From single sites to the groups that take one format: measured losses and costs added up over what is tied."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import networkx as nx

from bitwright.compiler.allocate.problem import FLOAT, Choice, Cost, Group
from bitwright.compiler.allocate.sensitivity import SiteLoss


def tied_groups(
    losses: Iterable[SiteLoss],
    costs: Mapping[tuple[str, str], Cost],
    ties: Iterable[Collection[str]] = (),
) -> tuple[Group, ...]:
    """Return one group for each set of sites that must have one format.

    A group's choices are the formats whose cost and loss are known for all its members; float loses nothing. A loss
    that is infinite for one member makes the choice infinite, and the allocator leaves it out with a reason.

    Args:
        losses: Of every site and candidate format.
        costs: (site, format) -> seconds, bytes and joules of the site itself.
        ties: Sites that must share a format; sets that overlap are one. Sites that were not measured are left out.

    Returns:
        The groups in the order in which their first members were measured, named after these.
    """
    known = {(s.site, s.format): s.loss for s in losses}
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(site for site, _ in known)
    for tied in ties:
        members = [site for site in tied if site in graph]
        nx.add_path(graph, members)
    order = {site: k for k, site in enumerate(graph)}
    found = [sorted(c, key=order.__getitem__) for c in nx.connected_components(graph)]
    return tuple(_group(members, known, costs) for members in sorted(found, key=lambda m: order[m[0]]))


def _group(
    members: list[str],
    losses: Mapping[tuple[str, str], float],
    costs: Mapping[tuple[str, str], Cost],
) -> Group:
    known = {(site, FLOAT): 0.0 for site in members} | dict(losses)
    formats = dict.fromkeys([FLOAT, *(f for site, f in losses if site == members[0])])
    choices = [
        _choice(fmt, members, known, costs)
        for fmt in formats
        if all((site, fmt) in known and (site, fmt) in costs for site in members)
    ]
    return Group(members[0], tuple(members), tuple(choices))


def _choice(
    fmt: str,
    members: list[str],
    losses: Mapping[tuple[str, str], float],
    costs: Mapping[tuple[str, str], Cost],
) -> Choice:
    paid = [costs[site, fmt] for site in members]
    return Choice(
        fmt,
        math.fsum(losses[site, fmt] for site in members),
        math.fsum(c.latency_s for c in paid),
        math.fsum(c.weight_bytes for c in paid),
        math.fsum(c.energy_j for c in paid),
    )
