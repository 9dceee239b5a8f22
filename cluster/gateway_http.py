"""vLLM's OpenAI server as the gateway serves it: its app, only the routes that we mean, and the guard round it."""

from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

from cluster.gateway_guard import ROUTES, Guard
from cluster.gateway_health import Health, health_routes
from cluster.gateway_load import OpenRequests
from cluster.gateway_mark import MarkedAnswers
from cluster.gateway_openapi import openapi_of
from cluster.gateway_schema import SchemaCheck
from cluster.gateway_vllm import ForwardingClient
from cluster.validate import Limits

_TASKS = ("generate",)
_OURS = frozenset({"/health", "/ready", "/expertmesh/status", "/openapi.json"})


async def build_http_app(
    client: ForwardingClient,
    health: Health,
    *,
    limits: Limits,
    request_timeout_s: float,
    max_body_bytes: int,
    load: OpenRequests,
    schemas: SchemaCheck,
) -> ASGIApp:
    """The ASGI app for all HTTP requests. Needs the running event loop on which it will serve."""
    config = client.model_config
    served_name = str(config.served_model_name)
    flags = ["--model", config.model, "--served-model-name", served_name, "--disable-fastapi-docs"]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*flags, "--disable-log-stats"])
    assert args is not None  # argparse's annotation only; it exits or returns
    app = build_app(args, _TASKS, config)
    await init_app_state(client, app.state, args, _TASKS)
    # `root` of /v1/models is the model's name: where its files lie is nobody's business.
    for path in app.state.openai_serving_models.base_model_paths:
        path.model_path = served_name
    kept = [route for route in app.router.routes if getattr(route, "path", None) in ROUTES.keys() - _OURS]
    document = JSONResponse(openapi_of(served_name, limits, version=version("expertmesh")))

    async def openapi(_: Request) -> Response:
        return document

    app.router.routes[:] = [*health_routes(health), Route("/openapi.json", openapi), *kept]
    guard = Guard(
        app,
        limits=limits,
        served_name=served_name,
        request_timeout_s=request_timeout_s,
        max_body_bytes=max_body_bytes,
        load=load,
        schemas=schemas,
    )
    return MarkedAnswers(guard)
