"""The page and the HTTP interface: `create_app` makes the application, `Server` and `serve` put it on a port."""

from __future__ import annotations

from appliance.web.app import WebSettings, create_app, finish_pending
from appliance.web.server import Server, serve

__all__ = ["Server", "WebSettings", "create_app", "finish_pending", "serve"]
