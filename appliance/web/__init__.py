"""The page and the HTTP interfaces: `create_app` makes the application, `Server` and `serve` put it on a port."""

from __future__ import annotations

from appliance.web.app import WebSettings, create_app, door, finish_keeping, finish_pending
from appliance.web.metrics import Metrics
from appliance.web.server import THREADS, Server, serve
from appliance.web.v2 import OfDevice

__all__ = ["THREADS", "Metrics", "OfDevice", "Server", "WebSettings", "create_app", "door", "finish_keeping", "finish_pending", "serve"]
