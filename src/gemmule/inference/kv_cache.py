"""The KV cache of generation: page tables of sequences that come and go, and the tree of what they leave behind."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from gemmule.inference.pages import KINDS, PAGE, PagePool
from gemmule.inference.prefix_tree import Node, PrefixTree
from gemmule.model.config import Gemma3Config, Kind

# Beside the places where turns end, a prompt can be taken up where a multiple of so many windows ends.
_SPACING = 4
# Pages of a cache that grows, before it does.
_FIRST_PAGES = 256


class CacheTooSmallError(ValueError):
    """The longest possible replies to a request do not fit into the KV cache, even if it is empty."""


class CacheSize(NamedTuple):
    """How many pages of each kind a cache has."""

    local: int
    global_: int

    def pages(self, kind: Kind) -> int:
        """Return the pages of a kind."""
        return self.local if kind == "local" else self.global_


@dataclass
class _Row:
    """One sequence: its tokens that lie in the cache, and the pages that it holds."""

    tokens: list[int]
    nodes: list[Node]  # of its full pages; the first one is the root
    turn: int  # full pages where the prompt ends: from there the prompt can be answered again
    reserved: dict[Kind, int]
    begun: dict[Kind, int]  # the first page that is held
    fresh: set[int] = field(default_factory=set)  # full pages whose local part this sequence brought into the tree


class KVCache:
    """Keys and values of at most `rows` sequences, and of what earlier ones left.

    Page tables are in `tables`, (rows, pages) of each kind; a position p lies in slot p % PAGE of page p // PAGE.
    """

    def __init__(
        self,
        config: Gemma3Config,
        rows: int,
        longest: int,
        size: CacheSize | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Make an empty cache; `size` None lets it grow with what lies in it."""
        self.config = config
        kinds = [kind for kind in KINDS if kind in config.layer_kinds]
        pages = {kind: max(_FIRST_PAGES, rows) if size is None else size.pages(kind) for kind in kinds}
        self.pools = {kind: PagePool(config, kind, pages[kind], dtype, device, size is None) for kind in kinds}
        columns = math.ceil(longest / PAGE) if size else min(math.ceil(longest / PAGE), _FIRST_PAGES)
        self.tables = {kind: np.zeros((rows, columns), dtype=np.int32) for kind in KINDS}
        self.window_pages = window_pages(config)
        self.tree = PrefixTree(self.pools, self.window_pages)
        self._rows: dict[int, _Row] = {}
        self._reserved = dict.fromkeys(kinds, 0)
        self._spacing = _SPACING * max(1, self.window_pages)

    @property
    def rows(self) -> int:
        """How many sequences there can be at once."""
        return len(self.tables["global"])

    @property
    def longest(self) -> int:
        """How many positions the page tables have entries for now."""
        return self.tables["global"].shape[1] * PAGE

    def need(self, positions: int, chunk: int) -> dict[Kind, int]:
        """Return the pages that a sequence of so many positions holds at most, read in chunks of so many tokens."""
        return {kind: pages_of(self.config, kind, positions, chunk) for kind in self.pools}

    def could_fit(self, need: dict[Kind, int], sequences: int) -> bool:
        """Whether an empty cache has room for so many sequences."""
        return all(self._has(kind, count * sequences) for kind, count in need.items())

    def fits(self, need: dict[Kind, int], sequences: int) -> bool:
        """Whether there is room for so many sequences beside what was promised to those that run."""
        return all(self._has(kind, self._reserved[kind] + count * sequences) for kind, count in need.items())

    def _has(self, kind: Kind, pages: int) -> bool:
        return self.pools[kind].grows or pages <= self.pools[kind].size

    def length(self, row: int) -> int:
        """Return how many tokens of a sequence lie in the cache."""
        return len(self._rows[row].tokens)

    def begin(
        self, row: int, prompt: Sequence[int], need: dict[Kind, int], sequences: int = 1, *, anew: bool = False
    ) -> int:
        """Begin a sequence that holds at most `need`; return how many tokens of its prompt are known already.

        `anew` takes none of them from the tree. Room is promised to so many `sequences`, the others of which will be
        its forks.
        """
        found = [] if anew else self.tree.find(prompt)
        known = len(found) * PAGE
        begun = {kind: self._first_page(kind, known) for kind in self.pools}
        own = _Row(list(prompt[:known]), [self.tree.root, *found], (len(prompt) - 1) // PAGE, need, begun)
        for kind, pool in self.pools.items():
            for index in range(begun[kind], len(found)):
                page = found[index].pages[kind]
                pool.hold(page)
                self.tables[kind][row, index] = page
        self.tree.touch(own.nodes[-1])
        self._promise(need, sequences)
        self._admit(row, own)
        return known

    def fork(self, row: int, other: int) -> None:
        """Begin a sequence with all that `row` holds; what both will write to is copied."""
        source = self._rows[row]
        own = _Row([*source.tokens], [*source.nodes], source.turn, source.reserved, {**source.begun})
        full, pages = len(own.nodes) - 1, math.ceil(len(own.tokens) / PAGE)
        for kind, pool in self.pools.items():
            table = self.tables[kind]
            for index in range(own.begun[kind], pages):
                page = int(table[row, index])
                if index < full:
                    pool.hold(page)
                    table[other, index] = page
                else:
                    table[other, index] = fresh = self._take(kind)
                    pool.memory[fresh] = pool.memory[page]
        self._admit(other, own)

    def extend(self, row: int, tokens: Sequence[int]) -> int:
        """Make room for the tokens that the next step reads; return the position of the first one."""
        own = self._rows[row]
        length = len(own.tokens)
        last = math.ceil((length + len(tokens)) / PAGE)
        if last * PAGE > self.longest:
            wider = ((0, 0), (0, max(last, 2 * self.longest // PAGE) - self.longest // PAGE))
            self.tables = {kind: np.pad(table, wider) for kind, table in self.tables.items()}
        for index in range(math.ceil(length / PAGE), last):
            for kind in self.pools:
                self.tables[kind][row, index] = self._take(kind)
        own.tokens += tokens
        return length

    def settle(self, row: int) -> None:
        """After a step: bring the pages that are full now into the tree, and give back those that left the window."""
        own = self._rows[row]
        full = len(own.tokens) // PAGE
        if full < len(own.nodes):  # nothing has changed: fifteen of sixteen tokens
            return
        for index in range(len(own.nodes) - 1, full):
            self._share_page(row, own, index)
        if "local" in self.pools:
            self._leave_window(row, own)

    def finish(self, row: int, sequences: int = 1) -> None:
        """End a sequence, and as many that were promised with it; its full pages stay in the tree."""
        own = self._rows.pop(row)
        self._promise(own.reserved, -sequences)
        self.tree.touch(own.nodes[-1])
        self.tree.unpin(own.nodes[-1])
        for kind, pool in self.pools.items():
            for index in range(own.begun[kind], math.ceil(len(own.tokens) / PAGE)):
                pool.release(int(self.tables[kind][row, index]))
            self.tables[kind][row] = 0

    @property
    def used_bytes(self) -> int:
        """The size of all pages that are held."""
        return sum((pool.size - pool.available) * pool.page_bytes for pool in self.pools.values())

    def _admit(self, row: int, own: _Row) -> None:
        self._rows[row] = own
        self.tree.pin(own.nodes[-1])

    def _promise(self, need: dict[Kind, int], sequences: int) -> None:
        for kind, count in need.items():
            self._reserved[kind] += count * sequences

    def _first_page(self, kind: Kind, position: int) -> int:
        """Return the first page that a token at a position sees."""
        window = self.config.window(kind)
        return 0 if window is None else max(0, position - window + 1) // PAGE

    def _take(self, kind: Kind) -> int:
        while not self.pools[kind].available and self.tree.evict(kind):
            pass
        return self.pools[kind].take()

    def _share_page(self, row: int, own: _Row, index: int) -> None:
        """Bring a full page into the tree; where another sequence has brought the same one, hold that instead."""
        held = {kind: int(self.tables[kind][row, index]) for kind in self.pools if index >= own.begun[kind]}
        node = self.tree.add(own.nodes[-1], tuple(own.tokens[index * PAGE : (index + 1) * PAGE]), held)
        for kind, page in held.items():
            if (shared := node.pages[kind]) != page:
                self.pools[kind].hold(shared)
                self.pools[kind].release(page)
                self.tables[kind][row, index] = shared
            elif kind == "local":
                own.fresh.add(index)
        self.tree.unpin(own.nodes[-1])
        self.tree.pin(node)
        own.nodes.append(node)

    def _leave_window(self, row: int, own: _Row) -> None:
        """Give back the local pages that no token after the last full page sees, since a turn may continue from there.

        The tree keeps those from which another prompt can continue.
        """
        first = self._first_page("local", (len(own.nodes) - 1) * PAGE)
        for index in range(own.begun["local"], first):
            self.pools["local"].release(int(self.tables["local"][row, index]))
            self.tables["local"][row, index] = 0
            if index in own.fresh:
                own.fresh.remove(index)
                if not self._ends_window(index, own.turn):
                    self.tree.drop(own.nodes[index + 1], "local")
        own.begun["local"] = max(first, own.begun["local"])

    def _ends_window(self, index: int, turn: int) -> bool:
        """Whether a local page lies in the window before the end of the prompt, or before a multiple of the spacing."""
        before = -(index + 1) % self._spacing
        return before < self.window_pages or turn - self.window_pages <= index < turn


def window_pages(config: Gemma3Config) -> int:
    """Return how many pages the window before the first position of a page lies in."""
    window = config.window("local")
    return 0 if window is None else math.ceil((window - 1) / PAGE)


def pages_of(config: Gemma3Config, kind: Kind, positions: int, chunk: int) -> int:
    """Return the pages that a sequence of so many positions holds at most, read in chunks of so many tokens."""
    window, every = config.window(kind), math.ceil(positions / PAGE)
    return every if window is None else min(every, math.ceil((window + chunk) / PAGE) + 2)


def exact_size(config: Gemma3Config, rows: int, longest: int, chunk: int) -> CacheSize:
    """Return the size of a cache that has room for so many sequences of `longest` positions, and keeps little else."""
    local, global_ = (rows * pages_of(config, kind, longest, chunk) for kind in KINDS)
    return CacheSize(local, global_)
