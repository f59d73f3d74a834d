"""Expert parallelism: each process holds some of the experts of a layer, and tokens travel to them and back.

`import hf_moe_ext` registers `MoeExtEP` as `"moe_ext"` with the interface that Transformers has for this since 5.23:
`from_pretrained(..., distributed_config=DistributedConfig(ep_size=..., ep_implementation="moe_ext"))`.

Axes: T tokens of this process, K slots per token, E experts of the layer, R ranks of the expert-parallel group, L
experts of one rank (E / R), N rows sent, M rows received, H hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard

from .modeling.moe_experts import skips_unused_slots


if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

try:
    from transformers.distributed.expert_parallel import AllReduceEP, EPImplementation
except ImportError as error:
    raise ImportError("expert parallelism needs transformers 5.23 or later.") from error


class MoeExtEP(EPImplementation):
    """How the experts of one layer get their tokens: `(hidden (T, H), index (T, K), weights (T, K)) -> (T, H)`.

    In training, and wherever the ranks hold different batches, tokens travel by all-to-all: one row for each pair of a
    token and a rank that has experts of it, with the ids and the weights of its slots there. The rank returns the
    weighted sum of its experts, so a row comes back too, however many experts it met. Unused slots (ids `E` and above)
    are not sent; nothing is computed for them, and their weights may be anything. A sum has the same order of terms in
    each run.

    Without gradients, where the ranks share one batch, no token travels: every rank computes its part of the sum for
    all tokens, and the parts are added (`AllReduceEP` of Transformers). That needs no sizes on the host. Experts with
    the implementation `"eager"` keep to the all-to-all.

    What this package puts in front of experts (copies and constants, mixtures of tokens) stays in front of the
    exchange and sees the ids of the whole layer.

    Args:
        experts (`nn.Module`): the experts of one layer, sharded by Transformers: `num_experts` is L.
        ep_mesh (`DeviceMesh`): the R ranks that hold all experts together.
        tp_mesh (`DeviceMesh`): the ranks that hold the same batch; of size 1 where all batches differ.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self._experts: Any = experts
        self._run_all = experts.forward
        # Ours are known by the attribute: code that came with a model from the Hub has a class of its own.
        if hasattr(type(experts), "moe_exchange"):
            self.experts_forward = self._experts.run_local
            self._experts.moe_exchange = self._exchange
        else:
            self._run_all = self._exchange
        self._all_reduce = AllReduceEP(experts, ep_mesh, tp_mesh) if self.shares_batch else None
        if self._all_reduce is not None:
            self._all_reduce.experts_forward = self.experts_forward

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        with self._summed_gradients():
            out: torch.Tensor = self._run_all(hidden_states, top_k_index, top_k_weights)
        return out

    def _exchange(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        trains = torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad)
        # Eager experts of some families (gpt_oss) raise for slots of other ranks. They read sizes on the host anyway.
        name = getattr(getattr(self._experts, "config", None), "_experts_implementation", None)
        if self._all_reduce is not None and not trains and name not in (None, "eager"):
            summed: torch.Tensor = self._all_reduce(hidden, index, weights)
            return summed
        if self.tp_mesh.size() == 1:
            return self._all_to_all(hidden, index, weights)
        part = self._all_to_all(*(_take_slice(tensor, self.tp_mesh) for tensor in (hidden, index, weights)))
        return _join_slices(part, self.tp_mesh, hidden.shape)

    def _all_to_all(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        group, local = self.ep_mesh.get_group(), self.num_local_experts
        plan = _plan(index, local, self.ep_mesh.size(), group)
        # Ids of the rank that gets the row, ascending, with L for slots that are not for it.
        ids = index[plan.token]
        ids = torch.where(ids.div(local, rounding_mode="floor") == plan.rank[:, None], ids % local, local)
        ids, place = ids.sort(dim=-1, stable=True)
        rows, values = hidden[plan.token], weights[plan.token].gather(1, place)

        received = _send(ids.int(), plan.send, plan.receive, group).to(index.dtype)
        rows, values = _SendRows.apply(group, plan.send, plan.receive, rows, values)
        parts = self._run_experts(rows, received, values, plan.columns).to(hidden.dtype)
        (parts,) = _SendRows.apply(group, plan.receive, plan.send, parts)

        # From rank to rank: within one, no token stands twice, so the order of the terms is that of the ranks.
        out = hidden.new_zeros(hidden.shape, dtype=torch.promote_types(hidden.dtype, torch.float32))
        for token, part in zip(plan.token.split(plan.send), parts.split(plan.send), strict=True):
            out = out.index_add_(0, token, part.to(out.dtype))
        return out.to(hidden.dtype)

    def _run_experts(
        self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, columns: list[int]
    ) -> torch.Tensor:
        """(M, H), (M, K), (M, K) -> the weighted sums of this rank's experts (M, H). `columns[k]` rows have more than
        k slots here, which are their first ones."""
        if rows.shape[0] == 0:
            # Experts that meet no token get gradients of zero, as in one process. FSDP relies on having some.
            row = rows.sum(dim=0, keepdim=True)
            return self.experts_forward(row, ids.new_zeros(1, 1), weights.new_ones(1, 1))[:0]
        if skips_unused_slots(self._experts):
            width = sum(count > 0 for count in columns)
            return self.experts_forward(rows, ids[:, :width], weights[:, :width])
        # Other functions copy a row for each slot, used or not, so they get one row for each used slot.
        used = torch.argsort((ids == self.num_local_experts).t().reshape(-1), stable=True)[: sum(columns)]
        row = used % rows.shape[0]
        ids, weights = (tensor.t().reshape(-1)[used, None] for tensor in (ids, weights))
        single = self.experts_forward(rows[row], ids, weights)
        first, *others = single.split(columns)  # by column, in which no row stands twice; the first one has them all
        out = first.to(torch.promote_types(first.dtype, torch.float32))
        for number, part in zip(row.split(columns)[1:], others, strict=True):
            out = out.index_add(0, number, part.to(out.dtype))
        return out

    @contextlib.contextmanager
    def _summed_gradients(self) -> Iterator[None]:
        """What stands in front of the exchange has parameters that every rank holds whole and uses on its own batch:
        their gradients are added over the ranks. (FSDP adds those of the experts module over ranks with the same
        experts only.) Ranks that share a batch have the same gradients, which count once."""
        batches, swapped = self.ep_mesh.size() // self.tp_mesh.size(), []
        if batches > 1 and torch.is_grad_enabled():
            for name in vars(self._experts).get("moe_added", ()):
                for module in self._experts._modules[name].modules():
                    for key, parameter in module._parameters.items():
                        if parameter is not None and parameter.requires_grad:
                            swapped.append((module._parameters, key, parameter))
        for store, key, parameter in swapped:
            store[key] = _SumGradient.apply(parameter, self.ep_mesh.get_group(), self.tp_mesh.size())
        try:
            yield
        finally:
            for store, key, parameter in swapped:
                store[key] = parameter


class _Plan(NamedTuple):
    """Which rows go where.

    Attributes:
        token, rank: (N,) int64, by rank, then by token.
        send, receive: rows for and from each rank.
        columns: for k below K, received rows that have more than k slots here.
    """

    token: torch.Tensor
    rank: torch.Tensor
    send: list[int]
    receive: list[int]
    columns: list[int]


def _plan(index: torch.Tensor, num_local: int, num_ranks: int, group: Any) -> _Plan:
    """`index` is (T, K), with ids of the whole layer. The ranks tell each other what they send; reading that is the
    one time that the host waits for the device."""
    tokens, slots = index.shape
    owner = index.div(num_local, rounding_mode="floor")
    used = (owner.unsqueeze(-1) == torch.arange(num_ranks, device=index.device)).sum(dim=1)  # (T, R) slots
    columns = (used.unsqueeze(-1) > torch.arange(slots, device=index.device)).sum(dim=0)  # (R, K) rows
    received = torch.empty_like(columns)
    dist.all_to_all_single(received, columns, group=group)
    counts = torch.stack([columns, received]).tolist()
    send, receive = ([row[0] for row in matrix] for matrix in counts)
    wanted = (used > 0).t().reshape(-1)
    order = torch.argsort(wanted, descending=True, stable=True)[: sum(send)]
    here = [sum(column) for column in zip(*counts[1], strict=True)]
    return _Plan(order % max(tokens, 1), order // max(tokens, 1), send, receive, here)


def _send(rows: torch.Tensor, send: list[int], receive: list[int], group: Any) -> torch.Tensor:
    out = rows.new_empty(sum(receive), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class _SendRows(torch.autograd.Function):
    """Rows of several tensors to the ranks; gradients come back the same way, all in one node, so that ranks whose
    graphs differ (a rank without tokens) call the collectives in the same order."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, send: list[int], receive: list[int], *tensors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.route = group, send, receive
        return tuple(_send(tensor, send, receive, group) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        group, send, receive = ctx.route
        needed = ctx.needs_input_grad[3:]
        back = (_send(g, receive, send, group) if need else None for g, need in zip(gradients, needed, strict=True))
        return None, None, None, *back


class _SumGradient(torch.autograd.Function):
    """The tensor itself; its gradient is the sum over a group in which every gradient stands `copies` times."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, copies: int) -> torch.Tensor:
        ctx.group, ctx.copies = group, copies
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient / ctx.copies, None, None


def _take_slice(tensor: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """This rank's rows of a tensor that all ranks of the mesh hold. Every rank gets the gradients of all slices."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)
    return whole.redistribute(mesh, [Shard(0)]).to_local()


def _join_slices(part: torch.Tensor, mesh: DeviceMesh, shape: torch.Size) -> torch.Tensor:
    """All rows of the ranks' slices, which may differ in length."""
    rows = DTensor.from_local(part.contiguous(), mesh, [Shard(0)], shape=shape, stride=(shape[1], 1))
    return rows.full_tensor()
