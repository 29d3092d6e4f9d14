"""What was read and said, as a tree of pages: a prompt continues from the longest beginning that is known."""

from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from gemmule.inference.pages import PAGE, PagePool
from gemmule.model.config import Kind

Tokens = tuple[int, ...]


@dataclass(eq=False)
class Node:
    """The keys and values of 16 tokens after those of the parent; a local page is kept where it may be of use."""

    tokens: Tokens
    parent: "Node | None"
    pages: dict[Kind, int] = field(default_factory=dict)
    children: dict[Tokens, "Node"] = field(default_factory=dict)
    users: int = 0  # sequences that end here so far

    def path(self) -> Iterator["Node"]:
        """Yield this node and those before it, without the root."""
        node: Node | None = self
        while node is not None and node.parent is not None:
            yield node
            node = node.parent


class PrefixTree:
    """The pages that sequences left behind, by their tokens; those used longest ago go first."""

    def __init__(self, pools: dict[Kind, PagePool], window_pages: int) -> None:
        """`window_pages` is how many pages the window before a position can lie in."""
        self._pools, self._window_pages = pools, window_pages
        self._root = Node((), None)
        # Nodes that hold a page of a kind; what was used last comes last, children before their parents.
        self._order: dict[Kind, OrderedDict[Node, None]] = {kind: OrderedDict() for kind in pools}

    def nodes(self, kind: Kind) -> Collection[Node]:
        """Return the nodes that hold a page of a kind, those used longest ago first."""
        return self._order[kind]

    @property
    def root(self) -> Node:
        """The beginning of every sequence."""
        return self._root

    def find(self, tokens: Sequence[int]) -> list[Node]:
        """Return the nodes of the longest beginning of `tokens` from which one can continue, one token less at most."""
        node, found, usable, run = self._root, [], 0, 0
        for start in range(0, (len(tokens) - 1) // PAGE * PAGE, PAGE):
            child = node.children.get(tuple(tokens[start : start + PAGE]))
            if child is None:
                break
            found.append(child)
            node = child
            run = run + 1 if all(kind in child.pages for kind in self._pools) else 0
            if "local" not in self._pools or run >= min(len(found), self._window_pages):
                usable = len(found)
        return found[:usable]

    def add(self, parent: Node, tokens: Tokens, pages: dict[Kind, int]) -> Node:
        """Hold the pages of 16 tokens after `parent`; return their node, which another sequence may have made before.

        It gets the pages that it lacks.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(tokens, parent)
        for kind, page in pages.items():
            if kind not in node.pages:
                node.pages[kind] = page
                self._pools[kind].hold(page)
                self._order[kind][node] = None
        return node

    def drop(self, node: Node, kind: Kind) -> None:
        """No longer hold the page of a kind."""
        if (page := node.pages.pop(kind, None)) is not None:
            self._pools[kind].release(page)
            del self._order[kind][node]

    def pin(self, node: Node) -> None:
        """Keep a node for a sequence that will continue from it."""
        node.users += 1

    def unpin(self, node: Node) -> None:
        """No longer keep it."""
        node.users -= 1
        self._prune(node)

    def touch(self, node: Node) -> None:
        """Say that a path was used: the node and those before it."""
        for each in node.path():
            for kind in each.pages:
                self._order[kind].move_to_end(each)

    def evict(self, kind: Kind) -> bool:
        """Give back a page of this kind that no sequence uses; return whether there was one.

        A global page goes with its node, the last of a path, since what follows would be lost with it.
        """
        pool = self._pools[kind]
        for node in self._order[kind]:
            if pool.holders(node.pages[kind]) > 1 or (kind == "global" and (node.children or node.users)):
                continue
            self.drop(node, kind)
            if kind == "global":
                self.drop(node, "local")
            self._prune(node)
            return True
        return False

    def _prune(self, node: Node) -> None:
        """Remove a node, and those before it, that hold nothing and lead nowhere."""
        while node.parent is not None and not (node.pages or node.children or node.users):
            del node.parent.children[node.tokens]
            node = node.parent
