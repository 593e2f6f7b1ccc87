"""Calls of a layer on a CUDA device as replays of CUDA graphs: tens of small kernels launched as one.

Most of a layer's kernels run for less time than it takes to launch them, and groups of heads that could run at once do so only
in a graph (see per_head). From the second call of a shape on, a site copies queries, keys and values to where its graph reads
them, launches it, and copies the output. All sites of a shape share that place, and the memory for what lies between.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..attention.core import captured, output_of
from ..attention.per_head import Layer, PerHead
from ..measure import without_launches

SHAPES = 4  # of a site's calls, the latest, for which a graph is kept

_lock = Lock()  # from the copying of the inputs to that of the output, no other thread may use their place


@dataclass
class Place:
    """Where the graphs of all sites of one shape find their inputs and leave their output."""

    inputs: tuple[Tensor, ...]  # q (B, H, n_q, d), k (B, H_k, n, d), v (B, H_k, n, e)
    output: Tensor  # (B, H, n_q, e)
    pool: Any  # memory of what lies between

    @classmethod
    def like(cls, q: Tensor, k: Tensor, v: Tensor) -> Place:
        with torch.inference_mode(False):  # else only calls in inference mode could write to them
            pool = torch.cuda.graph_pool_handle() if q.is_cuda else None
            return cls(tuple(torch.empty_like(x) for x in (q, k, v)), output_of(q, v), pool)

    def fill(self, *inputs: Tensor) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)


@dataclass
class Graph:
    """One site's calls of one shape. `run` takes the place's inputs to its output."""

    place: Place
    run: Callable[[], Any]

    @classmethod
    @torch.no_grad()
    def of(cls, layer: Layer | PerHead, place: Place, scale: float | None) -> Graph:
        def work() -> None:
            place.output.copy_(layer(*place.inputs, scale=scale))

        return cls(place, without_launches(work, place.output.device, place.pool))

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        self.place.fill(*inputs)
        self.run()
        return self.place.output.clone()


_places: WeakValueDictionary[Hashable, Place] = WeakValueDictionary()


class Replays:
    """The graphs of one site. They know where its tensors lie, so that a copy of the site begins with none."""

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()  # None: called once

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def clear(self) -> None:
        """The site's tensors have moved."""
        self._graphs.clear()

    def attend(self, layer: Layer | PerHead, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """layer(q, k, v, scale=scale), of inputs for which `possible` holds."""
        stream = torch.cuda.current_stream(q.device) if q.is_cuda else None
        shape = (stream, *((x.shape, x.stride(), x.dtype, x.device) for x in (q, k, v)))
        key = (layer, scale, shape)
        with _lock:
            known, graph = key in self._graphs, self._graphs.get(key)
            if known and graph is None:
                if (place := _places.get(shape)) is None:
                    _places[shape] = place = Place.like(q, k, v)
                place.fill(q, k, v)
                graph = Graph.of(layer, place, scale)
            self._graphs[key] = graph
            self._graphs.move_to_end(key)
            while len(self._graphs) > SHAPES:
                self._graphs.popitem(last=False)
            if graph is not None:
                return graph(q, k, v)
        return layer(q, k, v, scale=scale)  # the first call, which may compile its kernels


def possible(*inputs: Tensor) -> bool:
    """Whether a call can be captured: on a CUDA device, outside of another graph, where no gradients are asked for."""
    device = inputs[0].device
    if device.type != "cuda" or torch.compiler.is_compiling() or captured(device):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in inputs))
