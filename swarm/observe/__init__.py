"""What a node reports of itself: status report, fetch history, Prometheus metrics, OpenTelemetry spans, traces."""
