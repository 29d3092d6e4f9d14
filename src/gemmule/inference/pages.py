"""Pages of the KV cache: keys and values of 16 positions, counted by who holds them."""

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from gemmule.model.config import Gemma3Config, Kind

# Positions of a page. step.c has the same number: the scores of a page are one vector of the widest processors.
PAGE = 16
KINDS: tuple[Kind, ...] = ("local", "global")


class OutOfPages(Exception):  # noqa: N818 - a state that the caller resolves, not an error
    """Every page of a pool is held."""


class PagePool:
    """The pages of all layers of one kind, in one tensor; `memory` is (pages, numbers of a page).

    A page has, for each layer of the kind, keys (K,H,PAGE) and then values (K,PAGE,H). Page 0 is never given away: it
    stands for positions that nobody reads. A pool that `grows` doubles where all its pages are held, which moves it.
    """

    def __init__(
        self, config: Gemma3Config, kind: Kind, pages: int, dtype: torch.dtype, device: torch.device, grows: bool
    ) -> None:
        self.layers = [layer for layer, own in enumerate(config.layer_kinds) if own == kind]
        self.layer_numbers = numbers_per_layer(config)
        self.memory = _zeros(pages + 1, len(self.layers) * self.layer_numbers, dtype, device)
        self.grows = grows
        self._holders = [0] * (pages + 1)
        self._free = list(range(pages, 0, -1))

    @property
    def size(self) -> int:
        """How many pages there are."""
        return len(self.memory) - 1

    @property
    def available(self) -> int:
        """How many pages nobody holds."""
        return len(self._free)

    def take(self) -> int:
        """Hold a free page, emptied; OutOfPages where there is none."""
        if not self._free and self.grows:
            self._grow()
        if not self._free:
            raise OutOfPages
        page = self._free.pop()
        self._holders[page] = 1
        self.memory[page] = 0  # what an earlier sequence left must not reach this one, not even times a weight of 0
        return page

    def hold(self, page: int) -> None:
        """Hold a page that somebody holds already."""
        self._holders[page] += 1

    def holders(self, page: int) -> int:
        """Return how many hold a page."""
        return self._holders[page]

    def release(self, page: int) -> None:
        """No longer hold a page; without holders it is free."""
        self._holders[page] -= 1
        if not self._holders[page]:
            self._free.append(page)

    def _grow(self) -> None:
        first, held = len(self.memory), self.memory
        self.memory = _zeros(2 * first, held.shape[1], held.dtype, held.device)
        self.memory[:first] = held
        self._holders += [0] * first
        self._free = list(range(len(self.memory) - 1, first - 1, -1))

    @property
    def page_bytes(self) -> int:
        """The size of a page."""
        return self.memory.shape[1] * self.memory.element_size()

    def keys_and_values(self, config: Gemma3Config, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Return what pages (B,P) hold of a layer of the model: keys and values (B,K,P*PAGE,H), copies."""
        groups, size = config.num_key_value_heads, config.head_dim
        first = self.layers.index(layer) * self.layer_numbers
        held = self.memory[:, first : first + self.layer_numbers][pages]
        rows, count = pages.shape
        keys, values = held.view(rows, count, 2, -1).unbind(dim=2)
        keys = keys.view(rows, count, groups, size, PAGE).permute(0, 2, 1, 4, 3).reshape(rows, groups, -1, size)
        values = values.view(rows, count, groups, PAGE, size).transpose(1, 2).reshape(rows, groups, -1, size)
        return keys, values

    def write(
        self, config: Gemma3Config, layer: int, places: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor]
    ) -> None:
        """Write keys and values (B,K,T,H) of a layer into pages and slots, (B,T) each."""
        groups, size = config.num_key_value_heads, config.head_dim
        first, half = self.layers.index(layer) * self.layer_numbers, self.layer_numbers // 2
        pages, slots = places
        keys = self.memory[:, first : first + half].view(-1, groups, size, PAGE)
        values = self.memory[:, first + half : first + 2 * half].view(-1, groups, PAGE, size)
        keys[pages, :, :, slots] = new[0].transpose(1, 2).to(keys.dtype)
        values[pages, :, slots] = new[1].transpose(1, 2).to(values.dtype)


def _zeros(pages: int, numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros (pages, numbers); on the CPU they take memory once they are written, unlike those of torch.zeros.

    MemoryError where the system does not promise so much.
    """
    size = pages * numbers * dtype.itemsize
    if device.type != "cpu" or not size:
        return torch.zeros(pages, numbers, dtype=dtype, device=device)
    try:
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"{size:,} bytes: {error}") from None
    return torch.frombuffer(memory, dtype=dtype).view(pages, numbers)


def numbers_per_layer(config: Gemma3Config) -> int:
    """Return how many numbers a page has for each layer: keys, then values."""
    return 2 * config.num_key_value_heads * config.head_dim * PAGE


def layer_offsets(pools: Sequence[PagePool], layers: int) -> list[int]:
    """Return where each layer's keys begin in a page of its kind, in numbers."""
    places = {layer: index * pool.layer_numbers for pool in pools for index, layer in enumerate(pool.layers)}
    return [places[layer] for layer in range(layers)]
