"""The main node: HTTP API, decode loop, attention, routers, and the cluster of node agents."""
