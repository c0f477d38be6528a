"""Attention of packed sequences in PyTorch: a call for each run of sequences of equal lengths, whose results are copied
to their places, or the blocked implementation, whose tiles do not cross sequences. Many short sequences are first
brought into an order in which equal lengths are successive.

``run`` is the PyTorch implementation of the operator, called with the namespace and the operator's arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastgen.ops.attention import blocked
from fastgen.ops.attention import tangent as tangents_of
from fastgen.ops.attention.blocked import allocate_grad, allocate_lse, allocate_out
from fastgen.ops.attention.problem import Problem, Saved, Tangents
from fastgen.ops.attention.sequences import Order, Span, may_split, order, runs

_Run = Callable[..., tuple[Tensor, ...]]


def _part(saved: Saved, span: Span) -> tuple[Any, ...]:
    """The tensors of a run of sequences, in the order of the operators."""
    query, key, value, out, lse = saved[:5]
    of_queries = span.queries(query), span.queries(out), span.queries(lse)
    return of_queries[0], span.keys(key), span.keys(value), *of_queries[1:], None, None, None


def _tangents(tangents: Tangents, span: Span) -> tuple[Tensor | None, ...]:
    query, key, value, _ = tangents
    return (
        None if query is None else span.queries(query),
        None if key is None else span.keys(key),
        None if value is None else span.keys(value),
        None,
    )


def _store(results: tuple[Tensor, ...], parts: tuple[Tensor, ...], span: Span, of_keys: tuple[int, ...] = ()) -> None:
    """Copies the first results of a run of sequences, of which those at ``of_keys`` have rows for keys."""
    for i, (result, part) in enumerate(zip(results, parts, strict=False)):
        (span.keys(result) if i in of_keys else span.queries(result)).copy_(part)


def _in_order(saved: Saved, by: Order) -> Saved:
    query, key, value, out, lse = saved[:5]
    tensors = by.of_queries(query), by.of_keys(key), by.of_keys(value), by.of_queries(out), by.of_queries(lse)
    return Saved._make((*tensors, None, None, by.sequences, saved.options, saved.namespace))


def _tangents_in_order(tangents: Tangents, by: Order) -> Tangents:
    query, key, value, _ = tangents
    return Tangents(
        None if query is None else by.of_queries(query),
        None if key is None else by.of_keys(key),
        None if value is None else by.of_keys(value),
    )


def _restore(by: Order, results: tuple[Tensor, ...], ordered: tuple[Tensor, ...], of_keys: tuple[int, ...]) -> None:
    for i, (result, part) in enumerate(zip(results, ordered, strict=False)):
        by.restore(result, part, i in of_keys)


def forward(run: _Run, problem: Problem) -> tuple[Tensor, Tensor]:
    if not may_split(problem):
        return blocked.forward(problem)
    query, key, value = problem[:3]
    results = allocate_out(query, value.size(-1)), allocate_lse(query)
    by = order(problem)
    if by is not None:
        tensors = by.of_queries(query), by.of_keys(key), by.of_keys(value), None, None, by.sequences
        _restore(by, results, forward(run, Problem._make((*tensors, problem.options, problem.namespace))), ())
        return results
    for span in runs(problem):
        part = span.queries(query), span.keys(key), span.keys(value), None, None, None
        _store(results, run(problem.namespace, *part, *problem.options), span)
    return results


def backward(
    run: _Run, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query, key, value = saved[:3]
    results = allocate_grad(query), allocate_grad(key), allocate_grad(value)
    by = order(saved) if may_split(saved) else None
    if by is not None:
        of_lse = None if grad_lse is None else by.of_queries(grad_lse)
        _restore(by, results, backward(run, by.of_queries(grad_out), of_lse, _in_order(saved, by))[:3], (1, 2))
    elif may_split(saved):
        for span in runs(saved):
            of_lse = None if grad_lse is None else span.queries(grad_lse)
            arguments = span.queries(grad_out), of_lse, *_part(saved, span), *saved.options, False
            _store(results, run(saved.namespace, *arguments), span, (1, 2))
    else:
        for result, part in zip(results, blocked.backward(grad_out, grad_lse, saved, False)[:3], strict=True):
            assert part is not None
            result.copy_(part)
    return *results, query.new_empty(0)


def tangent(run: _Run, saved: Saved, tangents: Tangents) -> tuple[Tensor, Tensor]:
    if not may_split(saved):
        return tangents_of.tangent(saved, tangents)
    results = allocate_out(saved.query, saved.value.size(-1)), allocate_lse(saved.query)
    by = order(saved)
    if by is not None:
        _restore(by, results, tangent(run, _in_order(saved, by), _tangents_in_order(tangents, by)), ())
        return results
    for span in runs(saved):
        arguments = *_part(saved, span), *_tangents(tangents, span), *saved.options
        _store(results, run(saved.namespace, *arguments), span)
    return results


def second_order(
    run: _Run, grad_out: Tensor, grad_lse: Tensor | None, saved: Saved, tangents: Tangents
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    query, key, value = saved[:3]
    of_rows = allocate_out(query, value.size(-1)), allocate_lse(query)
    results = *of_rows, allocate_grad(query), allocate_grad(key), allocate_grad(value)
    by = order(saved) if may_split(saved) else None
    if by is not None:
        of_lse = None if grad_lse is None else by.of_queries(grad_lse)
        ordered = _in_order(saved, by), _tangents_in_order(tangents, by)
        _restore(by, results, second_order(run, by.of_queries(grad_out), of_lse, *ordered)[:5], (3, 4))
    elif may_split(saved):
        for span in runs(saved):
            of_lse = None if grad_lse is None else span.queries(grad_lse)
            arguments = (*_part(saved, span), *_tangents(tangents, span), *saved.options, False)
            _store(results, run(saved.namespace, span.queries(grad_out), of_lse, *arguments), span, (3, 4))
    else:
        parts = tangents_of.second_order(grad_out, grad_lse, saved, tangents, False)[:5]
        for result, part in zip(results, parts, strict=True):
            assert part is not None
            result.copy_(part)
    return *results, query.new_empty(0)
