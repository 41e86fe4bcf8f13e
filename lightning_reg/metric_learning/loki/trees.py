"""Labels that are nodes of a tree: their distances, what can be predicted from some of them, and what to learn next."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["next_class", "tree_cover", "tree_distances", "tree_locus"]

Node = int | str
Edge = tuple[Node, Node] | tuple[Node, Node, float]


def tree_distances(edges: Sequence[Edge], labels: Sequence[Node] | None = None) -> Tensor:
    """Lengths of the paths between nodes of a tree.

    Args:
        edges: Pairs of nodes, numbers or words, in any direction; a third entry is the edge's length, above 0, else 1.
        labels: The nodes that are labels (the leaves, say), in the order of the labels' numbers: what stands at
            position k is what your data calls k. ``None``: all nodes, if they are the numbers from 0 on.

    Returns:
        ``(N, N)`` float32, for N labels.

    Raises:
        ValueError: If the edges are no tree, or a label is none of its nodes.

    Example:
        >>> tree_distances([("animal", "cat"), ("animal", "dog"), ("thing", "animal"), ("thing", "car")],
        ...                labels=["cat", "dog", "car"])
        tensor([[0., 2., 3.],
                [2., 0., 3.],
                [3., 3., 0.]])

    """
    tree = _tree(edges)
    if labels is None:
        if set(tree.parent) != set(range(len(tree.parent))):
            raise ValueError(
                "tree_distances: `labels` must be given unless the nodes are the numbers from 0 on: their order says"
                " which label has which number."
            )
        labels = range(len(tree.parent))
    chosen = _positions(tree, labels, "labels", "tree_distances")
    distances = torch.zeros(len(tree.parent), len(tree.parent))
    place = {node: position for position, node in enumerate(tree.parent)}
    for node, (parent, length) in tree.parent.items():
        here = place[node]
        if parent is not None:  # every path from here to what came before goes through the parent
            row = distances[place[parent], :here] + length
            distances[here, :here] = row
            distances[:here, here] = row
    return distances[chosen][:, chosen]


def tree_cover(edges: Sequence[Edge]) -> list[Node]:
    """The smallest set of classes from which every node of a tree can be predicted: its leaves.

    Args:
        edges: See :func:`tree_distances`.

    Returns:
        The nodes with one edge, in the order in which the edges name them.

    Raises:
        ValueError: If the edges are no tree.

    Example:
        >>> tree_cover([(0, 1), (0, 2), (2, 3)])
        [1, 3]

    """
    tree = _tree(edges)
    return [node for node, near in tree.near.items() if len(near) == 1]


def tree_locus(edges: Sequence[Edge], observed: Sequence[Node]) -> list[Node]:
    """The nodes that can be predicted by a classifier that knows some: all on paths between those.

    They are predicted where every node is a label, by squared distances; the classes cover the tree if that is all of
    it. Where the leaves alone are labels, ask :func:`pairwise_locus`.

    Args:
        edges: See :func:`tree_distances`.
        observed: The nodes that the classifier knows, one at least.

    Returns:
        Nodes in the order in which the edges name them.

    Raises:
        ValueError: If the edges are no tree, or a class is none of its nodes.

    Example:
        >>> tree_locus([(0, 1), (0, 2), (2, 3), (2, 4)], [1, 2])
        [0, 1, 2]

    """
    return _locus(_tree(edges), observed, "tree_locus")


def next_class(
    edges: Sequence[Edge], observed: Sequence[Node], candidates: Sequence[Node] | None = None
) -> Node | None:
    """The class to collect samples of next: the node farthest from all that can be predicted already.

    With it the locus grows by the most nodes where edges have one length.

    Args:
        edges: See :func:`tree_distances`.
        observed: The nodes that the classifier knows, one at least.
        candidates: The nodes to choose among; ``None``: all.

    Returns:
        A node, of several equally far ones the first that the edges (or the candidates) name; ``None`` if all can be
        predicted.

    Raises:
        ValueError: If the edges are no tree, or a class is none of its nodes.

    Example:
        >>> next_class([(0, 1), (0, 2), (2, 3), (2, 4), (4, 5)], [1, 2])
        5

    """
    tree = _tree(edges)
    locus = _locus(tree, observed, "next_class")
    chosen = list(tree.near) if candidates is None else list(candidates)
    _positions(tree, chosen, "candidates", "next_class")
    away: dict[Node, float] = dict.fromkeys(locus, 0.0)
    waiting = list(locus)
    for node in waiting:  # outwards: each node beside the locus is reached by one way
        for other, length in tree.near[node].items():
            if other not in away:
                away[other] = away[node] + length
                waiting.append(other)
    farthest = max(chosen, key=lambda node: away[node], default=None)
    return None if farthest is None or away[farthest] == 0 else farthest


class _Tree(NamedTuple):
    near: dict[Node, dict[Node, float]]  # in the order in which the edges name the nodes
    parent: dict[Node, tuple[Node | None, float]]  # from one node outwards, parents first


def _tree(edges: Sequence[Edge]) -> _Tree:
    near: dict[Node, dict[Node, float]] = {}
    for edge in edges:
        one, two, *rest = edge
        length = float(rest[0]) if rest else 1.0
        if not 0 < length < math.inf:
            raise ValueError(f"A tree's `edges` must have lengths above 0, got {edge!r}.")
        near.setdefault(one, {})[two] = length
        near.setdefault(two, {})[one] = length
    root = next(iter(near), None)
    parent: dict[Node, tuple[Node | None, float]] = {} if root is None else {root: (None, 0.0)}
    waiting = list(parent)
    for node in waiting:
        for other, length in near[node].items():
            if other not in parent:
                parent[other] = (node, length)
                waiting.append(other)
    if not edges or len(parent) < len(near) or len(edges) != len(near) - 1:
        beside = [node for node in near if node not in parent]
        what = f"{beside[0]!r} is not connected with {root!r}" if beside else "there are several ways between nodes"
        what = what if edges else "there are none"
        raise ValueError(f"A tree's `edges` must connect all nodes in one way each: {what}.")
    return _Tree(near, parent)


def _positions(tree: _Tree, nodes: Sequence[Node], argument: str, function: str) -> list[int]:
    place = {node: position for position, node in enumerate(tree.parent)}
    strange = [node for node in nodes if node not in place]
    if strange:
        raise ValueError(f"{function}: `{argument}` must be nodes of the tree, got {strange[0]!r}.")
    return [place[node] for node in nodes]


def _locus(tree: _Tree, observed: Sequence[Node], function: str) -> list[Node]:
    _positions(tree, observed, "observed", function)
    if not observed:
        raise ValueError(f"{function}: `observed` must have a node at least, got none.")
    left, wanted = {node: len(near) for node, near in tree.near.items()}, set(observed)
    ends = [node for node, count in left.items() if count <= 1 and node not in wanted]
    for node in ends:  # what hangs on the tree by one edge and is not known goes, until nothing does
        del left[node]
        for other in tree.near[node]:
            if other in left:
                left[other] -= 1
                if left[other] == 1 and other not in wanted:
                    ends.append(other)
    return list(left)
