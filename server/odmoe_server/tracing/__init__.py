"""Traces for OpenTelemetry: request, answer, step, layer, node. Off unless somebody names a collector."""
