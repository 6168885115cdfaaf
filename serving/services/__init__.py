"""One file per gRPC service: the wire format in, a Query out, and back; the only place that knows the wire."""
