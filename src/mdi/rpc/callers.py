"""Which node may call which method of the service, and the check of every call against the caller's certificate."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Mapping
from enum import Enum
from typing import Any

import grpc

from mdi.rpc import node_pb2
from mdi.rpc.tls import node_names

log = logging.getLogger(__name__)
SERVICE = node_pb2.DESCRIPTOR.services_by_name["Node"]


class Caller(Enum):
    """STARTER: the starter alone. PREVIOUS: the node before this one in the pipeline, as last configured."""

    STARTER = "starter"
    PREVIOUS = "previous"


def complete(callers: Mapping[str, Caller]) -> Mapping[str, Caller]:
    """The same table. Raises RuntimeError unless it names every method of the service, and no other."""
    methods = {method.name for method in SERVICE.methods}
    if wrong := methods ^ callers.keys():
        raise RuntimeError(f"the table of callers and the service differ in {', '.join(sorted(wrong))}")
    return callers


CALLERS = complete(
    {
        "Offer": Caller.STARTER,
        "Weights": Caller.STARTER,
        "Configure": Caller.STARTER,
        "Batches": Caller.PREVIOUS,
        "TokenMasks": Caller.STARTER,
        "Results": Caller.STARTER,
        "Encode": Caller.STARTER,
        "Status": Caller.STARTER,
        "Watch": Caller.STARTER,
        "MeasureHardware": Caller.STARTER,
        "MeasureLink": Caller.STARTER,
        "Spans": Caller.STARTER,
        "Release": Caller.STARTER,
    }
)


class CallerCheck(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses and logs every call that CALLERS does not allow, before anything of its stream is read.

    previous: gives the name in the certificate of the node before this one; empty when there is none.
    """

    def __init__(self, previous: Callable[[], str]) -> None:
        self._previous = previous

    async def intercept_service(
        self, continuation: Callable[[grpc.HandlerCallDetails], Any], details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler | None:
        """See `grpc.aio.ServerInterceptor`. Handlers are coroutines, or async generators where they stream replies."""
        handler = await continuation(details)
        if handler is None:
            return None
        directions = (handler.request_streaming, handler.response_streaming)
        kind = "_".join("stream" if streams else "unary" for streams in directions)
        checked = self._checked_stream if handler.response_streaming else self._checked
        return handler._replace(**{kind: checked(details.method.rpartition("/")[2], getattr(handler, kind))})

    def _checked(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> Any:
            await self._check(method, context)
            return await behaviour(request, context)

        return call

    def _checked_stream(self, method: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def call(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            await self._check(method, context)
            async for message in behaviour(request, context):
                yield message

        return call

    async def _check(self, method: str, context: grpc.aio.ServicerContext) -> None:
        name = caller_name(context)
        allowed = "starter" if CALLERS[method] is Caller.STARTER else self._previous()
        if name is None or name != allowed:
            caller = f"node {name}" if name else "a peer whose certificate names no node"
            only = allowed or "the node before it, once configured,"
            log.warning("refused %s at %s: only %s may call %s", caller, context.peer(), only, method)
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, f"{caller} may not call {method}")


def caller_name(context: grpc.aio.ServicerContext) -> str | None:
    """The node that calls, by its certificate; None without one, or with one that names no node or several."""
    values = context.auth_context().get("x509_subject_alternative_name", ())
    names = node_names([value.decode(errors="replace") for value in values])
    return names[0] if len(names) == 1 else None
