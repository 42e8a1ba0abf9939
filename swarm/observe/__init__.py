"""Reports of a node about itself: status, records of fetches, Prometheus metrics, OpenTelemetry spans, traces."""
