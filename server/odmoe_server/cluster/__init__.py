"""The cluster of node agents and the predictor, seen from the server."""
