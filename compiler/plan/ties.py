"""Scale ties: tensors that must share one scale, as connected components."""

from __future__ import annotations

from collections.abc import Collection

import networkx as nx

from bitwright.compiler.plan.selection import Selection


def tie_graph(selection: Selection, prescribed: Collection[str] = ()) -> nx.Graph[str]:
    """Return the graph whose edges join tensors that an operator forces to one scale.

    A carrier writes what it reads; an operator with unified scales (Concat) writes on its inputs' scale. Of several
    inputs, those whose ranges are prescribed are requantized instead.
    """
    graph: nx.Graph[str] = nx.Graph()
    graph.add_nodes_from(v.name or "" for v in selection.quantized)
    for unit in selection.units:
        if unit not in selection.integer or unit.rule is None:
            continue
        if unit.role == "carrier" or unit.rule.scales == "unified":
            several = len(unit.activations) > 1
            for value in unit.activations:
                if several and value.name in prescribed:
                    continue
                graph.add_edge(value.name or "", unit.output.name or "")
    return graph


def tie_groups(selection: Selection, prescribed: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return, for every quantized tensor, the sorted names of the tensors that share its scale (itself included).

    Args:
        selection: What runs on integers.
        prescribed: Tensors whose ranges the target prescribes.
    """
    groups: dict[str, tuple[str, ...]] = {}
    for component in nx.connected_components(tie_graph(selection, prescribed)):
        members = tuple(sorted(component))
        groups |= dict.fromkeys(members, members)
    return groups
